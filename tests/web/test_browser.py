"""The site in a real browser: followed live, by mouse, by keys, without a script, and in the dark.

Needs chromium, chromedriver and the package selenium. After each test the browser has met no error,
broken no policy, and asked nobody but the site.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Recorder
from tests.support import ROOT
from tests.web.browsing import EVIL, fill_with, site

from bgworker.history.reader import History
from bgworker.web import connections
from bgworker.web.server import Server

pytest.importorskip("selenium", reason="needs selenium, of the extra 'integration'")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver (Debian: apt install chromium-driver)")]

from selenium.common.exceptions import NoSuchElementException  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver import Chrome, ChromeOptions, Keys  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

PATIENCE = 60.0
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--window-size=1200,900")
COMMANDS = 200


class Browser:
    """A browser, and what it may be asked about a page."""

    def __init__(self, folder: Path, *, has_script: bool = True) -> None:
        options = ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={folder}"):
            options.add_argument(flag)
        if not has_script:
            options.add_experimental_option("prefs", {
                "profile.managed_default_content_settings.javascript": 2})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = Chrome(options=options, service=Service(str(DRIVER)))
        self.driver.set_page_load_timeout(PATIENCE)

    def open(self, server: Server, path: str = "") -> None:
        """Go in by the printed address, and on to a page."""
        self.driver.get(server.url)
        self.wait(lambda: self.driver.current_url.endswith(f":{server.port}/"))
        if path:
            self.driver.get(f"http://127.0.0.1:{server.port}{path}")

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def link(self, text: str) -> Any:
        return self.driver.find_element(By.PARTIAL_LINK_TEXT, text)

    def press(self, *keys: str) -> None:
        """Press keys wherever the focus is."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def text(self, selector: str = "body") -> str:
        return str(self.one(selector).text)

    def rows(self) -> list[str]:
        """The ids of the tasks in the list."""
        found = self.driver.execute_script(
            "return [...document.querySelectorAll('tbody tr')].map(row => row.id)")
        return list(found)

    def wait(self, condition: Callable[[], object]) -> Any:
        """Wait until something is so, while the page changes."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if found := condition():
                    return found
            except (NoSuchElementException, StaleElementReferenceException):
                pass  # not yet, or no longer
            assert time.monotonic() < deadline, f"it never came true on:\n{self.text()[:2000]}"
            time.sleep(0.05)

    def troubles(self, server: Server) -> list[str]:
        """Return what the browser complained of, and requests to anywhere else, since it was last
        asked."""
        found = [f"{each['level']}: {each['message']}" for each in self.driver.get_log("browser")]
        home = f"http://127.0.0.1:{server.port}/"
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith((home, "data:", "chrome:", "about:")):
                    found.append(f"asked {url}")
        return found


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.driver.quit()


@contextmanager
def content_with(browser: Browser, server: Server) -> Iterator[None]:
    browser.troubles(server)
    yield
    assert browser.troubles(server) == []


@pytest.fixture
def browser(shared_browser: Browser, server: Server) -> Iterator[Browser]:
    with content_with(shared_browser, server):
        yield shared_browser


@pytest.fixture
def many(record: Recorder) -> list[str]:
    """Two hundred tasks, the newest first; every tenth failed."""
    record.connection.execute("BEGIN")
    tasks = [record.task(f"job {number}", "completed" if number % 10 else "failed",
                         created=record.ago(minutes=number),
                         **({} if number % 10 else {"failure_type": "OSError",
                                                    "failure_message": f"no room {number}"}))
             for number in range(COMMANDS)]
    record.connection.execute("COMMIT")
    return [f"t{task}" for task in tasks]


# ---------------------------------------------------------------- a run, live

def test_a_run_of_two_hundred_commands_is_followed_live(tmp_path: Path,
                                                        shared_browser: Browser) -> None:
    path, browser = tmp_path / "live.db", shared_browser
    talks = "i=0; while [ ! -e stop ]; do i=$((i+1)); echo said $i; sleep 0.1; done"
    commands = [talks, "echo to the error stream >&2; exit 3",
                *[f"echo {number}; sleep 0.02" for number in range(COMMANDS - 2)]]
    (tmp_path / "commands").write_text("\n".join(commands))
    with site(path) as server, content_with(browser, server):
        browser.open(server)
        browser.wait(lambda: "there is no history" in browser.text())
        assert browser.troubles(server) != []  # that page has the status 503, which is logged
        run = subprocess.Popen(
            [sys.executable, "-m", "bgworker", "run", "-j", "4", "--db", str(path),
             "-f", "commands"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            browser.wait(lambda: re.search(r"\d\s+completed", browser.text(".counts")))
            browser.troubles(server)
            browser.driver.execute_script("window.isTheSamePage = true")
            browser.wait(lambda: browser.text(".counts .completed").startswith("198"))
            assert browser.text(".counts .running").startswith("1")
            assert browser.text(".counts .failed").startswith("1")
            assert browser.driver.execute_script("return window.isTheSamePage")

            browser.one(".counts .running a").click()
            browser.wait(lambda: len(browser.rows()) == 1)
            browser.one("tbody tr a").click()
            count = len(browser.wait(lambda: browser.all("#log li.output")))
            browser.driver.execute_script("window.isTheSamePage = true")
            browser.wait(lambda: len(browser.all("#log li.output")) > count + 5)
            assert "said" in browser.text("#log")
            (tmp_path / "stop").touch()
            browser.wait(lambda: "completed" in browser.text("h1"))
            assert browser.driver.execute_script("return window.isTheSamePage")
            said = [line.text.split()[-1] for line in browser.all("#log li.output")]
            assert said == [f"{number}" for number in range(int(said[0]), int(said[-1]) + 1)]

            browser.open(server)
            browser.wait(lambda: browser.all(".counts .failed a"))
            browser.one(".counts .failed a").click()
            browser.wait(lambda: len(browser.rows()) == 1)
            browser.one("tbody tr a").click()
            browser.wait(lambda: "to the error stream" in browser.text("#log"))
            assert "exit" in browser.text(".failure")
        finally:
            (tmp_path / "stop").touch()
            run.wait(PATIENCE)


def test_a_line_is_on_the_screen_soon_after_it_was_said(
        tmp_path: Path, shared_browser: Browser,
        record_property: Callable[[str, object], None]) -> None:
    """How soon is measured, and not judged here: the machine may be busy."""
    path, browser = tmp_path / "live.db", shared_browser
    program = ("import sys, time\nfrom bgworker import Scheduler, current_task\n"
               "def talk():\n"
               "    for _ in range(20):\n"
               "        time.sleep(0.233)\n"
               "        current_task().output(f'at {time.time():.6f}')\n"
               f"with Scheduler(1, sinks=[{f'sqlite:{path}'!r}]) as pool:\n"
               "    pool.options(name='talks').submit(lambda: (sys.stdin.readline(), talk()))\n")
    talker = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        with site(path) as server, content_with(browser, server):
            while not path.exists():
                time.sleep(0.01)
            time.sleep(0.5)
            browser.open(server, "/task/talks")
            browser.wait(lambda: browser.all("#log[data-live]"))
            browser.driver.execute_script("""
                window.seen = [];
                new MutationObserver(changes => {
                  for (const change of changes) for (const node of change.addedNodes)
                    if (node.className === "output")
                      window.seen.push([Date.now() / 1000, node.textContent]);
                }).observe(document.getElementById("log"), { childList: true });""")
            assert talker.stdin is not None
            talker.stdin.write(b"\n")
            talker.stdin.flush()
            browser.wait(lambda: browser.driver.execute_script("return window.seen.length") == 20)
            seen = browser.driver.execute_script("return window.seen")
            browser.wait(lambda: "completed" in browser.text("h1"))
    finally:
        talker.communicate(timeout=PATIENCE)
    late = sorted(time - float(text.rpartition("at ")[2]) for time, text in seen)
    record_property("median_seconds", round(late[10], 3))
    record_property("longest_seconds", round(late[-1], 3))
    print(f"on screen after {late[10]:.3f} s (median), {late[-1]:.3f} s (longest)")
    assert late[-1] < PATIENCE


def test_a_log_that_was_refused_is_followed_when_it_can_be(
        server: Server, browser: Browser, record: Recorder,
        monkeypatch: pytest.MonkeyPatch) -> None:
    task = record.task("talks", "running")
    monkeypatch.setattr(connections, "MOST_LIVE", 0)
    browser.open(server, f"/task/{task}")
    browser.wait(lambda: any("503" in each for each in browser.troubles(server)))
    monkeypatch.undo()
    record.said(task, "at last")
    browser.wait(lambda: "at last" in browser.text("#log"))
    browser.troubles(server)  # it may have been refused once more before


# ---------------------------------------------------------------- by mouse and by keys

def test_tasks_are_filtered_and_paged_there_and_back(server: Server, browser: Browser,
                                                     many: list[str]) -> None:
    browser.open(server)
    for step in range(4):
        browser.wait(lambda: browser.rows() == many[50 * step:50 * step + 50])  # noqa: B023
        if step < 3:
            browser.link("Older").click()
    assert not browser.driver.find_elements(By.LINK_TEXT, "Older")
    for step in (2, 1, 0):
        browser.link("Newer").click()
        browser.wait(lambda: browser.rows() == many[50 * step:50 * step + 50])  # noqa: B023
    browser.driver.back()
    browser.wait(lambda: browser.rows() == many[50:100])
    browser.open(server)
    browser.one(".counts .failed a").click()
    browser.wait(lambda: browser.rows() == many[::10])
    field = browser.one("input[name=text]")
    field.send_keys("no room 50", Keys.ENTER)
    browser.wait(lambda: browser.rows() == [many[50]])
    browser.one("tbody tr a").click()
    browser.wait(lambda: "no room 50" in browser.text(".failure"))


def test_keys_alone_lead_everywhere(server: Server, browser: Browser, many: list[str]) -> None:
    browser.open(server)
    browser.wait(lambda: browser.rows() == many[:50])
    browser.press("j", "j", "j", "k")
    focused = "return document.activeElement.closest('tr')?.id"
    assert browser.driver.execute_script(focused) == many[1]
    browser.press(Keys.ENTER)
    browser.wait(lambda: browser.text("h1").startswith("job 1"))
    browser.press(Keys.ESCAPE)
    browser.wait(lambda: browser.rows() == many[:50])
    browser.press("/")
    assert browser.driver.execute_script("return document.activeElement.name") == "text"
    browser.press("no room 190", Keys.ENTER)
    browser.wait(lambda: browser.rows() == [many[190]])
    browser.press("j", Keys.ENTER)
    browser.wait(lambda: "no room 190" in browser.text(".failure"))
    browser.press(Keys.ESCAPE)
    browser.wait(lambda: browser.rows() == [many[190]])  # the list as it was filtered
    # Tab reaches the links of the list, and where the focus is can be seen
    stops = []
    for _ in range(30):
        browser.press(Keys.TAB)
        stops.append(browser.driver.execute_script("""
            const at = document.activeElement, style = getComputedStyle(at);
            return [at.tagName, at === document.body || style.outlineStyle !== "none",
                    Boolean(at.closest("tbody"))];"""))
    assert any(is_in_list for *_, is_in_list in stops)
    assert [stop for stop in stops if not stop[1]] == []


def test_what_is_typed_and_selected_stays_while_the_page_is_refreshed(
        server: Server, browser: Browser, many: list[str], record: Recorder) -> None:
    browser.open(server)
    browser.one("input[name=text]").send_keys("half a w")
    new = f"t{record.task('brand new', created=record.now)}"
    browser.wait(lambda: browser.rows()[0] == new)
    assert browser.one("input[name=text]").get_attribute("value") == "half a w"
    assert browser.driver.execute_script("return document.activeElement.name") == "text"
    browser.one("#pause").click()
    assert browser.text("#pause") == "Resume"
    paused = f"t{record.task('paused', created=record.now)}"
    time.sleep(4)  # longer than a refresh takes
    assert browser.rows()[0] == new
    browser.one("#pause").click()
    browser.wait(lambda: browser.rows()[0] == paused)


# ---------------------------------------------------------------- without a script, in the dark

def test_without_a_script_links_and_forms_do_it_all(server: Server, tmp_path: Path,
                                                    many: list[str], record: Recorder) -> None:
    record.many_said(many[0][1:], 500)
    browser = Browser(tmp_path / "browser", has_script=False)
    try:
        with content_with(browser, server):
            browser.open(server)
            assert len(browser.all("tbody tr")) == 50 and not browser.one("#pause").is_displayed()
            browser.link("Older").click()
            browser.wait(lambda: "job 50" in browser.text("tbody"))
            browser.link("Newer").click()
            browser.wait(lambda: "job 49" in browser.text("tbody"))
            browser.one("input[name=text]").send_keys("no room 5")
            browser.one("form button").click()
            browser.wait(lambda: len(browser.all("tbody tr")) == 1)
            browser.one("tbody tr a").click()
            browser.wait(lambda: "no room 50" in browser.text(".failure"))
            browser.driver.get(f"http://127.0.0.1:{server.port}/task/job%200")
            browser.wait(lambda: "line 503" in browser.text("#log"))
            browser.link("Older").click()
            browser.wait(lambda: "line 303" in browser.text("#log"))
            for name in ("Failures", "Timeline", "Runs", "Tasks"):
                browser.link(name).click()
                browser.wait(lambda: browser.text("nav [aria-current=page]") == name)  # noqa: B023
    finally:
        browser.driver.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_in_either_scheme(server: Server, browser: Browser, record: Recorder,
                                            many: list[str], scheme: str) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": scheme}]})
    record.said(many[0][1:], "a line", "error")
    for path in ("/", "/failures", "/runs", f"/task/{many[0][1:]}"):
        browser.open(server, path)
        found = browser.driver.execute_script("""
            const canvas = document.createElement("canvas")
              .getContext("2d", { willReadFrequently: true });
            function rgb(color) {  // of any notation
              canvas.clearRect(0, 0, 1, 1);
              canvas.fillStyle = color;
              canvas.fillRect(0, 0, 1, 1);
              return [...canvas.getImageData(0, 0, 1, 1).data];
            }
            const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
              .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
              .reduce((sum, x, at) => sum + x * [0.2126, 0.7152, 0.0722][at], 0);
            function behind(element) {
              for (let at = element; at; at = at.parentElement) {
                const color = rgb(getComputedStyle(at).backgroundColor);
                if (color[3] === 255) return light(color);
              }
              return light(rgb("Canvas"));
            }
            const pale = [];
            for (const element of document.querySelectorAll("main *, header *")) {
              const has = [...element.childNodes].some(
                node => node.nodeType === 3 && node.data.trim());
              if (!has || !element.getClientRects().length || element.closest("svg")) continue;
              const [a, b] = [light(rgb(getComputedStyle(element).color)), behind(element)];
              const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
              if (ratio < 4.5) pale.push(element.outerHTML.slice(0, 80) + " " + ratio.toFixed(2));
            }
            return [behind(document.body), pale];""")
        assert found[0] > 0.8 if scheme == "light" else found[0] < 0.1
        assert found[1] == [], path


@pytest.mark.parametrize("width", [320, 700, 2000])
def test_no_page_is_wider_than_its_window(server: Server, browser: Browser, record: Recorder,
                                          many: list[str], width: int) -> None:
    record.task("a_very_long_name_" * 20, last_progress_msg="x" * 900)
    try:
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False})
        for path in ("/", "/failures", "/timeline", "/runs", f"/task/{many[0][1:]}"):
            browser.open(server, path)
            assert browser.driver.execute_script(
                "return document.documentElement.scrollWidth <= innerWidth"), path
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# ---------------------------------------------------------------- hostile tasks

def test_markup_that_a_task_controls_does_nothing(server: Server, browser: Browser,
                                                  record: Recorder) -> None:
    fill_with(record, EVIL + "<style>*{display:none}</style><base href=//evil.example>")
    with History(record.path) as history:
        tasks = [task.task_id for task in history.tasks()]
    browser.open(server)
    browser.driver.execute_script("window.alert = () => { window.isHurt = true; }")
    for path in ("/", "/failures", "/timeline", "/runs", *[f"/task/{task}" for task in tasks]):
        browser.open(server, path)
        assert not browser.driver.execute_script("""
            return window.isHurt
              || document.querySelector("main script, main img, main style, base")
              || [...document.querySelectorAll("*")].some(
                each => [...each.attributes].some(one => one.name.startsWith("on")))""")
        assert "alert(1)" in browser.text()
    record.connection.execute("UPDATE tasks SET status = 'running', run_id = NULL")
    browser.open(server, f"/task/{tasks[0]}")
    record.said(tasks[0], EVIL + "at last")
    browser.wait(lambda: "at last" in browser.text("#log"))
    assert not browser.all("main script, main img")

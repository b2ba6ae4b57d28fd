"""The example of a window: it compiles everywhere, type-checks where mypy is, and runs where there
is a display."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.readme import run_block
from tests.support import ROOT


DRIVER = """
import json, sys, tkinter
from tkinter import ttk

def driven(window, n=0, mainloop=tkinter.Misc.mainloop):
    kinds = (ttk.Treeview, tkinter.Button)
    table, *buttons = [each for each in window.winfo_children() if isinstance(each, kinds)]
    start, cancel = sorted(buttons, key=lambda button: button["text"], reverse=True)
    cancelled = []

    def press():
        start.invoke(), start.invoke(), start.invoke()
        look()

    def look():
        values = [table.item(each)["values"] for each in table.get_children()]
        rows = [[str(value) for value in row] for row in values]
        if not cancelled and sum("step" in row[-1] for row in rows if row) == 2:
            cancelled.append(table.get_children()[0])
            table.selection_set(cancelled)
            cancel.invoke()
        states = [row[0] for row in rows if row]
        if cancelled and states.count("running") == 2 and rows[0][0] == "cancelled":
            print(json.dumps(rows))
            window.destroy()
        else:
            window.after(20, look)

    window.after(0, press)
    mainloop(window, n)

tkinter.Misc.mainloop = driven
"""


def sample() -> str:
    return (ROOT / "tools" / "examples" / "window.py").read_text(encoding="utf-8")


def test_the_sample_compiles_and_is_about_thirty_lines_long() -> None:
    code = compile(sample(), "sample", "exec", dont_inherit=True)
    assert (
        "poll" in code.co_names
        and len([line for line in sample().splitlines() if line.strip()]) <= 35
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.parametrize(
    "mistake, is_found", [(None, False), ("event.task.status", True), ("subscription.poll", True)]
)
def test_the_sample_uses_what_is_there(
    tmp_path: Path, mistake: str | None, is_found: bool, cache: Path
) -> None:
    pytest.importorskip("mypy", reason="needs mypy")
    text = sample() if mistake is None else sample().replace(mistake, mistake + "_")
    assert (text != sample()) is is_found
    (tmp_path / "sample.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--check-untyped-defs",
            "--config-file",
            os.devnull,
            "sample.py",
            "--cache-dir",
            str(cache),
            "--disable-error-code",
            "var-annotated",
            "--disable-error-code",
            "has-type",
        ],
        cwd=tmp_path,
        timeout=300,
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    assert done.returncode == is_found, done.stdout + done.stderr


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A display to draw on: a virtual one, where there is X11."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    if sys.platform in ("win32", "darwin"):
        yield
        return
    server = shutil.which("Xvfb")
    if server is None:
        pytest.skip("needs Xvfb, an X server without a screen")
    reading, writing = os.pipe()
    with subprocess.Popen(
        [server, "-displayfd", str(writing), "-screen", "0", "800x600x24", "-nolisten", "tcp"],
        pass_fds=[writing],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            os.close(writing)
            with open(reading, encoding="ascii") as told:
                number = told.readline().strip()
            assert number.isdigit(), "the X server did not start"
            monkeypatch.setenv("DISPLAY", f":{number}")
            yield
        finally:
            process.terminate()
            process.wait(30)


def test_the_window_shows_what_the_tasks_do_and_cancels_one(display: None, tmp_path: Path) -> None:
    done = run_block(DRIVER + sample(), tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, third = json.loads(done.stdout)
    assert first[0] == "cancelled" and "step" in first[1]
    assert second[0] == "running" and "step" in second[1], "it went on meanwhile"
    assert third[0] == "running", "it took the place of the first"

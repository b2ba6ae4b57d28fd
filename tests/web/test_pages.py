"""What the pages show, and that nothing which a task says becomes part of them."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.histories import Recorder, make_nightly
from tests.web.browsing import EVIL, Parsed, ask, fields_with, fill_with, site

from bgworker.web.server import Server

NOW = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
PATHS = ("/", "/failures", "/timeline", "/runs", "/task/last")


def page(server: Server, path: str, status: int = 200) -> Parsed:
    answer = ask(server, path)
    assert answer.status == status, answer.body
    return Parsed(answer.body)


def names_on(server: Server, path: str) -> list[str]:
    return re.findall(r'<td class="name"[^>]*><a [^>]*>([^<]*)</a>', ask(server, path).body)


# ---------------------------------------------------------------- the list

def test_the_list_shows_the_newest_first_with_what_is_worth_knowing(
    record: Recorder, server: Server
) -> None:
    record.task("load users", created=record.ago(minutes=3), took=125.0)
    record.task("load orders", "failed", created=record.ago(minutes=2), failure_type="ValueError",
                failure_message="row 7 is bad")
    record.task("sync", "running", created=record.ago(minutes=1), last_progress_pct=42.0,
                last_progress_msg="row 42")
    assert names_on(server, "/") == ["sync", "load orders", "load users"]
    text = page(server, "/").words
    for said in ("3 all 1 running 1 completed 1 failed", "ValueError: row 7 is bad", "2m05s",
                 "42%", "3m ago"):
        assert said in text
    times = [attributes for tag, attributes in page(server, "/").tags if tag == "time"]
    assert all(re.match(r"20\d\d-\d\d-\d\dT", str(each["datetime"])) for each in times)


@pytest.mark.parametrize("query, names", [
    ("status=failed", ["bad one"]), ("name=load*", ["load b", "load a"]), ("name=LOAD*", []),
    ("name=oad", ["load b", "load a"]), ("text=NEEDLE", ["load b"]), ("text=needle&name=x", []),
    ("since=10m", ["bad one"]), ("since=1d", ["bad one", "load b", "load a"]),
    ("until=2020-01-01T00:00:00Z", []), ("status=failed&since=", ["bad one"])])
def test_each_filter_narrows_the_list_and_an_empty_one_says_so(
    record: Recorder, server: Server, query: str, names: list[str]
) -> None:
    record.task("load a", created=record.ago(hours=3))
    record.said(record.task("load b", created=record.ago(hours=2)), "hay\nneedle\nhay")
    record.task("bad one", "failed", created=record.ago(minutes=1))
    assert names_on(server, f"/?{query}") == names
    if not names:
        assert "No such tasks." in page(server, f"/?{query}").text


def test_what_is_filtered_by_stays_in_the_form_and_in_each_link(
    record: Recorder, server: Server
) -> None:
    for number in range(120):
        record.task(f'a&b="{number}"', created=record.ago(seconds=120 - number))
    parsed = page(server, "/?name=a%26b%3D*&since=7d")
    fields = {each.get("name"): each.get("value") for tag, each in parsed.tags if tag == "input"}
    assert fields == {"text": "", "name": "a&b=*"}
    assert {"value": "7d", "selected": None} in [each for tag, each in parsed.tags
                                                 if tag == "option"]
    [failed, older] = [link for link in parsed.links() if "status=" in link or "before=" in link]
    for link in (failed, older):
        assert "name=a%26b%3D%2A" in link and "since=7d" in link


def test_pages_lead_back_and_forth_through_all_tasks(record: Recorder, server: Server) -> None:
    for number in range(120):
        record.task(f"task {number}", created=record.ago(seconds=120 - number))
    path, seen = "/", []
    for _ in range(3):
        seen += names_on(server, path)
        last, path = path, next((each for each in page(server, path).links() if "before=" in each),
                                "")
    assert seen == [f"task {number}" for number in reversed(range(120))] and path == ""
    back = next(each for each in page(server, last).links() if "after=" in each)
    assert names_on(server, back) == seen[50:100]


def test_a_run_and_a_kind_of_failure_can_be_looked_at_alone(
    record: Recorder, server: Server
) -> None:
    run = record.run("0" * 31 + "1")
    record.task("in the run", run_id=run)
    record.task("elsewhere", "failed", failure_type="E", failure_message="row 1")
    record.task("elsewhere, too", "failed", failure_type="E", failure_message="row 2")
    assert names_on(server, f"/?run={run}") == ["in the run"]
    assert f"Only: run {run} (lift)" in page(server, f"/?run={run}").words
    [link] = [link for link in page(server, "/failures").links() if "fingerprint=" in link]
    assert names_on(server, link) == ["elsewhere, too", "elsewhere"]


def test_what_runs_comes_first_however_many_wait_behind_it(
    record: Recorder, server: Server
) -> None:
    record.task("runs", "running", created=record.ago(minutes=5))
    for number in range(60):
        record.task(f"waits {number}", "scheduled", created=record.ago(seconds=60 - number))
    assert names_on(server, "/") == ["runs", *(f"waits {n}" for n in reversed(range(10, 60)))]
    assert names_on(server, "/?name=*")[0] == "waits 59", "a filter says what comes, in order"


# ---------------------------------------------------------------- one task

def test_a_task_shows_its_failure_and_what_it_said(tmp_path: Path) -> None:
    ids = make_nightly(tmp_path / "nightly.db")
    with site(tmp_path / "nightly.db") as server:
        text = page(server, f"/task/{ids['load orders']}").text
        assert "Why it failed" in text and "row 2 is bad\nand so is the next" in text
        assert "Traceback (most recent call last)" in text
        assert "loaded row 2" in text and "one row was odd" in text and '{"odd":[3,null]}' in text
        errors = page(server, f"/task/{ids['load orders']}?stream=error").text
        assert "one row was odd" in errors and "loaded row" not in errors
        users = page(server, f"/task/{ids['load users']}").text
        assert '{"ticket": 7, "tags": ["a", "b"]}' in users
        assert "not tonight" in page(server, f"/task/{ids['cleanup']}").text


def test_a_task_leads_to_the_one_that_it_ran_again_and_to_the_last_that_ran_it_again(
    record: Recorder, server: Server,
) -> None:
    def links_of(task: str) -> dict[str, str]:
        return {href: text for href, text in re.findall(
            r'<a href="/task/([0-9a-f]{32})"[^>]*>([^<]*)</a>', ask(server, f"/task/{task}").body)
            if href != task}

    tasks: list[str] = []
    for status in ("failed", "timed_out", "completed"):
        again = {"rerun_of": tasks[-1]} if tasks else {}
        tasks.append(record.task("load", status, created=record.ago(seconds=90 - len(tasks)),
                                 metadata=again, **again))
    first, second, third = tasks
    assert links_of(first) == {third: third[-8:]}
    assert links_of(second) == {first: first[-8:], third: third[-8:]}
    assert links_of(third) == {second: second[-8:]}
    text = page(server, f"/task/{first}").text
    assert re.search(rf"Was run again as\s*{third[-8:]}\s*completed", text)
    assert "Runs again" not in text and "Was run again" not in page(server, f"/task/{third}").text


@pytest.mark.parametrize(
    ("name", "version"), [("load", 2), (EVIL, 2), ("", 2), (7, 2), ("a", None)])
def test_a_resumable_task_is_told_to_be_one(
    record: Recorder, server: Server, name: object, version: object
) -> None:
    record.task(metadata={"resumable": {"name": name, "version": version}})
    answer = page(server, "/task/last")
    harmless(ask(server, "/task/last").body)
    assert ("Resumable" in answer.text) == (name in ("load", EVIL))
    assert "Resumable load, version 2" in answer.words or name != "load"


@pytest.mark.parametrize("written", [EVIL, EVIL[:60], "", "x" * 60_000, 7, ["last"], None])
def test_an_id_that_a_program_made_up_harms_no_page(
    record: Recorder, server: Server, written: object,
) -> None:
    record.task(metadata={"rerun_of": written})
    body = ask(server, "/task/last").body
    harmless(body)
    assert len(body) < 20_000 and ("Runs again" in body) == (written == EVIL[:60])


RESULT = '<pre tabindex="0">5</pre>'


def test_arguments_result_and_source_are_sent_to_nobody_who_has_not_asked(tmp_path: Path) -> None:
    ids = make_nightly(tmp_path / "nightly.db")
    with site(tmp_path / "nightly.db") as server:
        path = f"/task/{ids['load users']}"
        body = ask(server, path).body
        assert "def load(" not in body and "hidden, " in body and RESULT not in body
        [arguments, result, source] = [each for each in Parsed(body).links() if "show=" in each]
        assert "def load(rows: int" in page(server, source).text
        assert "[5]" in page(server, arguments).text and "show=result" in result
        assert RESULT in ask(server, result).body and "[5]" not in page(server, result).text
        assert "def load(" not in ask(server, arguments).body
        for other in ("/", "/failures", "/timeline", "/runs"):
            assert "def load(" not in ask(server, other).body


def test_a_log_is_paged_from_either_end(record: Recorder, server: Server) -> None:
    task = record.task("talks")
    record.many_said(task, 500)

    def lines(path: str) -> list[int]:
        return [int(each) for each in re.findall(r"<span>line (\d+)</span>",
                                                 ask(server, path).body)]

    def link(path: str, word: str) -> str:
        found = re.search(rf'href="([^"]*)"[^>]*>{word}</a>', ask(server, path).body)
        assert found is not None
        return found[1]

    path = f"/task/{task}"
    assert lines(path) == list(range(304, 504))
    assert lines(link(path, "Older")) == list(range(104, 304))
    first = link(path, "From the beginning")
    assert lines(first) == list(range(4, 204))
    assert lines(link(first, "Newer")) == list(range(204, 404))
    assert lines(link(first, "The end")) == list(range(304, 504))


@pytest.mark.parametrize("path, status, said", [
    ("/task/nobody", 404, "there is no task 'nobody'"), ("/task/0", 404, "give more digits"),
    ("/task/", 404, "there is no task ''"), ("/task/last?after=x", 400, "expected a whole number"),
    ("/task/last?stream=loud", 400, "expected one of"), ("/?status=lost", 400, "expected one of"),
    ("/?since=soon", 400, "expected a duration such as"), ("/?until=1h", 400, "expected a time"),
    ("/?run=zz", 400, "zz"), ("/?before=!", 400, "before"), ("/nowhere", 404, "/nowhere"),
    ("/task/last/live?after=-1", 400, "expected a whole number")])
def test_what_is_not_there_or_not_understood_is_explained(
    record: Recorder, server: Server, path: str, status: int, said: str
) -> None:
    for number in range(2):
        record.task(id=f"{number:032x}")
    assert said in page(server, path, status).text


# ---------------------------------------------------------------- the others

def test_failures_that_are_alike_are_one_row(record: Recorder, server: Server) -> None:
    for row in range(3):
        record.task("load", "failed", created=record.ago(hours=3 - row), failure_type="ValueError",
                    failure_message=f"row {row} is bad")
    record.task("load", created=record.ago(minutes=5))
    record.task("sync", "failed", failure_type="KeyError", failure_message="'x'")
    for name in "ab":
        record.task(name, "failed", script_id="gzip", created=record.ago(hours=ord(name) - 95),
                    failure_type="subprocess.CalledProcessError",
                    failure_message=f"Command '{name}' died with <Signals.SIGTERM: 15>.")
    parsed = page(server, "/failures")
    assert parsed.text.count("ValueError") == 1
    assert "1 KeyError 'x' sync 59m ago 59m ago never" in parsed.words
    assert ("2 gzip: SIGTERM Command 'a' died with <Signals.SIGTERM: 15>. a and 1 more "
            "2h ago 1h ago never") in parsed.words
    assert "3 ValueError row 2 is bad load 2h ago 59m ago 4m ago" in parsed.words


def test_runs_and_losses_are_told(record: Recorder, server: Server) -> None:
    run = record.run()
    record.task(run_id=run)
    failed = [record.task("x", "failed", run_id=run) for _ in range(34)]
    record.task(rerun_of=failed[0])
    assert "35 33 " in page(server, "/runs").words, "so many tasks, so many left"
    assert "Complete." in page(server, "/runs").text
    record.lost(120, sink="hook", reason="overflow")
    text = page(server, "/runs").text
    assert "hook" in text and "overflow" in text and "120" in text and "Complete." not in text


@pytest.mark.parametrize("path, said", [
    ("/", "No tasks yet."), ("/failures", "Nothing failed."), ("/timeline", "Nothing ran."),
    ("/runs", "No runs.")])
def test_where_nothing_is_a_page_says_what_to_do(server: Server, path: str, said: str) -> None:
    assert said in page(server, path).text


# ---------------------------------------------------------------- what tasks control

def harmless(body: str) -> Parsed:
    """Check that a page has no tag and no attribute but those of the templates."""
    parsed = Parsed(body)
    assert [each for tag, each in parsed.tags if tag == "script"] == [
        {"src": "/script.js", "defer": None}]
    assert not {"\0", "\u202e", "\x1b", "\x07"} & set(body)
    assert all(link.startswith(("/", "#end")) for link in parsed.links())
    for tag, attributes in parsed.tags:
        assert tag not in ("img", "iframe", "style", "base", "object")
        assert not any(name.startswith("on") or name in ("style", "src")
                       for name in attributes if tag != "script")
    return parsed


@pytest.mark.parametrize("path", [*PATHS, "/task/last?show=arguments", "/task/last?show=result",
                                  "/task/last?show=source"])
def test_markup_in_any_field_is_text(tmp_path: Path, path: str) -> None:
    """The page of a hostile history has the tags and attributes of a tame one's, in their order."""
    shapes = []
    for name, text in (("tame", "tame"), ("evil", EVIL)):
        recorder = Recorder(tmp_path / f"{name}.db", NOW)
        fill_with(recorder, text)
        recorder.close()
        with site(tmp_path / f"{name}.db") as server:
            shapes.append(harmless(ask(server, path).body).shape)
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("path", [
    "/?text=TEXT", "/?name=TEXT", "/?run=TEXT", "/?since=TEXT", "/?until=TEXT", "/?status=TEXT",
    "/?fingerprint=TEXT", "/?before=TEXT", "/?after=TEXT", "/?TEXT=TEXT", "/TEXT", "/task/TEXT",
    "/task/last?stream=TEXT", "/task/last?show=TEXT", "/task/last?before=TEXT",
    "/task/TEXT/live", "/failures?run=TEXT", "/timeline?since=TEXT", "/runs?before=TEXT"])
def test_markup_in_an_address_is_text(record: Recorder, server: Server, path: str) -> None:
    fill_with(record, EVIL)
    answer = ask(server, path.replace("TEXT", quote(EVIL, safe="")))
    if "text/html" in answer.headers["Content-Type"]:
        harmless(answer.body)


def test_a_page_is_small_whatever_a_task_says(record: Recorder, server: Server) -> None:
    huge = '"' * 10_000_000
    for status in ("failed", "completed"):
        task = record.task(huge, status, **{**fields_with("x"), "failure_message": huge,
                                            "last_progress_msg": huge, "metadata_json": None})
        for _ in range(5):
            record.said(task, huge[:3_000_000])
    for path in (*PATHS, "/task/last?stream=output", f"/?text={huge[:2000]}"):
        answer = ask(server, path)
        assert len(answer.body) < 3_000_000, path


@pytest.mark.slow
def test_no_page_reads_all_of_a_million_rows(record: Recorder, server: Server) -> None:
    record.task("talks", "running")
    record.connection.execute(
        "WITH RECURSIVE n(i) AS (SELECT 4 UNION ALL SELECT i + 1 FROM n WHERE i < 1000003) "
        "INSERT INTO zz_stream_rows (task, seq, stream, created_us, payload) "
        "SELECT (SELECT key FROM tasks), i, 0, i, 'line ' || i FROM n")
    last = page(server, "/task/last")
    assert "line 1000003" in last.words and "line 999000" not in last.words
    assert "line 500001" in page(server, "/task/last?after=500000").words
    older = [link for link in page(server, "/task/last?stream=error").links() if "before=" in link]
    assert [link.partition("before=")[2] for link in older] == ["900004"]
    assert names_on(server, "/?text=line+1000003") == ["talks"]
    assert "there may be more" in page(server, "/?text=no+such+text").words
    assert max(len(ask(server, path).body) for path in PATHS) < 100_000

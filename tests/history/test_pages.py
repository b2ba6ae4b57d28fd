"""Pages of a history: which tasks and lines they have, that paging misses and repeats none, and
that no question reads more than its bound."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any

import pytest
from tests.histories import Recorder
from tests.history.plans import plans, scans

from bgworker.history import pages, schema
from bgworker.history.pages import LinePage, Match, TaskPage
from bgworker.history.reader import History
from bgworker.model.errors import ConfigurationError, UnknownTask
from bgworker.model.events import TaskSnapshot, TaskStatus

RUNS = "a" * 32, "b" * 32, "c" * 32


@pytest.fixture(params=["at once", "in its order", "in steps", "step and rest"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the ways in which tasks are found."""
    if request.param in ("in its order", "in steps"):
        monkeypatch.setattr(pages, "FEW", -1)
    if request.param == "step and rest":
        monkeypatch.setattr(pages, "_STEP", 7)
    if request.param == "in steps":
        for name, value in (("PATIENCE", 0.0), ("_STEP", 7), ("_BATCH", 5), ("_CHUNK", 20),
                            ("_LARGEST_CHUNK", 20)):
            monkeypatch.setattr(pages, name, value)
    return str(request.param)


def ids(page: TaskPage) -> list[str]:
    return [task.task_id for task in page.tasks]


def walk(history: History, way: str, **wanted: Any) -> list[str]:
    """Page to the end and back to the beginning; return the ids that came, in their order."""
    found: list[str] = []
    stops: list[str] = []
    page = history.page(limit=4, **wanted)
    while True:
        assert len(page.tasks) <= 4
        found += ids(page)
        if page.older is None:
            break
        stops.append(page.older)
        page = history.page(limit=4, before=page.older, **wanted)
        assert page.newer is not None
    assert way == "in steps" or not page.is_cut
    back = ids(page)
    while page.newer is not None:
        page = history.page(limit=4, after=page.newer, **wanted)
        back[:0] = ids(page)
    assert back == found
    assert all(re.fullmatch(r"[\w,-]{1,64}", stop) for stop in stops)
    return found


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[
        tuple[Recorder, list[tuple[TaskSnapshot, list[str]]]]]:
    """A history of sixty tasks, and what they said."""
    record = Recorder(tmp_path_factory.mktemp("known") / "history.db")
    dice = random.Random(7)
    runs = [record.run(RUNS[0], host=schema.this_host(), ended=record.now),
            record.run(RUNS[1], host="elsewhere")]
    for number in range(60):
        created = record.ago(minutes=dice.randint(0, 100), seconds=dice.randint(0, 59))
        status = dice.choice(["completed"] * 6 + ["failed"] * 3 + [
            "running", "scheduled", "timed_out", "cancelled", "interrupted"])
        failure = {"failure_type": "OSError", "failure_message": f"no {dice.randint(1, 9)} left"}
        task = record.task(
            dice.choice(["load a", "load B", "50%_x", "sync"]), status, created=created,
            took=dice.uniform(0, 4000), run_id=dice.choice([*runs, None]),
            last_progress_msg=dice.choice([None, "Half done"]),
            **(failure if status == "failed" else {}))
        for _ in range(dice.choice([0, 0, 3, 40])):
            record.said(task, dice.choice(["quiet"] * 50 + ["needle", "Needle 100%_\\"]))
    with History(record.path) as history:
        yield record, [(task, [event.payload for event in history.streams(task.task_id)])
                       for task in history.tasks(limit=None)]
    record.close()


WANTED: list[dict[str, Any]] = [
    {}, {"status": "failed"}, {"status": "interrupted"}, {"status": "running"},
    {"status": TaskStatus.COMPLETED, "name": "load*"}, {"name": "load B"}, {"name": "*[xy]"},
    {"text": "needle"}, {"text": "NEEDLE 100%_\\"}, {"text": "half"}, {"text": "%_x"},
    {"text": "oserror"}, {"text": "needle", "status": "failed"}, {"text": "no such text"},
    {"since": timedelta(minutes=30)}, {"since": timedelta(minutes=90), "status": "failed"},
    {"until": timedelta(minutes=50)}, {"until": timedelta(minutes=20), "text": "needle"},
    {"run": RUNS[0]}, {"run": RUNS[1][:7], "text": "load"},
]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_paging_there_and_back_agrees_with_a_plain_filter(
        known: tuple[Recorder, list[tuple[TaskSnapshot, list[str]]]], way: str,
        wanted: dict[str, Any]) -> None:
    record, tasks = known
    exact = {**wanted, **{name: record.now - wanted[name] for name in ("since", "until")
                          if name in wanted}}
    with History(record.path) as history:
        found = walk(history, way, **exact)
        since = {task.task_id for task in history.tasks(since=exact.get("since"), limit=None)}

    def fits(task: TaskSnapshot, said: list[str]) -> bool:
        texts = [task.name, task.last_progress_message or "", task.failure_type or "",
                 task.failure_message or "", *said]
        return ((wanted.get("status") in (None, task.status))
                and fnmatchcase(task.name, wanted.get("name", "*"))
                and any(wanted.get("text", "").lower() in text.lower() for text in texts)
                and task.task_id in since
                and ("until" not in exact or task.created_utc < exact["until"])
                and task.run_id.startswith(wanted.get("run", "")))

    assert found == [task.task_id for task, said in tasks if fits(task, said)]
    assert found or wanted == {"text": "no such text"}


def test_a_page_tells_what_lies_on_both_sides_of_it(record: Recorder, history: History) -> None:
    tasks = [record.task(f"job {number}", created=record.ago(minutes=number))
             for number in range(5)]
    first = history.page(limit=2)
    assert ids(first) == tasks[:2] and first.newer is None and first.older is not None
    second = history.page(limit=2, before=first.older)
    assert ids(second) == tasks[2:4] and second.newer is not None and second.older is not None
    assert ids(history.page(limit=2, after=second.newer)) == tasks[:2]
    last = history.page(limit=2, before=second.older)
    assert ids(last) == tasks[4:] and last.older is None
    assert first.matches == {} and not first.is_cut and first.searched == 0


def test_a_cursor_holds_while_tasks_are_added_and_removed(record: Recorder,
                                                          history: History) -> None:
    tasks = [record.task(created=record.ago(minutes=number)) for number in range(6)]
    first = history.page(limit=2)
    added = [record.task(created=record.now + timedelta(minutes=number)) for number in (1, 2)]
    record.connection.execute("DELETE FROM tasks WHERE id = ?", (tasks[1],))  # beside the cursor
    second = history.page(limit=2, before=first.older)
    assert ids(second) == tasks[2:4]
    back = history.page(limit=2, after=second.newer)
    assert ids(back) == [added[0], tasks[0]] and back.newer is not None
    assert ids(history.page(limit=2, after=back.newer)) == [added[1]]


def test_an_empty_page_leads_back_to_the_task_beside_it(record: Recorder,
                                                        history: History) -> None:
    old, new = [record.task(created=record.ago(minutes=number)) for number in (2, 1)]
    page = history.page(before=old)
    assert (ids(page), page.older) == ([], None)
    assert ids(history.page(after=page.newer)) == [new, old]
    page = history.page(after=new)
    assert (ids(page), page.newer) == ([], None)
    assert ids(history.page(before=page.older)) == [new, old]


def test_a_match_tells_where_the_text_is(record: Recorder, history: History) -> None:
    name = record.task("find the Needle", created=record.ago(minutes=1))
    message = record.task(created=record.ago(minutes=2), last_progress_msg="a\nneedle\nb")
    failure = record.task("x", "failed", created=record.ago(minutes=3), failure_type="NeedleError")
    output = record.task(created=record.ago(minutes=4))
    for line in ("needle 1", "first\n" + "x" * 300 + "NEEDLE" + "y" * 300, "hay"):
        seq = record.said(output, line)
    page = history.page(text="needle")
    assert page.matches == {
        name: Match("name", "find the Needle"), message: Match("message", "needle"),
        failure: Match("failure", "NeedleError"),
        output: Match("output", "x" * 100 + "NEEDLE" + "y" * 94, seq - 1)}


def test_a_search_stops_at_its_bound_says_how_far_it_came_and_goes_on(
        record: Recorder, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [record.task("hay", created=record.ago(minutes=number)) for number in range(20)]
    needle = record.task("needle", created=record.ago(minutes=99))
    monkeypatch.setattr(pages, "PATIENCE", 0.0)
    monkeypatch.setattr(pages, "_STEP", 8)
    page = history.page(name="*needle")
    assert page.is_cut and page.tasks == () and page.newer is None and page.searched == 8
    stopped = page.searched_until_utc
    assert stopped is not None and abs(stopped - record.ago(minutes=7)) < timedelta(seconds=1)
    assert page.older == tasks[7]
    page = history.page(name="*needle", before=page.older)
    assert page.is_cut and page.searched == 8 and page.newer is not None
    page = history.page(name="*needle", before=page.older)
    assert ids(page) == [needle] and not page.is_cut and page.older is None


def test_a_task_that_talks_without_end_is_searched_in_parts(
        record: Recorder, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    talks = record.task("talks", created=record.ago(minutes=1))
    seq = record.said(talks, "needle", seq=2)
    record.many_said(talks, 1000)
    quiet = record.task("needle too", created=record.ago(minutes=2))
    monkeypatch.setattr(pages, "PATIENCE", 0.0)
    monkeypatch.setattr(pages, "_CHUNK", 100)
    monkeypatch.setattr(pages, "_LARGEST_CHUNK", 100)
    steps, page = 0, history.page(text="needle")
    while page.is_cut:
        assert page.older is not None and page.older.startswith(talks + ",")
        page = history.page(text="needle", before=page.older)
        steps += 1
        if page.tasks:
            break
    assert steps == 10 and page.matches[talks] == Match("output", "needle", seq)
    assert ids(page) == [talks, quiet]


def test_values_that_are_too_long_for_sqlite_are_passed_by(record: Recorder,
                                                           history: History) -> None:
    odd, good = [record.task(created=record.ago(minutes=number)) for number in (1, 2)]
    for task in (odd, good):
        record.said(task, "needle")
    record.connection.execute("UPDATE tasks SET failure_message = printf('%.*c', ?, 'x') "
                              "WHERE id = ?", (schema.MOST_TEXT + 1, odd))
    record.connection.execute("UPDATE tasks SET last_progress_msg = 'a needle' WHERE id = ?",
                              (good,))
    assert {task: match.place for task, match in history.page(text="needle").matches.items()} == {
        odd: "output", good: "message"}


@pytest.mark.parametrize(("wanted", "message"), [
    ({"limit": 0}, "limit: expected a whole number >= 1"), ({"limit": 1001}, "at most 1,000"),
    ({"before": "a b"}, "before: expected a cursor from an earlier page, got 'a b'"),
    ({"after": ""}, "after: expected a cursor"), ({"after": 5}, "after: expected a cursor"),
    ({"before": "a,x"}, "before: expected a cursor"), ({"before": "a" * 2000}, "expected a cursor"),
    ({"before": "a", "after": "b"}, "expected one of them, got both"),
    ({"text": "x" * 1001}, "text: expected a text of at most 1,000 characters"),
    ({"name": 5}, "name: expected a text"), ({"status": "odd"}, "status: expected one of created"),
    ({"run": "ff"}, "run: expected the id of a run"), ({"since": 5}, "since: expected an aware"),
])
def test_a_question_that_means_nothing_is_refused(history: History, wanted: dict[str, Any],
                                                  message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        history.page(**wanted)


def test_ids_that_no_bgworker_made_are_paged_too(record: Recorder, history: History,
                                                 way: str) -> None:
    odd = ["", "a,b", "a/b?c", "ü" * 80, "x\U0001f600"]
    for task_id in odd:
        record.insert("tasks", id=task_id, name="odd", status="completed", created_utc="x",
                      last_seq=1)
    for number in range(9):
        record.task(created=record.ago(minutes=number))
    found, page = [], history.page(limit=1)
    while page.older:
        found += ids(page)
        assert len(page.older) < 999
        page = history.page(limit=1, before=page.older)
    found += ids(page)
    assert found == sorted(found, reverse=True) and len(found) == 14


# ---------------------------------------------------------------- how they are answered

@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_no_page_reads_a_table_that_an_index_answers_for(record: Recorder, history: History,
                                                         way: str, wanted: dict[str, Any]) -> None:
    record.run(RUNS[0], ended=record.now)
    record.run(RUNS[1], ended=record.now)
    for number in range(9):
        record.said(record.task(run_id=RUNS[0], created=record.ago(minutes=number)), "x")
    found = plans(history, lambda: history.page(limit=2, **wanted))
    assert found and scans(found) == []
    if not wanted or way == "in its order":
        assert not any("TEMP B-TREE" in plan for plan in found)


def test_the_other_questions_read_no_table_either(record: Recorder, history: History) -> None:
    run = record.run(RUNS[0], ended=record.now)
    task = record.task("job", "failed", run_id=run)
    record.said(task, "x")
    found = plans(history, lambda: history.lines(task, types=["error"]))
    found += plans(history, lambda: history.lines(task, before=5))
    found += plans(history, history.run_counts)
    assert found and scans(found) == []


def test_a_look_without_an_index_would_be_seen(record: Recorder, history: History) -> None:
    def ask() -> None:
        with history._asking() as connection:
            connection.execute("SELECT key FROM tasks WHERE last_seq = 5").fetchall()
            connection.execute("SELECT key FROM tasks ORDER BY created_utc LIMIT 1").fetchall()

    assert len(scans(plans(history, ask))) == 2


# ---------------------------------------------------------------- lines

def said(page: LinePage) -> list[str]:
    return [event.payload for event in page.lines]


@pytest.fixture
def talker(record: Recorder) -> str:
    task = record.task("talks")
    for number in range(10):
        record.said(task, f"{number}", "error" if number % 3 == 0 else "output")
    return task


def test_the_last_lines_come_first_and_lead_back_and_on(record: Recorder, history: History,
                                                        talker: str) -> None:
    page = history.lines(talker, limit=4)
    assert said(page) == ["6", "7", "8", "9"] and not page.is_more
    assert page.newer == page.lines[-1].seq
    older = history.lines(talker, limit=4, before=page.older)
    assert said(older) == ["2", "3", "4", "5"] and older.is_more
    assert said(history.lines(talker, limit=4, after=older.newer)) == ["6", "7", "8", "9"]
    oldest = history.lines(talker, limit=4, before=older.older)
    assert said(oldest) == ["0", "1"] and oldest.older is None
    record.said(talker, "new")
    assert said(history.lines(talker, after=page.newer)) == ["new"]


def test_lines_from_the_beginning_lead_on(history: History, talker: str) -> None:
    found, page = [], history.lines(talker, after=0, limit=3)
    assert page.older is None
    while True:
        found += said(page)
        if not page.is_more:
            break
        page = history.lines(talker, after=page.newer, limit=3)
        assert page.older is not None
    assert found == [f"{number}" for number in range(10)]
    assert history.lines(talker, after=page.newer).lines == ()
    assert history.lines(talker, after=10**6).newer == 10**6
    assert history.lines(talker, after=10**99).lines == ()
    assert len(history.lines(talker, before=10**99).lines) == 10


@pytest.mark.parametrize("read", [1, 2, 5, 100])
def test_the_lines_of_one_stream_are_found_however_far_apart(
        history: History, talker: str, monkeypatch: pytest.MonkeyPatch, read: int) -> None:
    monkeypatch.setattr(pages, "LINES_READ", read)
    back: list[str] = []
    page = history.lines(talker, types=["error"], limit=3)
    while True:
        back[:0] = said(page)
        if page.older is None:
            break
        page = history.lines(talker, types=["error"], limit=3, before=page.older)
    assert back == ["0", "3", "6", "9"]
    on: list[str] = []
    page = history.lines(talker, types=["error"], limit=3, after=0)
    while True:
        on += said(page)
        if not page.is_more:
            break
        page = history.lines(talker, types=["error"], limit=3, after=page.newer)
    assert on == back


def test_lines_stop_at_a_megabyte(record: Recorder, history: History) -> None:
    task = record.task()
    for number in range(40):
        record.said(task, f"{number}" + "x" * 65_000)
    page = history.lines(task)
    assert 15 < len(page.lines) < 20 and page.older is not None
    assert said(history.lines(task, before=page.older))[-1].startswith(f"{39 - len(page.lines)}x")
    assert 15 < len(history.lines(task, after=0).lines) < 20


def test_a_task_without_lines_and_one_that_is_not_there(record: Recorder,
                                                        history: History) -> None:
    assert history.lines(record.task()) == LinePage((), None, 0, False)
    with pytest.raises(UnknownTask):
        history.lines("nobody")
    with pytest.raises(ConfigurationError, match="expected one of them"):
        history.lines(record.task(), before=1, after=1)


# ---------------------------------------------------------------- runs

@pytest.mark.parametrize("failed", [0, 30])
def test_runs_come_with_their_counts_whichever_way_these_are_found(
        record: Recorder, history: History, failed: int) -> None:
    for _ in range(failed):
        record.task("x", "failed")
    ended = record.run(RUNS[0], host=schema.this_host(), ended=record.now)
    going = record.run(RUNS[1], host="elsewhere")
    empty = record.run(RUNS[2], host="elsewhere")
    for run in (ended, going):
        for status in ("completed", "completed", "failed", "running"):
            record.task(status, status, run_id=run)
    found = history.run_counts()
    assert [each.run.run_id for each in found] == [empty, going, ended]
    assert [dict(each.counts) for each in found] == [
        {}, {"running": 1, "completed": 2, "failed": 1},
        {"completed": 2, "failed": 1, "interrupted": 1}]
    assert [each.run.run_id for each in history.run_counts(limit=1)] == [empty]
    assert [each.run.run_id for each in history.run_counts(before=going)] == [ended]

"""Two runs compared: which tasks are the same, and what has changed."""

from __future__ import annotations

from typing import Any

import pytest
from tests.histories import Recorder
from tests.history.plans import plans, scans

from bgworker.history import changes
from bgworker.history.changes import CHANGES, Change
from bgworker.history.reader import History
from bgworker.model.errors import ConfigurationError
from bgworker.model.ids import new_id

RUNS = tuple([new_id(1_764_000_000_000_000_000 + number) for number in range(4)])


class Runs:
    """Some runs, into which a test writes commands and functions."""

    def __init__(self, record: Recorder) -> None:
        self.record = record
        for run in RUNS:
            record.run(run, ended=record.now)
        self._minutes = iter(range(10_000, 0, -1))

    def command(self, run: int, text: str, status: str = "completed", took: float = 1.0,
                cwd: object = "/x", **columns: Any) -> str:
        self.record.connection.execute("INSERT OR IGNORE INTO scripts (hash) VALUES (?)", (text,))
        return self.record.task(
            f"{text} in {run}", status, run_id=RUNS[run], took=took, script_hash=text,
            script_id=text.split()[0], metadata={"cwd": cwd, "command": text},
            created=self.record.ago(minutes=next(self._minutes)), **columns)

    def function(self, run: int, name: str, script: str, status: str = "completed",
                 took: float = 1.0, version: str = "a") -> str:
        self.record.connection.execute("INSERT OR IGNORE INTO scripts (hash) VALUES (?)",
                                       (version,))
        return self.record.task(
            name, status, run_id=RUNS[run], took=took, script_id=script, script_hash=version,
            created=self.record.ago(minutes=next(self._minutes)))


@pytest.fixture
def runs(record: Recorder) -> Runs:
    return Runs(record)


def found(history: History, *names: str, **how: Any) -> dict[str, list[tuple[str, str]]]:
    """Return what has changed, as pairs of names, and see that the counts agree."""
    def name(change: Change) -> tuple[str, str]:
        return tuple([each.name if each else "" for each in (change.before, change.after)])

    answer = history.changes(*names, **how)
    listed = {kind: [name(each) for each in getattr(answer, kind)] for kind in CHANGES}
    for kind, each in listed.items():
        assert "limit" in how or len(each) == answer.counts.get(kind, 0)
    others = {kind: [("", "")] * count for kind, count in answer.counts.items()
              if kind not in CHANGES and count}
    return {**{kind: each for kind, each in listed.items() if each}, **others}


SAME = [("", "")]
BEFORE = ("completed", "failed", "timed_out", "cancelled", "interrupted", None)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("after", BEFORE)
def test_each_pair_of_endings_is_one_change(runs: Runs, history: History, before: str | None,
                                            after: str | None) -> None:
    if before:
        runs.command(2, "a", before)
    if after:
        runs.command(3, "a", after)
    bad = ("failed", "timed_out")
    pair = [("a in 2" if before else "", "a in 3" if after else "")]
    expected: dict[str, Any] = {"unchanged": SAME}
    if not after:
        expected = {"gone": pair} if before else {}
    elif after in bad:
        expected = {"still_failing": SAME} if before in bad else {"newly_failed": pair}
    elif not before:
        expected = {"new": pair}
    elif after in ("cancelled", "interrupted"):
        expected = {"unfinished": SAME}
    elif before != "completed":
        expected = {"mended": pair}
    assert found(history) == expected


@pytest.mark.parametrize("status", ["running", "scheduled"])
def test_what_has_not_ended_is_no_change(runs: Runs, history: History, status: str) -> None:
    runs.record.connection.execute("UPDATE runs SET ended_utc = NULL")
    runs.command(2, "a", status), runs.command(3, "a")
    runs.command(2, "b"), runs.command(3, "b", status)
    assert found(history) == {"unchanged": SAME, "unfinished": SAME}


@pytest.mark.parametrize("before, after, change", [
    (1.0, 1.5, "slower"), (1.0, 1.49, "unchanged"), (1.5, 1.0, "faster"), (1.49, 1.0, "unchanged"),
    (0.001, 0.1, "unchanged"), (0.0, 0.1, "slower"), (0.1, 0.0, "faster"), (5.0, 5.0, "unchanged"),
    (0.05, 0.151, "slower"), (0.06, 0.15, "unchanged"),
])
def test_slower_is_half_as_long_again_and_a_tenth_of_a_second(
        runs: Runs, history: History, before: float, after: float, change: str) -> None:
    runs.command(2, "a", took=before), runs.command(3, "a", took=after)
    assert [*found(history)] == [change]


def test_the_greatest_difference_comes_first(runs: Runs, history: History) -> None:
    for text, seconds in (("a", 2.0), ("b", 9.0), ("c", 4.0)):
        runs.command(2, text), runs.command(3, text, took=seconds)
    assert [each for each, _ in found(history)["slower"]] == ["b in 2", "c in 2", "a in 2"]
    assert [each for each, _ in found(history, "last", "last~1")["faster"]] == [
        "b in 3", "c in 3", "a in 3"]
    assert [each for each, _ in found(history, limit=1)["slower"]] == ["b in 2"]


def test_commands_are_the_same_by_text_and_directory(runs: Runs, history: History) -> None:
    runs.command(2, "a", cwd="/x"), runs.command(3, "a", "failed", cwd="/y")
    runs.command(2, "b", cwd={"latin-1": "é"}), runs.command(3, "b", cwd={"latin-1": "é"})
    assert found(history) == {"newly_failed": [("", "a in 3")], "gone": [("a in 2", "")],
                              "unchanged": SAME}


def test_equal_commands_are_paired_in_their_order(runs: Runs, history: History) -> None:
    for status in ("completed", "failed", "completed"):
        runs.command(2, "a", status)
    for status in ("failed", "completed", "completed", "completed"):
        runs.command(3, "a", status)
    assert {kind: len(each) for kind, each in found(history).items()} == {
        "newly_failed": 1, "mended": 1, "unchanged": 1, "new": 1}


def test_functions_are_the_same_by_name_and_function_whatever_their_source(
        runs: Runs, history: History) -> None:
    runs.function(2, "load", "jobs:load", "failed", version="a")
    runs.function(3, "load", "jobs:load", version="b")
    runs.function(2, "other", "jobs:load")
    runs.function(3, "other", "jobs:other")
    assert found(history) == {"mended": [("load", "load")], "new": [("", "other")],
                              "gone": [("other", "")]}


# ---------------------------------------------------------------- reruns

def test_of_a_rerun_nothing_is_gone_and_the_very_task_is_compared(runs: Runs,
                                                                  history: History) -> None:
    runs.command(2, "a")
    second = runs.command(2, "a", "failed")
    third = runs.command(2, "b", "failed")
    runs.command(2, "c")
    runs.command(3, "a", rerun_of=second)
    runs.command(3, "b", "failed", rerun_of=third)
    runs.command(3, "new", "failed")
    assert found(history) == {"mended": [("a in 2", "a in 3")], "still_failing": SAME,
                              "newly_failed": [("", "new in 3")], "not_run_again": SAME * 2}
    assert history.changes().is_rerun
    assert found(history, "last", "last~1")["new"] == [("", "c in 2")]
    assert not history.changes("last", "last~1").is_rerun


def test_a_rerun_of_a_rerun_is_one_of_the_first_run(runs: Runs, history: History) -> None:
    first = [runs.command(0, "a", "failed") for _ in range(3)]
    second = [runs.command(1, "a", "failed", rerun_of=each) for each in first[1:]]
    runs.command(3, "a", rerun_of=second[1])
    answer = history.changes("last~3", "last")
    assert answer.is_rerun
    assert [each.before.task_id for each in answer.mended if each.before] == [first[2]]
    assert answer.counts == {"mended": 1, "not_run_again": 2}


def test_two_that_ran_one_again_and_a_circle_do_no_harm(runs: Runs, history: History) -> None:
    first = runs.command(2, "a", "failed")
    runs.command(3, "a", rerun_of=first), runs.command(3, "a", rerun_of=first)
    circle = [new_id(7), new_id(8)]
    runs.command(1, "c", id=circle[0], rerun_of=circle[1])
    runs.command(1, "c", id=circle[1], rerun_of=circle[0])
    runs.command(3, "c", rerun_of=circle[0])
    runs.command(3, "d", rerun_of="nobody")
    assert found(history) == {"mended": [("a in 2", "a in 3")], "new": [
        ("", "a in 3"), ("", "c in 3"), ("", "d in 3")]}


# ---------------------------------------------------------------- bounds

def test_a_run_of_too_many_tasks_is_refused(runs: Runs, history: History,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        runs.command(2, f"c{number}")
    monkeypatch.setattr(changes, "MOST", 5)
    assert found(history) == {"gone": [(f"c{number} in 2", "") for number in range(5)]}
    monkeypatch.setattr(changes, "MOST", 4)
    for names in ((), ("last", "last~1")):
        with pytest.raises(ConfigurationError, match="^run: expected one of at most 4 tasks, got "):
            history.changes(*names)


def test_no_table_is_read(runs: Runs, history: History) -> None:
    runs.command(3, "a", rerun_of=runs.command(2, "a"))
    asked = plans(history, history.changes)
    assert asked and scans(asked) == []


def test_equal_commands_take_no_longer_the_more_there_are(runs: Runs, history: History) -> None:
    """Steps of SQLite would not show it: pairing is in Python, and must not search."""
    for run in (2, 3):
        runs.record.connection.execute("BEGIN")
        for _ in range(3000):
            runs.command(run, "true")
        runs.record.connection.execute("COMMIT")
    assert found(history) == {"unchanged": SAME * 3000}


def test_values_of_any_type_are_compared(runs: Runs, history: History) -> None:
    runs.record.connection.execute("PRAGMA foreign_keys = OFF")
    for run in (2, 3):
        runs.command(run, "a", duration_sec="soon")
        runs.command(run, "b")
        runs.record.connection.execute("UPDATE tasks SET script_hash = x'01' WHERE name LIKE 'b%'")
        runs.record.connection.execute(
            "UPDATE tasks SET metadata_json = x'00', script_id = 5 WHERE script_hash = 'a'")
        runs.command(run, "c", status="completed")
        runs.record.connection.execute("UPDATE tasks SET status = 'odd' WHERE script_hash = 'c'")
    assert found(history) == {"unchanged": SAME, "gone": [("b in 2", "")], "new": [("", "b in 3")]}

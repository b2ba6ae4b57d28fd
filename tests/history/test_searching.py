"""A search through what tasks said and why they failed."""

from __future__ import annotations

import random
import re
import signal
from typing import Any

import pytest
from tests.histories import Recorder

from bgworker.history import searching
from bgworker.history.reader import History
from bgworker.history.schema import COMMAND_FAILED


def found(history: History, pattern: str, *, flags: int = 0, is_literal: bool = False,
          **how: Any) -> list[tuple[str, list[str], str]]:
    """Return what is found: the name of a task, what it said, and its failure."""
    return [(each.task.name, [event.payload or event.message for event in each.events],
             each.failure)
            for each in history.search(history.task_keys(limit=None), re.compile(pattern, flags),
                                       literal=pattern if is_literal else None, **how)]


@pytest.mark.parametrize("is_literal", [False, True])
def test_what_was_said_is_found_in_the_order_of_the_tasks(
    record: Recorder, history: History, is_literal: bool
) -> None:
    for name, hours in (("old", 3), ("quiet", 2), ("new", 1)):
        task = record.task(name, created=record.ago(hours=hours))
        for text in ("begin", f"a needle in {name}", "end"):
            record.said(task, text if name != "quiet" else "nothing", "error")
        record.said(task, "Needle" if name == "old" else "", "progress")
    assert found(history, "needle", is_literal=is_literal) == [
        ("new", ["a needle in new"], ""), ("old", ["a needle in old"], "")]
    assert found(history, "needle", flags=re.I) == [
        ("new", ["a needle in new"], ""), ("old", ["a needle in old", "Needle"], "")]
    assert found(history, "needle", is_literal=is_literal, types=["output"]) == []
    assert found(history, "Needle", is_literal=is_literal, types=["progress"]) == [
        ("old", ["Needle"], "")]
    assert found(history, "^a .* in n", types=["error", "output"]) == [
        ("new", ["a needle in new"], "")]


def test_failures_and_their_tracebacks_are_searched_but_not_those_of_commands(
    record: Recorder, history: History
) -> None:
    trace = 'Traceback\n  File "m.py", line 3, in load\nValueError: row 3 is bad\n'
    record.task("load", "failed", failure_type="ValueError", failure_message="row 3 is bad",
                script_id="m:load", invocation_info=trace)
    record.task("other", "failed", failure_type="OSError", failure_message="row gone",
                invocation_info="  in load\n", script_id="m:other")
    record.task("cancelled", "cancelled", failure_message="row not needed")
    record.task("command", "failed", failure_type=COMMAND_FAILED, script_id="row",
                failure_message="Command 'row' returned non-zero exit status 1.",
                invocation_info="row")
    record.task("nosuch", "failed", failure_type="FileNotFoundError", script_id="row",
                failure_message="no such row", invocation_info="row in load")
    assert {name: failure for name, _, failure in found(history, "row")} == {
        "load": trace, "other": "OSError: row gone\n  in load\n", "cancelled": "row not needed",
        "nosuch": "FileNotFoundError: no such row"}
    assert [name for name, *_ in found(history, "in load")] == ["other", "load"]
    assert found(history, "row", failures=False) == []
    assert found(history, "ValueError", types=[]) == [("load", [], trace)]


@pytest.mark.parametrize("is_literal", [False, True])
@pytest.mark.parametrize("bounds", [{}, {"TASKS": 2}, {"_MOST_ROWS": 1}, {"_MOST_TEXT": 20},
                                    {"TASKS": 3, "_MOST_ROWS": 2}], ids=str)
def test_however_it_is_cut_into_parts_the_same_is_found(
    record: Recorder, history: History, monkeypatch: pytest.MonkeyPatch, bounds: dict[str, int],
    is_literal: bool
) -> None:
    dice = random.Random(5)
    expected = []
    for number in range(9):
        task = record.task(f"t{number}", "failed", failure_message=dice.choice(["x", "y"]))
        for _ in range(dice.randint(0, 6)):
            record.said(task, dice.choice(["x", "y", "yxy"]), dice.choice(["output", "error"]))
        said = [event.payload for event in history.streams(task) if "x" in event.payload]
        failure = history.task(task).failure_message
        expected.append((f"t{number}", said, "x" if failure == "x" else ""))
    for name, value in bounds.items():
        monkeypatch.setattr(searching, name, value)
    together: dict[str, tuple[list[str], str]] = {}
    for name, said, failure in found(history, "x", is_literal=is_literal):
        before = together.get(name, ([], ""))
        assert before[1] == "" and (name == [*together][-1] if name in together else True)
        together[name] = before[0] + said, failure
    assert [(name, *each) for name, each in together.items()] == [
        each for each in reversed(expected) if each[1] or each[2]]


def test_colours_do_not_hide_a_text(record: Recorder, history: History) -> None:
    record.said(record.task("load"), "\x1b[31mnee\x1b[0mdle")
    for is_literal in (False, True):
        assert len(found(history, "needle", is_literal=is_literal)) == 1
    record.said(record.task("other"), "needles", "error")
    assert len(found(history, "nothing", types=["error"])) == 0


@pytest.mark.parametrize("is_literal", [False, True])
def test_values_that_are_no_text_or_too_long_hide_no_others(
    record: Recorder, history: History, is_literal: bool
) -> None:
    task = record.task("load")
    for _ in range(4):
        record.said(task, "a needle")
    record.said(record.task("after"), "needle")
    record.connection.execute(
        "UPDATE zz_stream_rows SET payload = CAST(x'ff6e6565646c65' AS TEXT) WHERE seq = 5")
    record.connection.execute("UPDATE zz_stream_rows SET payload = x'00ff' WHERE seq = 6")
    record.connection.execute(
        "UPDATE zz_stream_rows SET payload = zeroblob(5000000) WHERE seq = 7")
    by_name = dict([(name, said) for name, said, _ in found(history, "needle",
                                                            is_literal=is_literal)])
    assert [*by_name] == ["after", "load"] and by_name["after"] == ["needle"]
    assert by_name["load"] == ["a needle", "\ufffdneedle"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that sends a signal")
def test_ctrl_c_ends_a_search_inside_a_pattern_that_takes_for_ever(
    record: Recorder, history: History
) -> None:
    record.said(record.task(), "a" * 60)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            found(history, "(a|aa)+$b")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_no_more_is_held_than_a_part(record: Recorder, history: History,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "_MOST_ROWS", 100)
    record.many_said(record.task(), 1000)
    parts = list(history.search(history.task_keys(), re.compile("line")))
    assert [len(part.events) for part in parts] == [100] * 10

"""Times, durations and tables in front of people."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from bgworker.cli.text import width_of
from bgworker.cli.tables import ANY_WIDTH, aligned, cell, task_lines
from bgworker.model.errors import ConfigurationError
from bgworker.model.events import TaskSnapshot, TaskStatus
from bgworker.words import ago, duration, duration_of, message_of, stamp, took

NOW = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)


def task(number: int = 1, status: TaskStatus = TaskStatus.COMPLETED, **fields: Any) -> TaskSnapshot:
    return TaskSnapshot(
        **{
            "task_id": f"{number:032x}",
            "name": "load",
            "status": status,
            "run_id": "",
            "created_utc": NOW,
            "started_utc": NOW - timedelta(minutes=3),
            "duration": 2.0,
            **fields,
        }
    )


@pytest.mark.parametrize("text, seconds", [
    ("90s", 90), ("15m", 900), ("2h", 7200), ("7d", 604_800), ("1w", 604_800), ("1h30m", 5400), ("0.5h", 1800),
    ("0s", 0),
    ("36500d", 36_500 * 86_400)])
def test_a_duration_is_a_number_with_its_unit(text: str, seconds: float) -> None:
    assert duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "90", "s", "-1h", "1 h", "1H", "1y", "1h 30m", "1.h", "1..5h", "1e3s", "٣h",
                                  "inf", "nan", "36501d", "9" * 400 + "d", "\x1b[31m1h", "1h\n"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(
        ConfigurationError, match="expected a duration such as 90s, 15m, 2h, 7d or 1h30m"
    ):
        duration(text)


@pytest.mark.parametrize("seconds, words", [
    (-5, "now"), (0.4, "now"), (1, "1s ago"), (59.9, "59s ago"), (60, "1m ago"), (3599, "59m ago"), (3600, "1h ago"),
    (47 * 3600, "47h ago"), (48 * 3600, "2d ago"), (13.9 * 86_400, "13d ago"), (14 * 86_400, "2026-11-10")])
def test_times_are_relative_until_they_are_long_ago(seconds: float, words: str) -> None:
    assert ago(NOW - timedelta(seconds=seconds), NOW) == words


@pytest.mark.parametrize("seconds, words", [
    (None, "-"), (-1.0, "0ms"), (0.0, "0ms"), (0.0004, "0ms"), (0.34, "340ms"), (0.9994, "999ms"), (0.9996, "1.0s"),
    (3.44, "3.4s"),
    (59.94, "59.9s"), (59.96, "1m00s"), (312, "5m12s"), (3599.6, "1h00m"), (11_220, "3h07m"), (187_200, "2d04h")])
def test_durations_have_two_units_at_most(seconds: float | None, words: str) -> None:
    assert took(seconds) == words


def test_what_runs_shows_how_long_it_has_been_running_and_nothing_else_does() -> None:
    assert duration_of(task(), NOW) == 2.0
    assert duration_of(task(status=TaskStatus.RUNNING, duration=None), NOW) == 180.0
    assert duration_of(task(status=TaskStatus.INTERRUPTED, duration=None), NOW) is None
    assert (
        duration_of(task(status=TaskStatus.SCHEDULED, duration=None, started_utc=None), NOW) is None
    )
    assert (stamp(NOW), stamp(None), ago(None, NOW)) == ("2026-11-24 12:00:00 UTC", "-", "-")


@pytest.mark.parametrize("fields, message", [
    ({}, ""), ({"last_progress_message": "row 5"}, "row 5"),
    ({"status": TaskStatus.FAILED, "failure_type": "E", "failure_message": "bad", "last_progress_message": "row 5"},
     "E: bad"),
    ({"status": TaskStatus.FAILED, "failure_message": "bad"}, "bad"),
    ({"status": TaskStatus.CANCELLED, "failure_message": "user", "last_progress_message": "row 5"}, "user"),
    ({"status": TaskStatus.TIMED_OUT, "failure_message": "10 s", "last_progress_message": "row 5"}, "row 5"),
])
def test_the_message_is_what_is_most_worth_knowing(fields: Any, message: str) -> None:
    assert message_of(task(**fields)) == message


def test_a_table_is_aligned_under_its_headings() -> None:
    tasks = [task(1, name="load users", last_progress_percent=40.0, last_progress_message="2 of 5"),
             task(2, TaskStatus.TIMED_OUT, name="日本", duration=61.0)]
    assert task_lines(tasks, NOW, ANY_WIDTH, id_length=8) == [
        "ID        NAME        STATUS     PROGRESS  STARTED  DURATION  MESSAGE",
        "00000000  load users  completed       40%   3m ago  2.0s      2 of 5",
        "00000000  日本        timed out             3m ago  1m01s",
    ]


@pytest.mark.parametrize("columns", [20, 33, 40, 50, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    tasks = [task(1, name="n" * 300, last_progress_message="m" * 1000), task(2, name="日本" * 100),
             task(3, name="e\u0301" * 500),
             task(4, name="", last_progress_message="\x1b[31m" * 100)]
    for colour in (False, True):
        for line in task_lines(tasks, NOW, columns, colour=colour):
            assert width_of(line.replace("\x1b[32m", "").replace("\x1b[0m", "")) <= columns


def test_on_a_terminal_the_message_gets_the_room_of_a_progress_that_no_task_has() -> None:
    silent = [task(name="n" * 20), task(2, TaskStatus.FAILED, failure_message="exit code 3")]
    assert [line.split()[3] for line in task_lines(silent, NOW, 80, id_length=15)] == [
        "STARTED", "3m", "3m"]
    assert task_lines(silent, NOW, 80, id_length=15)[2].endswith("  exit code 3")
    assert "PROGRESS" in task_lines(silent, NOW, ANY_WIDTH)[0], "a program may look for it"
    assert "PROGRESS" in task_lines([task(last_progress_percent=1.0)], NOW, 80)[0]


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_terminal_without_a_character_gets_an_escape_that_is_measured(columns: int) -> None:
    tasks = [task(1, name="日本" * 20), task(2, last_progress_message="é" * 500)]
    for line in task_lines(tasks, NOW, columns, encoding="ascii"):
        assert line.isascii() and len(line) <= columns


def test_only_the_status_is_coloured() -> None:
    [_, line] = task_lines(
        [task(name="日本 failed", status=TaskStatus.FAILED)], NOW, 100, id_length=8, colour=True
    )
    assert line.startswith("00000000  日本 failed  \x1b[31mfailed\x1b[0m")
    [_, line] = task_lines([task(name="n" * 90, status=TaskStatus.FAILED)], NOW, 30, colour=True)
    assert "\x1b" not in line, "the status was cut off"


def test_a_cell_is_one_harmless_line_and_no_more_of_a_text_is_looked_at_than_is_shown() -> None:
    assert cell("a\nb\x1b[2J\u202e\x9b", 80) == r"a\nb\x1b[2J\u202e\x9b"
    assert cell("x" * 10_000_000, 10) == "xxxxxxxxx…"
    assert len(cell("\u0301" * 1_000_000, 10)) < 100


def test_rows_are_padded_on_the_side_that_is_asked_for() -> None:
    assert aligned([("a", "b", "c"), ("1", "22", "333")], "<><", 80) == ["a   b  c", "1  22  333"]
    assert aligned([("a", "b"), ("long", "")], "<<", 3) == ["a …", "lo…"]

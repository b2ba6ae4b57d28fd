"""Times, durations and tables in front of people."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from bgworker.cli.tables import Column, counted, table, task_table
from bgworker.cli.text import Surface, width_of
from bgworker.model.errors import ConfigurationError
from bgworker.model.events import TaskSnapshot, TaskStatus
from bgworker.words import ago, duration, duration_of, ending, message_of, stamp, took

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


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90s", 90),
        ("15m", 900),
        ("2h", 7200),
        ("7d", 604_800),
        ("1w", 604_800),
        ("1h30m", 5400),
        ("0.5h", 1800),
        ("0s", 0),
        ("36500d", 36_500 * 86_400),
    ],
)
def test_a_duration_is_a_number_with_its_unit(text: str, seconds: float) -> None:
    assert duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "90",
        "s",
        "-1h",
        "1 h",
        "1H",
        "1y",
        "1h 30m",
        "1.h",
        "1..5h",
        "1e3s",
        "٣h",
        "inf",
        "nan",
        "36501d",
        "9" * 400 + "d",
        "\x1b[31m1h",
        "1h\n",
    ],
)
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(
        ConfigurationError, match="expected a duration such as 90s, 15m, 2h, 7d or 1h30m"
    ):
        duration(text)


@pytest.mark.parametrize(
    "seconds, words",
    [
        (-5, "now"),
        (0.4, "now"),
        (1, "1s ago"),
        (59.9, "59s ago"),
        (60, "1m ago"),
        (3599, "59m ago"),
        (3600, "1h ago"),
        (47 * 3600, "47h ago"),
        (48 * 3600, "2d ago"),
        (13.9 * 86_400, "13d ago"),
        (14 * 86_400, "2026-11-10"),
    ],
)
def test_times_are_relative_until_they_are_long_ago(seconds: float, words: str) -> None:
    assert ago(NOW - timedelta(seconds=seconds), NOW) == words


@pytest.mark.parametrize(
    "seconds, words",
    [
        (None, "-"),
        (-1.0, "0ms"),
        (0.0, "0ms"),
        (0.0004, "0ms"),
        (0.34, "340ms"),
        (0.9994, "999ms"),
        (0.9996, "1.0s"),
        (3.44, "3.4s"),
        (59.94, "59.9s"),
        (59.96, "1m00s"),
        (312, "5m12s"),
        (3599.6, "1h00m"),
        (11_220, "3h07m"),
        (187_200, "2d04h"),
    ],
)
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


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, ""),
        ({"last_progress_message": "row 5"}, "row 5"),
        (
            {
                "status": TaskStatus.FAILED,
                "failure_type": "E",
                "failure_message": "bad",
                "last_progress_message": "row 5",
            },
            "E: bad",
        ),
        ({"status": TaskStatus.FAILED, "failure_message": "bad"}, "bad"),
        (
            {
                "status": TaskStatus.CANCELLED,
                "failure_message": "user",
                "last_progress_message": "row 5",
            },
            "user",
        ),
        (
            {
                "status": TaskStatus.TIMED_OUT,
                "failure_message": "10 s",
                "last_progress_message": "row 5",
            },
            "row 5",
        ),
    ],
)
def test_the_message_is_what_is_most_worth_knowing(fields: Any, message: str) -> None:
    assert message_of(task(**fields)) == message


@pytest.mark.parametrize(
    "fields, words",
    [
        ({}, "completed in 2.0s"),
        ({"status": TaskStatus.TIMED_OUT, "duration": 312.0}, "timed out after 5m12s"),
        (
            {"status": TaskStatus.FAILED, "failure_type": "E", "failure_message": "bad"},
            "failed (E: bad) after 2.0s",
        ),
        (
            {"status": TaskStatus.CANCELLED, "failure_message": "user", "duration": None},
            "cancelled (user)",
        ),
        ({"status": TaskStatus.INTERRUPTED, "duration": None}, "interrupted"),
    ],
)
def test_how_a_task_ended_is_told_in_words(fields: Any, words: str) -> None:
    assert ending(task(**fields)) == words


def test_only_the_counts_that_are_not_zero_are_told() -> None:
    counts = {TaskStatus.COMPLETED: 3, TaskStatus.RUNNING: 1, TaskStatus.FAILED: 0}
    assert counted(counts) == "1 running, 3 completed"


# ---------------------------------------------------------------- tables

def lines_of(tasks: list[TaskSnapshot], columns: int = 1_000_000, digits: int = 8,
             **how: Any) -> list[str]:
    return task_table(tasks, [each.task_id[:digits] for each in tasks], NOW,
                      Surface(columns, **how))


def plain(line: str) -> str:
    return re.sub("\x1b\\[[0-9]+m", "", line)


def test_a_table_is_aligned_under_its_headings() -> None:
    tasks = [task(1, name="load users", last_progress_percent=40.0, last_progress_message="2 of 5"),
             task(2, TaskStatus.TIMED_OUT, name="日本", duration=61.0)]
    assert lines_of(tasks) == [
        "ID        NAME        STATUS     PROGRESS  STARTED  DURATION  MESSAGE",
        "00000000  load users  completed       40%   3m ago  2.0s      2 of 5",
        "00000000  日本        timed out             3m ago  1m01s",
    ]


@pytest.mark.parametrize("columns", [1, 5, 20, 33, 40, 50, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    tasks = [task(1, name="n" * 300, last_progress_message="m" * 1000), task(2, name="日本" * 100),
             task(3, name="e\u0301" * 500), task(4, name="שלום" * 50),
             task(4, name="", last_progress_message="\x1b[31m" * 100)]
    for has_colour in (False, True):
        for line in lines_of(tasks, columns, has_colour=has_colour):
            assert width_of(plain(line)) <= columns


@pytest.mark.parametrize("columns, headings", [
    (20, "ID STATUS"), (40, "ID NAME STATUS"), (50, "ID NAME STATUS MESSAGE"),
    (60, "ID NAME STATUS DURATION MESSAGE"), (80, "ID NAME STATUS STARTED DURATION MESSAGE"),
    (100, "ID NAME STATUS PROGRESS STARTED DURATION MESSAGE")])
def test_where_room_is_scarce_whole_columns_go_and_none_is_cut_to_nothing(
    columns: int, headings: str
) -> None:
    tasks = [task(name="n" * 100, last_progress_message="m" * 100,
                  last_progress_percent=5.0 if columns == 100 else None)]
    heading, line = lines_of(tasks, columns)
    assert heading.split() == headings.split()
    assert len(line) == columns or columns == 20
    assert all(len(cell) >= 8 or cell == "5%" for cell in line.replace(" ago", "_ago_").split()[:3])
    assert "…" not in line.split()


def test_what_is_left_of_a_line_goes_to_the_texts_that_were_cut() -> None:
    [_, line] = lines_of([task(name="short", last_progress_message="m" * 100)], 80)
    assert line.endswith("m" * 20 + "…") and len(line) == 80 and "  short  " in line


@pytest.mark.parametrize("columns, least, most", [(50, 1.0, 2.0), (80, 1.0, 2.0), (200, 2.0, 3.5)])
def test_of_the_room_the_message_gets_more_than_the_name(
    columns: int, least: float, most: float
) -> None:
    [_, line] = lines_of([task(name="n" * 300, last_progress_message="m" * 400)], columns)
    assert len(line) == columns and least <= line.count("m") / line.count("n") <= most


def test_what_one_text_does_not_need_of_its_share_another_gets() -> None:
    columns = [Column("A", least=2), Column("B", least=2, share=3), Column("C", least=2, share=3)]
    assert table(columns, [("a" * 90, "b" * 90, "c" * 4)], Surface(40))[1] == (
        f"{'a' * 8}…  {'b' * 22}…  cccc")
    assert table(columns, [("a" * 9, "b" * 90, "c" * 90)], Surface(60))[1] == (
        f"{'a' * 9}  {'b' * 22}…  {'c' * 23}…")


def test_on_a_terminal_a_column_without_text_is_left_out() -> None:
    waiting = [task(name="job", status=TaskStatus.SCHEDULED, started_utc=None, duration=None)]
    assert lines_of(waiting, 80) == ["ID        NAME  STATUS", "00000000  job   waiting"]
    failed = [task(1), task(2, TaskStatus.FAILED, failure_message="exit code 3")]
    assert lines_of(failed, 80)[0].split() == [
        "ID", "NAME", "STATUS", "STARTED", "DURATION", "MESSAGE"]
    assert "PROGRESS" in lines_of(waiting)[0], "a program may look for it"
    assert "PROGRESS" in lines_of([task(last_progress_percent=1.0)], 80)[0]
    assert lines_of([], 80)[0].split()[0] == "ID"


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_terminal_without_a_character_gets_an_escape_that_is_measured(columns: int) -> None:
    tasks = [task(1, name="日本" * 20), task(2, last_progress_message="é" * 500)]
    for line in lines_of(tasks, columns, encoding="ascii"):
        assert line.isascii() and len(line) <= columns


def test_only_the_status_is_coloured() -> None:
    [_, line] = lines_of([task(name="日本 failed", status=TaskStatus.FAILED)], 100, has_colour=True)
    assert line.startswith("00000000  日本 failed  \x1b[31mfailed\x1b[0m  ")
    assert line.count("\x1b") == 2
    assert "\x1b" not in "".join(lines_of([task(status=TaskStatus.FAILED)], 100))


def test_colours_that_a_task_chose_are_left_out_and_take_no_room() -> None:
    message = "".join(f"\x1b[38;5;{n}m{n % 10}\x1b[0m" for n in range(100, 180))
    [_, line] = lines_of([task(last_progress_message=message)], 200)
    assert line.endswith("0123456789" * 8)


@pytest.mark.parametrize("name", ["👩\u200d🚀", "❤\ufe0f", "👍🏽", "क\u094dषि", "👨\u200d👩\u200d👧"])
def test_what_terminals_disagree_about_is_left_out_of_a_table(name: str) -> None:
    [_, line] = lines_of([task(name=f"a{name}b")], 80)
    assert not re.search("[\u200d\ufe0f\U0001f3fb-\U0001f3ff]", line)
    assert re.search(r"  a[^ab]+b  +completed", line)


def test_text_from_right_to_left_keeps_to_its_cell() -> None:
    [_, line] = lines_of([task(name="שלום", last_progress_message="عربي")], 80)
    assert "  שלום\u200e  completed" in line and line.endswith("عربي\u200e")
    assert "\u200e" not in "".join(lines_of([task(name="日本 é")], 80))


def test_a_cell_is_one_harmless_line_and_no_more_of_a_text_is_looked_at_than_is_shown() -> None:
    cell = Surface().cell
    assert cell("a\nb\x1b[2J\u202e\x9b", 80) == r"a\nb\x1b[2J\u202e\x9b"
    assert cell("x" * 10_000_000, 10) == "xxxxxxxxx…"
    assert len(cell("\u0301" * 1_000_000, 10)) < 200


def test_cells_are_padded_on_the_side_that_is_asked_for() -> None:
    columns = [Column("A"), Column("B", ">"), Column("C")]
    assert table(columns, [("1", "22", "333"), ("", "4", "")], Surface(80)) == [
        "A   B  C", "1  22  333", "    4"]

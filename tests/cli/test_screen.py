"""What is drawn: rows from events, lines from rows, and what of it may reach a terminal. No
terminal is needed."""

from __future__ import annotations

import io
import os
import re
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from bgworker.cli import live
from bgworker.cli.live import TaskTable, draw
from bgworker.cli.screen import ERR, OUT, OWN, Channel, Screen
from bgworker.cli.tables import painted
from bgworker.cli.text import cut, width_of
from bgworker.words import escaped, said
from bgworker.model.events import (
    Event,
    EventType,
    LifecycleEvent,
    StreamEvent,
    StreamType,
    TaskSnapshot,
    TaskStatus,
)

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
ENDS = {
    TaskStatus.COMPLETED: EventType.TASK_COMPLETED,
    TaskStatus.FAILED: EventType.TASK_FAILED,
    TaskStatus.CANCELLED: EventType.TASK_CANCELLED,
    TaskStatus.TIMED_OUT: EventType.TASK_TIMED_OUT,
}


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def lifecycle(
    task: int, type_: EventType, status: TaskStatus, when: float = 0.0, **fields: Any
) -> LifecycleEvent:
    snapshot = TaskSnapshot(
        f"{task:032x}", fields.pop("name", f"task {task}"), status, "0" * 32, START, **fields
    )
    return LifecycleEvent(type_, snapshot.task_id, 1, at(when), snapshot)


def waiting(task: int, **fields: Any) -> list[Event]:
    return [lifecycle(task, EventType.TASK_CREATED, TaskStatus.CREATED, **fields),
            lifecycle(task, EventType.TASK_SCHEDULED, TaskStatus.SCHEDULED, **fields)]


def running(task: int, when: float = 0.0, **fields: Any) -> list[Event]:
    return [
        *waiting(task, **fields),
        lifecycle(
            task, EventType.TASK_STARTED, TaskStatus.RUNNING, when, started_utc=at(when), **fields
        ),
    ]


def ended(task: int, status: TaskStatus, when: float, started: float | None = 0.0) -> Event:
    return lifecycle(task, ENDS[status], status, when, completed_utc=at(when),
                     started_utc=None if started is None else at(started),
                     duration=None if started is None else when - started)


def says(task: int, text: str) -> Event:
    return StreamEvent(
        EventType.TASK_OUTPUT, f"{task:032x}", 4, START, StreamType.OUTPUT, payload=text
    )


def progress(task: int, percent: float | None, message: str = "") -> Event:
    return StreamEvent(
        EventType.TASK_PROGRESS,
        f"{task:032x}",
        4,
        START,
        StreamType.PROGRESS,
        percent=percent,
        message=message,
    )


def table_of(*events: Event | list[Event]) -> TaskTable:
    table = TaskTable()
    for each in events:
        for event in each if isinstance(each, list) else [each]:
            table.apply(event)  # type: ignore[arg-type]
    return table


def lines_of(
    table: TaskTable, columns: int = 80, height: int = 24, seconds: float = 0.0, **how: Any
) -> list[str]:
    return draw(table, (columns, height), at(seconds), seconds, **how)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("text, shown", [
    ("\x1b[31mred\x1b[0m", "red"), ("\x1b[01;31m\x1b[Kgrep\x1b[m\x1b[K", "grep"), ("\x1b[38:2::1:2:3mx", "x"),
    ("\x1b(B\x1b[mx", "x"), ("\x1b[2J\x1b[1;1H\x1b[6n", r"\x1b[2J\x1b[1;1H\x1b[6n"), ("\x1b[31", r"\x1b[31"),
    ("\x1b\x1b[0m[2J", r"\x1b[2J"), ("\x9b31mx", r"\x9b31mx")])
def test_what_only_colours_a_text_is_left_out_where_it_is_shown_and_nothing_else(
    text: str, shown: str
) -> None:
    assert said(text) == shown


@pytest.mark.parametrize("text, shown", [
    ("plain", "plain"), ("\x1b]0;evil\x07", r"\x1b]0;evil\x07"), ("a\x00b\x7f\x9b31m", r"a\x00b\x7f\x9b31m"),
    ("a\u202eb\u2066c\u200fd", r"a\u202eb\u2066c\u200fd"), ("a\r\nb", r"a\r\nb"), ("a\u2028b\ufeffc", r"a\u2028b\ufeffc"),
    ("\U000e0041\ud800", r"\U000e0041\ud800"), ("a\tb", "a       b"), ("日本 e\u0301 👩\u200d🚀", "日本 e\u0301 👩\u200d🚀"),
])
def test_whatever_could_steer_a_terminal_or_reorder_a_line_is_shown_as_an_escape(
    text: str, shown: str
) -> None:
    assert escaped(text) == shown


def test_no_control_character_whatsoever_gets_through() -> None:
    everything = "".join(map(chr, range(0x3000)))
    assert not [
        each
        for each in escaped(everything)
        if each != " "
        and not each.isprintable()
        and each
        in "\t\n" + "".join(map(chr, [*range(32), *range(127, 160), *range(0x202A, 0x202F)]))
    ]


def test_wide_characters_count_two_columns_and_combining_ones_none() -> None:
    assert width_of("abc") == 3
    assert width_of("日本語") == 6
    assert width_of("e\u0301") == 1
    assert width_of("👍") == 2
    assert width_of("a\u200bb") == 2


def test_a_cut_text_never_exceeds_its_columns() -> None:
    for text in ("plain text that is long", "日本語の長いテキスト", "e\u0301" * 30, "a日" * 20):
        for columns in range(30):
            assert width_of(cut(text, columns)) <= columns
    assert cut("abcdef", 4) == "abc…"
    assert cut("日本語", 4) == "日…"
    assert cut("abcdef", 6) == "abcdef"


# ---------------------------------------------------------------- events -> rows -> lines

def test_the_table_has_a_row_for_each_running_task_and_a_summary() -> None:
    table = table_of(
        running(1, 0, name="gzip -t a"),
        says(1, "halfway"),
        running(2, 5, name="make"),
        progress(2, 40.0, "compiling"),
        waiting(3),
    )
    first, second, summary = lines_of(table, seconds=65)
    assert re.fullmatch(r"\[1\] running +1:05 +gzip -t a  halfway", first)
    assert re.fullmatch(r"\[2\] running +1:00 +40% +make +compiling", second)
    assert summary == "2 running, 1 waiting, 1:05"


def test_an_ended_task_stays_for_a_moment_below_the_running_ones() -> None:
    table = table_of(running(1), running(2), ended(1, TaskStatus.FAILED, 3))
    assert [line.split()[:2] for line in lines_of(table, seconds=3)] == [
        ["[2]", "running"], ["[1]", "failed"], ["1", "running,"]]
    table.forget_ended(at(3 + live.JUST_ENDED))
    assert [row.number for row in table.rows()] == [2]
    assert lines_of(table)[-1] == "1 running, 1 failed, 0:00"


def test_a_task_cancelled_before_it_started_has_no_row() -> None:
    table = table_of(waiting(1), ended(1, TaskStatus.CANCELLED, 1, None))
    assert lines_of(table) == ["1 cancelled, 0:00"]


def test_a_task_keeps_its_number_when_others_are_forgotten() -> None:
    table = table_of(running(1), ended(1, TaskStatus.COMPLETED, 1))
    table.forget_ended(at(100))
    assert table.apply(waiting(2)[0]).number == 2  # type: ignore[arg-type]


def test_an_empty_line_does_not_hide_the_last_message() -> None:
    assert lines_of(table_of(running(1), says(1, "busy"), says(1, "")))[0].endswith("  busy")


@pytest.mark.parametrize("height", [1, 2, 3, 5, 10, 24, 200])
def test_the_table_never_is_higher_than_the_terminal_and_counts_what_it_leaves_out(
    height: int,
) -> None:
    lines = lines_of(table_of(*(running(task) for task in range(1, 41))), height=height)
    assert len(lines) <= max(1, height - 1)
    shown = sum(line.startswith("[") or line.startswith(" [") for line in lines)
    if 1 < len(lines) and shown < 40:
        assert lines[-2] == f"… and {40 - shown} more"
    assert lines[-1] == "40 running, 0:00"


@pytest.mark.parametrize("columns", [1, 5, 12, 20, 40, 79, 300])
def test_no_line_ever_reaches_the_last_column(columns: int) -> None:
    table = table_of(
        running(1, name="日本語の名前" * 20),
        says(1, "e\u0301日" * 200),
        running(2),
        progress(2, 5.0, "x" * 500),
    )
    for line in lines_of(table, columns=columns):
        assert width_of(line) < max(columns, 2)
    for line in lines_of(table, columns=columns, colour=True):
        assert width_of(re.sub("\x1b\\[[0-9]+m", "", line)) < max(columns, 2)


def test_names_and_messages_cannot_steer_the_terminal_from_within_the_table() -> None:
    table = table_of(running(1, name="a\x1b[2Jb"), says(1, "\x1b]0;evil\x07\u202e"))
    assert r"a\x1b[2Jb" in lines_of(table)[0]
    assert all(line.isprintable() for line in lines_of(table))


def test_what_the_terminal_cannot_encode_is_escaped_before_it_is_measured() -> None:
    table = table_of(running(1, name="日本"), says(1, "é" * 100))
    lines = lines_of(table, columns=60, encoding="ascii")
    assert all(line.isascii() and len(line) < 60 for line in lines)
    assert r"\u65e5\u672c" in lines[0] and lines[0].endswith("...")


def test_colour_is_only_added_around_the_status() -> None:
    table = table_of(running(1), says(1, "running"))
    [coloured, _], [plain, _] = lines_of(table, colour=True), lines_of(table)
    assert coloured == plain.replace("running", "\x1b[36mrunning\x1b[0m", 1)
    assert painted("failed x", TaskStatus.FAILED, "failed") == "\x1b[31mfailed\x1b[0m x"
    assert painted("fai…", TaskStatus.FAILED, "failed") == "fai…"


# ---------------------------------------------------------------- lines -> stdout and stderr

class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding=encoding)

    def isatty(self) -> bool:
        return True


class File(io.TextIOWrapper):
    def __init__(self) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding="latin-1")


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return at(self.seconds)


def screen_on(
    out: Any, err: Any, table: TaskTable | None, clock: Clock, size: tuple[int, int] = (40, 10)
) -> Screen:
    return Screen(Channel(out), Channel(err), table, size=lambda: size, now=clock.now, clock=clock)


def test_what_is_no_terminal_gets_every_byte_as_it_is() -> None:
    out, err = File(), File()
    screen_on(out, err, None, Clock()).show(
        [(OUT, "\x1b[31mé\t\u202e"), (ERR, "bad\x07"), (OUT, "")]
    )
    assert out.bytes.getvalue() == "\x1b[31mé\t\u202e\n\n".encode()
    assert err.bytes.getvalue() == b"bad\x07\n"


def test_a_terminal_gets_the_lines_of_tasks_escaped_and_our_own_as_they_are() -> None:
    out, err = Terminal("ascii"), Terminal()
    screen_on(out, err, None, Clock()).show(
        [(OUT, "\x1b[31mé"), (ERR, "bad\x07"), (OWN, "\x1b[31mfailed\x1b[0m")]
    )
    assert out.bytes.getvalue() == b"\\xe9\n"
    assert err.bytes.getvalue() == b"bad\\x07\n\x1b[31mfailed\x1b[0m\n"


def test_lines_scroll_above_the_table_which_is_taken_off_at_the_end() -> None:
    err, clock = Terminal(), Clock()
    screen = screen_on(File(), err, table_of(running(1), running(2)), clock)
    screen.show([])
    first = err.bytes.getvalue().decode()
    assert first.startswith("\x1b[?25l") and first.endswith("\x1b[?25h") and first.count("\n") == 2
    screen.show([(ERR, "news")])
    assert (
        err.bytes.getvalue()
        .decode()[len(first) :]
        .startswith("\r\x1b[2A\x1b[Jnews\n\x1b[?25l[1] running")
    )
    screen.close()
    assert err.bytes.getvalue().endswith(b"\r\x1b[2A\x1b[J")
    screen.show([(OWN, "2 commands")])
    assert err.bytes.getvalue().endswith(b"\r\x1b[2A\x1b[J2 commands\n")


def test_without_news_the_table_is_drawn_once_a_second() -> None:
    err, clock = Terminal(), Clock()
    screen = screen_on(File(), err, table_of(running(1)), clock)
    screen.show([])
    before = len(err.bytes.getvalue())
    clock.seconds = 0.5
    screen.refresh()
    assert len(err.bytes.getvalue()) == before
    clock.seconds = 1.0
    screen.refresh()
    assert b"0:01" in err.bytes.getvalue()[before:]


def test_a_terminal_that_has_become_narrower_is_cleared_of_the_wrapped_lines() -> None:
    err, clock, size = Terminal(), Clock(), [80, 24]
    table = table_of(running(1), says(1, "x" * 200))
    screen = Screen(
        Channel(File()),
        Channel(err),
        table,
        size=lambda: (size[0], size[1]),
        now=clock.now,
        clock=clock,
    )
    screen.show([])
    size[0] = 40
    screen.close()
    # 79 columns are two lines now, the summary is the third
    assert err.bytes.getvalue().endswith(b"\r\x1b[2A\x1b[J")


@pytest.mark.skipif(os.name == "nt", reason="pipes cannot be made non-blocking")
def test_a_pipe_that_somebody_made_non_blocking_loses_nothing() -> None:
    import threading
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    got = []

    def drain() -> None:
        with open(reader, "rb") as pipe:
            got.append(pipe.read())

    thread = threading.Thread(target=drain)
    with open(writer, "w", encoding="utf-8") as stream:
        thread.start()
        Channel(stream).write("x" * 1_000_000)
    thread.join(30)
    assert not thread.is_alive()
    assert len(got[0]) == 1_000_000


def test_a_stream_that_the_process_has_not_takes_nothing_and_is_no_terminal() -> None:
    channel = Channel(None)
    channel.write("text")
    assert not channel.is_terminal
    assert min(channel.size()) > 0

"""What is drawn, and what of it may reach a terminal. No terminal is needed."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Collection
from dataclasses import replace
from time import time_ns
from typing import Any

import pytest

from bgworker.cli import live as live_module
from bgworker.cli.live import Live
from bgworker.cli.screen import ERR, OUT, OWN, Channel, Screen
from bgworker.cli.text import Surface, width_of
from bgworker.model.events import TaskStatus
from bgworker.model.records import Source, TaskState
from bgworker.words import escaped, said


def live_with(*running: tuple[str, str], total: int = 3) -> Live:
    """Return what is known of commands that run, each with its name and what it said."""
    live = Live(total)
    for name, line in running:
        live.move(state := state_of(name), TaskStatus.RUNNING)
        live.number(state)
        live.say(state, line)
    return live


def state_of(name: str) -> TaskState:
    state = TaskState("0" * 32, name, "", 0)
    state.started_ns = time_ns() - 65_000_000_000
    return state


class Scripted(Source):
    """Where the code of a task comes from, in name only."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    @property
    def script_hash(self) -> str:
        return f"hash of {self._name}"


def lines_of(live: Live, columns: int = 80, height: int = 24, **how: Any) -> list[str]:
    return live.lines(Surface(columns, height, **how))


def plain(line: str) -> str:
    return re.sub("\x1b\\[[0-9]+m", "", line)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[01;31m\x1b[Kgrep\x1b[m\x1b[K", "grep"),
        ("\x1b[38:2::1:2:3mx", "x"),
        ("\x1b(B\x1b[mx", "x"),
        ("\x1b[2J\x1b[1;1H\x1b[6n", r"\x1b[2J\x1b[1;1H\x1b[6n"),
        ("\x1b[31", r"\x1b[31"),
        ("\x1b\x1b[0m[2J", r"\x1b[2J"),
        ("\x9b31mx", r"\x9b31mx"),
    ],
)
def test_what_only_colours_a_text_is_left_out_where_it_is_shown_and_nothing_else(
    text: str, shown: str
) -> None:
    assert said(text) == shown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain", "plain"),
        ("\x1b]0;evil\x07", r"\x1b]0;evil\x07"),
        ("a\x00b\x7f\x9b31m", r"a\x00b\x7f\x9b31m"),
        ("a\u202eb\u2066c\u200fd", r"a\u202eb\u2066c\u200fd"),
        ("a\r\nb", r"a\r\nb"),
        ("a\u2028b\ufeffc", r"a\u2028b\ufeffc"),
        ("\U000e0041\ud800", r"\U000e0041\ud800"),
        ("a\tb", "a       b"),
        ("日本 e\u0301 👩\u200d🚀", "日本 e\u0301 👩\u200d🚀"),
    ],
)
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


def test_what_is_printable_is_shown_as_it_is_and_what_is_escaped_is_not_printable() -> None:
    everything = map(chr, range(sys.maxunicode + 1))
    assert not [each for each in everything if each.isprintable() and said(each) != each]


def test_wide_characters_count_two_columns_and_combining_ones_none() -> None:
    assert width_of("abc") == 3
    assert width_of("日本語") == 6
    assert width_of("e\u0301") == 1
    assert width_of("👍") == 2
    assert width_of("a\u200bb") == 2


def test_a_cut_text_never_exceeds_its_columns() -> None:
    cut = Surface().cut
    for text in ("plain text that is long", "日本語の長いテキスト", "e\u0301" * 30, "a日" * 20):
        for columns in range(30):
            assert width_of(cut(text, columns)) <= columns
    assert cut("abcdef", 4) == "abc…"
    assert cut("日本語", 4) == "日…"
    assert cut("abcdef", 6) == "abcdef"


# ---------------------------------------------------------------- what runs -> lines

def test_the_picture_has_a_heading_a_line_for_each_command_that_runs_and_a_summary() -> None:
    live = live_with(("gzip -t a", "halfway"), ("make", ""), total=4)
    heading, first, second, summary = lines_of(live)
    assert heading.split() == ["ID", "TIME", "NAME", "MESSAGE"]
    assert re.fullmatch(r"\[1\] +1m05s +gzip -t a +halfway", first)
    assert re.fullmatch(r"\[2\] +1m05s +make", second)
    assert re.fullmatch(r"\[> {23}\] 0 of 4, \d+ms, 2 running", summary)


def test_the_bar_grows_with_what_has_ended_and_the_summary_counts_what_failed() -> None:
    live, ended = live_with(total=4), []
    for status in (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED):
        live.move(state_of("job"), status)
        [summary] = lines_of(live)
        ended.append(summary)
    assert [line.count("=") for line in ended] == [6, 12, 18]
    assert re.fullmatch(r"\[={18}> {5}\] 3 of 4, \d+ms, 1 failed, 1 cancelled", ended[-1])
    live.move(state_of("job"), TaskStatus.COMPLETED)
    assert f"[{'=' * 24}] 4 of 4" in lines_of(live)[0]
    [summary] = lines_of(live, 40)
    assert summary.startswith("4 of 4, "), "there is no room for the bar"


def test_a_command_that_has_ended_has_no_line_and_the_others_keep_their_numbers() -> None:
    live = Live(3)
    states = [state_of(f"job {number}") for number in range(3)]
    for state in states:
        live.move(state, TaskStatus.RUNNING)
        assert live.number(state) == live.number(state)
    live.move(states[0], TaskStatus.COMPLETED)
    live.say(states[0], "what comes late is not shown")
    assert [line.split()[0] for line in lines_of(live)[1:3]] == ["[2]", "[3]"]
    assert live.number(state_of("next")) == 4


def test_from_the_third_second_on_the_picture_tells_how_long_the_rest_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1_000.0]
    monkeypatch.setattr(live_module, "monotonic", lambda: clock[0])
    monkeypatch.setattr(live_module, "time_ns", lambda: int(clock[0] * 1e9))
    asked: list[list[str]] = []

    def usual_seconds(script_hashes: Collection[str]) -> dict[str, float]:
        asked.append(sorted(script_hashes))
        return {"hash of a": 10.0, "hash of b": 7200.0}

    live = Live(3, 1, usual_seconds)
    states = {name: state_of(name) for name in "abc"}
    for name, state in states.items():
        state.source = Scripted(name)
        live.number(state)
    states["a"].started_ns = int(clock[0] * 1e9)
    live.move(states["a"], TaskStatus.RUNNING)

    def summary(at: float) -> str:
        clock[0] = 1_000.0 + at
        return lines_of(live)[-1].partition("] ")[2]

    assert summary(2.9) == "0 of 3, 2.9s, 1 running" and not asked, "it may be over soon"
    assert summary(4.0) == "0 of 3, 4.0s, about 3h00m left, 1 running"
    assert asked == [["hash of a", "hash of b", "hash of c"]]
    states["a"].duration = 11.0
    live.move(states["a"], TaskStatus.COMPLETED)
    live.move(states["b"], TaskStatus.CANCELLED)
    assert summary(4.5) == "2 of 3, 4.5s, about 3h00m left, 1 cancelled", "not twice a second"
    assert summary(11.0) == "2 of 3, 11.0s, about 11s left, 1 cancelled"
    states["c"].started_ns = int(1_011.0 * 1e9)
    live.move(states["c"], TaskStatus.RUNNING)
    assert summary(15.0) == "2 of 3, 15.0s, about 7s left, 1 running, 1 cancelled"
    assert summary(40.0) == "2 of 3, 40.0s, 1 running, 1 cancelled", "any moment now"
    assert len(asked) == 1, "no command has come since"


def test_when_all_have_ended_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_000.0]
    monkeypatch.setattr(live_module, "monotonic", lambda: clock[0])
    live = Live(2)
    for duration in (20.0, 1.0):
        state = state_of("job")
        live.move(state, TaskStatus.RUNNING)
        state.duration = duration
        live.move(state, TaskStatus.COMPLETED)
        clock[0] += 3.5 if duration == 20.0 else 0.5
        told = live.summary()
        assert ("about 20s left" in told) is (duration == 20.0), told


def test_the_time_left_stands_where_a_narrow_terminal_still_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = live_with(*[("job", "")] * 8, total=400)
    monkeypatch.setattr(live, "_time_left", lambda: 75.0)
    for columns in (39, 79, 199):
        assert "about 1m15s left" in lines_of(live, columns)[-1]
        assert len(lines_of(live, columns)[-1]) <= columns


def test_an_empty_line_does_not_hide_the_last_message() -> None:
    live = live_with()
    live.move(state := state_of("job"), TaskStatus.RUNNING)
    live.number(state)
    live.say(state, "busy")
    live.say(state, "")
    assert lines_of(live)[1].endswith("  busy")


@pytest.mark.parametrize("height", [1, 2, 3, 5, 10, 24, 200])
def test_the_picture_never_is_higher_than_the_terminal_and_counts_what_it_leaves_out(
    height: int,
) -> None:
    lines = lines_of(live_with(*[("job", "")] * 40, total=40), height=height)
    assert len(lines) <= max(1, height - 1)
    shown = sum(line.lstrip().startswith("[") for line in lines[:-1])
    if 1 < len(lines) and shown < 40:
        assert lines[-2] == f"... and {40 - shown} more"
    assert "0 of 40, " in lines[-1] and lines[-1].endswith(", 40 running")


@pytest.mark.parametrize("columns", [1, 5, 12, 20, 40, 79, 300])
def test_no_line_of_the_picture_is_wider_than_the_surface(columns: int) -> None:
    live = live_with(("日本語の名前" * 20, "e\u0301日" * 200), ("job", "x" * 500))
    for line in lines_of(live, columns) + lines_of(live, columns, has_colour=True):
        assert width_of(plain(line)) <= columns


def test_names_and_messages_cannot_steer_the_terminal_from_within_the_table() -> None:
    lines = lines_of(live_with(("a\x1b[2Jb", "\x1b]0;evil\x07\u202e")))
    assert r"a\x1b[2Jb" in lines[1]
    assert all(line.isprintable() for line in lines)


def test_what_the_terminal_cannot_encode_is_escaped_before_it_is_measured() -> None:
    lines = lines_of(live_with(("日本", "é" * 100)), 60, encoding="ascii")
    assert all(line.isascii() and len(line) <= 60 for line in lines)
    assert r"\u65e5\u672c" in lines[1] and lines[1].endswith("...")


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


class Sized(Channel):
    """A channel to a terminal whose size a test sets."""

    columns, height = 40, 10

    def surface(self) -> Surface:
        return replace(super().surface(), columns=self.columns, height=self.height)


def screen_on(out: Any, err: Any, drawing: Any = None) -> Screen:
    return Screen(Channel(out), Sized(err), drawing)


def test_what_is_no_terminal_gets_every_byte_as_it_is() -> None:
    out, err = File(), File()
    screen_on(out, err).show(
        [(OUT, "\x1b[31mé\t\u202e"), (ERR, "bad\x07"), (OUT, "")]
    )
    assert out.bytes.getvalue() == "\x1b[31mé\t\u202e\n\n".encode()
    assert err.bytes.getvalue() == b"bad\x07\n"


def test_a_terminal_gets_the_lines_of_tasks_escaped_and_our_own_as_they_are() -> None:
    out, err = Terminal("ascii"), Terminal()
    screen_on(out, err).show(
        [(OUT, "\x1b[31mé"), (ERR, "bad\x07"), (OWN, "\x1b[31mfailed\x1b[0m")]
    )
    assert out.bytes.getvalue() == b"\\xe9\n"
    assert err.bytes.getvalue() == b"bad\\x07\n\x1b[31mfailed\x1b[0m\n"
    screen_on(Terminal(), err := Terminal()).show([(ERR, "plain\n\ttab\n\u65e5"), (ERR, "a\n\nb")])
    assert err.bytes.getvalue().decode() == "plain\n        tab\n\u65e5\na\n\nb\n"


def test_lines_scroll_above_the_picture_which_is_taken_off_at_the_end() -> None:
    err = Terminal()
    screen = screen_on(File(), err, lambda surface: ["one", "two", f"{surface.columns} columns"])
    screen.show([])
    first = err.bytes.getvalue().decode()
    assert first == "\x1b[?25lone\ntwo\n39 columns\x1b[?25h", "text in the last one would wrap"
    screen.show([(ERR, "news")])
    assert err.bytes.getvalue().decode()[len(first):] == "\r\x1b[2A\x1b[Jnews\n" + first
    screen.close()
    assert err.bytes.getvalue().endswith(b"\r\x1b[2A\x1b[J")
    screen.show([(OWN, "2 commands")])
    assert err.bytes.getvalue().endswith(b"\r\x1b[2A\x1b[J2 commands\n")


def test_marks_that_take_no_column_and_colours_do_not_count_as_wrapped_lines() -> None:
    err = Sized(Terminal())
    screen = Screen(Channel(File()), err,
                    lambda surface: ["x" * 35 + "\u200e\x1b[31mred\x1b[0m", "summary"])
    screen.show([])
    screen.close()
    assert err._stream.bytes.getvalue().endswith(b"\r\x1b[1A\x1b[J")  # type: ignore[union-attr]


def test_a_terminal_that_has_become_narrower_is_cleared_of_the_wrapped_lines() -> None:
    err = Sized(Terminal())
    err.columns = 80
    screen = Screen(Channel(File()), err, lambda surface: ["x" * surface.columns, "summary"])
    screen.show([])
    err.columns = 40
    screen.close()
    # 79 columns are two lines now, the summary is the third
    assert err._stream.bytes.getvalue().endswith(b"\r\x1b[2A\x1b[J")  # type: ignore[union-attr]


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
    assert channel.surface().columns > 1000

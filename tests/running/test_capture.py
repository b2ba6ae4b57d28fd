"""What a task prints, logs and warns comes to its streams, once, and still goes where it went;
nobody else notices."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import io
import json
import weakref
import logging
import os
import subprocess
import sys
import threading
import warnings
import xml.sax.saxutils
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bgworker import Scheduler, StreamEvent, TaskTimedOut, current_task
from bgworker.running.capture import Router, StandIn
from tests.support import ROOT, RecordingSink, until

LONG = 30.0
Said = list[tuple[str, str]]
"""Pairs of stream and payload."""


def said(function: Callable[[], object], **settings: Any) -> Said:
    """Run the function as a captured task; return what its streams hold. What it raises is
    raised."""
    recorder = RecordingSink()
    with Scheduler(1, sinks=[recorder], capture_output=True, **settings) as pool:
        task = pool.submit(function)
        task.wait(LONG)
    task.result(0)
    return recorder.said(task)


def printed(*writes: str, **settings: Any) -> list[str]:
    """Return the output stream's lines of a task that writes these texts to ``sys.stdout``."""
    def write_all() -> None:
        for text in writes:
            sys.stdout.write(text)

    events = said(write_all, **settings)
    assert {stream for stream, _ in events} <= {"output"}
    return [payload for _, payload in events]


class Std:
    """The streams that stand for the terminal in a test."""

    def __init__(self) -> None:
        self.out = io.StringIO()
        self.err = io.StringIO()


@pytest.fixture
def std() -> Std:
    return Std()


def terminal(test: Callable[..., None]) -> Callable[..., None]:
    """Let ``std`` be ``sys.stdout`` and ``sys.stderr``: in the test itself, as pytest sets its own
    after the fixtures."""
    @functools.wraps(test)
    def with_std(*, std: Std, **fixtures: Any) -> None:
        with contextlib.redirect_stdout(std.out), contextlib.redirect_stderr(std.err):
            test(std=std, **fixtures)
            assert (
                below(sys.stdout) is std.out and below(sys.stderr) is std.err
            ), "the test, or a task, has left something behind"

    return with_std


def below(place: object) -> object:
    """Return what a stand-in stands for."""
    while issubclass(type(place), StandIn):
        place = place.bgworker_below  # type: ignore[attr-defined]
    return place


@pytest.fixture(autouse=True)
def who_stands_in_stands_there_once() -> Iterator[None]:
    yield
    for place in (
        sys.stdout,
        sys.stderr,
        vars(logging.Logger)["callHandlers"],
        vars(warnings)["_showwarnmsg"],
    ):
        assert below(place) is getattr(place, "bgworker_below", place)


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """A logger of the test's own, whose handlers go with it."""
    logger = logging.getLogger("test_capture")
    logger.setLevel(logging.DEBUG)
    yield logger
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.filters.clear()
    logger.propagate = True
    logger.disabled = False
    logger.setLevel(logging.NOTSET)


# -- all of it at once, in a process of its own --

MANY = """
import logging, sys, threading, warnings

logging.basicConfig(level=logging.DEBUG, format="%(message)s")
warnings.simplefilter("always")
together = threading.Barrier(3)

def talk(name):
    together.wait(30)
    for i in range(1000):
        print(f"{name} out {i}")
        print(f"{name} err {i}", file=sys.stderr)
        logging.getLogger("some.where").info("%s log %d", name, i)
        warnings.warn(f"{name} warn {i}")

def outside():
    together.wait(30)
    for i in range(1000):
        print(f"nobody out {i}")

with Scheduler(2, sinks=[recorder], capture_output=True) as pool:
    thread = threading.Thread(target=outside)
    thread.start()
    tasks = [pool.submit(talk, name) for name in ("first", "second")]
    for task in tasks:
        task.result(30)
    thread.join(30)
result = [recorder.said(task) for task in tasks]
"""

PRELUDE = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import bgworker
from bgworker import Scheduler
from bgworker.testing import MemorySink

class Recorder(MemorySink):
    def said(self, task):
        return [(str(each.stream_type), each.payload) for each in self.events
                if each.task_id == task.id and hasattr(each, "payload")]

recorder = Recorder()

def said(function):
    with Scheduler(1, sinks=[recorder], capture_output=True) as pool:
        task = pool.submit(function)
        task.wait(30)
    task.result(0)
    return recorder.said(task)
"""


class Outcome:
    """What a process said, and its ``result``."""

    def __init__(self, body: str, tmp_path: Path) -> None:
        answer = tmp_path / "answer.json"
        ending = f"\nwith open({str(answer)!r}, 'w') as file:\n    json.dump(result, file)\n"
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
        }
        # -u: a buffered sys.stdout that several threads write to loses and garbles text before
        # 3.12.4 (gh-119506)
        done = subprocess.run(
            [sys.executable, "-u", "-c", PRELUDE + body + ending],
            capture_output=True,
            timeout=120,
            env={**environment, "PYTHONIOENCODING": "utf-8"},
        )
        self.out = done.stdout.decode().replace(os.linesep, "\n")
        self.err = done.stderr.decode().replace(os.linesep, "\n")
        assert done.returncode == 0, self.err
        self.result = json.loads(answer.read_text())


def test_two_tasks_that_print_log_and_warn_at_once_have_each_its_own_lines_and_the_terminal_has_all(
    tmp_path: Path,
) -> None:
    seen = Outcome(MANY, tmp_path)
    for name, events in zip(("first", "second"), seen.result):
        by_stream = {
            stream: [text for kind, text in events if kind == stream]
            for stream in ("error", "warning", "verbose")
        }
        outputs = [text for kind, text in events if kind == "output"]
        assert outputs == [
            line for i in range(1000) for line in (f"{name} out {i}", f"{name} log {i}")
        ]
        assert by_stream["error"] == [f"{name} err {i}" for i in range(1000)]
        assert by_stream["warning"] == [
            f"<string>:{line_of('warnings.warn(')}: UserWarning: {name} warn {i}"
            for i in range(1000)
        ]
        assert by_stream["verbose"] == [] and len(events) == 4000
        assert [kind for kind, _ in events] == ["output", "error", "output", "warning"] * 1000
    assert seen.out.count("\n") == 3000
    for name in ("first", "second"):
        for i in range(1000):
            assert f"{name} out {i}" in seen.out
            assert f"{name} err {i}" in seen.err and f"{name} log {i}" in seen.err
            assert f"UserWarning: {name} warn {i}" in seen.err
    assert all(f"nobody out {i}" in seen.out for i in range(1000))


def line_of(text: str) -> int:
    return next(
        number for number, line in enumerate((PRELUDE + MANY).splitlines(), 1) if text in line
    )


# -- lines --


@terminal
def test_print_and_both_streams_come_as_lines_and_reach_the_old_streams(std: Std) -> None:
    def talk() -> None:
        print("a", 1, sep="-")
        print("oops", file=sys.stderr)
        print()
        print("two\nlines")

    assert said(talk) == [
        ("output", "a-1"),
        ("error", "oops"),
        ("output", ""),
        ("output", "two"),
        ("output", "lines"),
    ]
    assert (std.out.getvalue(), std.err.getvalue()) == ("a-1\n\ntwo\nlines\n", "oops\n")


@terminal
def test_text_is_gathered_until_its_newline_and_the_rest_comes_at_the_end(std: Std) -> None:
    assert printed("a", "b", "c\nd", "e", "\n", "", "rest") == ["abc", "de", "rest"]
    assert std.out.getvalue() == "abc\nde\nrest"


@terminal
def test_the_rest_comes_before_the_terminal_event_also_of_a_task_that_fails(std: Std) -> None:
    recorder = RecordingSink()

    def talk() -> None:
        sys.stdout.write("almost")
        raise ValueError("no")

    with Scheduler(1, sinks=[recorder], capture_output=True) as pool:
        task = pool.submit(talk)
        assert isinstance(task.exception(LONG), ValueError)
    assert [str(each.type) for each in recorder.events][-2:] == ["TaskOutput", "TaskFailed"]
    assert os.path.join("bgworker", "capture.py") not in (
        task.snapshot().invocation_info or "capture.py"
    )


@terminal
def test_the_rest_of_a_task_that_times_out_comes_and_what_it_says_later_only_passes_through(
    std: Std,
) -> None:
    recorder = RecordingSink()
    opened = threading.Event()

    def hang() -> None:
        print("connecting ...", end="")
        opened.wait(LONG)
        print("late")

    with Scheduler(1, sinks=[recorder], capture_output=True) as pool:
        task = pool.options(timeout=0.05).submit(hang)
        with pytest.raises(TaskTimedOut):
            task.result(LONG)
        opened.set()
        until(lambda: "late" in std.out.getvalue())
    assert recorder.said(task) == [("output", "connecting ...")]


@terminal
def test_carriage_returns_leave_what_stands_on_the_line_at_last(std: Std) -> None:
    assert printed("\r 10%", "\r 50%", "\r100%\n") == ["100%"]
    assert printed("10%\r", "50%\r", "100%\r\n", "windows\r\n") == ["100%", "windows"]
    assert printed("10%\r", "20%\r") == ["20%"]
    assert printed("10%\rdone", "\n") == ["done"]
    assert printed("a\r", "\n") == ["a"]
    assert printed(*(f"\r{i:5}" for i in range(100_000)), max_payload=100) == ["99999"]


@terminal
def test_very_long_lines_come_in_pieces_that_are_neither_cut_nor_refused(std: Std) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(1000))
    assert printed(text, max_payload=100) == [text[i:i + 100] for i in range(0, 1000, 100)]
    assert printed(text, "\n", "next\n", max_payload=100) == [
        *(text[i : i + 100] for i in range(0, 1000, 100)),
        "next",
    ]
    assert printed(*text, max_payload=100, oversize="reject") == [
        text[i : i + 100] for i in range(0, 1000, 100)
    ]
    assert (
        "".join(printed("é€😀\0" * 1000, max_payload=100, oversize="reject")) == "é€😀\ufffd" * 1000
    )


@terminal
def test_a_long_line_is_not_held_in_memory_until_its_newline(std: Std) -> None:
    recorder = RecordingSink()
    with Scheduler(1, sinks=[recorder], capture_output=True, max_payload=1000) as pool:
        written, end = threading.Event(), threading.Event()

        def talk() -> None:
            for _ in range(2000):
                sys.stdout.write("x" * 100)
            written.set()
            assert end.wait(LONG)

        task = pool.submit(talk)
        assert written.wait(LONG)
        assert task.streams()[-1].seq >= 190
        end.set()
    assert "".join(payload for _, payload in recorder.said(task)) == "x" * 200_000


@given(st.lists(st.text("ab\r\n", max_size=6), max_size=12))
@example(["\r"])
@example(["a\r", "\n"])
@example(["a" * 70, "\n"])
def test_however_it_is_cut_into_writes_the_same_text_comes_as_the_same_lines(
    writes: list[str],
) -> None:
    text = "".join(writes)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        lines = printed(*writes)
    *whole, rest = text.split("\n")
    expected = [visible(each) for each in whole] + ([visible(rest)] if visible(rest) else [])
    assert lines == expected and out.getvalue() == text


def visible(line: str) -> str:
    while line.endswith("\r"):
        line = line[:-1]
    return line.split("\r")[-1]


@terminal
def test_threads_that_share_a_tasks_context_mix_no_characters_inside_a_line(std: Std) -> None:
    def talk() -> None:
        def shout(letter: str) -> None:
            for _ in range(300):
                for _ in range(10):
                    print(letter, end="")
                print()

        run_all(
            [
                threading.Thread(target=contextvars.copy_context().run, args=(shout, letter))
                for letter in "abcd"
            ]
        )

    lines = [payload for _, payload in said(talk)]
    assert sorted(lines) == sorted(letter * 10 for letter in "abcd" for _ in range(300))
    assert sorted(std.out.getvalue().replace("\n", "")) == sorted("abcd" * 3000)


@terminal
def test_a_finaliser_or_a_format_that_prints_in_the_middle_loses_nothing(std: Std) -> None:
    class Loud:
        def __del__(self) -> None:
            print("finalised")

    def talk() -> None:
        for i in range(200):
            cycle: list[object] = [Loud()]
            cycle.append(cycle)
            del cycle
            if not i % 10:
                gc.collect()
            print("begun", end=" ")
            print("ended")

    text = "\n".join(payload for _, payload in said(talk))
    gc.collect()
    assert text.count("begun") == text.count("ended") == 200
    assert text.count("finalised") > 150


# -- everybody else --


@terminal
def test_threads_outside_and_tasks_without_capture_pass_straight_through(std: Std) -> None:
    recorder = RecordingSink()
    talking, done = threading.Event(), threading.Event()

    def captured() -> None:
        talking.set()
        assert done.wait(LONG)
        print("mine")

    with Scheduler(2, sinks=[recorder]) as pool:
        watched = pool.options(capture_output=True).submit(captured)
        assert talking.wait(LONG)
        assert type(sys.stdout) is Router
        bare = pool.submit(print, "not captured")
        bare.result(LONG)
        print("from outside")
        run_all([threading.Thread(target=print, args=("from a thread",))])
        done.set()
        watched.result(LONG)
    assert recorder.said(watched) == [("output", "mine")] and recorder.said(bare) == []
    assert sorted(std.out.getvalue().splitlines()) == [
        "from a thread",
        "from outside",
        "mine",
        "not captured",
    ]


@terminal
def test_a_task_without_capture_that_a_captured_one_submits_is_not_captured(std: Std) -> None:
    recorder = RecordingSink()
    with Scheduler(2, sinks=[recorder], capture_output=True) as pool:
        inner = pool.options(capture_output=False)

        def outer() -> str:
            task = inner.submit(
                lambda: (print("inner"), logging.error("inner"), warnings_shown("inner"))
            )
            task.result(LONG)
            print("outer")
            return task.id

        with pytest.warns(UserWarning, match="inner"):
            task = pool.submit(outer)
            inner_id = task.result(LONG)
    assert recorder.said(task) == [("output", "outer")] and not [each for each in recorder.events
            if getattr(each, "task_id", None) == inner_id and hasattr(each, "payload")]


def warnings_shown(text: str) -> None:
    warnings.warn(text, stacklevel=1)


@terminal
def test_capture_is_off_unless_asked_for(std: Std) -> None:
    recorder = RecordingSink()
    with Scheduler(1, sinks=[recorder]) as pool:
        task = pool.submit(lambda: (print("x"), type(sys.stdout)))
        assert task.result(LONG)[1] is io.StringIO
    assert recorder.said(task) == []


@terminal
def test_a_context_that_outlives_its_task_falls_through(std: Std) -> None:
    kept: list[contextvars.Context] = []
    streams: list[Any] = []

    def talk() -> None:
        print("during")
        kept.append(contextvars.copy_context())
        streams.append(sys.stdout)

    recorder = RecordingSink()
    with Scheduler(1, sinks=[recorder], capture_output=True) as pool:
        task = pool.submit(talk)
        task.result(LONG)
        kept[0].run(print, "after")
        kept[0].run(print, "after, through what it kept", file=streams[0])
        print("outside, through what it kept", file=streams[0])
        pool.submit(lambda: kept[0].run(print, "in another task")).result(LONG)
    assert recorder.said(task) == [("output", "during")]
    assert len(std.out.getvalue().splitlines()) == 5


class Odd:
    """A stream with little of what streams have, as IDLE's and some loggers'."""

    encoding = "odd"

    def __init__(self) -> None:
        self.texts: list[str] = []

    def write(self, text: str) -> str:
        self.texts.append(text)
        return "odd result"


def test_the_router_shows_the_old_streams_attributes_results_and_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with io.TextIOWrapper(
        open(tmp_path / "out", "wb"), encoding="latin-1", newline="", write_through=True
    ) as real:
        monkeypatch.setattr(sys, "stdout", real)

        def look() -> None:
            out: Any = sys.stdout
            assert (
                type(out) is Router
                and isinstance(out, io.TextIOWrapper)
                and isinstance(out, io.TextIOBase)
            )
            assert out.encoding == "latin-1" and out.write_through and out.fileno() == real.fileno()
            assert (
                not out.isatty()
                and out.buffer is real.buffer
                and out.errors == real.errors
                and not out.closed
            )
            assert out.write("héé\n") == 4 and out.writelines(["x", "y\n"]) is None
            assert out.buffer.write(b"bytes\n") == 6
            out.mark = "set through"
            assert real.mark == "set through"  # type: ignore[attr-defined]
            del out.mark
            assert not hasattr(real, "mark")
            with pytest.raises(AttributeError, match="TextIOWrapper.*no_such"):
                out.no_such
            with pytest.raises(TypeError):
                out.write(b"bytes")
            xml.sax.saxutils.XMLGenerator(out).characters("xml\n")
            out.reconfigure(encoding="utf-8")
            print("é", flush=True)

        assert said(look) == [
            ("output", "héé"),
            ("output", "xy"),
            ("output", "xml"),
            ("output", "é"),
        ]
    assert (tmp_path / "out").read_bytes() == b"h\xe9\xe9\nxy\nbytes\nxml\n\xc3\xa9\n"


def test_a_stream_without_fileno_or_flush_works_and_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    odd = Odd()
    monkeypatch.setattr(sys, "stdout", odd)

    def look() -> None:
        out: Any = sys.stdout
        assert out.write("x") == "odd result" and out.encoding == "odd"
        assert not hasattr(out, "fileno") and not hasattr(out, "flush")
        print("y")

    assert said(look) == [("output", "xy")]
    assert odd.texts == ["x", "y", "\n"] and below(sys.stdout) is odd


@terminal
def test_a_write_that_is_patched_on_the_stream_is_used_and_can_be_taken_back(std: Std) -> None:
    patched: list[str] = []

    def talk() -> None:
        with mock.patch.object(sys.stdout, "write", patched.append):
            print("to the patch")
        print("to the stream")

    with contextlib.redirect_stdout(Patchable()) as stream:
        assert said(talk) == [("output", "to the patch"), ("output", "to the stream")]
        with mock.patch.object(stream, "write", patched.append):
            assert said(lambda: print("below")) == [("output", "below")]
    assert stream.getvalue() == "to the stream\n" and patched == [
        "to the patch",
        "\n",
        "below",
        "\n",
    ]


class Patchable(io.StringIO):
    pass


# -- streams that are None, replaced, redirected, broken --


def test_without_a_stdout_print_still_reaches_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def talk() -> None:
        print("out", flush=True)
        print("err", file=sys.stderr)
        assert sys.stdout.write("abc") == 3 and not sys.stdout.isatty()

    assert said(talk) == [("output", "out"), ("error", "err"), ("output", "abc")]
    assert not sys.stdout.isatty() and sys.stderr.write("nowhere") == 7


@terminal
def test_a_stdout_that_is_replaced_meanwhile_is_left_alone_and_captured_from_the_next_task_on(
    std: Std,
) -> None:
    recorder, new = RecordingSink(), io.StringIO()
    begun, replaced = threading.Event(), threading.Event()

    def first() -> None:
        print("first, before")
        begun.set()
        assert replaced.wait(LONG)
        print("first, replaced")

    with Scheduler(2, sinks=[recorder], capture_output=True) as pool:
        one = pool.submit(first)
        assert begun.wait(LONG)
        sys.stdout = new
        replaced.set()
        one.result(LONG)
        assert sys.stdout is new
        two = pool.submit(print, "second")
        two.result(LONG)
        assert below(sys.stdout) is new
        sys.stdout = std.out
    assert recorder.said(one) == [("output", "first, before")] and recorder.said(two) == [
        ("output", "second")
    ]
    assert std.out.getvalue() == "first, before\n" and new.getvalue() == "first, replaced\nsecond\n"


@terminal
def test_a_tee_over_the_router_brings_no_line_twice(std: Std) -> None:
    class Tee:
        def __init__(self, *streams: Any) -> None:
            self.streams = streams

        def write(self, text: str) -> None:
            for each in self.streams:
                each.write(text)

    copy = io.StringIO()

    def talk() -> None:
        print("one")
        sys.stdout = Tee(sys.stdout, copy)  # type: ignore[assignment]
        print("two")
        inner.submit(print, "three").result(LONG)
        print("four")

    recorder = RecordingSink()
    with Scheduler(2, sinks=[recorder], capture_output=True) as pool, Scheduler(1) as second:
        inner = second.options(capture_output=True)
        task = pool.submit(talk)
        task.result(LONG)
    assert sorted(payload for _, payload in recorder.said(task)) == ["four", "one", "two"]
    assert (
        std.out.getvalue() == "one\ntwo\nthree\nfour\n" and copy.getvalue() == "two\nthree\nfour\n"
    )
    sys.stdout = std.out


@terminal
def test_a_stdout_that_is_a_logger_brings_no_line_twice(std: Std, log: logging.Logger) -> None:
    class LoggerWriter:
        def write(self, text: str) -> None:
            if text.strip():
                log.info(text)

    with contextlib.redirect_stdout(LoggerWriter()):  # type: ignore[type-var]
        assert said(lambda: print("once")) == [("output", "once")]


@terminal
def test_redirect_stdout_inside_a_task_takes_the_text_away_and_around_one_does_not(
    std: Std,
) -> None:
    def talk() -> None:
        print("before")
        with contextlib.redirect_stdout(io.StringIO()) as inner:
            print("inside")
        assert inner.getvalue() == "inside\n"
        print("after")

    with contextlib.redirect_stdout(io.StringIO()) as around:
        assert said(talk) == [("output", "before"), ("output", "after")]
    assert (
        around.getvalue() == "before\nafter\n"
        and below(sys.stdout) is std.out
        and std.out.getvalue() == ""
    )


@terminal
def test_redirects_that_cross_the_life_of_a_task_leave_the_right_stream_behind(std: Std) -> None:
    begun, end = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert end.wait(LONG)

    with Scheduler(2, capture_output=True) as pool:
        for _ in range(3):
            begun.clear()
            end.clear()
            task = pool.submit(wait)
            assert begun.wait(LONG)
            with contextlib.redirect_stdout(io.StringIO()) as target:
                # keeps our router, and puts it back
                pool.submit(print, "hello").result(LONG)
                print("redirected")
                end.set()
                task.result(LONG)
                assert below(sys.stdout) is target
            print("passed on")
    assert target.getvalue() == "hello\nredirected\n" and std.out.getvalue() == "passed on\n" * 3


@terminal
def test_stderr_that_was_made_stdout_inside_a_task_is_output_and_still_is_stdout_afterwards(
    std: Std,
) -> None:
    def talk() -> None:
        sys.stderr = sys.stdout
        print("merged", file=sys.stderr)
        sys.stderr = sys.stdout

    assert said(talk) == [("output", "merged")]
    assert below(sys.stderr) is std.out
    sys.stderr = std.err


def test_capsys_and_capfd_see_what_a_task_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(lambda: print("seen")) == [("output", "seen")]
    assert capsys.readouterr().out == "seen\n"
    with capsys.disabled():
        pass
    assert said(lambda: print("again")) == [("output", "again")]
    assert capsys.readouterr().out == "again\n"


def test_capfd_sees_what_a_task_prints(capfd: pytest.CaptureFixture[str]) -> None:
    assert said(lambda: (print("text", flush=True), os.write(1, b"bytes\n"))) == [
        ("output", "text")
    ]
    assert capfd.readouterr().out == "text\nbytes\n"


@terminal
def test_a_stream_that_fails_fails_print_as_ever_and_the_line_is_in_the_streams(std: Std) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")

    def talk() -> None:
        std.out.close()
        with pytest.raises(ValueError, match="closed file"):
            print("to a closed file")
        with pytest.raises(ValueError, match="closed file"):
            sys.stdout.write("whole line\n")
        with contextlib.redirect_stdout(ascii_only):
            pool.submit(encode).result(LONG)

    def encode() -> None:
        with pytest.raises(UnicodeEncodeError):
            print("caf\u00e9", "noir")
        print("tea")

    recorder = RecordingSink()
    with Scheduler(2, sinks=[recorder], capture_output=True) as pool:
        pool.submit(talk).result(LONG)
    texts = [each.payload for each in recorder.events if isinstance(each, StreamEvent)]
    assert texts == ["to a closed file", "whole line", "café", "tea"]
    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == b"tea\n"  # type: ignore[attr-defined]


# -- logging --


def test_each_level_has_its_stream_and_the_text_is_the_message_alone(log: logging.Logger) -> None:
    def talk() -> None:
        log.debug("debug %s", 1)
        log.info("info")
        log.warning("warning")
        log.error("error")
        log.critical("critical")
        log.log(25, "between")

    assert said(talk) == [
        ("verbose", "debug 1"),
        ("output", "info"),
        ("warning", "warning"),
        ("error", "error"),
        ("error", "critical"),
        ("output", "between"),
    ]


@terminal
def test_handlers_that_write_to_our_stderr_bring_no_line_twice(
    std: Std, log: logging.Logger
) -> None:
    def talk() -> None:
        early.emit(logging.makeLogRecord({"msg": "by hand"}))
        handler = logging.StreamHandler()  # of the router, which it will keep
        handler.setFormatter(logging.Formatter("late: %(message)s"))
        log.addHandler(handler)
        log.error("once")
        logging.getLogger("test_capture.child").warning("child")

    early = logging.StreamHandler()  # of the old stderr
    log.addHandler(early)
    assert said(talk) == [("error", "once"), ("warning", "child")]
    assert std.err.getvalue() == "by hand\nonce\nlate: once\nchild\nlate: child\n"
    log.error("after the task")
    assert std.err.getvalue().endswith("after the task\nlate: after the task\n")


def test_loggers_that_do_not_propagate_are_captured_and_what_is_filtered_out_is_not(
    log: logging.Logger,
) -> None:
    log.propagate = False
    log.setLevel(logging.INFO)
    log.addFilter(lambda record: "secret" not in record.msg)

    def talk() -> None:
        log.debug("below the level")
        log.info("kept")
        log.info("secret")
        log.disabled = True
        log.error("disabled")
        log.disabled = False
        logging.getLogger("test_capture.child").debug("below the inherited level")
        log.handle(logging.makeLogRecord({"msg": "handled", "levelno": logging.ERROR}))

    assert said(talk) == [("output", "kept"), ("error", "handled")]


def test_the_traceback_and_the_stack_of_a_record_are_in_the_text(log: logging.Logger) -> None:
    def talk() -> None:
        try:
            raise KeyError("lost")
        except KeyError:
            log.exception("it %s", "failed")
        log.warning("here", stack_info=True)
        log.error("nothing", exc_info=True)
        log.handle(
            logging.makeLogRecord({"msg": "sent", "levelno": 40, "exc_text": "its traceback"})
        )

    (_, failed), (_, here), (_, nothing), (_, sent) = said(talk)
    assert failed.startswith("it failed\nTraceback (most recent call last):\n") and failed.endswith(
        "\nKeyError: 'lost'"
    )
    assert here.startswith("here\nStack (most recent call last):") and "in talk" in here
    assert nothing == "nothing\nNoneType: None" and sent == "sent\nits traceback"


@terminal
def test_a_record_whose_arguments_do_not_fit_comes_as_it_is_and_the_handlers_complain_as_ever(
        std: Std, log: logging.Logger) -> None:
    log.propagate = False
    log.addHandler(logging.StreamHandler(std.err))
    assert said(lambda: log.error("%d apples", "many")) == [("error", "%d apples")]
    assert "--- Logging error ---" in std.err.getvalue() and "%d apples" in std.err.getvalue()


def test_a_handler_that_raises_raises_as_ever(log: logging.Logger) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("disk full")

    log.addHandler(Broken())

    def talk() -> None:
        with pytest.raises(OSError, match="disk full"):
            log.error("text")
        print("goes on")

    assert said(talk) == [("error", "text"), ("output", "goes on")]


def test_without_any_handler_the_last_resort_still_writes_and_basic_config_still_works(
    tmp_path: Path,
) -> None:
    seen = Outcome("""
import logging
def talk():
    logging.getLogger("a").info("no level for it")
    logging.getLogger("a").warning("last resort")
    logging.getLogger("b").setLevel(10)
    logging.getLogger("b").debug("for no handler")
    assert not logging.root.handlers
    logging.basicConfig(format="[%(message)s]")
    logging.getLogger("a").error("configured")
result = said(talk)
logging.error("outside")
""", tmp_path)
    assert seen.result == [
        ["warning", "last resort"],
        ["verbose", "for no handler"],
        ["error", "configured"],
    ]
    assert seen.err == "last resort\n[configured]\n[outside]\n"


def test_the_librarys_own_logger_and_a_handler_that_emits_to_the_task_end_in_no_loop(
    log: logging.Logger,
) -> None:
    class ToTask(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            current_task().verbose(f"handler: {record.getMessage()}")
            log.debug("from the handler") if record.levelno > logging.DEBUG else None

    log.addHandler(ToTask())

    def talk() -> None:
        logging.getLogger("bgworker").warning("own")
        log.info("text")

    assert said(talk) == [("warning", "own"), ("output", "text"), ("verbose", "handler: text"),
                          ("verbose", "handler: from the handler")]


def test_a_wrapper_that_somebody_puts_around_call_handlers_meanwhile_stays(
    log: logging.Logger,
) -> None:
    original: Any = logging.Logger.callHandlers
    seen = []

    def talk() -> None:
        below = logging.Logger.callHandlers

        def wrapper(self: logging.Logger, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())
            below(self, record)

        logging.Logger.callHandlers = wrapper  # type: ignore[method-assign]
        log.info("wrapped")

    try:
        assert said(talk) == [("output", "wrapped")]
        assert said(lambda: log.info("once more")) == [("output", "once more")]
        log.info("outside")
    finally:
        logging.Logger.callHandlers = original  # type: ignore[method-assign]
    assert seen == ["wrapped", "once more", "outside"]


# -- warnings --


def test_a_warning_comes_once_and_goes_where_it_went(tmp_path: Path) -> None:
    seen = Outcome("""
import warnings
def talk():
    for _ in range(3):
        warnings.warn("once per place", stacklevel=1)
    warnings.warn("ignored", DeprecationWarning, stacklevel=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            warnings.warn("raised")
        except UserWarning:
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("always", RuntimeWarning)
result = said(talk)
assert warnings.showwarning is warnings._showwarning_orig
warnings.warn("outside")
""", tmp_path)
    assert [(stream, text.split(": ", 1)[1]) for stream, text in seen.result] == [
        ("warning", "UserWarning: once per place"), ("warning", "RuntimeWarning: always")]
    assert (
        seen.err.count("UserWarning: once per place") == 1
        and seen.err.count("RuntimeWarning: always") == 1
    )
    assert (
        seen.err.count("UserWarning: outside") == 1
        and "ignored" not in seen.err
        and "raised" not in seen.err
    )


def test_warnings_that_go_to_logging_come_once(tmp_path: Path) -> None:
    seen = Outcome("""
import logging, warnings
logging.basicConfig(format="[%(name)s]")
logging.captureWarnings(True)
result = said(lambda: warnings.warn("text"))
""", tmp_path)
    assert [(stream, text.split(": ", 1)[1]) for stream, text in seen.result] == [
        ("warning", "UserWarning: text")
    ]
    assert seen.err == "[py.warnings]\n"


def test_a_replaced_showwarning_is_called_with_everything_and_what_is_recorded_is_recorded(
        monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown: list[Any] = []
        monkeypatch.setattr(warnings, "showwarning", lambda *args, **kwargs: shown.append(args[:2]))
        (stream, text), = said(lambda: warnings.warn("text", stacklevel=1))
    assert stream == "warning" and text.endswith(": UserWarning: text")
    assert [(str(message), category) for message, category in shown] == [("text", UserWarning)]
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        assert len(said(lambda: warnings.warn("other"))) == 1
    assert [str(each.message) for each in recorded] == ["other"]


def test_catch_warnings_that_crosses_the_life_of_a_task_restores_what_was_there() -> None:
    original = below(vars(warnings)["_showwarnmsg"]), warnings.showwarning
    begun, end = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert end.wait(LONG)
        warnings.warn("from the task")

    recorder = RecordingSink()
    with Scheduler(1, sinks=[recorder], capture_output=True) as pool:
        with warnings.catch_warnings(record=True) as before:
            warnings.simplefilter("always")
            task = pool.submit(wait)
            assert begun.wait(LONG)
        with warnings.catch_warnings(record=True) as during:
            warnings.simplefilter("always")
            warnings.warn("from outside")
            end.set()
            task.result(LONG)
    heard = [[str(each.message) for each in each_list] for each_list in (before, during)]
    if getattr(sys.flags, "context_aware_warnings", False):
        assert heard == [["from the task"], ["from outside"]], "its context is that of the submit"
    else:
        assert heard == [[], ["from outside", "from the task"]]
    assert len(recorder.said(task)) == 1
    assert (below(vars(warnings)["_showwarnmsg"]), warnings.showwarning) == original


# -- coming and going --


@terminal
def test_the_places_are_taken_with_the_first_task_and_then_only_hand_down(std: Std) -> None:
    with Scheduler(3, capture_output=True) as pool:
        assert sys.stdout is std.out
        pool.submit(int).result(LONG)
        router = sys.stdout
        assert type(router) is Router and below(router) is std.out
        pool.submit(int).result(LONG)
        assert sys.stdout is router
    print("passed on")
    assert std.out.getvalue() == "passed on\n"


def test_no_stream_is_let_go_under_the_lock_of_capture() -> None:
    asked: list[bool] = []

    class Stream(io.StringIO):
        def __del__(self) -> None:
            asking = threading.Thread(target=pool.submit(int).result)
            asking.start()
            asking.join(LONG if all(asked) else 0)
            asked.append(not asking.is_alive())

    with Scheduler(2, capture_output=True) as pool:
        for _ in range(40):
            with contextlib.redirect_stdout(Stream()):
                pool.submit(int).result(LONG)
            gc.collect()
    assert len(asked) == 40 and all(asked)


@terminal
def test_many_short_tasks_that_overlap_lose_no_line(std: Std) -> None:
    recorder = RecordingSink()
    with Scheduler(4, sinks=[recorder], capture_output=True) as pool:
        tasks = [pool.submit(print, f"{i}\n", end="") for i in range(500)]
        for task in tasks:
            task.result(LONG)
    assert [recorder.said(task) for task in tasks] == [[("output", str(i))] for i in range(500)]
    assert sorted(std.out.getvalue().split(), key=int) == [str(i) for i in range(500)]


FLICKER = """
import threading
sys.setswitchinterval(1e-5)
is_over = False

def outside():
    while not is_over:
        print("x", "y", "z", end=" ")

threads = [threading.Thread(target=outside) for _ in range(2)]
for thread in threads:
    thread.start()
kept = set()
with Scheduler(1, sinks=[recorder], capture_output=True) as pool:
    for i in range(400):
        task = pool.submit(lambda: (print("a"), kept.add(id(sys.stdout))))
        task.result(60)
is_over = True
for thread in threads:
    thread.join(60)
result = [len(recorder.events), len(kept)]
"""


def test_a_router_that_comes_and_goes_while_other_threads_print_does_not_crash_the_interpreter(
    tmp_path: Path,
) -> None:
    assert Outcome(FLICKER, tmp_path).result == [2000, 1]


TWO_COPIES = """
import importlib, logging, shutil, threading, warnings
shutil.copytree(bgworker.__path__[0], FOLDER + "/_bg", ignore=shutil.ignore_patterns("__pycache__"))
sys.path.insert(0, FOLDER)
import _bg
warnings.simplefilter("always")
real = sys.stdout
original = vars(logging.Logger)["callHandlers"], vars(warnings)["_showwarnmsg"]

def talk(name):
    print(name + "\\n", end="")
    logging.error(name)
    warnings.warn(name)

def nested():
    talk("outer")
    theirs.submit(talk, "inner").result(30)
    talk("outer again")

def depth():
    found, steps = sys.stdout, 0
    while hasattr(type(found), "bgworker_below"):
        found, steps = found.bgworker_below, steps + 1
    return steps

def tag(events):
    return [(stream, text.rpartition(": ")[2]) for stream, text in events]

def cross(gates):
    gates[0].set()
    assert gates[1].wait(30)
    return depth()

recorders = Recorder(), Recorder()
with bgworker.Scheduler(2, sinks=[recorders[0]], capture_output=True) as ours, \\
        _bg.Scheduler(2, sinks=[recorders[1]], capture_output=True) as theirs:
    task = ours.submit(nested)
    task.result(30)
    depths, last, previous = [], None, None
    for i in range(60):  # each task begins while one of the other copy runs
        gates = threading.Event(), threading.Event()
        current = (ours, theirs)[i % 2].submit(cross, gates)
        assert gates[0].wait(30)
        if previous:
            previous[1].set()
            depths.append(last.result(30))
        previous, last = gates, current
    previous[1].set()
    last.result(30)
    both = ours.submit(talk, "a"), theirs.submit(talk, "b")
    for each in both:
        each.result(30)
own, *said = [tag(recorders[n].said(each)) for n, each in ((0, task), (0, both[0]), (1, both[1]))]
result = [own, max(depths), *said]
print("the end")
"""


def test_two_copies_of_the_package_capture_each_its_own_tasks_and_do_not_pile_up(
    tmp_path: Path,
) -> None:
    seen = Outcome(f"FOLDER = {str(tmp_path)!r}\n" + TWO_COPIES, tmp_path)
    nested, depth, ours, theirs = seen.result
    assert depth <= 2
    assert [text for _, text in ours] == ["a"] * 3 and [text for _, text in theirs] == ["b"] * 3
    assert (
        sorted(stream for stream, _ in ours)
        == sorted(stream for stream, _ in theirs)
        == ["error", "output", "warning"]
    )
    assert [text for _, text in nested if text != "inner"] == ["outer"] * 3 + ["outer again"] * 3
    assert sorted(seen.out.splitlines()) == ["a", "b", "inner", "outer", "outer again", "the end"]
    for word in ("outer again", "inner", "a", "b"):
        assert (
            seen.err.count(f"ERROR:root:{word}\n") == 1
            and seen.err.count(f"UserWarning: {word}\n") == 1
        )


FORK = """
import logging, os, threading, warnings
warnings.filterwarnings("ignore", ".*multi-threaded.*")

def in_child(body):
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writing, json.dumps(body()).encode())
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = json.loads(pipe.read() or b"null")
    os.waitpid(pid, 0)
    return answer

real = sys.stdout

def look():
    print("child text\\n", end="")  # in one write: the parent may print at this moment
    with bgworker.Scheduler(1, sinks=[Recorder()], capture_output=True) as pool:
        task = pool.submit(lambda: (
            print("task in child\\n", end=""), logging.getLogger("x").warning("logged")))
        task.wait(20)
        return [(str(each.stream_type), each.payload) for each in task.streams()]

def forks():
    print("before")
    answer = in_child(look)
    print("after")
    return answer

with Scheduler(2, sinks=[recorder], capture_output=True) as pool:
    task = pool.submit(forks)
    of_task = task.result(60)
    gate = threading.Event()
    said_so = threading.Event()
    busy = pool.submit(lambda: (print("busy"), said_so.set(), gate.wait(60), print("done")))
    assert said_so.wait(60) and type(sys.stdout) is not type(real)
    of_main = in_child(look)
    gate.set()
    busy.result(60)
result = [of_task, of_main, recorder.said(task), recorder.said(busy)]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_captures_nothing_of_its_parents_tasks_and_all_of_its_own(
    tmp_path: Path,
) -> None:
    seen = Outcome(FORK, tmp_path)
    of_task, of_main, forking, busy = seen.result
    own = [["output", "task in child"], ["warning", "logged"]]
    assert of_task == of_main == own
    assert forking == [["output", "before"], ["output", "after"]] and busy == [
        ["output", "busy"],
        ["output", "done"],
    ]
    assert seen.out.count("child text\n") == seen.out.count("task in child\n") == 2


# -- what stands in for a stream --


class Lines(io.StringIO):
    """A stream with all that Python asks of a type: equality, truth, iteration, a text of its
    own."""

    def __repr__(self) -> str:
        return "<Lines>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lines) and other.getvalue() == self.getvalue()

    def __hash__(self) -> int:
        return 7

    def __bool__(self) -> bool:
        return False


def test_what_stands_in_for_a_stream_allows_all_that_the_stream_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Lines("one\ntwo\n")
    monkeypatch.setattr(sys, "stdout", stream)

    def look() -> list[object]:
        found = sys.stdout
        assert type(found) is not Lines, "nothing stands in for it"
        locks = weakref.WeakKeyDictionary({found: "lock"})  # as structlog has it
        assert weakref.ref(found)() is found and locks[found] == "lock"
        assert found == stream and stream == found and found == found
        return [
            repr(found),
            hash(found),
            bool(found),
            sorted(dir(found)) == sorted(dir(stream)),
            next(found),
            list(found),
        ]

    with Scheduler(1, capture_output=True) as pool:
        assert pool.submit(look).result(LONG) == ["<Lines>", 7, False, True, "one\n", ["two\n"]]


# -- the tests' own tools --


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()

"""The inside of a running task: what it says becomes events, whatever it is; when it is asked to
stop, it learns so at once."""

from __future__ import annotations

import contextvars
import json
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any
from unittest.mock import MagicMock

import pytest

from bgworker import (
    Scheduler,
    StreamEvent,
    StreamType,
    TaskCancelled,
    TaskContext,
    checkpoint,
    current_task,
)
from bgworker.testing import MemorySink

LONG = 30.0


def said(function: Callable[[TaskContext], object], **settings: Any) -> list[StreamEvent]:
    """Return what a task that calls ``function`` with its context says."""
    sink = MemorySink()
    with Scheduler(1, sinks=[sink], **settings) as pool:
        pool.submit(lambda: function(current_task())).result(LONG)
    return [each for each in sink.events if isinstance(each, StreamEvent)]


def the_one_said(value: object, **settings: Any) -> StreamEvent:
    events = said(lambda context: context.output(value), **settings)
    assert len(events) == 1
    return events[0]


# -- output, error, warning, verbose --


@pytest.mark.parametrize("stream", ["output", "error", "warning", "verbose"])
def test_each_stream_has_its_method_and_takes_text_and_json(stream: str) -> None:
    def talk(context: TaskContext) -> None:
        getattr(context, stream)("text")
        getattr(context, stream)({"json": [1, None]})

    text, value = said(talk)
    assert text.type == f"Task{stream.capitalize()}" and text.stream_type is StreamType(stream)
    assert (text.payload, text.format, text.truncated, text.original_bytes) == (
        "text",
        "text",
        False,
        0,
    )
    assert (value.payload, value.format) == ('{"json":[1,null]}', "json")


class Shout(str):
    def __str__(self) -> str:
        return "SHOUT"


class Colour(str, Enum):
    RED = "red"

    def __str__(self) -> str:
        return self.value


class Explosive:
    def __str__(self) -> str:
        raise ValueError("boom")


@pytest.mark.parametrize(
    ("value", "payload"),
    [
        ("", ""),
        ("\n", "\n"),
        (Shout("quiet"), "SHOUT"),
        (Colour.RED, "red"),
        (b"caf\xc3\xa9", "café"),
        (Fraction(1, 3), "1/3"),
        (Explosive(), "<unprintable Explosive object>"),
        ("a\0b", "a�b"),
        ("half \ud83d pair", "half � pair"),
        pytest.param("x" * 5000, "x" * 5000, id="long"),
    ],
)
def test_text_and_odd_objects_are_said_as_clean_text(value: object, payload: str) -> None:
    event = the_one_said(value)
    assert (event.payload, event.format, event.truncated) == (payload, "text", False)
    assert type(event.payload) is str


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (None, None),
        (True, True),
        (0, 0),
        (1.5, 1.5),
        ([], []),
        ({}, {}),
        ((1, 2), [1, 2]),
        (math.nan, None),
        (math.inf, None),
        ([math.nan, {"a": -math.inf}], [None, {"a": None}]),
        ({1: "a", None: "b"}, {"1": "a", "null": "b"}),
        ({"set": {1}}, {"set": [1]}),
        ({"odd": Explosive()}, {"odd": "<unprintable Explosive object>"}),
        ("é", "é"),
        ([["nul\0"]], [["nul�"]]),
    ],
)
def test_json_values_are_said_as_json(value: object, meaning: object) -> None:
    event = the_one_said([value])
    assert event.format == "json" and json.loads(event.payload) == [meaning]


def test_values_are_said_as_they_are_now_not_as_they_become() -> None:
    def talk(context: TaskContext) -> None:
        growing = [1]
        context.output(growing)
        growing.append(2)

    assert [each.payload for each in said(talk)] == ["[1]"]


def test_a_value_that_contains_itself_is_said_somehow() -> None:
    endless: list[object] = []
    endless.append(endless)
    event = the_one_said(endless)
    assert event.format == "json" and "unprintable list" in event.payload


def test_a_stand_in_that_passes_for_a_string_is_said_as_text_and_not_itself() -> None:
    event = the_one_said(MagicMock(spec=str, __len__=lambda self: 3))
    assert type(event.payload) is str and "MagicMock" in event.payload


def raising(error: BaseException) -> Callable[..., Any]:
    def method(*_: object) -> Any:
        raise error

    return method


SPOKEN = (
    "__str__",
    "__repr__",
    "__float__",
    "__index__",
    "__len__",
    "__iter__",
    "__eq__",
    "__mul__",
    "__rmul__",
    "__truediv__",
    "__rtruediv__",
    "__getattribute__",
    "__bool__",
    "__hash__",
    "__format__",
)


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        SystemExit(),
        KeyboardInterrupt(),
        GeneratorExit(),
        TaskCancelled(),
        RecursionError(),
        Warning(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("base", [object, str, int, float, dict, list, tuple, bytes, Exception])
def test_what_a_task_says_raises_nothing_whatever_the_value_does(
    error: BaseException, base: type
) -> None:
    kind = type(
        "Odd",
        (base,),
        {**dict.fromkeys(SPOKEN, raising(error)), "__class__": property(raising(error))},
    )

    def talk(context: TaskContext) -> None:
        odd = kind()
        for say in (context.output, context.error, context.warning, context.verbose):
            say(odd)
            say([odd])
            say({"k": (odd,)})
        context.progress(odd)
        context.progress(1, odd, odd)

    events = said(talk, progress_interval=0)
    assert len(events) == 14
    assert all(type(each.payload) is type(each.message) is str for each in events)
    assert {type(each.percent) for each in events[-2:]} <= {float, type(None)}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a" * 64, "a" * 64),
        ("é" * 32, "é" * 32),
        ("€" * 21 + "a", "€" * 21 + "a"),
        ("😀" * 16, "😀" * 16),
    ],
)
def test_text_of_exactly_max_payload_bytes_is_left_alone(text: str, left: str) -> None:
    event = the_one_said(text, max_payload=64)
    assert (event.payload, event.truncated, event.original_bytes) == (left, False, 0)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a" * 65, "a" * 64),
        ("a" + "é" * 32, "a" + "é" * 31),
        ("€" * 22, "€" * 21),
        ("a" + "😀" * 16, "a" + "😀" * 15),
        ("\0" * 64, "�" * 21),
    ],
)
def test_oversize_text_is_cut_between_two_characters_and_marked(text: str, left: str) -> None:
    event = the_one_said(text, max_payload=64)
    assert (event.payload, event.truncated) == (left, True)
    assert event.original_bytes == len(text.replace("\0", "�").encode())


def test_oversize_json_gives_way_to_json_that_says_so_and_shows_its_beginning() -> None:
    event = the_one_said(["é" * 100], max_payload=64)
    assert (event.format, event.truncated, event.original_bytes) == ("json", True, 604)
    assert (
        json.loads(event.payload) == {"truncated": 604, "head": '["' + "\\u00e9" * 4 + "\\u00e"}
        and len(event.payload) <= 64
    )


def test_oversize_events_can_be_refused_and_are_counted_as_dropped() -> None:
    sink = MemorySink()
    with Scheduler(1, sinks=[sink], max_payload=64, oversize="reject") as pool:
        def talk() -> None:
            current_task().output("x" * 65)
            current_task().error([0] * 65)
            current_task().output("y" * 64)

        task = pool.submit(talk)
        task.result(LONG)
    health = pool.sinks["memory"]
    assert [each.payload for each in sink.events if isinstance(each, StreamEvent)] == ["y" * 64]
    assert health.dropped_by_reason["oversize"] == 2
    assert [each.seq for each in sink.events if getattr(each, "task_id", None) == task.id] == [
        1,
        2,
        3,
        4,
        5,
    ]


# -- progress --


class Scalar:
    """A number as an array library has it: its arithmetic warns where Python's raises."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __float__(self) -> float:
        return float(self.value)

    def __rmul__(self, factor: float) -> Scalar:
        return Scalar(self.value * factor)

    def __truediv__(self, other: Any) -> float:
        if not float(other):
            warnings.warn("divide by zero", RuntimeWarning)
            return math.inf
        return self.value / float(other)


def report(context: TaskContext, *percents: float | None, total: float | None = 100) -> None:
    for percent in percents:
        context.progress(percent or 0.0, total, f"at {percent}")


def percents(events: list[StreamEvent]) -> list[float | None]:
    return [each.percent for each in events]


def test_the_first_progress_is_sent_then_only_steps_and_the_latest_before_the_end() -> None:
    events = said(
        lambda context: report(context, 0, 1, 9, 9.5, 10, 15, 19, 25, 26, 27),
        progress_interval=1000.0,
        progress_step=10.0,
    )
    assert percents(events) == [0, 10, 25, 27]
    assert [each.message for each in events] == ["at 0", "at 10", "at 25", "at 27"]
    assert all(each.stream_type is StreamType.PROGRESS and each.payload == "" for each in events)


def test_progress_that_moves_back_is_a_step_too() -> None:
    assert percents(
        said(lambda context: report(context, 50, 49.5, 20), progress_interval=1000.0)
    ) == [50, 20]


def test_after_the_interval_any_progress_is_sent() -> None:
    def work(context: TaskContext) -> None:
        report(context, 1, 1.1)
        time.sleep(0.06)
        report(context, 1.2)

    assert percents(said(work, progress_interval=0.05)) == [1, 1.2]


def test_without_an_interval_every_progress_is_sent() -> None:
    assert percents(said(lambda context: report(context, 1, 1, 1), progress_interval=0.0)) == [
        1,
        1,
        1,
    ]


def test_progress_that_was_held_back_is_not_sent_again_once_newer_was_sent() -> None:
    assert percents(said(lambda context: report(context, 1, 1.5, 3), progress_interval=1000.0)) == [
        1,
        3,
    ]


@pytest.mark.parametrize(
    ("completed", "total", "percent"),
    [
        (1, 4, 25.0),
        (-5, 100, 0.0),
        (500, 100, 100.0),
        (5, None, None),
        (5, 0, None),
        (math.nan, 100, None),
        (1, math.nan, None),
        (math.inf, 100, 100.0),
        (1, math.inf, 0.0),
        (math.inf, math.inf, None),
        (True, 2, 50.0),
        (Fraction(1, 8), 1, 12.5),
        pytest.param(10**400, 10**401, None, id="huge"),
        (Decimal(1), Decimal(8), 12.5),
        (Fraction(1, 8), Decimal(1), 12.5),
        (Scalar(3), Scalar(0), None),
        (Scalar(3), Scalar(4), 75.0),
        (3, Scalar(4), 75.0),
        (Decimal("sNaN"), 1, None),
        ("1", 2, None),
        (1, "2", None),
        (None, 2, None),
        (1j, 2, None),
        ([1], 2, None),
        (Scalar("x"), 2, None),
        (2, Scalar(None), None),
    ],
)
def test_percent_is_clamped_and_none_when_unknown(
    completed: float, total: float | None, percent: float | None
) -> None:
    event, = said(lambda context: context.progress(completed, total))
    assert event.percent == percent and type(event.percent) in (float, type(None))


def test_progress_of_unknown_size_is_rate_limited_too_and_its_latest_message_is_sent() -> None:
    events = said(lambda context: report(context, 1, 2, 3, total=None), progress_interval=1000.0)
    assert [(each.percent, each.message) for each in events] == [(None, "at 1"), (None, "at 3")]


def test_a_progress_message_is_made_clean_text_and_bounded() -> None:
    events = said(lambda context: context.progress(1, message="\0" + "x" * 100), max_payload=64)
    assert events[0].message == "�" + "x" * 61


def test_the_snapshot_after_the_end_has_the_latest_progress_even_if_it_was_held_back(
    pool: Scheduler,
) -> None:
    task = pool.submit(lambda: report(current_task(), 10, 10.1))
    task.result(LONG)
    snapshot = pool.get(task.id)
    assert (snapshot.last_progress_percent, snapshot.last_progress_message) == (10.1, "at 10.1")


def test_latest_progress_comes_before_the_end_of_failed_cancelled_and_timed_out_tasks() -> None:
    for end in ("fail", "cancel", "time out"):
        sink, gate = MemorySink(), threading.Event()

        def work() -> None:
            report(current_task(), 10, 10.5)
            if end == "fail":
                raise ValueError
            if end == "cancel":
                raise TaskCancelled("enough")
            gate.wait(LONG)

        with Scheduler(1, sinks=[sink], progress_interval=1000.0) as pool:
            task = pool.options(timeout=0.1 if end == "time out" else None).submit(work)
            assert task.wait(LONG)
            gate.set()
        assert [getattr(each, "percent", "no stream") for each in sink.events][-3:] == [
            10,
            10.5,
            "no stream",
        ]


# -- being asked to stop --


def test_sleep_wakes_at_once_with_the_reason_when_the_task_is_cancelled(pool: Scheduler) -> None:
    asleep, caught = threading.Event(), []

    def work() -> None:
        asleep.set()
        try:
            current_task().sleep(100_000)
        except TaskCancelled as stop:
            caught.append(
                (
                    stop.reason,
                    str(stop),
                    current_task().cancel_requested,
                    current_task().cancel_reason,
                )
            )
            raise

    task = pool.submit(work)
    assert asleep.wait(LONG)
    task.cancel("lunch")
    assert task.wait(LONG) and task.cancelled() and caught == [("lunch", "lunch", True, "lunch")]


def test_sleep_does_not_begin_when_the_task_was_asked_to_stop_before(pool: Scheduler) -> None:
    entered, cancelled = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        assert cancelled.wait(LONG)
        current_task().sleep(100_000)

    task = pool.submit(work)
    assert entered.wait(LONG)
    task.cancel()
    cancelled.set()
    assert task.wait(LONG) and task.cancelled()


def test_sleep_sleeps_and_a_task_that_nobody_stops_goes_on(pool: Scheduler) -> None:
    def work() -> float:
        start = time.monotonic()
        current_task().sleep(0.05)
        checkpoint()
        current_task().sleep(0)
        return time.monotonic() - start

    assert pool.submit(work).result(LONG) >= 0.04


def test_several_threads_of_a_task_sleep_and_all_wake(pool: Scheduler) -> None:
    ready, woken = threading.Barrier(4), []

    def work() -> None:
        def nap() -> None:
            ready.wait(LONG)
            try:
                current_task().sleep(100_000)
            except TaskCancelled as stop:
                woken.append(stop.reason)

        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(nap,)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)

    task = pool.submit(work)
    ready.wait(LONG)
    task.cancel("all of you")
    assert task.wait(LONG) and woken == ["all of you"] * 3


def test_the_timeout_is_a_reason_to_stop_and_wakes_a_sleeper(pool: Scheduler) -> None:
    reasons: list[str | None] = []
    done = threading.Event()

    def work() -> None:
        try:
            current_task().sleep(100_000)
        except TaskCancelled as stop:
            reasons.append(stop.reason)
            done.set()
            raise

    task = pool.options(timeout=0.05).submit(work)
    assert task.wait(LONG) and done.wait(LONG) and reasons == ["timeout"]
    assert not task.cancelled()


def test_time_remaining_falls_from_the_timeout_to_zero_and_not_below(pool: Scheduler) -> None:
    seen: list[float | None] = []
    done = threading.Event()

    def work() -> None:
        context = current_task()
        seen.append(context.time_remaining)
        while context.time_remaining:
            time.sleep(0.005)
        seen.append(context.time_remaining)
        done.set()

    task = pool.options(timeout=0.1).submit(work)
    assert task.wait(LONG) and done.wait(LONG)
    assert seen[0] is not None and 0 < seen[0] <= 0.1 and seen[1] == 0.0
    assert pool.submit(lambda: current_task().time_remaining).result(LONG) is None


def test_what_wakes_a_task_is_called_once_on_the_thread_that_cancels(pool: Scheduler) -> None:
    threads: list[threading.Thread] = []
    waiting, let_go = threading.Event(), threading.Event()

    def work() -> None:
        context = current_task()
        with context._woken_by(lambda: threads.append(threading.current_thread())):
            waiting.set()
            assert let_go.wait(LONG)

    task = pool.submit(work)
    assert waiting.wait(LONG)
    task.cancel("one")
    task.cancel("two")
    assert threads == [threading.current_thread()]
    let_go.set()
    assert task.wait(LONG)


def test_two_that_wait_in_one_task_are_both_woken_also_when_it_was_asked_before_and_not_afterwards(
    pool: Scheduler,
) -> None:
    woken: list[str] = []
    waiting, asked = threading.Event(), threading.Event()

    def work() -> None:
        context = current_task()
        with context._woken_by(lambda: woken.append("gone")):
            pass
        with context._woken_by(lambda: woken.append("outer")):
            with context._woken_by(lambda: woken.append("inner")):
                waiting.set()
                assert asked.wait(LONG)
            with context._woken_by(lambda: woken.append("late")):
                pass

    task = pool.submit(work)
    assert waiting.wait(LONG)
    task.cancel()
    asked.set()
    assert task.wait(LONG) and woken == ["outer", "inner", "late"]


# -- who it is --


def test_a_task_knows_its_id_its_name_and_its_metadata(pool: Scheduler) -> None:
    def look() -> tuple[str, str, dict[str, Any]]:
        current = current_task()
        return current.id, current.name, dict(current.metadata)

    given = {"job": 7, "tags": ["a", ("b",)]}
    task = pool.options(name="look", metadata=given).submit(look)
    assert task.result(LONG) == (task.id, "look", {"job": 7, "tags": ["a", ["b"]]})
    assert pool.submit(look).result(LONG)[2] == {}


def test_metadata_is_copied_when_the_options_are_made_and_cannot_be_written(
    pool: Scheduler,
) -> None:
    given = {"job": 1}
    options = pool.options(metadata=given)
    given["job"] = 2

    def write() -> None:
        current_task().metadata["job"] = 3  # type: ignore[index]

    task = options.submit(write)
    assert isinstance(task.exception(LONG), TypeError)
    assert dict(task.snapshot().metadata) == {"job": 1}


def test_helper_threads_speak_for_the_task_when_they_have_its_context_and_are_bare_without() -> (
    None
):
    def work(context: TaskContext) -> None:
        found = []

        def speak() -> None:
            found.append(current_task())
            current_task().output("from the side")

        copied = contextvars.copy_context()
        for thread in (
            threading.Thread(target=copied.run, args=(speak,)),
            threading.Thread(target=speak),
        ):
            thread.start()
            thread.join(LONG)
        assert found[0] is context and (found[1] is context) == inherits

    inherits = bool(getattr(sys.flags, "thread_inherit_context", False))
    assert [each.payload for each in said(work)] == ["from the side"] * (1 + inherits)


def test_a_task_submitted_by_a_task_is_its_own(pool: Scheduler) -> None:
    def outer() -> tuple[str, str]:
        inner = pool.submit(lambda: current_task().id)
        assert inner.result(LONG) == inner.id
        return current_task().id, inner.id

    task = pool.submit(outer)
    assert task.result(LONG)[0] == task.id != task.result(LONG)[1]


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def test_context_variables_are_those_of_the_submit_and_changes_stay_in_the_task() -> None:
    with Scheduler(1) as pool:
        def read_and_write() -> str:
            before = variable.get()
            variable.set("written by a task")
            return before

        token = variable.set("at submit")
        first, second = pool.submit(read_and_write), pool.submit(read_and_write)
        variable.reset(token)
        third = pool.submit(read_and_write)
        assert [each.result(LONG) for each in (first, second, third)] == [
            "at submit",
            "at submit",
            "unset",
        ]
        assert variable.get() == "unset"


# -- outside a task --


def test_outside_a_task_the_context_does_nothing_and_stops_nobody() -> None:
    bare = current_task()
    assert (
        bare.id,
        bare.name,
        dict(bare.metadata),
        bare.cancel_requested,
        bare.cancel_reason,
        bare.time_remaining,
    ) == ("", "", {}, False, None, None)
    for say in (bare.output, bare.error, bare.warning, bare.verbose):
        for value in ("x", {"a": 1}, Explosive(), "x" * 100_000):
            say(value)
    bare.progress(50, 100, "half")
    checkpoint()
    bare.checkpoint()
    start = time.monotonic()
    bare.sleep(0.02)
    assert time.monotonic() - start >= 0.015
    assert current_task() is bare and "outside" in repr(bare)


def test_the_current_task_is_gone_when_the_task_has_ended_and_its_leftover_context_is_harmless(
    pool: Scheduler,
) -> None:
    task = pool.submit(current_task)
    left = task.result(LONG)
    pool.flush(LONG)
    left.output("too late")
    left.progress(99)
    assert left.id == task.id and task.streams() == []
    assert current_task().id == ""

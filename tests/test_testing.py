"""What we give others for their tests: it must find what is broken, and only that."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bgworker import (
    Event,
    EventType,
    HookSink,
    PermanentSinkError,
    Scheduler,
    SinkOptions,
    TemporarySinkError,
    current_task,
)
from bgworker.testing import (
    FlakySink,
    Hang,
    MemorySink,
    Step,
    check_sink,
    crawl,
    fail,
    partial,
    work,
)
from bgworker.testing import _sample  # the events that sinks are checked with
from bgworker.model import records

SOON = 30.0
EVENTS: list[Event] = [records.event(record) for record in _sample()[1][1]]


# -- MemorySink --


def test_a_memory_sink_keeps_events_in_order_and_by_batch() -> None:
    sink = MemorySink()
    sink.write(EVENTS[:2])
    sink.write(EVENTS[2:3])
    assert sink.events == EVENTS[:3]
    assert sink.batches == [EVENTS[:2], EVENTS[2:3]]
    sink.events.clear()
    sink.batches[0].clear()
    assert sink.events == EVENTS[:3], "what it hands out are copies"


def test_waiting_ends_with_the_write_that_brings_what_is_waited_for() -> None:
    sink = MemorySink()
    writer = threading.Thread(target=lambda: [sink.write([event]) for event in EVENTS[:5]])
    writer.start()
    assert sink.wait_for(5, SOON) == EVENTS[:5]
    assert sink.wait_for(lambda events: EVENTS[4] in events, SOON) == EVENTS[:5]
    writer.join(SOON)


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (2, "waited 0 s for 2 events; there are 1 events, the last a TaskCreated"),
        (
            lambda events: False,
            "waited 0 s for the condition; there are 1 events, the last a TaskCreated",
        ),
    ],
)
def test_waiting_in_vain_tells_what_there_is_instead(condition: Any, text: str) -> None:
    sink = MemorySink()
    sink.write(EVENTS[:1])
    with pytest.raises(AssertionError, match=text):
        sink.wait_for(condition, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_memory_sink_starts_empty_in_a_forked_child_whatever_lock_was_held() -> None:
    sink = MemorySink()
    sink.open()
    sink.write(EVENTS[:1])
    with sink._lock:
        pid = os.fork()
        if not pid:
            sink.open()
            os._exit(len(sink.events))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(sink.events) == 1


# -- FlakySink --


def outcome(sink: FlakySink, events: Sequence[Event] = ()) -> str:
    try:
        sink.write(events or EVENTS[:1])
    except BaseException as error:
        return type(error).__name__
    return "ok"


def test_a_script_is_followed_step_by_step_and_then_all_goes_through() -> None:
    sink = FlakySink(fail(2), work(), fail(error=PermanentSinkError("no")), fail(error=KeyError))
    assert [outcome(sink) for _ in range(7)] == [
        "TemporarySinkError",
        "TemporarySinkError",
        "ok",
        "PermanentSinkError",
        "KeyError",
        "ok",
        "ok",
    ]
    assert len(sink.attempts) == 7
    assert sink.acknowledged == sink.sink.events == EVENTS[:1] * 3


def test_a_step_without_end_lasts_until_recovery() -> None:
    sink = FlakySink(fail(None), poison=lambda event: True)
    assert [outcome(sink) for _ in range(3)] == ["PermanentSinkError"] * 3
    sink.poison = None
    assert [outcome(sink) for _ in range(3)] == ["TemporarySinkError"] * 3
    sink.recover()
    assert outcome(sink) == "ok"
    sink.then(fail())
    assert [outcome(sink), outcome(sink)] == ["TemporarySinkError", "ok"]


def test_poison_refuses_every_batch_that_holds_it() -> None:
    sink = FlakySink(poison=lambda event: event.type == EventType.TASK_OUTPUT)
    output = next(event for event in EVENTS if event.type == EventType.TASK_OUTPUT)
    assert [outcome(sink), outcome(sink, [EVENTS[0], output])] == ["ok", "PermanentSinkError"]


def test_a_partial_write_takes_some_in_and_acknowledges_none() -> None:
    sink = FlakySink(partial(2), partial(0))
    assert [outcome(sink, EVENTS[:3]) for _ in range(3)] == [
        "TemporarySinkError",
        "TemporarySinkError",
        "ok",
    ]
    assert sink.sink.events == EVENTS[:2] + EVENTS[:3]
    assert sink.acknowledged == EVENTS[:3]


def test_crawling_waits_before_each_event_by_the_clock_that_it_is_given() -> None:
    waits: list[float] = []
    sink = FlakySink(crawl(4, wait=waits.append))
    sink.write(EVENTS[:3])
    assert waits == [0.25] * 3
    assert sink.sink.batches == [[event] for event in EVENTS[:3]]


def test_a_hanging_call_tells_that_it_hangs_and_goes_on_when_released() -> None:
    hang, worse = Hang(), Hang(TemporarySinkError("late"))
    sink = FlakySink(hang, worse)
    outcomes: list[str] = []
    writer = threading.Thread(target=lambda: outcomes.extend([outcome(sink), outcome(sink)]))
    writer.start()
    assert hang.entered.wait(SOON) and outcomes == []
    hang.release()
    assert worse.entered.wait(SOON)
    worse.release()
    writer.join(SOON)
    assert outcomes == ["ok", "TemporarySinkError"]


def test_every_call_can_be_scripted_and_is_noted() -> None:
    sink = FlakySink(on_open=[fail()], on_flush=[work(), fail()], on_close=[fail()])
    for call, raises in (
        (sink.open, True),
        (sink.open, False),
        (sink.flush, False),
        (sink.flush, True),
        (sink.close, True),
        (sink.close, False),
    ):
        if raises:
            with pytest.raises(TemporarySinkError):
                call()
        else:
            call()
    assert sink.calls == ["open", "open", "flush", "flush", "close", "close"]
    assert sink.sink.flushes == 1 and not sink.sink.is_open


def test_a_step_of_ones_own_gets_the_events_and_the_way_on() -> None:
    def twice(events: Sequence[Event], write: Callable[[Sequence[Event]], None]) -> None:
        write(events)
        write(events)

    sink = FlakySink(Step(twice))
    assert [outcome(sink), outcome(sink)] == ["ok", "ok"]
    assert len(sink.sink.events) == 3


def test_both_sinks_work_in_a_scheduler() -> None:
    memory, flaky = MemorySink(), FlakySink(fail(), to=HookSink())
    with Scheduler(1, sinks=[memory, flaky]) as pool:
        pool.submit(lambda: current_task().output("hello")).result(SOON)
        assert [getattr(event, "payload", "") for event in memory.wait_for(5, SOON)][3] == "hello"
        pool.unregister_sink("flaky")
        pool.register_sink(FlakySink(), options=SinkOptions(types=["TaskFailed"]))


# -- check_sink finds what is broken --


class Fine(MemorySink):
    pass


class Hasty(Fine):
    def write(self, events: Any) -> Any:
        super().write(events)
        return len(events)


class Mutating(Fine):
    def write(self, events: Any) -> None:
        super().write(events)
        if isinstance(events, list):
            events.clear()


class Keeping(Fine):
    def write(self, events: Any) -> None:
        self.kept = events
        super().write(events)


class Swallowing(Fine):
    def write(self, events: Any) -> None:
        try:
            super().write(events)
        except Exception:
            pass


class ListsOnly(Fine):
    def write(self, events: Any) -> None:
        super().write(events.copy())


class OneTypeOnly(Fine):
    def write(self, events: Any) -> None:
        for event in events:
            event.task_id
        super().write(events)


class Losing(Fine):
    def write(self, events: Any) -> None:
        super().write(list(events)[:100])


class Backwards(Fine):
    def write(self, events: Any) -> None:
        super().write(list(reversed(list(events))))


class Garbling(Fine):
    @property
    def events(self) -> list[Event]:
        import dataclasses
        return [
            (
                dataclasses.replace(event, payload=event.payload.strip())
                if event.type == EventType.TASK_OUTPUT
                else event
            )
            for event in super().events
        ]  # type: ignore[union-attr, type-var]


class BrokenByFailure(Fine):
    def write(self, events: Any) -> None:
        assert not hasattr(self, "is_broken"), "still broken"
        try:
            super().write(events)
        except Exception:
            self.is_broken = True
            raise


class OnceOpened(Fine):
    def open(self) -> None:
        if self.is_open:
            raise RuntimeError("open already")
        super().open()


class Unclosable(Fine):
    def close(self) -> None:
        if not self.events:
            raise RuntimeError("nothing was written")


class CloseWithoutOpen(Fine):
    def close(self) -> None:
        if not self.is_open:
            raise RuntimeError("not open")
        super().close()


class NoClose:
    def write(self, events: Any) -> None:
        list(events)


class Greedy(Fine):
    preferred_batch = 0


class Later(Fine):
    async def write(self, events: Any) -> None:  # type: ignore[override]
        super().write(events)
        raise OSError("too late")


class Stubborn(Fine):
    """Hangs when opened, but lets go of its thread in the end."""

    go_on = threading.Event()

    def open(self) -> None:
        self.go_on.wait(SOON)


@pytest.mark.parametrize(
    ("sink", "promise"),
    [
        (Hasty, "write returned an int; it should return None, or an awaitable"),
        (Mutating, "write changes the batch that it is given"),
        (Keeping, "write keeps the batch past the call"),
        (Swallowing, "write swallows exceptions"),
        (ListsOnly, "write of one event, as a lazy batch raised AttributeError"),
        (OneTypeOnly, "write of events of every type.* raised AttributeError: 'LossEvent'"),
        (
            Losing,
            r"after flush, \d+ of \d+ events that write took are not there, the first a TaskOutput",
        ),
        (Backwards, "after flush, seq does not ascend in task 0+2"),
        (Garbling, r"after flush, an event has changed: .* became"),
        (
            BrokenByFailure,
            "write of a batch after one that failed raised AssertionError: still broken",
        ),
        (OnceOpened, "open, called again as in a forked child, raised RuntimeError: open already"),
        (
            Unclosable,
            "close of a sink that was never written to raised RuntimeError: nothing was written",
        ),
        (CloseWithoutOpen, "close of a sink that was never opened raised RuntimeError: not open"),
        (NoClose, "it has no method close"),
        (Greedy, "preferred_batch: expected a whole number >= 1, got 0"),
        (Later, "raised OSError: too late"),
        (lambda: Fine, "the factory returned the class Fine"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_sink_that_breaks_a_promise_is_told_which(sink: Callable[[], Any], promise: str) -> None:
    with pytest.raises(AssertionError, match=promise) as told:
        check_sink(sink, read_back=lambda sink: sink.events)  # type: ignore[attr-defined]
    assert str(told.value).count("\n- ") <= 2, "one fault, many complaints"


def test_all_broken_promises_are_told_at_once() -> None:
    class Bad(Hasty, Greedy):
        pass

    with pytest.raises(AssertionError, match="(?s)preferred_batch.*write returned"):
        check_sink(Bad)


def kept(sink: Any) -> list[Event]:
    found: list[Event] = sink.kept
    return found


def test_a_sink_that_keeps_doubles_is_told_only_if_it_claims_to_know_events_again() -> None:
    check_sink(MemorySinkThatStays, read_back=kept)
    with pytest.raises(AssertionError, match="events that are delivered twice are kept twice"):
        check_sink(MemorySinkThatStays, read_back=kept, is_idempotent=True)


class MemorySinkThatStays:
    kept: list[Event] = []

    def write(self, events: Sequence[Event]) -> None:
        self.kept += list(events)

    def close(self) -> None:
        pass


class KnowsThemAgain(MemorySinkThatStays):
    kept: list[Event] = []
    known: set[object] = set()

    def write(self, events: Sequence[Event]) -> None:
        for event in events:
            key = getattr(event, "task_id", None), getattr(event, "seq", None)
            if key not in self.known:
                self.kept.append(event)
                self.known.add(key)


def test_a_sink_that_knows_events_again_passes() -> None:
    check_sink(KnowsThemAgain, read_back=kept, is_idempotent=True)


def test_a_sink_that_hangs_is_told_where() -> None:
    try:
        with pytest.raises(
            AssertionError, match="open has not returned: the check took longer than 0.5 s"
        ):
            check_sink(Stubborn, timeout=0.5)
    finally:
        Stubborn.go_on.set()


def test_a_factory_that_raises_is_a_broken_promise_too() -> None:
    with pytest.raises(AssertionError, match="the factory raised ZeroDivisionError"):
        check_sink(lambda: 1 / 0)  # type: ignore[arg-type, return-value]

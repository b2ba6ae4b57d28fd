"""Code that is not ours, wherever a sink or the log lets it run: it harms nobody but itself.

What a sink raises, and whatever is asked of that, runs on the sink's own thread, under no lock; so
does a handler of the log, on a thread of its own. Each scenario has a healthy sink beside the
hostile one, and asks everything that could wait.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from bgworker import (
    ConfigurationError,
    Event,
    EventType,
    RetryPolicy,
    Scheduler,
    ShutdownError,
    SinkError,
    SinkOptions,
    StreamEvent,
    TemporarySinkError,
    current_task,
)
from bgworker.model.reports import wait_for_reports
from bgworker.testing import FlakySink, Hang, MemorySink, fail
from tests.support import in_time, until

T = TypeVar("T")
SOON = 30.0
FAST = SinkOptions(retry=RetryPolicy(attempts=2, base=0.001, cap=0.01))
logger = logging.getLogger("bgworker")


def say(pool: Scheduler, *texts: str) -> None:
    def run() -> None:
        for text in texts:
            current_task().output(text)

    pool.submit(run).result(SOON)


def said(events: Sequence[Event]) -> list[str]:
    return [event.payload for event in events if isinstance(event, StreamEvent)]


def check_all_goes_on(pool: Scheduler, healthy: MemorySink) -> None:
    """While one sink is stuck: all questions are answered, and the other sink gets its events."""
    before = len(healthy.events)
    in_time(lambda: say(pool, "x"))
    in_time(lambda: healthy.wait_for(before + 5, SOON))
    in_time(lambda: pool.sinks)
    in_time(pool.tasks)
    in_time(lambda: pool.flush(0.05))
    in_time(lambda: pool.submit(int).streams())
    in_time(
        lambda: pool.unregister_sink(pool.register_sink(MemorySink(), name="passing"), timeout=5)
    )


class Slow(Exception):
    """Whose text takes as long as the test likes."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def __str__(self) -> str:
        self.entered.set()
        assert self.go_on.wait(SOON)
        return "at last"


def test_an_exception_whose_text_takes_for_ever_holds_up_its_own_sink_alone() -> None:
    slow, healthy = Slow(), MemorySink()
    pool = Scheduler(2, close_timeout=0.5)
    pool.register_sink(FlakySink(fail(1, slow)), name="hostile", options=FAST)
    pool.register_sink(healthy, name="healthy")
    try:
        say(pool, "a")
        assert slow.entered.wait(SOON)
        check_all_goes_on(pool, healthy)
        health = in_time(lambda: pool.unregister_sink("hostile", timeout=0.1))
        assert health.pending == 0 and health.dropped_by_reason["closed"] == health.dropped
        in_time(pool.shutdown)
    finally:
        slow.go_on.set()


@pytest.mark.parametrize("where", ["on_open", "on_flush", "on_close"])
def test_an_exception_whose_text_takes_for_ever_holds_up_nobody_wherever_it_comes_from(
    where: str,
) -> None:
    slow, healthy = Slow(), MemorySink()
    pool = Scheduler(2, close_timeout=0.2)
    pool.register_sink(healthy, name="healthy")
    hostile = FlakySink(**{where: [fail(1, slow)]})  # type: ignore[arg-type]
    try:
        in_time(lambda: pool.register_sink(hostile, name="hostile", options=FAST))
        say(pool, "a")
        if where == "on_flush":
            in_time(lambda: pool.flush(0.05))
        check_all_goes_on(pool, healthy) if where != "on_close" else None
        in_time(pool.shutdown)
        assert slow.entered.is_set() and len(healthy.events) >= 5
    finally:
        slow.go_on.set()


@pytest.mark.parametrize(
    "ask",
    [
        lambda pool: pool.sinks,
        lambda pool: pool.flush(),
        lambda pool: pool.tasks(),
        lambda pool: pool.flush(1),
        lambda pool: pool.health(),
        lambda pool: pool.submit(current_task).result(SOON),
    ],
    ids=["sinks", "flush", "tasks", "flush(1)", "health", "submit"],
)
def test_an_exception_may_ask_the_scheduler_for_its_text(
    ask: Callable[[Scheduler], object],
) -> None:
    healthy = MemorySink()

    class Curious(Exception):
        def __str__(self) -> str:
            ask(pool)
            return "asked"

    with Scheduler(2, close_timeout=5) as pool:
        pool.register_sink(FlakySink(fail(3, Curious())), name="hostile", options=FAST)
        pool.register_sink(healthy, name="healthy")
        in_time(lambda: say(pool, "a"))
        in_time(lambda: healthy.wait_for(5, SOON))
        assert in_time(lambda: pool.flush(SOON)).done
        assert pool.sinks["hostile"].last_error == "Curious: asked"


@pytest.mark.parametrize(
    "error",
    [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), ValueError()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_an_exceptions_text_raises_its_sink_goes_on(error: BaseException) -> None:
    def raising(*_: object) -> Any:
        raise error

    names = ("__str__", "__repr__", "__format__", "__eq__")
    hostile = type(
        "Hostile",
        (Exception,),
        {
            **dict.fromkeys(names, raising),
            "__hash__": None,
            "__class__": property(raising),
            "args": property(raising),
        },
    )
    sink = FlakySink(fail(3, hostile()))
    with Scheduler(1) as pool:
        pool.register_sink(
            sink,
            name="it",
            options=SinkOptions(retry=RetryPolicy(attempts=5, base=0.001, cap=0.01)),
        )
        say(pool, "a", "b")
        assert in_time(lambda: pool.flush(SOON))
        assert pool.sinks["it"].last_error == "Hostile: (its text cannot be had)"
    assert said(sink.acknowledged) == ["a", "b"]


@pytest.mark.parametrize(
    "error",
    [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_sink_raises_in_whatever_method_it_goes_on_and_is_closed(
    error: BaseException,
) -> None:
    sink = FlakySink(fail(2, error), on_flush=[fail(1, error)], on_close=[fail(1, error)])
    with Scheduler(1) as pool:
        pool.register_sink(sink, name="it", options=SinkOptions(retry=RetryPolicy(5, 0.001, 0.01)))
        say(pool, "a")
        assert not in_time(lambda: pool.flush(SOON)).done
        say(pool, "b")
        assert in_time(lambda: pool.flush(SOON))
    assert said(sink.acknowledged) == ["a", "b"] and sink.calls[-1] == "close"
    assert pool.sinks["it"].state == "closed"


def test_texts_of_errors_are_bounded_in_the_account_the_log_and_the_park_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = FlakySink(fail(None, OSError("x" * 1_000_000 + "\0\ud800")))
    with Scheduler(1, close_timeout=1) as pool:
        pool.register_sink(
            sink, name="it", options=SinkOptions(retry=FAST.retry, park=tmp_path / "park")
        )
        say(pool, *map(str, range(100)))
        pool.flush(1)
    health = pool.sinks["it"]
    assert health.parked == 104 and len(str(health.last_error)) <= 1000
    lines = [json.loads(line) for line in (tmp_path / "park").read_bytes().splitlines()]
    assert len(lines) == 104 and max(len(line["error"]) for line in lines) <= 1000
    assert caplog.records and max(len(record.getMessage()) for record in caplog.records) < 1200


def test_one_value_that_a_sink_cannot_take_costs_no_other_event() -> None:
    class Picky(MemorySink):
        def write(self, events: Sequence[Event]) -> None:
            json.dumps([str(event).encode("ascii").decode() for event in events])
            super().write(events)

    sink = Picky()
    with Scheduler(1) as pool:
        pool.register_sink(sink, name="it", options=FAST)
        texts = [f"{number}" for number in range(200)]
        say(pool, *texts[:77], "\u00fc", *texts[77:])
        pool.flush(SOON)
    assert said(sink.events) == texts
    assert pool.sinks["it"].dropped == 1


# -- handlers of the log --


class Handler(logging.Handler):
    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act

    def handle(self, record: logging.LogRecord) -> bool:
        self.act()
        return True


@pytest.fixture
def handled() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Adds a handler that does something, and takes it away again."""
    handlers: list[Handler] = []

    def add(act: Callable[[], object]) -> None:
        handlers.append(Handler(act))
        logger.addHandler(handlers[-1])

    yield add
    for handler in handlers:
        logger.removeHandler(handler)
    wait_for_reports(time.monotonic() + SOON)


@pytest.mark.parametrize(
    "error",
    [ValueError("boom"), SystemExit(3), KeyboardInterrupt()],
    ids=lambda each: type(each).__name__,
)
def test_a_handler_that_raises_ends_no_sink(
    handled: Callable[[Callable[[], object]], None], error: BaseException
) -> None:
    def act() -> None:
        raise error

    handled(act)
    sink = FlakySink(fail(3))
    with Scheduler(1) as pool:
        pool.register_sink(sink, name="it", options=FAST)
        say(pool, *map(str, range(600)))
        assert in_time(lambda: pool.flush(SOON)).done
        say(pool, "after")
        assert in_time(lambda: pool.flush(SOON)).done
    health = pool.sinks["it"]
    assert "closed" not in health.dropped_by_reason and said(sink.acknowledged)[-1] == "after"


def test_a_handler_that_blocks_holds_up_no_sink_and_no_shutdown(
    handled: Callable[[Callable[[], object]], None],
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def act() -> None:
        entered.set()
        assert go_on.wait(SOON)

    handled(act)
    failing, hanging = FlakySink(fail(1)), Hang()
    pool = Scheduler(1, close_timeout=1)
    pool.register_sink(failing, name="failing", options=FAST)
    pool.register_sink(FlakySink(hanging), name="hanging")
    try:
        say(pool, *"abc")
        assert entered.wait(SOON)
        in_time(lambda: failing.sink.wait_for(6, SOON))
        in_time(pool.shutdown)
        assert said(failing.acknowledged) == [*"abc"]
        assert pool.sinks["hanging"].state == "closed"
    finally:
        go_on.set()
        hanging.release()


def test_a_handler_may_ask_the_scheduler(handled: Callable[[Callable[[], object]], None]) -> None:
    with Scheduler(2) as pool:
        handled(lambda: (pool.sinks, pool.flush(0.1), say(pool, "from the handler")))
        pool.register_sink(FlakySink(fail(1)), name="it", options=FAST)
        say(pool, "a")
        assert in_time(lambda: pool.flush(SOON)).done
        in_time(lambda: wait_for_reports(time.monotonic() + SOON))
        logger.handlers.clear()


# -- sinks that reach for what is ours --


def test_a_sink_that_changes_its_batch_changes_nothing_of_ours() -> None:
    class Thief(MemorySink):
        def write(self, events: Any) -> None:
            super().write(events)
            for act in (
                lambda: events.records.clear(),
                lambda: events.records.pop(),
                lambda: events.records.append(1),
                lambda: setattr(events, "records", []),
            ):
                try:
                    act()
                except (AttributeError, TypeError):
                    pass
            list(events)
            if len(self.batches) == 1:
                raise TemporarySinkError("again")

    thief, healthy = Thief(), MemorySink()
    with Scheduler(1) as pool:
        pool.register_sink(thief, name="thief", options=FAST)
        pool.register_sink(healthy, name="healthy")
        say(pool, *"abc")
        assert in_time(lambda: pool.flush(SOON))
    assert said(healthy.events) == [*"abc"]
    for health in pool.sinks.values():
        assert (health.emitted, health.delivered, health.dropped) == (7, 7, 0)


def test_one_sink_object_has_one_registration_at_a_time() -> None:
    sink = MemorySink()
    with Scheduler(1) as one, Scheduler(1) as other:
        one.register_sink(sink, name="first")
        for pool in (one, other):
            with pytest.raises(ConfigurationError, match="registered already, as 'first'"):
                pool.register_sink(sink, name="second")
        with pytest.raises(ConfigurationError, match="registered already"):
            Scheduler(1, sinks=[sink])
        assert list(one.sinks) == ["first"] and not other.sinks
        one.unregister_sink("first")
        other.register_sink(sink, name="later")
        say(other, "a")
        assert other.flush(SOON)
    assert said(sink.events) == ["a"]


def test_a_sink_left_to_itself_in_a_write_cannot_be_registered_again_before_it_comes_back() -> None:
    hang = Hang()
    sink = FlakySink(hang)
    with Scheduler(1) as pool:
        pool.register_sink(sink, name="it")
        say(pool, "a")
        assert hang.entered.wait(SOON)
        in_time(lambda: pool.unregister_sink("it", timeout=0.05))
        with pytest.raises(ConfigurationError, match="registered already"):
            pool.register_sink(sink, name="again")
        hang.release()

        def is_registered() -> bool:
            try:
                pool.register_sink(sink, name="again")
            except ConfigurationError:
                return False
            return True

        until(is_registered)


def test_a_refused_sink_may_be_registered_once_it_opens() -> None:
    class Late(MemorySink):
        is_there = False

        async def open(self) -> None:  # type: ignore[override]
            if not self.is_there:  # its loop has to be closed: that takes the thread a moment
                raise OSError("not yet")

    sink = Late()
    with Scheduler(1) as pool:
        for _ in range(20):
            with pytest.raises(SinkError, match="not yet"):
                pool.register_sink(sink, name="it")  # type: ignore[arg-type]
        sink.is_there = True
        pool.register_sink(sink, name="it")  # type: ignore[arg-type]


def sink_that(act: Callable[[], object], done: threading.Event) -> MemorySink:
    class Acting(MemorySink):
        def write(self, events: Sequence[Event]) -> None:
            super().write(events)
            if not done.is_set() and any(isinstance(event, StreamEvent) for event in events):
                act()
                done.set()

    return Acting()


def test_a_sink_that_unregisters_itself_is_closed_after_its_write(tmp_path: Path) -> None:
    done = threading.Event()
    with Scheduler(1) as pool:
        sink = sink_that(lambda: pool.unregister_sink("it"), done)
        pool.register_sink(sink, name="it", options=SinkOptions(park=tmp_path / "park"))
        say(pool, "a")
        assert done.wait(SOON), "it waits for itself"
        until(lambda: not sink.is_open)
        assert "it" not in pool.sinks
        say(pool, "not for it")
    assert said(sink.events) == ["a"]


@pytest.mark.parametrize(
    "act",
    [
        lambda pool: pool.shutdown(),
        lambda pool: pool.shutdown(timeout=20),
        lambda pool: pool.flush(),
        lambda pool: pool.flush(20),
    ],
    ids=["shutdown", "shutdown(20)", "flush", "flush(20)"],
)
def test_a_sink_that_waits_for_all_delivery_does_not_wait_for_itself(
    act: Callable[[Scheduler], object],
) -> None:
    done = threading.Event()
    healthy = MemorySink()
    pool = Scheduler(1, close_timeout=20)
    sink = sink_that(lambda: act(pool), done)
    pool.register_sink(sink, name="it")
    pool.register_sink(healthy, name="healthy")
    say(pool, "a")
    assert done.wait(10), "it waits for itself"
    in_time(pool.shutdown)
    for each in (sink, healthy):
        assert said(each.events) == ["a"] and not each.is_open
    assert all(health.dropped == 0 for health in pool.sinks.values())


def test_a_callback_may_shut_the_scheduler_down() -> None:
    done = threading.Event()
    pool = Scheduler(1, close_timeout=20)

    def callback(event: Event) -> None:
        if event.type == EventType.TASK_COMPLETED:
            pool.shutdown()
            done.set()

    pool.subscribe(callback)
    say(pool, "a")
    assert done.wait(10), "it waits for itself"
    in_time(pool.shutdown)


def test_two_sinks_that_flush_in_their_writes_do_not_wait_for_each_other() -> None:
    both = threading.Barrier(2)
    dones = [threading.Event(), threading.Event()]
    pool = Scheduler(1, close_timeout=5)
    for number, done in enumerate(dones):
        pool.register_sink(
            sink_that(lambda: (both.wait(SOON), pool.flush()), done), name=f"sink-{number}"
        )
    say(pool, "a")
    for done in dones:
        assert done.wait(SOON), "they wait for each other"
    in_time(pool.shutdown)
    assert all(health.dropped == 0 for health in pool.sinks.values())


def test_a_finaliser_that_the_collector_runs_anywhere_may_ask_for_the_accounts() -> None:
    asked = [0]

    class Asking:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            if pool.sinks:
                asked[0] += 1

    def litter() -> None:
        for number in range(2_000):
            Asking()
            current_task().output(str(number))

    before = gc.get_threshold()
    with Scheduler(2) as pool:
        pool.register_sink(MemorySink(), name="it")
        gc.set_threshold(5, 5, 5)
        try:
            tasks = [pool.submit(litter) for _ in range(2)]
            for task in tasks:
                task.result(SOON)
            assert in_time(lambda: pool.flush(SOON))
        finally:
            gc.set_threshold(*before)
    assert asked[0] > 1_000


# -- where no thread can be had --


@pytest.fixture
def no_threads() -> Iterator[Callable[[], None]]:
    """Makes the system refuse each further thread."""
    before = threading.stack_size()
    yield lambda: (threading.stack_size(1 << 46), None)[1]
    threading.stack_size(before)


def test_a_callback_without_a_thread_is_refused_and_leaves_nothing_behind(
    no_threads: Callable[[], None],
) -> None:
    with Scheduler(1) as pool:
        say(pool, "a")
        no_threads()
        with pytest.raises(ShutdownError, match="no thread can be started for the callback"):
            pool.subscribe(print)
        assert pool._dispatcher.consumers == ()


def test_a_sink_without_a_thread_is_refused_and_may_be_registered_later(
    no_threads: Callable[[], None],
) -> None:
    sink = MemorySink()
    with Scheduler(1) as pool:
        say(pool, "a")
        before = threading.stack_size()
        no_threads()
        with pytest.raises(SinkError, match="no thread can be started"):
            pool.register_sink(sink, name="it")
        assert not pool.sinks
        threading.stack_size(before)
        pool.register_sink(sink, name="it")


@pytest.mark.parametrize(
    "error",
    [ValueError("boom"), SystemExit(3), asyncio.CancelledError(), GeneratorExit()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_callback_raises_the_next_event_follows(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Event] = []

    def callback(event: Event) -> None:
        seen.append(event)
        raise error

    with Scheduler(1) as pool:
        pool.subscribe(callback)
        say(pool, "a")
    assert len(seen) == 5
    assert f"{type(error).__name__}" in caplog.text and "callback" in caplog.text


# -- the end --


def test_the_close_timeout_is_spent_on_retries() -> None:
    busy = TemporarySinkError("busy", retry_after=0.3)
    sink = FlakySink(fail(3, busy))
    started = time.monotonic()
    with Scheduler(1, close_timeout=30) as pool:
        pool.register_sink(sink, name="it")
        say(pool, *map(str, range(80)))
    assert time.monotonic() - started >= 0.9, "the other side's wish was not obeyed"
    assert pool.sinks["it"].dropped == 0 and len(said(sink.acknowledged)) == 80


def test_a_sink_that_stays_down_ends_within_the_close_timeout_and_is_closed_in_order() -> None:
    sink = FlakySink(fail(None, TemporarySinkError("busy", retry_after=0.05)))
    pool = Scheduler(1, close_timeout=1)
    pool.register_sink(
        sink, name="it", options=SinkOptions(batch_size=20, retry=RetryPolicy(attempts=1000))
    )
    say(pool, *map(str, range(80)))
    in_time(pool.shutdown)
    assert pool.sinks["it"].dropped_by_reason == {"failed": 84}
    assert sink.calls[-1] == "close" and len(sink.attempts) > 5


def test_a_sink_that_takes_the_small_and_refuses_the_rest_is_not_said_to_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Narrow(MemorySink):
        def write(self, events: Sequence[Event]) -> None:
            if any(event.type != EventType.EVENTS_LOST for event in events):
                raise OSError("no space left")
            super().write(events)

    sink = Narrow()
    with Scheduler(1, close_timeout=0.5) as pool:
        pool.register_sink(sink, name="it", options=FAST)
        for number in range(3):
            before = len(sink.events)
            say(pool, str(number))
            in_time(lambda: sink.wait_for(before + 1, SOON))  # the announcement fits
    assert "works again" not in caplog.text
    assert caplog.text.count("is tried again") == 1

"""One sink's queue, thread and account, with sinks that fail, hang, crawl and refuse."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bgworker.delivery.courier import Courier, close_all
from bgworker.delivery.retry import RetryPolicy
from bgworker.model.errors import (
    ConfigurationError,
    PermanentSinkError,
    SinkError,
    TemporarySinkError,
)
from bgworker.model.events import Event, EventType, LossEvent
from bgworker.model.health import SinkHealth
from bgworker.model.records import COMPLETED, CREATED, OUTPUT, PROGRESS
from bgworker.model.reports import wait_for_reports
from bgworker.testing import FlakySink, Hang, MemorySink, Step, crawl, fail, partial, work
from tests.couriers import FAST, Line, line, losses, payloads
from tests.support import SOON, until


# -- the usual --


def test_events_arrive_in_order_and_the_account_says_so() -> None:
    sink = MemorySink()
    with line(sink) as it:
        it.say("a", "b")
        it.say("c")
        assert it.flush()
        assert payloads(sink.events) == ["a", "b", "c"]
        assert (it.health().delivered, it.health().pending, it.health().state) == (3, 0, "ok")
        assert sink.is_open and sink.flushes == 1
        health = it.close()
    assert (health.state, health.delivered, health.lag) == ("closed", 3, 0.0)
    assert not sink.is_open


def test_every_call_comes_from_the_one_thread_of_the_sink() -> None:
    threads: set[str] = set()

    class Noting(FlakySink):
        def _call(self, *args: Any) -> None:
            threads.add(threading.current_thread().name)
            super()._call(*args)

    sink = Noting(fail(2))
    with line(sink) as it:
        it.say("a")
        it.flush()
    assert threads == {"test-sink-it"}
    assert sink.calls == ["open", "write", "write", "write", "flush", "close"]


def test_a_sink_needs_no_open_and_no_flush() -> None:
    class Bare:
        def __init__(self) -> None:
            self.got: list[str] = []

        def write(self, events: Sequence[Event]) -> None:
            self.got += payloads(events)

        def close(self) -> None:
            self.got.append("closed")

    sink = Bare()
    with line(sink) as it:
        it.say("a")
        assert it.flush()
    assert sink.got == ["a", "closed"]


@pytest.mark.parametrize(
    ("preferred", "option", "most"), [(None, None, 500), (3, None, 3), (3, 5, 5)]
)
def test_a_batch_is_no_larger_than_the_option_the_sinks_wish_or_500(
    preferred: int | None, option: int | None, most: int
) -> None:
    sink, hang = FlakySink(), Hang()
    sink.then(hang)
    sink.preferred_batch = preferred  # type: ignore[attr-defined]
    with line(sink, batch_size=option) as it:
        it.say("first")
        assert hang.entered.wait(SOON)
        it.say(*map(str, range(2 * most + 1)))
        hang.release()
        it.flush()
    assert [len(batch) for batch in sink.attempts] == [1, most, most, 1]


def test_a_sinks_impossible_wish_for_batches_is_refused() -> None:
    sink = MemorySink()
    sink.preferred_batch = -1  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigurationError, match="preferred_batch: expected a whole number >= 1 or None, got -1"
    ):
        Line(sink)


def test_lingering_gathers_what_comes_and_a_full_batch_or_a_flush_ends_it() -> None:
    sink = MemorySink()
    with line(sink, linger=SOON * 10, batch_size=4) as it:
        it.say("a")
        it.say("b")
        it.say("c", "d", "e")
        sink.wait_for(4, SOON)
        it.flush()
        it.say("f")
        it.say("g")
    assert [payloads(batch) for batch in sink.batches] == [["a", "b", "c", "d"], ["e"], ["f", "g"]]


def test_a_sink_gets_only_the_types_that_it_asked_for_and_only_those_count() -> None:
    sink = MemorySink()
    with line(sink, types=["TaskCompleted", "TaskProgress"]) as it:
        it.put(
            it.record(CREATED),
            it.record(OUTPUT, "x"),
            it.record(PROGRESS, (1.0, "")),
            it.record(COMPLETED),
        )
        it.say("y")
        it.courier.refuse(OUTPUT, "intake", 5)
        it.courier.refuse(PROGRESS, "intake", 2)
        assert it.flush()
        assert it.health().emitted == 4
    assert [event.type for event in sink.events] == [
        EventType.TASK_PROGRESS,
        EventType.TASK_COMPLETED,
    ]
    assert it.health().dropped_by_reason == {
        "intake": 2
    }, "told in the account, not to a sink that did not ask"


def test_async_sinks_are_awaited_on_a_loop_of_the_sinks_own_thread() -> None:
    seen: list[object] = []

    class Async:
        async def open(self) -> None:
            seen.append(asyncio.get_running_loop())

        async def write(self, events: Sequence[Event]) -> None:
            await asyncio.sleep(0)
            seen.append(asyncio.get_running_loop())
            if len(seen) == 2:
                raise TemporarySinkError("once")
            seen.append(payloads(events))

        async def flush(self) -> None:
            seen.append("flush")

        async def close(self) -> None:
            seen.append("close")

    with line(Async()) as it:
        it.say("a")
        assert it.flush()
    loop = seen[0]
    assert seen == [loop, loop, loop, ["a"], "flush", "close"]
    assert it.health().retries == 1


@pytest.mark.parametrize("result", [7, True, "taken", b"", [1]], ids=repr)
def test_what_a_plain_write_returns_is_no_failure(result: object) -> None:
    class Counting(MemorySink):
        def write(self, events: Sequence[Event]) -> Any:
            super().write(events)
            return result  # as ``return file.write(text)`` does

    sink = Counting()
    with line(sink) as it:
        it.say("a")
        assert it.flush()
    assert payloads(sink.events) == ["a"] and it.health().retries == 0


def test_what_an_async_sink_leaves_on_its_loop_is_cancelled_and_may_clean_up() -> None:
    said: list[str] = []

    class Leaves:
        async def write(self, events: Sequence[Event]) -> None:
            self.task = asyncio.create_task(self.send())
            self.items = self.generate()
            await self.items.__anext__()

        async def send(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                said.append("sent what was left")

        async def generate(self) -> AsyncGenerator[int, None]:
            try:
                yield 1
            finally:
                said.append("generator ended")

        async def close(self) -> None:
            said.append("close")

    with line(Leaves()) as it:
        it.say("a")
        assert it.flush()
    assert said == ["close", "sent what was left", "generator ended"]
    assert it.health().last_error is None


def test_the_lag_is_the_age_of_the_oldest_event_that_waits_or_is_being_written() -> None:
    hang = Hang()
    with line(FlakySink(hang)) as it:
        state, seq, kind, ns, data = it.record(OUTPUT, "a")
        it.put((state, seq, kind, ns - 5_000_000_000, data))
        assert hang.entered.wait(SOON)
        it.say("b")
        assert it.health().lag >= 5
        hang.release()
        it.flush()
        assert it.health().lag == 0


# -- a full queue --


def overflowing(**options: Any) -> tuple[list[str], list[tuple[str, int]], SinkHealth]:
    """Have a queue overflow while its sink hangs; return what the sink gets then, what it is told,
    and the account."""
    hang = Hang()
    sink = FlakySink(hang)
    with line(sink, **options) as it:
        it.say("in flight")
        assert hang.entered.wait(SOON)
        it.say(*"abcdefgh")
        it.say(*"ijk")
        hang.release()
        it.flush()
        assert isinstance(sink.acknowledged[1], LossEvent), "the loss comes before what follows it"
        return payloads(sink.acknowledged)[1:], losses(sink.acknowledged), it.health()


def test_a_full_queue_drops_the_oldest_and_tells_the_sink_first() -> None:
    got, told, health = overflowing(queue_size=3)
    assert (got, told) == (["i", "j", "k"], [("overflow", 8)])
    assert (health.emitted, health.delivered, health.dropped_by_reason) == (12, 4, {"overflow": 8})


def test_a_full_queue_drops_the_newest_if_told_so() -> None:
    assert overflowing(queue_size=3, overflow="drop_newest")[:2] == (
        ["a", "b", "c"],
        [("overflow", 8)],
    )


def test_a_queue_is_full_by_its_bytes_too_and_what_is_being_written_counts() -> None:
    assert overflowing(queue_bytes=265 + 2 * 257)[:2] == (["j", "k"], [("overflow", 9)])


def test_progress_coalesces_in_a_full_queue_and_counts_as_no_loss() -> None:
    hang = Hang()
    sink = FlakySink(hang)
    with line(sink, queue_size=2) as it:
        it.say("in flight")
        assert hang.entered.wait(SOON)
        it.put(*(it.record(PROGRESS, (float(percent), "")) for percent in range(10)))
        hang.release()
        it.flush()
        health = it.health()
    assert (health.coalesced, health.dropped, health.delivered) == (9, 0, 2)
    assert sink.acknowledged[-1].percent == 9.0  # type: ignore[union-attr]
    assert not losses(sink.acknowledged)


def test_life_cycle_events_have_room_of_their_own() -> None:
    hang = Hang()
    sink = FlakySink(hang)
    with line(sink, queue_size=2) as it:
        it.say("in flight")
        assert hang.entered.wait(SOON)
        it.put(
            it.record(CREATED), *(it.record(OUTPUT, "x") for _ in range(9)), it.record(COMPLETED)
        )
        hang.release()
        it.flush()
    assert [event.type.value for event in sink.acknowledged[2:]] == [
        "TaskCreated",
        "TaskOutput",
        "TaskOutput",
        "TaskCompleted",
    ]
    assert it.health().dropped_by_reason == {"overflow": 7}


def test_what_the_intake_refused_is_announced_even_if_nothing_else_comes() -> None:
    sink = MemorySink()
    with line(sink) as it:
        it.courier.refuse(OUTPUT, "intake", 7)
        it.courier.refuse(OUTPUT, "oversize", 1)
        events = sink.wait_for(lambda events: sum(count for _, count in losses(events)) == 8, SOON)
    assert {event.reason: dict(event.by_type) for event in events} == {  # type: ignore[union-attr]
        "intake": {"TaskOutput": 7}, "oversize": {"TaskOutput": 1}}
    assert it.health().dropped_by_reason == {"intake": 7, "oversize": 1}


# -- failures --


@pytest.mark.parametrize(
    "error",
    [
        TemporarySinkError("busy"),
        OSError("no route"),
        ValueError(),
        SystemExit(3),
        TemporarySinkError("busy", retry_after=0.0),
    ],
)
def test_a_temporary_or_unknown_failure_is_tried_again_and_nothing_is_lost_or_reordered(
    error: BaseException,
) -> None:
    sink = FlakySink(fail(2, error))
    with line(sink) as it:
        it.say("a", "b")
        it.say("c")
        assert it.flush()
        health = it.health()
    assert payloads(sink.acknowledged) == ["a", "b", "c"]
    assert (health.delivered, health.retries, health.state) == (3, 2, "ok")
    assert health.last_error is not None and health.last_error.startswith(type(error).__name__)


def test_after_its_last_attempt_a_batch_is_dropped_and_the_breaker_opens_until_a_probe_works() -> (
    None
):
    sink = FlakySink(fail(FAST.attempts))
    hang = Hang(TemporarySinkError("still down"))
    sink.then(hang, fail(3))
    with line(sink, batch_size=2) as it:
        it.say("a", "b", "c", "d")
        assert hang.entered.wait(SOON)
        assert it.health().state == "open"
        assert it.health().dropped_by_reason == {"failed": 2}
        hang.release()
        assert it.flush()
        assert it.health().state == "ok"
    assert losses(sink.acknowledged) == [("failed", 2)]
    assert payloads(sink.acknowledged) == ["c", "d"]


def test_a_sink_that_recovers_is_told_of_its_loss_though_nothing_new_comes() -> None:
    sink = FlakySink(fail(FAST.attempts + 3))
    with line(sink) as it:
        it.say("a")
        until(lambda: losses(sink.acknowledged))
        until(lambda: it.health().state == "ok")
    assert losses(sink.acknowledged) == [("failed", 1)]


def test_losses_that_could_not_be_announced_are_announced_later_and_newer_ones_then() -> None:
    hang = Hang()
    sink = FlakySink(fail(FAST.attempts), hang)
    with line(sink, batch_size=1) as it:
        it.say("a")
        assert hang.entered.wait(SOON)  # in the announcement of a's loss
        it.courier.refuse(OUTPUT, "failed", 2)
        hang.error = TemporarySinkError("not yet")
        hang.release()
        it.say("b")
        assert it.flush()
    assert losses(sink.acknowledged) == [("failed", 1), ("failed", 2)]
    assert payloads(sink.acknowledged) == ["b"]


def test_a_sink_that_refuses_announcements_gets_none_any_more_and_its_events_all_the_same() -> None:
    sink = FlakySink(poison=lambda event: event.type == EventType.EVENTS_LOST)
    with line(sink) as it:
        it.courier.refuse(OUTPUT, "intake", 7)
        it.say("a")
        assert it.flush()
        before = sum(bool(losses(batch)) for batch in sink.attempts)
        it.courier.refuse(OUTPUT, "intake", 7)
        it.say("b")
        assert it.flush()
    assert payloads(sink.acknowledged) == ["a", "b"]
    assert sum(bool(losses(batch)) for batch in sink.attempts) == before > 0


@pytest.mark.parametrize("poison", ["0", "7", "63", "0 1", "31 32", " ".join(map(str, range(64)))])
def test_poison_is_singled_out_by_halving_and_its_neighbours_are_delivered_once_in_order(
    poison: str,
) -> None:
    hang = Hang()
    sink = FlakySink(hang, poison=lambda event: getattr(event, "payload", None) in poison.split())
    everything = [str(number) for number in range(64)]
    with line(sink) as it:
        it.say("in flight")
        assert hang.entered.wait(SOON)
        it.say(*everything)
        hang.release()
        assert it.flush()
        health = it.health()
    bad = poison.split()
    assert payloads(sink.acknowledged)[1:] == [each for each in everything if each not in bad]
    assert health.dropped_by_reason == {"refused": len(bad)}
    assert sum(count for _, count in losses(sink.acknowledged)) == len(bad)
    assert len(sink.attempts) <= 3 + len(bad) * (2 * 6 + 1), "halving should be quick"
    assert health.state == "ok"


def test_what_is_refused_whatever_is_in_it_is_dropped_whole_after_one_attempt() -> None:
    sink = FlakySink(fail(1, PermanentSinkError("no such place", concerns="batch")))
    with line(sink) as it:
        it.say(*"abcd")
        assert it.flush()
        it.say("e")
        assert it.flush()
        health = it.health()
    assert (health.dropped_by_reason, health.delivered, health.state) == ({"refused": 4}, 1, "ok")
    assert len(sink.attempts) == 3, "the batch, the announcement of its loss, the next batch"
    assert losses(sink.acknowledged) == [("refused", 4)]


def test_a_sink_that_refuses_all_is_asked_no_oftener_than_events_come_and_told_when_it_works() -> (
    None
):
    sink = FlakySink(fail(None, PermanentSinkError("no such place", concerns="batch")))
    with line(sink) as it:
        for text in "abc":
            it.say(text)
            assert it.flush()
        assert it.health().dropped_by_reason == {"refused": 3}
        assert (
            len(sink.attempts) == 4
        ), "a, the announcement, and then the announcement once with each that comes"
        sink.recover()
        it.say("d")
        assert it.flush()
    assert losses(sink.acknowledged) == [("refused", 3)]
    assert payloads(sink.acknowledged) == ["d"]


def test_what_is_to_be_held_is_held_beyond_all_attempts_and_delivered_in_order_once_mended() -> (
    None
):
    hang = Hang(TemporarySinkError("wrong password", hold=True))
    sink = FlakySink(
        fail(5 * FAST.attempts, TemporarySinkError("wrong password", hold=True)), hang, work()
    )
    with line(sink, batch_size=2) as it:
        it.say(*"abcde")
        assert hang.entered.wait(SOON)
        health = it.health()
        assert (health.state, health.pending, health.dropped) == ("open", 5, 0)
        hang.release()
        assert it.flush()
        health = it.health()
    assert (health.state, health.delivered, health.dropped) == ("ok", 5, 0)
    assert payloads(sink.acknowledged) == list("abcde")


def test_what_is_held_gets_one_more_attempt_at_the_close_and_is_counted() -> None:
    sink = FlakySink(fail(None, TemporarySinkError("wrong password", hold=True)))
    with line(sink, retry=RetryPolicy(cap=3600)) as it:
        it.say(*"abc")
        until(lambda: it.health().state == "open")
        health = it.close()
    assert (health.dropped_by_reason, len(sink.attempts)) == ({"failed": 3}, 2)


GONE = PermanentSinkError("gone", concerns="sink")


def test_a_sink_that_takes_nothing_any_more_is_closed_and_what_waits_and_comes_is_counted(
        caplog: pytest.LogCaptureFixture) -> None:
    hang = Hang(GONE)
    sink = FlakySink(work(), hang)
    with line(sink, batch_size=2) as it:
        it.say("taken")
        assert it.flush()
        it.say("a", "b")
        assert hang.entered.wait(SOON)
        it.say(*"cdefg")
        hang.release()
        assert not it.flush(), "what waits will never be delivered"
        health = it.health()
        assert (health.state, health.delivered, health.dropped_by_reason) == (
            "failed",
            1,
            {"closed": 7},
        )
        assert health.last_error == "PermanentSinkError: gone"
        assert sink.calls[-1] == "close" and len(sink.attempts) == 2
        it.say("h")
        assert not it.flush()
        assert it.health().dropped_by_reason == {"closed": 8}
        health = it.close()
    assert (health.state, health.pending, sink.calls.count("close"), len(sink.attempts)) == (
        "closed",
        0,
        1,
        2,
    )
    assert said(caplog) == [
        (
            logging.ERROR,
            "sink 'it' takes nothing any more, and is closed: PermanentSinkError: gone; "
            "the events that wait and come are lost",
        ),
        (logging.WARNING, "sink 'it': 2 events were not taken and are lost (closed: 2)"),
        (logging.WARNING, "sink 'it': 6 events were not taken and are lost (closed: 6)"),
    ]


def test_what_waits_and_comes_for_a_sink_that_takes_nothing_any_more_is_parked(
    tmp_path: Path,
) -> None:
    sink = FlakySink(fail(1, GONE))
    with line(sink, park=tmp_path / "park", batch_size=2) as it:
        it.say(*"abc")
        it.flush()
        it.say("d")
        it.flush()
        health = it.close()
    assert (health.state, health.parked, health.dropped) == ("closed", 4, 0)
    parked = [json.loads(each) for each in (tmp_path / "park").read_bytes().splitlines()]
    assert [(each["event"]["payload"], each["attempts"]) for each in parked] == [
        ("a", 1),
        ("b", 1),
        ("c", 0),
        ("d", 0),
    ]
    assert {each["error"] for each in parked} == {"PermanentSinkError: gone"}


def test_a_sink_that_is_gone_when_it_is_told_of_a_loss_ends_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = FlakySink(fail(1, GONE))
    with line(sink) as it:
        it.courier.refuse(OUTPUT, "intake", 7)
        until(lambda: it.health().state == "failed")
        it.say("a")
        assert not it.flush()
        assert it.health().dropped_by_reason == {"intake": 7, "closed": 1}
    assert len(sink.attempts) == 1
    assert [text.partition(":")[0] for _, text in said(caplog)] == [
        "sink 'it' takes nothing any more, and is closed", "sink 'it'", "sink 'it'"]
    assert not [text for _, text in said(caplog) if "EventsLost" in text or " 0 events" in text]


def test_the_log_says_nothing_of_refused_events_that_a_sink_had_not_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with line(MemorySink(), types=["TaskCompleted"]) as it:
        it.courier.refuse(OUTPUT, "intake", 5)
        it.put(it.record(COMPLETED))
        assert it.flush()
    assert said(caplog) == []


def test_a_sink_that_hangs_in_the_close_that_ends_it_is_left_to_itself_at_the_deadline() -> None:
    hang = Hang()
    sink = FlakySink(fail(1, GONE), on_close=[hang])
    with line(sink) as it:
        try:
            it.say("a")
            assert hang.entered.wait(SOON)
            it.say("b")
            health = it.close(0.05)
            assert (health.state, health.pending, health.dropped_by_reason) == (
                "closed",
                0,
                {"closed": 2},
            )
        finally:
            hang.release()


def test_an_announcement_that_failed_comes_again_as_it_was_unless_there_is_more_to_tell() -> None:
    sink = FlakySink(fail(2), work())
    with line(sink) as it:
        it.courier.refuse(OUTPUT, "intake", 7)
        until(lambda: losses(sink.acknowledged))
        it.courier.refuse(OUTPUT, "intake", 7)
        until(lambda: len(losses(sink.acknowledged)) == 2)
    first, again, taken, later = sink.attempts
    assert first == again == taken, "with the time of the first attempt: a receiver knows it again"
    assert later[0].created_utc > taken[0].created_utc, "as many once more are another loss"


def test_a_batch_taken_in_by_halves_comes_again_whole() -> None:
    sink = FlakySink(work(), partial(2))
    with line(sink) as it:
        it.say("a")
        it.flush()
        it.say("b", "c", "d")
        it.flush()
    assert payloads(sink.sink.events) == ["a", "b", "c", "b", "c", "d"], "at least once"
    assert payloads(sink.acknowledged) == ["a", "b", "c", "d"]


def test_the_sink_flushes_between_what_came_before_and_what_came_after() -> None:
    hang = Hang()
    sink = FlakySink(hang)
    with line(sink) as it:
        it.say("in flight")
        assert hang.entered.wait(SOON)
        it.say("a")
        first = [it.courier.mark(), it.courier.mark()]
        it.say("b")
        last = it.courier.mark()
        hang.release()
        assert all([mark.wait(SOON) for mark in (*first, last)])
    assert sink.calls == [
        "open", "write", "write", "flush", "write", "flush", "close"], "once for both marks"


@pytest.mark.parametrize(("overflow", "before"), [("drop_newest", "ab"), ("drop_oldest", "de")])
def test_a_flush_waits_for_what_came_before_and_for_as_many_more_as_were_dropped(
    overflow: str, before: str
) -> None:
    flushed: list[list[str]] = []

    class Noting(FlakySink):
        def flush(self) -> None:
            flushed.append(payloads(self.acknowledged))

    hang = Hang()
    with line(Noting(hang), queue_size=3, overflow=overflow) as it:
        it.say("in flight")
        assert hang.entered.wait(SOON)
        it.say("a", "b")
        mark = it.courier.mark()
        it.say(*"cdef")
        hang.release()
        assert mark.wait(SOON)
    assert flushed == [["in flight", *before]]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_sink_that_refuses_announcements_by_the_batch_gets_its_events_all_the_same(
    batch_size: int,
) -> None:
    def act(events: Sequence[Event], write: Callable[[Sequence[Event]], None]) -> None:
        if all(isinstance(event, LossEvent) for event in events):
            raise PermanentSinkError("not these", concerns="batch")
        write(events)

    sink = FlakySink(Step(act, None))
    with line(sink, batch_size=batch_size) as it:
        it.courier.refuse(OUTPUT, "intake", 7)
        until(lambda: sink.attempts)
        it.say("a")
        sink.sink.wait_for(1, SOON)
        assert it.flush()
    assert payloads(sink.acknowledged) == ["a"] and len(sink.attempts) < 9


def test_a_flush_that_fails_is_told_to_who_flushes() -> None:
    sink = FlakySink(on_flush=[fail()])
    with line(sink) as it:
        it.say("a")
        assert not it.flush()
        assert it.health().last_error == "TemporarySinkError: failing as scripted"
        assert it.flush()


def test_a_close_that_fails_ends_the_sink_all_the_same() -> None:
    sink = FlakySink(on_close=[fail()])
    with line(sink) as it:
        it.say("a")
    assert it.health().state == "closed" and it.health().delivered == 1


# -- opening --


@pytest.mark.parametrize("error", [PermanentSinkError("no such table"), OSError("boom")])
@pytest.mark.leaks_threads(reason="none does: the courier ends by itself, and is joined below")
def test_a_refusal_to_open_is_raised_to_who_registers(error: Exception) -> None:
    sink = FlakySink(on_open=[fail(error=error)])
    it = Line(sink)
    with pytest.raises(SinkError, match=str(error)):
        it.courier.start(SOON)
    it.courier.thread.join(SOON)
    assert sink.calls == ["open"], "an open that raised leaves nothing to close"
    it.say("a")
    assert it.health().dropped_by_reason == {"closed": 1}
    assert not it.courier.mark().wait(SOON)


def test_a_temporary_failure_to_open_is_tried_again_while_events_wait() -> None:
    sink = FlakySink(on_open=[fail(5)])
    with line(sink) as it:
        it.say("a")
        assert it.flush()
        assert it.health().state == "ok"
    assert sink.calls == ["open"] * 6 + ["write", "flush", "close"]


def test_a_sink_that_opens_at_last_is_ok_before_any_event_comes() -> None:
    sink = FlakySink(on_open=[fail(5)])
    with line(sink) as it:
        assert it.flush()
        assert it.health().state == "ok"


def test_a_sink_that_hangs_in_open_holds_up_its_registration_only_for_the_timeout(
        caplog: pytest.LogCaptureFixture) -> None:
    hang = Hang(PermanentSinkError("after all, no"))
    sink = FlakySink(on_open=[hang])
    it = Line(sink)
    it.courier.start(0.05)
    it.say("a")
    assert it.health().pending == 1
    hang.release()
    it.courier.thread.join(SOON)
    assert it.health().dropped_by_reason == {"failed": 1}
    wait_for_reports(time.monotonic() + SOON)
    assert [record.levelno for record in caplog.records if "does not open" in record.message] == [
        logging.ERROR
    ], "nobody is left to be told but the log"


def test_closing_while_the_sink_does_not_open_ends_in_time_with_a_last_attempt() -> None:
    sink = FlakySink(on_open=[fail(None)])
    with line(sink, retry=RetryPolicy(attempts=3, base=1000, cap=1000, jitter="none")) as it:
        it.say("a")
    assert it.health().delivered == 1, "write was the last attempt, and worked"
    assert sink.calls == ["open", "open", "write", "close"]


# -- closing --


def test_closing_delivers_what_waits() -> None:
    hang = Hang()
    sink = FlakySink(hang)
    with line(sink, batch_size=1) as it:
        it.say(*"abcde")
        assert hang.entered.wait(SOON)
        it.courier.close(time.monotonic())
        hang.release()
    assert payloads(sink.acknowledged) == [*"abcde"]


def test_closing_ends_a_wait_for_a_retry_and_gives_each_waiting_batch_one_attempt() -> None:
    sink = FlakySink(fail(None))
    patient = RetryPolicy(attempts=5, base=1000, cap=1000, jitter="none")
    with line(sink, retry=patient, batch_size=2) as it:
        it.say(*"abcd")
        until(lambda: len(sink.attempts) == 1)
    health = it.health()
    assert health.dropped_by_reason == {"failed": 4}
    assert [payloads(batch) for batch in sink.attempts if not losses(batch)] == [
        ["a", "b"],
        ["a", "b"],
    ], "the second batch's attempt ends with the announcement that fails"
    assert sink.calls[-1] == "close"


@pytest.mark.parametrize(("retry_after", "has_been_failing", "is_last"), [
    (None, True, True), (None, False, False), (0.05, True, False), (0.05, False, False)])
def test_a_sink_that_has_failed_for_as_long_as_closing_takes_gets_one_last_attempt(
    retry_after: float | None, has_been_failing: bool, is_last: bool
) -> None:
    sink = FlakySink(fail(None, TemporarySinkError("down", retry_after=retry_after)))
    steady = RetryPolicy(attempts=10 ** 6, base=0.05, cap=0.05, jitter="none")
    with line(sink, retry=steady) as it:
        it.say("a")
        until(lambda: len(sink.attempts) == (30 if has_been_failing else 1))
        before = len(sink.attempts)
        health = it.close(1.2)
    after = len(sink.attempts) - before
    assert after <= 2 if is_last else after >= 3, "one may have been under way"
    assert health.dropped_by_reason == {"failed": 1} and sink.calls[-1] == "close"


def abandoned(sink: FlakySink, hang: Hang, *, batch_size: int = 500, **options: Any) -> Line:
    """Close a courier whose sink hangs; return it once closing has come back, which it does in time
    or never."""
    it = Line(sink, batch_size=batch_size, **options)
    it.courier.start(SOON)
    it.say(*"abcde")
    assert hang.entered.wait(SOON)
    returned = threading.Event()

    def close() -> None:
        it.close(0.2)
        returned.set()

    closer = threading.Thread(target=close, daemon=True)
    closer.start()
    try:
        assert returned.wait(SOON), "closing waits for the sink"
    except BaseException:
        hang.release()
        raise
    return it


def test_a_sink_that_hangs_in_write_is_left_alone_at_the_deadline_and_what_waits_is_counted() -> (
    None
):
    hang = Hang()
    sink = FlakySink(hang)
    it = abandoned(sink, hang, batch_size=2)
    assert (it.health().state, it.health().dropped_by_reason, it.health().pending) == (
        "closed",
        {"closed": 5},
        0,
    )
    hang.release()
    it.courier.thread.join(SOON)
    assert it.health().dropped_by_reason == {
        "closed": 5
    }, "the account is final, whatever the sink does then"
    assert sink.calls[-1] == "close" and len(sink.attempts) == 1


def test_who_waits_in_a_flush_is_told_when_the_sink_is_left_to_itself() -> None:
    hang = Hang()
    sink = FlakySink(work(), hang)
    it = Line(sink)
    it.courier.start(SOON)
    it.say("a")
    it.flush()
    with it.courier._lock:  # so that the mark is there before the record behind it is written
        it.say("b")
        mark = it.courier.mark()
    assert hang.entered.wait(SOON)
    close_all([it.courier], time.monotonic() + 0.1)
    assert not mark.wait(SOON)
    assert mark._settled.is_set()
    hang.release()
    it.courier.thread.join(SOON)


@pytest.mark.parametrize("where", ["on_flush", "on_close"])
def test_a_sink_that_hangs_in_flush_or_close_is_left_to_itself_at_the_deadline(where: str) -> None:
    hang = Hang()
    sink = FlakySink(**{where: [hang]})  # type: ignore[arg-type]
    it = Line(sink)
    it.courier.start(SOON)
    it.say("a")
    mark = it.courier.mark()
    if where == "on_close":
        assert mark.wait(SOON)
        it.courier.close(time.monotonic())
    assert hang.entered.wait(SOON)
    health = it.close(0.1)
    assert (health.state, health.delivered, health.dropped) == ("closed", 1, 0)
    assert mark.wait(SOON) == (where == "on_close")
    hang.release()
    it.courier.thread.join(SOON)


def test_a_crawling_sink_keeps_what_it_took_and_the_rest_is_counted_at_the_deadline() -> None:
    stop = threading.Event()
    third = threading.Event()
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            third.set()
            stop.wait(SOON)

    sink = FlakySink(crawl(50, wait=wait))
    it = Line(sink, batch_size=1)
    it.courier.start(SOON)
    it.say(*"abcde")
    assert third.wait(SOON)
    health = it.close(0.1)
    stop.set()
    it.courier.thread.join(SOON)
    assert (health.delivered, health.dropped_by_reason) == (2, {"closed": 3})
    assert waited[0] == 0.02


def test_hanging_sinks_are_closed_side_by_side_and_a_park_file_gets_its_share_of_the_time(
    tmp_path: Path,
) -> None:
    hangs = [Hang() for _ in range(4)]
    parks = [None, tmp_path / "1", tmp_path / "2", None]
    lines = [Line(FlakySink(hang), park=park) for hang, park in zip(hangs, parks)]
    for it, hang in zip(lines, hangs):
        it.courier.start(SOON)
        it.say(*"abc")
        assert hang.entered.wait(SOON)
    returned = threading.Event()

    def close() -> None:
        close_all([it.courier for it in lines], time.monotonic() + 3)
        returned.set()

    threading.Thread(target=close, daemon=True).start()
    try:
        assert returned.wait(SOON)
        assert [(it.health().parked, it.health().dropped) for it in lines] == [
            (0, 3),
            (3, 0),
            (3, 0),
            (0, 3),
        ]
    finally:
        for hang in hangs:
            hang.release()
    for it in lines:
        it.courier.thread.join(SOON)


# -- what the log says --


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [
        (record.levelno, record.message) for record in caplog.records if record.name == "bgworker"
    ]


def test_a_sink_that_fails_for_long_is_in_the_log_at_first_at_each_loss_and_at_its_recovery(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = FlakySink(fail(20))
    with line(sink) as it:
        it.say("a")
        it.flush()
        it.say("b")
        assert it.flush()
    assert said(caplog) == [
        (
            logging.WARNING,
            "sink 'it' failed, and is tried again: TemporarySinkError: failing as scripted",
        ),
        (logging.ERROR, "sink 'it': 1 events are lost: TemporarySinkError: failing as scripted"),
        (logging.WARNING, "sink 'it' works again"),
    ]


def test_an_overflow_is_in_the_log_and_a_second_one_soon_after_only_at_the_end(
        caplog: pytest.LogCaptureFixture) -> None:
    sink = FlakySink()
    with line(sink, queue_size=1) as it:
        for number in range(3):
            hang = Hang()
            sink.then(hang)
            it.say("in flight")
            assert hang.entered.wait(SOON)
            it.say(*"abc")
            hang.release()
            it.flush()
    assert said(caplog) == [
        (logging.WARNING, "sink 'it': 2 events did not fit and are lost (overflow: 2)"),
        (logging.WARNING, "sink 'it': 4 events did not fit and are lost (overflow: 4)"),
    ]


def test_an_exception_that_cannot_be_shown_does_no_harm() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    with line(FlakySink(fail(error=Odd()))) as it:
        it.say("a")
        assert it.flush()
        assert it.health().last_error == "Odd: (its text cannot be had)"


def test_a_batch_of_announcements_is_no_larger_than_any_other() -> None:
    hang = Hang()
    sink = FlakySink(hang)
    with line(sink, batch_size=1) as it:
        it.say("in flight")
        assert hang.entered.wait(SOON)
        for reason in ("intake", "oversize", "late"):
            it.courier.refuse(OUTPUT, reason, 1)
        it.say("a")
        hang.release()
        assert it.flush()
        assert {len(batch) for batch in sink.attempts} == {1}
        sink.sink.wait_for(5, SOON)
    assert sorted(losses(sink.acknowledged)) == [("intake", 1), ("late", 1), ("oversize", 1)]


def test_who_comes_back_while_the_account_is_being_changed_gets_an_answer() -> None:
    """A finaliser that the garbage collector runs right there: it is on the thread that holds the
    lock."""
    answered = threading.Event()
    with line(MemorySink()) as it:
        def come_back() -> None:
            with it.courier._lock:
                it.courier.health()
                it.courier.mark()
                answered.set()

        thread = threading.Thread(target=come_back, daemon=True)
        thread.start()
        assert answered.wait(SOON), "it waits for itself"
        thread.join(SOON)


def test_finalisers_in_the_midst_of_two_sinks_at_once_wait_for_each_other_a_moment_only() -> None:
    both_are_in = threading.Barrier(2)
    answers: list[SinkHealth] = []
    with line(MemorySink()) as one, line(MemorySink()) as other:
        def finalise(mine: Courier, others: Courier) -> None:
            with mine._lock:
                both_are_in.wait(SOON)
                answers.append(others.health())

        threads = [threading.Thread(target=finalise, args=pair, daemon=True) for pair in
                   ((one.courier, other.courier), (other.courier, one.courier))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
    assert len(answers) == 2, "each waits for the other"

"""Numbering and fanning out, registration, flush and the end; with the whole Scheduler around, and
real sinks."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from bgworker import (
    ConfigurationError,
    EventType,
    LossEvent,
    PermanentSinkError,
    Scheduler,
    ShutdownError,
    SinkError,
    SinkOptions,
    StreamEvent,
    current_task,
)
from bgworker.delivery.backlog import Chunk
from bgworker.delivery.dispatcher import Dispatcher
from bgworker.delivery.intake import RECORD_COST, Intake
from bgworker.delivery.retry import RetryPolicy
from bgworker.delivery.tails import ALL_BYTES, TAIL_BYTES, TAIL_COST
from bgworker.model.records import COMPLETED, CREATED, FAILED, OUTPUT, PROGRESS, STARTED, TaskState
from bgworker.model.reports import wait_for_reports
from bgworker.running.finished import Memory
from bgworker.testing import FlakySink, Hang, MemorySink, fail
from tests.support import balanced, in_time, needs_fork, until

T = TypeVar("T")
SOON = 30.0
FAST = RetryPolicy(attempts=3, base=0.001, cap=0.01)


@pytest.fixture
def pool() -> Iterator[Scheduler]:
    with Scheduler(2, close_timeout=5) as made:
        yield made


def say(pool: Scheduler, *texts: str) -> str:
    def run() -> None:
        for text in texts:
            current_task().output(text)

    task = pool.submit(run)
    task.result(SOON)
    return task.id


# -- numbering, without a thread: the dispatcher's own steps --


class Gatherer:
    """Stands in for a courier: keeps what is put."""

    most_waiting = 100
    room = 1 << 26
    is_this_thread = False
    is_crowded = False
    has_ended = False

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.bytes = 0
        self.refused: list[tuple[int, str, int]] = []
        self.miscounts: list[tuple[str, int, int]] = []
        """What the dispatcher counts unlike the backlog."""

    def put(self, chunk: Any) -> None:
        self.records += chunk.records
        self.bytes += chunk.bytes
        counted = Chunk.of(chunk.records)
        self.miscounts += [
            (name, getattr(chunk, name), getattr(counted, name))
            for name in ("streams", "progress", "bytes", "text")
            if getattr(chunk, name) != getattr(counted, name)
        ]

    def refuse(self, kind: int, reason: str, count: int) -> None:
        self.refused.append((kind, reason, count))


@pytest.fixture
def still() -> Iterator[tuple[Dispatcher, Gatherer]]:
    dispatcher, gatherer = Dispatcher("still", Memory(None, None), 1.0), Gatherer()
    dispatcher.set_consumers((gatherer,))  # type: ignore[arg-type]
    yield dispatcher, gatherer
    assert gatherer.miscounts == []


def test_each_task_is_numbered_from_one_without_a_gap_and_created_stands_for_scheduled_too(
        still: tuple[Dispatcher, Gatherer]) -> None:
    dispatcher, gatherer = still
    one, two = (TaskState(f"{number:032}", "", "", 0) for number in (1, 2))
    intake = dispatcher.intake
    intake.emit_lifecycle(one, CREATED, 1)
    intake.emit_lifecycle(two, CREATED, 2)
    intake.emit(one, OUTPUT, "a")
    intake.emit(two, OUTPUT, "b")
    intake.emit_lifecycle(one, COMPLETED, 3)
    dispatcher._drain()
    assert [(record[0].id[-1], record[1], record[2]) for record in gatherer.records] == [
        ("1", 1, CREATED),
        ("1", 2, CREATED + 1),
        ("2", 1, CREATED),
        ("2", 2, CREATED + 1),
        ("1", 3, OUTPUT),
        ("2", 3, OUTPUT),
        ("1", 4, COMPLETED),
    ]


def test_what_comes_after_the_terminal_event_is_discarded_and_counted_as_late(
        still: tuple[Dispatcher, Gatherer]) -> None:
    dispatcher, gatherer = still
    state = TaskState("1" * 32, "", "", 0)
    for kind in (STARTED, COMPLETED):
        dispatcher.intake.emit_lifecycle(state, kind, 0)
    dispatcher.intake.emit(state, OUTPUT, "late")
    dispatcher.intake.emit_lifecycle(state, COMPLETED, 0)
    dispatcher._drain()
    dispatcher.intake.emit(state, PROGRESS, (1.0, ""))
    dispatcher._drain()
    assert [record[1:3] for record in gatherer.records] == [(1, STARTED), (2, COMPLETED)]
    assert dispatcher.intake.late.read() == 3


def test_the_lines_of_a_block_are_numbered_kept_and_counted_like_single_ones(
        still: tuple[Dispatcher, Gatherer]) -> None:
    dispatcher, gatherer = still
    one, two = (TaskState(f"{number:032}", "", "", 0) for number in (1, 2))
    for state in (one, two):
        dispatcher.intake.emit_lines(state, OUTPUT, ["a", "gr\xfc\xdfe"])
        dispatcher.intake.emit(state, OUTPUT, "c")
    dispatcher.intake.emit_lines(one, OUTPUT, ["d", "e"])
    dispatcher.intake.emit_lifecycle(one, COMPLETED, 0)
    dispatcher.intake.emit_lines(one, OUTPUT, ["late"] * 5)
    dispatcher._drain()
    said = [(record[0].id[-1], record[1], record[4]) for record in gatherer.records]
    assert said == [
        ("1", 1, "a"),
        ("1", 2, "gr\xfc\xdfe"),
        ("1", 3, "c"),
        ("2", 1, "a"),
        ("2", 2, "gr\xfc\xdfe"),
        ("2", 3, "c"),
        ("1", 4, "d"),
        ("1", 5, "e"),
        ("1", 6, None),
    ]
    assert [record[4] for record in one.tail or ()] == ["a", "gr\xfc\xdfe", "c", "d", "e"]
    assert dispatcher.intake.late.read() == 5


@pytest.mark.parametrize("text", ["", "line {}", "z\xe4hle {}"])
def test_of_a_long_block_all_lines_come_and_the_tail_holds_the_newest_without_a_gap(
        still: tuple[Dispatcher, Gatherer], text: str) -> None:
    dispatcher, gatherer = still
    state = TaskState("1" * 32, "", "", 0)
    most = TAIL_BYTES // RECORD_COST
    lines = [text.format(number) for number in range(3 * most)]
    for count in (most - 1, 2, 1, most, most + 100):
        dispatcher.intake.emit_lines(state, OUTPUT, lines[:count])
        dispatcher._drain()
        lines = lines[count:]
        assert state.tail is not None and state.tail_bytes <= TAIL_BYTES
        kept = [record[:2] for record in state.tail]
        assert len(kept) > most // 2
        assert kept == [record[:2] for record in gatherer.records][-len(kept):]
    assert [record[1] for record in gatherer.records] == list(range(1, len(gatherer.records) + 1))
    assert [record[4] for record in gatherer.records[-2:]] == (
        [text.format(3 * most - len(lines) - n) for n in (2, 1)])


@pytest.mark.parametrize(
    "text", ["", "plain", "\0", "a\0b" * 10, "gr\xfc\xdfe", "\ud800", "\U0001f642\0"]
)
def test_every_payload_is_clean_and_counted_as_the_queue_counts_it(
    still: tuple[Dispatcher, Gatherer], text: str
) -> None:
    dispatcher, gatherer = still
    state = TaskState("1" * 32, "", "", 0)
    dispatcher.intake.emit(state, OUTPUT, text)
    dispatcher.intake.emit(
        state, OUTPUT, (text.replace("\0", "").encode(errors="replace").decode(), "json", False, 0)
    )
    dispatcher._drain()  # the check stands in Gatherer.put
    payload = gatherer.records[0][4]
    assert "\0" not in payload and payload.encode().decode() == payload


@pytest.mark.parametrize("text", ["x" * 100, "\0" * 100, "\xfc" * 100, ""])
def test_the_tail_of_a_task_is_bounded_and_holds_the_newest(
    still: tuple[Dispatcher, Gatherer], text: str
) -> None:
    dispatcher, _ = still
    state = TaskState("1" * 32, "", "", 0)
    for _ in range(3_000):
        dispatcher.intake.emit(state, OUTPUT, text)
    dispatcher._drain()
    tail = list(state.tail or ())
    assert 0 <= state.tail_bytes <= TAIL_BYTES
    assert [record[1] for record in tail] == list(range(3_001 - len(tail), 3_001))
    assert 60 < len(tail) <= 256


def test_the_tail_of_a_task_takes_no_more_memory_than_said(
    still: tuple[Dispatcher, Gatherer],
) -> None:
    dispatcher, gatherer = still
    for size in (0, 10, 60, 4_000, 60_000):
        state = TaskState("1" * 32, "", "", 0)
        for number in range(3_000):
            dispatcher.intake.emit_weighed(state, OUTPUT, f"{number:0{size}}")
            if number % 50 == 0:
                dispatcher._drain()
        dispatcher._drain()
        gatherer.records.clear()
        tail = list(state.tail or ())
        taken = sum(sys.getsizeof(part) for record in tail for part in (record, *record[1:]))
        assert (
            taken + 16 * len(tail) <= TAIL_BYTES
        ), "with what the collector puts before each tuple"
        assert taken >= TAIL_BYTES // 3 or size == 60_000


def test_the_newest_event_stays_in_the_tail_however_large(
    still: tuple[Dispatcher, Gatherer],
) -> None:
    dispatcher, _ = still
    state = TaskState("1" * 32, "", "", 0)
    for text in ("small", "x" * (2 * TAIL_BYTES), "y" * (3 * TAIL_BYTES)):
        dispatcher.intake.emit_weighed(state, OUTPUT, text)
        dispatcher._drain()
        assert [record[4] for record in state.tail or ()] == [text]


def test_the_tails_of_all_tasks_together_are_bounded_and_those_go_first_that_spoke_longest_ago(
        still: tuple[Dispatcher, Gatherer]) -> None:
    dispatcher, gatherer = still
    states = [TaskState(f"{number:032}", "", "", 0) for number in range(2_000)]
    for state in (*states, *states[:3]):
        for _ in range(5):
            dispatcher.intake.emit_weighed(state, OUTPUT, "x" * 4_000)
        dispatcher._drain()
        gatherer.records.clear()
    kept = [state for state in states if state.tail is not None]
    assert sum(state.tail_bytes + TAIL_COST for state in kept) <= ALL_BYTES
    assert kept == [*states[:3], *states[-len(kept) + 3:]] and len(kept) > 300
    assert all(state.tail_bytes == 0 for state in states if state.tail is None)


def test_refusals_go_to_every_sink_registered_at_the_time_once(
    still: tuple[Dispatcher, Gatherer],
) -> None:
    dispatcher, first = still
    second = Gatherer()
    dispatcher.intake.refuse(OUTPUT, "intake")
    dispatcher.set_consumers((first, second))  # type: ignore[arg-type]
    dispatcher.intake.refuse(OUTPUT, "intake")
    dispatcher.intake.refuse(OUTPUT, "intake")
    dispatcher._drain()
    dispatcher._drain()
    assert first.refused == [(OUTPUT, "intake", 1), (OUTPUT, "intake", 2)]
    assert second.refused == [(OUTPUT, "intake", 2)]


# -- when it works, and when it sleeps --


def test_it_stays_awake_while_events_flow_and_sleeps_when_they_stop(
    still: tuple[Dispatcher, Gatherer],
) -> None:
    dispatcher, gatherer = still
    state, steps = TaskState("1" * 32, "", "", 0), []

    class Scripted(Intake):
        """Something comes in while it sleeps, and during each of the next three turns; the second
        time it is to end."""

        __slots__ = ()

        def wait(self, backstop: float) -> None:
            dispatcher._is_finishing = "wait" in steps
            steps.append("wait")
            self.emit(state, OUTPUT, "rings")

        def gather(self, seconds: float) -> None:
            steps.append("gather")
            if len(steps) <= 4:
                self.emit(state, OUTPUT, "flows")

    dispatcher.intake = Scripted()
    dispatcher._run()
    assert steps == ["wait", *["gather"] * 4, "wait", "gather"]  # the fourth found nothing
    assert [record[4] for record in gatherer.records] == [
        "rings",
        "flows",
        "flows",
        "flows",
        "rings",
    ]


# -- the order that sinks see --


def test_every_sink_sees_the_same_order_and_each_task_gap_free_with_its_terminal_event_last() -> (
    None
):
    sinks = [MemorySink() for _ in range(3)]

    def chat() -> None:
        said = threading.Barrier(3)

        def say_some() -> None:
            said.wait(SOON)
            for number in range(200):
                context.output(str(number))

        context = current_task()
        threads = [threading.Thread(target=say_some) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
            assert not thread.is_alive()

    with Scheduler(8, sinks=sinks) as pool:
        tasks = [pool.submit(chat) for _ in range(16)]
        for task in tasks:
            task.result(SOON)
        assert pool.flush(SOON)
    order = [(event.task_id, event.seq) for event in sinks[0].events]  # type: ignore[union-attr]
    assert len(order) == 16 * (4 + 3 * 200)
    for sink in sinks[1:]:
        assert [(event.task_id, event.seq) for event in sink.events] == order  # type: ignore
    for task in tasks:
        assert [seq for task_id, seq in order if task_id == task.id] == list(range(1, 605))
    last = {event.task_id: event.type for event in sinks[0].events}  # type: ignore[union-attr]
    assert set(last.values()) == {EventType.TASK_COMPLETED}


def test_oversize_payloads_are_refused_counted_and_announced_if_told_so() -> None:
    for _ in range(20):  # right after its registration, too, a refusal counts for the sink
        sink = MemorySink()
        with Scheduler(1, max_payload=64, oversize="reject") as pool:
            pool.register_sink(
                sink, name="it", options=SinkOptions(types=["TaskOutput", "EventsLost"])
            )
            say(pool, "x" * 65, "short")
            assert not pool.flush(SOON)
            sink.wait_for(2, SOON)
        assert pool.sinks["it"].dropped_by_reason == {"oversize": 1}
        assert [event.reason for event in sink.events if isinstance(event, LossEvent)] == [
            "oversize"
        ]
        assert [event.payload for event in sink.events if isinstance(event, StreamEvent)] == [
            "short"
        ]


# -- one sink does not hurt another, nor the tasks --


def test_a_hanging_sink_holds_up_neither_the_tasks_nor_a_healthy_sink(pool: Scheduler) -> None:
    hang, healthy = Hang(), MemorySink()
    pool.register_sink(FlakySink(hang), name="hanging")
    pool.register_sink(healthy, name="healthy")
    try:
        for number in range(50):
            say(pool, str(number))
        healthy.wait_for(50 * 5, SOON)
        # the account follows a moment after the write
        until(lambda: not pool.sinks["healthy"].pending)
        assert pool.sinks["hanging"].pending == 250
    finally:
        hang.release()


def test_flush_returns_by_its_timeout_though_a_sink_hangs_and_tells_what_waits(
    pool: Scheduler,
) -> None:
    hang, healthy = Hang(), MemorySink()
    pool.register_sink(FlakySink(hang), name="hanging")
    pool.register_sink(healthy, name="healthy")
    try:
        say(pool, "a")
        report = in_time(lambda: pool.flush(0.1))
        assert not report and not report.done
        assert report.pending == {"hanging": 5, "healthy": 0}
        assert len(healthy.events) == 5 and healthy.flushes == 1
    finally:
        hang.release()
    assert in_time(lambda: pool.flush(SOON))


def test_flush_is_true_though_more_is_emitted_all_the_time(pool: Scheduler) -> None:
    sink = MemorySink()
    pool.register_sink(sink, name="it")
    stop = threading.Event()

    def chat() -> None:
        while not stop.is_set():
            current_task().output("on and on")
            time.sleep(0.0005)

    pool.submit(chat)
    try:
        for _ in range(20):
            report = in_time(lambda: pool.flush(SOON))
            assert report and report.pending == {"it": 0}
    finally:
        stop.set()


def test_a_flush_without_timeout_comes_back_when_the_sink_that_it_waits_for_is_unregistered(
    pool: Scheduler,
) -> None:
    hang = Hang()
    pool.register_sink(FlakySink(hang), name="hanging")
    say(pool, "a")
    reports: list[bool] = []
    flusher = threading.Thread(target=lambda: reports.append(bool(pool.flush())))
    try:
        flusher.start()
        assert hang.entered.wait(SOON)
        in_time(lambda: pool.unregister_sink("hanging", timeout=0.1))
        flusher.join(SOON)
        assert reports == [False]
    finally:
        hang.release()


def test_unregister_returns_by_its_timeout_with_the_final_account(pool: Scheduler) -> None:
    hang = Hang()
    pool.register_sink(FlakySink(hang), name="hanging")
    say(pool, "a")
    try:
        health = in_time(lambda: pool.unregister_sink("hanging", timeout=0.1))
        assert balanced(health)
        assert (health.state, health.pending, health.dropped_by_reason) == (
            "closed",
            0,
            {"closed": 5},
        )
        assert "hanging" not in pool.sinks
        say(pool, "b")
    finally:
        hang.release()


def test_shutdown_returns_in_time_though_several_sinks_hang_fail_and_crawl() -> None:
    hangs = [Hang() for _ in range(5)]
    stop = threading.Event()
    pool = Scheduler(1, close_timeout=0.5)
    for number, hang in enumerate(hangs):
        pool.register_sink(FlakySink(hang), name=f"hanging-{number}")
    pool.register_sink(
        FlakySink(fail(None)),
        name="failing",
        options=SinkOptions(retry=RetryPolicy(base=1000, cap=1000)),
    )
    healthy = MemorySink()
    pool.register_sink(healthy, name="healthy")
    say(pool, *"abc")
    began = time.monotonic()
    try:
        in_time(pool.shutdown)
        assert time.monotonic() - began < 10, "one deadline covers all sinks: 0.5 s here"
        assert all(
            balanced(health) and health.pending == 0 and health.state == "closed"
            for health in pool.sinks.values()
        )
        assert pool.sinks["healthy"].delivered == len(healthy.events) == 7
        assert pool.sinks["failing"].dropped_by_reason == {"failed": 7}
        assert pool.sinks["hanging-4"].dropped_by_reason == {"closed": 7}
    finally:
        stop.set()
        for hang in hangs:
            hang.release()


# -- registration --


def test_a_sink_gets_what_is_emitted_from_its_registration_on(pool: Scheduler) -> None:
    say(pool, "before")
    sink = MemorySink()
    name = pool.register_sink(sink)
    say(pool, "after")
    assert pool.flush(SOON)
    assert {event.payload for event in sink.events if isinstance(event, StreamEvent)} == {
        "after"
    }
    assert name == "memory"


def test_names_are_made_unique_and_a_taken_one_is_refused(pool: Scheduler) -> None:
    assert [pool.register_sink(MemorySink()) for _ in range(3)] == [
        "memory",
        "memory-2",
        "memory-3",
    ]
    with pytest.raises(ConfigurationError, match="a sink called 'memory' is registered already"):
        pool.register_sink(MemorySink(), name="memory")
    pool.unregister_sink("memory")
    assert pool.register_sink(MemorySink(), name="memory") == "memory"


def test_a_sink_that_refuses_to_open_is_not_registered_and_its_name_stays_free(
    pool: Scheduler,
) -> None:
    with pytest.raises(PermanentSinkError, match="no such table"):
        pool.register_sink(
            FlakySink(on_open=[fail(error=PermanentSinkError("no such table"))]), name="it"
        )
    assert "it" not in pool.sinks
    pool.register_sink(MemorySink(), name="it")


@pytest.mark.parametrize("sink", [object(), MemorySink, None, 3])
def test_what_is_no_sink_is_refused(pool: Scheduler, sink: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"expected an object with write\(events\) and close\(\)"
    ):
        pool.register_sink(sink)


def test_settings_of_a_specification_are_refused_beside_a_sink(pool: Scheduler) -> None:
    with pytest.raises(ConfigurationError, match="give them to the constructor of MemorySink"):
        pool.register_sink(MemorySink(), path="x")


def test_an_unknown_sink_cannot_be_unregistered(pool: Scheduler) -> None:
    with pytest.raises(KeyError):
        pool.unregister_sink("nobody")


def test_sinks_come_and_go_while_tasks_talk_and_every_account_balances() -> None:
    with Scheduler(4) as pool:
        stop = threading.Event()

        def chat() -> None:
            while not stop.is_set():
                current_task().output("x")
                time.sleep(0.0001)

        for _ in range(4):
            pool.submit(chat)
        try:
            for _ in range(10):
                sink = FlakySink(fail(1))
                name = pool.register_sink(sink, options=SinkOptions(retry=FAST, queue_size=500))
                health = in_time(lambda: pool.unregister_sink(name, timeout=SOON))
                assert balanced(health) and health.pending == 0 and health.state == "closed"
                assert health.delivered == sum(
                    not isinstance(event, LossEvent) for event in sink.acknowledged
                )
        finally:
            stop.set()


# -- the end --


def test_after_shutdown_the_final_account_is_there_and_nothing_more_is_taken() -> None:
    sink = MemorySink()
    pool = Scheduler(1, sinks=[sink])
    say(pool, "a")
    pool.shutdown()
    assert (pool.sinks["memory"].state, pool.sinks["memory"].delivered) == ("closed", 5)
    assert not sink.is_open
    with pytest.raises(ShutdownError):
        pool.register_sink(MemorySink())
    assert in_time(lambda: pool.flush(SOON)).pending == {"memory": 0}
    assert in_time(lambda: pool.unregister_sink("memory")).state == "closed"


def test_a_scheduler_that_was_shut_down_unused_starts_no_thread_any_more() -> None:
    before = threading.active_count()
    pool = Scheduler(1)
    pool.shutdown()
    with pytest.raises(ShutdownError):
        pool.submit(len, "")
    with pytest.raises((ShutdownError, SinkError)):
        pool.register_sink(MemorySink())
    until(lambda: threading.active_count() <= before)


def test_a_call_that_slips_in_behind_the_last_look_at_the_intake_is_answered_all_the_same() -> None:
    pool = Scheduler(1, sinks=[MemorySink()])
    task_id = say(pool, "a")
    intake = pool._dispatcher.intake

    class Slow(Intake):
        """Preempted between its look at the closed flag and the append, until all is over."""

        __slots__ = ()

        def post(self, action: Callable[[], object]) -> bool:
            if action == pool._dispatcher._close_intake:
                return super().post(action)
            pool.shutdown()
            self._records.append((None, 0, 0, action))
            return True

    intake.__class__ = Slow
    assert in_time(lambda: pool.get(task_id)).last_seq == 5


def test_emitting_from_inside_a_sink_reaches_the_sinks_and_deadlocks_nothing() -> None:
    said: list[str] = []

    class Chatty(MemorySink):
        def write(self, events: Any) -> None:
            super().write(events)
            if len(said) < 100:
                said.append("x")
                context[0].output("from the sink")

    context: list[Any] = []
    sink, done = Chatty(), threading.Event()

    def run() -> None:
        context.append(current_task())
        current_task().output("start")
        assert done.wait(SOON)

    with Scheduler(1, sinks=[sink]) as pool:
        pool.submit(run)
        sink.wait_for(50, SOON)
        done.set()
    assert balanced(pool.sinks["chatty"]) and pool.sinks["chatty"].pending == 0


def test_a_defect_in_the_dispatcher_is_reported_and_the_next_events_are_delivered(
        pool: Scheduler, caplog: pytest.LogCaptureFixture) -> None:
    sink = MemorySink()
    pool.register_sink(sink)
    pool._dispatcher.intake.post(lambda: 1 / 0)
    pool.flush(SOON)
    wait_for_reports(time.monotonic() + SOON)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "ZeroDivisionError" in caplog.text
    say(pool, "a")
    assert pool.flush(SOON) and len(sink.events) == 5


# -- fork --

@needs_fork
def test_a_forked_child_starts_with_an_empty_account_and_the_parents_tasks_are_silent_there(
    tmp_path: Path,
) -> None:
    sink = MemorySink()
    with Scheduler(1, sinks=[sink]) as pool:
        say(pool, "parent")
        forked = threading.Event()
        pids: list[int] = []

        def fork_inside() -> None:
            context = current_task()
            pid = os.fork()
            if pid:
                pids.append(pid)
                forked.set()
                return
            code = 1
            try:
                context.output("silent: the parent's task, in the child")
                health = pool.sinks["memory"]
                assert (health.emitted, health.pending, health.state) == (0, 0, "ok")
                say(pool, "child")
                assert pool.flush(SOON)
                assert [event.seq for event in sink.events] == [1, 2, 3, 4, 5]  # type: ignore
                pool.shutdown()
                assert pool.sinks["memory"].delivered == 5
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                os._exit(code)

        pool.submit(fork_inside).result(SOON)
        assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
        assert pool.flush(SOON)
        assert pool.sinks["memory"].delivered == 5 + 4


@needs_fork
def test_a_parents_task_that_ends_in_a_forked_child_ends_unsaid_there(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    pool = Scheduler(1, sinks=[f"jsonl:{path}"])
    pids: list[int] = []

    def leave() -> None:
        task.wait(SOON)
        pool.shutdown()
        os._exit(0)

    def fork_inside() -> None:
        pool.flush(SOON)  # so that the start has its number
        if pid := os.fork():
            pids.append(pid)
        else:
            pool.submit(int).result(SOON)
            threading.Thread(target=leave).start()

    task = pool.submit(fork_inside)
    task.result(SOON)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
    pool.shutdown()
    events = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for id_ in {each["task_id"] for each in events}:
        assert [each["seq"] for each in events if each["task_id"] == id_] == [1, 2, 3, 4]
    assert len(events) == 8


def test_an_end_that_nobody_hears_of_leaves_nothing_in_the_account_of_bytes(
        still: tuple[Dispatcher, Gatherer]) -> None:
    dispatcher, gatherer = still
    dispatcher.intake.emit_lifecycle(TaskState("1" * 32, "", "", 0), COMPLETED, 1)
    failed = TaskState("2" * 32, "", "", 0)
    failed.failure_type, failed.failure_message, failed.arguments = "E", "no" * 100, "[]"
    for kind in (CREATED, STARTED, FAILED):
        dispatcher.intake.emit_lifecycle(failed, kind, 1)
    dispatcher._drain()  # the check stands in Gatherer.put
    assert len(gatherer.records) == 4


# -- tasks that end while nobody listens --


def test_who_begins_to_listen_while_a_task_ends_unheard_hears_of_its_end_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory_sink = MemorySink()
    with Scheduler(1) as pool:
        note, task, bound = pool._memory.note, [], []

        def register_meanwhile(state: TaskState) -> None:
            monkeypatch.undo()
            note(state)
            pool.register_sink(memory_sink)
            bound.append(pool.subscribe(task=state.id))

        monkeypatch.setattr(pool._memory, "note", register_meanwhile)
        task.append(pool.submit(int))
        assert task[0].result() == 0
        deadline = time.monotonic() + 30
        while not bound and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [(each.type, each.seq) for each in bound[0]] == [("TaskCompleted", 4)]
    assert [(each.type, each.seq) for each in memory_sink.events] == [("TaskCompleted", 4)]
    assert (health := pool.sinks[next(iter(pool.sinks))]).delivered == health.emitted == 1


def test_a_task_that_has_said_something_ends_after_it_though_nobody_listens() -> None:
    def speak() -> None:
        current_task().output("a")

    with Scheduler(1) as pool:
        task = pool.submit(speak)
        task.result()
        assert [each.payload for each in task.streams()] == ["a"]
        assert pool.get(task.id).last_seq == 5
        assert pool.health().late_events == 0

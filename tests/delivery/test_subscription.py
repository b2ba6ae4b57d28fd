"""Subscriptions: events for a program that looks at them itself."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
import time

import pytest

from bgworker import ConfigurationError, Scheduler, TaskCancelled, current_task, shell
from bgworker.delivery import patience
from bgworker.model.events import Event, StreamEvent
from bgworker.model.records import Batch
from bgworker.model.reports import wait_for_reports

LONG = 60.0


def say(count: int = 3) -> None:
    for number in range(count):
        current_task().output(str(number))


def types(events: object) -> list[str]:
    return [each.type.value for each in events]  # type: ignore[attr-defined]


def test_a_subscription_to_a_task_ends_with_its_terminal_event() -> None:
    gate = threading.Event()

    def talk() -> None:
        assert gate.wait(LONG)
        say(2)

    with Scheduler(1) as pool:
        task = pool.submit(talk)
        with pool.subscribe(task=task) as subscription:
            gate.set()
            assert types(subscription)[-3:] == ["TaskOutput", "TaskOutput", "TaskCompleted"]
        assert subscription.is_closed


def test_a_subscription_to_a_task_that_has_ended_tells_what_is_in_memory_and_ends() -> None:
    with Scheduler(1) as pool:
        task = pool.submit(say)
        task.result(LONG)
        pool.flush(LONG)
        assert types(pool.subscribe(task=task.id)) == ["TaskOutput"] * 3 + ["TaskCompleted"]


def test_it_ends_with_the_task_even_if_the_terminal_event_is_filtered_out() -> None:
    with Scheduler(1) as pool:
        assert (
            types(pool.subscribe(task=pool.submit(say), types=["TaskOutput"])) == ["TaskOutput"] * 3
        )


def test_a_subscription_to_all_ends_with_the_scheduler() -> None:
    with Scheduler(1) as pool:
        subscription = pool.subscribe()
        pool.submit(say).result(LONG)
    assert types(subscription) == [
        "TaskCreated",
        "TaskScheduled",
        "TaskStarted",
        *["TaskOutput"] * 3,
        "TaskCompleted",
    ]


def test_poll_never_waits_and_get_waits_no_longer_than_asked() -> None:
    with Scheduler(1) as pool:
        subscription = pool.subscribe()
        assert subscription.poll() == [] and subscription.get(0.01) is None
        pool.submit(say).result(LONG)
        pool.flush(LONG)
        assert types(subscription.poll(2)) == ["TaskCreated", "TaskScheduled"]
        assert len(subscription.poll()) == 5


def test_a_batch_comes_whole_or_in_parts_and_builds_an_event_when_it_is_looked_at() -> None:
    with Scheduler(1) as pool, pool.subscribe(types=["TaskOutput"]) as subscription:
        assert not subscription.batch(timeout=0.01)
        pool.submit(say, 5).result(30)
        first, rest = subscription.batch(2, 30), subscription.batch(timeout=30)
        while len(rest) < 3:
            rest = Batch([*rest.records, *subscription.batch(timeout=30).records])
    assert [len(first), len(rest), len(subscription.batch())] == [2, 3, 0]
    assert [record[4] for record in first.records] == [getattr(each, "payload") for each in first]
    health = subscription.health()
    assert (health.emitted, health.delivered, health.pending) == (5, 5, 0)


def test_a_reader_that_never_reads_loses_the_oldest_counted_and_keeps_nobody_waiting() -> None:
    with Scheduler(1) as pool:
        subscription = pool.subscribe(maxsize=10)
        pool.submit(say, 100).result(LONG)
        pool.flush(LONG)
        health = subscription.health()
        assert (health.emitted, health.dropped, health.pending) == (104, 90, 14)
        said = [each.payload for each in subscription.poll() if isinstance(each, StreamEvent)]
        assert said == [str(number) for number in range(90, 100)]
        health = subscription.health()
        assert (
            health.emitted == health.delivered + health.coalesced + health.dropped + health.pending
        )


def test_a_callback_runs_on_a_thread_of_its_own_and_what_it_raises_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[tuple[str, str]] = []

    def callback(event: StreamEvent) -> None:
        seen.append((event.payload, threading.current_thread().name))
        if event.payload == "1":
            raise ValueError("boom")

    with caplog.at_level(logging.ERROR, "bgworker"), Scheduler(1, name="mine") as pool:
        pool.subscribe(callback, types=["TaskOutput"])  # type: ignore[arg-type]
        pool.submit(say).result(LONG)
    assert [payload for payload, _ in seen] == ["0", "1", "2"]
    assert {name for _, name in seen} == {"mine-subscription-1"}
    assert "boom" in caplog.text


def test_after_close_nothing_more_comes_and_what_was_emitted_before_can_be_read() -> None:
    with Scheduler(1) as pool:
        subscription = pool.subscribe()
        pool.submit(say).result(LONG)
        subscription.close()
        pool.submit(say).result(LONG)
        assert len(list(subscription)) == 7


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(1),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
        concurrent.futures.CancelledError(),
        TaskCancelled("own"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_whatever_a_callback_raises_is_logged_and_the_next_event_follows(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[Event] = []

    def callback(event: Event) -> None:
        got.append(event)
        raise error

    with Scheduler(1) as pool:
        pool.subscribe(callback)
        pool.submit(len, "").result(LONG)
    assert len(got) == 4
    wait_for_reports(time.monotonic() + LONG)
    assert caplog.text.count("the callback of") == 4


def test_a_callback_that_hangs_holds_up_neither_tasks_nor_the_shutdown() -> None:
    go_on = threading.Event()
    pool = Scheduler(1, close_timeout=0.2)
    pool.subscribe(lambda event: go_on.wait(LONG))
    try:
        pool.submit(say, 1000).result(LONG)
        pool.shutdown()
    finally:
        go_on.set()
    for thread in threading.enumerate():
        if "subscription" in thread.name:
            thread.join(LONG)


@pytest.mark.parametrize("back_pressure", [True, False])
def test_a_command_waits_for_a_reader_that_asked_for_it_and_for_no_other(
    back_pressure: bool,
) -> None:
    count = 5_000
    with Scheduler(1) as pool:
        subscription = pool.subscribe(
            types=["TaskOutput"], maxsize=400, back_pressure=back_pressure
        )
        task = pool.submit(shell(["seq", str(count)]))
        said: list[str] = []
        while not task.done():
            said += [
                each.payload for each in subscription.poll(50) if isinstance(each, StreamEvent)
            ]
            time.sleep(0.0005)
        pool.flush(LONG)
        said += [each.payload for each in subscription.poll() if isinstance(each, StreamEvent)]
        health = subscription.health()
        assert health.emitted == health.delivered + health.dropped == count
        assert len(said) == health.delivered == count - health.dropped
        assert (said == [str(number) for number in range(1, count + 1)]) is back_pressure
        assert (health.dropped == 0) is back_pressure


def test_a_function_does_not_wait_for_a_reader_with_back_pressure() -> None:
    with Scheduler(1) as pool:
        subscription = pool.subscribe(types=["TaskOutput"], maxsize=100, back_pressure=True)
        pool.submit(say, 5000).result(LONG)
        pool.flush(LONG)
        assert subscription.health().dropped == 4900


def test_a_command_ends_although_a_reader_with_back_pressure_never_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.3)
    with Scheduler(1) as pool:
        subscription = pool.subscribe(types=["TaskOutput"], maxsize=100, back_pressure=True)
        assert pool.submit(shell(["seq", "2000"])).result(LONG) == 0
        pool.flush(LONG)
        health = subscription.health()
        assert health.emitted == 2000 == health.dropped + health.pending


def test_wrong_arguments_are_refused_with_the_value() -> None:
    with Scheduler(1) as pool:
        with pytest.raises(
            ConfigurationError, match="maxsize: expected a whole number >= 1, got 0"
        ):
            pool.subscribe(maxsize=0)
        with pytest.raises(
            ConfigurationError, match="callback: expected a callable or None, got 5"
        ):
            pool.subscribe(5)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="'Nope'"):
            pool.subscribe(types=["Nope"])
        with pytest.raises(KeyError):
            pool.subscribe(task="0" * 32)


def test_the_dispatcher_lets_go_of_subscriptions_that_have_ended() -> None:
    with Scheduler(2) as pool:
        for _ in range(20):
            assert types(pool.subscribe(task=pool.submit(say, 1)))[-1] == "TaskCompleted"
        seen: list[str] = []
        pool.subscribe(lambda event: seen.append(event.type.value), task=pool.submit(say, 1))
        standing = pool.subscribe()
        deadline = time.monotonic() + LONG
        while len(pool._dispatcher.consumers) > 1:
            # the callback's goes with the next drain after its thread's end
            assert time.monotonic() < deadline, pool._dispatcher.consumers
            pool.submit(say, 0).result()
            pool.flush()
        assert pool._dispatcher.consumers == (standing,) and seen[-1] == "TaskCompleted"


def test_a_task_of_another_scheduler_cannot_be_subscribed_to() -> None:
    with Scheduler(1) as pool, Scheduler(1) as other:
        task = other.submit(say)
        with pytest.raises(KeyError, match=task.id):
            pool.subscribe(task=task)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_inherited_subscription_has_ended_in_a_forked_child() -> None:
    with Scheduler(1) as pool:
        subscription = pool.subscribe()
        pool.submit(say).result()
        child = os.fork()
        if child == 0:
            os._exit(0 if subscription.is_closed and list(subscription) is not None else 1)
        deadline = time.monotonic() + LONG
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < deadline, os.kill(child, 9)
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(ended[1]) == 0
        pool.flush()
        assert not subscription.is_closed and subscription.poll()


def test_the_shutdown_waits_for_a_callback_that_is_told_of_a_task_that_had_ended() -> None:
    seen: list[str] = []

    def callback(event: Event) -> None:
        time.sleep(0.02)
        seen.append(event.type.value)

    with Scheduler(1) as pool:
        task = pool.submit(say, 5)
        task.result(LONG)
        pool.flush(LONG)
        pool.subscribe(callback, task=task)
    assert seen == ["TaskOutput"] * 5 + ["TaskCompleted"]

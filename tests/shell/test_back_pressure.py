"""A chatty command loses nothing: it is read no faster than the healthy sinks keep up, and no
slower for the others.

Each test has a real scheduler, real children and real threads; what a gate is worth shows in the
twin that opens it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from itertools import chain, zip_longest
from pathlib import Path

import pytest
from tests.support import until

from bgworker import (
    Event,
    JsonlSink,
    Scheduler,
    SinkOptions,
    StreamEvent,
    TaskTimedOut,
    current_task,
    shell,
)
from bgworker.running.context import TaskContext
from bgworker.delivery import patience

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the children are POSIX commands")

WAIT = 120.0
COUNT = 300_000
SMALL = SinkOptions(queue_size=500)


class Store:
    """Keeps the payloads of each task; spends a while on each batch, and on each event."""

    def __init__(self, per_batch: float = 0.0, per_event: float = 0.0) -> None:
        self.per_batch = per_batch
        self.per_event = per_event
        self.payloads: dict[str, list[str]] = defaultdict(list)
        self.is_free = threading.Event()

    def write(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, StreamEvent):
                self.payloads[event.task_id].append(event.payload)
        self.is_free.wait(self.per_batch + self.per_event * len(events))

    def close(self) -> None:
        pass


class Hanging(Store):
    """Does not return from its first `write` with an output until it is set free."""

    def write(self, events: Sequence[Event]) -> None:
        super().write(events)
        if self.payloads:
            assert self.is_free.wait(WAIT)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open the gate for good."""
    monkeypatch.setattr(TaskContext, "_wait_for_room", lambda self, size: 1000)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have sinks that hang waited for in a tenth of the time."""
    monkeypatch.setattr(patience, "PATIENCE", 0.5)


def numbers(last: int) -> list[str]:
    return [str(n) for n in range(1, last + 1)]


def seq(last: int) -> Callable[[], int]:
    return shell(["seq", "1", str(last)])


def written(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            wire = json.loads(line)
            if wire["type"] == "TaskOutput":
                yield wire["payload"]


# What healthy sinks get


def test_a_chatty_command_loses_no_line_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    with Scheduler(1, sinks=[JsonlSink(path)]) as pool:
        assert pool.submit(seq(COUNT)).result(WAIT) == 0
        assert pool.flush(WAIT)
    assert list(written(path)) == numbers(COUNT)


def test_without_the_gate_it_loses_lines(opened: None) -> None:
    store = Store(per_batch=0.02)
    with Scheduler(1) as pool:
        name = pool.register_sink(store, options=SMALL)
        task = pool.submit(seq(20_000))
        assert task.result(WAIT) == 0
        assert not pool.flush(WAIT)
        health = pool.sinks[name]
    assert health.dropped + len(store.payloads[task.id]) == 20_000
    assert health.dropped > 1000


def test_a_chatty_command_loses_no_line_in_a_slow_sink_with_a_small_queue() -> None:
    store = Store(per_batch=0.02)
    with Scheduler(1) as pool:
        name = pool.register_sink(store, options=SMALL)
        task = pool.submit(seq(20_000))
        assert task.result(WAIT) == 0
        assert pool.flush(WAIT)
        assert pool.sinks[name].dropped == 0
    assert store.payloads[task.id] == numbers(20_000)


@pytest.mark.slow
def test_a_million_lines_lose_nothing_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    with Scheduler(1, sinks=[JsonlSink(path)]) as pool:
        pool.submit(seq(1000)).result(WAIT)
        before, peak = resident(), 0
        task = pool.submit(seq(1_000_000))
        while not task.wait(0.05):
            peak = max(peak, resident())
        assert pool.flush(WAIT)
    assert peak - before < 64 * 1024 * 1024
    for found, expected in zip_longest(written(path), chain(range(1, 1001), range(1, 1_000_001))):
        assert found == str(expected)


def resident() -> int:
    """Return the memory that this process has in use, in bytes; 0 where it cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def test_eight_chatty_commands_on_four_workers_lose_nothing(tmp_path: Path) -> None:
    path, store = tmp_path / "all.jsonl", Store(per_batch=0.01)
    with Scheduler(4, sinks=[JsonlSink(path)]) as pool:
        pool.register_sink(store, options=SMALL)
        tasks = [pool.submit(seq(5_000)) for _ in range(8)]
        assert [task.result(WAIT) for task in tasks] == [0] * 8
        assert pool.flush(WAIT)
    assert [store.payloads[task.id] for task in tasks] == [numbers(5_000)] * 8
    assert len(list(written(path))) == 40_000


def test_both_streams_of_a_command_lose_nothing() -> None:
    store = Store(per_batch=0.02)
    with Scheduler(1) as pool:
        pool.register_sink(store, options=SMALL)
        task = pool.submit(shell("seq 1 5000 & seq 5001 10000 >&2; wait"))
        assert task.result(WAIT) == 0
        assert pool.flush(WAIT)
    assert sorted(map(int, store.payloads[task.id])) == list(range(1, 10_001))


def test_a_sink_that_gathers_does_not_let_a_command_wait_for_the_rest_of_its_batch() -> None:
    store = Store()
    with Scheduler(1) as pool:
        pool.register_sink(store, options=SinkOptions(queue_size=500, linger=600.0))
        task = pool.submit(seq(3_000))
        assert task.result(WAIT) == 0
        assert pool.flush(WAIT)
    assert store.payloads[task.id] == numbers(3_000)


def test_what_a_filter_still_has_to_write_when_its_shell_has_exited_is_not_lost() -> None:
    # so that one pipe full of lines takes longer than the filter may linger
    store = Store(per_batch=0.1)
    with Scheduler(1) as pool:
        pool.register_sink(store, options=SMALL)
        task = pool.submit(shell("seq -f %0100.0f 1 4000 | cat & sleep 0.1"))
        assert task.result(WAIT) == 0
        assert pool.flush(WAIT)
    assert [int(line) for line in store.payloads[task.id]] == list(range(1, 4001))


# Who does not wait, or not long


def test_a_callable_never_waits() -> None:
    def talk() -> None:
        for n in range(50_000):
            current_task().output(n)

    store = Hanging()
    with Scheduler(1) as pool:
        name = pool.register_sink(store, options=SMALL)
        try:
            pool.submit(talk).result(WAIT)
            assert not store.is_free.is_set()
        finally:
            store.is_free.set()
        assert not pool.flush(WAIT)
        assert pool.sinks[name].dropped > 0


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_command_that_waits_for_a_sink_is_ended_at_once(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 3600.0)
    store = Hanging()
    with Scheduler(1) as pool:
        pool.register_sink(store, options=SMALL)
        try:
            task = pool.options(timeout=1.0 if how == "timeout" else None).submit(shell(["yes"]))
            if how == "cancel":
                until(lambda: pool._dispatcher.intake.is_crowded)
                assert task.running()
                task.cancel()
            with pytest.raises(CancelledError if how == "cancel" else TaskTimedOut):
                task.result(WAIT)
        finally:
            store.is_free.set()


@pytest.mark.parametrize("is_bounded", [True, False])
def test_a_sink_that_hangs_costs_a_command_lines_and_not_its_end(
    is_bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 3600.0)
    if not is_bounded:
        monkeypatch.setattr(TaskContext, "_has_time_to_wait", True)
    store = Hanging()
    with Scheduler(1) as pool:
        name = pool.register_sink(store, options=SMALL)
        try:
            task = pool.options(timeout=8.0 if is_bounded else 1.0).submit(seq(20_000))
            if is_bounded:
                assert task.result(WAIT) == 0
                until(lambda: pool.sinks[name].dropped > 0)
            else:
                with pytest.raises(TaskTimedOut):
                    task.result(WAIT)
        finally:
            store.is_free.set()


def test_a_command_ends_beside_a_sink_that_hangs_and_one_that_crawls(
    impatient: None, tmp_path: Path
) -> None:
    path, hanging, crawling = tmp_path / "all.jsonl", Hanging(), Store(per_event=1.0)
    with Scheduler(1, sinks=[JsonlSink(path)]) as pool:
        stuck = pool.register_sink(hanging)
        slow = pool.register_sink(crawling, options=SinkOptions(queue_size=5_000, batch_size=1))
        try:
            assert pool.submit(seq(COUNT)).result(WAIT) == 0
            assert pool.unregister_sink("jsonl", timeout=WAIT).dropped == 0
            assert pool.sinks[stuck].dropped > 0 < pool.sinks[slow].dropped
        finally:
            hanging.is_free.set()
            crawling.is_free.set()
    assert list(written(path)) == numbers(COUNT)


@pytest.mark.slow
def test_a_sink_that_hung_for_a_while_is_waited_for_again(impatient: None) -> None:
    store = Hanging()
    with Scheduler(1) as pool:
        name = pool.register_sink(store, options=SMALL)
        try:
            pool.submit(seq(5_000)).result(WAIT)
        finally:
            store.is_free.set()
        assert not pool.flush(WAIT)
        lost = pool.sinks[name].dropped
        task = pool.submit(seq(50_000))
        assert task.result(WAIT) == 0
        pool.flush(WAIT)
        assert pool.sinks[name].dropped == lost
    assert store.payloads[task.id] == numbers(50_000)

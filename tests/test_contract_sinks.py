"""One suite over all sinks: each keeps the contract, alone and in a Scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bgworker import (
    Event,
    EventType,
    HookSink,
    JsonlSink,
    Scheduler,
    SinkOptions,
    SqliteSink,
    WebhookSink,
    current_task,
)
from bgworker.model import wire
from bgworker.testing import FlakySink, MemorySink, check_sink
from tests.receiver import SECRET, Receiver, judge

from tests.reading import events_of

SOON = 30.0


class Kind(NamedTuple):
    """How to make a sink in a folder, and to read what such sinks have taken in; None for those
    that keep nothing."""

    make: Callable[[Path], Any]
    read_back: Callable[[Any], Iterable[Event]] | None
    is_idempotent: bool = False


class AsyncMemorySink:
    """As much async as a sink can be."""

    def __init__(self) -> None:
        self.memory = MemorySink()

    async def open(self) -> None:
        self.lock = asyncio.Lock()

    async def write(self, events: Sequence[Event]) -> None:
        await asyncio.sleep(0)
        self.memory.write(events)

    async def flush(self) -> None:
        await asyncio.sleep(0)

    async def close(self) -> None:
        await asyncio.sleep(0)


class KeepingHooks(HookSink):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)


class KeepingAsyncHooks(KeepingHooks):
    async def on_event(self, event: Event) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.events.append(event)


def lines_of(sink: JsonlSink) -> list[Event]:
    with open(sink.path, encoding="utf-8", newline="\n") as file:
        return [wire.decode(line) for line in file]


RECEIVERS: list[Receiver] = []
"""The one of the test that runs."""


@pytest.fixture(autouse=True)
def a_receiver() -> Iterator[None]:
    with Receiver(always=judge(lambda request: 204)) as receiver:
        RECEIVERS.append(receiver)
        yield
        RECEIVERS.clear()


def posted(sink: WebhookSink) -> list[Event]:
    return [wire.decode_object(element["data"]) for element in RECEIVERS[0].elements]


KINDS = {
    "jsonl": Kind(lambda folder: JsonlSink(folder / "f.jsonl"), lines_of),
    "jsonl, safe from power failures": Kind(
        lambda folder: JsonlSink(folder / "f.jsonl", durability="power"), lines_of
    ),
    "jsonl, rotated": Kind(
        lambda folder: JsonlSink(folder / "f.jsonl", max_bytes=20_000, backups=2), None
    ),
    "sqlite": Kind(
        lambda folder: SqliteSink(folder / "h.db"),
        lambda sink: events_of(sink.path),
        is_idempotent=True,
    ),
    "sqlite, safe from power failures": Kind(
        lambda folder: SqliteSink(folder / "h.db", durability="power"),
        lambda sink: events_of(sink.path),
        is_idempotent=True,
    ),
    "sqlite, pruned": Kind(
        lambda folder: SqliteSink(folder / "h.db", max_age=3600, max_tasks=3, max_bytes=100_000),
        None,
    ),
    "webhook": Kind(lambda folder: WebhookSink(RECEIVERS[0].url, secret=SECRET), posted),
    "memory": Kind(lambda folder: MemorySink(), lambda sink: sink.events),
    "flaky": Kind(lambda folder: FlakySink(), lambda sink: sink.acknowledged),
    "hooks": Kind(lambda folder: HookSink(), None),
    "keeping hooks": Kind(lambda folder: KeepingHooks(), lambda sink: sink.events),
    "async": Kind(lambda folder: AsyncMemorySink(), lambda sink: sink.memory.events),
    "async hooks": Kind(lambda folder: KeepingAsyncHooks(), lambda sink: sink.events),
}
"""Every sink of the package stands here; a new one adds its line."""


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_sink_keeps_every_promise_of_the_contract(kind: Kind, tmp_path: Path) -> None:
    check_sink(
        lambda: kind.make(tmp_path), read_back=kind.read_back, is_idempotent=kind.is_idempotent
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_scheduler_delivers_everything_to_the_sink_and_closes_it(
    kind: Kind, tmp_path: Path
) -> None:
    sink = kind.make(tmp_path)

    def run(number: int) -> None:
        current_task().progress(number, 20)
        for _ in range(50):
            current_task().output(f"{number} \u2026")
        current_task().error({"number": number})
        if number == 7:
            raise ValueError("seven")

    with Scheduler(4) as pool:
        pool.register_sink(sink, name="it", options=SinkOptions(batch_size=37))
        tasks = [pool.submit(run, number) for number in range(20)]
        for task in tasks:
            task.wait(SOON)
        assert pool.flush(SOON)
        assert pool.sinks["it"].delivered == 20 * 56
    assert (pool.sinks["it"].state, pool.sinks["it"].emitted) == ("closed", 20 * 56)
    if kind.read_back is None:
        return
    events = list(kind.read_back(sink))
    assert len(events) == 20 * 56
    for number, task in enumerate(tasks):
        own = [event for event in events if event.task_id == task.id]  # type: ignore[union-attr]
        assert [event.seq for event in own] == list(range(1, 57))  # type: ignore[union-attr]
        assert own[-1].type == (EventType.TASK_FAILED if number == 7 else EventType.TASK_COMPLETED)
        assert own[-1].task == task.snapshot()  # type: ignore[union-attr]


def test_every_sink_class_of_the_package_is_under_this_contract(tmp_path: Path) -> None:
    import bgworker

    classes = {name for name in bgworker.__all__ if name.endswith("Sink") and name != "Sink"}
    covered = {type(kind.make(tmp_path)).__name__ for kind in KINDS.values()}
    assert classes <= covered, f"add a line to KINDS for {', '.join(sorted(classes - covered))}"

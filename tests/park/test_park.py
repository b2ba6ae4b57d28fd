"""The park file: what it takes, what it refuses, and how the account tells."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bgworker import (
    ConfigurationError,
    Scheduler,
    ShutdownError,
    SinkError,
    SinkOptions,
    StreamEvent,
    current_task,
)
from bgworker.model import wire
from bgworker.park import park
from bgworker.park.park import ParkFile
from bgworker.sinks.linefile import LineFile
from bgworker.delivery.backlog import Chunk
from bgworker.delivery.courier import Courier, close_all
from bgworker.delivery.intake import MOST_TAKEN
from bgworker.delivery.retry import RetryPolicy
from bgworker.model.events import Event, EventType, LossEvent
from bgworker.model.records import COMPLETED, OUTPUT, Batch, TaskState
from bgworker.model.reports import wait_for_reports
from bgworker.testing import FlakySink, Hang, fail, work

if TYPE_CHECKING:
    from bgworker.model.records import Record

SOON = 30.0
FAST = RetryPolicy(attempts=2, base=0.001, cap=0.01)
STATE = TaskState("1" * 32, "task", "r" * 32, 0)


def records(*texts: str) -> list[Record]:
    return [
        (STATE, seq, OUTPUT, 1_700_000_000_000_000_000 + seq, text)
        for seq, text in enumerate(texts, 1)
    ]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def parked(path: Path) -> list[str]:
    return [
        line["event"]["payload"] for line in lines_of(path) if line["event"]["type"] == "TaskOutput"
    ]


def losses(events: Sequence[Event]) -> list[str]:
    return [event.reason for event in events if isinstance(event, LossEvent)]


def parked_by(file: ParkFile, *given: tuple[Sequence[Record], str, int]) -> list[str]:
    """Have a park file take records, in one batch, as the courier does: with what kept them from
    their sink."""
    file.open()
    try:
        file.write(Batch([
            (*record, (error, attempts))  # type: ignore[misc]
            for several, error, attempts in given for record in several]))
    finally:
        file.close()
    return parked(Path(file._file.path))


def courier(path: Path, **options: Any) -> Courier:
    """Return a courier whose sink refuses all that it is given for good."""
    return Courier("it", FlakySink(poison=lambda event: event.type == EventType.TASK_OUTPUT),
                   SinkOptions(park=path, types=["TaskOutput"], **options), "test")


def test_a_line_tells_all_that_a_replay_needs(tmp_path: Path) -> None:
    file = ParkFile(tmp_path / "park", 1 << 20, "it")
    a, c, d = records("a\n\u2028b", "c", "d")
    assert parked_by(file, ([a, c], "OSError: down", 8), ([d], "overflow", 0)) == [
        "a\n\u2028b", "c", "d"]
    first, second, third = lines_of(tmp_path / "park")
    assert {**first, "event": None, "parked_at": None} == {
        "v": 1,
        "sink": "it",
        "error": "OSError: down",
        "attempts": 8,
        "event": None,
        "parked_at": None,
    }
    assert first["parked_at"].endswith("Z")
    assert [(line["error"], line["attempts"]) for line in (second, third)] == [
        ("OSError: down", 8), ("overflow", 0)]
    event = wire.decode(json.dumps(second["event"]))
    assert isinstance(event, StreamEvent)
    assert (event.task_id, event.seq, event.payload) == (STATE.id, 2, "c")


def test_no_line_comes_of_a_park_that_was_not_needed(pool: Scheduler, tmp_path: Path) -> None:
    pool.register_sink(FlakySink(), name="it", options=SinkOptions(park=tmp_path / "park"))
    say(pool, "a")
    pool.unregister_sink("it", timeout=SOON)
    assert (tmp_path / "park").read_bytes() == b""
    assert not [thread for thread in threading.enumerate() if "it" in thread.name]


def test_a_file_at_its_bound_takes_what_fits_and_refuses_the_rest_line_by_line(
    tmp_path: Path,
) -> None:
    it = courier(tmp_path / "park", park_bytes=1000)
    it.start(SOON)
    it.put(Chunk.of(records(*"abcdefgh")))
    close_all([it], time.monotonic() + SOON)
    health, size = it.health(), (tmp_path / "park").stat().st_size
    assert 500 < size <= 1000
    fitting = parked(tmp_path / "park")
    assert fitting == [*"abcdefgh"][:len(fitting)] and health.parked == len(fitting) >= 3
    assert health.dropped_by_reason == {"park": 8 - len(fitting)}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_refuses_and_the_park_goes_on() -> None:
    it = courier(Path("/dev/full"))
    it.start(SOON)
    for number in range(3):
        it.put(Chunk.of(records("a")))
        it.mark().wait(SOON)
    close_all([it], time.monotonic() + SOON)
    assert (it.health().dropped_by_reason, it.health().parked) == ({"park": 3}, 0)
    assert it.park is not None and "No space left" in str(it.park.health().last_error)


class Slow(LineFile):
    """A disk that is busy until it is told."""

    entered, go_on = threading.Event(), threading.Event()

    def append(self, data: bytes) -> None:
        self.entered.set()
        assert self.go_on.wait(SOON)
        super().append(data)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Slow]]:
    Slow.entered, Slow.go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(park, "LineFile", Slow)
    yield Slow
    Slow.go_on.set()


def test_no_more_waits_for_the_disk_than_the_bounds_by_count_and_by_bytes_allow(
    tmp_path: Path, slow_disk: type[Slow]
) -> None:
    for name, most, text in ("count", 4 * MOST_TAKEN, "x"), ("bytes", 4, "x" * 250_000):
        slow_disk.entered.clear()
        slow_disk.go_on.clear()
        it = courier(
            tmp_path / name, queue_size=1, queue_bytes=1 << 20 if name == "bytes" else 1 << 26
        )
        it.start(SOON)
        it.put(Chunk.of(records("a")))
        assert slow_disk.entered.wait(SOON)
        with it._lock:
            it._give_up(records(*[text] * (most + 2)), "overflow")
        assert it.health().dropped_by_reason == {"park": 2}
        slow_disk.go_on.set()
        close_all([it], time.monotonic() + SOON)
        assert it.health().parked == 1 + most


def test_an_event_larger_than_the_bound_is_parked_when_nothing_else_waits(tmp_path: Path) -> None:
    it = courier(tmp_path / "park", queue_bytes=300)
    it.start(SOON)
    with it._lock:
        it._give_up(records("a" * 1000), "overflow")
    close_all([it], time.monotonic() + SOON)
    assert parked(tmp_path / "park") == ["a" * 1000]


def test_a_park_that_cannot_finish_in_time_is_left_behind_and_what_it_has_not_got_is_counted(
    tmp_path: Path, slow_disk: type[Slow], caplog: pytest.LogCaptureFixture
) -> None:
    it = courier(tmp_path / "park")
    it.start(SOON)
    it.put(Chunk.of(records("a")))
    assert slow_disk.entered.wait(SOON)
    it.put(Chunk.of(records("b")))
    assert it.mark().wait(SOON)
    assert it.health().pending == 2
    close_all([it], time.monotonic() + 0.1)
    wait_for_reports(time.monotonic() + SOON)
    assert (it.health().pending, it.health().dropped_by_reason) == (0, {"park": 2})
    assert any("the park file of sink 'it' did not finish in time" in record.message
               for record in caplog.records)
    slow_disk.go_on.set()
    assert it.park is not None
    it.park.thread.join(SOON)
    assert (it.health().parked, it.health().dropped) == (0, 2), "the account is final"


# -- in the account of a sink --


@pytest.fixture
def pool() -> Iterator[Scheduler]:
    with Scheduler(1) as made:
        yield made


def say(pool: Scheduler, *texts: str) -> None:
    def run() -> None:
        for text in texts:
            current_task().output(text)

    pool.submit(run).result(SOON)


OUTPUTS = ["TaskOutput", "EventsLost"]


def test_a_batch_that_is_given_up_is_parked_with_its_error_and_attempts(
    pool: Scheduler, tmp_path: Path
) -> None:
    sink = FlakySink(fail(FAST.attempts))
    pool.register_sink(
        sink, name="it", options=SinkOptions(retry=FAST, park=tmp_path / "park", types=OUTPUTS)
    )
    say(pool, "a", "b")
    pool.flush(SOON)
    say(pool, "c")
    assert not pool.flush(SOON), "parked is not delivered"
    health = pool.unregister_sink("it", timeout=SOON)
    assert (health.emitted, health.delivered, health.parked, health.dropped) == (3, 1, 2, 0)
    assert parked(tmp_path / "park") == ["a", "b"]
    (line, _) = lines_of(tmp_path / "park")
    assert (line["sink"], line["error"], line["attempts"]) == (
        "it",
        "TemporarySinkError: failing as scripted",
        2,
    )
    assert [event.type for event in sink.acknowledged] == [
        EventType.TASK_OUTPUT
    ], "parked is not lost: no announcement"


def test_poison_is_parked_alone(pool: Scheduler, tmp_path: Path) -> None:
    sink = FlakySink(poison=lambda event: getattr(event, "payload", "") == "c")
    pool.register_sink(
        sink, name="it", options=SinkOptions(retry=FAST, park=tmp_path / "park", types=OUTPUTS)
    )
    say(pool, *"abcde")
    pool.flush(SOON)
    health = pool.unregister_sink("it", timeout=SOON)
    assert (health.delivered, health.parked, health.dropped) == (4, 1, 0)
    assert parked(tmp_path / "park") == ["c"]


def test_what_overflows_a_small_queue_is_parked_however_much_comes_at_once(
    pool: Scheduler, tmp_path: Path
) -> None:
    hang = Hang()
    sink = FlakySink(hang)
    pool.register_sink(
        sink, name="it", options=SinkOptions(queue_size=10, park=tmp_path / "park", types=OUTPUTS)
    )
    say(pool, "first")
    pool.flush(0)
    assert hang.entered.wait(SOON)
    say(pool, *map(str, range(5000)))
    pool.flush(0.01)
    hang.release()
    pool.flush(SOON)
    health = pool.unregister_sink("it", timeout=SOON)
    assert (health.emitted, health.delivered, health.parked, health.dropped) == (5001, 11, 4990, 0)
    assert parked(tmp_path / "park") == [*map(str, range(4990))]


def test_what_waits_for_a_hanging_sink_at_the_end_is_parked(tmp_path: Path) -> None:
    hang = Hang()
    with Scheduler(1, close_timeout=1.0) as pool:
        pool.register_sink(
            FlakySink(hang), name="it", options=SinkOptions(park=tmp_path / "park", types=OUTPUTS)
        )
        say(pool, *"abc")
        assert hang.entered.wait(SOON)
    hang.release()
    health = pool.sinks["it"]
    assert (health.emitted, health.parked, health.dropped_by_reason, health.pending) == (
        3,
        3,
        {},
        0,
    )
    assert parked(tmp_path / "park") == [*"abc"]
    assert [line["error"] for line in lines_of(tmp_path / "park")] == ["closed"] * 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_what_the_park_file_does_not_take_is_dropped_counted_and_announced(
        pool: Scheduler, caplog: pytest.LogCaptureFixture) -> None:
    sink = FlakySink(work(), poison=lambda event: getattr(event, "payload", "") == "b")
    pool.register_sink(
        sink, name="it", options=SinkOptions(retry=FAST, park="/dev/full", types=OUTPUTS)
    )
    say(pool, *"abc")
    pool.flush(SOON)
    sink.sink.wait_for(lambda events: losses(events) and len(events) == 3, SOON)
    health = pool.unregister_sink("it", timeout=SOON)
    assert (health.delivered, health.parked, health.dropped_by_reason) == (2, 0, {"park": 1})
    assert losses(sink.acknowledged) == ["park"]
    assert any("the park file does not take them" in record.message for record in caplog.records)


def test_a_full_park_file_is_in_the_account(pool: Scheduler, tmp_path: Path) -> None:
    sink = FlakySink(poison=lambda event: event.type == EventType.TASK_OUTPUT)
    pool.register_sink(
        sink, name="it", options=SinkOptions(retry=FAST, park=tmp_path / "park", park_bytes=1000)
    )
    say(pool, *map(str, range(20)))
    pool.flush(SOON)
    health = pool.unregister_sink("it", timeout=SOON)
    assert health.parked == len(parked(tmp_path / "park")) > 0
    assert health.dropped_by_reason == {"park": 20 - health.parked}
    assert health.emitted == health.delivered + health.parked + health.dropped


def test_a_file_of_something_else_is_no_park_file_and_stays_as_it_is(
    pool: Scheduler, tmp_path: Path
) -> None:
    (tmp_path / "park").write_bytes(b"SQLite format 3\0and more")
    with pytest.raises(
        SinkError,
        match="park file of sink 'it' does not open: .*name another file, or move .*/park'",
    ):
        pool.register_sink(FlakySink(), name="it", options=SinkOptions(park=tmp_path / "park"))
    assert (tmp_path / "park").read_bytes() == b"SQLite format 3\0and more" and os.listdir(
        tmp_path
    ) == ["park"]


def test_a_park_file_that_cannot_be_opened_refuses_the_registration(
    pool: Scheduler, tmp_path: Path
) -> None:
    sink = FlakySink()
    with pytest.raises(
        SinkError, match="the park file of sink 'it' does not open: FileNotFoundError"
    ):
        pool.register_sink(sink, name="it", options=SinkOptions(park=tmp_path / "no" / "park"))
    assert not sink.calls and "it" not in pool.sinks


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_sink_whose_registration_fails_leaves_no_park_file_open(
    pool: Scheduler, tmp_path: Path
) -> None:
    def registered(sink: FlakySink) -> str:
        return pool.register_sink(sink, options=SinkOptions(park=tmp_path / "park"))

    def descriptors() -> list[str]:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        found = [os.readlink(link) for link in links if os.path.lexists(link)]
        return [path for path in found if path == str(tmp_path / "park")]

    fine = FlakySink()
    registered(fine)
    before = len(descriptors())
    for _ in range(3):
        with pytest.raises(SinkError, match="not today"):
            registered(FlakySink(on_open=[fail(error=OSError("not today"))]))
        with pytest.raises(ConfigurationError, match="registered already"):
            registered(fine)
    assert len(descriptors()) == before == 1
    pool.shutdown()
    with pytest.raises(ShutdownError):
        registered(FlakySink())
    assert descriptors() == []


def test_a_life_cycle_event_is_parked_whole(tmp_path: Path) -> None:
    state = TaskState("2" * 32, "task", "r" * 32, 1)
    state.completed_ns = 5_000
    state.metadata_json = '{"a":1}'
    file = ParkFile(tmp_path / "park", 1 << 20, "it")
    parked_by(file, ([(state, 7, COMPLETED, 5_000, None)], "closed", 0))
    (line,) = lines_of(tmp_path / "park")
    event = wire.decode(json.dumps(line["event"]))
    assert event.task == state.snapshot_at(COMPLETED, 7)  # type: ignore[union-attr]


def test_the_park_file_names_each_sink_as_it_is_registered(tmp_path: Path) -> None:
    with Scheduler(1, close_timeout=1) as pool:
        names = [
            pool.register_sink(
                FlakySink(fail(None)), options=SinkOptions(park=tmp_path / "park", retry=FAST)
            )
            for _ in range(2)
        ]
        say(pool, "a")
        pool.flush(SOON)
    assert {line["sink"] for line in lines_of(tmp_path / "park")} == set(names)

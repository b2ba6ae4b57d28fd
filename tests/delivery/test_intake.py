"""The way in: nothing emitted is lost or miscounted, no wake-up goes missing, nothing blocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from bgworker.delivery.intake import (LIMIT, MOST_TAKEN, RESERVED, SLOT, Intake, Tally, cost,
                                      costs)
from bgworker.model.records import COMPLETED, ERROR, OUTPUT, PROGRESS, TaskState
from tests.support import until

STATE = TaskState("1" * 32, "task", "r" * 32, 0)
SOON = 30.0
"""Seconds after which what should have happened long ago counts as hanging."""


def test_what_is_emitted_comes_out_in_order_with_one_clock_reading_each() -> None:
    intake = Intake()
    before = time.time_ns()
    for number in range(10):
        intake.emit(STATE, OUTPUT, str(number))
    intake.emit_lifecycle(STATE, COMPLETED, 17)
    taken = intake.take()
    assert [record[3] for record in taken] == [*map(str, range(10)), None]
    times = [record[2] for record in taken[:-1]]
    assert times == sorted(times) and before <= times[0] and times[-1] <= time.time_ns()
    assert taken[-1][2] == 17
    assert intake.take() == []


def test_take_returns_a_bounded_number() -> None:
    intake = Intake()
    for number in range(MOST_TAKEN + 5):
        intake.emit(STATE, OUTPUT, "")
    assert [len(intake.take()) for _ in range(3)] == [MOST_TAKEN, 5, 0]


def test_a_full_intake_refuses_stream_events_and_counts_them_by_kind_and_reason() -> None:
    intake = Intake(limit=10)
    for _ in range(14):
        intake.emit(STATE, OUTPUT, "")
    intake.emit(STATE, PROGRESS, (1.0, ""))
    intake.refuse(ERROR, "oversize")
    assert len(intake.take()) == 10
    assert sorted(intake.take_refusals()) == [
        (PROGRESS, "intake", 1),
        (OUTPUT, "intake", 4),
        (ERROR, "oversize", 1),
    ]
    assert intake.take_refusals() == [], "no news"
    intake.refuse(ERROR, "oversize")
    assert (ERROR, "oversize", 2) in intake.take_refusals(), "totals, not news"


def test_a_full_intake_takes_life_cycle_events_all_the_same() -> None:
    intake = Intake(limit=10)
    for _ in range(20):
        intake.emit(STATE, OUTPUT, "")
        intake.emit_lifecycle(STATE, COMPLETED, 0)
    kinds = [record[1] for record in intake.take()]
    assert kinds.count(COMPLETED) == 20
    assert kinds.count(OUTPUT) < 10
    (refused,) = intake.take_refusals()
    assert refused == (OUTPUT, "intake", 20 - kinds.count(OUTPUT))


def test_after_close_everything_counts_as_late_and_nothing_is_posted() -> None:
    intake = Intake()
    intake.emit(STATE, OUTPUT, "before")
    intake.close()
    intake.emit(STATE, OUTPUT, "")
    intake.emit_lifecycle(STATE, COMPLETED, 0)
    assert not intake.post(lambda: None)
    assert intake.late.read() == 2
    assert [record[3] for record in intake.take()] == ["before"]
    intake.congested = True
    assert not intake.is_crowded, "nobody waits for what is closed"


def test_a_posted_action_keeps_its_place_between_the_events() -> None:
    intake = Intake()
    intake.emit(STATE, OUTPUT, "1")
    action: Callable[[], object] = lambda: None
    assert intake.post(action)
    intake.emit(STATE, OUTPUT, "2")
    assert [record[3] for record in intake.take()] == ["1", action, "2"]


def test_the_intake_is_crowded_above_its_mark_and_when_a_sink_is() -> None:
    intake = Intake()
    intake.crowded_above = 2
    intake.emit(STATE, OUTPUT, "")
    intake.emit(STATE, OUTPUT, "")
    assert not intake.is_crowded
    intake.emit(STATE, OUTPUT, "")
    assert intake.is_crowded
    intake.take()
    assert not intake.is_crowded
    intake.congested = True
    assert intake.is_crowded


def test_each_line_of_a_block_counts_where_records_are_counted() -> None:
    intake = Intake(limit=13)
    intake.crowded_above = 2
    intake.emit_lines(STATE, OUTPUT, ["a", "b", "c"])
    assert intake.is_crowded
    intake.emit_lines(STATE, OUTPUT, [""] * 10)
    intake.emit_lines(STATE, ERROR, ["refused"] * 4)
    assert intake.take_refusals() == [(ERROR, "intake", 4)]
    assert [record[3] for record in intake.take()] == [["a", "b", "c"], [""] * 10]
    assert not intake.is_crowded
    intake.close()
    intake.emit_lines(STATE, OUTPUT, ["late"] * 3)
    assert intake.late.read() == 3 and intake.take() == []


def slots(intake: Intake) -> int:
    return len(intake._records)


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("x" * 60, 60),
        ("x" * 1000, 1000),
        ("x" * 60_000, 60_000),
        ("\xfc" * 200, 800),
        ("\U0001f642" * 4090, 16_360),
    ],
    ids=lambda value: str(value)[:3],
)
@pytest.mark.parametrize("kind", [OUTPUT, PROGRESS])
def test_a_record_takes_as_many_slots_as_its_text_takes_memory(
    text: str, bytes: int, kind: int
) -> None:
    intake = Intake()
    data = text if kind == OUTPUT else (None, text)
    intake.emit_weighed(STATE, kind, data)
    assert bytes // SLOT <= slots(intake) <= bytes // SLOT + 2
    intake.emit(STATE, OUTPUT, "short")
    assert [record[3] for record in intake.take()] == [data, "short"]
    assert slots(intake) == 0


def test_a_full_intake_refuses_by_bytes_and_has_room_again_when_it_was_emptied() -> None:
    intake = Intake(limit=100)
    text = "x" * (SLOT * 9)
    for _ in range(2):
        for _ in range(20):
            intake.emit_weighed(STATE, OUTPUT, text)
        assert len(intake.take()) == 10
    assert intake.take_refusals() == [(OUTPUT, "intake", 20)]


def test_a_record_larger_than_the_bound_comes_through_when_nothing_else_waits() -> None:
    intake = Intake()
    intake.allow(0)
    text = "x" * (64 * 2**20)
    intake.emit_weighed(STATE, OUTPUT, text)
    assert sum([len(intake.take()) for _ in range(intake.turns)]) == 1


def test_full_queues_leave_the_intake_what_is_reserved_and_empty_ones_share_their_room() -> None:
    intake = Intake()
    for room, most in [(0, RESERVED), (SLOT * 1000, RESERVED + 1000), (1 << 30, LIMIT)]:
        intake.allow(room)
        for _ in range(LIMIT + 10):
            intake.emit(STATE, OUTPUT, "")
        assert sum([len(intake.take()) for _ in range(intake.turns)]) == most


def test_take_empties_a_bounded_number_of_slots_and_a_block_is_one_record_of_many() -> None:
    intake = Intake()
    for _ in range(4):
        intake.emit_lines(STATE, OUTPUT, [""] * (MOST_TAKEN // 2))
    assert (slots(intake), intake.turns) == (2 * MOST_TAKEN, 3)
    assert [len(intake.take()) for _ in range(3)] == [2, 2, 0]


@pytest.mark.parametrize(
    "ring",
    [
        lambda intake: intake.emit(STATE, OUTPUT, ""),
        lambda intake: intake.emit_lifecycle(STATE, COMPLETED, 0),
        lambda intake: intake.refuse(OUTPUT, "oversize"),
        lambda intake: intake.post(lambda: None),
        lambda intake: intake.emit_lines(STATE, OUTPUT, [""]),
        lambda intake: intake.hurry(),
    ],
    ids=["emit", "emit_lifecycle", "refuse", "post", "emit_lines", "hurry"],
)
def test_whatever_comes_wakes_a_consumer_that_sleeps(ring: Callable[[Intake], Any]) -> None:
    intake = Intake()
    woke = threading.Event()

    def consume() -> None:
        intake.wait(SOON * 2)
        woke.set()

    thread = threading.Thread(target=consume)
    thread.start()
    until(lambda: intake._asleep)
    ring(intake)
    assert woke.wait(SOON), "the consumer sleeps on"
    thread.join(SOON)


def test_a_hurry_ends_the_gathering_and_the_next_one_is_whole_again() -> None:
    intake = Intake()
    done = threading.Event()

    def gather() -> None:
        intake.gather(SOON * 2)
        done.set()

    intake.hurry()
    intake.gather(SOON * 2)  # returns at once: somebody was in a hurry before
    intake._bell.acquire(False)
    intake.take()
    thread = threading.Thread(target=gather)
    thread.start()
    assert not done.wait(0.05)
    intake.emit(STATE, OUTPUT, "")
    assert not done.wait(0.05), "an event rings while the consumer is awake"
    intake.hurry()
    assert done.wait(SOON)
    thread.join(SOON)


def test_a_tally_loses_no_step_to_other_threads() -> None:
    tally = Tally()
    start = threading.Barrier(4)
    seen: list[int] = []

    def add() -> None:
        start.wait(SOON)
        for _ in range(20_000):
            tally.add()

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    start.wait(SOON)
    while any(thread.is_alive() for thread in threads):
        seen.append(tally.read())
    for thread in threads:
        thread.join(SOON)
    assert tally.read() == tally.read() == 60_000
    assert seen == sorted(seen)


# -- no wake-up is lost --


class InOrder:
    """Truth in disguise: asking for it runs the other side first, which is the race at its
    worst."""

    def __init__(self, meanwhile: Callable[[], object], inner: Any) -> None:
        self._meanwhile: Callable[[], object] | None = meanwhile
        self._inner = inner

    def __bool__(self) -> bool:
        answer = bool(self._inner)
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()  # after we have looked, before the consumer does anything about what we saw
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)


class Drowsy(Intake):
    """The twin with the classical mistake: it looks at the deque before it declares itself
    asleep."""

    def wait(self, backstop: float) -> None:
        if not self._records and not self._has_refused:
            self._asleep = True
            self._bell.acquire(True, backstop)
        self._asleep = False


def sleeps_on(intake: Intake) -> bool:
    """Emit just after the consumer has looked at the deque; tell whether the consumer sleeps all
    the same."""
    intake._records = InOrder(  # type: ignore[assignment]
        lambda: intake.emit(STATE, OUTPUT, ""), intake._records
    )
    woke = threading.Event()

    def consume() -> None:
        intake.wait(SOON * 2)
        woke.set()

    thread = threading.Thread(target=consume)
    thread.start()
    try:
        return not woke.wait(1.0)
    finally:
        intake.hurry()
        thread.join(SOON)
        assert not thread.is_alive()


def test_no_wake_up_is_lost_when_an_event_comes_just_after_the_look_at_the_deque() -> None:
    assert not sleeps_on(Intake())


def test_the_same_check_catches_an_intake_that_looks_before_it_declares_itself_asleep() -> None:
    assert sleeps_on(Drowsy())


def test_many_threads_and_a_consumer_that_sleeps_often_lose_nothing() -> None:
    intake = Intake()
    taken: list[Any] = []
    done = threading.Event()

    def consume() -> None:
        while not done.is_set() or intake._records:
            intake.wait(SOON)  # far longer than the test may take: a lost wake-up would show
            taken.extend(intake.take())

    def emit(number: int) -> None:
        state = TaskState(f"{number:032}", "", "", 0)
        for count in range(2_000):
            intake.emit(state, OUTPUT, str(count))
            if count % 10 == 0:
                time.sleep(0)

    consumer = threading.Thread(target=consume)
    consumer.start()
    emitters = [threading.Thread(target=emit, args=(number,)) for number in range(4)]
    for thread in emitters:
        thread.start()
    for thread in emitters:
        thread.join(SOON)
    done.set()
    intake.hurry()
    consumer.join(SOON)
    assert not consumer.is_alive()
    by_task: dict[str, list[str]] = {}
    for state, _, _, data in taken:
        by_task.setdefault(state.id, []).append(data)
    assert list(by_task.values()) == [[str(count) for count in range(2_000)]] * 4


@pytest.mark.parametrize("lines", [["", "abc", "x" * 5000], ["é", "abc"], ["日本" * 300]])
def test_many_lines_cost_what_each_of_them_costs(lines: list[str]) -> None:
    assert costs(lines) == [cost(OUTPUT, line) for line in lines]

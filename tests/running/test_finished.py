"""The memory of tasks: all that have not ended, the newest of those that have, none for longer than
asked."""

from __future__ import annotations

import sys
import threading

import pytest

from bgworker.running.finished import SURPLUS, Memory
from bgworker.model.records import TaskState


def states(number: int) -> list[TaskState]:
    return [TaskState("", "load", "0" * 32, 0, number=n) for n in range(number)]


def kept(memory: Memory) -> list[int | None]:
    return [each.number for each in memory.states()]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, to be moved by hand."""
    time = [0.0]
    monkeypatch.setattr("bgworker.running.finished.monotonic", lambda: time[0])
    return time


def test_what_has_not_ended_is_kept_whatever_the_settings() -> None:
    memory = Memory(0, 0.0)
    known = states(5)
    for state in known:
        memory.add(state)
    memory.retire([])
    assert kept(memory) == [0, 1, 2, 3, 4] and memory.state(known[3].id) is known[3]


@pytest.mark.parametrize("wrong", ["", "x" * 32, "0" * 32, "last"])
def test_what_is_no_id_of_a_known_task_is_a_key_error(wrong: str) -> None:
    memory = Memory(0, 0.0)
    memory.add(states(1)[0])
    with pytest.raises(KeyError, match=f"'{wrong}'"):
        memory.state(wrong)


def test_those_that_end_unheard_are_pruned_now_and_then_and_at_each_look() -> None:
    memory = Memory(3, None)
    for state in states(1000):
        memory.add(state)
        memory.note(state)
        assert len(memory.states()) <= 3 + SURPLUS
    memory.retire([])
    assert kept(memory) == [997, 998, 999]


@pytest.mark.parametrize(
    ("keep", "left"), [(None, [0, 1, 2, 3, 4]), (2, [3, 4]), (0, []), (9, [0, 1, 2, 3, 4])]
)
def test_the_newest_that_ended_are_kept(keep: int | None, left: list[int]) -> None:
    memory = Memory(keep, None)
    for state in states(5):
        memory.add(state)
        memory.retire([state])
    assert kept(memory) == left


def test_newest_means_the_order_of_the_ends_not_of_the_beginnings() -> None:
    memory = Memory(2, None)
    known = states(3)
    for state in known:
        memory.add(state)
    memory.retire([known[2]])
    memory.retire([known[0], known[1]])
    assert kept(memory) == [0, 1]


def test_what_ended_is_kept_for_so_many_seconds(now: list[float]) -> None:
    memory = Memory(None, 10.0)
    first, second = states(2)
    for state in (first, second):
        memory.add(state)
    memory.retire([first])
    now[0] = 6.0
    memory.retire([second])
    now[0] = 10.0
    memory.retire([])
    assert kept(memory) == [0, 1]
    now[0] = 10.1
    memory.retire([])
    assert kept(memory) == [1]
    now[0] = 1e9
    memory.retire([])
    assert kept(memory) == []


def test_zero_seconds_keep_for_no_longer_than_the_next_look(now: list[float]) -> None:
    memory = Memory(None, 0.0)
    state, = states(1)
    memory.add(state)
    memory.retire([state])
    now[0] = 0.001
    memory.retire([])
    assert kept(memory) == []


def test_an_unknown_task_is_a_key_error_and_a_refused_one_is_forgotten() -> None:
    memory = Memory(1, None)
    state, = states(1)
    with pytest.raises(KeyError):
        memory.state(state.id)
    memory.add(state)
    memory.forget(state)
    memory.forget(state)
    assert kept(memory) == []
    memory.add(state)
    memory.start_afresh()
    assert kept(memory) == []


def test_many_threads_may_retire_at_once(now: list[float]) -> None:
    memory, problems = Memory(None, 1.0), []

    def retire() -> None:
        try:
            for _ in range(3000):
                memory.retire([])
        except Exception as error:  # reported by the main thread
            problems.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=retire) for _ in range(4)]
        for thread in threads:
            thread.start()
        for state in states(2000):
            memory.add(state)
            memory.retire([state])
            now[0] += 2.0
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(before)
    memory.retire([])
    assert not problems and kept(memory) == []

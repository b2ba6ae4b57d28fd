"""Deadlines: each passes once, on one thread, at its time, however many there are and whoever adds
them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import inf
from time import monotonic, sleep
from typing import Any

import pytest

from bgworker.running.deadlines import Deadlines
from tests.support import until

LONG = 30.0


class Watched:
    """Stands for a task: something with an identity."""

    id = "watched"


class Watch:
    """Deadlines and what they have expired."""

    def __init__(self) -> None:
        self.expired: list[tuple[Any, float, str, int]] = []
        self.news = threading.Semaphore(0)
        self.deadlines = Deadlines(self.expire, "test-deadlines")
        self.deadlines.start()

    def expire(self, task: Any, thread: int) -> None:
        self.expired.append((task, monotonic(), threading.current_thread().name, thread))
        self.news.release()

    def wait(self, number: int) -> list[Any]:
        for _ in range(number):
            assert self.news.acquire(timeout=LONG), "a deadline was missed"
        return [each[0] for each in self.expired]

    def add(self, seconds: float) -> Any:
        task: Any = Watched()
        self.deadlines.watch(task, monotonic() + seconds)
        return task


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch()
    yield watch
    watch.deadlines._watched.clear()
    watch.deadlines.stop()


def test_a_deadline_passes_once_not_before_its_time_on_a_thread_of_its_own(watch: Watch) -> None:
    due = monotonic() + 0.05
    task = watch.add(0.05)
    assert watch.wait(1) == [task]
    assert watch.expired[0][1] >= due - 0.002 and watch.expired[0][2] == "test-deadlines"
    assert watch.expired[0][3] == threading.get_ident(), "who had it watched"
    sleep(0.02)
    assert len(watch.expired) == 1 and not watch.deadlines._watched


def test_an_earlier_deadline_wakes_the_thread_that_sleeps_until_a_later_one(watch: Watch) -> None:
    watch.add(1000.0)
    until(lambda: monotonic() < watch.deadlines._sleeps_until < inf)
    early = watch.add(0.03)
    assert watch.wait(1) == [early]


def test_a_deadline_in_the_past_passes_at_once(watch: Watch) -> None:
    task = watch.add(-5.0)
    assert watch.wait(1) == [task]


def test_what_is_forgotten_in_time_does_not_pass(watch: Watch) -> None:
    task = watch.add(0.1)
    assert watch.deadlines.forget(task), "it is ours to end"
    assert not watch.deadlines.forget(task), "somebody was there before"
    other = watch.add(0.15)
    assert watch.wait(1) == [other]
    assert not watch.deadlines.forget(other), "its deadline was there before"


def test_no_timeout_at_all_and_one_of_years_are_fine(watch: Watch) -> None:
    watch.add(float("inf"))
    watch.add(1e9)
    soon = watch.add(0.02)
    assert watch.wait(1) == [soon] and len(watch.deadlines._watched) == 2


def test_deadlines_pass_in_whatever_order_they_were_added_and_none_is_missed(watch: Watch) -> None:
    tasks = [watch.add(((n * 37) % 100) / 1000) for n in range(300)]
    assert set(watch.wait(300)) == set(tasks)


def test_no_deadline_is_missed_when_many_threads_add_and_forget(watch: Watch) -> None:
    start = threading.Barrier(4)
    wanted: list[Any] = []

    def add() -> None:
        start.wait(LONG)
        for number in range(100):
            task = watch.add(0.001 * (number % 7))
            if number % 3:
                wanted.append(task)
            else:
                watch.deadlines.forget(task)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    until(lambda: {id(each) for each in wanted} <= {id(each[0]) for each in watch.expired})


def test_an_expiry_that_fails_is_logged_and_the_others_pass(
    caplog: pytest.LogCaptureFixture,
) -> None:
    passed = threading.Event()

    def expire(task: Any, thread: int) -> None:
        if task is bad:
            raise ValueError("boom")
        passed.set()

    bad: Any = Watched()
    good: Any = Watched()
    deadlines = Deadlines(expire, "test-deadlines")
    deadlines.start()
    deadlines.watch(bad, monotonic() + 0.01)
    deadlines.watch(good, monotonic() + 0.02)
    assert passed.wait(LONG) and "could not be ended at its deadline" in caplog.text
    deadlines.stop()


def test_the_thread_starts_once_and_ends_when_stopped_but_not_before_what_it_still_watches() -> (
    None
):
    watch = Watch()
    thread = watch.deadlines._thread
    watch.deadlines.start()
    assert thread is not None and watch.deadlines._thread is thread and thread.daemon
    kept, task = watch.add(1000.0), watch.add(0.05)
    watch.deadlines.stop()
    assert watch.wait(1) == [task] and thread.is_alive()
    watch.deadlines.forget(kept)
    thread.join(LONG)
    assert not thread.is_alive()


def test_a_ring_that_is_lost_delays_a_deadline_and_no_more(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a processor that lets a load overtake a store, or whatever nobody has thought of."""
    monkeypatch.setattr(watch.deadlines, "_ring", lambda: None)
    sleep(0.02)  # it sleeps, with nothing to wait for
    task = watch.add(0.01)
    assert watch.wait(1) == [task]

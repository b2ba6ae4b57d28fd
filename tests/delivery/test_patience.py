"""How long a sink with a crowded queue is waited for, on a clock of our own."""

from __future__ import annotations

import pytest

from bgworker.delivery.patience import PATIENCE, PER_EVENT, Patience

STEP = 0.005


class Sink:
    """Asks as the dispatcher does, every few milliseconds, while a sink takes so many events a
    second."""

    def __init__(self) -> None:
        self.patience = Patience()
        self.now = 1000.0
        self.delivered = 0.0
        self.patience.is_due(0.0, 0, self.now)

    def goes_on(self, seconds: float, rate: float = 0.0, crowded: bool = True) -> float:
        """Return for how many seconds it was waited for."""
        waited = 0.0
        for _ in range(round(seconds / STEP)):
            is_due = self.patience.is_due(float(crowded), int(self.delivered), self.now)
            waited += STEP * is_due
            self.now += STEP
            self.delivered += rate * STEP
        return waited


def test_a_sink_that_hangs_is_waited_for_once() -> None:
    sink = Sink()
    assert sink.goes_on(3600) == pytest.approx(PATIENCE, abs=2 * STEP)


def test_a_sink_that_works_is_waited_for_as_long_as_it_takes() -> None:
    sink = Sink()
    assert sink.goes_on(600, rate=1.5 / PER_EVENT) == pytest.approx(600)


def test_a_sink_that_crawls_is_waited_for_a_moment_for_each_event() -> None:
    sink = Sink()
    assert sink.goes_on(3600, rate=1) == pytest.approx(PATIENCE + 3600 * PER_EVENT, rel=0.3)


def test_a_sink_that_comes_back_to_work_is_waited_for_again() -> None:
    sink = Sink()
    sink.goes_on(60)
    assert sink.goes_on(1, rate=0) == 0
    sink.delivered += 2 * PATIENCE / PER_EVENT
    assert sink.goes_on(1, rate=1000) == pytest.approx(1)


def test_a_sink_that_was_not_crowded_for_a_while_is_waited_for_again() -> None:
    sink = Sink()
    sink.goes_on(60)
    sink.goes_on(60, crowded=False)
    assert sink.goes_on(1) == pytest.approx(1)


def test_a_queue_that_just_filled_up_after_a_quiet_hour_costs_no_patience() -> None:
    patience = Patience()
    patience.is_due(0.0, 0, 1.0)
    assert patience.is_due(1.0, 0, 3601.0)
    assert patience.is_due(1.0, 0, 3601.0 + PATIENCE - 0.01)
    assert not patience.is_due(1.0, 0, 3601.0 + PATIENCE)

"""The flag that threads wait for, and that an interrupt cannot break."""

from __future__ import annotations

import threading
import time

import pytest

from bgworker.model.latch import Latch

SOON = 30.0


def test_all_who_wait_go_on_when_it_is_set_and_nobody_waits_after() -> None:
    latch = Latch()
    seen: list[bool] = []
    waiting = [
        threading.Thread(target=lambda: seen.append(latch.wait(SOON)), daemon=True)
        for _ in range(3)
    ]
    for thread in waiting:
        thread.start()
    assert not latch.is_set() and not latch.wait(0.01) and seen == []
    latch.set()
    latch.set()
    for thread in waiting:
        thread.join(SOON)
    assert seen == [True] * 3 and latch.is_set() and latch.wait() and latch.wait(0)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_wait_of_no_time_returns_at_once(timeout: float) -> None:
    assert not Latch().wait(timeout)


def test_a_wait_that_is_too_long_for_the_system_is_a_very_long_one() -> None:
    latch = Latch()
    threading.Thread(target=lambda: time.sleep(0.05) or latch.set(), daemon=True).start()
    assert latch.wait(1e300)


def test_whoever_waited_in_vain_leaves_nothing_behind() -> None:
    latch = Latch()
    for _ in range(3):
        latch.wait(0)
    assert latch._sleepers == []

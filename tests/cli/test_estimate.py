"""How long a run has still to go: arithmetic on durations that are made up, with no clock."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from statistics import mean

import pytest

from bgworker.cli import estimate
from bgworker.cli.estimate import APART, Estimate, Rhythm

COUNT = 300

DISTRIBUTIONS: dict[str, Callable[[Random], float]] = {
    "constant": lambda random: 1.0,
    "uniform": lambda random: random.uniform(0.1, 1.9),
    "exponential": lambda random: random.expovariate(1.0),
    "lognormal": lambda random: random.lognormvariate(0.0, 1.5),
    "pareto": lambda random: random.paretovariate(1.2),
    "a few long ones": lambda random: 30.0 if random.random() < 0.03 else 0.3,
}


class Played:
    """A run of commands that take so many seconds each, as a run has them: the next one takes the
    slot that is free first."""

    def __init__(self, took: list[float], jobs: int) -> None:
        free = [0.0] * jobs
        self.steps: list[tuple[float, int, bool, float]] = []
        for number, seconds in enumerate(took, 1):
            slot = min(range(jobs), key=free.__getitem__)
            self.steps.append((free[slot], number, False, seconds))
            free[slot] += seconds
            self.steps.append((free[slot], number, True, seconds))
        self.total = max(free)
        self.steps.sort()

    def estimate_at(self, now: float, jobs: int, known: list[float | None]) -> Estimate:
        """Return what is known of the run at a moment of it."""
        made = Estimate(jobs)
        for number, seconds in enumerate(known, 1):
            made.wait(number)
            if seconds is not None:
                made.learn(number, seconds)
        for at, number, is_end, took in self.steps:
            if at <= now and is_end:
                made.end(number, took)
            elif at <= now:
                made.begin(number, at)
        return made


def error_at_half(earlier: list[float | None], this: list[float], jobs: int) -> float:
    """Return by how much of the whole run the estimated end is wrong when half of it is over."""
    run = Played(this, jobs)
    half = run.total / 2
    left = run.estimate_at(half, jobs, earlier).left(len(this), half)
    assert left is not None and left >= 0
    return abs(half + left - run.total) / run.total


def drawn(name: str, seed: int) -> list[float]:
    random = Random(seed)
    return [DISTRIBUTIONS[name](random) for _ in range(COUNT)]


@pytest.mark.parametrize("jobs", [1, 4, 16])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_with_durations_of_an_earlier_run_the_end_is_known_at_half_time(
    name: str, jobs: int
) -> None:
    errors = []
    for seed in range(20):
        earlier = drawn(name, seed)
        noise = Random(seed + 1000)
        this = [seconds * noise.lognormvariate(0.0, 0.15) for seconds in earlier]
        errors.append(error_at_half([*earlier], this, jobs))
    assert mean(errors) < 0.15


def test_without_an_earlier_run_a_few_long_commands_spoil_the_estimate() -> None:
    unknown = [error_at_half([None] * COUNT, drawn("a few long ones", seed), 4)
               for seed in range(20)]
    assert mean(unknown) > 0.15, "then the history would not have to be asked"


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_busier_machine_or_a_faster_one_is_allowed_for(
    name: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def errors() -> float:
        return mean(error_at_half([*drawn(name, seed)],
                                  [factor * seconds for seconds in drawn(name, seed)], 4)
                    for seed in range(10))

    assert errors() < 0.05
    monkeypatch.setattr(Estimate, "_pace", lambda self: 1.0)
    assert errors() > 0.15


def test_some_commands_that_nobody_knows_are_expected_to_take_the_mean_of_this_run() -> None:
    errors = []
    for seed in range(20):
        this = drawn("uniform", seed)
        known = [seconds if number % 3 else None for number, seconds in enumerate(this)]
        errors.append(error_at_half(known, this, 4))
    assert mean(errors) < 0.05


def test_one_command_that_hangs_is_not_taken_for_the_pace_of_all() -> None:
    made = Estimate(2)
    for number in range(1, 102):
        made.wait(number)
        made.learn(number, 1.0)
    made.begin(1, 0.0)
    made.end(1, 100_000.0)
    assert made.left(101, 100_000.0) == pytest.approx(50, rel=0.6)


def test_the_estimate_never_is_less_than_nothing_whatever_the_numbers() -> None:
    random = Random(5)
    for _ in range(300):
        jobs, count = random.randint(1, 9), random.randint(1, 30)
        run = Played([random.choice([0.0, random.expovariate(1.0)]) for _ in range(count)], jobs)
        known = [random.choice([None, 0.0, random.paretovariate(0.6), 1e12]) for _ in range(count)]
        now = random.uniform(-1.0, 1.5) * run.total
        left = run.estimate_at(now, jobs, known).left(count, now + random.choice([-9.0, 0.0, 9.0]))
        assert left is None or 0 <= left < float("inf")


def test_a_command_that_takes_longer_than_expected_is_expected_to_end_now() -> None:
    made = Estimate(2)
    for number in (1, 2):
        made.wait(number)
        made.begin(number, 100.0)
    made.learn(1, 5.0)
    made.learn(2, 60.0)
    assert made.left(2, 103.0) == 57
    assert made.left(2, 150.0) == 10
    assert made.left(2, 170.0) == 0


def test_as_long_as_nothing_is_known_nothing_is_told() -> None:
    made = Estimate(1)
    assert made.left(2, 0.0) is None
    for number in (1, 2):
        made.wait(number)
    made.begin(1, 0.0)
    assert made.left(2, 5.0) is None
    made.end(1, 6.0)
    assert made.left(2, 6.0) == 6
    made.begin(2, 6.0)
    made.end(2, 6.0)
    assert made.left(2, 12.0) == 0


def test_what_never_began_tells_nothing_of_the_others() -> None:
    made = Estimate(1)
    for number in (1, 2, 3):
        made.wait(number)
    made.learn(3, 7.0)
    for number in (1, 2):
        made.end(number, None)
    assert made.left(3, 0.0) == 7


def test_jobs_share_the_work_and_the_longest_command_decides_the_end() -> None:
    made = Estimate(3)
    for number, seconds in enumerate((9.0, 2.0, 2.0, 2.0, 2.0, 2.0), 1):
        made.wait(number)
        made.learn(number, seconds)
    assert made.left(6, 0.0) == 9
    made.begin(1, 0.0)
    made.begin(2, 0.0)
    assert made.left(6, 1.0) == 8
    one = Estimate(1)
    for number in (1, 2):
        one.wait(number)
        one.learn(number, 4.0)
    assert one.left(2, 0.0) == 8


@pytest.mark.parametrize("jobs", [1, 4, 16])
def test_of_many_commands_only_the_last_are_played_and_the_end_is_as_good(
    jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = [Random(3).lognormvariate(0.0, 1.0) for _ in range(2_000)]

    def left() -> float:
        found = Played(took, jobs).estimate_at(-1.0, jobs, [*took]).left(len(took), 0.0)
        assert found is not None
        return found

    exact = left()
    assert exact == pytest.approx(Played(took, jobs).total)
    monkeypatch.setattr(estimate, "MOST_PLAYED", 100)
    assert left() == pytest.approx(exact, rel=0.02)


def test_commands_that_nobody_has_told_of_yet_count_as_well() -> None:
    made = Estimate(4)
    for number in range(1, 5):
        made.wait(number)
        made.begin(number, 0.0)
        made.end(number, 2.0)
    assert made.left(104, 2.0) == pytest.approx(50)


# ---------------------------------------------------------------- when to tell it

def told(times: list[tuple[float, int]], total: int) -> list[float]:
    rhythm = Rhythm(0.0)
    return [now for now, ended in times if rhythm.is_due(ended, total, now)]


def test_a_line_comes_at_each_tenth_and_none_of_a_short_run_nor_at_the_end() -> None:
    hour = [(float(second), second // 36) for second in range(3601)]
    assert told(hour, 100) == [360.0 * part for part in range(1, 10)]
    assert told([(second / 10, second) for second in range(100)], 100) == []


def test_lines_are_some_seconds_apart_and_none_comes_while_nothing_ends() -> None:
    quick = told([(float(second), second) for second in range(40)], 40)
    assert quick == [APART, 2 * APART, 3 * APART]
    assert told([(float(second), 3) for second in range(100)], 40) == []
    assert told([(float(second), 4) for second in range(100)], 40) == [APART]

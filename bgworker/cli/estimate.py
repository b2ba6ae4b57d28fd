"""How long a run has still to go, and when to say so. Arithmetic alone: whoever asks brings the
time.

Commands take the next free slot in their order, as in the run itself: the estimate plays the rest
of the run with the seconds that each command is expected to take.
"""

from __future__ import annotations

from heapq import heapify, heapreplace
from itertools import islice
from math import inf

MOST_PLAYED = 2_000
"""Commands at the end of a run that are played one by one, in less than a millisecond. Those before
them are spread evenly over the slots."""

DOUBT = 5
"""Commands that must have ended before what they tell of the pace counts as much as the pace of the
earlier runs."""

MOST_SLOWER = 4
"""Times as long as in earlier runs that a command may take before it tells no more of the pace of
the others: it may hang."""

APART = 10.0
"""Seconds, at least, from the start of a run, and from each line that tells how far it is, to the
next one."""

PARTS = 10
"""Such lines that a run has at most."""


class Estimate:
    """What is known of the commands of a run, which have the numbers 1, 2, 3 ... and run in that
    order.

    A command is expected to take as long as in earlier runs, times the pace of this run: more where
    the machine is busier than it was. One that is not known is expected to take as long as those of
    this run that have ended, in the mean; while there are none, as long as those that are known.

    Args:
        jobs: how many run at a time.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        # seconds in earlier runs, None for what is not known, by number
        self._waiting: dict[int, float | None] = {}
        self._running: dict[int, float | None] = {}
        self._began: dict[int, float] = {}  # when those began that run
        self._seen = 0
        self._ended = 0
        self._spent = 0.0  # seconds that those took that have ended
        self._known_ended = 0
        self._known_spent = 0.0
        self._known_expected = 0.0

    def wait(self, number: int) -> None:
        """Note that there is a command, which has not begun."""
        self._seen += 1
        self._waiting[number] = None

    def learn(self, number: int, seconds: float) -> None:
        """Note how long a command took in earlier runs, if it has not ended."""
        for commands in (self._waiting, self._running):
            if number in commands:
                commands[number] = max(0.0, seconds)

    def begin(self, number: int, at: float) -> None:
        """Note that a command has begun, in seconds on any clock."""
        self._running[number] = self._waiting.pop(number, None)
        self._began[number] = at

    def end(self, number: int, took: float | None) -> None:
        """Note that a command has ended, and after how many seconds; None for one that never
        began."""
        self._waiting.pop(number, None)
        known = self._running.pop(number, None)
        self._began.pop(number, None)
        if took is not None:
            self._ended += 1
            self._spent += took
            if known is not None:
                self._known_ended += 1
                self._known_spent += min(took, MOST_SLOWER * known)
                self._known_expected += known

    def left(self, total: int, now: float) -> float | None:
        """Return the seconds until the last command will have ended, at least 0; None where nothing
        is known that they could be told from.

        A command that already takes longer than expected is expected to end now.

        Args:
            total: how many commands there are, those that nobody has told of yet included.
        """
        pace, usual = self._pace(), self._usual()
        if usual is None:
            return None

        def expected(known: float | None) -> float:
            return usual if known is None else known * pace

        slots = [max(0.0, expected(known) - max(0.0, now - self._began[number]))
                 for number, known in self._running.items()]
        slots += [0.0] * (self._jobs - len(slots))
        waiting = [expected(known) for known in self._waiting.values()]
        unseen = total - self._seen
        spread = len(waiting) if unseen > 0 else max(0, len(waiting) - MOST_PLAYED)
        _fill(slots, sum(waiting[:spread]) + usual * max(0, unseen))
        heapify(slots)
        for seconds in islice(waiting, spread, None):
            heapreplace(slots, slots[0] + seconds)
        return max(slots)

    def _pace(self) -> float:
        """Return how many times as long as in earlier runs commands take in this one."""
        if not self._known_expected:
            return 1.0
        doubt = DOUBT * self._known_expected / self._known_ended
        return (self._known_spent + doubt) / (self._known_expected + doubt)

    def _usual(self) -> float | None:
        """Return the seconds that a command is expected to take of which nothing is known."""
        if self._ended:
            return self._spent / self._ended
        known = [seconds for commands in (self._running, self._waiting)
                 for seconds in commands.values() if seconds is not None]
        return sum(known) / len(known) if known else None


def _fill(slots: list[float], seconds: float) -> None:
    """Spread work over the slots, as water fills a vessel: those that are free first take it."""
    slots.sort()
    for count, (level, next_level) in enumerate(zip(slots, [*slots[1:], inf]), 1):
        taken = min(seconds, (next_level - level) * count)
        seconds -= taken
        if not seconds:
            slots[:count] = [level + taken / count] * count
            return


class Rhythm:
    """When a line is due that tells how far a run is, where no table does: when a tenth more of the
    commands has ended, and `APART` seconds at least have passed."""

    def __init__(self, started: float) -> None:
        self._told_at = started
        self._told_part = 0

    def is_due(self, ended: int, total: int, now: float) -> bool:
        """Return whether a line is due, and take it as told."""
        part = PARTS * ended // total
        if part == self._told_part or ended == total or now - self._told_at < APART:
            return False
        self._told_part, self._told_at = part, now
        return True

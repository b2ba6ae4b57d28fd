"""The events that a sink did not get, until the sink and the log have been told of them. No thread
and no lock: the courier that owns it guards it."""

from __future__ import annotations

from collections import Counter
from time import time_ns

from ..model.clock import monotonic
from ..model.records import LOST, TYPES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..model.records import Record

REPORT_INTERVAL = 60.0
"""Seconds between two log lines about events of one sink that did not fit; the first and the last
come at once."""


class Losses:
    """The losses of one sink, by reason and by type.

    A loss stays until the sink has taken its announcement: one that fails needs no further care.

    Args:
        sink: name of the sink, for the announcements.
    """

    def __init__(self, sink: str) -> None:
        self._sink = sink
        self._unannounced: dict[str, Counter[str]] = {}
        self._unlogged: Counter[str] = Counter()
        self._next_log = 0.0  # monotonic

    def __len__(self) -> int:
        """Return for how many reasons events were lost of which the sink was not told."""
        return len(self._unannounced)

    def add(self, reason: str, kinds: Mapping[int, int]) -> None:
        """Note lost events, by the kinds of their records."""
        types = self._unannounced.setdefault(reason, Counter())
        types.update({TYPES[kind].value: count for kind, count in kinds.items()})

    def move_from(self, other: Losses, reason: str) -> None:
        """Take over what another has to announce, all for one ``reason``."""
        for types in other._unannounced.values():
            self._unannounced.setdefault(reason, Counter()).update(types)
        other._unannounced.clear()

    def announcements(self, most: int) -> list[Record]:
        """Return at most so many records of EventsLost, one for each reason."""
        now = time_ns()
        return [(None, 0, LOST, now, (self._sink, reason, sum(types.values()), dict(types)))
                for reason, types in [*self._unannounced.items()][:most]]

    def announced(self, announcements: Sequence[Record]) -> None:
        """Note that the sink has been told. What was lost since then is another loss."""
        for _, _, _, _, (_, reason, _, types) in announcements:
            self._unannounced[reason] -= Counter(types)
            if not self._unannounced[reason]:
                del self._unannounced[reason]

    def log_later(self, reason: str, count: int) -> None:
        """Have events that were lost without a word in the log mentioned by `due_for_log`."""
        if count:
            self._unlogged[reason] += count

    def due_for_log(self, *, is_last: bool) -> Counter[str]:
        """Return what the log is to be told now, by reason: nothing, or all that is new."""
        now = monotonic()
        if not is_last and now < self._next_log:
            return Counter()
        due, self._unlogged = self._unlogged, Counter()
        if due:
            self._next_log = now + REPORT_INTERVAL
        return due

"""How long a sink with a crowded queue is waited for: a pure decision. No clock, no thread, no
sleep."""

from __future__ import annotations

CROWDED = 0.25
"""A queue fuller than this asks those who can wait to wait. The rest is for what is under way: an
eighth of a queue in the intake, another in the dispatcher's hands, and what each reader emits
before it looks again."""

PATIENCE = 5.0
"""Seconds that a sink may keep others waiting without taking anything."""

PER_EVENT = 0.02
"""Seconds of waiting that each event which the sink takes makes good: 50 events a second are
enough."""


class Patience:
    """Tells a sink that is behind from one that hangs or crawls; the dispatcher's thread alone
    asks.

    A clock runs while the queue is crowded and runs back while it is not; each event that is
    delivered takes it back by `PER_EVENT`. While it stands at `PATIENCE` nobody waits for the sink.
    So one sink holds up whoever waits for at most `PATIENCE` seconds and `PER_EVENT` for each event
    that it takes, whatever the size of its queue; and one that comes back to work has everyone's
    patience again after a few hundred events.
    """

    __slots__ = ("_used", "_was_crowded", "_delivered", "_asked_at")

    def __init__(self) -> None:
        self._used = 0.0
        self._was_crowded = False
        self._delivered = 0
        self._asked_at = 0.0

    def is_due(self, fill: float, delivered: int, now: float) -> bool:
        """Return whether those who can wait for the sink should.

        Args:
            fill: of its queue, from 0 to 1. What it was the last time counts until now.
            delivered: events that the sink has taken since its registration.
            now: seconds on any monotonic clock.
        """
        elapsed = now - self._asked_at
        used = (
            self._used
            + (elapsed if self._was_crowded else -elapsed)
            - PER_EVENT * (delivered - self._delivered)
        )
        self._used = min(max(used, 0.0), PATIENCE)
        self._was_crowded, self._delivered, self._asked_at = fill > CROWDED, delivered, now
        return fill > CROWDED and self._used < PATIENCE

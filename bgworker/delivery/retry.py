"""What a sink's exception means, when to try again, and when to stop: pure decisions. No clock, no
thread, no sleep."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..model.checks import choice, number, settle
from ..model.errors import PermanentSinkError, TemporarySinkError
from ..model.text import ask, describe, number_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal


@dataclass(frozen=True)
class RetryPolicy:
    """How often and after which waits a failed ``write`` is tried again.

    Exponential backoff with full jitter: the wait before retry n is drawn from 0 .. min(cap, base *
    2 ** (n - 1)).
    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    attempts: int = 8
    """Attempts for one batch, the first included. After the last the batch is given up and the
    breaker opens."""
    base: float = 0.5
    """Seconds; upper end of the first wait."""
    cap: float = 60.0
    """Seconds; no wait is longer, and while the breaker is open one attempt is made in this
    time."""
    jitter: Literal["full", "none"] = "full"
    """"none" waits the upper end; for tests, and for a sender that is alone."""

    def __post_init__(self) -> None:
        settle(self, attempts=number("attempts", self.attempts, least=1, whole=True),
               base=number("base", self.base, above=0), cap=number("cap", self.cap, above=0),
               jitter=choice("jitter", self.jitter, ("full", "none")))


_DATA_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What code raises that does not know what to do with a value: one event may be to blame for all of
a batch."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What a sink raised, as plain values: from here on nothing runs the exception's own code."""

    text: str
    """Its type and text, see `describe`."""
    concerns: Literal["attempt", "value", "event", "batch", "sink"] = "attempt"
    """What would fail again: nothing that is known, maybe one of the values, or as in
    `PermanentSinkError`."""
    retry_after: float | None = None
    """Seconds, if it is for the other side to say."""
    hold: bool = False

    @property
    def is_permanent(self) -> bool:
        """True when trying the same again is of no use."""
        return self.concerns in ("event", "batch", "sink")

    @property
    def reason(self) -> str:
        """Why events are given up after this, as the account of their sink says."""
        return {"event": "refused", "batch": "refused", "sink": "closed"}.get(self.concerns,
                                                                               "failed")

    @classmethod
    def of(cls, error: BaseException) -> Trouble:
        """Look at an exception. This may run code of its class: never under a lock of ours."""
        text = describe(error)
        kind = type(error)  # not `isinstance`, which asks the exception what it is
        if issubclass(kind, PermanentSinkError):
            concerns = ask(getattr, error, "concerns")
            return cls(text, "sink" if type(concerns) is str and concerns == "sink" else
                       "batch" if type(concerns) is str and concerns == "batch" else "event")
        if issubclass(kind, TemporarySinkError):
            seconds = number_of(ask(getattr, error, "retry_after"))
            return cls(text, "attempt", seconds if seconds == seconds else None,
                       ask(bool, ask(getattr, error, "hold")) is True)
        return cls(text, "value" if issubclass(kind, _DATA_ERRORS) else "attempt")


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with records that a sink did not take."""

    action: Literal["retry", "split", "give_up", "end"]
    """"end" gives up these and all that come later: the sink takes nothing any more."""
    wait: float = 0.0
    """Seconds before the retry."""


class Breaker:
    """Decides after each attempt of one sink; not shared between threads.

    Closed, it retries a batch up to ``attempts`` times, then gives it up and opens. Open, it holds
    the next batch and has it tried once per ``cap`` seconds until an attempt succeeds. An error
    that asks to hold opens it at once.

    Args:
        policy: the numbers.
        draw: returns a random number in 0..1.
    """

    def __init__(self, policy: RetryPolicy, draw: Callable[[], float] = random.random) -> None:
        self._policy = policy
        self._draw = draw
        self.is_open = False
        self.failures = 0
        """Failed attempts since the last success or the last batch given up."""

    def succeeded(self) -> None:
        """Note that the sink works."""
        self.is_open = False
        self.failures = 0

    def failed(self, trouble: Trouble, size: int) -> Decision:
        """Decide about a batch of ``size`` records whose attempt ended in ``trouble``."""
        if trouble.concerns == "sink":
            return Decision("end")
        if size > 1 and trouble.concerns in ("event", "value"):
            return Decision("split")  # an event that cannot be written costs nobody else
        if trouble.is_permanent:  # the sink works, it refuses these: time would change nothing
            return Decision("give_up")
        if self.is_open:
            return Decision("retry", self._policy.cap)
        if trouble.hold:
            self.is_open = True
            self.failures = 0
            wait = self._policy.cap if trouble.retry_after is None else self._wait(trouble)
            return Decision("retry", wait)
        self.failures += 1
        if self.failures >= self._policy.attempts:
            self.is_open = True
            self.failures = 0
            return Decision("give_up")
        return Decision("retry", self._wait(trouble))

    def _wait(self, trouble: Trouble) -> float:
        policy = self._policy
        if trouble.retry_after is not None:
            # the other side knows best, within reason
            return min(policy.cap, max(0.0, trouble.retry_after))
        ceiling = min(policy.cap, policy.base * 2.0 ** min(self.failures - 1, 64))
        return ceiling if policy.jitter == "none" else ceiling * self._draw()

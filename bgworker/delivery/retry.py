"""When to try again, and when to stop: pure decisions. No clock, no thread, no sleep; randomness is injected."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..model.checks import choice, number, settle
from ..model.errors import PermanentSinkError, TemporarySinkError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal


@dataclass(frozen=True)
class RetryPolicy:
    """How often and after which waits a failed ``write`` is tried again.

    Exponential backoff with full jitter: the wait before retry n is drawn from 0 .. min(cap, base * 2 ** (n - 1)).
    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    attempts: int = 8
    """Attempts for one batch, the first included. After the last the batch is given up and the breaker opens."""
    base: float = 0.5
    """Seconds; upper end of the first wait."""
    cap: float = 60.0
    """Seconds; no wait is longer, and while the breaker is open one attempt is made in this time."""
    jitter: Literal["full", "none"] = "full"
    """"none" waits the upper end; for tests, and for a sender that is alone."""

    def __post_init__(self) -> None:
        settle(self, attempts=number("attempts", self.attempts, least=1, whole=True),
               base=number("base", self.base, above=0), cap=number("cap", self.cap, above=0),
               jitter=choice("jitter", self.jitter, ("full", "none")))


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with records that a sink did not take."""

    action: Literal["retry", "split", "give_up", "end"]
    """"end" gives up these and all that come later: the sink takes nothing any more."""
    wait: float = 0.0
    """Seconds before the retry."""


class Breaker:
    """Decides after each attempt of one sink; not shared between threads.

    Closed, it retries a batch up to ``attempts`` times, then gives it up and opens. Open, it holds the next batch and has it
    tried once per ``cap`` seconds until an attempt succeeds. An error that asks to hold opens it at once.

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

    def failed(self, error: BaseException, size: int) -> Decision:
        """Decide about a batch of ``size`` records whose attempt raised ``error``."""
        if isinstance(error, PermanentSinkError):  # the sink works, it refuses these: time would change nothing
            if error.concerns == "sink":
                return Decision("end")
            return Decision("split") if size > 1 and error.concerns != "batch" else Decision("give_up")
        if self.is_open:
            return Decision("retry", self._policy.cap)
        if isinstance(error, TemporarySinkError) and error.hold:
            self.is_open = True
            self.failures = 0
            return Decision("retry", self._policy.cap if error.retry_after is None else self._wait(error))
        self.failures += 1
        if self.failures >= self._policy.attempts:
            self.is_open = True
            self.failures = 0
            return Decision("give_up")
        return Decision("retry", self._wait(error))

    def _wait(self, error: BaseException) -> float:
        policy = self._policy
        if isinstance(error, TemporarySinkError) and error.retry_after is not None:
            return min(policy.cap, max(0.0, error.retry_after))  # the other side knows best, within reason
        ceiling = min(policy.cap, policy.base * 2.0 ** min(self.failures - 1, 64))
        return ceiling if policy.jitter == "none" else ceiling * self._draw()

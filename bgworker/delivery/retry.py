"""When to try again, and when to stop: pure decisions, no clock, no thread, no sleep."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import choice, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal


@dataclass(frozen=True)
class RetryPolicy:
    """How often and after which waits a failed ``write`` is tried again.

    Exponential backoff with full jitter: the wait before retry n is drawn from 0 .. min(cap, base * 2 ** (n - 1)).
    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    attempts: int = 8
    """Attempts for one batch, the first included."""
    base: float = 0.5
    """Seconds; upper end of the first wait."""
    cap: float = 60.0
    """Seconds; no wait is longer, and an open breaker probes once in this time."""
    jitter: Literal["full", "none"] = "full"
    """"none" waits the upper end; for tests and single senders."""

    def __post_init__(self) -> None:
        number("attempts", self.attempts, least=1, whole=True)
        number("base", self.base, above=0)
        number("cap", self.cap, above=0)
        choice("jitter", self.jitter, ("full", "none"))

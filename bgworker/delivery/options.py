"""How one sink is treated: frozen, validated at construction."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ..model.checks import choice, members, number, settle
from ..model.enums import EventType
from ..model.errors import ConfigurationError
from ..model.records import KINDS
from ..model.text import show
from ..sinks.opening import checked_mode
from .retry import RetryPolicy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from os import PathLike
    from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SinkOptions:
    """How delivery treats one sink. Immutable; share it between sinks as you like."""

    queue_size: int = 100_000
    """Most stream events that wait for the sink; as many life-cycle events have room of their
    own."""
    queue_bytes: int = 64 * 1024 * 1024
    """Most memory that the events take which wait or are being written, as estimated: payload bytes
    plus 256 an event."""
    batch_size: int | None = None
    """Most events in one ``write``; None takes the sink's ``preferred_batch``, else 500."""
    linger: float = 0.0
    """Seconds to gather more events than the dispatcher handed over at once; `flush` or a full
    batch ends the wait."""
    overflow: Literal["drop_oldest", "drop_newest"] = "drop_oldest"
    """Which stream events go when the queue is full. Life-cycle events go last."""
    types: Collection[EventType | str] | None = None
    """The event types that the sink receives; None is all."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """When to try again after a failure, and when to give up on a batch."""
    park: str | PathLike[str] | None = None
    """Path of a JSONL file for events that could not be delivered or did not fit; None drops and
    counts them."""
    park_bytes: int = 64 * 1024 * 1024
    """Most bytes of that file."""
    park_mode: int | None = None
    """Permissions of that file if it is created, such as ``0o600``; None leaves them to the
    umask."""

    def __post_init__(self) -> None:
        settle(self, queue_size=number("queue_size", self.queue_size, least=1, whole=True),
               queue_bytes=number("queue_bytes", self.queue_bytes, least=1, whole=True),
               batch_size=number("batch_size", self.batch_size, least=1, whole=True, optional=True),
               linger=number("linger", self.linger, least=0),
               park_bytes=number("park_bytes", self.park_bytes, least=1, whole=True),
               park_mode=checked_mode(self.park_mode, "park_mode"),
               overflow=choice("overflow", self.overflow, ("drop_oldest", "drop_newest")),
               types=None if self.types is None else members("types", EventType, self.types))
        if not issubclass(type(self.retry), RetryPolicy):
            raise ConfigurationError(f"retry: expected a RetryPolicy, got {show(self.retry)}")


def kinds_of(types: Collection[EventType | str]) -> frozenset[int]:
    """Return the kinds of records that become events of these types."""
    return frozenset([KINDS[type_] for type_ in EventType if type_ in types])

"""DTOs as the records that they could have been built from, so that every encoder reads records.

DTOs come from everywhere: a park file, a test, a sink that passes on what it got. Pure functions,
for any thread.
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import datetime, timedelta, timezone

from .errors import WireError
from .events import Event, EventType, LifecycleEvent, LossEvent, StreamEvent
from .records import CREATED, KINDS, LOST, PROGRESS, STREAMS, Batch
from .text import describe, show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any, Union

    from .records import Record, TaskState

    Known = Union[TaskState, "Told"]

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)


class Told:
    """Stands for the `TaskState` of a task that is known from DTOs alone."""

    __slots__ = ("id", "run_id", "first_ns")

    def __init__(self, id: str, run_id: str, first_ns: int) -> None:
        self.id = id
        self.run_id = run_id
        """Empty as long as nobody has told it."""
        self.first_ns = first_ns
        """The time of its first event here."""


def records_of(events: Sequence[Event], runs: Mapping[str, str] | None = None) -> Sequence[Record]:
    """Return the events as records: a `Batch` has them, of DTOs they are made.

    Args:
        runs: run ids by task id, for DTOs that do not tell their run.

    Raises:
        WireError: an event has a type that does not fit its class or its stream, or a time that
            cannot be told in UTC, or is none of ours.
    """
    if isinstance(events, Batch):
        return events.records
    tasks: dict[str, Told] = {}
    with refusing():
        return [_record_of(event, tasks, runs or {}) for event in events]


@contextmanager
def refusing() -> Iterator[None]:
    """Make a `WireError` of whatever goes wrong with an event: delivery then halves the batch until
    that event stands alone."""
    try:
        yield
    except WireError:
        raise
    except Exception as error:
        raise WireError(f"an event cannot be encoded ({describe(error)})") from error


def _record_of(event: Event, tasks: dict[str, Told], runs: Mapping[str, str]) -> Record:
    kind, ns = KINDS.get(event.type, -1), ns_of(event.created_utc)
    if isinstance(event, LossEvent):
        if kind != LOST:
            raise WireError(f"a LossEvent has type 'EventsLost', got {show(event.type)}")
        return None, 0, LOST, ns, (event.sink, event.reason, event.count, event.by_type)
    task = tasks.get(event.task_id)
    if task is None:
        run_id = runs.get(event.task_id, "")
        task = tasks[event.task_id] = Told(event.task_id, run_id, ns)
    if isinstance(event, StreamEvent):
        if kind not in STREAMS or event.stream_type != STREAMS[kind]:
            raise WireError(
                f"stream {show(event.stream_type)} does not fit an event of type {show(event.type)}"
            )
        return task, event.seq, kind, ns, _data_of(event)
    if not isinstance(event, LifecycleEvent) or not CREATED <= kind < PROGRESS:
        raise WireError(f"a LifecycleEvent cannot have type {show(event.type)}")
    task.run_id = event.task.run_id or task.run_id
    return task, event.seq, kind, ns, event.task


def _data_of(event: StreamEvent) -> Any:
    text = event.payload, event.format, event.truncated, event.original_bytes
    progress = event.percent, event.message
    if event.type == EventType.TASK_PROGRESS:
        return progress if text == ("", "text", False, 0) else (*progress, *text)
    if progress != (None, ""):
        return (*text, *progress)
    return event.payload if text[1:] == ("text", False, 0) else text


def ns_of(time: datetime) -> int:
    """Return an aware datetime as nanoseconds since the epoch; the reverse of `utc`.

    Raises:
        WireError: it has no time zone, or lies so near to year 1 or 9999 that UTC cannot tell it.
    """
    if time.utcoffset() is None:
        raise WireError(
            f"a time needs a time zone, got {time!r}; make it with datetime.now(timezone.utc)"
        )
    try:
        since = time.astimezone(timezone.utc) - _EPOCH
    except OverflowError as error:
        raise WireError(f"{time!r} has no equivalent in UTC") from error
    return since // _MICROSECOND * 1000

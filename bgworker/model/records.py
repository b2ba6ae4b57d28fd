"""The cheap form of an event: a plain tuple, and the batches of them that sinks get.

A frozen DTO costs its builder six times what a tuple costs, so tasks emit tuples and DTOs are built
when a sink asks for them, on the sink's thread. Whoever encodes events reads records alone: `told`
turns DTOs of any origin into them. A numbered record is

    (state, seq, kind, ns, data)

``state``
    the `TaskState` that the event belongs to, or the `Told` of one that is known from DTOs alone;
    None for a loss.
``seq``
    the number of the event in its task; 0 for a loss.
``kind``
    one of the constants below, which index `TYPES`.
``ns``
    wall-clock nanoseconds since the epoch.
``data``
    for life-cycle kinds None, since ``state`` tells all, or the snapshot that a DTO holds. For
    streams the text (a `str`), or ``(payload, format, truncated, original_bytes)``. For progress
    ``(percent, message)``. For a loss ``(sink, reason, count, by_type)``. (A hand-made DTO may hold
    what bgworker's own never do: a tuple of a stream then goes on with ``percent, message``, that
    of progress with the four of a stream.)

``state`` is read after the fact, on other threads. That is sound because each of its fields is
written once, before the record that first shows it is emitted, and because a snapshot as of an
event leaves out what only later events show. The fields that change (progress, seq) are written by
the dispatcher's thread alone.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence

from .enums import EventType, StreamType, TaskStatus
from .ids import id_of, process_in
from .text import sanitise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from typing import Any, Tuple, overload

    from .events import Event, TaskSnapshot

    Record = Tuple[Any, int, int, int, Any]
else:
    def overload(function):
        return function

(CREATED, SCHEDULED, STARTED, COMPLETED, FAILED, CANCELLED, TIMED_OUT,
 PROGRESS, OUTPUT, ERROR, WARNING, VERBOSE, LOST) = range(13)

# The one table. By kind: the type of its events; the status that a task has from this event on, or
# the stream that the event belongs to; how a history spells that stream.
_TABLE: tuple[tuple[EventType, Any, int], ...] = (
    (EventType.TASK_CREATED, TaskStatus.CREATED, -1),
    (EventType.TASK_SCHEDULED, TaskStatus.SCHEDULED, -1),
    (EventType.TASK_STARTED, TaskStatus.RUNNING, -1),
    (EventType.TASK_COMPLETED, TaskStatus.COMPLETED, -1),
    (EventType.TASK_FAILED, TaskStatus.FAILED, -1),
    (EventType.TASK_CANCELLED, TaskStatus.CANCELLED, -1),
    (EventType.TASK_TIMED_OUT, TaskStatus.TIMED_OUT, -1),
    (EventType.TASK_PROGRESS, StreamType.PROGRESS, 4),
    (EventType.TASK_OUTPUT, StreamType.OUTPUT, 0),
    (EventType.TASK_ERROR, StreamType.ERROR, 1),
    (EventType.TASK_WARNING, StreamType.WARNING, 2),
    (EventType.TASK_VERBOSE, StreamType.VERBOSE, 3),
    (EventType.EVENTS_LOST, None, -1),
)

TYPES: tuple[EventType, ...] = tuple([type_ for type_, _, _ in _TABLE])
"""Event type by kind."""

KINDS: dict[EventType, int] = {type_: kind for kind, type_ in enumerate(TYPES)}
"""Kind by event type."""

STATUSES: tuple[TaskStatus, ...] = tuple([status for _, status, _ in _TABLE[:PROGRESS]])
"""Status by kind, for the life-cycle kinds."""

STREAMS: dict[int, StreamType] = {kind: _TABLE[kind][1] for kind in range(PROGRESS, LOST)}
"""Stream by kind, for the kinds that are streams: PROGRESS..VERBOSE."""

STREAM_CODES: tuple[int, ...] = tuple([code for _, _, code in _TABLE])
"""By kind, how a history spells a stream; -1 for the kinds that are none."""


def utc(ns: int) -> datetime:
    """Return wall-clock nanoseconds since the epoch as an aware UTC datetime, cut to
    microseconds."""
    # a tenth of `import bgworker` before 3.12; DTOs alone need it
    from datetime import datetime, timedelta, timezone

    return datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=ns // 1000)


class Source:
    """Where a task's code comes from. Subclasses know how to find it, and do so when first asked.

    Reading source means file access, so it waits until somebody builds a snapshot, off the task's
    thread.
    """

    __slots__ = ("wire_text",)

    is_marked = False
    """Whether it has a say in what is recorded of its tasks; see `running.source.MarkedSource`."""

    def __init__(self) -> None:
        self.wire_text = ""
        """What `wire` has encoded of it."""

    @property
    def name(self) -> str:
        """What a task is called unless it gets a name."""
        return self.script_id

    @property
    def script_id(self) -> str:
        raise NotImplementedError

    @property
    def script_hash(self) -> str:
        raise NotImplementedError

    @property
    def script_text(self) -> str | None:
        raise NotImplementedError


class TaskState:
    """What is known of one task, without its function, arguments, result or exception.

    Written by the thread that submits, then by the one that runs the task, then by whoever ends it;
    each field once, before the record that shows it. ``seq``, ``ended``, the tail of the streams
    and the ``recorded_`` fields belong to the dispatcher.
    """

    # Most tasks leave most of these as they are. Defaults in the class make a state in a quarter of
    # the time that setting each of them takes.
    status = TaskStatus.SCHEDULED
    started_ns: int | None = None
    completed_ns = 0
    duration: float | None = None
    timeout: float | None = None
    record_source = False
    arguments: str | None = None
    metadata_json = ""
    failure_type: str | None = None
    failure_message: str | None = None
    invocation_info: str | None = None
    result: str | None = None
    """JSON text of what it returned, if that is recorded."""
    handle: Callable[[], Any] | None = None
    """A weak reference to the future: nobody keeps a result because the record is kept."""
    stop_reason: str | None = None
    """Why it was asked to stop."""
    speaks_to: tuple[Any, Any, Any] | None = None
    """While it runs: what its `TaskContext` is made with, when somebody asks for one."""
    context: Any = None
    """While it runs: its `TaskContext`, if somebody has asked for one. Else it has said nothing."""
    wire_parts: tuple[tuple[str, ...], str, str, str, str] | None = None
    """What `wire` has encoded of the fields that do not change any more. Written by any sink's
    thread, each time as a whole: the worst is that two threads make the same."""
    seq = 0
    ended = 0  # the kind of its terminal event, once that has been numbered
    recorded_percent: float | None = None
    recorded_message: str | None = None
    tail: deque[Record] | None = None
    tail_bytes = 0

    def __init__(
        self,
        id: str,
        name: str,
        run_id: str,
        created_ns: int,
        source: Source | None = None,
        number: int | None = None,
    ) -> None:
        self._id = id
        self.name = name
        self.run_id = run_id
        self.created_ns = created_ns
        self.source = source
        self.number = number

    @property
    def id(self) -> str:
        """The id. If it was left empty it is made of the number when it is first asked for, since
        nobody ever looks at most tasks."""
        if not self._id and self.number is not None:
            self._id = id_of(self.created_ns, self.number, process_in(self.run_id))
        return self._id

    @property
    def script_text(self) -> str | None:
        """The source as clean text, if it is to be recorded."""
        text = self.source.script_text if self.source is not None and self.record_source else None
        return None if text is None else sanitise(text)

    def snapshot_at(self, kind: int, seq: int) -> TaskSnapshot:
        """Return the task as of its life-cycle event ``kind``: nothing that only later events
        tell."""
        return self._snapshot(STATUSES[kind], kind, seq, has_progress=kind >= COMPLETED)

    def snapshot_now(self) -> TaskSnapshot:
        """Return the task as it is; any thread."""
        status = self.status
        latest = COMPLETED if status.is_final else STARTED
        return self._snapshot(status, latest, self.seq, has_progress=True)

    def _snapshot(
        self, status: TaskStatus, kind: int, seq: int, *, has_progress: bool
    ) -> TaskSnapshot:
        from .events import TaskSnapshot

        ended = kind >= COMPLETED
        source = self.source
        return TaskSnapshot(
            task_id=self.id,
            name=self.name,
            status=status,
            run_id=self.run_id,
            created_utc=utc(self.created_ns),
            scheduled_utc=utc(self.created_ns) if kind >= SCHEDULED else None,
            started_utc=(
                None if self.started_ns is None or kind < STARTED else utc(self.started_ns)
            ),
            completed_utc=utc(self.completed_ns) if ended else None,
            duration=self.duration if ended else None,
            timeout=self.timeout,
            last_progress_percent=self.recorded_percent if has_progress else None,
            last_progress_message=self.recorded_message if has_progress else None,
            script_id=source.script_id if source else None,
            script_hash=source.script_hash if source else None,
            script_text=self.script_text,
            arguments=self.arguments,
            failure_type=self.failure_type if ended else None,
            failure_message=self.failure_message if ended else None,
            invocation_info=self.invocation_info if ended else None,
            result=self.result if ended else None,
            metadata=json.loads(self.metadata_json) if self.metadata_json else {},
            last_seq=seq,
        )


def keep_attributes_in_place(instance: object) -> None:
    """Set every attribute that has a default in the class once, on this first ``instance`` of it.

    From 3.11 on an instance has no dict as long as all its attributes have a name that the class
    knows, and a class learns names from its first few instances only. A burst of tasks is submitted
    before the first one runs: without this, what is set later would cost each of them a dict (of a
    task to a JSONL file that was a sixth, most of it garbage collection). There is room for 30.
    """
    defaults = {
        name: value
        for kind in reversed(type(instance).__mro__)
        for name, value in vars(kind).items()
    }
    for name, value in defaults.items():
        if not name.startswith("__") and not callable(value) and not isinstance(value, property):
            setattr(instance, name, value)


keep_attributes_in_place(TaskState("", "", "", 0))


def event(record: Record) -> Event:
    """Build the frozen DTO of a numbered record."""
    from .events import LifecycleEvent, LossEvent, StreamEvent

    state, seq, kind, ns, data = record
    if state is None:
        sink, reason, count, by_type = data
        return LossEvent(TYPES[LOST], utc(ns), sink, count, reason, dict(by_type))
    if kind < PROGRESS:
        task = state.snapshot_at(kind, seq) if data is None else data
        return LifecycleEvent(TYPES[kind], state.id, seq, utc(ns), task)
    common = TYPES[kind], state.id, seq, utc(ns), STREAMS[kind]
    if kind == PROGRESS:
        return StreamEvent(*common, *(data[2:] or ("", "text", False, 0)), *data[:2])
    if data.__class__ is str:
        return StreamEvent(*common, data)
    return StreamEvent(*common, *data)


class Batch(Sequence["Event"]):
    """What a sink's ``write`` gets: a read-only sequence of events, whose DTOs are built when they
    are looked at.

    Sinks that encode records themselves read ``records`` and build none.
    """

    __slots__ = ("records", "_events")

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self._events: list[Event] | None = None

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Batch: ...
    def __getitem__(self, index: int | slice) -> Event | Batch:
        if isinstance(index, slice):
            return Batch(self.records[index])
        return self._built()[index]

    def __iter__(self) -> Iterator[Event]:
        return iter(self._built())

    def _built(self) -> list[Event]:
        if self._events is None:
            self._events = [event(record) for record in self.records]
        return self._events

    def __repr__(self) -> str:
        return f"<Batch of {len(self.records)} events>"

"""Events as a JSON batch of CloudEvents 1.0. Any thread; no I/O; the same events are always the
same bytes.

Each element has these attributes:

``id``
    ``<task_id>:<seq>``: unique by itself, and the same however often the event is sent. An
    ``EventsLost`` has no task; its id is ``lost:`` and a hash of its wire object.
``source``
    ``/bgworker/<run_id>``; ``/bgworker`` where the run is not known. That is so for an
    ``EventsLost``, and for what a task says if its events come without their run, as from a park
    file, and no life-cycle event of the task has come before or in the same batch.
``type``
    ``io.bgworker.<EventType>.v1``.
``subject``
    the task's id; of an ``EventsLost`` the sink's name.
``time``
    of the event.
``sequence``
    the event's number in its task, with leading zeros, so that texts sort like numbers. An
    ``EventsLost`` has none.
``data``
    the wire object itself.

Source: CloudEvents 1.0.2, https://github.com/cloudevents/spec: core; JSON format, section 4;
    extension "sequence".
"""

from __future__ import annotations

import hashlib
from json.encoder import encode_basestring_ascii as _quote

from ..model.events import LifecycleEvent
from ..model.records import LOST, TYPES, Batch
from ..model.told import records_of
from ..model.wire import encode_each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..model.events import Event

CONTENT_TYPE = "application/cloudevents-batch+json"

MOST_RUNS = 10_000
"""Tasks whose run `KnownRuns` remembers; beyond, the one that it learnt first is forgotten."""

_BEFORE_TIME = ',"time":"'
_TIME_LENGTH = len("2026-11-23T14:46:00.123456Z")
_MIDDLES = [f'","type":"io.bgworker.{type_.value}.v1","time":"' for type_ in TYPES]  # by kind


class KnownRuns:
    """The run of each task, for events that do not tell it: learnt from life-cycle events that were
    taken.

    It changes only in `learn`. A batch that is tried again until it is taken has the same bytes
    each time.
    """

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        """Run id by task id."""

    def learn(self, events: Sequence[Event]) -> None:
        """Remember what the events tell, and forget the tasks that have ended. A `Batch` needs no
        memory."""
        if isinstance(events, Batch):
            return
        for event in events:
            if isinstance(event, LifecycleEvent):
                self.known[event.task_id] = event.task.run_id
        for event in events:
            if isinstance(event, LifecycleEvent) and event.type.is_terminal:
                self.known.pop(event.task_id, None)
        while len(self.known) > MOST_RUNS:
            del self.known[next(iter(self.known))]


def encode_batch(events: Sequence[Event], runs: Mapping[str, str]) -> tuple[bytes, str]:
    """Return the events as a JSON array, and a text that tells these events from any others.

    That text is made of the wire objects alone. So it is the same when they come from a park file,
    though less is known of their runs.

    Args:
        events: a `Batch` is encoded from its records, several times as fast.
        runs: run ids by task id, for events that are no `Batch`.

    Raises:
        WireError: an event has no wire form.
    """
    records = records_of(events, runs)
    lines = encode_each(Batch(records))
    heads = {
        state: _head(state.id, state.run_id)
        for state in {record[0] for record in records}
        if state is not None
    }
    elements = [
        (
            _loss_element(data[0], line)
            if state is None
            else _element(heads[state], seq, _MIDDLES[kind], line)
        )
        for (state, seq, kind, _, data), line in zip(records, lines)
    ]
    return f"[{','.join(elements)}]".encode(), _digest("\n".join(lines))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _element(head: str, seq: int, middle: str, line: str) -> str:
    return f'{head}{seq}","sequence":"{str(seq).zfill(10)}{middle}{_time(line)}","data":{line}}}'


def _loss_element(sink: str, line: str) -> str:
    return (f'{{"specversion":"1.0","source":"/bgworker"{_subject(sink)},"id":"lost:{_digest(line)}'
            f'{_MIDDLES[LOST]}{_time(line)}","data":{line}}}')


def _time(line: str) -> str:
    # in no text before it: there, quotes are escaped
    start = line.index(_BEFORE_TIME) + len(_BEFORE_TIME)
    return line[start:start + _TIME_LENGTH]


def _head(task_id: str, run_id: str) -> str:
    """The beginning of an element, up to where the number in its id follows."""
    source = "/bgworker"
    if run_id.isalnum() and run_id.isascii():  # as our own ids are
        source += f"/{run_id}"
    elif run_id:  # those in a file may be anything
        from urllib.parse import quote

        source += f"/{quote(run_id, safe='', errors='replace')}"
    return (
        f'{{"specversion":"1.0","source":"{source}"{_subject(task_id)},"id":{_quote(task_id)[:-1]}:'
    )


def _subject(text: str) -> str:
    return f',"subject":{_quote(text)}' if text else ""  # CloudEvents forbid an empty one

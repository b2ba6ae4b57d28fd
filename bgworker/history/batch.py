"""A batch of events, sorted into what a store keeps of it. Runs on the sink's thread.

Guarantees of every store that takes it so. Storing a batch again, or after later ones, changes
nothing: stream rows are known by (task, seq), a task's row never goes back to an earlier event (see
`taskrows`), losses are known by all that they say.
"""

from __future__ import annotations

from operator import itemgetter

from ..model.ids import is_own_run
from ..model.records import LOST, PROGRESS, STREAMS
from ..model.text import json_text
from ..model.told import Told
from ..model.wire import ns_text
from .taskrows import TaskRows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from typing import Any

    from ..model.records import Record
    from ..model.told import Known

_STATE, _KIND = itemgetter(0), itemgetter(2)
SPEECH = frozenset(kind for kind in STREAMS if kind != PROGRESS)
"""The kinds of what a task says."""

LOSS_COLUMNS = ("created_utc", "sink", "reason", "count", "by_type")


class SortedBatch:
    """The rows of a batch, but for those of its streams, which each store spells in its own way."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.tasks = TaskRows()
        self.streams: Sequence[Record] = ()
        """The records of stream events, in order."""
        self.losses: list[tuple[Any, ...]] = []
        """Rows with `LOSS_COLUMNS`."""
        self._sort(records)
        self.speakers: list[Known] = list(dict.fromkeys(map(_STATE, self.streams)))
        """The tasks with stream events."""
        # A task that only talks shows that its run lives. Without this the run would count as over
        # once one of its sinks was closed.
        self.tasks.runs.update(state.run_id for state in self.speakers
                               if not isinstance(state, Told) and is_own_run(state.run_id))

    def unknown(self, known: Collection[str]) -> TaskRows:
        """Return rows for the speakers whose ids are not ``known`` to the store."""
        rows = TaskRows()
        for state in self.speakers:
            if state.id not in known:
                rows.add_unknown(state)
        return rows

    def _sort(self, records: Sequence[Record]) -> None:
        kinds = set(map(_KIND, records))
        if SPEECH.issuperset(kinds):
            # the usual batch of tasks that talk much, in a third of the time
            self.streams = records
            return
        if kinds.isdisjoint(STREAMS) and LOST not in kinds:  # and of those that do not
            for record in dict(zip(map(_STATE, records), records)).values():
                self.tasks.add(record)
            return
        streams: list[Record] = []
        latest: dict[Any, Record] = {}
        progress: dict[Any, Record] = {}
        for record in records:
            state, _, kind, ns, data = record
            if kind < PROGRESS:
                latest[state] = record
            elif kind == LOST:
                sink, reason, count, by_type = data
                self.losses.append((ns_text(ns), sink, reason, count, json_text(dict(by_type))))
            else:
                streams.append(record)
                if kind == PROGRESS:
                    progress[state] = record
        self.streams = streams
        for state, record in latest.items():
            self.tasks.add(record, progress.pop(state, None) if progress else None)
        for record in progress.values():
            self.tasks.add_progress(record)


def wide_values(kind: int, data: Any) -> tuple[str, float | None, int | None, int | None]:
    """Return payload, percent, original bytes and whether it is JSON (1 or None) of a stream record
    whose data is more than a plain text."""
    if kind == PROGRESS:
        return data[1], data[0], None, None
    payload, format_, is_truncated, original_bytes = data[:4]
    return payload, None, original_bytes if is_truncated else None, 1 if format_ == "json" else None

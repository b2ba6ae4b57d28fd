"""What the sinks of this room share: how a batch goes in, what is told of runs, when is pruned, how
all is read, and what a failure means. Runs on the sink's thread.
"""

from __future__ import annotations

import logging
from functools import partial

from ..history.answers import Reading, last_event_of, loss_of
from ..history.batch import SortedBatch
from ..model import checks
from ..model.clock import monotonic
from ..model.errors import BgworkerError, PermanentSinkError, SinkError, TemporarySinkError
from ..model.ids import is_own_run
from ..model.reports import report
from ..model.text import describe, show
from ..model.told import records_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, TypeVar

    from ..model.events import Event

    T = TypeVar("T")

LOOK_INTERVAL = 1.0
"""Seconds between two looks for what is to be pruned, unless one takes more than a twentieth of
that."""
PRUNE_SECONDS = 0.02
"""Seconds that are pruned after a batch, or as long as it took to store that: enough for more rows
than it brings."""
READ_TASKS, READ_ROWS = 200, 2000
PATIENCE = 5
"""Failures in a row after which a server that cannot be reached is waited for: until then each is
tried again soon, and then none of the events is given up."""


class Store:
    """A sink that keeps a history on a server.

    A subclass says how to do something there and what an error means (`_do`, `_store`, `_end`,
    `_prune_some`, `_disconnect`).

    Args:
        title: names the history in messages.
        place: what to name another of where this one cannot be used.
        max_age, max_tasks: see the subclasses.
    """

    def __init__(
        self, title: str, place: str, max_age: float | None, max_tasks: int | None
    ) -> None:
        self._title = title
        self._place = place
        self._max_age = checks.number("max_age", max_age, above=0, optional=True)
        self._max_tasks = checks.number("max_tasks", max_tasks, least=0, whole=True, optional=True)
        self._only_reads = False
        self._runs: set[str] = set()  # of this process, whose end is to be noted
        self._failures = 0
        self._next_look = 0.0

    def write(self, events: Sequence[Event]) -> None:
        """Store the events; connect first if need be. Then prune for a moment if that is due.

        Raises:
            TemporarySinkError: the server cannot be reached, or does not take it now. Whether
                something was stored may be unknown, and makes no difference to the next attempt.
            PermanentSinkError: an event can never be stored, or a newer bgworker has brought the
                history to a version that we do not know.
        """
        begun = monotonic()
        try:
            batch = SortedBatch(records_of(events))
        except Exception as error:
            # The courier halves the batch then, until the event that is no row stands alone.
            raise PermanentSinkError(f"cannot store an event: {describe(error)}") from error
        # What tells of no task of theirs, such as a loss, shows all the same that our runs live.
        batch.tasks.runs.update(filter(is_own_run, self._runs))
        self._do("write to", self._store, batch)
        self._runs.update(filter(is_own_run, batch.tasks.runs))
        if self._max_age is not None or self._max_tasks is not None:
            self._prune(max(PRUNE_SECONDS, monotonic() - begun))

    def flush(self) -> None:
        """Do nothing: what ``write`` has returned from is stored."""

    def close(self) -> None:
        """Note the end of this process's runs and disconnect; harmless if that was done, and in a
        forked child. A later ``write`` connects again.
        """
        runs = [run_id for run_id in self._runs if is_own_run(run_id)]
        try:
            if runs:
                try:
                    self._do("close", self._end, runs)
                except TemporarySinkError:
                    self._do("close", self._end, runs)  # the connection was lost long since
        finally:
            self._runs.clear()
            self._disconnect()

    def events(self) -> Iterator[Event]:
        """Yield all that is recorded, task by task in the order of their ids, as `History.events`
        does of a file. Any thread; makes nothing, and uses no connection of the sink's.

        Raises:
            SinkError: there is no history of a version that we know, or the server cannot be
                reached.
        """
        reader, reading = self._reader(), Reading()
        reader._only_reads = True
        read: Callable[..., list[Any]] = partial(reader._do, "read")
        try:
            last_id = ""
            while rows := read(reader._tasks_after, last_id):
                last_id = rows[-1][1]
                for row in rows:
                    task = reading.task(row)
                    if task is None:
                        continue
                    seq = -2**31
                    while found := read(reader._streams_after, row, seq):
                        yield from reading.events(task.task_id, found)
                        seq = found[-1][0]
                    yield last_event_of(task)
            key = 0
            while rows := read(reader._losses_after, key):
                yield from map(loss_of, rows)
                key = rows[-1][0]
        finally:
            reader._disconnect()

    def _prune(self, seconds: float) -> None:
        """Remove what is too much, for about so many seconds. Errors are only reported: by now the
        batch is stored."""
        begun = now = monotonic()
        if begun < self._next_look:
            return
        try:
            is_more = True
            while is_more and now - begun < seconds:
                is_more = self._do("prune", self._prune_some)
                now = monotonic()
            if not is_more:
                self._next_look = now + max(LOOK_INTERVAL, 20 * (now - begun))
        except BgworkerError as error:
            self._next_look = monotonic() + 60
            report(logging.WARNING, "%s could not be pruned, which is tried again in a minute: %s",
                   self._title, str(error))

    def _failed(self, what: str, why: str, *, remedy: str = "", is_away: bool = False) -> SinkError:
        """Return what is raised for something that may work later.

        Args:
            remedy: what somebody has to do first; the events are held until then.
            is_away: the server cannot be reached.
        """
        self._failures += not remedy
        return TemporarySinkError(
            f"cannot {what} {self._title}: {why}{remedy and '; '}{remedy}",
            hold=bool(remedy) or is_away and self._failures > PATIENCE)

    def _foreign(self, what: str) -> SinkError:
        """Return what is raised where a name that a history needs is somebody else's."""
        self._runs.clear()  # not even their ends can be noted
        return PermanentSinkError(
            f"{self._title} has something that is none of bgworker's under a name that a history "
            f"needs ({what}); name another {self._place}", concerns="sink")

    def _check_version(self, found: Any, known: int) -> None:
        """Refuse a version that is none of ours, and a history that a newer bgworker has made, or
        has brought further meanwhile; for a reader also one that is still to be made."""
        if not isinstance(found, int):
            raise self._foreign(f"schema_version: {show(found)}")
        if found > known:
            self._runs.clear()  # not even their ends can be noted
            raise PermanentSinkError(
                f"{self._title} has a history of version {found}, and this bgworker knows versions "
                f"up to {known}; upgrade bgworker, or name another {self._place}", concerns="sink")
        if found < known and self._only_reads:
            raise PermanentSinkError(
                f"{self._title} has no history of this version; have a sink open it first, or name "
                f"another {self._place}", concerns="sink")

    # -- what a subclass does --

    def _do(self, what: str, act: Callable[..., T], *arguments: Any) -> T:
        """Call ``act`` with what reaches the server (a cursor, a database) and the arguments; raise
        what goes wrong as a `SinkError`."""
        raise NotImplementedError

    def _store(self, at: Any, batch: SortedBatch) -> None:
        raise NotImplementedError

    def _end(self, at: Any, runs: list[str]) -> None:
        """Note the end of runs."""
        raise NotImplementedError

    def _prune_some(self, at: Any) -> bool:
        """Remove some of what is too much; True if there may be more."""
        raise NotImplementedError

    def _disconnect(self) -> None:
        raise NotImplementedError

    def _reader(self) -> Store:
        """Return another sink to the same history."""
        raise NotImplementedError

    def _tasks_after(self, at: Any, last_id: str) -> list[Any]:
        """Return rows of `TASK_COLUMNS`, some of those with greater ids, in the order of ids."""
        raise NotImplementedError

    def _streams_after(self, at: Any, task: Any, seq: int) -> list[Any]:
        """Return rows for `Reading.events`, some of those of a task's row with greater numbers."""
        raise NotImplementedError

    def _losses_after(self, at: Any, key: Any) -> list[Any]:
        """Return rows for `loss_of`, some of those with greater keys; 0 is less than all."""
        raise NotImplementedError


def kinds_of(value: object) -> set[str]:
    """Return the names of the classes of a driver's value; the classes are not ours to import."""
    return {kind.__name__ for kind in type(value).__mro__}

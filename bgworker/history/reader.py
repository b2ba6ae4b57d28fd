"""The read side of a history file: what tasks there were, what they said, how they ended.

A `History` never writes, never checkpoints, and never keeps the writer waiting: each question is
one short read transaction, and its answer is complete before it is given out. Any thread may ask;
they take turns.

A task that has not ended though its process is gone shows as ``interrupted``. That is judged by a
lock that the kernel frees when a process dies, not by age, and only for processes of this machine:
of a history that another machine writes, or that was copied, only what is recorded is known.

What only a page or a drawing asks is loaded with the first such question: it would cost the command
line as much as all the rest.
"""

from __future__ import annotations

import os
import sqlite3
from array import array
from contextlib import contextmanager
from itertools import chain
from time import sleep

from ..model import checks
from ..model.errors import ConfigurationError, HistoryError
from ..model.events import TaskStatus
from ..sinks.opening import absolute, shown
from . import questions
from .answers import (SELECT_LOSSES, SELECT_RUNS, Attempts, Losses, Reading, Run, Stats,
                      last_event_of, loss_of, run_of)
from .connections import Database
from .presence import OPEN_RUNS, is_alive
from .presencelock import PresenceLock
from .schema import (BUSY_SECONDS, bounded, connect_to_read, damage_told, damaged, lock_path,
                     roll_back, this_host)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime, timedelta
    from types import TracebackType
    from typing import Any, Tuple

    from ..model.events import Event, LossEvent, StreamEvent, StreamType, TaskSnapshot
    from .changes import Changes
    from .charts import FailureGroups, Throughput, Timeline
    from .pages import LinePage, RunCounts, TaskPage
    from .past import Other, Past
    from .searching import Found

    Version = Tuple[int, int]

class History:
    """A history file, opened for reading; a context manager.

    It may be asked while others write the file, in a directory that cannot be written to, and long
    after its writer is gone. A file that is deleted and made anew is noticed. Every method may be
    called from any thread, raises `HistoryError` when the file cannot be read (any more), and
    blocks no longer than its own question takes.

    Whoever can write the file can put anything into it. Values of a wrong type, and texts of more
    than 4 MiB, come as a text that says so; rows of which no task or event can be made do not come,
    and are counted in ``left_out``.

    Args:
        path: the file of a `SqliteSink`.
        patience: seconds that a question may take before it raises `TookTooLong`, and that it waits
            at most for a file that a stranger's program has locked. None lets it take the time that
            a file of its size may need, and wait 10 s.

    Raises:
        HistoryError: the file is missing, damaged, of another program, or of a newer bgworker.
    """

    def __init__(self, path: str | os.PathLike[str], *, patience: float | None = None) -> None:
        self.path = absolute(path)
        self._patience = checks.number("patience", patience, above=0, optional=True)
        # lent to one thread at a time, which guards all below
        self._database = Database(self.path, self._connect)
        self._lock_file = PresenceLock.share(lock_path(self.path))
        # runs whose process has died, none of which comes back; in bytes: SQLite may have any in
        # its texts
        self._dead: set[bytes] = set()
        self._unended: set[str] = set()  # runs without an end, as of a version
        self._looked_at: Version | None = None
        self._opened = 0
        # what the file was, if it was taken for one that does not change
        self._still: tuple[int, ...] | None = None
        self._is_closed = False
        self._reading = Reading()
        self._host = this_host()
        try:
            with self._asking():
                pass
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; any later question raises `HistoryError`. Harmless if it is closed."""
        if not self._is_closed:
            self._is_closed = True
            self._database.close()
            self._lock_file.leave()

    def __enter__(self) -> History:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"History({self.path!r})"

    @property
    def left_out(self) -> int:
        """Rows that were met in all answers until now, and are too damaged to be part of one."""
        return self._reading.left_out

    # -- tasks --

    def tasks(
        self,
        *,
        status: TaskStatus | str | None = None,
        name: str | None = None,
        since: datetime | timedelta | None = None,
        run: str | None = None,
        left: bool = False,
        limit: int | None = 50,
    ) -> list[TaskSnapshot]:
        """Return tasks, the newest first: the latest created, or of a final status the latest
        ended.

        Args:
            status: only tasks of this status.
            name: only tasks whose name matches this pattern, case and all: ``*``, ``?`` and
                ``[...]`` are wild.
            since: only tasks that have not ended or ended after this time (aware), or less than
                this long ago. Of an interrupted one the last sign of life counts.
            run: only tasks of this run: its id, the beginning of it, its last digits, at least 8,
                ``last``, or ``last~N``, the Nth before it.
            left: only tasks that did not complete, and that no later one ran again.
            limit: most tasks that are returned; None is all.

        Raises:
            ConfigurationError: no run, or more than one, is meant by ``run``.
        """
        with self._searching(status, name, since, run, left, limit) as (connection, found):
            return list(self._tasks(connection, list(found)))

    def task_keys(self, *, status: TaskStatus | str | None = None, name: str | None = None,
                  since: datetime | timedelta | None = None, run: str | None = None,
                  left: bool = False, limit: int | None = 50) -> Sequence[int]:
        """Return what `tasks_of` takes for the tasks that `tasks` returns: 8 bytes for each."""
        with self._searching(status, name, since, run, left, limit) as (_, found):
            return array("q", found)

    def tasks_of(self, keys: Sequence[int], *, is_brief: bool = False) -> Iterator[TaskSnapshot]:
        """Yield the tasks of these keys that are still there, and hold only a few at a time.

        Args:
            is_brief: texts are cut to 1,000 characters, and what no table shows is left out.
        """
        for start in range(0, len(keys), questions.MOST_TASKS):
            with self._asking() as connection:
                tasks = list(self._tasks(connection, keys[start:start + questions.MOST_TASKS],
                                         is_brief))
            yield from tasks

    def _tasks(self, connection: sqlite3.Connection, keys: Sequence[int],
               is_brief: bool = False) -> Iterator[TaskSnapshot]:
        """Yield the tasks of these keys that are still there."""
        while keys:
            rows = questions.task_rows(connection, keys, is_brief=is_brief)
            yield from filter(None, map(self._reading.task, rows))
            keys = keys[len(rows):]

    @contextmanager
    def _searching(self, status: TaskStatus | str | None, name: str | None,
                   since: datetime | timedelta | None, run: str | None, left: bool,
                   limit: int | None) -> Iterator[tuple[sqlite3.Connection, Iterator[int]]]:
        """Give the keys of the tasks that are asked for, inside one view of the file."""
        wanted = None if status is None else checks.member("status", TaskStatus, status)
        after = None if since is None else questions.moment(since)
        checks.number("limit", limit, least=0, whole=True, optional=True)
        with self._asking() as connection:
            run_id = questions.find_run(connection, run)
            yield connection, questions.search(connection, wanted, name, after, limit, run_id, left)

    def task(self, task: str, *, run: str | None = None) -> TaskSnapshot:
        """Return the task that is meant by an id, a name (its newest task), ``last``, the number of
        a command (``"[12]"`` or ``"12"``), the beginning of an id, or its last digits, at least 8.

        Args:
            run: only tasks of this run, as for `tasks`; None is any, and for a number the newest.

        Raises:
            UnknownTask: there is none.
            AmbiguousTask: several ids begin or end so; the error names some of them.
            ConfigurationError: no run, or more than one, is meant by ``run``.
        """
        with self._asking() as connection:
            key, task_id = questions.find(connection, task, run)
            found = next(self._tasks(connection, (key,)), None)
        if found is None:
            raise damaged(self.path, f"the task {task_id[:80]!r} has no status")
        return found

    def past(self, task: str) -> Past:
        """Return how tasks ended that have the name of a task, or are the same command, and what
        ran it again.

        Args:
            task: as for `task`, with the same errors.
        """
        from . import past

        with self._asking() as connection:
            return past.past_of(connection, questions.find(connection, task)[0])

    def cancelling(self, task_ids: Collection[str]) -> dict[str, tuple[TaskStatus, bool]]:
        """Return of each of these tasks that is still there its status, and whether its process has
        heard that it is to be cancelled (which is forgotten with its end)."""
        from . import requests

        with self._asking() as connection:
            return requests.states(connection, task_ids)

    def later_of(self, task: str) -> Other | None:
        """Return the task that ran a task again, or ran that one again, and so on; None if none
        did.

        Args:
            task: as for `task`, with the same errors.
        """
        from . import past

        with self._asking() as connection:
            return past.later_of(connection, questions.find(connection, task)[0])

    def id_length(self, task_ids: Collection[str]) -> int:
        """Return how many of the last digits of these ids tell them apart: 8, where these are not
        enough 16, else all. `task` takes that much of an id."""
        with self._asking() as connection:
            return questions.id_length(connection, task_ids)

    def page(
        self,
        *,
        status: TaskStatus | str | None = None,
        name: str | None = None,
        text: str | None = None,
        run: str | None = None,
        fingerprint: str | None = None,
        since: datetime | timedelta | None = None,
        until: datetime | None = None,
        before: str | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> TaskPage:
        """Return a page of tasks, the latest created first, whatever their status.

        Args:
            status, name: as for `tasks`.
            text: only tasks that have this in their name, last message, failure or output, in
                small or capital letters.
            run: as for `tasks`.
            fingerprint: only tasks of this `FailureGroup`.
            since: as for `tasks`.
            until: only tasks that were created before this time (aware).
            before: the cursor of an earlier page: what is older than it.
            after: the same: what is newer than it, and next to it.
            limit: most tasks, 1 to 1,000.

        Raises:
            ConfigurationError: as for `tasks`.
        """
        from . import pages

        limit = _most("limit", limit)
        with self._asking() as connection:
            wanted = pages.Wanted(
                None if status is None else checks.member("status", TaskStatus, status),
                pages.wanted_text("name", name), pages.wanted_text("text", text),
                questions.find_run(connection, run), pages.wanted_text("fingerprint", fingerprint),
                questions.time_since(since),
                None if until is None else questions.id_of(questions.moment(until)))
            return pages.task_page(connection, self._reading, wanted, before, after,
                                   limit)

    def run_counts(self, *, run: str | None = None, since: datetime | timedelta | None = None,
                   before: str | None = None, limit: int = 50) -> tuple[RunCounts, ...]:
        """Return runs with their counts, the newest first.

        Args:
            run: only this run, as for `tasks`.
            since: only runs that live, or ended after this time (aware), or less than this long
                ago. Of one that was killed its start counts.
            before: only runs with a smaller id: the last one of an earlier answer.
            limit: most runs, 1 to 1,000.
        """
        from . import pages

        limit = _most("limit", limit)
        with self._asking() as connection:
            return pages.run_counts(connection, self._host, questions.find_run(connection, run),
                                    questions.time_since(since), before, limit)

    def search(
        self,
        keys: Sequence[int],
        pattern: re.Pattern[str],
        *,
        literal: str | None = None,
        types: Collection[StreamType | str] | None = None,
        failures: bool = True,
    ) -> Iterator[Found]:
        """Yield what tasks said, and why they failed, as far as a pattern may be in it: a task
        that said much of it comes several times. A million rows take about a second, and a few
        megabytes.

        Args:
            keys: the tasks, which are searched in this order, as from `task_keys`.
            pattern: is matched against texts of several lines.
            literal: the text that is the pattern, if it is no more than that.
            types: only these streams.
            failures: whether failures and their tracebacks are searched.
        """
        from . import searching

        which = None if types is not None and not types else questions.which_streams(types)
        search = searching.Search(pattern, literal, which, has_failures=failures)
        for start in range(0, len(keys), searching.TASKS):
            left, after = [*keys[start:start + searching.TASKS]], 0.0
            while left:
                with self._asking() as connection:
                    found, left, after = search.part(connection, left, after)
                    shown = [*found]
                    answers = []
                    while shown:
                        rows = questions.task_rows(connection, shown, is_brief=True)
                        for key, task in zip(shown, map(self._reading.task, rows)):
                            if task is not None:
                                said, failure = found[key]
                                events = self._reading.events(task.task_id, said)
                                answers.append(searching.Found(task, tuple(events), failure))
                        shown = shown[len(rows):]
                yield from answers

    def changes(self, before: str = "last~1", after: str = "last", *,
                limit: int | None = 20) -> Changes:
        """Return what became of the tasks of one run in another. Reads all tasks of both, and holds
        some hundred bytes for each.

        Args:
            before, after: the runs, as for `tasks`.
            limit: most tasks of each change; None is all.

        Raises:
            ConfigurationError: as for `tasks`; or a run has more than a million tasks.
        """
        from . import changes

        checks.number("limit", limit, least=0, whole=True, optional=True)
        with self._asking() as connection:
            ids = [questions.find_run(connection, each) or "" for each in (before, after)]
            found = changes.Comparison(connection, *ids)

            def task(key: int | None) -> TaskSnapshot | None:
                return None if key is None else next(self._tasks(connection, [key], True), None)

            first, second = [
                run_of(connection.execute(f"{SELECT_RUNS}WHERE run_id = ?",
                                          (self._host, each)).fetchone()) for each in ids]
            return changes.Changes(
                first, second, found.is_rerun, found.counts,
                *[tuple([changes.Change(task(old), task(new))
                         for old, new in found.keys[change][:limit]])
                  for change in changes.CHANGES])

    # -- streams --

    def lines(
        self,
        task: str,
        *,
        before: int | None = None,
        after: int | None = None,
        types: Collection[StreamType | str] | None = None,
        limit: int = 500,
    ) -> LinePage:
        """Return some of what a task said, at most a megabyte: the last lines, or those next to a
        place.

        Args:
            task, types: as for `streams`.
            before: the last ones with a smaller ``seq``.
            after: the first ones with a greater ``seq``; 0 begins with the first of all.
            limit: most lines, 1 to 1,000.
        """
        from . import pages

        which = questions.which_streams(types)
        checks.number("before", before, whole=True, optional=True)
        checks.number("after", after, whole=True, optional=True)
        limit = _most("limit", limit)
        with self._asking() as connection:
            key, task_id = questions.find(connection, task)
            return pages.line_page(connection, key, task_id, self._reading, which, before, after,
                                   limit)

    def streams(
        self,
        task: str,
        *,
        since: int = 0,
        types: Collection[StreamType | str] | None = None,
        limit: int | None = None,
        newest: bool = False,
    ) -> list[StreamEvent]:
        """Return what a task said and its progress, in order. A million events take about a
        gigabyte: use ``limit``.

        Args:
            task: what `task` takes, with the same errors.
            since: only events with a greater ``seq``.
            types: only these streams.
            limit: most events that are returned; None is all.
            newest: the last ``limit`` events, not the first.
        """
        checks.number("since", since, whole=True)
        checks.number("limit", limit, least=0, whole=True, optional=True)
        which = questions.which_streams(types)
        with self._asking() as connection:
            key, task_id = questions.find(connection, task)
            rows = list(chain.from_iterable(questions.stream_groups(
                connection, key, since, which, questions.ALL if limit is None else limit,
                is_newest_first=newest)))
        return self._reading.events(task_id, rows[::-1] if newest else rows)

    def pages(self, task: str, *, since: int = 0, newest: int | None = None,
              types: Collection[StreamType | str] | None = None) -> Iterator[list[StreamEvent]]:
        """Yield what a task has said, a page at a time, each of a bounded size.

        Args:
            task, since, types: as for `streams`.
            newest: begin with the last so many; None is all.
        """
        which = questions.which_streams(types)
        with self._asking() as connection:
            key, task_id = questions.find(connection, task)
            if newest is not None:
                since = max(since, questions.before_newest(connection, key, which, newest))
        while rows := self._rows_after(task_id, since, which):
            yield self._reading.events(task_id, rows)
            since = rows[-1][0]

    def _rows_after(self, task_id: str, since: float, which: str) -> list[Any]:
        """Return some rows of a task's streams, none where no more are to come. By its id: its key
        may be another's by now, if it was removed."""
        with self._asking() as connection:
            key, _ = questions.end_of(connection, task_id)
            return next(questions.stream_groups(connection, key or 0, since, which), [])

    def follow(
        self,
        task: str,
        *,
        since: int = 0,
        types: Collection[StreamType | str] | None = None,
        interval: float = 0.1,
        wait: Callable[[float], object] = sleep,
    ) -> Iterator[StreamEvent]:
        """Yield what a task said and says, until it has ended or was interrupted, or is no longer
        in the history.

        Args:
            task: what `task` takes, with the same errors, which come when the first event is asked
                for.
            since: only events with a greater ``seq``.
            types: only these streams.
            interval: seconds between two looks at the file. One that finds nothing new costs
                microseconds.
            wait: called with the interval between two looks.
        """
        which = questions.which_streams(types)
        with self._asking() as connection:
            _, task_id = questions.find(connection, task)
        seen: Version | None = None
        while True:
            # asked before the look: whatever others write meanwhile changes it once more
            version = self.version()
            with self._asking() as connection:
                key, is_over = questions.end_of(connection, task_id)
                groups = questions.stream_groups(connection, key or 0, since, which)
                rows = next(groups, []) if version != seen or is_over else []
            if rows:
                yield from self._reading.events(task_id, rows)
                since = rows[-1][0]
                continue
            if is_over:
                return
            seen = version
            wait(interval)

    def version(self) -> Version:
        """Return what is different, once somebody has written to the file, from what was returned
        before."""
        with self._connected() as connection:
            return self._version_of(connection)

    # -- all of it --

    def stats(self, *, since: datetime | timedelta | None = None,
              run: str | None = None) -> Stats:
        """Return counts by status, failures by type, durations by name (of the 1,000 most
        frequent), and losses.

        Args:
            since: as for `tasks`; losses that were noted after it.
            run: as for `tasks`; losses belong to no run.
        """
        after = questions.time_since(since)
        with self._asking() as connection:
            run_id = questions.find_run(connection, run)
            return Stats(
                questions.counts(connection, after, run_id),
                questions.failures(connection, after, run_id),
                questions.durations(connection, after, run_id),
                questions.losses(connection, after),
            )

    def failure_groups(self, *, run: str | None = None,
                       since: datetime | timedelta | None = None,
                       limit: int = 100) -> FailureGroups:
        """Return the tasks that failed or timed out, in groups that are alike, the latest first.

        Args:
            run: as for `tasks`.
            since: only tasks that failed after this time (aware), or less than this long ago.
            limit: most groups, 1 to 1,000.
        """
        from . import charts

        limit = _most("limit", limit)
        with self._asking() as connection:
            return charts.failure_groups(connection, questions.find_run(connection, run),
                                         questions.time_since(since), limit)

    def throughput(self, *, run: str | None = None, since: datetime | timedelta | None = None,
                   until: datetime | None = None, buckets: int = 120) -> Throughput:
        """Return how many tasks ended by the minute, or by a longer time for a longer span.

        Args:
            run: as for `tasks`.
            since, until: only what ended between these times; the buckets fill the span from
                ``since``, or the first end, to ``until``, or the last end.
            buckets: most stretches of time, 1 to 1,000.
        """
        from . import charts

        buckets = _most("buckets", buckets)
        end = "~" if until is None else questions.time_since(until)  # "~" sorts after all times
        with self._asking() as connection:
            return charts.throughput(connection, questions.find_run(connection, run),
                                     questions.time_since(since), end, buckets)

    def timeline(self, *, run: str | None = None, since: datetime | timedelta | None = None,
                 until: datetime | None = None, bars: int = 2000, lanes: int = 64,
                 loads: int = 240, most: int = 10_000) -> Timeline:
        """Return when tasks ran, on lanes, and how many ran at once.

        Args:
            run: as for `tasks`.
            since, until: only tasks that ran between these times, and of them what lies between.
                Of those that ended after ``until``, the first 2,000 of each status are looked at.
            bars: most bars, 1 to 10,000.
            lanes: most lanes, 1 to 1,000; tasks for which none is free have no bar.
            loads: most stretches of time of the load, 1 to 1,000.
            most: most tasks that are read, the latest: 10,000 take about 0.1 s.
        """
        from . import charts

        bars, loads = _most("bars", bars, 10_000), _most("loads", loads)
        lanes, most = _most("lanes", lanes), _most("most", most, 1_000_000)
        begin, end = [None if time is None else questions.moment(time) for time in (since, until)]
        with self._asking() as connection:
            return charts.timeline(connection, questions.find_run(connection, run), begin, end,
                                   bars, lanes, loads, most)

    def counts(self, *, run: str | None = None,
               since: datetime | timedelta | None = None) -> dict[TaskStatus, int]:
        """Return how many tasks there are of each status, without those of which there are none.

        Args:
            run: as for `tasks`.
            since: as for `tasks`.
        """
        after = questions.time_since(since)
        with self._asking() as connection:
            run_id = questions.find_run(connection, run)
            return questions.counts(connection, after, run_id)

    def attempts(self, script_hashes: Iterable[str],
                 metadata: Mapping[str, object]) -> dict[str, Attempts]:
        """Return what became of the tasks of each of these sources that had all of this
        metadata."""
        with self._asking() as connection:
            again = questions.run_again(connection)
            return {each: questions.attempts(connection, each, metadata, again)
                    for each in script_hashes}

    def usual_seconds(
        self, script_hashes: Iterable[str], *, completed_only: bool = False
    ) -> dict[str, float]:
        """Return how long tasks of each of these sources usually ran, in seconds: the median of
        those of the last nine that completed, or where none did, that failed or timed out.

        Sources of which no such task has ended are left out. Reads a few rows for each source.

        Args:
            completed_only: where none completed, how long others ran tells nothing.
        """
        with self._asking() as connection:
            found = {
                each: questions.usual_seconds(connection, each, completed_only=completed_only)
                for each in script_hashes
            }
        return {each: seconds for each, seconds in found.items() if seconds is not None}

    def loss_counts(self, *, since: datetime | timedelta | None = None) -> tuple[Losses, ...]:
        """Return what sinks did not get, by sink and reason, as `stats` does; at most 1,000.

        Args:
            since: only what was noted after this time (aware), or less than this long ago.
        """
        with self._asking() as connection:
            return questions.losses(connection, questions.time_since(since))

    def losses(self, *, limit: int | None = 10_000) -> list[LossEvent]:
        """Return what sinks did not get, in the order of time: the newest, up to a limit."""
        checks.number("limit", limit, least=0, whole=True, optional=True)
        with self._asking() as connection:
            rows = connection.execute(
                f"{SELECT_LOSSES}ORDER BY created_utc DESC, rowid DESC LIMIT ?",
                (questions.ALL if limit is None else limit,))
            return [loss_of(row) for row in rows][::-1]

    def runs(self, *, limit: int | None = 1000) -> list[Run]:
        """Return the Schedulers that wrote to this file, the newest first, up to a limit."""
        checks.number("limit", limit, least=0, whole=True, optional=True)
        return self._runs("ORDER BY run_id DESC LIMIT ?", questions.ALL if limit is None else limit)

    def run(self, run_id: str) -> Run | None:
        """Return one of them; None if it is not known."""
        found = self._runs("WHERE run_id = ?", run_id)
        return found[0] if found else None

    def _runs(self, which: str, value: int | str) -> list[Run]:
        with self._asking() as connection:
            rows = connection.execute(SELECT_RUNS + which, (self._host, value))
            return list(map(run_of, rows))

    def run_id(self, run: str) -> str:
        """Return the id of the run that is meant, as for `tasks`, with the same error. ``last`` is
        another one by and by; the id is not."""
        with self._asking() as connection:
            return questions.find_run(connection, run) or ""

    def events(self, *, run: str | None = None) -> Iterator[Event]:
        """Yield all that is recorded, as events from which a sink makes an equal history.

        A task's events come one after the other, its last life-cycle event after what it said; of
        the earlier ones no more is known than that one tells. An interrupted task comes as started,
        with the status "interrupted". Runs do not come: only their ids are part of an event. What
        is written meanwhile may be missing.

        Args:
            run: only tasks of this run, as for `tasks`, and no losses: they belong to no run.
        """
        run_id = None if run is None else self.run_id(run)
        key: int | None = None
        while True:
            with self._asking() as connection:
                key = questions.key_after(connection, key, run_id)
                if key is None:
                    break
                task = next(self._tasks(connection, (key,)), None)
            if task is not None:
                since = 0.0
                while rows := self._rows_after(task.task_id, since, ""):
                    yield from self._reading.events(task.task_id, rows)
                    since = rows[-1][0]
                yield last_event_of(task)
        last: int | None = -2**63 if run is None else None
        while last is not None:
            with self._asking() as connection:
                rows = questions.loss_rows(connection, last)
            yield from map(loss_of, rows)
            last = rows[-1][0] if rows else None

    # -- the file --

    @contextmanager
    def _asking(self) -> Iterator[sqlite3.Connection]:
        """Give one view of the file. Which runs are dead is found out before: all that they wrote
        is then in it."""
        dead = {run_id for run_id in self._open_runs() if not is_alive(run_id, self._lock_file)}
        with self._connected() as connection, bounded(connection, self.path, self._patience):
            self._dead.update(map(str.encode, dead))
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                roll_back(connection)

    def _open_runs(self) -> set[str]:
        """Return the runs that may have died since the last question.

        The lock is asked after the connection was given back: the thread that has the lock may wait
        for a fork, and the fork for the connection.
        """
        with self._connected() as connection:
            version = self._version_of(connection)
            if version != self._looked_at:
                with bounded(connection, self.path, self._patience):
                    self._unended = {run_id for run_id, in connection.execute(OPEN_RUNS)}
                self._looked_at = version
            return {run_id for run_id in self._unended if run_id.encode() not in self._dead}

    def _version_of(self, connection: sqlite3.Connection) -> Version:
        (changes,) = connection.execute("PRAGMA data_version").fetchone()
        return self._opened, changes

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        if self._still is not None and self._still != _state(self.path):
            self._database.close()  # it does change after all
        try:
            with damage_told(self.path), self._database as connection:
                yield connection
        except (sqlite3.OperationalError, OSError) as error:
            self._database.close()  # it may have come to another version meanwhile
            raise HistoryError(
                f"the history {shown(self.path)} cannot be read: {error}; try again, and if that "
                "does not help, see whether this user may read the file, and its disk is well"
            ) from error

    def _connect(self) -> sqlite3.Connection:
        if self._is_closed:
            raise HistoryError(f"{self!r} is closed; open another")
        state = _state(self.path)
        busy = BUSY_SECONDS if self._patience is None else min(self._patience, BUSY_SECONDS)
        connection = connect_to_read(self.path, busy)
        is_still = connection.execute("PRAGMA journal_mode").fetchone() != ("wal",)
        self._still = state if is_still else None
        questions.prepare(connection, self._dead)
        self._opened += 1
        return connection


def _most(name: str, value: int, most: int = 1000) -> int:
    """Return a whole number from 1 to a bound, else raise a `ConfigurationError`."""
    number = checks.number(name, value, least=1, whole=True)
    if number > most:
        raise ConfigurationError(f"{name}: expected at most {most:,}, got {number}; ask again for "
                                 "what comes after")
    return int(number)


def _state(path: str) -> tuple[int, ...]:
    """What tells a file, with its log, from what it was before somebody wrote to it."""
    found: list[int] = []
    for name in (path, os.path.realpath(path) + "-wal"):
        try:
            status = os.stat(name)
            found += (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
        except FileNotFoundError:
            found.append(0)
    return tuple(found)

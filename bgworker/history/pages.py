"""Pages of a history for people who look at it: tasks that match a filter, the lines of one task,
runs with their counts.

Every function gets a connection inside a read transaction, and runs on the thread that asks. Each
reads a bounded number of rows and bytes. One that stops at its bound says so, and tells where the
next question goes on.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from dataclasses import dataclass
from itertools import chain, islice
from urllib.parse import quote, unquote

from ..model.clock import monotonic
from ..model.errors import ConfigurationError
from ..model.events import TaskStatus
from ..model.text import sanitise
from . import questions
from .answers import OPEN, SELECT_RUNS, STATUSES, beginning_of, run_of, text_of
from .charts import KIND, Kind
from .questions import (ABOVE_ALL, ENDED, FAILED, LONGEST_ID, NOT_COMPLETED, NOT_ENDED, TOO_LARGE,
                        seen_keys, status_in)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from datetime import datetime
    from typing import Any, Literal

    from ..model.events import StreamEvent, TaskSnapshot
    from .answers import Reading, Run

    Place = Literal["name", "message", "failure", "output"]

FEW = 20_000
"""Tasks that an index gives and that are then sorted; more are searched in their order."""

_STEP = 5_000  # tasks that are looked at between two looks at the clock: some 10 ms
_CHUNK, _LARGEST_CHUNK = 2_000, 64_000  # the same of stream rows; doubled while one is quick
_QUICK = 0.01
_BATCH = 1_000  # tasks of which a search for a text holds the keys
_TASK_WEIGHT = 5  # rows of streams that take as long to search as the texts of a task

PATIENCE = 0.05
"""Seconds after which a search stops at its next step, and says so."""

MOST_LINE = 200
"""Characters of a `Match` that are shown."""

MOST_WANTED = 1000
"""Characters of a text or a pattern that is searched for."""

LINES_READ = 100_000
"""Rows of a task's streams that are looked at for those of one stream."""

_PAGE_TEXT = 2**20  # characters and bytes of a page of lines, but for the last of them


@dataclass(frozen=True)
class Match:
    """Where a task has the text that was searched for."""

    place: Place
    line: str
    """The text around it, at most 200 characters."""
    seq: int | None = None
    """The number of the stream event, where the place is "output"."""


@dataclass(frozen=True)
class TaskPage:
    """Some of the tasks that match a filter, the latest created first, and where to go on."""

    tasks: tuple[TaskSnapshot, ...]
    """Briefly: texts are cut to their first 1,000 characters; source text, arguments, metadata and
    invocation info are left out."""
    newer: str | None
    """The ``after`` of the page of newer tasks. None: when this was asked there were none."""
    older: str | None
    """The ``before`` of the page of older tasks. None: there are none."""
    is_cut: bool
    """True if the question stopped at its bound; `older` (or `newer`, if that way was asked for)
    goes on. The page may then have few tasks, or none."""
    searched: int
    """Tasks that were looked at, or passed over by an index, until the question stopped at its
    bound; 0 if it did not."""
    searched_until_utc: datetime | None
    """When the last of them was created."""
    matches: Mapping[str, Match]
    """In a search for a text: the first match of each task, by the task's id."""


@dataclass(frozen=True)
class LinePage:
    """Some of what one task said, in order, and where to go on."""

    lines: tuple[StreamEvent, ...]
    older: int | None
    """The ``before`` of the lines before these. None: there are none."""
    newer: int
    """The ``after`` of the lines after these, those included that are yet to come."""
    is_more: bool
    """True if there may be newer lines already."""


@dataclass(frozen=True)
class RunCounts:
    """A run, and how many tasks it has of each status."""

    run: Run
    counts: Mapping[TaskStatus, int]
    """Without those of which there are none."""
    left: int
    """Tasks that did not complete, and that no later one ran again."""


@dataclass(frozen=True)
class Wanted:
    """What tasks of a page have in common, spelled as the tables do."""

    status: TaskStatus | None = None
    name: str | None = None
    text: str | None = None
    run_id: str | None = None
    fingerprint: str | None = None
    since: str = ""
    """A time; empty is none."""
    until: str | None = None
    """The beginning of an id: tasks are older."""

    def conditions(self) -> tuple[str, list[str]]:
        """Return the conditions that a task ``t`` meets, and their values. The + keeps SQLite from
        the indexes of these columns: the order of ids leads."""
        found = ["t.id < x''"]  # all text sorts before the first BLOB
        values: list[str] = []
        if self.status is not None:
            found.append(status_in("+t.status", _as_stored(self.status)))
        elif self.fingerprint is not None:
            found.append(status_in("+t.status", FAILED))
        if self.since:
            found.append("(t.completed_utc IS NULL OR +t.completed_utc >= ?)")
            values.append(self.since)
        for condition, value in (("+t.run_id = ?", self.run_id), ("+t.name GLOB ?", self.name),
                                 ("+t.id < ?", self.until)):
            if value is not None:
                found.append(condition)
                values.append(value)
        return " AND ".join(found), values

    def indexed(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield queries for keys, each answered by an index, that give all wanted tasks, and their
        values."""
        keys = "SELECT key FROM tasks WHERE "
        if self.run_id is not None:
            yield f"{keys}run_id = ?", (self.run_id,)
        if self.name is not None:
            beginning = re.match(r"[^*?\[]*", self.name)[0]  # type: ignore[index]
            if beginning == self.name:
                yield f"{keys}name = ?", (self.name,)
            elif beginning:
                yield f"{keys}name >= ? AND name < ?", (beginning, beginning + "\U0010ffff")
        if self.status in ENDED:
            yield f"{keys}status = ? AND completed_utc >= ?", (self.status, self.since)
        elif self.status is not None:
            yield f"{keys}{status_in('status', _as_stored(self.status))}", ()
        elif self.fingerprint is not None:
            yield f"{keys}{status_in('status', FAILED)} AND completed_utc >= ?", (self.since,)
        elif self.since:
            yield (f"{keys}{status_in('status', NOT_ENDED)} UNION ALL "
                   f"{keys}{status_in('status', ENDED)} AND completed_utc >= ?", (self.since,))


def wanted_text(name: str, value: str | None) -> str | None:
    """Return a text to search for as the tables may have it; None, and an empty one, is none.

    Raises:
        ConfigurationError: it is no text, or a long one: a pattern takes as long as it is.
    """
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MOST_WANTED:
        raise ConfigurationError(f"{name}: expected a text of at most {MOST_WANTED:,} characters, "
                                 f"got {str(value)[:80]!r}")
    return sanitise(value) or None


def _as_stored(status: TaskStatus) -> Collection[TaskStatus]:
    return NOT_ENDED if status is TaskStatus.INTERRUPTED else (status,)


# ---------------------------------------------------------------- cursors

@dataclass(frozen=True)
class Cursor:
    """A place in the order of ids, beside a task; inside it, where a search of its streams
    stopped."""

    id: str | bytes
    seq: float = ABOVE_ALL
    """Streams with a smaller number are yet to be searched; `ABOVE_ALL`: all, or none."""

    def __str__(self) -> str:
        task_id = quote(text_of(self.id)[:LONGEST_ID], safe="")  # type: ignore[index]
        return task_id if self.seq == ABOVE_ALL else f"{task_id},{self.seq:.0f}"


def cursor_of(name: str, text: str) -> Cursor:
    """Return the cursor that a text spells; ``name`` is that of the argument.

    Raises:
        ConfigurationError: no cursor reads so.
    """
    found = isinstance(text, str) and re.fullmatch(r"([\w.~%-]{1,999})(?:,(\d{1,19}))?", text,
                                                     re.ASCII)
    if not found:
        raise ConfigurationError(f"{name}: expected a cursor from an earlier page, got "
                                 f"{str(text)[:80]!r}; leave it out for the first page")
    return Cursor(sanitise(unquote(found[1])), float(found[2] or ABOVE_ALL))


# ---------------------------------------------------------------- tasks

class Search:
    """Finds the tasks of one page, in the order of their ids, and stops at a bound.

    Args:
        start: where the page begins.
        is_upward: from older tasks to newer ones, rather than the other way.
    """

    def __init__(self, connection: sqlite3.Connection, wanted: Wanted, start: Cursor,
                 is_upward: bool) -> None:
        self._connection = connection
        self._wanted = wanted
        self._start = start
        self._is_upward = is_upward
        self._deadline = monotonic() + PATIENCE
        # of the queries that an index answers the one that gives the fewest, if that is few
        self._few: tuple[str, tuple[str, ...]] | None = None
        self._count = FEW + 1
        for query, values in wanted.indexed():
            (count,) = connection.execute(f"SELECT count(*) FROM ({query} LIMIT {self._count})",
                                          values).fetchone()
            if count < self._count:
                self._few, self._count = (query, values), count
        self._like = "" if wanted.text is None else f"%{_WILD.sub(_ESCAPED, wanted.text)}%"
        self._chunk = _CHUNK
        self.stopped: Cursor | None = None
        """Where a later search goes on, if this one came to its bound."""
        self._matches: dict[int, str | int] = {}
        # where each task has the text, by key: the place, or the number of a stream event

    def keys(self) -> Iterator[int]:
        """Yield the keys of tasks, until there are no more, or `stopped` is set."""
        for keys, end in self._steps():
            if self._wanted.text is None and self._wanted.fingerprint is None:
                yield from keys
            else:
                yield from self._searched(keys)
            if self.stopped or end is None:
                return
            if self._few is None and monotonic() > self._deadline:
                self.stopped = Cursor(end)
                return

    def searched(self) -> int:
        """Return how many tasks lie between where the search began and where it stopped."""
        if self.stopped is None:
            return 0
        between = "id > ? AND id <= ?" if self._is_upward else "id < ? AND id >= ?"
        (count,) = self._connection.execute(f"SELECT count(*) FROM tasks WHERE {between}",
                                            (self._start.id, self.stopped.id)).fetchone()
        return int(count)

    def _steps(self) -> Iterator[tuple[Iterator[int], str | None]]:
        """Yield the keys of tasks that meet all conditions but text and fingerprint, step by step,
        and the id at which a step ends, None for the last."""
        where, values = self._wanted.conditions()
        beyond, order = (">", "ASC") if self._is_upward else ("<", "DESC")
        first = beyond if self._start.seq == ABOVE_ALL else f"{beyond}="
        begin = self._start.id
        while True:
            # where an index gives some thousands, the first are usually found with less
            if self._few and (self._count <= _STEP or begin != self._start.id):
                query, of_query = self._few
                yield self._judged(f"{where} AND t.key IN ({query}) AND +t.id {first} ?",
                                   [*values, *of_query, begin], order), None
                return
            row = self._connection.execute(
                f"SELECT id FROM tasks WHERE id {first} ? AND id >= '' AND id < x'' "
                f"ORDER BY id {order} LIMIT 1 OFFSET {_STEP - 1}", (begin,)).fetchone()
            if row is None:
                yield self._judged(f"{where} AND t.id {first} ? AND t.id >= ''",
                                   [*values, begin], order), None
                return
            until = "<=" if self._is_upward else ">="
            yield self._judged(f"{where} AND t.id {first} ? AND t.id {until} ?",
                               [*values, begin, row[0]], order), row[0]
            begin, first = row[0], beyond

    def _judged(self, where: str, values: Sequence[Any], order: str) -> Iterator[int]:
        return seen_keys(self._connection, self._wanted.status, self._wanted.since, where, values,
                         f"t.id {order}")

    def _searched(self, keys: Iterator[int]) -> Iterator[int]:
        """Yield the tasks, of these, that have the fingerprint and the text, and stop at the bound
        where some are left."""
        stop: Cursor | None = None  # however slow it is, each search goes on by one part
        while batch := list(islice(keys, _BATCH)):
            tops = self._tops(batch)
            if self._start.seq < ABOVE_ALL and self.id(batch[0]) == self._start.id:
                tops[0] = self._start.seq
            at = 0
            while at < len(batch):
                if stop and monotonic() > self._deadline:
                    self.stopped = stop
                    return
                begun = monotonic()
                end, floor = self._part(tops, at)
                before = tops[at] if end == at + 1 else ABOVE_ALL
                found = self._matching(batch[at:end], floor, before)
                yield from found
                if monotonic() - begun < _QUICK:
                    self._chunk = min(2 * self._chunk, _LARGEST_CHUNK)
                if floor > 0 and not found:
                    tops[at] = floor + 1
                    stop = Cursor(self.id(batch[at]), floor + 1)
                else:
                    stop = Cursor(self.id(batch[end - 1]))
                    at = end

    def _part(self, tops: Sequence[float], at: int) -> tuple[int, float]:
        """Return the end of the tasks that are searched in one go, and above which number. A task
        that has too many rows is searched in parts, the newest first."""
        end, room = at, float(self._chunk)
        while end < len(tops) and room > 0:
            room -= tops[end] + _TASK_WEIGHT
            end += 1
        if end > at + 1:
            return end - (room < 0), 0.0
        return end, max(0.0, tops[at] - self._chunk)

    def id(self, key: int) -> str:
        """Return the id of a task that was found."""
        (found,) = self._connection.execute("SELECT id FROM tasks WHERE key = ?",
                                            (key,)).fetchone()
        return str(found)

    def _tops(self, keys: Sequence[int]) -> list[float]:
        """Return for each task the number below which its streams are to be searched."""
        if self._wanted.text is None:
            return [0.0] * len(keys)
        return [float(top) for top, in self._connection.execute(
            "SELECT 1 + coalesce((SELECT max(seq) FROM stream_rows WHERE task = value "
            f"AND seq < {ABOVE_ALL}), 0) FROM json_each(?)", (json.dumps(keys),))]

    def _matching(self, keys: Sequence[int], after: float, before: float) -> Sequence[int]:
        """Return which of these tasks have the fingerprint and the text, in their streams between
        two numbers."""
        if self._wanted.fingerprint is not None:
            keys = self._alike(keys)
        if self._wanted.text is None or not keys:
            return keys
        try:
            self._matches.update(self._connection.execute(
                _MATCHING, (self._like, after, before, json.dumps(keys))).fetchall())
        except TOO_LARGE:  # some value of them
            for key in keys:
                self._match_by_hand(key, after, before)
        return [key for key in keys if key in self._matches]

    def _alike(self, keys: Sequence[int]) -> Sequence[int]:
        rows = self._connection.execute(
            f"SELECT t.key, {', '.join(KIND)} "
            "FROM json_each(?) CROSS JOIN tasks t ON t.key = value "
            f"WHERE {status_in('+status', FAILED)}", (json.dumps(keys),))
        alike = {key for key, *kind in rows
                 if Kind.of(*kind).fingerprint == self._wanted.fingerprint}
        return [key for key in keys if key in alike]

    def _match_by_hand(self, key: int, after: float, before: float) -> None:
        """Search a task value by value, in Python: some may be too long for SQLite."""
        text = str(self._wanted.text)
        for place, value in _texts(self._connection, key):
            if _line(value, text):
                self._matches[key] = place
                return
        for row in chain.from_iterable(questions.stream_groups(
                self._connection, key, after, "", before=before, is_newest_first=True)):
            if _line(text_of(row[3]) or "", text):
                self._matches[key] = row[0]
                return

    def match(self, key: int) -> Match:
        """Return the match of a task that was found."""
        found, text = self._matches[key], str(self._wanted.text)
        if isinstance(found, str):
            values = _texts(self._connection, key)
            lines = [(place, _line(value, text)) for place, value in values if place == found]
            return Match(*max(lines, key=lambda each: bool(each[1])))
        ((row,),) = questions.stream_groups(self._connection, key, found - 1, "", 1)
        return Match("output", _line(text_of(row[3]) or "", text), found)


_WILD, _ESCAPED = re.compile(r"[%_\\]"), r"\\\g<0>"
_HAS = r"LIKE ?1 ESCAPE '\'"
_MATCHING = f"""SELECT key, found FROM (
SELECT t.key, coalesce(
  CASE WHEN name {_HAS} THEN 'name' WHEN last_progress_msg {_HAS} THEN 'message'
  WHEN failure_type {_HAS} OR failure_message {_HAS} THEN 'failure' END,
  (SELECT seq FROM stream_rows
   WHERE task = t.key AND seq > ?2 AND seq < ?3 AND payload {_HAS} ORDER BY seq DESC LIMIT 1)
) AS found
FROM json_each(?4) CROSS JOIN tasks t ON t.key = value) WHERE found IS NOT NULL"""
"""The tasks that have a text, and where: the place, or the number of a stream event."""


_PLACES: tuple[Place, ...] = ("name", "message", "failure", "failure")


def _texts(connection: sqlite3.Connection, key: int) -> Iterator[tuple[Place, str]]:
    """Yield the texts of a task that are searched, with their places."""
    (row,) = questions.task_rows(connection, [key])
    for place, value in zip(_PLACES, row[14:18]):
        yield place, text_of(value) or ""


def _line(value: str, text: str) -> str:
    """Return the part of a line that has a text in it, as LIKE finds it; empty if none has."""
    at = value.translate(_LOWER).find(text.translate(_LOWER))
    if at < 0:
        return ""
    begin = max(value.rfind("\n", 0, at) + 1, at - MOST_LINE // 2)
    end = value.find("\n", at + len(text))
    return value[begin:end if end >= 0 else None][:MOST_LINE]


_LOWER = {ord(letter): letter.lower() for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


def task_page(connection: sqlite3.Connection, reading: Reading, wanted: Wanted,
              before: str | None, after: str | None, limit: int) -> TaskPage:
    """Return a page of tasks: with ``after`` those next to a place, else the newest ones."""
    if before is not None and after is not None:
        raise ConfigurationError("before, after: expected one of them, got both; leave one out")
    is_upward = after is not None
    start = Cursor(b"")  # which comes after all text
    if after is not None:
        start = cursor_of("after", after)
    elif before is not None:
        start = cursor_of("before", before)
    if wanted.until is not None and not is_upward:
        start = min(start, Cursor(wanted.until), key=_order)
    search = Search(connection, wanted, start, is_upward)
    keys = list(islice(search.keys(), limit + 1))
    beyond = Cursor(search.id(keys[limit - 1])) if len(keys) > limit else search.stopped
    is_cut = len(keys) <= limit and beyond is not None
    keys = keys[:limit]
    back = None
    if before is not None or after is not None:
        # of an empty page the task beside its cursor is part of the page behind it
        beside = text_of(start.id) or ""
        beside = f"{beside} " if is_upward else beside[:-1]
        back = Cursor(search.id(keys[0]) if keys else beside)
    older, newer = (back, beyond) if is_upward else (beyond, back)
    if is_upward:
        keys.reverse()
    tasks = []
    matches = {}
    while keys:
        rows = questions.task_rows(connection, keys, is_brief=True)
        for key, task in zip(keys, map(reading.task, rows)):
            if task is not None:
                tasks.append(task)
                if wanted.text is not None:
                    matches[task.task_id] = search.match(key)
        keys = keys[len(rows):]
    return TaskPage(
        tuple(tasks), None if newer is None else str(newer), None if older is None else str(older),
        is_cut, search.searched() if is_cut else 0,
        beginning_of(text_of(beyond.id) or "") if is_cut and beyond is not None else None, matches)


def _order(place: Cursor) -> tuple[bool, str | bytes]:
    return isinstance(place.id, bytes), place.id


# ---------------------------------------------------------------- the lines of a task

_ENDS = f"""SELECT min(seq), max(seq) FROM (
  SELECT (SELECT min(seq) FROM stream_rows WHERE task = ?1 AND seq > ?2 AND seq < ?3) AS seq
  UNION ALL SELECT max(seq) FROM stream_rows WHERE task = ?1 AND seq > ?2 AND seq < ?3)"""
"""The first and the last number of the streams of a task between two numbers, by two looks."""


def line_page(connection: sqlite3.Connection, key: int, task_id: str, reading: Reading,
              which: str, before: int | None, after: int | None, limit: int) -> LinePage:
    """Return some of what a task said; ``which`` is the condition on its streams.

    With a condition at most `LINES_READ` numbers are looked at: no index knows the streams.
    """
    if before is not None and after is not None:
        raise ConfigurationError("before, after: expected one of them, got both; leave one out")

    def ends(low: float, high: float) -> tuple[float | None, float | None]:
        first, last = connection.execute(_ENDS, (key, low, high)).fetchone()
        return first, last

    is_forward = after is not None
    low: float = min(after or 0, 2**63 - 1)
    high: float = ABOVE_ALL if before is None else min(before, 2**63 - 1)
    bottom, top = ends(0, ABOVE_ALL)
    first, last = ends(low, high)
    if first is not None and last is not None and which:
        low, high = (low, min(high, first + LINES_READ)) if is_forward else (
            max(low, last - LINES_READ), high)
    rows, room = [], _PAGE_TEXT
    for row in chain.from_iterable(questions.stream_groups(
            connection, key, low, which, limit, before=high, is_newest_first=not is_forward)):
        rows.append(row)
        room -= sum([len(value) for value in row if isinstance(value, (str, bytes))])
        if room <= 0:
            break
    is_full = room <= 0 or len(rows) == limit
    if is_forward:
        newer = rows[-1][0] if is_full else max(low, min(last or 0.0, high - 1))
        older = low + 1
    else:
        rows.reverse()
        newer = (last or 0.0) if before is None else high - 1
        older = rows[0][0] if is_full else low + 1
    return LinePage(
        tuple(reading.events(task_id, rows)),
        math.floor(older) if bottom is not None and bottom < older else None,
        math.ceil(newer), top is not None and top > newer)


# ---------------------------------------------------------------- runs

def run_counts(connection: sqlite3.Connection, host: str, run: str | None, since: str,
               before: str | None, limit: int) -> tuple[RunCounts, ...]:
    """Return runs with their counts, the newest first.

    No index knows both the run and the status of a task. Either the tasks of these runs are read,
    or all that did not complete, whichever are fewer.
    """
    rows = connection.execute(
        f"{SELECT_RUNS}WHERE run_id < ? {'AND run_id = ?' if run else ''} "
        "AND CASE WHEN ended_utc IS NOT NULL THEN ended_utc >= ? "
        "WHEN is_dead(CAST(run_id AS BLOB)) THEN coalesce(started_utc, '') >= ? ELSE 1 END "
        "ORDER BY run_id DESC LIMIT ?",
        (host, b"" if before is None else sanitise(before), *[run] * bool(run), since, since, limit)
        ).fetchall()
    is_over = {row[0]: row[7] == 0 for row in rows if isinstance(row[0], str)}
    ids = json.dumps([*is_over])
    totals = dict(connection.execute(
        "SELECT value, (SELECT count(*) FROM tasks WHERE run_id = value) FROM json_each(?)",
        (ids,)))
    of_others = (f"{status_in('status', NOT_COMPLETED)} "
                 "AND +run_id IN (SELECT value FROM json_each(?))")
    of_runs = "run_id IN (SELECT value FROM json_each(?))"
    (others,) = connection.execute(
        f"SELECT count(*) FROM tasks WHERE {status_in('status', NOT_COMPLETED)}").fetchone()
    is_by_run = sum(totals.values()) < others
    counts: dict[str, dict[TaskStatus, int]] = {run_id: {} for run_id in totals}
    left = dict.fromkeys(totals, 0)
    for run_id, status, count, of_left in connection.execute(
            f"SELECT run_id, status, count(*), total({questions.LEFT}) FROM tasks t "
            f"WHERE {of_runs if is_by_run else of_others} GROUP BY run_id, status", (ids,)):
        if status in STATUSES:
            seen = STATUSES[status]
            if seen in OPEN and is_over[run_id]:
                seen = TaskStatus.INTERRUPTED
            counts[run_id][seen] = counts[run_id].get(seen, 0) + count
            left[run_id] += int(of_left)
    if not is_by_run:
        for run_id, total in totals.items():
            counts[run_id][TaskStatus.COMPLETED] = total - sum(counts[run_id].values())
    return tuple(
        RunCounts(run_of(row), {status: counts[row[0]][status] for status in TaskStatus
                                if counts.get(row[0], {}).get(status)}, left.get(row[0], 0))
        for row in rows)

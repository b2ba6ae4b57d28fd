"""What a history shows as drawings and groups: failures that are alike, throughput, a timeline.

Every function gets a connection inside a read transaction, and runs on the thread that asks. Each
reads a bounded number of rows, the newest ones; an answer tells how many, and whether those were
all.
"""

from __future__ import annotations

import heapq
import json
import math
import re
from bisect import bisect_left
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from itertools import islice
from operator import itemgetter

from ..model.events import TaskStatus
from .answers import (EPOCH, LAST_SIGN, OPEN, SEEN, STATUSES, brief, text_of, time_of, time_text)
from .questions import ENDED, EXIT_CODE, FAILED, NOT_ENDED, status_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from typing import Tuple

    from .questions import Row

    Ran = Tuple[float, float, int, TaskStatus]  # start and end in seconds since the epoch, and key

MOST_FAILURES = 5_000
"""Failed tasks that are read: 10 us each."""

MOST_PASSED = 5_000
"""Completed tasks that are read for those of some names, and again of one name after the other."""

MOST_OF_A_RUN = 100_000
"""Tasks of a run that are read for its throughput, the newest."""

MOST_SPANNING = 2_000
"""Tasks that are read of those that ended after the time of a drawing."""

_NAMES_OF_A_GROUP = 5


@dataclass(frozen=True)
class FailureGroup:
    """Tasks that failed or timed out, with one fingerprint: the type of the failure, and its
    message without numbers; of commands their program and exit code."""

    fingerprint: str
    """16 hex digits; the same for the same kind of failure in any history."""
    failure_type: str | None
    pattern: str
    """The message with ``#`` for each number, id and address, at most 200 characters; of commands
    their program."""
    count: int
    names: tuple[str, ...]
    """Of its tasks, the latest first; at most 5."""
    first_utc: datetime | None
    """When the first of its tasks failed, of those that were read."""
    last_utc: datetime | None
    """When the latest failed."""
    last_passed_utc: datetime | None
    """When a task of one of these names last completed. None: none did, as far as was read."""
    latest_task_id: str
    latest_message: str | None
    """As it is, at most 1,000 characters."""
    exit_code: int | None = None
    """Of these commands, below 0 the signal that ended them; None for what is no such command."""


@dataclass(frozen=True)
class FailureGroups:
    """What `History.failure_groups` returns."""

    groups: tuple[FailureGroup, ...]
    """The latest first."""
    searched: int
    """Failed tasks that were read."""
    is_all: bool
    """False if there are older ones that were not read."""
    more: int
    """Groups that are there beyond those that were asked for."""


@dataclass(frozen=True)
class Bucket:
    """What ended in one stretch of time."""

    start_utc: datetime
    counts: Mapping[TaskStatus, int]
    """Tasks by the status with which they ended, without those of which there are none."""


@dataclass(frozen=True)
class Throughput:
    """How many tasks ended, over time."""

    width: float
    """Seconds of a bucket: 60, or more for a long span."""
    buckets: tuple[Bucket, ...]
    """One after the other, without a gap; the first begins at a multiple of the width in UTC.
    Empty if nothing ended."""
    is_all: bool
    """False if the run has older tasks, which were not read."""


@dataclass(frozen=True)
class Bar:
    """A task on the timeline."""

    task_id: str
    name: str
    status: TaskStatus
    lane: int
    """From 0. Two bars of a lane never overlap."""
    start_utc: datetime
    end_utc: datetime
    """Of a task that runs: the time of the question. Of an interrupted one: its last sign of life,
    as far as that is known."""


@dataclass(frozen=True)
class Load:
    """How many tasks ran at once in one stretch of time."""

    start_utc: datetime
    most: int
    mean: float
    """The seconds that all tasks ran in it, over the seconds of it that are drawn."""


@dataclass(frozen=True)
class Timeline:
    """What ran when."""

    start_utc: datetime | None
    """Where the drawing begins: at ``since``, or with the first bar or load. None: nothing ran."""
    end_utc: datetime | None
    bars: tuple[Bar, ...]
    """In the order of their starts; where there are too many, the longest."""
    lanes: int
    """How many lanes the bars take."""
    left_out: int
    """Tasks that ran and have no bar: others took longer, or all lanes were taken."""
    left_out_seconds: float
    """What they took together."""
    width: float
    """Seconds of a load."""
    loads: tuple[Load, ...]
    """One after the other, without a gap, of all tasks that were read, with a bar or without."""
    searched: int
    """Tasks that were read."""
    is_all: bool
    """False if there are older ones that were not read."""


# ---------------------------------------------------------------- failures that are alike

_MOST_PATTERN = 200

_VARYING = re.compile(r"""
    0x[0-9a-f]+                                             # an address
  | [0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}
  | (?<![a-z0-9])(?=[a-f]*[0-9])[0-9a-f]{8,}(?![a-z0-9])    # hex digits that are no word
  | [0-9]+(?:[.,:][0-9]+)*                                  # a number, a time, a version
""", re.IGNORECASE | re.VERBOSE)


def pattern_of(message: str | None) -> str:
    """Return a message with ``#`` for each number, id and address in it, without line breaks."""
    return " ".join(_VARYING.sub("#", message or "").split())[:_MOST_PATTERN]


KIND = (brief("t.failure_type"), brief("t.failure_message"), brief("t.script_id"), EXIT_CODE)
"""What `Kind.of` makes the kind of a failure of."""


@dataclass(frozen=True)
class Kind:
    """What failures that are alike have in common."""

    failure_type: str | None
    pattern: str
    exit_code: int | None

    @staticmethod
    def of(failure_type: object, message: object, program: object, code: int | None) -> Kind:
        """Return the kind of the failure of a row with `KIND`."""
        pattern = pattern_of(text_of(message)) if code is None else (text_of(program) or "")
        return Kind(text_of(failure_type), pattern, code)

    @property
    def fingerprint(self) -> str:
        """The same for the same kind in any history: 16 hex digits."""
        code = "" if self.exit_code is None else f"\n{self.exit_code}"
        text = f"{self.failure_type or ''}\n{self.pattern}{code}"
        return sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def failure_groups(connection: sqlite3.Connection, run_id: str | None, since: str,
                   limit: int) -> FailureGroups:
    """Return the latest failures by what they have in common."""
    rows = _newest(connection, [brief("t.name"), brief("t.id"), *KIND], FAILED, run_id, since,
                   MOST_FAILURES + 1)
    found: dict[Kind, list[Row]] = {}
    for row in rows[:MOST_FAILURES]:
        found.setdefault(Kind.of(*row[4:]), []).append(row)
    names = {kind: list(dict.fromkeys([text_of(row[2]) or "" for row in alike]))
             for kind, alike in islice(found.items(), limit)}
    names = {kind: all_[:_NAMES_OF_A_GROUP] for kind, all_ in names.items()}
    passed = _last_passed(connection, {name for some in names.values() for name in some})
    groups = []
    for kind, some in names.items():
        alike = found[kind]
        _, latest, _, task_id, _, message, *_ = alike[0]
        groups.append(FailureGroup(
            kind.fingerprint, kind.failure_type, kind.pattern, len(alike), tuple(some),
            time_of(alike[-1][1]), time_of(latest),
            time_of(max([passed.get(name, "") for name in some])), text_of(task_id) or "",
            text_of(message), kind.exit_code))
    searched = min(len(rows), MOST_FAILURES)
    return FailureGroups(tuple(groups), searched, len(rows) <= MOST_FAILURES,
                         len(found) - len(groups))


def _newest(connection: sqlite3.Connection, columns: Sequence[str],
            statuses: Collection[TaskStatus], run_id: str | None, since: str,
            most: int) -> list[Row]:
    """Return rows of ended tasks: status, end, and these columns, the latest end first.

    Of a run, those of its newest tasks: no index knows the ends of one run.
    """
    head = f"SELECT t.status, t.completed_utc, {', '.join(columns)} FROM tasks t "
    if run_id is not None:
        rows = connection.execute(
            f"{head}WHERE t.run_id = ? ORDER BY t.key DESC LIMIT ?", (run_id, most)).fetchall()
        wanted = {status.value for status in statuses}
        return sorted([row for row in rows if row[0] in wanted and _end(row) >= since],
                      key=_end, reverse=True)
    # one after the other: an index gives each status in order, and not all of them
    each = [connection.execute(f"{head}WHERE t.status = ? AND t.completed_utc >= ? "
                               "ORDER BY t.completed_utc DESC LIMIT ?", (status, since, most))
            for status in statuses]
    return list(islice(heapq.merge(*each, key=_end, reverse=True), most))


def _end(row: Row) -> str:
    return text_of(row[1]) or ""


def _last_passed(connection: sqlite3.Connection, names: Collection[str]) -> dict[str, str]:
    """Return when a task of each name last completed, of the names of which that is found.

    First among those that completed last, where frequent names are; then among all tasks of a name.
    """
    found: dict[str, str] = {}
    for name, completed in connection.execute(
            f"SELECT {brief('name')}, completed_utc FROM tasks WHERE status = 'completed' "
            f"ORDER BY completed_utc DESC LIMIT {MOST_PASSED}"):
        if name in names:
            found.setdefault(name, text_of(completed) or "")
            if len(found) == len(names):
                break
    left = MOST_PASSED
    for name in sorted(set(names) - found.keys()):
        rows = connection.execute("SELECT status, completed_utc FROM tasks WHERE name = ? LIMIT ?",
                                  (name, left)).fetchall()
        left -= len(rows)
        if ends := [_end(row) for row in rows if row[0] == "completed"]:
            found[name] = max(ends)
    return found


# ---------------------------------------------------------------- throughput

_WIDTHS = (60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400)
_FINE_WIDTHS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30)


def _width(begin: float, end: float, most: int, widths: Sequence[float]) -> float:
    """Return the seconds of a stretch, so that no more than so many cover a time."""
    candidates = [*widths, *(86_400 * 2.0 ** power for power in range(1, 40))]
    return next(width for width in candidates if end // width - begin // width < most)


def _utc(seconds: float) -> datetime:
    """Return the time so many seconds after the epoch, within what a `datetime` can hold."""
    return EPOCH + timedelta(seconds=min(max(seconds, -6e10), 2.5e11))


_BETWEEN = "FROM tasks WHERE status = ?1 AND completed_utc >= ?2 AND completed_utc < ?3"


def throughput(connection: sqlite3.Connection, run_id: str | None, since: str, until: str,
               most: int) -> Throughput:
    """Return how many tasks ended over time; an ``until`` that is no time sorts after all."""
    is_all = True
    of_run: dict[TaskStatus, list[str]] = {status: [] for status in ENDED}
    if run_id is not None:
        rows = connection.execute("SELECT status, completed_utc FROM tasks WHERE run_id = ? "
                                  "ORDER BY key DESC LIMIT ?",
                                  (run_id, MOST_OF_A_RUN + 1)).fetchall()
        is_all = len(rows) <= MOST_OF_A_RUN
        for row in rows[:MOST_OF_A_RUN]:
            if STATUSES.get(row[0]) in ENDED:
                of_run[STATUSES[row[0]]].append(_end(row))
        for some in of_run.values():
            some.sort()

    def count(status: TaskStatus, low: str, high: str) -> int:
        if run_id is not None:
            return bisect_left(of_run[status], high) - bisect_left(of_run[status], low)
        (found,) = connection.execute(f"SELECT count(*) {_BETWEEN}", (status, low, high)).fetchone()
        return int(found)

    def ends(status: TaskStatus) -> tuple[str, str] | None:
        """Return the first and the last end with a status; None if there is none."""
        if run_id is not None:
            found = of_run[status][bisect_left(of_run[status], since):
                                   bisect_left(of_run[status], until)]
            return (found[0], found[-1]) if found else None
        first, last = connection.execute(
            f"SELECT (SELECT min(completed_utc) {_BETWEEN}), "
            f"(SELECT max(completed_utc) {_BETWEEN})", (status, since, until)).fetchone()
        return None if first is None else (text_of(first) or "", text_of(last) or "")

    whole = {status: found for status in ENDED if (found := ends(status))}
    if not whole:
        return Throughput(_WIDTHS[0], (), is_all)
    begin = time_of(since or min(first for first, _ in whole.values())) or EPOCH
    end = time_of(until) or time_of(max(last for _, last in whole.values())) or EPOCH
    first_second, last_second = begin.timestamp(), max(begin.timestamp(), end.timestamp())
    width = _width(first_second, last_second, most, _WIDTHS)
    starts = [_utc((first_second // width + number) * width)
              for number in range(int(last_second // width - first_second // width) + 1)]
    lows = [max(since, time_text(start)) for start in starts]
    buckets = []
    for start, low, high in zip(starts, lows, [*lows[1:], until]):
        counts = {status: count(status, low, high) for status in whole}
        buckets.append(Bucket(start, {status: n for status, n in counts.items() if n}))
    return Throughput(width, tuple(buckets), is_all)


# ---------------------------------------------------------------- the timeline

def timeline(connection: sqlite3.Connection, run_id: str | None, since: datetime | None,
             until: datetime | None, bars: int, lanes: int, loads: int, most: int) -> Timeline:
    """Return what ran when."""
    now = datetime.now(timezone.utc).timestamp()
    ran, searched, is_all = _ran_between(connection, run_id, since, until, most, now)
    low = -math.inf if since is None else since.timestamp()
    high = now if until is None else min(until.timestamp(), now)
    ran = [(max(start, low), max(start, low, min(end, high)), key, status)
           for start, end, key, status in ran if start <= high and end >= low]
    if not ran:
        return Timeline(None, None, (), 0, 0, 0.0, 0.0, (), searched, is_all)
    begin = min(ran)[0] if since is None else low
    end = max([end for _, end, *_ in ran]) if until is None else max(high, begin)
    drawn = _on_lanes(sorted(heapq.nlargest(bars, ran, key=_length)), lanes)
    left_out = len(ran) - len(drawn)
    seconds = sum(map(_length, ran)) - sum(_length(each) for each, _ in drawn)
    width = _width(begin, end, loads, _FINE_WIDTHS + _WIDTHS)
    return Timeline(
        _utc(begin), _utc(end), tuple(_bars(connection, drawn)),
        1 + max([lane for _, lane in drawn]), left_out, max(0.0, seconds) if left_out else 0.0,
        width, tuple(_loads(ran, begin, end, width)), searched, is_all)


def _length(ran: Ran) -> float:
    return ran[1] - ran[0]


_RAN = """SELECT (julianday(t.started_utc) - 2440587.5) * 86400,
  (julianday({}) - 2440587.5) * 86400, t.key, {} WHERE t.started_utc IS NOT NULL AND {} """
"""What is read of a task that ran. SQLite reads times to the millisecond, in half of the time that
Python takes."""
_ENDED_RAN = _RAN.format("t.completed_utc", "t.status FROM tasks t",
                         "t.status = ? AND t.completed_utc >= ?{}")
_ANY_RAN = _RAN.format(
    f"CASE {SEEN} WHEN 'interrupted' THEN {LAST_SIGN} ELSE t.completed_utc END",
    f"{SEEN} FROM tasks t LEFT JOIN runs r ON r.run_id = t.run_id", "{}")


def _ran_between(connection: sqlite3.Connection, run_id: str | None, since: datetime | None,
                 until: datetime | None, most: int, now: float) -> tuple[list[Ran], int, bool]:
    """Return the latest tasks that may have run between two times, how many were read, and whether
    these are all."""
    low = "" if since is None else time_text(since)
    high = "~" if until is None else time_text(until)
    if run_id is not None:
        rows = connection.execute(
            f"{_ANY_RAN.format('t.run_id = ?')}ORDER BY t.key DESC LIMIT ?",
            (run_id, most + 1)).fetchall()
        is_all = len(rows) <= most
        rows = rows[:most]
    else:
        rows = connection.execute(
            f"{_ANY_RAN.format(status_in('t.status', NOT_ENDED))}LIMIT ?", (most,)).fetchall()
        ended = _ENDED_RAN.format(" AND t.completed_utc < ?")
        found = [row for status in ENDED for row in connection.execute(
            f"{ended}ORDER BY t.completed_utc DESC LIMIT ?", (status, low, high, most + 1))
            if isinstance(row[1], float)]
        found.sort(key=itemgetter(1), reverse=True)
        is_all = len(rows) + len(found) <= most
        rows += found[:most - len(rows)]
        if until is not None:  # those that ran at that time, and ended later
            rows += [row for status in ENDED for row in connection.execute(
                f"{_ENDED_RAN.format('')}ORDER BY t.completed_utc LIMIT ?",
                (status, high, MOST_SPANNING))]
    ran = []
    for start, end, key, seen in rows:
        status = STATUSES.get(seen)
        end = now if status in OPEN else end
        if status is not None and isinstance(start, float) and isinstance(end, float):
            start = round(start, 3)  # a Julian day has noise behind the milliseconds
            ran.append((start, max(start, round(end, 3)), key, status))
    return ran, len(rows), is_all


def _on_lanes(ran: Iterable[Ran], most: int) -> list[tuple[Ran, int]]:
    """Return tasks, which come in the order of their starts, with the first lane that is free;
    without those that find none."""
    busy: list[tuple[float, int]] = []  # end and lane
    free = list(range(most))
    found = []
    for each in ran:
        while busy and busy[0][0] <= each[0]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
            # a task that took no time holds its lane all the same, for its bar has a width
            heapq.heappush(busy, (max(each[1], each[0] + 0.001), lane))
            found.append((each, lane))
    return found


def _bars(connection: sqlite3.Connection, drawn: Sequence[tuple[Ran, int]]) -> Iterator[Bar]:
    rows = connection.execute(
        f"SELECT t.key, {brief('t.id')}, {brief('name')} FROM json_each(?) "
        "CROSS JOIN tasks t ON t.key = value", (json.dumps([ran[2] for ran, _ in drawn]),))
    named = {key: (text_of(task_id) or "", text_of(name) or "") for key, task_id, name in rows}
    for (start, end, key, status), lane in drawn:
        yield Bar(*named[key], status, lane, _utc(start), _utc(end))


def _loads(ran: Sequence[Ran], begin: float, end: float, width: float) -> Iterator[Load]:
    """Yield how many ran at once, stretch by stretch."""
    # of changes at one time the ends come first: a task that follows another is not beside it
    changes = sorted([(each[0], 1) for each in ran] + [(each[1], -1) for each in ran])
    at, running = 0, 0
    first, last = int(begin // width), int(end // width)
    for number in range(first, last + 1):
        low, high = max(begin, number * width), min(end, (number + 1) * width)
        while at < len(changes) and changes[at] <= (low, -1):
            running, at = running - 1, at + 1
        most, area, since = running, 0.0, low
        while at < len(changes) and (changes[at][0] < high or number == last):
            time, change = changes[at]
            area += running * (time - since)
            running += change
            most = max(most, running)
            since = time
            at += 1
        area += running * (high - since)
        yield Load(_utc(number * width), most, area / (high - low) if high > low else float(most))

"""Two runs compared: which of their tasks are the same, and what became of them.

A task that ran another one again is that one. Else commands are the same if they have the same text
and directory, and Python functions if they have the same name and function; of several that are
equal, the first of one run is the first of the other.

Every function gets a connection inside a read transaction, and runs on the thread that asks.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from ..model.errors import ConfigurationError
from ..model.events import TaskStatus
from .answers import SEEN, STATUSES, Run, number_of, object_of, text_of
from .past import LONGEST_CHAIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterator, Mapping
    from typing import Tuple, Union

    from ..model.events import TaskSnapshot

    Same = Tuple[str, Union[str, None]]

FACTOR, LEAST = 1.5, 0.1
"""Slower is what took at least so many times as long, and so many seconds longer; faster is the
other way round."""

MOST = 1_000_000
"""Tasks of a run that are compared: they take some hundred bytes each."""

CHANGES = ("newly_failed", "mended", "slower", "faster", "new", "gone")
"""In the order in which they are told."""

_FAILED = (TaskStatus.FAILED, TaskStatus.TIMED_OUT)


@dataclass(frozen=True)
class Change:
    """A task of one run, or of both."""

    before: TaskSnapshot | None
    """Texts are cut to 1,000 characters, and metadata left out."""
    after: TaskSnapshot | None


@dataclass(frozen=True)
class Changes:
    """What is different between two runs."""

    before: Run
    after: Run
    is_rerun: bool
    """Whether the second ran tasks of the first again: then nothing is gone."""
    counts: Mapping[str, int]
    """How many tasks there are of each of `CHANGES`, and of these:

    ``unchanged``; ``still_failing``; ``unfinished``: that were cancelled or interrupted in the
    second run, or have not ended; ``not_run_again``, where the second is a rerun."""
    newly_failed: tuple[Change, ...]
    """That failed or timed out, and did not in the first run, or were not in it."""
    mended: tuple[Change, ...]
    """That completed, and ended otherwise in the first run."""
    slower: tuple[Change, ...]
    """Of those that completed in both; the greatest difference first."""
    faster: tuple[Change, ...]
    new: tuple[Change, ...]
    """That were not in the first run, but for those that failed."""
    gone: tuple[Change, ...]
    """That are not in the second run."""


class Entry(NamedTuple):
    """What is held of a task."""

    key: int
    status: TaskStatus
    seconds: float | None
    same: Same
    """What it has in common with those that it is compared with."""


class Comparison:
    """The keys of tasks that have changed, by the name of the change.

    Args:
        before, after: ids of the runs.

    Raises:
        ConfigurationError: one has too many tasks.
    """

    def __init__(self, connection: sqlite3.Connection, before: str, after: str) -> None:
        self.counts: Counter[str] = Counter()
        self.keys: dict[str, list[tuple[int | None, int | None]]] = {
            change: [] for change in CHANGES}
        # seconds, of slower and faster
        self._gains: dict[tuple[int | None, int | None], float] = {}
        origins = _origins(connection, before, after)
        self.is_rerun = bool(origins)
        """Whether the second run ran tasks of the first again."""
        named: dict[str, Entry] = {}
        others: dict[Same, list[Entry]] = {}
        ran_again = set(origins.values())
        for task_id, entry in _entries(connection, before):
            if task_id in ran_again:
                named[task_id] = entry
            else:
                others.setdefault(entry.same, []).append(entry)
        for equal in others.values():
            equal.reverse()  # the first is taken from the end
        for task_id, entry in _entries(connection, after):
            found = named.pop(origins.get(task_id, ""), None)
            if found is None and (equal := others.get(entry.same, [])):
                found = equal.pop()
            self._add(found, entry)
        left = [entry for equal in others.values() for entry in equal]
        if self.is_rerun:
            self.counts["not_run_again"] = len(left) + len(named)
        else:
            for entry in sorted(left, key=lambda entry: entry.key):
                self._add(entry, None)
        for change in ("slower", "faster"):
            self.keys[change].sort(key=lambda pair: self._gains[pair], reverse=True)

    def _add(self, before: Entry | None, after: Entry | None) -> None:
        change = _change(before, after)
        self.counts[change] += 1
        if change in self.keys:
            pair = before and before.key, after and after.key
            self.keys[change].append(pair)
            if change in ("slower", "faster") and before and after:
                self._gains[pair] = abs((after.seconds or 0.0) - (before.seconds or 0.0))


def _change(before: Entry | None, after: Entry | None) -> str:
    """Return what has changed."""
    if after is None:
        return "gone"
    was_failing = before is not None and before.status in _FAILED
    if after.status in _FAILED:
        return "still_failing" if was_failing else "newly_failed"
    if before is None:
        return "new"
    if after.status is not TaskStatus.COMPLETED:
        return "unfinished"
    if before.status is not TaskStatus.COMPLETED:
        return "mended" if before.status.is_final else "unchanged"
    short, long = sorted([before.seconds or 0.0, after.seconds or 0.0])
    if before.seconds is None or after.seconds is None or (
            long < FACTOR * short or long - short < LEAST):
        return "unchanged"
    return "slower" if after.seconds == long else "faster"


def _entries(connection: sqlite3.Connection, run: str) -> Iterator[tuple[str, Entry]]:
    """Yield the tasks of a run in the order of their creation, each with its id."""
    rows = connection.execute(
        f"SELECT t.key, t.id, {SEEN}, t.duration_sec, t.script_hash, t.script_id, t.name, "
        "t.metadata_json FROM tasks t LEFT JOIN runs r ON r.run_id = t.run_id "
        "WHERE t.run_id = ? AND +t.id < x'' ORDER BY t.id", (run,))
    folders: dict[str, str] = {}  # of many thousand equal ones one is kept
    for count, (key, task_id, status, seconds, script_hash, script_id, name, metadata) in enumerate(
            rows):
        if count >= MOST:
            raise ConfigurationError(f"run: expected one of at most {MOST:,} tasks, got {run}, "
                                     "which has more; compare others, or what tasks --json tells")
        if status not in STATUSES:
            continue
        script = text_of(script_id) or ""
        if ":" in script or not isinstance(script_hash, str):
            same: Same = script, text_of(name)
        else:
            folder = str(object_of(metadata).get("cwd"))
            same = script_hash, folders.setdefault(folder, folder)
        yield task_id, Entry(key, STATUSES[status], number_of(seconds), same)


def _origins(connection: sqlite3.Connection, before: str, after: str) -> dict[str, str]:
    """Return by the ids of tasks of one run the ids of those of another that they ran again, be it
    by way of others."""
    steps = dict(connection.execute(
        "SELECT id, rerun_of FROM tasks WHERE run_id = ? AND +id < x'' AND rerun_of < x''",
        (after,)))
    found: dict[str, str] = {}
    for _ in range(LONGEST_CHAIN):
        if not steps:
            break
        told = _runs_of(connection, set(steps.values()))
        further = {}
        for task_id, earlier in steps.items():
            run, before_that = told.get(earlier, (None, None))
            if run == before:
                found[task_id] = earlier
            elif isinstance(before_that, str):
                further[task_id] = before_that
        steps = further
    return found


def _runs_of(connection: sqlite3.Connection,
             task_ids: Collection[str]) -> dict[str, tuple[object, object]]:
    """Return of each of these tasks its run, and the task that it ran again."""
    ids = list(task_ids)
    found: dict[str, tuple[object, object]] = {}
    for start in range(0, len(ids), 10_000):
        found.update((task_id, (run, rerun_of)) for task_id, run, rerun_of in connection.execute(
            "SELECT t.id, t.run_id, t.rerun_of FROM json_each(?) JOIN tasks t ON t.id = value",
            (json.dumps(ids[start:start + 10_000]),)))
    return found

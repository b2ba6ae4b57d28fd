"""What a history shows as drawings and groups: failures that are alike, throughput, a timeline.

Every function gets a connection inside a read transaction, and runs on the thread that asks. Each
reads a bounded number of rows, the newest ones; an answer tells how many, and whether those were
all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from ..model.events import TaskStatus


@dataclass(frozen=True)
class FailureGroup:
    """Failed tasks with one fingerprint: the type of the failure, and its message without
    numbers."""

    fingerprint: str
    """16 hex digits; the same for the same kind of failure in any history."""
    failure_type: str | None
    pattern: str
    """The message with ``#`` for each number, id and address, at most 200 characters."""
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
    """The seconds that all tasks ran in it, over the seconds that it has."""


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


def fingerprint_of(failure_type: str | None, message: str | None) -> str:
    """Return what failures that are alike have in common, as 16 hex digits."""
    text = f"{failure_type or ''}\n{pattern_of(message)}"
    return sha256(text.encode("utf-8", "replace")).hexdigest()[:16]

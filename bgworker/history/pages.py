"""Pages of a history for people who look at it: tasks that match a filter, the lines of one task,
runs with their counts.

Every function gets a connection inside a read transaction, and runs on the thread that asks. Each
reads a bounded number of rows and bytes. One that stops at its bound says so, and tells where the
next question goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

    from ..model.events import StreamEvent, TaskSnapshot, TaskStatus
    from .answers import Run


@dataclass(frozen=True)
class Match:
    """Where a task has the text that was searched for."""

    place: Literal["name", "message", "failure", "output"]
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
    searched_tasks: int
    """Tasks that were looked at for this page."""
    searched_lines: int
    """Stream events that were looked at for this page, in a search for a text."""
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

"""``bgworker show``: everything about one task."""

from __future__ import annotations

import json
from dataclasses import replace
from heapq import merge

from ..model.events import StreamType, TaskStatus
from ..model.wire import encode
from ..words import (ago, duration_of, escaped_lines, is_command, now, place_of, resumable_as,
                     stamp, took, why, word_for)
from .options import NO_SUCH_TASK, add_db, add_json, add_task, exit_codes, whole
from .pasting import KEYS, pasteable
from .reading import Output, harmless_json, opened
from .tables import MOST_OF_A_NAME, Column, table
from .tail import payload_lines
from .text import ANY_WIDTH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator
    from typing import Any

    from ..history.answers import Run
    from ..history.past import Other
    from ..history.reader import History
    from ..model.events import StreamEvent, TaskSnapshot
    from .text import Surface

HELP = "show everything about one task"

DESCRIPTION = """\
Show everything that is recorded of one task: when and where it ran, how it
ended, why it failed, and the last lines of each of its streams. Without TASK,
of the last one. A command, and its directory, are spelled so that bash runs
just that.
"""

EPILOG = exit_codes(NO_SUCH_TASK) + """
examples:
  bgworker show
  bgworker show 01a2b3c4 -n 20
"""

FACTS = (Column(""), Column("", most=ANY_WIDTH))

STREAMS = (StreamType.OUTPUT, StreamType.ERROR, StreamType.WARNING, StreamType.VERBOSE)


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_task(parser)
    add_db(parser)
    parser.add_argument("-n", "--lines", metavar="N", type=whole(), default=5,
                        help="the last N events of each stream (default: 5)")
    add_json(parser)


def act(options: Namespace) -> int:
    """Print one task in sections, or as JSON."""
    output = Output()
    with opened(options) as history:
        task = history.task(options.task, run=options.run)
        run = history.run(task.run_id)
        streams = {stream: _events(history, task, stream, options.lines)
                   for stream in (*STREAMS, StreamType.PROGRESS)}
        if options.json:
            events = merge(*streams.values(), key=lambda event: event.seq)
            output.json(task=task, run=run,
                        streams=(harmless_json(encode(event)) for event in events))
        else:
            later = history.later_of(task.task_id)
            output.lines(_lines(task, run, later, streams, output.surface()))
    return 0


def _events(history: History, task: TaskSnapshot, stream: StreamType,
            count: int) -> Iterator[StreamEvent]:
    """Yield the last events of a stream, of which no more than a page is held."""
    for page in history.pages(task.task_id, types=[stream], newest=count):
        yield from page


def _lines(task: TaskSnapshot, run: Run | None, later: Other | None,
           streams: dict[StreamType, Iterator[StreamEvent]], surface: Surface) -> Iterator[str]:
    status = surface.painted(word_for(task.status), task.status)
    yield f"{surface.cell(task.name, MOST_OF_A_NAME)}: {status}"
    # nothing of it is cut: who asks for one task wants all of it
    facts = table(FACTS, list(_facts(task, run, later)), replace(surface, columns=ANY_WIDTH))
    yield from (f"  {line}" for line in facts[1:])
    is_of_shell = is_command(task)
    if task.failure_type or task.failure_message:
        yield ""
        yield "why it was cancelled:" if task.status is TaskStatus.CANCELLED else "failure:"
        what = ": ".join(filter(None, (task.failure_type, task.failure_message)))
        yield from (f"  {line}" for line in escaped_lines(why(task) if is_of_shell else what))
    if place := place_of(task):
        yield ""
        yield from (f"  {line}" for line in escaped_lines(place))
    for stream in sorted(STREAMS, key=lambda each: is_of_shell and each is not StreamType.ERROR):
        for number, event in enumerate(streams[stream]):
            if not number:
                yield ""
                yield f"{stream}:"
            yield from (f"  {line}" for line in payload_lines(event))


def _facts(task: TaskSnapshot, run: Run | None,
           later: Other | None) -> Iterator[tuple[str, str]]:
    at = now()
    yield "id", task.task_id
    for name, time in (
        ("created", task.created_utc),
        ("started", task.started_utc),
        ("ended", task.completed_utc),
    ):
        yield name, stamp(time) if time is None else f"{stamp(time)} ({ago(time, at)})"
    limit = "" if task.timeout is None else f" (timeout {took(task.timeout)})"
    yield "duration", took(duration_of(task, at)) + limit
    percent = task.last_progress_percent
    if percent is not None or task.last_progress_message:
        done = "" if percent is None else f"{percent:.0f}% "
        yield "progress", done + (task.last_progress_message or "")
    source = "" if task.script_hash is None else f" (sha256 {task.script_hash[:12]})"
    yield "script", (task.script_id or "-") + source
    if task.arguments is not None:
        yield "arguments", task.arguments
    if task.result is not None:
        yield "result", task.result
    metadata = dict(task.metadata)
    if isinstance(metadata.get("rerun_of"), str):
        yield "runs again", metadata.pop("rerun_of")
    if later is not None:
        yield "run again as", f"{later.task_id}, {word_for(later.status)}"
    if resumable := resumable_as(task):
        metadata.pop("resumable")
        yield "resumable", resumable
    if is_command(task):
        command, folder = pasteable(metadata)
        if command is not None:
            yield "command", command
            yield "directory", folder or "-"
            metadata = {name: metadata[name] for name in metadata if name not in KEYS}
    if metadata:
        yield "metadata", json.dumps(metadata, ensure_ascii=False)
    yield "run", (task.run_id or "-") + ("" if run is None else _where(run))


def _where(run: Run) -> str:
    if run.host is None:
        return " (copied from another history)"
    ended = "" if run.ended_utc is None and run.is_alive is not False else ", ended"
    return f" (process {run.pid} on {run.host}, Python {run.python}{ended})"

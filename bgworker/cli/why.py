"""``bgworker why``: how a task ended, what led there, and what to type next."""

from __future__ import annotations

import signal
from itertools import chain
from textwrap import fill

from ..model.events import StreamType, TaskStatus
from ..model.wire import encode
from ..words import (ago, duration_of, ending, escaped, escaped_lines, now, place_of, resumable_as,
                     took, why, word_for)
from .options import NO_SUCH_TASK, add_db, add_json, add_task, exit_codes, typed, whole
from .reading import Output, harmless_json, opened
from .show import STREAMS
from .tables import MOST_OF_A_NAME, counted
from .tail import payload_lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime
    from typing import Any

    from ..history.answers import Run
    from ..history.past import Other, Past
    from ..history.reader import History
    from ..model.events import StreamEvent, TaskSnapshot
    from .text import Surface

HELP = "tell why a task ended as it did"

DESCRIPTION = """\
Tell how a task ended, what its exit code or signal usually means, where it was
at that time, what it said last, how earlier tasks of the same name or of the
same command ended, and what to type next. Of a task that runs: what it is
doing, and how long that usually takes. Without TASK, of the last one.
"""

EPILOG = exit_codes(NO_SUCH_TASK) + """
examples:
  bgworker why
  bgworker why 264
  bgworker why nightly --json
"""

FRAMES = 3
"""Calls of a traceback or a stack that are shown, the innermost ones."""

_PROGRESS = (StreamType.PROGRESS,)

# Source: "Exit Status" of the Bash manual; "Exit Status for Commands" of POSIX, XCU 2.8.2
_CODES = {
    124: "usually that the program timeout stopped it",
    126: "usually that a file was found and could not be executed: it is a directory, has no "
         "permission to be executed, or is for another machine",
    127: "usually that the shell found no such program: a word is misspelled, or PATH lacks its "
         "directory",
}
_SIGNALS = {
    "SIGABRT": "it gave up by itself, as after a failed assertion",
    "SIGBUS": "it used memory that is not there, such as that of a file that became shorter",
    "SIGFPE": "it divided a whole number by zero, or the like",
    "SIGHUP": "its terminal is gone, or somebody sent this",
    "SIGILL": "it is made for another processor, or is damaged",
    "SIGINT": "somebody typed Ctrl-C",
    "SIGKILL": "somebody killed it, or the system did, perhaps because it was out of memory (its "
               "log tells: journalctl -k, or dmesg)",
    "SIGPIPE": "it wrote to a pipe that nobody reads any more",
    "SIGSEGV": "it used memory that is not its own: a defect",
    "SIGTERM": "somebody asked it to end",
    "SIGXCPU": "it used more time of a processor than its limit (ulimit -t)",
    "SIGXFSZ": "it made a file larger than its limit (ulimit -f)",
}


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_task(parser)
    add_db(parser)
    parser.add_argument("-n", "--lines", metavar="N", type=whole(), default=5,
                        help="the last N lines of its errors, and of what else it said "
                        "(default: 5)")
    add_json(parser)


def act(options: Namespace) -> int:
    """Print what is known, or as JSON."""
    output = Output()
    with opened(options) as history:
        task = history.task(options.task, run=options.run)
        run, past = history.run(task.run_id), history.past(task.task_id)
        said = {stream: _last(history, task, (stream,), options.lines) for stream in STREAMS}
        progress = _last(history, task, _PROGRESS, 1)
        if options.json:
            last = sorted(chain(*said.values(), progress), key=lambda event: event.seq)
            output.json(task=task, run=run, reason=_reason(task), meaning=meaning_of(task) or None,
                        stack=_stack(task), past=past,
                        last=(harmless_json(encode(event)) for event in last))
        else:
            digits = history.id_length([task.task_id])
            output.lines(_lines(task, run, past, said, progress, output.surface()))
            output.lines(_next(task, past, digits, options, output.surface()))
    return 0


def _last(history: History, task: TaskSnapshot, streams: Sequence[StreamType],
          count: int) -> list[StreamEvent]:
    return history.streams(task.task_id, types=streams, limit=count, newest=True)


# ---------------------------------------------------------------- for people

def _lines(task: TaskSnapshot, run: Run | None, past: Past,
           said: Mapping[StreamType, Sequence[StreamEvent]], progress: Sequence[StreamEvent],
           surface: Surface) -> Iterator[str]:
    at = now()
    word = word_for(task.status)
    signs = [event.created_utc for event in chain(*said.values(), progress)]
    how = _how(task, run, past, max(signs, default=task.started_utc), at)
    yield (f"{surface.cell(task.name, MOST_OF_A_NAME)}: {surface.painted(word, task.status)}"
           f"{escaped(how)}")
    if meaning := meaning_of(task):
        yield fill(meaning, surface.columns, initial_indent="  ", subsequent_indent="  ")
    for event in progress:
        yield ""
        yield f"progress, the last {ago(event.created_utc, at)}:"
        yield from (f"  {line}" for line in payload_lines(event))
    stack = _stack(task)
    if stack:
        yield ""
        yield f"{'it was at' if task.status is TaskStatus.TIMED_OUT else 'it happened at'}:"
        yield from (f"  {line}" for line in stack)
    # what a command says of its failure stands on stderr
    for stream in sorted(STREAMS, key=lambda stream: stream is not StreamType.ERROR):
        if events := said[stream]:
            yield ""
            yield f"{stream}, the last {ago(events[-1].created_utc, at)}:"
            yield from (f"  {line}" for event in events for line in payload_lines(event))
    yield ""
    yield f"before: {_before(past, at)}"
    if past.rerun is not None:
        yield f"since:  run again, and {_told(past.rerun, at)}"
    elif past.later is not None:
        yield f"since:  the newest one {_told(past.later, at)}"
    if past.rerun is None and task.status is TaskStatus.INTERRUPTED and resumable_as(task):
        yield "next:   Scheduler.resume in its own program runs it again"


def _how(task: TaskSnapshot, run: Run | None, past: Past, last_sign: datetime | None,
         at: datetime) -> str:
    """Return what follows the word for the status of a task in a sentence about it."""
    status, lasted = task.status, took(duration_of(task, at))
    where = "" if run is None or run.host is None else f"process {run.pid} on {run.host}"
    if status is TaskStatus.INTERRUPTED:
        if last_sign is None:
            return f" before it started: {where or 'its process'} is gone"
        begun = "" if task.started_utc is None else f"it started {ago(task.started_utc, at)}, "
        return (f": {begun}was last heard of {ago(last_sign, at)}, and {where or 'its process'} is "
                "gone")
    if status is TaskStatus.RUNNING:
        usual = ""
        if past.median is not None:
            more = (duration_of(task, at) or 0.0) - past.median
            usual = f", {took(abs(more))} {'longer' if more > 0 else 'less'} than the median"
        return f" for {lasted}{usual}{where and f', in {where}'}"
    if not status.is_final:
        waited = took((at - task.created_utc).total_seconds())
        return f" for {waited}{where and f', in {where}'}"
    text = ending(task)[len(word_for(status)):]
    if status is TaskStatus.CANCELLED and task.started_utc is None:
        text += ", before it started"
    return f"{text}, {ago(task.completed_utc, at)}"


def meaning_of(task: TaskSnapshot) -> str:
    """Return what the exit code or the signal of a command usually means, as a sentence; nothing
    where nobody can tell."""
    from ..history.schema import exit_code_of
    code = exit_code_of(task.status.value, task.script_id, task.failure_type, task.failure_message)
    if code is None:
        return ""
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = ""
    if code < 0:
        found = _SIGNALS.get(name)
        return f"{name} means {found}." if found else ""
    if code in _CODES:
        return f"Exit code {code} means {_CODES[code]}."
    if name and code > 128:
        found = f": {_SIGNALS[name]}" if name in _SIGNALS else ""
        return f"Exit code {code} is 128 + {number}, usually that {name} ended it{found}."
    return ""


def _reason(task: TaskSnapshot) -> str | None:
    return why(task) if task.failure_type or task.failure_message else None


def _stack(task: TaskSnapshot) -> list[str]:
    """Return where a task failed, or was at its deadline: the innermost calls, and what follows
    them."""
    lines = list(escaped_lines(place_of(task)))
    calls = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    if not calls:
        return lines[-FRAMES:] if lines != [""] else []
    first, last = calls[-FRAMES:][0], calls[-1]
    if task.status is not TaskStatus.TIMED_OUT:  # the failure follows, which is told already
        lines = lines[:next((number for number in range(last + 1, len(lines))
                             if not lines[number].startswith("    ")), len(lines))]
    return [line[2:] if line.startswith("  ") else line for line in lines[first:]]


def _before(past: Past, at: datetime) -> str:
    if not past.earlier:
        return "no task of this name, or of this command, has ended"
    statuses = {status: past.latest.count(status) for status in past.latest}
    which = f"; of the last {len(past.latest)}: "
    last = past.last_completed
    if last is None:
        link = which if past.earlier > len(past.latest) else ": "
        return f"ended {_times(past.earlier)}, and never completed{link}{counted(statuses)}"
    usual = "" if past.median is None else f", median {took(past.median)}"
    when = f", the last {ago(last.completed_utc, at)}{usual}"
    if past.completed == past.earlier:
        return f"completed {_times(past.completed)}{when}"
    statuses.pop(TaskStatus.COMPLETED, None)
    others = counted(statuses)
    return (f"completed {past.completed:,} of {_times(past.earlier)}{when}"
            f"{which}{others or 'all completed'}")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _told(other: Other, at: datetime) -> str:
    did = {TaskStatus.RUNNING: "is running", TaskStatus.SCHEDULED: "is waiting",
           TaskStatus.CREATED: "is waiting", TaskStatus.CANCELLED: "was cancelled",
           TaskStatus.INTERRUPTED: "was interrupted"}.get(other.status, word_for(other.status))
    return f"{did}, {ago(other.completed_utc or other.created_utc, at)}"


def _next(task: TaskSnapshot, past: Past, digits: int, options: Namespace,
          surface: Surface) -> Iterator[str]:
    """Yield what to type next, and what for.

    Args:
        digits: of an id that are shown, the last ones.
    """
    name = task.task_id[-digits:]
    steps = [(f"show {name}", "all that is recorded of it")]
    if not task.status.is_final:
        steps += [(f"tail -f {name}", "what it says"), (f"cancel {name}", "stop it")]
    else:
        steps += [(f"tail {name}", "all that it said")]
        if past.rerun is not None:
            steps += [(f"why {past.rerun.task_id[-digits:]}", "the task that ran it again")]
        elif task.status is not TaskStatus.COMPLETED and "command" in task.metadata:
            steps += [(f"rerun {name}", "run it again")]
    yield ""
    words = [(escaped(typed(options, step)), what) for step, what in steps]
    width = max([len(step) for step, _ in words])
    has_room = width + 2 + max([len(what) for _, what in words]) <= surface.columns
    for step, what in words:
        yield f"{step:<{width}}  {what}" if has_room else step

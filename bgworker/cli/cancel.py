"""``bgworker cancel``: stop tasks that another process runs, and tell how each ended."""

from __future__ import annotations

from argparse import ArgumentTypeError
from time import monotonic, sleep

from ..model.errors import UnknownTask
from ..model.events import TaskStatus
from ..model.text import sanitise
from ..words import ago, ending, escaped, now, took
from .options import A_TASK, add_db, add_json, add_run, seconds
from .reading import Output, opened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Tuple

    from ..history.reader import History
    from ..model.events import TaskSnapshot

    Outcome = Tuple[TaskSnapshot, str, str]
    """A task, what came of it in one word (for --json), and in words for people."""

HELP = "stop tasks that wait or run"

DESCRIPTION = """\
Have the processes that run tasks cancel them, and wait until the history shows
how each has ended.

A task that waits is cancelled at once. Of a command all processes get SIGTERM,
and SIGKILL 5 seconds later; a Python function stops at its next checkpoint, a
coroutine where it awaits.

bgworker run listens to its history, a program does after
pool.listen("history.db"). Where nobody listens or answers, that is told and the
request withdrawn. Ctrl-C ends the waiting: what was asked stands.
"""

EPILOG = """\
exit codes:
  0    every task was cancelled, or ended by itself before it was stopped; with
       --all also where none waits or runs
  1    a task had ended before, runs on another host, its process is gone or
       does not answer, or it has not ended within --timeout; there is no such
       task, and then none was asked; or no request can be written
  2    the command line is wrong, or there is no history that can be read
  130  interrupted (Ctrl-C)
  141  nobody reads our output any more (as in ... | head)

examples:
  bgworker cancel last
  bgworker cancel 12 13 --reason "wrong input"
  bgworker cancel --all --run last
"""

REASON = "asked by bgworker cancel"
MOST_REASON = 1000  # characters; no more is read

ANSWER = 2.0
"""Seconds after which a process that does not listen is not waited for: it could have begun to."""
INTERVAL = 0.1
"""Seconds between two looks at the history."""
LEAST_OF_A_NAME, MOST_OF_A_NAME = 12, 60
"""Columns that a name gets in a line."""

STOPPED = ("cancelled", "ended")
"""The outcomes that are no failure."""


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    parser.add_argument("tasks", metavar="TASK", nargs="*", help=A_TASK)
    add_db(parser)
    parser.add_argument("--all", action="store_true",
                        help="all tasks that wait or run, of whatever process")
    add_run(parser, "the run that TASKs are of, by number too; with --all, only its tasks")
    parser.add_argument("--reason", metavar="TEXT", type=_reason, default=REASON,
                        help="why, for the record (default: %(default)s)")
    parser.add_argument(
        "--timeout", metavar="S", type=seconds("leave it out for one minute"), default=60.0,
        help="how long to wait for the ends: seconds, or a duration such as 90s or 1h30m (default: "
        "60); what was asked to stop by then may still do so")
    add_json(parser)


def _reason(text: str) -> str:
    if not text.strip() or len(text) > MOST_REASON:
        raise ArgumentTypeError(f"expected 1 to {MOST_REASON:,} characters, got {len(text):,}; "
                                "leave it out for the default")
    return sanitise(text)


def act(options: Namespace) -> int:
    """Ask, wait, and tell what came of each task."""
    if bool(options.tasks) == options.all:
        options.parser.error(
            f"expected either TASK or --all, got {'both' if options.all else 'neither'}; name "
            "tasks, or use --all for all that wait or run")
    output = Output()
    with opened(options) as history:
        import sqlite3

        tasks = _unended(history, options.run) if options.all else _named(history, options)
        line = _liner(history, tasks, output)
        outcomes: list[Outcome] = []
        try:
            for outcome in _outcomes(history, tasks, options):
                outcomes.append(outcome)
                if options.json:
                    continue
                if outcome[1] in STOPPED:
                    output.lines([line(outcome)])
                else:
                    options.parser.tell(line(outcome))
        except KeyboardInterrupt:
            left = len(tasks) - len(outcomes)
            options.parser.tell(f"interrupted: {left} task{'s have' if left > 1 else ' has'} not "
                                "ended yet; what was asked stands")
            raise
        except (sqlite3.Error, OSError, MemoryError) as error:
            options.parser.fail(
                f"cannot write a request to {options.db!r}: {error}; see whether this user may "
                "write to the file and its directory, and whether there is room on the disk")
        if options.json:
            output.json(tasks=(
                {"task_id": task.task_id, "name": task.name, "outcome": word, "message": message}
                for task, word, message in outcomes))
        elif not tasks:
            output.lines(["no task waits or runs"])
    return 0 if all(word in STOPPED for _, word, _ in outcomes) else 1


def _named(history: History, options: Namespace) -> list[TaskSnapshot]:
    """Return the tasks that the words name, each once."""
    tasks = [history.task(name, run=options.run) for name in options.tasks]
    return list({task.task_id: task for task in tasks}.values())


def _unended(history: History, run: str | None) -> list[TaskSnapshot]:
    """Return the tasks, of a run, that wait or run, in the order of their creation."""
    # in this order: one that begins meanwhile is found again
    keys = [key for status in (TaskStatus.CREATED, TaskStatus.SCHEDULED, TaskStatus.RUNNING)
            for key in history.task_keys(status=status, run=run, limit=None)]
    tasks = history.tasks_of(sorted(set(keys)), is_brief=True)
    return [task for task in tasks if not task.status.is_final]


def _liner(history: History, tasks: Sequence[TaskSnapshot],
           output: Output) -> Callable[[Outcome], str]:
    """Return what makes a line of an outcome."""
    digits = history.id_length([task.task_id for task in tasks])
    surface = output.surface()

    def line(outcome: Outcome) -> str:
        task, _, message = outcome
        room = surface.columns - digits - len(message) - 3
        name = surface.cell(task.name, max(LEAST_OF_A_NAME, min(room, MOST_OF_A_NAME)))
        return f"{escaped(task.task_id[-digits:])} {name}: {escaped(message)}"
    return line


# ---------------------------------------------------------------- from the request to the end

def _outcomes(history: History, tasks: Sequence[TaskSnapshot],
              options: Namespace) -> Iterator[Outcome]:
    """Yield what comes of each task, when it is known."""
    from ..history.requests import ask, is_listened_for, withdraw

    waited_for: dict[str, TaskSnapshot] = {}
    out_of_reach = {run_id: _out_of_reach(history, run_id)
                    for run_id in {task.run_id for task in tasks}}
    for task in tasks:
        refusal = _ended(task) or out_of_reach[task.run_id]
        if refusal:
            yield task, "refused", refusal
        else:
            waited_for[task.task_id] = task
    if waited_for:
        ask(history.path, waited_for, options.reason)
    begun = monotonic()
    silent = set(waited_for)  # those whose process has not claimed the request
    while waited_for:
        waited = monotonic() - begun
        is_late = waited >= options.timeout
        given_up = silent.copy() if is_late else set()
        if waited >= ANSWER:
            runs = {waited_for[task_id].run_id for task_id in silent}
            deaf = {run_id for run_id in runs if not is_listened_for(history.path, run_id)}
            given_up.update(each for each in silent if waited_for[each].run_id in deaf)
        if given_up:
            withdraw(history.path, given_up)
        states = history.cancelling(waited_for)
        for task_id, task in list(waited_for.items()):
            status, is_claimed = states.get(task_id, (None, False))
            if is_claimed:
                silent.discard(task_id)
            if status is None or status.is_final:
                yield _end(history, task, options.reason)
            elif task_id in given_up & silent:
                yield task, "unanswered", _unanswered(history, task, waited)
            elif is_late:
                yield task, "running", (f"still runs after {took(waited)}; it was asked to stop, "
                                        "and does so at its next checkpoint")
            else:
                continue
            del waited_for[task_id]
            silent.discard(task_id)
        if waited_for:
            sleep(INTERVAL)


def _ended(task: TaskSnapshot) -> str:
    """Return how a task has ended; nothing if it has not."""
    if task.status is TaskStatus.INTERRUPTED:
        return "it was interrupted: its process is gone, or has closed the history"
    if task.status.is_final:
        return f"it has ended: {ending(task)}, {ago(task.completed_utc, now())}"
    return ""


def _out_of_reach(history: History, run_id: str) -> str:
    """Return why nobody can be asked to cancel the tasks of a run; nothing if somebody can."""
    from ..history.requests import is_recorded_here
    from ..history.schema import this_host

    run = history.run(run_id)
    if run is None or run.host is None:
        return ("nobody knows its process: it was copied from another history; cancel it by that "
                "one, with --db")
    if run.host != this_host() and not is_recorded_here(history.path, run_id):
        return f"it runs on the host {run.host!r}, this is {this_host()!r}; cancel it there"
    return ""


def _unanswered(history: History, task: TaskSnapshot, waited: float) -> str:
    from ..history.requests import is_listened_for

    run = history.run(task.run_id)
    process = f"its process {run.pid}" if run is not None and run.pid else "its process"
    if is_listened_for(history.path, task.run_id):
        return (f"{process} has not answered within {took(waited)}, and the request is withdrawn: "
                "it is stopped, or too busy")
    return (f"{process} does not listen, and the request is withdrawn; a program needs "
            f"pool.listen({history.path!r})")


def _end(history: History, task: TaskSnapshot, reason: str) -> Outcome:
    """Return what came of a task that has ended."""
    try:
        task = history.task(task.task_id)
    except UnknownTask:
        return task, "ended", "it is no longer in the history"
    if task.status is TaskStatus.INTERRUPTED:
        return task, "interrupted", "its process has died meanwhile"
    if task.status is not TaskStatus.CANCELLED:
        return task, "ended", f"{ending(task)}, before it was stopped"
    if task.failure_message != reason:  # somebody else was first
        return task, "cancelled", ending(task)
    lasted = " before it started" if task.started_utc is None else (
        f" after {took(task.duration)}" if task.duration is not None else "")
    return task, "cancelled", f"cancelled{lasted}"

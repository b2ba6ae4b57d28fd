"""``bgworker rerun``: run recorded commands again, in their directories, as new tasks that name the
old ones.

All of them are looked at before the first one starts: either all run, or none.
"""

from __future__ import annotations

import os

from ..model.checks import MOST
from ..model.enums import TaskStatus
from ..model.errors import ConfigurationError, UnknownTask
from ..model.ids import SHORT
from ..words import resumable_as, word_for
from .commands import Command, Prepared, original
from .options import A_TASK, add_db, add_run, typed
from .reading import opened
from .run import add_running_options, execute

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

    from ..history.reader import History
    from ..model.events import TaskSnapshot

HELP = "run commands again, such as those that failed"

DESCRIPTION = """\
Run commands of a history again: the same text or words, exactly, in the
directory of then, with the environment of now. Each is a new task, which names
the one that it runs again and takes its place in what is left to do. It keeps
the name and, without --timeout, the time limit.

--failed runs again what a run left undone: commands that failed, timed out,
were cancelled or were interrupted, whether they had begun or not, but none that
was run again already. What still runs or waits is left alone.

It runs what the file says: use only a history that you, or whoever you trust,
have written.
"""

EPILOG = """\
exit codes:
  those of bgworker run, and 0 where nothing was left; 2 also where a task is
  not there or cannot be run again: nothing was started then

  What cannot be run again is a Python function, which only its own program can
  call, as Scheduler.resume does there; a command whose directory is gone, that
  has not ended, that was run again already, or whose text was too long to be
  recorded. All of it is listed.

  bgworker run --help says more about --timeout, --retries, --halt and --sink.

examples:
  bgworker rerun --failed
  bgworker rerun --failed --run last~1 -j 4 --timeout 10m
  bgworker rerun 264 '[265]' 9fe26ca5
  bgworker diff
"""

MOST_REFUSED = 100
"""Tasks whose refusal is explained."""

MOST_OF_A_NAME = 80
"""Characters of their names."""

MOST_RUNS = 100
"""Runs, the newest, of which one that has something left is told of."""


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    parser.usage = ("%(prog)s [options] TASK ...\n"
                    "       %(prog)s [options] --failed")
    parser.add_argument("tasks", metavar="TASK", nargs="*", help=A_TASK)
    parser.add_argument("--failed", action="store_true",
                        help="all commands of the run that ended without completing, and were not "
                        "run again")
    add_run(parser, "the run that is meant (default: the newest)")
    add_db(parser, "the history to read and to record in")
    add_running_options(parser)


def act(options: Namespace) -> int:
    """Run the commands and return the exit code."""
    if options.behind_dashes:
        options.parser.error(f"expected TASK or --failed, got -- {options.behind_dashes[0]}; what "
                             "is not recorded is run by bgworker run")
    if bool(options.tasks) == options.failed:
        options.parser.error(
            f"expected either TASK or --failed, got {'both' if options.failed else 'neither'}; "
            "name tasks, or use --failed for all that a run left undone")
    with opened(options) as history:
        tasks, refused = _left(history, options) if options.failed else _named(history, options)
        digits = history.id_length([task.task_id for task in tasks])
    commands = []
    for task in tasks:
        try:
            commands.append(_again(task))
        except ConfigurationError as error:
            refused.append(f"{task.task_id[-digits:]} ({task.name[:MOST_OF_A_NAME]}): {error}")
    if refused:
        _refuse(options, refused, len(refused) + len(commands))
    return execute(Prepared(commands), options) if commands else 0


def _refuse(options: Namespace, refused: list[str], count: int) -> None:
    """Tell why tasks cannot be run again, and exit."""
    options.parser.tell(f"error: {len(refused)} of {count} cannot be run again, so nothing was "
                        "started:")
    for each in refused[:MOST_REFUSED]:
        options.parser.tell(each)
    if refused[MOST_REFUSED:]:
        options.parser.tell(f"... and {len(refused) - MOST_REFUSED} more")
    options.parser.exit(2)


# ---------------------------------------------------------------- which tasks

def _named(history: History, options: Namespace) -> tuple[list[TaskSnapshot], list[str]]:
    """Return the tasks that are named, each once, and why others are refused."""
    tasks: dict[str, TaskSnapshot] = {}
    refused = []
    for word in options.tasks:
        try:
            task = history.task(word, run=options.run)
        except UnknownTask as error:
            refused.append(str(error))
            continue
        later = history.later_of(task.task_id)
        if later is None:
            tasks[task.task_id] = task
        else:
            refused.append(f"{word} ({task.name[:MOST_OF_A_NAME]}): it was run again already; the "
                           f"last time as {later.task_id[-SHORT:]} ({word_for(later.status)}), "
                           "which can be named instead")
    return [*tasks.values()], refused


def _left(history: History, options: Namespace) -> tuple[list[TaskSnapshot], list[str]]:
    """Return what a run left undone, in the order of then; tell where that is nothing."""
    if options.run is None and not history.runs(limit=1):
        options.parser.tell("nothing is recorded yet")
        return [], []
    run = history.run_id(options.run or "last")
    keys = history.task_keys(run=run, left=True, limit=None)
    tasks = [task for task in history.tasks_of(keys) if task.status.is_final]
    open_ = len(keys) - len(tasks)
    told = f"{len(tasks) or 'nothing'} of the run {run[-SHORT:]} is left to run again"
    if len(tasks) > 1:
        told = told.replace(" is left", " are left")
    if open_:
        told += f"; {open_} run or wait, and are left alone"
    elif not tasks and options.run is None:
        others = (each for each in history.run_counts(limit=MOST_RUNS) if each.left)
        for other in others:
            run = other.run.run_id[-SHORT:]
            told += (f"; of the run {run} there {'is' if other.left == 1 else 'are'} {other.left}: "
                     + typed(options, f"rerun --failed --run {run}"))
            break
    options.parser.tell(told)
    return tasks[::-1], []


# ---------------------------------------------------------------- what they ran

def _again(task: TaskSnapshot) -> Command:
    """Return the command that a task ran.

    Raises:
        ConfigurationError: it cannot be run again.
    """
    metadata = task.metadata
    if not task.status.is_final:
        raise ConfigurationError("it has not ended; wait for it, or stop it with bgworker cancel")
    if "command" not in metadata:
        raise ConfigurationError(_why_not(task))
    argv = metadata.get("argv")
    text = original(metadata["command"])
    words = [original(word) for word in argv] if isinstance(argv, list) else [text]
    folder = original(metadata.get("cwd"))
    seconds = task.timeout
    if (None in words or argv is not None and not isinstance(argv, list)
            or seconds is not None and not 0 < seconds <= MOST
            or folder is not None and not os.path.isabs(folder)):
        raise ConfigurationError("its record is damaged; run the command anew")
    if folder is None:
        raise ConfigurationError("its directory is not recorded, since it was gone already; run "
                                 "the command anew where it is to run")
    if not os.path.isdir(folder):
        raise ConfigurationError(f"its directory {folder!r} is not there any more; create it, or "
                                 "run the command anew in another one")
    from ..shell.command import shell  # a vendored copy may lack it
    given = [word for word in words if word is not None]
    call = shell(given if argv is not None else given[0], cwd=folder)
    recorded = {key: metadata[key] for key in ("cwd", "command", "argv") if key in metadata}
    return Command(task.name, {**recorded, "rerun_of": task.task_id}, call, timeout=seconds)


def _why_not(task: TaskSnapshot) -> str:
    if ":" in (task.script_id or ""):
        what = f"it is the Python function {task.script_id}, which only its own program can call; "
        if resumable_as(task) and task.status is not TaskStatus.CANCELLED:
            also = "" if task.status is TaskStatus.INTERRUPTED else f' with also=["{task.status}"]'
            return f"{what}there, Scheduler.resume runs it again{also}"
        return f"{what}submit it there again"
    if "truncated" in task.metadata:
        return "its command was too long to be recorded whole; run it anew"
    return "its command is not recorded, as only bgworker run does that; run it anew"

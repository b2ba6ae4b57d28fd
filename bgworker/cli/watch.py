"""``bgworker watch``: what a running scheduler does, as its history file tells."""

from __future__ import annotations

from datetime import timedelta
from time import monotonic, sleep

from ..model.errors import UnknownTask
from ..model.events import TaskStatus
from .options import add_db, add_json
from .reading import JSON_VERSION, Output, json_line, listed, opened
from .screen import Screen
from .tables import counted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Iterator
    from typing import Any

    from ..history.reader import History
    from ..model.events import TaskSnapshot
    from .text import Surface

HELP = "watch a running scheduler"

DESCRIPTION = """\
Watch a history while others write it: the tasks that run, those that have just
ended, and how many there are of each status. Ends at Ctrl-C.

Where the output is no terminal, or with --json, a line is printed for each
task that runs, and again whenever the status of one has changed.
"""

EPILOG = """\
exit codes:
  130 interrupted (Ctrl-C); 1 the output cannot be written; 2 the command line
  is wrong, or there is no history that can be read; 141 nobody reads our
  output any more

example:
  bgworker watch --db nightly.db
"""

INTERVAL = 0.25
"""Seconds between two looks at the file."""

WINDOW = timedelta(seconds=60)
"""How long a task counts as just ended where changes are printed; a writer may be that late."""

MOST = 1000
"""Tasks that run, and that have ended with each status, whose changes are noticed at a time."""

def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_db(parser)
    add_json(parser, "print a line of JSON for each change")


def act(options: Namespace) -> int:
    """Draw the table again and again, or print what changes."""
    output = Output()
    with opened(options) as history:
        if output.can_redraw and not options.json:
            _draw(history, output)
        else:
            _print(history, output, as_json=options.json)
    return 0


# ---------------------------------------------------------------- on a terminal

def _draw(history: History, output: Output) -> None:
    """Keep the table up to date until Ctrl-C, which leaves it on the terminal."""
    screen = Screen(output, output, lambda surface: lines_of(history, surface))
    try:
        for _ in _looks(history):
            screen.show([])
    except KeyboardInterrupt:
        output.write("\n")
        raise


def _looks(history: History) -> Iterator[None]:
    """Yield at once, then whenever the file has changed or a second has gone by: times change, and
    processes die without a word."""
    looked_at, seen = 0.0, None
    while True:
        version = history.version()
        if version != seen or monotonic() - looked_at >= 1.0:
            yield
            looked_at, seen = monotonic(), version
        sleep(INTERVAL)


def lines_of(history: History, surface: Surface) -> list[str]:
    """Return the lines of the table: what runs, what has just ended, and the counts."""
    rows = max(1, surface.height - 3)
    counts = history.counts()
    tasks = [*_of_status(history, TaskStatus.RUNNING, rows), *_ended(history, rows, counts)][:rows]
    summary = surface.cut(counted(counts) or "no tasks yet")
    return [*listed(history, tasks, surface), summary]


def _of_status(history: History, status: TaskStatus, limit: int, since: timedelta | None = None,
               ) -> Iterator[TaskSnapshot]:
    keys = history.task_keys(status=status, since=since, limit=limit)
    return history.tasks_of(keys, is_brief=True)


def _ended(history: History, limit: int, statuses: Iterable[TaskStatus],
           since: timedelta | None = None) -> list[TaskSnapshot]:
    """Return tasks that have ended with one of the statuses, the latest first."""
    tasks = [task for status in statuses if status.is_final
             for task in _of_status(history, status, limit, since)]
    return sorted(
        tasks, key=lambda task: (task.completed_utc or task.created_utc, task.task_id), reverse=True
    )


# ---------------------------------------------------------------- elsewhere

def _print(history: History, output: Output, *, as_json: bool) -> None:
    """Print each task that runs, and each again that has ended."""
    known: dict[str, TaskStatus] | None = None
    for _ in _looks(history):
        ended = _ended(history, MOST, TaskStatus, WINDOW)
        if known is None:
            known = {task.task_id: task.status for task in ended}  # they are no news
        tasks = [*ended, *_of_status(history, TaskStatus.RUNNING, MOST)]
        # a process that died said its last word long ago, perhaps
        gone = {task_id for task_id, status in known.items() if status is TaskStatus.RUNNING}
        gone.difference_update(task.task_id for task in tasks)
        tasks += _exact(history, gone)
        news = [task for task in reversed(tasks) if known.get(task.task_id) is not task.status]
        known = {task.task_id: task.status for task in tasks}
        if as_json:
            output.lines(json_line({"v": JSON_VERSION, "task": task})
                         for task in _exact(history, [task.task_id for task in news]))
        elif news:
            output.lines(listed(history, news, output.surface())[1:])


def _exact(history: History, task_ids: Iterable[str]) -> Iterator[TaskSnapshot]:
    """Yield these tasks with all that is recorded of them, also those that ended long ago."""
    for task_id in task_ids:
        try:
            yield history.task(task_id)
        except UnknownTask:
            continue  # it was pruned

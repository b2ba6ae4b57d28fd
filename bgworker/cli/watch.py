"""``bgworker watch``: what a running scheduler does, as its history file tells."""

from __future__ import annotations

import re
from collections import Counter
from datetime import timedelta
from time import monotonic, sleep

from ..model.errors import UnknownTask
from ..model.events import TaskStatus
from .reading import JSON_VERSION, Output, add_db, add_json, json_line, now, opened, quietly
from .screen import counted, cut, width_of
from .tables import task_lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Collection, Iterable, Iterator
    from typing import Any

    from ..history.reader import History
    from ..model.events import TaskSnapshot
    from .screen import Size

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

_FINAL = tuple(status for status in TaskStatus if status.is_final)
_ORDER = (TaskStatus.RUNNING, TaskStatus.SCHEDULED, TaskStatus.CREATED, *_FINAL)
_COLOUR = re.compile("\x1b\\[[0-9]+m")


def add_parser(verbs: Any) -> None:
    """Describe the verb to the parser of the whole command line."""
    parser = verbs.add_parser(
        "watch", help="watch a running scheduler", description=DESCRIPTION, epilog=EPILOG
    )
    add_db(parser)
    add_json(parser, "print a line of JSON for each change")
    parser.set_defaults(act=quietly(act), parser=parser)


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
    drawn: list[str] = []
    drawn_at, seen = 0.0, None
    try:
        while True:
            version, size = history.version(), output.channel.size()
            if version != seen or monotonic() - drawn_at >= 1.0:  # time goes by, and processes die
                lines = picture(history, size, colour=output.colour)
                output.channel.write(
                    f"{_erasure(drawn, size[0])}\x1b[?25l" + "\n".join(lines) + "\x1b[?25h"
                )
                drawn, drawn_at, seen = lines, monotonic(), version
            sleep(INTERVAL)
    except KeyboardInterrupt:
        output.channel.write("\n")
        raise


def _erasure(lines: list[str], columns: int) -> str:
    """Return what takes lines off the terminal, which may have become narrower and have wrapped
    them."""
    rows = sum(max(1, -(-width_of(_COLOUR.sub("", line)) // max(1, columns))) for line in lines)
    return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J" if rows else ""


def picture(history: History, size: Size, *, colour: bool = False) -> list[str]:
    """Return the lines of the table: what runs, what has just ended, and the counts, within the
    size of a terminal."""
    columns, rows = max(20, size[0] - 1), max(1, size[1] - 3)  # the last column would wrap
    counts = history.counts()
    keys = history.task_keys(status=TaskStatus.RUNNING, limit=rows)
    running = history.tasks_of(keys, is_brief=True)
    tasks = [*running, *_ended(history, rows, counts)][:rows]
    id_length = history.id_length([task.task_id for task in tasks])
    lines = task_lines(tasks, now(), columns, id_length=id_length, colour=colour)
    return [*lines, cut(counted(Counter(counts), _ORDER) or "no tasks yet", columns)]


def _ended(history: History, limit: int, statuses: Collection[TaskStatus],
           since: timedelta | None = None) -> list[TaskSnapshot]:
    """Return tasks that have ended with one of the statuses, the latest first."""
    tasks = [task for status in _FINAL if status in statuses for task in history.tasks_of(
        history.task_keys(status=status, since=since, limit=limit), is_brief=True)]
    return sorted(
        tasks, key=lambda task: (task.completed_utc or task.created_utc, task.task_id), reverse=True
    )


# ---------------------------------------------------------------- elsewhere

def _print(history: History, output: Output, *, as_json: bool) -> None:
    """Print each task that runs, and each again that has ended."""
    known: dict[str, TaskStatus] = {}
    looked_at, seen = 0.0, None
    while True:
        version = history.version()
        if version != seen or monotonic() - looked_at >= 1.0:
            running = list(history.tasks_of(
                history.task_keys(status=TaskStatus.RUNNING, limit=MOST), is_brief=True))
            ended = _ended(history, MOST, _FINAL, WINDOW)
            if seen is None:
                known = {task.task_id: task.status for task in ended}  # they are no news
            news = [
                task
                for task in reversed(ended + running)
                if known.get(task.task_id) is not task.status
            ]
            ran = {task_id for task_id, status in known.items() if status is TaskStatus.RUNNING}
            gone = ran.difference(task.task_id for task in (*running, *ended))
            news += [task for task in _exact(history, gone)
                     if task.status is TaskStatus.INTERRUPTED]
            known = {task.task_id: task.status for task in (*running, *ended, *news)}
            looked_at, seen = monotonic(), version
            if as_json:
                output.lines(json_line({"v": JSON_VERSION, "task": task})
                             for task in _exact(history, [task.task_id for task in news]))
            elif news:
                output.lines(task_lines(news, now(), output.columns)[1:])
        sleep(INTERVAL)


def _exact(history: History, task_ids: Iterable[str]) -> Iterator[TaskSnapshot]:
    """Yield these tasks with all that is recorded of them, also those that ended long ago."""
    for task_id in task_ids:
        try:
            yield history.task(task_id)
        except UnknownTask:
            continue  # it was pruned

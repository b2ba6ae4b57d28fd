"""``bgworker tasks``: what was run, newest first."""

from __future__ import annotations

from ..model.events import TaskStatus
from ..words import word_for
from .options import NO_OUTPUT, add_db, add_json, add_run, add_since, exit_codes, whole
from .reading import Output, listed, opened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Sequence
    from typing import Any

    from ..history import History

HELP = "list what was run, newest first"

DESCRIPTION = """\
List the tasks of a history, the newest first: the latest created, or with
--status completed, failed, cancelled or timed_out the latest ended.

interrupted is a task whose process died, or closed the history, before the
task ended. Of an id its last 8 digits are shown, or more where these do not
tell it from others; they name the task for the other verbs.
"""

EPILOG = exit_codes(NO_OUTPUT) + """
examples:
  bgworker tasks --status failed --since 1d
  bgworker tasks --left --run last
  bgworker tasks --name 'load*' --limit 0 --json
"""


_TABLE = 1000
"""Tasks whose lines are made together; of more, whole ids are shown."""


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_db(parser)
    parser.add_argument("--status", choices=[str(status) for status in TaskStatus], metavar="S",
                        type=a_status, help=f"only those of one status: {', '.join(TaskStatus)}")
    parser.add_argument(
        "--name", metavar="GLOB", help="only those whose name matches; *, ? and [...] are wild"
    )
    parser.add_argument("--left", action="store_true",
                        help="only what is left to do: tasks that did not complete, and that no "
                        "later one ran again (by bgworker rerun, or run --resume)")
    add_run(parser)
    add_since(parser)
    parser.add_argument("--limit", metavar="N", type=whole(), default=50,
                        help="at most so many (default: 50; 0 is all)")
    add_json(parser)


def a_status(text: str) -> str:
    """Read a status as it is called, or as the table calls it."""
    return {word_for(status): str(status) for status in TaskStatus}.get(text, text)


def act(options: Namespace) -> int:
    """Print the tasks as a table, or as JSON."""
    output = Output()
    with opened(options) as history:
        keys = history.task_keys(status=options.status, name=options.name, since=options.since,
                                 run=options.run, left=options.left,
                                 limit=options.limit or None)
        if options.json:
            output.json(tasks=history.tasks_of(keys))
        elif keys:
            output.lines(_lines(history, keys, output))
        else:
            is_some = options.status or options.name or options.since or options.run
            nothing = "no such tasks" if is_some else "no tasks yet"
            output.lines(["nothing is left" if options.left else nothing])
    return 0


def _lines(history: History, keys: Sequence[int], output: Output) -> Iterator[str]:
    """Yield the table, in which the columns of so many lines as a screen shows stand in line."""
    surface = output.surface()
    for start in range(0, len(keys), _TABLE):
        tasks = list(history.tasks_of(keys[start:start + _TABLE], is_brief=True))
        lines = listed(history, tasks, surface, has_whole_ids=len(keys) > _TABLE)
        yield from lines[bool(start):]

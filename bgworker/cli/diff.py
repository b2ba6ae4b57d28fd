"""``bgworker diff``: what became of the tasks of one run in another."""

from __future__ import annotations

from ..model.errors import ConfigurationError
from ..words import ago, message_of, now, took, word_for
from .options import A_RUN, add_db, add_json, exit_codes, whole
from .reading import Output, opened
from .tables import MESSAGE, Column, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator
    from datetime import datetime
    from typing import Any

    from ..history.answers import Run
    from ..history.changes import Change, Changes
    from ..history.reader import History
    from ..model.events import TaskSnapshot
    from .text import Surface

HELP = "compare two runs: newly failed, mended, slower, faster"

DESCRIPTION = """\
Compare two runs: what failed or timed out and did not before, what completed
and did not before, what took longer or less, what is new and what is gone.

Commands are the same if they have the same text and directory, Python functions
if they have the same name and function; of several that are equal, the first of
one run is the first of the other. A task that ran another one again is that
one, and where the second run is a rerun of the first (bgworker rerun, or run
--resume), what it did not run again is counted, not listed as gone.

Slower and faster is what completed in both runs, at least 1.5 times as fast in
one of them and with a difference of 0.1s or more.
"""

EPILOG = exit_codes("something newly failed, or the output cannot be written") + """
examples:
  bgworker diff
  bgworker diff last~7
  bgworker diff 6279408e 1c598de9 --json | jq -r '.newly_failed[].after.name'
"""

COLUMNS = (Column("CHANGE"), Column("TASK", rank=3), Column("NAME", rank=1, least=10),
           Column("BEFORE", rank=4), Column("NOW", rank=2), MESSAGE)

COUNTS = ("unchanged", "still_failing", "unfinished", "not_run_again")


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    parser.add_argument("before", metavar="RUN", nargs="?", default="last~1",
                        help=f"the earlier run (default: last~1): {A_RUN}")
    parser.add_argument("after", metavar="RUN", nargs="?", default="last",
                        help="the later run (default: last)")
    add_db(parser)
    parser.add_argument("--limit", metavar="N", type=whole(), default=20,
                        help="at most so many tasks of each change (default: 20; 0 is all)")
    add_json(parser)


def act(options: Namespace) -> int:
    """Print the changes as a table, or as JSON."""
    output = Output()
    with opened(options) as history:
        try:
            changes = history.changes(options.before, options.after, limit=options.limit or None)
        except ConfigurationError as error:  # "run: expected ..."
            if (count := len(history.runs(limit=2))) < 2:
                options.parser.error(f"expected two runs to compare, got {count} in the history; "
                                     "run something again first, as with bgworker rerun")
            options.parser.error(f"argument RUN: {str(error).partition(': ')[2]}")
        if options.json:
            output.json(**_fields(changes))
        else:
            output.lines(_lines(history, changes, output.surface()))
    return 1 if changes.counts.get("newly_failed") else 0


def _kinds() -> tuple[str, ...]:
    from ..history.changes import CHANGES
    return CHANGES


def _fields(changes: Changes) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    return {
        "before": changes.before, "after": changes.after, "is_rerun": changes.is_rerun,
        "counts": {kind: changes.counts.get(kind, 0) for kind in (*_kinds(), *COUNTS)},
        **{kind: [{"before": _brief(each.before), "after": _brief(each.after)}
                  for each in getattr(changes, kind)] for kind in _kinds()},
    }


def _brief(task: TaskSnapshot | None) -> dict[str, Any] | None:
    if task is None:
        return None
    return {"task_id": task.task_id, "name": task.name, "status": task.status,
            "duration": task.duration, "failure_type": task.failure_type,
            "failure_message": task.failure_message}


def _lines(history: History, changes: Changes, surface: Surface) -> Iterator[str]:
    at = now()
    yield surface.cut(f"{_named(changes.before, at)} -> {_named(changes.after, at)}")
    found = [(kind, each) for kind in _kinds() for each in getattr(changes, kind)]
    if found:
        tasks = [task for _, each in found if (task := each.after or each.before) is not None]
        digits = history.id_length([task.task_id for task in tasks])
        yield ""
        yield from table(COLUMNS, [
            (_word(kind), task.task_id[-digits:], task.name, _ended(each.before),
             _ended(each.after), message_of(task) if each.after is not None else "")
            for (kind, each), task in zip(found, tasks)], surface)
        yield ""
    differences = [f"{changes.counts[kind]:,} {_word(kind)}" for kind in _kinds()
                   if changes.counts.get(kind)]
    same = [f"{changes.counts[kind]:,} {_word(kind)}" for kind in COUNTS
            if changes.counts.get(kind)]
    told = [", ".join(differences) or "no difference", *filter(None, [", ".join(same)])]
    if any(changes.counts.get(kind, 0) > len(getattr(changes, kind)) for kind in _kinds()):
        told.append("--limit 0 shows them all")
    yield "; ".join(told)


def _named(run: Run, at: datetime) -> str:
    from ..history.answers import beginning_of
    return f"{run.run_id[-8:]} ({ago(run.started_utc or beginning_of(run.run_id), at)})"


def _word(kind: str) -> str:
    return kind.replace("_", " ")


def _ended(task: TaskSnapshot | None) -> str:
    """Return how a task ended, and how long it took."""
    if task is None:
        return "-"
    if task.duration is None:
        return word_for(task.status)
    return f"{word_for(task.status)}, {took(task.duration)}"

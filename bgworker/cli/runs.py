"""``bgworker runs``: the Schedulers that wrote to a history, what became of their tasks, and what
is left of them."""

from __future__ import annotations

from ..model.ids import SHORT
from ..words import ago, now, took
from .options import NO_OUTPUT, a_duration, add_db, add_json, exit_codes, whole
from .reading import Output, opened
from .tables import Column, counted, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Sequence
    from datetime import datetime, timedelta
    from typing import Any

    from ..history.answers import Run
    from ..history.pages import RunCounts
    from ..history.reader import History

HELP = "list the runs of a history, newest first"

DESCRIPTION = """\
List the runs of a history, the newest first. A run is what one bgworker run or
rerun did, or one Scheduler of a program: when it began, how long it lasted, how
its tasks ended, and whether its process lives.

LEFT counts what did not complete and what no later task ran again: bgworker
tasks --left lists it, bgworker rerun --failed runs it again. Of an id the last
8 digits are shown; they name the run for the other verbs, as do last, for the
first one here, last~1 for the second, and so on.
"""

EPILOG = exit_codes(NO_OUTPUT) + """
examples:
  bgworker runs
  bgworker runs --since 1d --json
  bgworker tasks --run last~1 --left
"""

_PAGE = 1000
"""Runs that are asked for together."""

COLUMNS = (Column("RUN"), Column("STARTED", ">", rank=4), Column("DURATION", rank=5),
           Column("LEFT", ">", rank=1), Column("TASKS", rank=2, least=12),
           Column("PROCESS", rank=3))


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_db(parser)
    parser.add_argument(
        "--since", metavar="DUR", type=a_duration,
        help="only runs that last, or ended less than 90s, 15m, 2h, 7d ... ago; of one whose "
        "process died the start counts")
    parser.add_argument("--limit", metavar="N", type=whole(), default=20,
                        help="at most so many (default: 20; 0 is all)")
    add_json(parser)


def act(options: Namespace) -> int:
    """Print the runs as a table, or as JSON."""
    output = Output()
    with opened(options) as history:
        found = _found(history, options.since, options.limit or None)
        if options.json:
            output.json(runs=found)
        elif runs := list(found):
            output.lines(table(COLUMNS, _rows(runs), output.surface()))
        else:
            output.lines(["no such runs" if options.since else "no runs yet"])
    return 0


def _found(history: History, since: timedelta | None, limit: int | None) -> Iterator[RunCounts]:
    before: str | None = None
    while limit is None or limit > 0:
        count = _PAGE if limit is None else min(limit, _PAGE)
        page = history.run_counts(since=since, before=before, limit=count)
        yield from page
        if len(page) < count:
            return
        before, limit = page[-1].run.run_id, None if limit is None else limit - count


def _rows(runs: Sequence[RunCounts]) -> list[tuple[str, ...]]:
    from ..history.answers import beginning_of
    at = now()
    ids = [each.run.run_id for each in runs]
    # those of earlier versions end with digits that a whole process has in common
    digits = SHORT if len({run_id[-SHORT:] for run_id in ids}) == len(ids) else 4 * SHORT
    return [(run_id[-digits:], ago(each.run.started_utc or beginning_of(run_id), at),
             took(_lasted(each.run, at)), f"{each.left:,}", counted(each.counts) or "none",
             _process(each.run)) for run_id, each in zip(ids, runs)]


def _lasted(run: Run, at: datetime) -> float | None:
    """Return the seconds that a run lasted, or has lasted; None if nobody knows its end."""
    end = run.ended_utc or (at if run.is_alive else None)
    if run.started_utc is None or end is None:
        return None
    return max(0.0, (end - run.started_utc).total_seconds())


def _process(run: Run) -> str:
    """Return whether a run lasts, and where; nothing if it ended as it should."""
    if run.ended_utc is not None:
        return ""
    if run.host is None:
        return "copied from another history"
    state = {True: "running", False: "died", None: "not known"}[run.is_alive]
    return f"{state}: {run.pid} on {run.host}"

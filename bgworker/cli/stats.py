"""``bgworker stats``: how many, how long, why not."""

from __future__ import annotations

from ..words import ago, took, word_for
from .reading import Output, a_duration, add_db, add_json, exit_codes, now, opened
from .tables import MOST_OF_A_MESSAGE, MOST_OF_A_NAME, aligned, cell, painted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator
    from typing import Any

    from ..history.answers import Stats

HELP = "sum up what was run"

DESCRIPTION = """\
Sum up a history: tasks by status, failures by type, how long the tasks of
each name ran (half of them at most p50, 95 of 100 at most p95), and what sinks
lost.
"""

EPILOG = exit_codes("the output cannot be written") + """
example:
  bgworker stats --since 7d
"""

MOST_ROWS = 20
"""Names and types of failures that are shown to people; ``--json`` has more."""


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_db(parser)
    parser.add_argument(
        "--since",
        metavar="DUR",
        type=a_duration,
        help="only tasks that have not ended, or ended less than 90s, 15m, 2h, 7d ... ago",
    )
    add_json(parser)


def act(options: Namespace) -> int:
    """Print the sums in sections, or as JSON."""
    output = Output()
    with opened(options) as history:
        stats = history.stats(since=options.since)
    if options.json:
        output.json(
            counts=stats.counts,
            failures=stats.failures,
            durations=stats.durations,
            losses=stats.losses,
        )
    else:
        output.lines(_lines(stats, output))
    return 0


def _lines(stats: Stats, output: Output) -> Iterator[str]:
    at = now()
    if not stats.counts:
        yield "no such tasks"
    for status, count in stats.counts.items():
        head = f"{count:>9,} {word_for(status)}"
        yield painted(head, status, head) if output.colour else head
    yield from _table(output.columns, "><<<", ("FAILURES", "TYPE", "LATEST", "MESSAGE"), [
        (f"{each.count:,}", cell(each.failure_type or "-", MOST_OF_A_NAME),
         ago(each.latest_utc, at), cell(each.latest_message or "", MOST_OF_A_MESSAGE))
        for each in stats.failures
    ])
    yield from _table(output.columns, ">>>><", ("TASKS", "P50", "P95", "MAX", "NAME"), [
        (f"{each.count:,}", took(each.p50), took(each.p95), took(each.max),
         cell(each.name, MOST_OF_A_NAME))
        for each in stats.durations
    ])
    yield from _table(output.columns, "><<<", ("LOST", "SINK", "REASON", "LATEST"), [
        (f"{each.count:,}", cell(each.sink, MOST_OF_A_NAME), cell(each.reason, MOST_OF_A_NAME),
         ago(each.latest_utc, at))
        for each in stats.losses
    ])


def _table(columns: int, sides: str, headings: tuple[str, ...], rows: list[tuple[str, ...]],
           ) -> Iterator[str]:
    """Yield a section, after an empty line; nothing where it has no rows."""
    if rows:
        yield ""
        yield from aligned([headings, *rows[:MOST_ROWS]], sides, columns)
    if len(rows) > MOST_ROWS:
        yield f"... and {len(rows) - MOST_ROWS} more"

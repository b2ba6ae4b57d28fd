"""``bgworker stats``: how many, how long, why not."""

from __future__ import annotations

from ..words import ago, exit_of, now, took, word_for
from .options import NO_OUTPUT, add_db, add_json, add_run, add_since, exit_codes
from .reading import Output, opened
from .tables import MOST_OF_A_MESSAGE, Column, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Sequence
    from typing import Any

    from ..history.answers import Failures, Stats
    from .text import Surface

HELP = "sum up what was run"

DESCRIPTION = """\
Sum up a history: tasks by status, failures by type (those of commands by
program and exit code), how long the tasks of each name ran (half of them at
most p50, 95 of 100 at most p95), and what sinks lost.
"""

EPILOG = exit_codes(NO_OUTPUT) + """
example:
  bgworker stats --since 7d
"""

MOST_ROWS = 20
"""Names and types of failures that are shown to people; ``--json`` has more."""

FAILURES = (Column("FAILURES", ">"), Column("TYPE", least=12), Column("LATEST", rank=2),
            Column("MESSAGE", rank=1, least=12, most=MOST_OF_A_MESSAGE, share=3))
DURATIONS = (Column("TASKS", ">"), Column("P50", ">", rank=2), Column("P95", ">", rank=3),
             Column("MAX", ">", rank=4), Column("NAME", rank=1, least=12))
LOSSES = (Column("LOST", ">"), Column("SINK", least=12), Column("REASON", rank=1, least=12),
          Column("LATEST", rank=2))


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_db(parser)
    add_run(parser, "only tasks of this run, and all losses, which belong to none")
    add_since(parser)
    add_json(parser)


def act(options: Namespace) -> int:
    """Print the sums in sections, or as JSON."""
    output = Output()
    with opened(options) as history:
        stats = history.stats(since=options.since, run=options.run)
    if options.json:
        output.json(
            counts=stats.counts,
            failures=stats.failures,
            durations=stats.durations,
            losses=stats.losses,
        )
    else:
        output.lines(_lines(stats, output.surface()))
    return 0


def _lines(stats: Stats, surface: Surface) -> Iterator[str]:
    at = now()
    if not stats.counts:
        yield "no such tasks"
    for status, count in stats.counts.items():
        yield f"{count:>9,} {surface.painted(word_for(status), status)}"
    yield from _section(surface, FAILURES, [
        (f"{each.count:,}", kind, ago(each.latest_utc, at), message)
        for each in stats.failures for kind, message in [_told(each)]])
    yield from _section(surface, DURATIONS, [
        (f"{each.count:,}", took(each.p50), took(each.p95), took(each.max), each.name)
        for each in stats.durations])
    yield from _section(surface, LOSSES, [
        (f"{each.count:,}", each.sink, each.reason, ago(each.latest_utc, at))
        for each in stats.losses])


def _told(failures: Failures) -> tuple[str, str]:
    """Return of what kind failures are, and what the latest one says. The message of a command
    tells no more than its name."""
    if failures.exit_code is not None:
        return exit_of(failures.exit_code, failures.program), failures.latest_name
    return failures.failure_type or "-", failures.latest_message or ""


def _section(surface: Surface, columns: Sequence[Column],
             rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Yield a table, after an empty line; nothing where it has no rows."""
    if rows:
        yield ""
        yield from table(columns, rows[:MOST_ROWS], surface)
    if len(rows) > MOST_ROWS:
        yield f"... and {len(rows) - MOST_ROWS} more"

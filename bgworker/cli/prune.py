"""``bgworker prune``: remove old tasks from a history."""

from __future__ import annotations

from dataclasses import asdict

from ..model.errors import ConfigurationError, HistoryError
from .options import a_duration, add_db, add_json, exit_codes, whole
from .reading import Output, opened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

    from ..history.retention import Pruned

HELP = "remove old tasks from a history"

DESCRIPTION = """\
Remove tasks from a history, with what they said, and make the file smaller.

Only tasks that have ended go, those first that ended first, and those whose
process is dead. Schedulers that write to the file are not disturbed. Losses
go by --older-than, too.
"""

EPILOG = exit_codes("the file or the output cannot be written") + """
examples:
  bgworker prune --older-than 30d --dry-run
  bgworker prune --keep 10000 --db nightly.db
"""


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_db(parser)
    parser.add_argument("--older-than", metavar="DUR", type=a_duration,
                        help="tasks that ended longer ago than this: 90s, 15m, 2h, 7d ...")
    parser.add_argument("--keep", metavar="N", type=whole(),
                        help="all tasks but N; those that have not ended count, and stay")
    parser.add_argument(
        "--dry-run", action="store_true", help="remove nothing, and tell what would go"
    )
    add_json(parser)


def act(options: Namespace) -> int:
    """Prune, and tell how much went."""
    if options.older_than is None and options.keep is None:
        options.parser.error(
            "expected --older-than DUR or --keep N, or both; see bgworker prune --help"
        )
    with opened(options):
        pass  # a file that is no history is refused in the same words by every verb
    import sqlite3

    from ..history.retention import prune
    age = None if options.older_than is None else max(options.older_than.total_seconds(), 0.001)
    try:
        pruned = prune(options.db, max_age=age, max_tasks=options.keep, is_trial=options.dry_run)
    except HistoryError as error:
        options.parser.error(f"argument --db: {error}")
    except (ConfigurationError, sqlite3.Error, OSError, MemoryError) as error:
        options.parser.fail(
            f"cannot prune {options.db!r}: {error}; see whether this user may write to the file "
            "and its directory, and whether there is room on the disk"
        )
    output = Output()
    if options.json:
        output.json(dry_run=options.dry_run, **asdict(pruned))
    else:
        output.lines([_line(pruned, options.dry_run)])
    return 0


def _line(pruned: Pruned, is_trial: bool) -> str:
    what = f"{pruned.tasks:,} tasks with {pruned.stream_rows:,} stream rows"
    if is_trial or pruned.bytes_after is None:
        return f"would remove {what}"
    before, after = _size(pruned.bytes_before), _size(pruned.bytes_after)
    return f"removed {what}; the file had {before} and has {after}"


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 10_000:
            return f"{count:,} {unit}"
        count = round(count / 1024)
    return f"{count:,} GiB"

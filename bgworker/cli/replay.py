"""``bgworker replay``: deliver what was parked."""

from __future__ import annotations

from ..model.errors import BgworkerError, ConfigurationError
from ..sinks import open_sink
from ..sinks.opening import trouble

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

HELP = "deliver what was parked"

DESCRIPTION = """\
Deliver the events of a park file to a sink, and then remove them from the
file. A file of plain wire lines (jsonl, such as bgworker export writes) can be
replayed too, and stays as it is.

Nothing is removed before it is delivered. What the sink refuses, and lines
that cannot be read or are not of a park file, stay.
"""

EPILOG = """\
exit codes:
  0 all was delivered; 1 some events were refused or could not be read, or the
  sink failed; 2 the file or the sink cannot be used

examples:
  bgworker replay park.jsonl --to jsonl:events.jsonl
  bgworker replay history.jsonl --to sqlite:copy.db
"""


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    parser.add_argument("file", metavar="FILE", help="the park file")
    parser.add_argument(
        "--to",
        metavar="SPEC",
        required=True,
        help="where to: jsonl:PATH, sqlite:PATH, webhook:URL or package.module:factory",
    )


def act(options: Namespace) -> int:
    """Replay, and tell how many events were delivered, refused and skipped."""
    from ..park.replay import replay  # a vendored copy may lack it
    try:
        sink = open_sink(options.to)
    except BgworkerError as error:
        options.parser.error(f"argument --to: {error}")
    try:
        report = replay(options.file, sink)
    except OSError as error:
        options.parser.error(f"{trouble('read', options.file, error, {})}; expected a park file")
    except ConfigurationError as error:
        options.parser.error(str(error))
    except BgworkerError as error:
        options.parser.fail(f"{error}; what was not delivered is still in {options.file}")
    for problem in report.problems:
        options.parser.tell(problem)
    print(f"{report.delivered} delivered, {report.refused} refused, {report.skipped} skipped")
    return 1 if report.refused or report.skipped else 0

"""``bgworker replay``: deliver what was parked."""

from __future__ import annotations

import sys

from ..model.errors import BgworkerError
from ..park.replay import replay
from ..sinks import open_sink
from .screen import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

DESCRIPTION = """\
Deliver the events of a park file to a sink, and then remove them from the
file. A file of plain wire lines (jsonl, such as bgworker export writes) can be
replayed too, and stays as it is.

Nothing is removed before it is delivered. A replay that was stopped goes on
where it was; what the sink refuses, and lines that cannot be read, stay.
"""

EPILOG = """\
exit codes:
  0 all was delivered; 1 some events were refused or could not be read, or the
  sink failed; 2 the file or the sink cannot be used

examples:
  bgworker replay park.jsonl --to jsonl:events.jsonl
  bgworker replay history.jsonl --to sqlite:copy.db
"""


def add_parser(verbs: Any) -> None:
    """Describe the verb to the parser of the whole command line."""
    parser = verbs.add_parser("replay", help="deliver what was parked", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("file", metavar="FILE", help="the park file")
    parser.add_argument("--to", metavar="SPEC", required=True,
                        help="where to: jsonl:PATH, sqlite:PATH, webhook:URL or package.module:factory")
    parser.set_defaults(act=act, parser=parser)


def act(options: Namespace) -> int:
    """Replay, and tell how many events were delivered, refused and skipped."""
    try:
        report = replay(options.file, open_sink(options.to))
    except OSError as error:
        options.parser.error(f"cannot read {options.file!r}: {error.strerror or error}; expected a park file")
    except BgworkerError as error:
        if isinstance(error, ValueError):  # the specification
            options.parser.error(f"argument --to: {error}")
        print(f"bgworker replay: error: {escaped(str(error))}; what was not delivered is still in {options.file}",
              file=sys.stderr)
        return 1
    for problem in report.problems:
        print(f"bgworker replay: {escaped(problem)}", file=sys.stderr)
    print(f"{report.delivered} delivered, {report.refused} refused, {report.skipped} skipped")
    return 1 if report.refused or report.skipped else 0

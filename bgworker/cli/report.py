"""``bgworker report``: a history as one HTML file."""

from __future__ import annotations

import os

from ..model.errors import ConfigurationError, HistoryError
from .export import save
from .options import NO_OUTPUT, a_path, add_db, add_run, add_since, exit_codes
from .reading import Output, bound_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

HELP = "write what a history tells as one HTML file"

DESCRIPTION = """\
Write one HTML file that needs nothing else, and can be sent: how many tasks
there are of each status, failures that are alike, what ran when and how much at
once, the slowest names, and what sinks lost. Arguments, results, sources and
what tasks said are not in it.

Where the history cannot be read, the file says why.
"""

EPILOG = exit_codes(NO_OUTPUT) + """
examples:
  bgworker report
  bgworker report --since 1d -o nightly.html
  bgworker report -o - | gzip > nightly.html.gz
"""

DEFAULT_FILE = "bgworker-report.html"


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_db(parser)
    add_run(parser)
    add_since(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=a_path,
        default=DEFAULT_FILE,
        help=f"the file to write, which is replaced if it exists (default: {DEFAULT_FILE}); "
        "with -, stdout",
    )


def act(options: Namespace) -> int:
    """Write the report, or the page that says why there is none."""
    from ..history.reader import History
    from ..web.report import failed, report

    bound_memory()
    try:
        with History(options.db) as history:
            text = report(history, since=options.since, run=options.run)
    except ConfigurationError as error:
        options.parser.error(f"argument --{error}")  # "run: expected ..."
    except HistoryError as error:
        _write(options, failed(options.db, error))
        options.parser.error(f"argument --db: {error}")
    _write(options, text)
    return 0


def _write(options: Namespace, text: str) -> None:
    if options.output == "-":
        Output().pieces([text])
        return
    size = save(options, "-o", options.output, lambda file: file.write(text.encode()))
    options.parser.tell(f"{size / 1000:,.0f} kB written to {os.path.abspath(options.output)}")

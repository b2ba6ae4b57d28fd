"""``bgworker export``: a whole history as lines of JSON."""

from __future__ import annotations

import os
import sys

from ..wire import encode
from .reading import Output, a_path, add_db, exit_codes, harmless_json, opened, quietly
from .screen import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator
    from typing import Any

    from ..history import History

DESCRIPTION = """\
Write a history as lines of JSON, one event a line, which a replay turns back
into an equal history: tasks, what they said, scripts and losses.

What does not come back: on which machine and in which process a task ran, and
the earlier life-cycle events of a task, which a history does not keep. An
interrupted task stays so.
"""

EPILOG = exit_codes("the output cannot be written") + """
examples:
  bgworker export --jsonl history.jsonl
  bgworker replay history.jsonl --to sqlite:copy.db
  bgworker export --jsonl | gzip > history.jsonl.gz
"""

_LINES = 1000


def add_parser(verbs: Any) -> None:
    """Describe the verb to the parser of the whole command line."""
    parser = verbs.add_parser("export", help="write a history as lines of JSON", description=DESCRIPTION, epilog=EPILOG)
    add_db(parser)
    parser.add_argument("--jsonl", metavar="PATH", nargs="?", const="-", type=a_path, required=True,
                        help="the file to write, which is replaced if it exists; without PATH, or with -, stdout")
    parser.set_defaults(act=quietly(act), parser=parser)


def act(options: Namespace) -> int:
    """Write all events, to stdout or a file that appears when it is complete."""
    with opened(options) as history:
        if options.jsonl != "-":
            return _to_file(history, options)
        output = Output()
        for lines in _in_groups(history):
            output.lines(map(harmless_json, lines) if output.is_terminal else lines)
    return 0


def _to_file(history: History, options: Namespace) -> int:
    temporary, count = options.jsonl + ".tmp", 0
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for lines in _in_groups(history):
                file.writelines(f"{line}\n" for line in lines)
                count += len(lines)
        os.replace(temporary, options.jsonl)
    except OSError as error:
        options.parser.error(f"argument --jsonl: cannot write {options.jsonl!r}: {error.strerror or error}; "
                             "name another file")
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    print(f"{count} events written to {escaped(options.jsonl)}", file=sys.stderr)
    return 0


def _in_groups(history: History) -> Iterator[list[str]]:
    lines: list[str] = []
    for event in history.events():
        lines.append(encode(event))
        if len(lines) == _LINES:
            yield lines
            lines = []
    yield lines

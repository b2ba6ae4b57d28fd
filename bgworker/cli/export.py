"""``bgworker export``: a whole history as lines of JSON."""

from __future__ import annotations

import os

from ..model.wire import encode
from ..sinks.opening import (
    CURABLE,
    absolute,
    check_replaceable,
    followed,
    is_stream,
    open_stream,
    replacing,
    shown,
    trouble,
)
from .options import NO_OUTPUT, a_path, add_db, exit_codes
from .reading import Output, harmless_json, opened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any, BinaryIO

    from ..history.reader import History

HELP = "write a history as lines of JSON"

DESCRIPTION = """\
Write a history as lines of JSON, one event a line, which a replay turns back
into an equal history: tasks, what they said, scripts and losses.

What does not come back: on which machine and in which process a task ran, and
the earlier life-cycle events of a task, which a history does not keep. An
interrupted task stays so.
"""

EPILOG = exit_codes(NO_OUTPUT) + """
examples:
  bgworker export --jsonl history.jsonl
  bgworker replay history.jsonl --to sqlite:copy.db
  bgworker export --jsonl | gzip > history.jsonl.gz
"""

def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_db(parser)
    parser.add_argument(
        "--jsonl",
        metavar="PATH",
        nargs="?",
        const="-",
        type=a_path,
        required=True,
        help="the file to write, which is replaced if it exists, unless it is a device or FIFO; "
        "without PATH, or with -, stdout",
    )


def act(options: Namespace) -> int:
    """Write all events, to stdout or a file that appears when it is complete."""
    with opened(options) as history:
        if options.jsonl != "-":
            return _to_file(history, options)
        output = Output()
        lines = map(encode, history.events())
        output.lines(map(harmless_json, lines) if output.is_terminal else lines)
    return 0


def _to_file(history: History, options: Namespace) -> int:
    try:
        # a symbolic link stays; what it leads to is replaced
        path = followed(absolute(options.jsonl))
        if os.path.exists(path) and os.path.samefile(path, history.path):
            options.parser.error(
                f"argument --jsonl: {shown(options.jsonl)} is the history itself; name another file"
            )
        if is_stream(path):
            with open(open_stream(path), "wb") as file:  # a device or FIFO cannot be replaced
                count = _write(history, file)
        else:
            count = _replace(history, path)
    except OSError as error:
        reason = trouble("write", options.jsonl, error, CURABLE)
        options.parser.error(f"argument --jsonl: {reason}; name another file")
    options.parser.tell(f"{count:,} events written to {options.jsonl}")
    return 0


def _replace(history: History, path: str) -> int:
    """Write to a file beside the path, which takes its place, owner and permissions when it is
    complete."""
    like = None
    if os.path.exists(path):
        like = os.stat(path)
        check_replaceable(path, like)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f"{name[:50]}.{os.urandom(6).hex()}.tmp")
    with replacing(path, temporary, like=like) as file:
        return _write(history, file)


def _write(history: History, file: BinaryIO) -> int:
    count = 0
    for count, event in enumerate(history.events(), 1):
        file.write(f"{encode(event)}\n".encode())
    return count

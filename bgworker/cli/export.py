"""``bgworker export``: a whole history as lines of JSON."""

from __future__ import annotations

import os

from ..model.errors import SinkError
from ..model.wire import encode
from ..sinks import open_sink
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
from .options import NO_OUTPUT, a_path, add_db, add_run, exit_codes
from .reading import Output, harmless_json, opened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator
    from typing import Any, BinaryIO

    from ..model.events import Event

HELP = "write a history as lines of JSON"

DESCRIPTION = """\
Write a history as lines of JSON, one event a line, which a replay turns back
into an equal history: tasks, what they said, scripts and losses.

What does not come back: on which machine and in which process a task ran, and
the earlier life-cycle events of a task, which a history does not keep. An
interrupted task stays so.

With --from it is the history of a PostgresSink or a MongoSink instead of a
file. So a history moves from any kind of store to any other.
"""

EPILOG = exit_codes(NO_OUTPUT) + """
examples:
  bgworker export --jsonl history.jsonl
  bgworker replay history.jsonl --to sqlite:copy.db
  bgworker export --jsonl | gzip > history.jsonl.gz
  bgworker export --from stores:shared --jsonl shared.jsonl
"""

def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_db(parser)
    add_run(parser, "only tasks of this run, and no losses, which belong to none")
    parser.add_argument(
        "--from",
        metavar="SPEC",
        dest="source",
        help="the sink whose history to write, instead of that of --db: package.module:factory "
        "of one on a server",
    )
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
    if options.source is not None:
        try:
            return _write_all(options, _events_of(options))
        except SinkError as error:
            options.parser.error(f"argument --from: {error}")
    with opened(options) as history:
        return _write_all(options, history.events(run=options.run))


def _events_of(options: Namespace) -> Iterator[Event]:
    """Return the events of the history that a sink keeps."""
    if options.run is not None:
        options.parser.error("argument --run: goes with --db only; leave it out, or copy the "
                             "history to a file first")
    scheme, _, path = options.source.partition(":")
    if scheme == "sqlite":
        options.parser.error(f"argument --from: {path!r} is a file; name it with --db")
    sink = open_sink(options.source)
    if not callable(getattr(sink, "events", None)):
        options.parser.error(f"argument --from: {options.source!r} is no sink that can be read; "
                             "expected a PostgresSink or a MongoSink")
    events: Iterator[Event] = sink.events()  # type: ignore[attr-defined]
    return events


def _write_all(options: Namespace, events: Iterator[Event]) -> int:
    if options.jsonl != "-":
        count = save(options, "--jsonl", options.jsonl, lambda file: _write(events, file))
        options.parser.tell(f"{count:,} events written to {options.jsonl}")
        return 0
    output = Output()
    lines = map(encode, events)
    output.lines(map(harmless_json, lines) if output.is_terminal else lines)
    return 0


def save(options: Namespace, option: str, name: str, write: Callable[[BinaryIO], int]) -> int:
    """Write a file, which appears when it is complete; return what ``write`` returns. What goes
    wrong ends the program with one line and a code.

    Args:
        option: that named the file.
        name: of the file, which may be a device or FIFO, too.
    """
    try:
        # a symbolic link stays; what it leads to is replaced
        path = followed(absolute(name))
        if os.path.exists(path) and os.path.exists(options.db) and os.path.samefile(path,
                                                                                    options.db):
            options.parser.error(
                f"argument {option}: {shown(name)} is the history itself; name another file"
            )
        if is_stream(path):
            with open(open_stream(path), "wb") as file:  # a device or FIFO cannot be replaced
                return write(file)
        return _replace(path, write)
    except OSError as error:
        reason = trouble("write", name, error, CURABLE)
        options.parser.error(f"argument {option}: {reason}; name another file")
        raise


def _replace(path: str, write: Callable[[BinaryIO], int]) -> int:
    """Write to a file beside the path, which takes its place, owner and permissions when it is
    complete."""
    like = None
    if os.path.exists(path):
        like = os.stat(path)
        check_replaceable(path, like)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f"{name[:50]}.{os.urandom(6).hex()}.tmp")
    with replacing(path, temporary, like=like) as file:
        return write(file)


def _write(events: Iterator[Event], file: BinaryIO) -> int:
    count = 0
    for count, event in enumerate(events, 1):
        file.write(f"{encode(event)}\n".encode())
    return count

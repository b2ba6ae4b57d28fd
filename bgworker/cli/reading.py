"""What the verbs that read a history share: options, exit codes for its errors, and output.

Text is for people, and harmless: what a task said is escaped wherever it goes, since a pipe may end
at a terminal, too. ``--json`` is for programs: exact, ASCII, and of a shape that never changes
inside a version.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import fields
from datetime import datetime, timezone
from textwrap import fill

from ..model.errors import BgworkerError, ConfigurationError, HistoryError, UnknownTask, WireError
from ..words import duration, escaped
from .screen import Channel, can_redraw
from .tables import ANY_WIDTH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable
    from typing import Any

    from ..history.reader import History

JSON_VERSION = 1
"""``"v"`` of what ``--json`` prints. Fields may be added; none changes its meaning or goes while
this stays."""

DEFAULT_DB = "bgworker.db"

NO_SUCH_TASK = "there is no such task, or several may be meant"

_BLOCK = 2**18
"""Characters that are written at once, unless one piece has more."""

_BEYOND_ASCII = re.compile("[\x7f-\U0010ffff]")


def exit_codes(one: str) -> str:
    """Return the section of a help that tells of exit codes, of which only the 1 differs from verb
    to verb."""
    codes = (
        f"0 done; 1 {one}; 2 the command line is wrong, or there is no history that can be read; "
        "141 nobody reads our output any more (as in ... | head)"
    )
    return f"exit codes:\n{fill(codes, 78, initial_indent='  ', subsequent_indent='  ')}\n"


# ---------------------------------------------------------------- options

def add_db(parser: Any, what: str = "the history") -> None:
    """Add ``--db``."""
    default = os.environ.get("BGWORKER_DB") or DEFAULT_DB
    here = escaped(default).replace("%", "%%")
    parser.add_argument("--db", metavar="PATH", type=a_path, default=default,
                        help=f"{what} (default: $BGWORKER_DB or {DEFAULT_DB}, here {here})")


def add_json(parser: Any, what: str = "print JSON, for programs") -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help=what)


def add_task(parser: Any) -> None:
    """Add the argument that names a task."""
    parser.add_argument(
        "task",
        metavar="TASK",
        help="a task's id, the beginning of one, a name (the newest task that has it), or last",
    )


def a_duration(text: str) -> Any:
    """Read an option's value with `duration`."""
    try:
        return duration(text)
    except ConfigurationError as error:
        raise wrong(str(error)) from error


def a_count(text: str) -> int:
    """Read an option's value as a whole number of at least 0."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise wrong(f"expected a whole number >= 0, got {text[:80]!r}")
    return int(text)


def a_path(text: str) -> str:
    """Read an option's value as the path of a file."""
    if not text or "\0" in text:
        raise wrong(f"expected the path of a file, got {text!r}")
    return text


def wrong(message: str) -> Exception:
    """Return the error for an option's value that cannot be used."""
    from argparse import ArgumentTypeError
    return ArgumentTypeError(message)


# ---------------------------------------------------------------- the history

@contextmanager
def opened(options: Namespace) -> Iterator[History]:
    """Open the history that the options name; what goes wrong in it ends the program with one line
    and a code."""
    from ..history.reader import History
    try:
        history = History(options.db)
    except BgworkerError as error:
        options.parser.error(f"argument --db: {error}")
    _bound_memory()
    with history:
        try:
            yield history
            if history.left_out:
                print(f"{options.parser.prog}: rows that are damaged were left out: "
                      f"{history.left_out:,}", file=sys.stderr)
        except UnknownTask as error:
            lines = [str(error), *error.candidates]
            options.parser.exit(
                1, "\n".join(f"{options.parser.prog}: {escaped(line)}" for line in lines) + "\n"
            )
        except (HistoryError, WireError) as error:  # the file went away, or is damaged
            options.parser.error(f"argument --db: {error}")


MOST_MEMORY = 100 * 2**20
"""Bytes that SQLite may take: one value of a file may want to have gigabytes."""


def _bound_memory() -> None:
    """Have SQLite refuse a value that takes more; nothing else uses SQLite in this process."""
    import sqlite3
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"PRAGMA hard_heap_limit = {MOST_MEMORY}")


def now() -> datetime:
    """Return the time of day."""
    return datetime.now(timezone.utc)


# ---------------------------------------------------------------- the output

class Output:
    """Stdout, as lines for people or JSON for programs."""

    def __init__(self) -> None:
        self.channel = Channel(sys.stdout)
        self.is_terminal = self.channel.is_terminal
        self.can_redraw = can_redraw(self.channel)
        self.colour = self.can_redraw and not os.environ.get("NO_COLOR")

    @property
    def columns(self) -> int:
        """How wide a line may be: as the terminal, or else as $COLUMNS says, or else of any
        width."""
        if self.is_terminal:
            return max(20, self.channel.size()[0])
        given = os.environ.get("COLUMNS", "")
        return max(20, int(given)) if given.isdecimal() and len(given) < 7 else ANY_WIDTH

    def lines(self, lines: Iterable[str]) -> None:
        """Write lines that are harmless already, as they come. Raises OSError."""
        self.pieces(f"{line}\n" for line in lines)

    def pieces(self, pieces: Iterable[str]) -> None:
        """Write pieces of text that are harmless already, some at a time. Raises OSError."""
        waiting: list[str] = []
        size = 0
        for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size >= _BLOCK:
                self.channel.write("".join(waiting))
                waiting, size = [], 0
        if waiting:
            self.channel.write("".join(waiting))

    def json(self, **fields: Any) -> None:
        """Write one JSON object, with its version in front. Raises OSError.

        Args:
            fields: values; of an iterator each item is encoded when it comes, and its text may be
                ready (`harmless_json`).
        """
        self.pieces(_json_pieces({"v": JSON_VERSION, **fields}))


def _json_pieces(fields: dict[str, Any]) -> Iterator[str]:
    before = "{"
    for name, value in fields.items():
        yield f'{before}"{name}":'
        before = ","
        if not isinstance(value, Iterator):
            yield json_line(value)
            continue
        yield "["
        for number, item in enumerate(value):
            yield ("," if number else "") + (item if isinstance(item, str) else json_line(item))
        yield "]"
    yield "}\n"


def json_line(value: Any) -> str:
    """Return a value, which may hold dataclasses, times and enums, as JSON on one line of plain
    ASCII."""
    return harmless_json(
        json.dumps(value, separators=(",", ":"), allow_nan=False, default=_plain)
    )


def harmless_json(text: str) -> str:
    """Return JSON text that says the same in plain ASCII without control characters."""
    return _BEYOND_ASCII.sub(
        lambda found: json.dumps(found[0])[1:-1] if found[0] != "\x7f" else "\\u007f", text
    )


def _plain(value: Any) -> Any:
    """Return what JSON has no form for: dataclasses as objects of their fields, times as the wire
    has them."""
    if isinstance(value, datetime):
        from ..history.answers import time_text
        return time_text(value)
    if isinstance(value, Mapping):
        return dict(value)
    return {field.name: getattr(value, field.name) for field in fields(value)}

"""What the verbs that read a history share: how it is opened, exit codes for its errors, output.

Text is for people, and harmless: what a task said is escaped wherever it goes, since a pipe may end
at a terminal, too. ``--json`` is for programs: exact, ASCII, and of a shape that never changes
inside a version.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import fields
from datetime import datetime

from ..model.errors import (BgworkerError, ConfigurationError, HistoryError, UnknownTask,
                            WireError)
from ..words import now
from .screen import Channel
from .tables import task_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Sequence
    from typing import Any

    from ..history.reader import History
    from ..model.events import TaskSnapshot
    from .text import Surface

JSON_VERSION = 1
"""``"v"`` of what ``--json`` prints. Fields may be added; none changes its meaning or goes while
this stays."""

_BLOCK = 2**18
"""Characters that are written at once, unless one piece has more."""

_BEYOND_ASCII = re.compile("[\x7f-\U0010ffff]")


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
    bound_memory()
    with history:
        try:
            yield history
            if history.left_out:
                options.parser.tell(f"rows that are damaged were left out: {history.left_out:,}")
        except UnknownTask as error:
            for line in (str(error), *error.candidates):
                options.parser.tell(line)
            options.parser.exit(1)
        except ConfigurationError as error:  # "run: expected ...", where there is no such run
            options.parser.error(f"argument --{error}")
        except (HistoryError, WireError) as error:  # the file went away, or is damaged
            options.parser.error(f"argument --db: {error}")


def listed(history: History, tasks: Sequence[TaskSnapshot], surface: Surface, *,
           has_whole_ids: bool = False) -> list[str]:
    """Return a table of tasks, of whose ids as many of the last digits are shown as tell them
    apart."""
    ids = [task.task_id for task in tasks]
    if not has_whole_ids:
        digits = history.id_length(ids)
        ids = [task_id[-digits:] for task_id in ids]
    return task_table(tasks, ids, now(), surface)


MOST_MEMORY = 100 * 2**20
"""Bytes that SQLite may take: one value of a file may want to have gigabytes."""


def bound_memory() -> None:
    """Have SQLite refuse a value that takes more; nothing else uses SQLite in this process."""
    import sqlite3
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"PRAGMA hard_heap_limit = {MOST_MEMORY}")


# ---------------------------------------------------------------- the output

class Output(Channel):
    """Stdout, as lines for people or JSON for programs."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

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
                self.write("".join(waiting))
                waiting, size = [], 0
        if waiting:
            self.write("".join(waiting))

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

"""A search through what tasks said and why they failed, for a pattern.

Every function gets a connection inside a read transaction, and runs on the thread that asks. Each
gives at most a few megabytes, and says where the next one goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain

from ..model.text import sanitise
from . import questions
from .answers import STREAM_COLUMNS, text_of
from .questions import EXIT_CODE, UNUSUAL

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    import sqlite3
    from collections.abc import Iterable, Iterator, Sequence

    from ..model.events import StreamEvent, TaskSnapshot
    from .questions import Row

TASKS = 500
"""Tasks that are searched together, ..."""
_MOST_ROWS, _MOST_TEXT = 5_000, 2**22
"""... as far as they have no more rows with the pattern, and characters in these."""

_MOST_FAILURE = 100_000  # characters of a traceback that are searched


@dataclass(frozen=True)
class Found:
    """Some of what a task said, and why it failed, as far as the pattern may be in it."""

    task: TaskSnapshot
    """Briefly: texts are cut to their first 1,000 characters."""
    events: tuple[StreamEvent, ...]
    """In order. One with colours comes even if the pattern is not in it: between their codes it may
    be."""
    failure: str
    """Type, message and traceback; empty if the pattern is not there, or for a command, which says
    on stderr why it failed."""


class Search:
    """What is searched for.

    Args:
        pattern: it is matched against whole texts, which may have several lines.
        literal: the text that is the pattern, if it is no more than that: SQLite finds it in a
            third of the time.
        which: the condition on a stream; None searches no stream.
        has_failures: whether failures are searched.
    """

    def __init__(self, pattern: re.Pattern[str], literal: str | None, which: str | None, *,
                 has_failures: bool) -> None:
        self._find = pattern.search
        self._literal = None if literal is None else sanitise(literal)
        self._which = which
        self._has_failures = has_failures
        self._is_interrupted = False

    def part(self, connection: sqlite3.Connection, keys: list[int],
             after: float) -> tuple[dict[int, tuple[list[Row], str]], list[int], float]:
        """Return what of these tasks has the pattern, and where to go on: the tasks that are left,
        and the number of what the first of them said last.

        Args:
            keys: they are searched in this order.
            after: of the first one, only what it said after this number.
        """
        found: dict[int, tuple[list[Row], str]] = {key: ([], "") for key in keys}
        room, text, at, stop = _MOST_ROWS, _MOST_TEXT, 0, None
        for key, *row in self._rows(connection, keys, after):
            found[key][0].append(tuple(row))
            room -= 1
            text -= len(row[3]) if isinstance(row[3], (str, bytes)) else 0
            if room <= 0 or text <= 0:
                stop, at = row[0], keys.index(key)
                break
        done = keys if stop is None else keys[:at]
        if self._has_failures:
            for key, failure in self._failures(connection, done):
                found[key] = found[key][0], failure
        given = {key: each for key, each in found.items() if each[0] or each[1]}
        return (given, [], 0.0) if stop is None else (given, keys[at:], stop)

    def _rows(self, connection: sqlite3.Connection, keys: Sequence[int],
              after: float) -> Iterator[Row]:
        """Yield the key of a task before each row of a stream of it."""
        if self._which is None:
            return
        connection.create_function("may_match", 1, self._may_match)
        test = "may_match(payload)"
        values: tuple[object, ...] = ()
        if self._literal is not None:
            test, values = "(instr(payload, ?) OR instr(payload, char(27)))", (self._literal,)
        last: tuple[int, float] = keys[0], after
        try:
            for row in connection.execute(
                    f"SELECT value, {STREAM_COLUMNS} FROM json_each(?) CROSS JOIN stream_rows "
                    "ON task = value AND seq > CASE value WHEN ? THEN ? ELSE 0 END "
                    f"AND seq < ''{self._which} WHERE {test}",
                    (json.dumps([*keys]), keys[0], after, *values)):
                yield row
                last = row[0], row[1]
            return
        except UNUSUAL as error:
            if self._is_interrupted:
                raise KeyboardInterrupt from None  # SQLite has only been told of an error
            if str(error) == "interrupted":
                raise
        # some value is too long for SQLite, or is no text: one by one, in Python
        key, after = last
        for key in keys[keys.index(key):]:
            for row in chain.from_iterable(questions.stream_groups(connection, key, after,
                                                                   self._which)):
                if self._may_match(row[3]):
                    yield (key, *row)
            after = 0.0

    def _may_match(self, value: object) -> bool:
        text = text_of(value) or ""
        try:
            return self._find(text) is not None or "\x1b" in text
        except KeyboardInterrupt:
            self._is_interrupted = True
            raise

    def _failures(self, connection: sqlite3.Connection,
                  keys: Sequence[int]) -> Iterable[tuple[int, str]]:
        """Yield the tasks whose failure has the pattern, with it."""
        columns = [f"substr({column}, 1, {_MOST_FAILURE})" for column in (
            "t.failure_type", "t.failure_message", "CASE instr(t.script_id, ':') WHEN 0 THEN NULL "
            "ELSE t.invocation_info END")]
        rows = connection.execute(
            f"SELECT t.key, {', '.join(columns)} FROM json_each(?) CROSS JOIN tasks t "
            "ON t.key = value WHERE (t.failure_message IS NOT NULL OR t.failure_type IS NOT NULL) "
            f"AND {EXIT_CODE} IS NULL", (json.dumps([*keys]),))
        for key, *texts in rows:
            kind, message, info = [text_of(each) or "" for each in texts]
            failure = ": ".join(filter(None, (kind, message)))
            if info:
                failure = info if message and message in info else f"{failure}\n{info}"
            if self._find(failure):
                yield key, failure

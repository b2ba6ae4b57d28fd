"""What ``bgworker run`` is to work on: the lines of a file or of stdin, and combinations of
arguments.

Bytes come out as they went in. A file is read at once; a pipe is read as its lines are asked for,
so that the first command runs before the last line is written, and memory is bounded.
"""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Iterator
from io import FileIO
from itertools import product

from ..model.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Tuple, Union

LOOK = 0.2
"""Seconds without news from a pipe after which it is asked whether more is wanted at all."""

_CHUNK = 65536


class Lines:
    """The lines of a file, or of stdin.

    Args:
        option: what named the file, for errors.
        path: "-" is stdin.
        end: what ends a line.
        what: what a line is, for errors.

    Raises:
        ConfigurationError: it cannot be read.
    """

    def __init__(self, option: str, path: str, end: bytes, what: str) -> None:
        self.is_stdin = path == "-"
        self.name = "stdin" if self.is_stdin else path
        self._end = end
        self.error = ""
        """Why a pipe could be read no further."""
        self.is_wanted: Callable[[], bool] = lambda: True
        """Asked before each look at a pipe, every `LOOK` seconds at least, whether somebody still
        wants more."""
        self._data = b""
        try:
            # unbuffered: nothing of it must lie where `select` does not see it
            file = _stdin() if self.is_stdin else open(path, "rb", buffering=0)
            self.is_pipe = not _is_whole(file)
            """Whether the lines are still to come, and nobody knows how many."""
            self._file = file
            if not self.is_pipe:
                with file:
                    self._data = file.readall()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise ConfigurationError(
                f"argument {option}: cannot read {self.name!r}: "
                f"{getattr(error, 'strerror', None) or error}; expected a file with one {what} a "
                "line"
            ) from error

    def each(self) -> Iterator[bytes]:
        """Return the lines, without their ends; those of a pipe only once."""
        return self._each_of_pipe() if self.is_pipe else self._each_of_data()

    def _each_of_data(self) -> Iterator[bytes]:
        start, end = 0, self._data.find(self._end)
        while end >= 0:
            yield self._data[start:end]
            start, end = end + 1, self._data.find(self._end, end + 1)
        if start < len(self._data):
            yield self._data[start:]

    def _each_of_pipe(self) -> Iterator[bytes]:
        parts: list[bytes] = []  # of a line that has not ended
        with self._file:
            while chunk := self._next_chunk():
                first, *lines = chunk.split(self._end)
                parts.append(first)
                for line in lines:
                    yield b"".join(parts)
                    parts = [line]
                parts = [part for part in parts if part]
            if parts and chunk is not None:
                yield b"".join(parts)

    def _next_chunk(self) -> bytes | None:
        """Wait for what comes next: nothing is the end, None that it is not wanted, or is not to be
        had."""
        while self.is_wanted():
            try:
                if select.select([self._file], [], [], LOOK)[0]:
                    chunk: bytes | None = self._file.read(_CHUNK)
                    if chunk is not None:  # else another process that shares the pipe took it
                        return chunk
            except OSError as error:
                self.error = f"cannot read {self.name!r} any further: {error.strerror or error}"
                break
        return None


def _stdin() -> FileIO:
    if sys.stdin is None:
        raise OSError("it is closed")
    return FileIO(sys.stdin.fileno(), "rb", closefd=False)


def _is_whole(file: FileIO) -> bool:
    """Tell whether all of a file can be read now. On Windows nothing tells whether a pipe has
    something to read: there it is waited for."""
    mode = os.fstat(file.fileno()).st_mode
    return os.name == "nt" or not (
        stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)
    )


if TYPE_CHECKING:
    Source = Union[Lines, Sequence[str]]
    """Where the arguments of each command come from: words, or a file with one a line."""


def combinations(sources: Sequence[Source]) -> Iterator[Tuple[str, ...]]:
    """Yield each combination of one argument of each source, the last source turning fastest.

    All but the first source are held in memory.
    """
    first, *others = map(_arguments, sources)
    held = list(map(list, others))
    for argument in first:
        for rest in product(*held):
            yield argument, *rest


def _arguments(source: Source) -> Iterator[str]:
    return map(os.fsdecode, source.each()) if isinstance(source, Lines) else iter(source)

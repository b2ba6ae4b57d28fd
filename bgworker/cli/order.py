"""When the lines of each command are shown, where that is not at once: ``--group`` and
``--keep-order``.

What is held back takes `MOST_IN_MEMORY` bytes of memory, whatever commands say. The rest is in a
temporary file that has no name, so that nothing of it stays behind, however this process ends.
Nothing here knows a screen; one thread uses it.
"""

from __future__ import annotations

import tempfile
from array import array

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

    from .screen import Line

MOST_IN_MEMORY = 4 * 2**20
"""Bytes that lines take before they go to the file, beside a few hundred for each command that
waits. To show them again takes three times as many for a moment."""

LINE_COST = 160
"""Bytes that a line, or several as one text, takes beside its text."""

SLOT = 16 * 1024
"""Bytes of the file that are used, and used again, as one."""


class Order:
    """Holds lines back until their command may be shown.

    Args:
        keeps_order: whether commands are shown in the order of their numbers, 1, 2, 3 ...: first
            those of a command are shown that are held back, then what it says, at once, until it
            has ended. If not, a command is shown when it has ended.
        is_grouped: whether a command is shown when it has ended, in that order, too.
    """

    def __init__(self, *, keeps_order: bool, is_grouped: bool) -> None:
        self._keeps_order = keeps_order
        self._is_grouped = is_grouped
        self._turn = 1  # the command to be shown next
        self._ended: set[int] = set()  # those whose turn has not come
        self._held = Held()

    def take(self, number: int, line: Line) -> Iterator[Line]:
        """Take a line of a command; yield it if it may be shown."""
        if self._keeps_order and number == self._turn and not self._is_grouped:
            yield line
        else:
            self._held.add(number, line)

    def end(self, number: int) -> Iterator[Line]:
        """Note that a command has ended; yield the lines that may be shown now."""
        if not self._keeps_order:
            yield from self._held.pop(number)
            return
        self._ended.add(number)
        while self._turn in self._ended:
            yield from self._held.pop(self._turn)
            self._ended.remove(self._turn)
            self._turn += 1
        if not self._is_grouped:
            yield from self._held.pop(self._turn)

    def rest(self) -> Iterator[Line]:
        """Yield what is held back still, of commands whose end nobody told."""
        for number in sorted(self._held.numbers()):
            yield from self._held.pop(number)

    def close(self) -> None:
        """Close the file, and forget what is held back."""
        self._held.close()


class Held:
    """The lines of many commands, each in its order."""

    def __init__(self) -> None:
        self._lines: dict[int, list[Line]] = {}  # the latest, by number
        self._size = 0  # bytes of these
        self._written: dict[int, list[tuple[array[int], int]]] = {}  # the earlier ones
        self._file = SlottedFile()

    def numbers(self) -> set[int]:
        """Return the numbers of the commands that have lines here."""
        return {*self._lines, *self._written}

    def add(self, number: int, line: Line) -> None:
        """Add a line of a command.

        Raises:
            OSError: the file has no room for it.
        """
        self._lines.setdefault(number, []).append(line)
        self._size += _cost(line)
        if self._size > MOST_IN_MEMORY:
            for each, lines in self._lines.items():
                # no text of a command, nor one of ours, has a NUL
                data = "".join([f"{kind}{text}\0" for kind, text in lines]).encode()
                self._written.setdefault(each, []).append((self._file.write(data), len(data)))
            self._lines.clear()
            self._size = 0

    def pop(self, number: int) -> Iterator[Line]:
        """Yield the lines of a command, and forget them."""
        for slots, size in self._written.pop(number, ()):
            for text in self._file.read(slots, size).decode().split("\0")[:-1]:
                yield int(text[0]), text[1:]
        lines = self._lines.pop(number, [])
        self._size -= sum(map(_cost, lines))
        yield from lines

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cost(line: Line) -> int:
    text = line[1]
    return LINE_COST + (len(text) if text.isascii() else 4 * len(text))


class SlottedFile:
    """A temporary file of slots; those that were read are used again. It is made when something is
    written."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._free: list[int] = []
        self._count = 0

    def write(self, data: bytes) -> array[int]:
        """Write data and return the slots that it is in.

        Raises:
            OSError: there is no room; the message says what to do.
        """
        slots = array("q")
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="bgworker-", buffering=0)
            for start in range(0, len(data), SLOT):
                if not self._free:
                    self._free.append(self._count)
                    self._count += 1
                self._file.seek(self._free[-1] * SLOT)
                left = memoryview(data)[start:start + SLOT]
                while left:
                    left = left[self._file.write(left):]
                slots.append(self._free.pop())
        except OSError as error:
            raise OSError(
                error.errno,
                f"what is held back has no room in the directory for temporary files "
                f"({error.strerror}); set TMPDIR to a larger one, or leave out --group and "
                "--keep-order"
            ) from error
        return slots

    def read(self, slots: array[int], size: int) -> bytes:
        """Return data that was written, and give its slots free. Raises OSError."""
        assert self._file is not None
        data = bytearray()
        for slot in slots:  # all are full but the last
            self._file.seek(slot * SLOT)
            data += self._file.read(SLOT)
        self._free += slots
        return bytes(data[:size])

    def close(self) -> None:
        """Close the file, if there is one: nothing is left of it."""
        if self._file is not None:
            self._file.close()

"""Replay: the events of a park file are delivered after all, and only then removed from it. Runs on
the caller's thread.

At least once. A replay that fails has removed what the sink took until then; one that is killed
has removed nothing, and the next delivers it again. Stores that know events by ``(task_id, seq)``
have each of them once.

Only lines that a park wrote, and whose event the sink took, are ever removed. A file without such
lines, as one of plain wire lines or somebody's text, is read and not changed. What is left keeps
the mode and the owner of the file.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from dataclasses import dataclass

from ..delivery.loop import SinkLoop
from ..model.errors import PermanentSinkError, SinkError
from ..model.wire import decode, decode_object
from ..sinks.lockfile import LockFile
from ..sinks.opening import (absolute, check_replaceable, followed, open_file, replacing,
                             sync_directory)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO, Tuple

    from ..model.events import Event
    from ..sinks.base import Sink

    # from, to (bytes), the event if it can be read, and whether a park wrote the line
    Line = Tuple[int, int, Event | None, bool]

MOST_BYTES = 1 << 23
"""Of a line that is decoded. A longer one counts as one that cannot be read."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class ReplayReport:
    """What became of the events of a file."""

    delivered: int
    """Events that the sink took; they are gone from a park file."""
    refused: int
    """Events that the sink refuses for good; they stay in the file."""
    skipped: int
    """Lines that hold no event this version can read; they stay in the file. A torn last line is
    not counted."""
    problems: tuple[str, ...] = ()
    """What was wrong with the first few of the refused and the skipped."""


def replay(path: str | os.PathLike[str], sink: Sink, *, batch_size: int = 500) -> ReplayReport:
    """Deliver the events of a file to a sink, then remove from it the lines of a park with them.

    Runs on the caller's thread, which opens, flushes and closes the sink. What is parked
    meanwhile stays for the next replay. Of two replays of a file at once both deliver, and the
    first to end removes.

    Raises:
        SinkError: the sink failed, on events that it might take later or that another may take.
            All that it has not taken is still in the file.
        OSError: the file cannot be read, or not be rewritten.
    """
    found = followed(absolute(path))
    with open(open_file(found, os.O_RDONLY), "rb") as file:
        return _Replay(found, file, sink, batch_size).run()


class _Replay:
    def __init__(self, path: str, file: BinaryIO, sink: Sink, batch_size: int) -> None:
        self._path = path
        self._file = file
        self._status = os.fstat(file.fileno())
        self._sink = sink
        self._batch_size = batch_size
        self._loop = SinkLoop()
        self._done = 0  # bytes from the start that need no second look
        self._kept = array("Q")  # of those, the lines that stay: from, to, from, to ...
        self._removable = 0
        self._delivered = self._refused = self._skipped = 0
        self._problems: list[str] = []

    def run(self) -> ReplayReport:
        is_closed = False
        try:
            self._loop.call(self._sink, "open")
            try:
                self._deliver()
            finally:
                self._loop.call(self._sink, "close")
                is_closed = True
        finally:
            self._loop.close()
            # a sink that cannot be closed may have lost what it had in hand
            if is_closed and self._removable:
                self._remove_delivered()
        return ReplayReport(self._delivered, self._refused, self._skipped, tuple(self._problems))

    def _deliver(self) -> None:
        batch: list[Line] = []
        for line in self._lines():
            batch.append(line)
            if len(batch) == self._batch_size or line[1] - batch[0][0] >= MOST_BYTES:
                self._take(batch)
                batch = []
        self._take(batch)

    def _lines(self) -> Iterator[Line]:
        start = 0
        while start < self._status.st_size:
            text = self._file.readline(MOST_BYTES)
            end = start + len(text)
            is_whole = text.endswith(b"\n")
            while text and not text.endswith(b"\n"):
                text = self._file.readline(MOST_BYTES)
                end += len(text)
            if not text:
                return  # torn: its writer died, or is about to finish it
            yield self._line(text, start, end) if is_whole else self._skipped_line(
                start, end, f"it has more than {MOST_BYTES} bytes")
            start = end

    def _line(self, text: bytes, start: int, end: int) -> Line:
        try:
            if b'"event"' in text:
                found = json.loads(text)
                if isinstance(found, dict) and "event" in found and "type" not in found:
                    return start, end, decode_object(found["event"]), True
            return start, end, decode(text), False
        except (ValueError, RecursionError) as error:
            return self._skipped_line(start, end, str(error))

    def _skipped_line(self, start: int, end: int, why: str) -> Line:
        self._skipped += 1
        self._note_problem(f"line at byte {start}: {why}")
        return start, end, None, False

    def _take(self, batch: list[Line]) -> None:
        """Deliver a batch, and note which of its lines stay."""
        refused: set[int] = set()
        self._write([line for line in batch if line[2] is not None], refused)
        stays = [not is_parked or start in refused for start, _, _, is_parked in batch]
        if not all(stays):
            self._loop.call(self._sink, "flush")
        for (start, end, _, _), does_stay in zip(batch, stays):
            self._done = end
            if not does_stay:
                self._removable += 1
            elif self._kept and self._kept[-1] == start:
                self._kept[-1] = end
            else:
                self._kept.extend((start, end))

    def _write(self, lines: list[Line], refused: set[int]) -> None:
        """Have the sink write events; halve what it refuses until the offenders stand alone."""
        if not lines:
            return
        try:
            self._loop.call(self._sink, "write", [line[2] for line in lines])
        except PermanentSinkError as error:
            if error.concerns != "event":
                raise  # all of them, whatever is in them: they are best kept where they are
            if len(lines) > 1:
                middle = len(lines) // 2
                self._write(lines[:middle], refused)
                self._write(lines[middle:], refused)
                return
            self._refused += 1
            refused.add(lines[0][0])
            self._note_problem(f"refused: {error}")
        except SinkError:
            raise
        except Exception as error:
            raise SinkError(f"the sink failed: {type(error).__name__}: {error}") from error
        else:
            self._delivered += len(lines)

    def _note_problem(self, text: str) -> None:
        if len(self._problems) < 5:
            self._problems.append(" ".join(text.split())[:300])

    # -- the file --

    def _remove_delivered(self) -> None:
        """Leave in the file what stays, and what came since we looked; without either it goes."""
        lock = LockFile.share(self._path + ".lock", self._status.st_mode & 0o666)
        try:
            with lock:
                if not self._is_still_there():
                    return  # another replay was faster, or somebody has put another file there
                if not self._kept and os.fstat(self._file.fileno()).st_size == self._done:
                    self._file.close()  # Windows removes and replaces nothing that is open
                    os.unlink(self._path)
                    sync_directory(self._path)
                    return
                check_replaceable(self._path, self._status)
                with replacing(self._path, self._path + ".replay.tmp", like=self._status) as rest:
                    for start, end in zip(self._kept[::2], self._kept[1::2]):
                        self._copy(start, end - start, rest)
                    self._copy(self._done, sys.maxsize, rest)
                    self._file.close()
        finally:
            lock.leave()

    def _is_still_there(self) -> bool:
        try:
            status = os.lstat(self._path)
        except FileNotFoundError:
            return False
        return os.path.samestat(status, self._status) and status.st_size >= self._done

    def _copy(self, start: int, length: int, target: BinaryIO) -> None:
        self._file.seek(start)
        while block := self._file.read(min(_BLOCK, length)):
            target.write(block)
            length -= len(block)

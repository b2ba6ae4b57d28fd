"""Replay: the events of a park file are delivered after all, and only then removed from it.

At least once. Where a replay is stopped, the next goes on behind the last batch that the sink took: that place is noted in
``PATH.replay``. Stores that know events by ``(task_id, seq)`` have each of them once, so a second replay changes nothing.
A file of plain wire lines can be replayed too; it is only read, not changed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from ..delivery.loop import SinkLoop
from ..model.errors import PermanentSinkError, SinkError, WireError
from ..model.wire import decode, decode_object
from ..sinks.lockfile import BINARY, LockFile, sync, sync_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO, Tuple

    from ..model.events import Event
    from ..sinks.base import Sink

    Line = Tuple[int, int, Event | None]  # from, to (bytes), and the event, or None for a line that holds none


@dataclass(frozen=True)
class ReplayReport:
    """What became of the events of a file."""

    delivered: int
    """Events that the sink took; they are gone from a park file."""
    refused: int
    """Events that the sink refuses for good; they stay in the file."""
    skipped: int
    """Lines that hold no event this version can read; they stay in the file. A torn last line is not counted."""
    problems: tuple[str, ...] = ()
    """What was wrong with the first few of the refused and the skipped."""


def replay(path: str | os.PathLike[str], sink: Sink, *, batch_size: int = 500) -> ReplayReport:
    """Deliver the events of the file at ``path`` to ``sink``, then remove them from it if it is a park file.

    Runs on the caller's thread, which opens, flushes and closes the sink. What is parked meanwhile stays for the next
    replay. One replay at a time: a second one of the same file waits for the first.

    Raises:
        SinkError: the sink failed, on events that it might take later or that another may take. All that it has not
            taken is still in the file.
        OSError: the file cannot be read, or not be rewritten.
    """
    path = os.path.realpath(os.fspath(path))
    os.stat(path)  # no lock file for what is not there
    lock = LockFile.share(path + ".replay.lock")
    try:
        with lock:
            return _Replay(path, sink, batch_size).run()
    finally:
        lock.leave()


class _Replay:
    def __init__(self, path: str, sink: Sink, batch_size: int) -> None:
        self._path = path
        self._note_path = path + ".replay"
        self._sink = sink
        self._batch_size = batch_size
        self._loop = SinkLoop()
        self._identity = (0, 0)
        self._done = 0  # bytes from the start that need no second look
        self._kept: list[tuple[int, int]] = []  # of those, the lines that stay
        self._is_park = False
        self._delivered = self._refused = self._skipped = 0
        self._problems: list[str] = []

    def run(self) -> ReplayReport:
        with open(self._path, "rb") as file:
            status = os.fstat(file.fileno())
            self._identity = (status.st_dev, status.st_ino)
            self._is_park = _is_park(file)
            self._resume()
            self._call("open")
            try:
                self._deliver(file, status.st_size)
            finally:
                self._call("close")
                self._loop.close()
        if self._is_park:
            self._remove_done()
        return ReplayReport(self._delivered, self._refused, self._skipped, tuple(self._problems))

    def _deliver(self, file: BinaryIO, size: int) -> None:
        batch: list[Line] = []
        for line in self._lines(file, size):
            batch.append(line)
            if len(batch) == self._batch_size:
                self._take(batch)
                batch = []
        self._take(batch)

    def _lines(self, file: BinaryIO, size: int) -> Iterator[Line]:
        file.seek(self._done)
        start = self._done
        while start < size:
            text = file.readline()
            if not text.endswith(b"\n"):
                return  # torn: its writer died, or is about to finish it
            end = start + len(text)
            yield start, end, self._event(text, start)
            start = end

    def _event(self, text: bytes, start: int) -> Event | None:
        try:
            if not self._is_park:
                return decode(text)
            parked = json.loads(text)
            if not isinstance(parked, dict) or "event" not in parked:
                raise WireError('expected a park line, an object with "event"')
            return decode_object(parked["event"])
        except (ValueError, RecursionError) as error:
            self._skipped += 1
            self._note_problem(f"line at byte {start}: {error}")
            return None

    def _take(self, batch: list[Line]) -> None:
        """Deliver a batch and note that it is."""
        self._kept += [(start, end) for start, end, event in batch if event is None]
        self._write([line for line in batch if line[2] is not None])
        if batch and self._is_park:
            self._call("flush")
            self._done = batch[-1][1]
            self._note_done()

    def _write(self, lines: list[Line]) -> None:
        """Have the sink write events, halving what it refuses for good until the offending ones stand alone."""
        if not lines:
            return
        try:
            self._call("write", [event for _, _, event in lines])
        except PermanentSinkError as error:
            if error.concerns != "event":
                raise  # all of them, whatever is in them: as long as that is so, they are best kept where they are
            if len(lines) > 1:
                middle = len(lines) // 2
                self._write(lines[:middle])
                self._write(lines[middle:])
                return
            self._refused += 1
            self._kept.append(lines[0][:2])
            self._note_problem(f"refused: {error}")
        except SinkError:
            raise
        except Exception as error:
            raise SinkError(f"the sink failed: {type(error).__name__}: {error}") from error
        else:
            self._delivered += len(lines)

    def _call(self, method: str, *arguments: object) -> None:
        """Call a method of the sink if it has it, to its end if it is async."""
        function = getattr(self._sink, method, None)
        if function is not None:
            self._loop.finish(function(*arguments))

    def _note_problem(self, text: str) -> None:
        if len(self._problems) < 5:
            self._problems.append(" ".join(text.split())[:300])

    # -- where we are --

    def _resume(self) -> None:
        """Go on where an earlier replay of this very file was stopped."""
        try:
            with open(self._note_path, encoding="utf-8") as file:
                note = json.load(file)
            if note["identity"] == list(self._identity):
                self._done = note["done"]
                self._kept = [(start, end) for start, end in note["kept"]]
        except (OSError, ValueError, KeyError, TypeError):
            return  # none, or one of another file: start at the beginning

    def _note_done(self) -> None:
        _replace(self._note_path, [json.dumps({"identity": self._identity, "done": self._done,
                                               "kept": sorted(self._kept)}).encode()])

    def _remove_done(self) -> None:
        """Rewrite the file with what stays: lines that were kept, and what was appended since we looked."""
        lock = LockFile.share(self._path + ".lock")
        try:
            with lock, open(self._path, "rb") as file:
                left = [file.read(end - start) for start, end in sorted(self._kept) if file.seek(start) >= 0]
                file.seek(self._done)
                left.append(file.read())
                if any(left):
                    _replace(self._path, left)
                else:
                    os.unlink(self._path)
                if os.path.lexists(self._note_path):
                    os.unlink(self._note_path)
        finally:
            lock.leave()


def _is_park(file: BinaryIO) -> bool:
    """Tell a park file from one of plain wire lines, by its first line."""
    try:
        first = json.loads(file.readline())
    except (ValueError, RecursionError):
        return True
    return not isinstance(first, dict) or "event" in first or "type" not in first


def _replace(path: str, parts: list[bytes]) -> None:
    """Give the file at ``path`` a new content, or leave the old one, whenever the process dies."""
    temporary = path + ".tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
    with open(fd, "wb") as file:
        file.writelines(parts)
        file.flush()
        sync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path)

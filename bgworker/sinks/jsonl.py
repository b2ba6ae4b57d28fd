"""Events as lines of JSON in a file, for debugging, ``tail -f`` and ``grep``.

Guarantees. Between two writes the file ends at a line end and every line parses, whatever failed: short writes are
finished, failed ones taken back, and what a killed process left half-written is moved to ``PATH.torn``. Several sinks,
threads and processes may append to one path and rotate it. Runs on the sink's thread.

Every write holds the exclusive lock ``PATH.lock``. The kernel would order single appends by itself, but under a shared
lock, or none, three things go wrong: another's lines land inside a line of ours between two short writes; a repair
takes for torn the line that another is about to finish; and a rotation renames the file under the feet of those about
to append. The lock costs three short system calls per batch; the kernel lets one writer at a time into a file anyway.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from contextlib import contextmanager

from .. import checks
from ..errors import ConfigurationError, PermanentSinkError, TemporarySinkError, WireError
from ..wire import encode_lines
from .files import BINARY, LockFile, rotate, settle, sync, sync_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Literal

    from ..events import Event

_BLOCK = 1 << 16

_NO_LOCKS = "its file system has no locks; name a path on another"
_HOPELESS = {
    errno.ENOENT: "create its directory first",
    errno.ENOTDIR: "one of its directories is a file; name another path",
    errno.EISDIR: "it is a directory; name a file",
    errno.EACCES: "name a file, in a directory, that this process may write to",
    errno.EPERM: "name a file, in a directory, that this process may write to",
    errno.EROFS: "name a path on a file system that can be written to",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "its symbolic links lead in a circle; name another path",
    errno.ENOLCK: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
    errno.ENOTSUP: _NO_LOCKS,
}
"""Errors of `JsonlSink.open` that no retry mends -> what does."""

_CURABLE = {
    errno.ENOSPC: "make room on its file system",
    errno.EDQUOT: "make room in the quota",
    errno.EFBIG: "raise the limit for file sizes, or set max_bytes below it",
    errno.ENOENT: "create its directory again",
    errno.EMFILE: "raise the limit for open files",
    errno.ENXIO: "nothing reads from it; start the reader",
    errno.EPIPE: "its reader is gone; start another",
}


class JsonlSink:
    """Appends events to a file, one line of JSON (wire format, version 1) per event, UTF-8.

    Delivery is at least once: a batch whose write failed comes again. What was written of it before is cut off first,
    so lines are doubled only if somebody who takes no lock has appended meanwhile.

    A file that is renamed or deleted meanwhile (logrotate) is noticed and created anew. A character device or a FIFO
    (``/dev/stderr``) is written to as well, without lock, repair and rotation. Beside the file appear ``PATH.lock``,
    which may be deleted at any time, and where need be ``PATH.torn`` and the rotated ``PATH.1`` and so on.

    Args:
        path: made absolute at once. Its directory must exist when the sink is opened. If it is a symbolic link, all
            happens where that leads.
        max_bytes: a file that would exceed this many bytes is rotated before the write; None never rotates. A batch is
            written whole, so one larger than this makes a file that is larger.
        backups: how many rotated files are kept; ``PATH.1`` is the newest. With 0 the full file is removed.
        compress: gzip the rotated files, to ``PATH.1.gz`` and so on. Others that write to the path wait meanwhile.
        durability: "process": what was written survives the death of the process. "power": it survives a power failure
            too, at the price of an fsync per batch.

    Raises:
        ConfigurationError: an argument cannot be used.
    """

    preferred_batch = 5000

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int | None = None, backups: int = 5,
                 compress: bool = False, durability: Literal["process", "power"] = "process") -> None:
        self.path = _absolute(path)
        self._max_bytes: int | None = checks.number("max_bytes", max_bytes, least=1, whole=True, optional=True)
        self._backups: int = checks.number("backups", backups, least=0, whole=True)
        if not isinstance(compress, bool):
            raise ConfigurationError(f"compress: expected True or False, got {compress!r}")
        self._compress = compress
        self._is_power_safe = checks.choice("durability", durability, ("process", "power")) == "power"
        self._target = self.path  # with symbolic links resolved, as of open
        self._lock: LockFile | None = None  # None while closed, and for what is no regular file
        self._fd = -1
        self._identity = (-1, -1)  # device and inode behind _fd
        self._mode = 0o666  # of the file; new ones beside it or in its place are no more open than it is
        self._end = -1  # size at which we know the file to end at a line end

    def __repr__(self) -> str:
        return f"JsonlSink({self.path!r})"

    def open(self) -> None:
        """Open or create the file and move a torn last line to ``PATH.torn``; again after a fork.

        Raises:
            PermanentSinkError: the path cannot be used; nothing was created.
            TemporarySinkError: it may work later.
        """
        self.close()
        try:
            self._open()
        except OSError as error:
            self.close()
            if error.errno in _HOPELESS:
                raise PermanentSinkError(self._trouble("open", error, _HOPELESS)) from error
            raise TemporarySinkError(self._trouble("open", error, _CURABLE)) from error

    def write(self, events: Sequence[Event]) -> None:
        """Append the events, as one write; open the file first if need be.

        Raises:
            TemporarySinkError: the system refused (disk full, directory gone); what was written is cut off again.
            PermanentSinkError: the path cannot be used, or an event has no wire form.
        """
        try:
            data = encode_lines(events)
        except WireError as error:
            raise PermanentSinkError(f"cannot encode an event for {self.path!r}: {error}") from error
        if self._lock is None and self._fd < 0:
            self.open()
        try:
            if self._lock is None:
                self._pour(data)
            else:
                with self._locked(self._lock):
                    self._append(data)
        except OSError as error:
            raise TemporarySinkError(self._trouble("append to", error, _CURABLE)) from error

    def flush(self) -> None:
        """Do nothing: after ``write`` the lines are with the kernel, or on the disk, as ``durability`` says."""

    def close(self) -> None:
        """Close the file; harmless if it is closed, and in a forked child. A later ``write`` opens it again."""
        self._close_file()
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.leave()

    # -- opening --

    def _open(self) -> None:
        try:
            mode = os.stat(self.path).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        if not stat.S_ISREG(mode):
            self._open_stream(mode)
            return
        self._target = os.path.realpath(self.path)
        try:
            self._open_file(os.O_RDWR)  # fails, if it must, before there is a lock file
        except FileNotFoundError:
            self._end = -1  # made below, under the lock
        lock = LockFile.share(self._target + ".lock")
        self._lock = lock
        with self._locked(lock):
            settle(self._target, self._backups)
            self._ready()

    def _open_stream(self, mode: int) -> None:
        """Open a device or FIFO: no line end can be looked for, nothing taken back, no other writer kept out."""
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
            raise PermanentSinkError(f"cannot open {self.path!r}: it is a socket or a block device; name a file")
        if self._max_bytes is not None:
            raise PermanentSinkError(f"cannot rotate {self.path!r}: it is no regular file; leave out max_bytes")
        flags = os.O_WRONLY | os.O_APPEND | BINARY
        if sys.platform == "win32":
            self._fd = os.open(self.path, flags)
        else:
            self._fd = os.open(self.path, flags | os.O_NOCTTY | os.O_NONBLOCK)  # else it waits for a FIFO's reader
            os.set_blocking(self._fd, True)

    def _open_file(self, flags: int) -> os.stat_result:
        self._close_file()
        self._fd = os.open(self._target, flags | os.O_APPEND | BINARY, self._mode)
        self._end = -1
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no longer a regular file")
        self._identity = (status.st_dev, status.st_ino)
        self._mode = status.st_mode & 0o666
        return status

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @contextmanager
    def _locked(self, lock: LockFile) -> Iterator[None]:
        with lock:
            try:
                yield
            finally:
                if os.name == "nt":  # cannot rename what anybody has open, and so could never rotate
                    self._close_file()

    # -- under the lock --

    def _ready(self) -> int:
        """Have the file at the path open and ending at a line end; return its size."""
        try:
            status = os.stat(self._target)
        except FileNotFoundError:
            status = None
        if status is None or self._fd < 0 or (status.st_dev, status.st_ino) != self._identity:
            is_new = status is None
            status = self._open_file(os.O_RDWR | os.O_CREAT)
            if is_new and self._is_power_safe:
                sync_directory(self._target)
        return status.st_size if status.st_size == self._end else self._mend(status.st_size)

    def _append(self, data: bytes) -> None:
        size = self._ready()
        if self._max_bytes is not None and 0 < size and size + len(data) > self._max_bytes:
            self._close_file()
            rotate(self._target, self._backups, compress=self._compress)
            size = self._ready()
        written = 0
        try:
            while written < len(data):  # once, unless the system takes only a part
                written += os.write(self._fd, memoryview(data)[written:])
            if self._is_power_safe:
                sync(self._fd)
        except BaseException:
            self._take_back(size, written)
            raise
        self._end = size + written

    def _take_back(self, start: int, written: int) -> None:
        """Cut off what a failed write has left behind ``start``."""
        self._end = -1  # the next write looks at the file's end, and mends it if the cut fails
        try:
            if os.fstat(self._fd).st_size == start + written:  # else somebody who takes no lock has appended
                os.ftruncate(self._fd, start)
        except OSError:
            return  # the error that led here tells more

    def _mend(self, size: int) -> int:
        """Move a torn last line to ``PATH.torn``; return the size that is left."""
        end = _line_end(self._fd, size)
        if end < size:
            torn = os.open(self._target + ".torn", os.O_WRONLY | os.O_APPEND | os.O_CREAT | BINARY, self._mode)
            try:
                for start in range(end, size, _BLOCK):
                    _write_all(torn, _read(self._fd, start, min(_BLOCK, size - start)))
                _write_all(torn, b"\n")
                if self._is_power_safe:
                    sync(torn)
                    sync_directory(self._target)
            finally:
                os.close(torn)
            os.ftruncate(self._fd, end)
        self._end = end
        return end

    # -- no regular file --

    def _pour(self, data: bytes) -> None:
        try:
            _write_all(self._fd, data)
        except OSError:
            self._close_file()  # a FIFO may get another reader
            raise

    def _trouble(self, what: str, error: OSError, remedies: dict[int, str]) -> str:
        other = f" ({os.fsdecode(error.filename)})" if error.filename not in (None, self.path) else ""
        remedy = remedies.get(error.errno or 0)
        return f"cannot {what} {self.path!r}: {error.strerror or error}{other}" + (f"; {remedy}" if remedy else "")


def _absolute(path: str | os.PathLike[str]) -> str:
    try:
        text = os.fsdecode(path)
    except TypeError:
        text = ""
    if not text or "\0" in text:
        raise ConfigurationError(f"path: expected the path of a file, got {path!r}")
    return os.path.abspath(text)  # now: the program may change its directory before the sink is opened


def _write_all(fd: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.write(fd, memoryview(data)[written:])


def _read(fd: int, start: int, length: int) -> bytes:
    os.lseek(fd, start, os.SEEK_SET)  # harmless: with O_APPEND each write goes to the end. Windows has no pread
    return os.read(fd, length)


def _line_end(fd: int, size: int) -> int:
    """Return the offset behind the last newline."""
    end, length = size, 1  # nearly always the last byte is one
    while end:
        start = max(0, end - length)
        newline = _read(fd, start, end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end, length = start, _BLOCK
    return 0

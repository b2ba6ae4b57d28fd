"""A file of lines that several sinks, threads and processes may append to, and rotate.

Guarantees. Between two appends the file ends at a line end, whatever failed: short writes are
finished, failed ones taken back, and what a killed process left half-written is moved to
``PATH.torn``. A file of anything but lines of JSON objects is refused untouched: its end would be
taken for a torn line, and a database cut short.

Every append holds the exclusive lock ``PATH.lock``. The kernel would order single appends by
itself, but under a shared lock, or none, three things go wrong: another's lines land inside a line
of ours between two short writes; a repair takes for torn the line that another is about to finish;
and a rotation renames the file under the feet of those about to append. The lock costs two system
calls per append, and the kernel admits one writer to a file at a time anyway.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager

from .lockfile import LockFile, rotate, settle
from .opening import (
    absolute,
    followed,
    is_ours,
    is_stream,
    open_file,
    open_stream,
    sync,
    sync_directory,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_IS_WINDOWS = os.name == "nt"
_BLOCK = 1 << 16
_JUDGED = 1 << 20  # bytes of the beginning, and of a last line, that are looked at
_OURS = (b'{"v":1,"type":', b'{"v":1,"sink":')  # begin the lines of a sink, and of a park
_MOST_TORN = 1 << 26  # bytes of a line that a writer of ours could have left half-written
# What may come before the first object: a byte order mark, blank lines, and the zeros that a power
# failure leaves where data had not reached the disk.
_BLANK = b"\xef\xbb\xbf\0 \t\r\n"


class LineFile:
    """Appends lines to a file, creating it. One thread at a time uses it; any number of them may
    share a path.

    A file that is renamed or deleted meanwhile (logrotate) is noticed and created anew. A character
    device or a FIFO (``/dev/stderr``) is written to as well, without lock, repair and rotation.
    Beside the file appear ``PATH.lock``, which may be deleted at any time, and where need be
    ``PATH.torn`` and the rotated ``PATH.1`` and so on.

    Args:
        path: made absolute at once. If it is a symbolic link, all happens where that leads.
        max_bytes: a file that would exceed this many bytes is rotated before the append; None never
            rotates.
        backups: how many rotated files are kept; with 0 the full file is removed.
        compress: gzip the rotated files.
        is_power_safe: what was appended survives a power failure, at the price of an fsync per
            append.
        mode: of files that are created; None leaves it to the umask. What is created beside a file
            that is there, or in its place, has its mode, and as far as possible its owner.

    Raises:
        ConfigurationError: the path is none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        backups: int = 5,
        compress: bool = False,
        is_power_safe: bool = False,
        mode: int | None = None,
    ) -> None:
        self.path = absolute(path)
        self._max_bytes = max_bytes
        self._backups = backups
        self._compress = compress
        if compress:
            # Here, not when the first file is rotated: a fork in the middle of an import leaves the
            # child with half a module, and the lock in its hands.
            import gzip  # noqa: F401
            import shutil  # noqa: F401
        self._is_power_safe = is_power_safe
        self._target = self.path  # with symbolic links resolved, as of open
        self._lock: LockFile | None = None  # None while closed, and for what is no regular file
        self._fd = -1
        self._identity = (-1, -1)  # device and inode behind _fd
        self._mode = mode
        self._like: os.stat_result | None = None  # the file as it was last opened
        self._end = -1  # size at which we know the file to end at a line end

    def open(self) -> None:
        """Open or create the file and move a torn last line to ``PATH.torn``; again after a fork.

        Raises:
            OSError: the path cannot be used. `FileExistsError`: what is there is something else
                than lines of JSON objects.
        """
        self.close()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def append(self, data: bytes) -> None:
        """Append whole lines, as one write; open the file first if need be. Raises `OSError`; then
        nothing was added."""
        if not self.is_open:
            self.open()
        if self._lock is None:
            self._pour(data)
        else:
            with self._locked(self._lock):
                self._append(data)

    @property
    def is_open(self) -> bool:
        """True between `open` and `close`."""
        return self._lock is not None or self._fd >= 0

    def size(self) -> int:
        """Return the bytes of the file at the path; 0 when there is none."""
        try:
            return os.stat(self.path).st_size
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        """Close the file; harmless if it is closed, and in a forked child. A later `append` opens
        it again."""
        self._close_file()
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.leave()

    # -- opening --

    def _open(self) -> None:
        target = followed(self.path)
        if is_stream(target):
            if self._max_bytes is not None and not os.path.isdir(target):
                raise OSError(errno.EINVAL, "it is not a regular file, and max_bytes needs one")
            self._fd = open_stream(target)
            return
        self._target = target
        try:
            self._open_file(os.O_RDWR)  # fails, if it must, before there is a lock file
        except FileNotFoundError:
            self._end = -1  # made below, under the lock
        lock_mode = self._mode if self._like is None else self._like.st_mode & 0o666
        lock = LockFile.share(self._target + ".lock", lock_mode)
        self._lock = lock
        with self._locked(lock):
            settle(self._target, self._backups)
            self._ready()

    def _open_file(self, flags: int) -> os.stat_result:
        self._close_file()
        self._fd = open_file(self._target, flags | os.O_APPEND, self._mode, like=self._like)
        self._end = -1
        status = os.fstat(self._fd)
        if status.st_size and _is_foreign(self._fd, status.st_size):
            self._close_file()  # else the next append would take it for looked at
            raise OSError(
                errno.EEXIST,
                "it holds something else than lines of JSON objects, and was left as it is; "
                "name another file, or move this one away",
                self.path,
            )
        self._identity = (status.st_dev, status.st_ino)
        self._like = status
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
                if _IS_WINDOWS:  # cannot rename what anybody has open, and so could never rotate
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
            try:
                rotate(self._target, self._backups, compress=self._compress)
            except PermissionError:
                if not _IS_WINDOWS:
                    raise
                # Somebody reads the file, and Windows renames nothing that is open: it grows.
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
            if os.fstat(self._fd).st_size == start + written:
                # else somebody who takes no lock has appended
                os.ftruncate(self._fd, start)
        except OSError:
            return  # the error that led here tells more

    def _mend(self, size: int) -> int:
        """Move a torn last line to ``PATH.torn``, or give a whole one its end; return the size."""
        end = _line_end(self._fd, size)
        if end < 0:
            raise OSError(
                errno.EEXIST,
                f"its last line has more than {_MOST_TORN} bytes, which no sink "
                "writes; name another file, or move this one away",
                self.path,
            )
        if end < size:
            if _is_whole(_read(self._fd, end, min(_JUDGED, size - end))):
                _write_all(self._fd, b"\n")
                end = size + 1
            else:
                self._set_aside(end, size)
                os.ftruncate(self._fd, end)
        self._end = end
        return end

    def _set_aside(self, start: int, end: int) -> None:
        path = self._target + ".torn"
        torn = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, like=self._like)
        try:
            if not is_ours(os.fstat(torn), os.fstat(self._fd).st_uid):
                raise OSError(
                    errno.EEXIST,
                    "it belongs to another user, or has another name too (a "
                    "hard link); move it away",
                    path,
                )
            for block in range(start, end, _BLOCK):
                _write_all(torn, _read(self._fd, block, min(_BLOCK, end - block)))
            _write_all(torn, b"\n")
            if self._is_power_safe:
                sync(torn)
                sync_directory(path)
        finally:
            os.close(torn)

    # -- no regular file --

    def _pour(self, data: bytes) -> None:
        try:
            _write_all(self._fd, data)
        except OSError:
            self._close_file()  # a FIFO may get another reader
            raise


def _write_all(fd: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.write(fd, memoryview(data)[written:])


def _read(fd: int, start: int, length: int) -> bytes:
    # harmless: with O_APPEND each write goes to the end. Windows has no pread
    os.lseek(fd, start, os.SEEK_SET)
    return os.read(fd, length)


def _is_foreign(fd: int, size: int) -> bool:
    """True unless a file begins with a line of ours or two of other objects, or is one torn line.

    One object alone is more likely somebody's settings, and lines behind it would spoil them.
    """
    head = _read(fd, 0, _JUDGED).lstrip(_BLANK)
    if head.startswith(_OURS):
        return False
    if b"\n" not in head:
        first = _object(head, is_whole=False)
        is_odd = head[:1] not in (b"", b"{") or first is not None and not _is_event(first)
        return is_odd or size > _JUDGED
    lines = [line for line in head.split(b"\n")[:-1] if line.strip()]
    first = _object(lines[0]) if lines else None
    return first is None or not _is_event(first) and (len(lines) < 2 or _object(lines[1]) is None)


def _is_event(found: dict[str, object]) -> bool:
    return "v" in found and ("type" in found or "event" in found)


def _is_whole(line: bytes) -> bool:
    """True for a line of others that lacks its end alone. One of ours is torn: it comes again."""
    return not line.startswith(_OURS) and _object(line) is not None


def _object(line: bytes, *, is_whole: bool = True) -> dict[str, object] | None:
    """Return the object that a line holds, or begins with; None where there is none, or half."""
    try:
        found = (json.loads(line) if is_whole else
                 json.JSONDecoder().raw_decode(line.decode(errors="replace"))[0])
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _line_end(fd: int, size: int) -> int:
    """Return the offset behind the last newline; -1 if that is too far off."""
    end, length = size, 1  # nearly always the last byte is one
    while end and size - end <= _MOST_TORN:
        start = max(0, end - length)
        newline = _read(fd, start, end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end, length = start, _BLOCK
    return -1 if end else 0

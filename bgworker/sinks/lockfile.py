"""A lock between processes and threads, and the rotation of files under it. Any thread.

Rotation guarantees that no line is lost or doubled, wherever the process dies: each step is one
atomic rename or removal, and leaves files that `rotate` and `settle` understand. All of it happens
under the `LockFile`.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from contextlib import suppress
from time import sleep

from ..model.clock import monotonic
from .opening import open_file, replacing, unlink_if_there

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import TypeVar

    Self = TypeVar("Self", bound="LockFile")

PATIENCE = 30.0
"""Seconds that a lock is waited for. Anybody who may read a file can lock it, and never let go."""

_PAUSES = 0.0005, 0.02  # seconds between two attempts: first, and at most
_BLOCK = 1 << 20

if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int, offset: int = 0) -> bool:
        os.lseek(fd, offset, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # LK_LOCK would wait in whole seconds
        except PermissionError:
            return False
        return True

    def unlock(fd: int, offset: int = 0) -> None:
        """Give a byte free."""
        os.lseek(fd, offset, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

    def is_locked(fd: int, offset: int) -> bool:
        """Tell whether another process has locked a byte."""
        if not _try_lock(fd, offset):
            return True
        unlock(fd, offset)
        return False
else:
    import fcntl

    def _try_lock(fd: int, offset: int = 0, kind: int = fcntl.LOCK_EX) -> bool:
        try:
            fcntl.lockf(fd, kind | fcntl.LOCK_NB, 1, offset)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # POSIX allows either
                raise
            return False
        return True

    def unlock(fd: int, offset: int = 0) -> None:
        """Give a byte free."""
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, offset)

    def is_locked(fd: int, offset: int) -> bool:
        """Tell whether another process has locked a byte."""
        if not _try_lock(fd, offset, fcntl.LOCK_SH):  # shared: needs no right to write
            return True
        unlock(fd, offset)
        return False


class LockFile:
    """An exclusive lock between processes and between the threads of each; a context manager.

    ``lockf`` rather than ``flock``: it is freed at once when its process is killed, though a forked
    child lives on. Its price is that it excludes no thread of its own process, and that closing
    *any* descriptor of the file frees it. Hence a file of its own, one `LockFile` per path and
    process (`share`), one descriptor, and a mutex.

    The lock is on byte 0. The file stays behind when the last user has left. Deleting it while it
    is in use harms no lock: those that wait go over to the new file.

    Whoever may read the file can keep the lock, so nothing waits for it longer than `PATIENCE`:
    `TimeoutError`.
    """

    def __init__(self, path: str, mode: int | None = None) -> None:
        self.path = path
        self._mode = mode
        self._users = 0  # guarded by _registry_guard
        # Held as long as the lock is; guards all below. It knows its holder, so that an interrupt
        # cannot leave it taken.
        self._mutex = threading.RLock()
        self._fd = -1

    @classmethod
    def share(cls: type[Self], path: str, mode: int | None = None) -> Self:
        """Return this process's one lock for a path; `leave` gives it back. Opens nothing yet.

        Args:
            mode: of the lock file, if it has to be created; None leaves it to the umask.
        """
        with _registry_guard:
            lock = _registry.setdefault(path, cls(path, mode))
            lock._users += 1
            return lock  # type: ignore[return-value]  # nobody shares a path in two classes

    def leave(self) -> None:
        """Give back what `share` returned; the last to do so closes the file."""
        with _registry_guard:
            self._users -= 1
            if not self._users:
                del _registry[self.path]
                self._close()

    def __enter__(self) -> None:
        mutex = self._mutex
        if mutex._is_owned():  # type: ignore[attr-defined]  # our caller is in the midst of it
            raise self._held_too_long()
        try:
            if not mutex.acquire(timeout=PATIENCE):  # inside: an interrupt may strike right after
                raise self._held_too_long()
            self._acquire()
        except BaseException:
            with suppress(RuntimeError):  # it was never ours
                mutex.release()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            unlock(self._fd)
        finally:
            self._mutex.release()

    def _acquire(self) -> None:
        while True:
            if self._fd < 0:
                self._open(os.O_CREAT)
            self._wait_for(0)
            if not self._drop_if_deleted():
                return

    def _wait_for(self, offset: int) -> None:
        deadline, pause = monotonic() + PATIENCE, _PAUSES[0]
        while not _try_lock(self._fd, offset):
            if monotonic() >= deadline:
                raise self._held_too_long()
            sleep(pause)
            pause = min(2 * pause, _PAUSES[1])

    def _held_too_long(self) -> OSError:
        return OSError(errno.ETIMEDOUT, f"others have kept it locked for {PATIENCE:g} s", self.path)

    def _open(self, flags: int) -> None:
        """Open the file as it is now."""
        self._fd = open_file(self.path, os.O_RDWR | os.O_APPEND | flags, self._mode)

    def _drop_if_deleted(self) -> bool:
        """Close a file that has no name any more: others lock a new one now, so we must too."""
        if os.fstat(self._fd).st_nlink:
            return False
        self._close()
        return True

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _start_afresh(self) -> None:
        """In a forked child: the mutex may be held by a thread that is not here, the descriptor is
        the parent's."""
        self._mutex = threading.RLock()
        self._close()


_registry: dict[str, LockFile] = {}
_registry_guard = threading.Lock()  # guards _registry and every LockFile._users


def _start_afresh_in_child() -> None:
    global _registry_guard
    _registry_guard = threading.Lock()
    for lock in _registry.values():
        lock._start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh_in_child)


def rotate(path: str, backups: int, *, compress: bool) -> None:
    """Move ``path`` to ``path.1``, that to ``path.2`` and so on; what would be number ``backups +
    1`` is removed.

    The files move up only as far as the first free number, from the top down. If the process dies
    half-way, one number is free; the next rotation moves the files below it and so picks up where
    this one ended.

    With ``compress`` every file ``path.N`` becomes ``path.N.gz``. An error there leaves it as it
    was, to be compressed by a later rotation: the rotation itself is complete by then.
    """
    settle(path, backups)
    for number in range(_free_number(path, backups), 0, -1):
        name = _backup(path, number - 1)
        if name is not None:
            os.rename(
                name, f"{path}.{number}" + (".gz" if number > 1 and name.endswith(".gz") else "")
            )
    if compress:
        for number in range(1, backups + 1):
            if _is_regular(f"{path}.{number}"):
                _compress(path, f"{path}.{number}")


def settle(path: str, backups: int) -> None:
    """Tidy up after a process that died in `rotate`; nothing to do if none did."""
    unlink_if_there(_half_compressed(path))
    for number in range(1, backups + 1):
        if _is_compressed(f"{path}.{number}"):
            os.unlink(f"{path}.{number}")


def _free_number(path: str, backups: int) -> int:
    """Return the lowest backup number without a file, removing the oldest backup if all are
    taken."""
    for number in range(1, backups + 1):
        if _backup(path, number) is None:
            return number
    oldest = _backup(path, backups)  # with 0 backups that is ``path`` itself
    if oldest is not None:
        os.unlink(oldest)
    return backups


def _backup(path: str, number: int) -> str | None:
    """Return the name of the file with that number, compressed or not; number 0 is ``path``
    itself."""
    names = (f"{path}.{number}", f"{path}.{number}.gz") if number else (path,)
    return next((name for name in names if os.path.lexists(name)), None)


def _half_compressed(path: str) -> str:
    return path + ".gz.tmp"


def _compress(path: str, name: str) -> None:
    """Replace a file by its ``.gz``. Both exist for a moment, and then the ``.gz`` is complete,
    also on the disk."""
    import gzip
    from shutil import copyfileobj
    with open(open_file(name, os.O_RDONLY), "rb") as plain:
        status = os.fstat(plain.fileno())
        with replacing(f"{name}.gz", _half_compressed(path), like=status) as target:
            with gzip.GzipFile(
                os.path.basename(name), "wb", 6, target, status.st_mtime
            ) as squeezed:
                copyfileobj(plain, squeezed, _BLOCK)
            target.flush()
            os.utime(_half_compressed(path), ns=(status.st_atime_ns, status.st_mtime_ns))
    os.unlink(name)


def _is_compressed(name: str) -> bool:
    """True when a process died in `_compress` before it removed the file: the ``.gz`` is complete.

    One of another owner is not ours.
    """
    squeezed = f"{name}.gz"
    return (_is_regular(name) and _is_regular(squeezed)
            and os.lstat(name).st_uid == os.lstat(squeezed).st_uid)


def _is_regular(name: str) -> bool:
    return os.path.isfile(name) and not os.path.islink(name)

"""Files that several threads and processes append to: the lock around them, and their rotation.

Rotation guarantees that no line is lost or doubled, wherever the process dies: each step is one atomic rename or
removal, and leaves files that `rotate` and `settle` understand. All of it happens under the `LockFile`.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time

from ..model.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

BINARY = getattr(os, "O_BINARY", 0)  # Windows alone has text mode, and makes it the default
_BLOCK = 1 << 20

_NO_LOCKS = "its file system has no locks; name a path on another"

HOPELESS = {
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
    errno.EINVAL: "name a file",
    errno.EEXIST: "",  # the error names the remedy
}
"""Errors of opening a file that no retry mends -> what does."""

CURABLE = {
    errno.ENOSPC: "make room on its file system",
    errno.EDQUOT: "make room in the quota",
    errno.EFBIG: "raise the limit for file sizes, or set max_bytes below it",
    errno.ENOENT: "create its directory again",
    errno.EMFILE: "raise the limit for open files",
    errno.ENXIO: "nothing reads from it; start the reader",
    errno.EPIPE: "its reader is gone; start another",
}
"""Errors of using a file that a retry may find mended -> what mends them."""

if sys.platform == "win32":
    import msvcrt

    def _lock(fd: int, offset: int = 0) -> None:
        os.lseek(fd, offset, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_LOCK, 1)  # gives up after 10 s with EDEADLK, which stands for "ask again" below

    def _unlock(fd: int, offset: int = 0) -> None:
        os.lseek(fd, offset, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

    def _is_locked(fd: int, offset: int) -> bool:
        os.lseek(fd, offset, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return True
        _unlock(fd, offset)
        return False
else:
    import fcntl

    def _lock(fd: int, offset: int = 0) -> None:
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, offset)

    def _unlock(fd: int, offset: int = 0) -> None:
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, offset)

    def _is_locked(fd: int, offset: int) -> bool:
        try:
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, offset)  # shared: needs no right to write
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # POSIX allows either
                raise
            return True
        _unlock(fd, offset)
        return False


class LockFile:
    """An exclusive lock between processes and between the threads of each; a context manager.

    ``lockf`` rather than ``flock``: it is freed at once when its process is killed, though a forked child lives on.
    Its price is that it excludes no thread of its own process, and that closing *any* descriptor of the file frees it.
    Hence a file of its own, one `LockFile` per path and process (`share`), one descriptor, and a mutex.

    The lock is on byte 0. A process may `hold` further bytes for as long as it likes, each of which tells the others, by
    `is_held`, that something of it is alive; the kernel frees them when it dies. The file notes which bytes were ever
    held on it, so that `is_abandoned` never takes who holds a byte of a deleted file for dead.

    The file stays behind when the last user has left. Deleting it while it is in use harms no lock, for who waits goes
    over to the new file; bytes that were held count again from the next use of the lock by who holds them.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._users = 0  # guarded by _registry_guard
        self._mutex = threading.Lock()  # held as long as the lock is; guards all below
        self._fd = -1
        self._is_writable = False
        self._held: dict[int, int] = {}  # offset -> how often

    @classmethod
    def share(cls, path: str) -> LockFile:
        """Return this process's one lock for a path; `leave` gives it back. Opens nothing yet."""
        with _registry_guard:
            lock = _registry.setdefault(path, cls(path))
            lock._users += 1
            return lock

    def leave(self) -> None:
        """Give back what `share` returned; the last to do so closes the file, and holds no byte any more."""
        with _registry_guard:
            self._users -= 1
            if not self._users:
                del _registry[self.path]
                self._held.clear()
                self._close()

    def __enter__(self) -> None:
        self._mutex.acquire()
        try:
            self._acquire()
        except BaseException:
            self._mutex.release()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            _unlock(self._fd)
        finally:
            self._mutex.release()

    def hold(self, offset: int) -> None:
        """Hold a byte, from 1 on, until `release` is called as often, or the process ends. No two processes hold the same."""
        with self:
            if offset not in self._held:
                self._lock_and_note(offset)
            self._held[offset] = self._held.get(offset, 0) + 1

    def release(self, offset: int) -> None:
        """Give up a byte that was held; harmless if it was not."""
        with self._mutex:
            users = self._held.pop(offset, 0)
            if users > 1:
                self._held[offset] = users - 1
            elif users and self._fd >= 0:
                _unlock(self._fd, offset)

    def is_held(self, offset: int) -> bool:
        """Tell whether this or another process holds a byte; without a lock file nobody does. Creates nothing.

        Raises:
            OSError: this process may not even read the file.
        """
        with self._mutex:
            if offset in self._held:
                return True  # asking the kernel would do no more than convert our own lock
            return self._is_open_to_ask() and _is_locked(self._fd, offset)

    def is_abandoned(self, offset: int) -> bool:
        """Tell whether a byte was held and is no longer. False when that cannot be found out: the file was made anew.

        Raises:
            OSError: this process may not even read the file.
        """
        with self._mutex:
            while offset not in self._held and self._is_open_to_ask():
                # Noted first, asked second: who holds it has locked it before he noted it.
                is_abandoned = self._is_noted(offset) and not _is_locked(self._fd, offset)
                if not self._drop_if_deleted():  # else he may just have gone over to a new file
                    return is_abandoned
            return False

    def _is_open_to_ask(self) -> bool:
        try:
            while self._fd < 0 or self._drop_if_deleted():
                self._open(0)
            return True
        except FileNotFoundError:
            return False

    def _lock_and_note(self, offset: int) -> None:
        _lock_patiently(self._fd, offset)
        if not self._is_noted(offset):
            os.write(self._fd, b"\n%x\n" % offset)

    def _is_noted(self, offset: int) -> bool:
        os.lseek(self._fd, 1, os.SEEK_SET)  # Windows lets nobody read byte 0 while another has it locked
        found = b"\n"
        while block := os.read(self._fd, _BLOCK):
            found += block
        return b"\n%x\n" % offset in found

    def _acquire(self) -> None:
        while True:
            if self._fd >= 0 and not self._is_writable:
                self._close()  # opened by `is_held`; no byte is held yet
            if self._fd < 0:
                self._open(os.O_CREAT)
            _lock_patiently(self._fd)
            if not self._drop_if_deleted():
                return

    def _open(self, flags: int) -> None:
        """Open the file as it is now, and hold on it what we hold."""
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | flags | BINARY, 0o666)
            self._is_writable = True
        except OSError as error:
            if flags or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            self._fd = os.open(self.path, os.O_RDONLY | BINARY)
            self._is_writable = False
        for offset in self._held:
            self._lock_and_note(offset)

    def _drop_if_deleted(self) -> bool:
        """Close a file that has no name any more: who comes now locks a new one, so we must too."""
        if os.fstat(self._fd).st_nlink:
            return False
        self._close()
        return True

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _start_afresh(self) -> None:
        """In a forked child: the mutex may be held by a thread that is not here, the descriptor is the parent's."""
        self._mutex = threading.Lock()
        self._held = {}
        self._close()


def _lock_patiently(fd: int, offset: int = 0) -> None:
    while True:
        try:
            return _lock(fd, offset)
        except OSError as error:
            if error.errno != errno.EDEADLK:
                raise
            # The kernel takes all threads of a process for one owner. Two processes that use the same two files look
            # to it like a deadlock when a thread of each waits for a lock that another thread of the other holds. None
            # of ours waits for a second lock while it holds one: the other will be done soon.
            time.sleep(0.001)


_registry: dict[str, LockFile] = {}
_registry_guard = threading.Lock()  # guards _registry and every LockFile._users


def _start_afresh_in_child() -> None:
    global _registry_guard
    _registry_guard = threading.Lock()
    for lock in _registry.values():
        lock._start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh_in_child)


def absolute(path: str | os.PathLike[str]) -> str:
    """Return the path as it is now from the root: the program may change its directory before it opens the file.

    Raises:
        ConfigurationError: it is no path.
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        text = ""
    if not text or "\0" in text:
        raise ConfigurationError(f"path: expected the path of a file, got {path!r}")
    return os.path.abspath(text)


def sync(fd: int) -> None:
    """Have a file's content survive a power failure."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync alone leaves it in the drive's cache there
            return
        except OSError:  # a file system that does not know it
            os.fsync(fd)
    else:
        os.fsync(fd)


def sync_directory(path: str) -> None:
    """Have the creation, renaming or removal of a file at ``path`` survive a power failure."""
    if os.name == "nt":
        return  # no way to ask for it
    fd = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync directories
            raise
    finally:
        os.close(fd)


def rotate(path: str, backups: int, *, compress: bool) -> None:
    """Move ``path`` to ``path.1``, that to ``path.2`` and so on; what would be number ``backups + 1`` is removed.

    The files move up only as far as the first free number, from the top down. If the process dies half-way, one number
    is free; the next rotation moves the files below it and so picks up where this one ended.

    With ``compress`` every file ``path.N`` becomes ``path.N.gz``. An error there leaves it as it was, to be compressed
    by a later rotation: the rotation itself is complete by then.
    """
    settle(path, backups)
    for number in range(_free_number(path, backups), 0, -1):
        name = _backup(path, number - 1)
        if name is not None:
            os.rename(name, f"{path}.{number}" + (".gz" if number > 1 and name.endswith(".gz") else ""))
    if compress:
        for number in range(1, backups + 1):
            if os.path.lexists(f"{path}.{number}"):
                _compress(path, f"{path}.{number}")


def settle(path: str, backups: int) -> None:
    """Tidy up after a process that died in `rotate`; nothing to do if none did."""
    _unlink_if_there(_half_compressed(path))
    for number in range(1, backups + 1):
        if os.path.lexists(f"{path}.{number}.gz"):
            _unlink_if_there(f"{path}.{number}")  # it is complete inside the other: see _compress


def _free_number(path: str, backups: int) -> int:
    """Return the lowest backup number without a file, removing the oldest backup if all are taken."""
    for number in range(1, backups + 1):
        if _backup(path, number) is None:
            return number
    oldest = _backup(path, backups)  # with 0 backups that is ``path`` itself
    if oldest is not None:
        os.unlink(oldest)
    return backups


def _backup(path: str, number: int) -> str | None:
    """Return the name of the file with that number, compressed or not; number 0 is ``path`` itself."""
    names = (f"{path}.{number}", f"{path}.{number}.gz") if number else (path,)
    return next((name for name in names if os.path.lexists(name)), None)


def _half_compressed(path: str) -> str:
    return path + ".gz.tmp"


def _compress(path: str, name: str) -> None:
    """Replace a file by its ``.gz``. Both exist for a moment, and then the ``.gz`` is complete, also on the disk."""
    import gzip
    from shutil import copyfileobj
    temporary = _half_compressed(path)
    with open(name, "rb") as plain:
        status = os.fstat(plain.fileno())
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, status.st_mode & 0o666)
        try:
            with open(fd, "wb") as target:
                with gzip.GzipFile(os.path.basename(name), "wb", 6, target, status.st_mtime) as squeezed:
                    copyfileobj(plain, squeezed, _BLOCK)
                target.flush()
                sync(target.fileno())
            os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
            os.replace(temporary, f"{name}.gz")
        except BaseException:
            _unlink_if_there(temporary)
            raise
    sync_directory(name)
    os.unlink(name)


def _unlink_if_there(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return

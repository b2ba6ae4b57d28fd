"""One way to open, create and replace each kind of file, also where others can write.

The file that a user names is followed where its links lead: people link logs elsewhere on purpose.
The names beside it, such as ``PATH.lock`` and ``PATH.torn``, can be guessed by anybody who may
write to its folder. There no link is followed, nothing but a regular file is opened, a file of
another user is refused, and no open waits. A file that takes the place of another is created under
a name of its own and keeps the mode and the owner. Any thread.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from contextlib import contextmanager, suppress

from ..model.errors import ConfigurationError
from ..model.text import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

BINARY = getattr(os, "O_BINARY", 0)  # Windows alone has text mode, and makes it the default
_CAREFUL = BINARY
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY"):  # of which Windows has none
    _CAREFUL |= getattr(os, _name, 0)
_OWN_DESCRIPTORS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")
_ATTEMPTS = 10  # to open what others create and remove meanwhile
_MOST_LINKS = 40
_NO_FILES = ("-", ":memory:")  # what others take for a stream, and for no file at all

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
    errno.ETIMEDOUT: "find the process that holds its lock, and end it if it hangs",
}
"""Errors of using a file that a retry may find mended -> what mends them."""


def shown(path: str | bytes | os.PathLike[str]) -> str:
    """Return a path as a message shows it: on one line, in quotes, its backslashes single."""
    return repr(os.fsdecode(path)).replace("\\\\", "\\")


def trouble(what: str, path: str, error: OSError, remedies: dict[int, str]) -> str:
    """Return the message for an error of a file, or of one beside it, with what mends it."""
    other = f" ({shown(error.filename)})" if error.filename not in (None, path) else ""
    remedy = remedies.get(error.errno or 0)
    remedy = f"; {remedy}" if remedy else ""
    return f"cannot {what} {shown(path)}: {error.strerror or error}{other}{remedy}"


def absolute(path: str | os.PathLike[str]) -> str:
    """Return the path from the root, as it is now: the program may change its directory later.

    Raises:
        ConfigurationError: it is no path, or the current directory, which it starts from, is gone.
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        text = ""
    if not text or "\0" in text:
        raise ConfigurationError(f"path: expected the path of a file, got {path!r}")
    if text in _NO_FILES:
        raise ConfigurationError(f"path: {text!r} names no file here; name one, or write ./{text} "
                                 "for a file of that name (/dev/stdout is the standard output)")
    try:
        return os.path.abspath(text)
    except FileNotFoundError as error:
        raise ConfigurationError(f"path: {shown(text)} starts from the current directory, which is "
                                 "gone; change to another, or give a path from the root") from error


def checked_mode(mode: int | None, name: str = "mode") -> int | None:
    """Return the permissions of files to be created, or raise `ConfigurationError`."""
    if mode is None or type(mode) is int and mode & ~0o177 == 0o600:
        return mode
    got = oct(mode) if type(mode) is int and 0 <= mode <= 0o7777 else show(mode)
    raise ConfigurationError(f"{name}: expected None, or permissions from 0o600 to 0o777 such as "
                             f"0o640, got {got}")


def followed(path: str) -> str:
    """Return where the links at a path lead, whether there is a file or not.

    A descriptor of ours (``/dev/stdout``) stays one.

    Raises:
        FileExistsError: another user has put a link there, which may lead anywhere.
        OSError: the links lead in a circle.
    """
    for _ in range(_MOST_LINKS):
        if path.startswith(_OWN_DESCRIPTORS):
            return path
        try:
            status = os.lstat(path)
        except OSError:
            break  # nothing there, or out of reach: opening it tells
        if not stat.S_ISLNK(status.st_mode):
            break
        check_owner(path, status)
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    return os.path.realpath(path)


def is_stream(path: str) -> bool:
    """True for a device, a FIFO or the like, and for what this process has open already.

    Where such a descriptor was redirected to a file, our lines stand in it among others' text:
    nothing is repaired there.
    """
    return path.startswith(_OWN_DESCRIPTORS) or os.path.exists(path) and not os.path.isfile(path)


def open_stream(path: str) -> int:
    """Open a device, a FIFO or a descriptor of ours to append to it.

    Raises:
        FileExistsError: another user has put it there.
        OSError: it cannot be opened; ENXIO: nobody reads from the FIFO.
    """
    flags = os.O_WRONLY | os.O_APPEND | BINARY
    if path.startswith(_OWN_DESCRIPTORS):
        return os.open(path, flags)
    status = os.lstat(path)
    check_owner(path, status)
    if stat.S_ISSOCK(status.st_mode) or stat.S_ISBLK(status.st_mode):
        raise OSError(errno.EINVAL, "it is a socket or a block device", path)
    fd = os.open(path, flags | _CAREFUL)  # does not wait for a FIFO's reader
    if not os.path.samestat(os.fstat(fd), status):
        os.close(fd)
        raise OSError(errno.EAGAIN, "others replace it all the time", path)
    if os.name != "nt":
        os.set_blocking(fd, True)
    return fd


def open_file(path: str, flags: int, mode: int | None = None, *,
              like: os.stat_result | None = None) -> int:
    """Open a regular file without following a link; return its descriptor.

    Args:
        flags: as of `os.open`. With O_CREAT a file that is not there is created, never over
            something else.
        mode: of a file that is created, whatever the umask; None leaves it to the umask.
        like: a file that is created gets the mode and the owner of this one.

    Raises:
        FileExistsError: something else than a regular file is there, or what another user has put
            there.
        OSError: it cannot be opened.
    """
    for _ in range(_ATTEMPTS):
        try:
            status = os.lstat(path)
            check_file(path, status)
            fd = os.open(path, flags & ~os.O_CREAT | _CAREFUL)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            with suppress(FileExistsError):
                return create(path, flags, mode, like=like)
            continue
        if os.path.samestat(os.fstat(fd), status):
            return fd
        os.close(fd)
    raise OSError(errno.EAGAIN, "others replace it all the time", path)


def create(path: str, flags: int, mode: int | None = None, *,
           like: os.stat_result | None = None) -> int:
    """Create a file where nothing is, else raise `FileExistsError`; as with `open_file`."""
    first_mode = 0o666 if mode is None and like is None else 0o600
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL | _CAREFUL, first_mode)
    try:
        if like is not None:
            _make_alike(fd, like)
        elif mode is not None and hasattr(os, "fchmod"):
            os.fchmod(fd, mode)
    except BaseException:
        os.close(fd)
        os.unlink(path)
        raise
    return fd


@contextmanager
def replacing(path: str, temporary: str, *,
              like: os.stat_result | None = None) -> Iterator[BinaryIO]:
    """Write a file that takes the place of the one at ``path`` when the block ends well.

    It is on the disk by then.

    Args:
        temporary: where it is written; a file that a killed process has left there is removed.
        like: whose mode and owner it gets; None leaves them to the umask and this process.
    """
    unlink_if_there(temporary)
    fd = create(temporary, os.O_WRONLY, like=like)
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            sync(fd)
        os.replace(temporary, path)
    except BaseException:
        unlink_if_there(temporary)
        raise
    sync_directory(path)


def check_file(path: str, status: os.stat_result, *owners: int) -> None:
    """Refuse a file that is not a regular one, or that another user has put there.

    Args:
        status: what `os.lstat` says of it.
        owners: further users whose files are trusted.

    Raises:
        FileExistsError: it is; its text tells what to do.
    """
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory",
                 stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        or_what = "" if kind in ("a directory", "a device") else ", or remove it"
        raise OSError(errno.EEXIST, f"it is {kind}, where there should be a regular file; "
                      f"name another path{or_what}", path)
    check_owner(path, status, *owners)


def is_ours(status: os.stat_result, *others: int) -> bool:
    """True when a file has one name, and belongs to this user, to root or to one of ``others``."""
    return status.st_nlink == 1 and (os.name == "nt" or status.st_uid in (0, os.geteuid(), *others))


def check_owner(path: str, status: os.stat_result, *owners: int) -> None:
    """Refuse what another user has put where anybody could; as with `check_file`, of any kind."""
    if os.name == "nt":
        return
    folder, user = os.stat(os.path.dirname(path) or "."), os.geteuid()
    is_link = stat.S_ISLNK(status.st_mode)
    is_open_to_all = folder.st_mode & stat.S_IWOTH
    trusted = {0, user, *owners}
    if user != 0 or not is_link:  # root has no reason to go where a user's link leads
        trusted.add(folder.st_uid)
    if status.st_uid not in trusted and (is_link or is_open_to_all):
        what = "a symbolic link" if is_link else "a file"
        raise OSError(errno.EEXIST, f"it is {what} of another user (uid {status.st_uid}); name a "
                      "path in a directory that only you can write to, or remove it", path)
    if is_open_to_all and not is_link and status.st_nlink > 1:
        raise OSError(
            errno.EEXIST,
            "it has another name too (a hard link), and everybody can write "
            "to its directory; name a path in a directory that only you can write to, "
            "or remove it",
            path,
        )


def check_replaceable(path: str, status: os.stat_result) -> None:
    """Refuse to replace a file whose owner could not be kept. Raises `PermissionError`."""
    if os.name != "nt" and os.geteuid() not in (0, status.st_uid):
        raise OSError(errno.EPERM, f"it belongs to another user (uid {status.st_uid}), and only "
                      "that user and root can replace it", path)


def _make_alike(fd: int, like: os.stat_result) -> None:
    if not hasattr(os, "fchown"):
        return
    mine, mode = os.fstat(fd), like.st_mode & 0o777
    if mine.st_uid != like.st_uid:
        with suppress(PermissionError):  # root alone can do that; others have to rely on the group
            os.fchown(fd, like.st_uid, -1)
    if mine.st_gid != like.st_gid:
        try:
            os.fchown(fd, -1, like.st_gid)
        except PermissionError:  # a group that we are not in; ours may not read instead of it
            mode &= ~0o070
    os.fchmod(fd, mode)


def sync(fd: int) -> None:
    """Have a file's content survive a power failure."""
    if sys.platform == "darwin":
        import fcntl
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
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync directories
            raise
    finally:
        os.close(fd)


def unlink_if_there(path: str) -> None:
    """Remove a file, or a link to one, if there is one."""
    with suppress(FileNotFoundError):
        os.unlink(path)

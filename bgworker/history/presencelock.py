"""The lock of a history, by which its writers also tell that they live.

A process holds a byte of the lock file for each run that it records. The kernel frees it when the
process dies, however that happens. Any thread may ask; nothing waits longer than the lock does.
"""

from __future__ import annotations

import errno
import os

from ..sinks.lockfile import LockFile, is_locked, unlock
from ..sinks.opening import open_file

_NOTE_BYTES = 1 << 16  # of a lock file; one of this size is written anew
_NOTE_SIGNS = b"\n0123456789abcdef"
_NOTE_DIGITS = 11  # of the longest


class PresenceLock(LockFile):
    """A lock file of which a process may `hold` further bytes for as long as it likes.

    The file notes which bytes were held on it and are not forgotten, so that `is_abandoned` never
    takes a process that holds a byte of a deleted file for dead: such bytes count again from the
    next use of the lock by their holder. A file that holds anything but notes is locked, but not
    written to.
    """

    _can_only_ask = False  # opened to read

    def __init__(self, path: str, mode: int | None = None) -> None:
        super().__init__(path, mode)
        self._held: dict[int, int] = {}  # offset -> how often; guarded by the mutex

    def hold(self, offset: int) -> None:
        """Hold a byte, from 1 on, until `release` is called as often, or the process ends. No two
        processes hold the same."""
        with self:
            if offset not in self._held:
                self._lock_and_note(offset)
            self._held[offset] = self._held.get(offset, 0) + 1

    def release(self, offset: int, *, forget: bool = False) -> None:
        """Give up a byte that was held; harmless if it was not.

        Args:
            forget: nobody will ask any more whether it is abandoned, so that its note can go.
        """
        if offset not in self._held:
            return
        with self:
            users = self._held.pop(offset, 0)
            if users > 1:
                self._held[offset] = users - 1
            elif users:
                if forget and self._is_noted(offset):
                    self._rewrite(self._noted() - {offset})
                unlock(self._fd, offset)

    def is_abandoned(self, offset: int) -> bool:
        """Tell whether a byte was held and is no longer. False when that cannot be found out: the
        file was made anew.

        Raises:
            OSError: this process may not even read the file.
        """
        with self._mutex:
            while offset not in self._held and self._is_open_to_ask():
                # Noted first, asked second: its holder has locked it before noting it.
                is_abandoned = self._is_noted(offset) and not is_locked(self._fd, offset)
                if not self._drop_if_deleted():
                    # else its holder may just have gone over to a new file
                    return is_abandoned
            return False

    def is_held(self, offset: int) -> bool:
        """Tell whether a process of this machine holds a byte.

        Raises:
            OSError: as `is_abandoned`.
        """
        with self._mutex:
            while offset not in self._held:
                if not self._is_open_to_ask():
                    return False
                is_held = is_locked(self._fd, offset)
                if not self._drop_if_deleted():
                    return is_held
            return True

    def _is_open_to_ask(self) -> bool:
        """Open the file, to read if it cannot be written to; False when there is none."""
        try:
            while self._fd < 0 or self._drop_if_deleted():
                try:
                    self._open(0)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                        raise
                    self._fd = open_file(self.path, os.O_RDONLY)
                    self._can_only_ask = True
            return True
        except FileNotFoundError:
            return False

    def _lock_and_note(self, offset: int) -> None:
        self._wait_for(offset)
        if self._is_noted(offset) or self._notes() is None:
            return
        if os.fstat(self._fd).st_size < _NOTE_BYTES:
            os.write(self._fd, b"\n%x\n" % offset)
        else:  # most are of processes that were killed: those are forgotten, and count as alive
            alive = {each for each in self._noted()
                     if each in self._held or is_locked(self._fd, each)}
            self._rewrite(alive | {offset})

    def _is_noted(self, offset: int) -> bool:
        return b"\n%x\n" % offset in (self._notes() or b"")

    def _noted(self) -> set[int]:
        """Return the bytes that were held and not forgotten."""
        return {int(note, 16) for note in (self._notes() or b"").split()
                if len(note) <= _NOTE_DIGITS}

    def _notes(self) -> bytes | None:
        """Return the notes; None if the file holds anything else, or may be another's."""
        if os.fstat(self._fd).st_nlink > 1:
            return None
        os.lseek(self._fd, 1, os.SEEK_SET)  # Windows: nobody reads byte 0 while another locks it
        found = os.read(self._fd, 2 * _NOTE_BYTES)
        return None if found.translate(None, _NOTE_SIGNS) else b"\n" + found

    def _rewrite(self, notes: set[int]) -> None:
        os.ftruncate(self._fd, 0)  # killed here, we leave a file by which nobody is taken for dead
        os.write(self._fd, b"".join(b"\n%x\n" % each for each in notes))

    def _acquire(self) -> None:
        if self._can_only_ask:
            self._close()  # no byte is held yet
        super()._acquire()

    def _open(self, flags: int) -> None:
        """Open the file as it is now, and hold on it what we hold."""
        super()._open(flags)
        for offset in self._held:
            self._lock_and_note(offset)

    def _close(self) -> None:
        super()._close()
        self._can_only_ask = False

    def leave(self) -> None:
        """As of every lock file; the last to leave holds no byte any more."""
        super().leave()
        if not self._users:
            self._held.clear()

    def _start_afresh(self) -> None:
        self._held = {}
        super()._start_afresh()

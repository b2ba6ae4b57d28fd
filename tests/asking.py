"""A lock file that also says who holds a byte of it now, which bgworker never asks. No test is in
here."""

from __future__ import annotations

from bgworker.history.presencelock import PresenceLock
from bgworker.sinks.lockfile import is_locked


class AskingLock(PresenceLock):
    """Can be asked without making the file."""

    def is_held(self, offset: int) -> bool:
        """Tell whether this or another process holds a byte."""
        with self._mutex:
            # asking the kernel for our own would do no more than convert our lock
            return offset in self._held or self._is_open_to_ask() and is_locked(self._fd, offset)

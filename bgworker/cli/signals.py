"""Signals, while commands run: none ends or stops this process and leaves its commands behind.

The first signal asks the commands to stop, the second kills them, the third ends us. Ctrl-\\
(SIGQUIT) kills them at once. Ctrl-Z stops them with us, and what continues us continues them.
SIGKILL cannot be handled: commands outlive it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

    from .jobs import Run
    from .screen import Screen

_OTHERS = frozenset(
    getattr(signal, name)
    for name in (
        # end nobody
        "SIGKILL",
        "SIGSTOP",
        "SIGCONT",
        "SIGCHLD",
        "SIGWINCH",
        "SIGURG",
        "SIGTTIN",
        "SIGTTOU",
        "SIGINFO",
        "SIGSEGV",
        "SIGBUS",
        "SIGFPE",
        "SIGILL",
        "SIGSYS",
        "SIGTRAP",  # the interpreter is broken
    )
    if hasattr(signal, name)
)


class Killed(KeyboardInterrupt):
    """Raised in the main thread by a second signal, wherever it is."""


class Signals:
    """While active, the first signal that would end us stops the run, a second one raises `Killed`,
    a third ends us."""

    def __init__(self, run: Run, screen: Screen) -> None:
        self._run = run
        self._screen = screen
        self._count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only there can signals be handled
        for number in signal.valid_signals() - _OTHERS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a job in the background
                is_pause = number == getattr(signal, "SIGTSTP", None)
                self._set(number, self._pause if is_pause else self._handle)
        # A parent that ignores it hands that down to us, and then no exit code is to be had.
        if hasattr(signal, "SIGCHLD"):
            self._set(signal.SIGCHLD, signal.SIG_DFL)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _set(self, number: int, handler: Any) -> None:
        with suppress(OSError, ValueError):  # one that the system keeps for itself
            self._before[number] = signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count == 1:
            self._run.signal = number
            if number != getattr(signal, "SIGQUIT", None):
                self._run.ring()
                return
            self._count = 2
        if self._count == 2:
            raise Killed
        kill_children()
        os._exit(128 + self._run.signal)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Stop the commands, then ourselves; go on with them when we are continued."""
        if sys.platform == "win32":
            return
        with self._screen.taken_off():
            _signal_all(signal.SIGSTOP)
            handler = signal.signal(number, signal.SIG_DFL)
            # returns when we are continued; at once where no shell could do that
            os.kill(os.getpid(), number)
            signal.signal(number, handler)
            _signal_all(signal.SIGCONT)


def kill_children() -> None:
    """Kill the processes of all commands, without asking."""
    # there, what ignores the Ctrl-Break that it got at the first signal lives on
    if sys.platform != "win32":
        _signal_all(signal.SIGKILL)


def _signal_all(number: int) -> None:
    from ..shell import processes  # loaded long since, by the commands; a vendored copy may lack it
    processes.signal_all(number)


def leave_at_once(run: Run, screen: Screen) -> None:
    """End the process past whatever is blocked; take the table off the terminal if that can be had
    at once."""
    with screen.taken_off():
        os._exit(128 + run.signal)

"""Signals, while commands run: the first asks them to stop, the second kills them, the third ends us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

    from .run import Run
    from .screen import Screen


class Killed(KeyboardInterrupt):
    """Raised in the main thread by a second signal, wherever it is."""


class Signals:
    """While active, the first SIGINT, SIGTERM or SIGHUP stops the run, a second one raises `Killed`, a third ends us."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only there can signals be handled
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a job in the background
                self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count == 1:
            self._run.signal = number
            self._run.ring()
        elif self._count == 2:
            raise Killed
        else:
            kill_children()
            os._exit(128 + self._run.signal)


def kill_children() -> None:
    """Kill the process groups that our children lead, without asking."""
    if sys.platform == "win32":
        return  # there are no process groups: what ignores the Ctrl-Break that it got at the first signal lives on
    for group in _led_by_children():
        try:
            os.killpg(group, signal.SIGKILL)
        except OSError:
            continue  # it has ended


def _led_by_children() -> list[int]:
    me = str(os.getpid())
    if sys.platform == "linux":
        table = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    table.append([name, *file.read().rpartition(") ")[2].split()[1:3]])
            except OSError:
                continue  # it ended meanwhile
    else:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,pgid="], capture_output=True, text=True, check=False)
        table = [line.split() for line in listing.stdout.splitlines()]
    return [int(pid) for pid, parent, group in table if parent == me and group == pid]


def leave_at_once(run: Run, screen: Screen) -> None:
    """End the process past whatever is blocked; take the table off the terminal if that can be had at once."""
    if screen.lock.acquire(timeout=0.1):
        screen.lock.release()
        try:
            screen.close()
        except OSError:
            pass  # nobody looks
    os._exit(128 + run.signal)

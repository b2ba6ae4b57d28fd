"""A pseudo-terminal, and what stands on it. No test is in here."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support import SOON, environment


class Emulator:
    """Just enough of a terminal to know what stands on it; refuses every sequence that the screen
    does not use."""

    def __init__(self, columns: int, height: int) -> None:
        self.columns, self.height = columns, height
        self.lines = [""]
        self.row = self.column = 0
        self.is_cursor_visible = True

    def feed(self, text: str) -> None:
        for part in re.findall("\x1b\\[[?]?[0-9;]*[A-Za-z]|\r|\n|[^\r\n\x1b]+|.", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part == "\x1b[J":
                del self.lines[self.row + 1:]
                self.lines[self.row] = self.lines[self.row][:self.column]
            elif found := re.fullmatch("\x1b\\[([0-9]+)A", part):
                assert int(found[1]) < self.height, "the table is higher than the terminal"
                self.row -= int(found[1])
                assert self.row >= 0
            elif part in ("\x1b[?25l", "\x1b[?25h"):
                self.is_cursor_visible = part.endswith("h")
            elif not re.fullmatch("\x1b\\[[0-9]+m", part):
                assert part.isprintable(), f"{part!r} reached the terminal"
                old = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = old[:self.column] + part + old[self.column + len(part):]
                self.column += len(part)


def on_terminal(
    *words: str,
    cwd: Path,
    act: Callable[[int, str], object] = lambda pid, text: None,
    columns: int = 100,
    height: int = 12,
    job: str | None = None,
    **env: str,
) -> tuple[int, str]:
    """Run the command line, or Python code, on a pseudo-terminal; return its exit code and all that
    it sent."""
    import fcntl
    import pty
    import struct
    import termios
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, columns, 0, 0))
    program = [sys.executable, "-m", "bgworker"] if job is None else [sys.executable, "-c", job]
    with subprocess.Popen(
        [*program, *words],
        cwd=cwd,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment(**{"PYTHONWARNINGS": "error", "PYTHONUTF8": "1", "TERM": "xterm", **env}),
        start_new_session=True,
    ) as proc:
        os.close(slave)
        sent = b""
        deadline = time.monotonic() + SOON
        try:
            while time.monotonic() < deadline:
                if select.select([master], [], [], 0.1)[0]:
                    try:
                        chunk = os.read(master, 65536)
                    except OSError:  # EIO: the other end is closed
                        break
                    if not chunk:
                        break
                    sent += chunk
                act(proc.pid, sent.decode(errors="replace"))
            return proc.wait(SOON), sent.decode()
        finally:
            if proc.poll() is None:
                proc.kill()
            os.close(master)

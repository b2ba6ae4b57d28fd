"""A command that is run again when it fails, and how long it may run: ``--retries`` and
``--timeout``.

The attempts of a command are one task. Each has its own time, counted from the start of its
process: what it waits for room to start in counts for nothing.
"""

from __future__ import annotations

import re
import signal
import subprocess
from argparse import ArgumentTypeError
from collections import deque
from itertools import count

from ..model.clock import monotonic
from ..model.errors import TaskTimedOut
from ..running.task import current_task
from ..words import took
from .options import seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..model.records import Source
    from ..shell.command import ShellCommand
    from .commands import Unusable

SHORTEST = 1.0
"""Seconds that a share of the median gives at least: what takes some milliseconds takes ten times
as long beside others."""

AT_ONCE = 3
"""Attempts that are made one after the other. Before the next one there is a pause of a tenth of a
second, and each pause is twice as long as the one before: what fails in a millisecond is not to
fill a history with thousands of attempts a minute."""

LONGEST_PAUSE = 10.0
"""Seconds between two attempts, at most."""

LATEST = 999
"""Commands of this run whose median counts: the latest ones."""


class TimeLimit:
    """How long each attempt of a command may run: so many seconds, or a share of what such commands
    took.

    Args:
        seconds: None is no limit.
        share: of a median; None is no share. It is the median of the earlier runs of a command;
            where there are none, of the commands of this run that have completed.
    """

    def __init__(self, seconds: float | None = None, share: float | None = None) -> None:
        self._seconds = seconds
        self._share = share
        self.median_of: Callable[[Source], float | None] = lambda source: None
        """Returns the median of a command's earlier runs in seconds; None if there are none."""
        self._latest: deque[float] = deque(maxlen=LATEST)  # seconds, of commands of this run

    @property
    def is_share(self) -> bool:
        return self._share is not None

    @property
    def is_any(self) -> bool:
        """Whether there is a limit at all."""
        return self.is_share or self._seconds is not None

    def beforehand(self, source: Source) -> float | None:
        """Return the seconds for a command, if they do not depend on this run."""
        return self._part(self.median_of(source)) if self.is_share else self._seconds

    def of_this_run(self) -> float | None:
        """Return the seconds for a command that has no earlier run; None as long as no command has
        completed. Any thread."""
        latest = sorted(self._latest.copy())
        return self._part(latest[len(latest) // 2] if latest else None)

    def note(self, seconds: float) -> None:
        """Note how long a command took that has completed. Any thread."""
        if self.is_share:
            self._latest.append(seconds)

    def _part(self, median: float | None) -> float | None:
        if median is None or self._share is None:
            return None
        return max(SHORTEST, self._share * median)


def time_limit(text: str) -> TimeLimit:
    """Read an option's value."""
    if not text.endswith("%"):
        return TimeLimit(seconds("or a share of the median such as 300%; leave it "
                                 "out for no limit")(text))
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?%", text) and float(text[:-1]) > 100:
        return TimeLimit(share=float(text[:-1]) / 100)
    raise ArgumentTypeError(f"expected more than 100% of the median, such as 300%, got "
                            f"{text[:80]!r}")


class Attempts:
    """A command, run until it completes or has failed often enough. The callable of a task.

    Args:
        call: the command.
        seconds: how long each attempt may run; None leaves that to ``limit``.
        most: how many attempts there may be; 0 is any number.
        on_start: called at the start of each, on the task's thread.
    """

    keeps_time = True  # see `Task`: the time of each attempt is kept here, not that of the task

    def __init__(self, call: ShellCommand | Unusable, seconds: float | None, most: int,
                 limit: TimeLimit, on_start: Callable[[], object]) -> None:
        self._call = call
        self._most = most
        self._limit = limit
        call.on_start = on_start
        if seconds is not None:
            call.limit = lambda: seconds
        elif limit.is_any:
            call.limit = limit.of_this_run

    @property
    def source(self) -> Source:
        """The command's text, as the task's source."""
        return self._call.source

    def __call__(self) -> int:
        """Run the command; see `ShellCommand.__call__`. What it raises is that of the last
        attempt."""
        for number in count(1):
            started = monotonic()
            try:
                code = self._call()
            except ChildProcessError:
                raise  # nobody knows how it ended: it may have completed
            except (subprocess.CalledProcessError, OSError, TaskTimedOut) as error:
                if number == self._most:
                    raise
                pause = pause_after(number)
                self._tell(number, f"{_how(error)} after {took(monotonic() - started)}", pause)
                if pause:
                    current_task().sleep(pause)
            else:
                self._limit.note(monotonic() - started)
                return code
        raise AssertionError("there is always a next number")

    def _tell(self, number: int, how: str, pause: float) -> None:
        of = f" of {self._most}" if self._most else ""
        when = f" in {took(pause)}" if pause else ""
        context = current_task()
        context.warning(f"bgworker: attempt {number}{of} {how}; trying again{when}")
        context.progress(0, None, f"attempt {number + 1}{of}")


def pause_after(number: int) -> float:
    """Return the seconds between an attempt that failed, from 1, and the next one."""
    if number < AT_ONCE:
        return 0.0
    return min(LONGEST_PAUSE, 0.1 * 2.0**min(number - AT_ONCE, 30))


def _how(error: Exception) -> str:
    """Return how an attempt ended, in the words that tasks have for it."""
    if isinstance(error, TaskTimedOut):
        return "timed out"
    if not isinstance(error, subprocess.CalledProcessError):
        return f"failed ({getattr(error, 'strerror', None) or error})"
    if error.returncode >= 0:
        return f"failed (exit code {error.returncode})"
    try:
        return f"failed ({signal.Signals(-error.returncode).name})"
    except ValueError:  # a real-time signal
        return f"failed (signal {-error.returncode})"

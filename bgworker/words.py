"""Statuses, times and failures in words, and text that can do no harm: what the command line and
the pages tell people. Pure functions.

What a task says is untrusted. Whatever could steer a terminal or reorder a line becomes a visible
escape before it is shown.
"""

from __future__ import annotations

import re
import signal
from contextlib import suppress
from datetime import datetime, timedelta, timezone

from .model.errors import ConfigurationError
from .model.events import TaskStatus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .model.events import TaskSnapshot

_WORDS = {TaskStatus.TIMED_OUT: "timed out", TaskStatus.SCHEDULED: "waiting"}

STATUSES = (
    TaskStatus.RUNNING,
    TaskStatus.SCHEDULED,
    TaskStatus.CREATED,
    *(status for status in TaskStatus if status.is_final),
)
"""In the order in which their counts are told."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?[smhdw])+")
_PART = re.compile(r"([0-9.]+)([smhdw])")
_LONGEST = 36_500
"""Days: what is longer than a hundred years leads out of the calendar."""


# ---------------------------------------------------------------- words to values

def duration(text: str) -> timedelta:
    """Return what "90s", "15m", "2h", "7d", "1w" or "1h30m" means.

    Raises:
        ConfigurationError: it means nothing, or more than a hundred years.
    """
    if _DURATION.fullmatch(text):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
        if seconds <= _LONGEST * _UNITS["d"]:
            return timedelta(seconds=seconds)
    raise ConfigurationError(
        f"expected a duration such as 90s, 15m, 2h, 7d or 1h30m, up to {_LONGEST}d, "
        f"got {text[:80]!r}"
    )


# ---------------------------------------------------------------- values to words

def word_for(status: TaskStatus) -> str:
    """Return what to call a status in front of people."""
    return _WORDS.get(status, status.value)


def now() -> datetime:
    """Return the time of day."""
    return datetime.now(timezone.utc)


def ago(then: datetime | None, now: datetime) -> str:
    """Return "12s ago", "5m ago", "7h ago", "3d ago", or the date of what is longer ago than two
    weeks."""
    if then is None:
        return "-"
    seconds = (now - then).total_seconds()
    if seconds < 1:
        return "now"  # or by another clock, which is ahead of ours
    for unit, limit in (("s", 60), ("m", 3600), ("h", 48 * 3600), ("d", 14 * 86_400)):
        if seconds < limit:
            return f"{int(seconds / _UNITS[unit])}{unit} ago"
    return then.strftime("%Y-%m-%d")


def took(seconds: float | None) -> str:
    """Return "3ms", "3.4s", "5m12s", "3h07m" or "2d04h"; "-" for what has not ended."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{max(seconds, 0.0) * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (
        f"{days}d{hour:02}h"
        if days
        else f"{hours}h{minute:02}m" if hours else f"{minutes}m{second:02}s"
    )


def duration_of(task: TaskSnapshot, now: datetime) -> float | None:
    """Return the seconds that a task ran, or has been running; None if it never started, or nobody
    knows its end."""
    if (
        task.duration is not None
        or task.started_utc is None
        or task.status is not TaskStatus.RUNNING
    ):
        return task.duration
    return max(0.0, (now - task.started_utc).total_seconds())


def stamp(time: datetime | None) -> str:
    """Return "2026-11-23 14:46:00 UTC"; "-" for none."""
    return "-" if time is None else time.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def why(task: TaskSnapshot) -> str:
    """Return in a few words why a task failed or was cancelled."""
    message = " ".join((task.failure_message or "").split())
    if task.failure_type == "subprocess.CalledProcessError":
        if found := re.search(r" exit status (\d+)\.$", message):
            return f"exit code {found[1]}"
        if found := re.search(
            r" died with (?:<Signals\.(\w+): \d+>|unknown signal (\d+))\.$", message
        ):
            return found[1] or f"signal {found[2]}"
    elif task.failure_type and not message.startswith(("[Errno ", "[WinError ")):
        message = f"{task.failure_type}: {message}"
    if message.startswith("["):
        message = message.partition("] ")[2]
    short = message if len(message) <= 500 else f"{message[:497]}..."
    return short or task.status.value


def is_command(task: TaskSnapshot) -> bool:
    """Tell whether a task is a command: the script of a Python function has a colon."""
    return task.script_id is not None and ":" not in task.script_id


def resumable_as(task: TaskSnapshot) -> str:
    """Return what the `resumable` function of a task was registered as; nothing for others."""
    mark = task.metadata.get("resumable")  # a program can write anything there
    name, version = (mark.get("name"), mark.get("version")) if isinstance(mark, dict) else ("", 0)
    is_one = isinstance(name, str) and isinstance(version, int)
    return f"{name}, version {version}" if is_one and name else ""


def exit_of(code: int, program: str | None = None) -> str:
    """Return how a command ended: "gzip: exit code 1", "gzip: SIGKILL"."""
    words = f"exit code {code}"
    if code < 0:
        words = f"signal {-code}"
        with suppress(ValueError):  # one without a name
            words = signal.Signals(-code).name
    return f"{program}: {words}" if program else words


def place_of(task: TaskSnapshot) -> str:
    """Return the traceback of a task that failed, or where one was at its deadline; nothing where
    that would tell of bgworker's own code, or the failure once more."""
    if is_command(task) and task.status is not TaskStatus.TIMED_OUT:
        return ""
    info = (task.invocation_info or "").rstrip("\n")
    failure = ": ".join(filter(None, (task.failure_type, task.failure_message)))
    is_once_more = info.endswith(failure) and "\n" not in info[:len(info) - len(failure)].strip()
    return "" if failure and is_once_more else info


def ending(task: TaskSnapshot) -> str:
    """Return how a task ended: "completed in 1.2s", "failed (exit code 3) after 5m12s"."""
    is_explained = task.status in (TaskStatus.FAILED, TaskStatus.CANCELLED)
    reason = f" ({why(task)})" if is_explained else ""
    link = "in" if task.status is TaskStatus.COMPLETED else "after"
    lasted = "" if task.duration is None else f" {link} {took(task.duration)}"
    return f"{word_for(task.status)}{reason}{lasted}"


def message_of(task: TaskSnapshot) -> str:
    """Return the most useful line about a task: why it failed, else its latest progress
    message."""
    if task.status in (TaskStatus.FAILED, TaskStatus.CANCELLED) and (
        task.failure_type or task.failure_message
    ):
        return why(task)
    return task.last_progress_message or task.failure_message or ""


# ---------------------------------------------------------------- harmless text

# Controls but the tab, marks and controls of text direction, line separators, annotations, tags,
# halves of characters.
_UNSHOWABLE = re.compile(
    "[\0-\x08\n-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def escaped(text: str) -> str:
    """Return the text with everything that could steer a terminal, or reorder a line, shown as an
    escape."""
    return _UNSHOWABLE.sub(lambda found: ascii(found[0])[1:-1], text.expandtabs(8))


# Source: ECMA-48, SGR and EL; \x1b(B is part of `tput sgr0`
_COLOURING = re.compile("\x1b(?:\\[[0-9;:]*[mK]|\\(B)")


def uncoloured(text: str) -> str:
    """Return the text without the sequences that only colour it."""
    return _COLOURING.sub("", text) if "\x1b" in text else text


def said(text: str) -> str:
    """Return what a task said as `escaped`, but for the sequences that only colour it: those go."""
    return escaped(uncoloured(text))


MOST_OF_A_LINE = 2**19
"""Characters of a line that are shown as one: tabs and escapes may make eight of each."""


def escaped_lines(text: str, shown: Callable[[str], str] = escaped) -> Iterator[str]:
    """Yield the lines of a text, `escaped` or `said`; a very long one comes as several."""
    start = 0
    while start >= 0:
        end = text.find("\n", start)
        stop = len(text) if end < 0 else end
        while stop - start > MOST_OF_A_LINE:
            yield shown(text[start:start + MOST_OF_A_LINE])
            start += MOST_OF_A_LINE
        yield shown(text[start:stop])
        start = end + 1 if end >= 0 else -1

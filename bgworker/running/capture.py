"""Copies of what a task's code prints, logs and warns, for the task's streams.

Everything runs on the thread that speaks. Guarantees, while a task with ``capture_output`` runs:

- Text that its context writes to ``sys.stdout`` and ``sys.stderr`` comes to its output and error
  streams in whole lines, an unfinished one at the task's end. Lines are gathered per stream and
  thread, so that threads which share the context do not mix inside a line. Of a line with carriage
  returns (a progress bar) only the last state comes. Lines longer than ``max_payload`` come in
  pieces.
- A log record that passes its logger's level and filters comes once, with its traceback and in no
  handler's format, to verbose (below INFO), output, warning or error (from ERROR), whatever
  handlers and ``propagate`` do with it.
- A warning that passes the filters comes once to the warning stream, also while somebody records
  warnings.
- The old places get everything as before, and raise as before. For other threads, tasks without
  capture, and contexts that outlive their task, all this costs one look-up of a context variable.

How. Stand-ins take the places of ``sys.stdout``, ``sys.stderr``, ``Logger.callHandlers`` (a root
handler would miss ``propagate=False`` and switch off ``lastResort``) and ``warnings._showwarnmsg``
(``catch_warnings`` puts `showwarning` back at any time) with the first such task, and stay: a
stream that comes and goes in the place of ``sys.stdout`` may be freed under another thread's
``print``, which crashes the interpreter (gh-130163, mended in 3.13.3). They hand down with capture
off, so that no text comes twice: neither a handler's line on ``sys.stderr`` nor the text of a
``sys.stdout`` that is a logger.

A stream that somebody else puts in the place of ``sys.stdout`` gets the text from then on and
stays; the next task to start captures it too. So ``redirect_stdout`` inside a task takes text from
its streams, and around it does not.
"""

from __future__ import annotations

import io
import logging
import sys
from contextvars import ContextVar
from threading import RLock, get_ident
from types import MethodType

from ..model.forks import in_child
from ..model.text import ask, last_state, pieces, text_of
from .context import current_task

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

    from .context import TaskContext
    Stream = Literal["output", "error", "warning", "verbose"]

_capturing: ContextVar[Capture | None] = ContextVar("bgworker_capture", default=None)


class Capture:
    """A context manager: copies what is said inside to the streams of ``context``, which is the
    `current_task()`."""

    def __init__(self, context: TaskContext) -> None:
        self._context: TaskContext | None = context
        self._max_payload = context._limits.max_payload
        context._flush = self.flush
        # By stream and thread: what was written since the last newline. Without a lock, although a
        # finaliser may print between any two steps, and the deadlines' thread may flush: each step
        # on the dict is atomic, so what was put in is taken out once.
        self._lines: dict[tuple[Stream, int], str] = {}

    def __enter__(self) -> None:
        with _lock:
            _stand_in()
        self._token = _capturing.set(self)

    def __exit__(self, *exc_info: object) -> None:
        _capturing.reset(self._token)
        self.flush()
        context, self._context = self._context, None  # from now on contexts that outlive the task,
        if context is not None:  # and still hold this, emit nothing
            context._flush = None

    @property
    def is_active(self) -> bool:
        """True in the task itself; False after its end, and in a task that inherited its
        context."""
        return self._context is current_task()

    def say(self, stream: Stream, text: str) -> None:
        """Emit the text, in pieces that are small enough to come whole."""
        context = self._context
        if context is not None:
            emit = getattr(context, stream)
            for piece in pieces(text, self._max_payload):
                emit(piece)

    def write(self, stream: Stream, text: str) -> None:
        """Gather the text, and emit each line that it completes."""
        key = stream, get_ident()
        line = self._lines.pop(key, "")
        line += text  # nobody else holds it, so it grows in place
        if "\n" in text or len(line) > self._max_payload:
            *whole, line = line.split("\n")
            for each in whole:
                self.say(stream, last_state(each))
            if len(line) > self._max_payload or "\r" in line:
                line = last_state(line) + "\r" * line.endswith("\r")  # a newline may follow it
                kept = (len(line) - 1) % self._max_payload + 1  # never nothing: the line goes on
                if early := line[:-kept]:
                    self.say(stream, early)
                line = line[-kept:]
        if line:
            self._lines[key] = line + self._lines.pop(key, "")

    def flush(self) -> None:
        """Emit every line that was begun. Any thread."""
        for key in list(self._lines):
            if rest := last_state(self._lines.pop(key, "")):
                self.say(key[0], rest)


class StandIn:
    """Stands in the place of something and hands down to it. By the odd names of its slots other
    copies of this package know it for one of ours."""

    __slots__ = ("bgworker_below", "bgworker_told", "__weakref__")
    bgworker_below: Any
    bgworker_told: Any  # Router: the stream. Tap: what makes stream and text of the arguments

    def __init__(self, below: Any, told: object) -> None:
        # a Router's own `__setattr__` is the old stream's
        object.__setattr__(self, "bgworker_below", below)
        object.__setattr__(self, "bgworker_told", told)


def _asked(function: Callable[[Any], Any]) -> Any:
    """Return a method that asks what stands below."""
    return lambda self: function(self.bgworker_below)


class Router(StandIn):
    """Stands in for ``sys.stdout`` or ``sys.stderr``, and shows its attributes, class, return
    values and exceptions."""

    __slots__ = ()

    def write(self, text: str, /) -> Any:
        """Write to the old stream and return what that returns."""
        capture = _capturing.get()
        if capture is None or not capture.is_active or not issubclass(type(text), str):
            return self.bgworker_below.write(text)
        exact = str.__str__(text)
        capture.write(self.bgworker_told, exact)
        try:
            return _hand_down(self.bgworker_below.write, text)
        except BaseException:
            if not exact.endswith("\n"):
                # `print` gives up now, and will not write it
                capture.write(self.bgworker_told, "\n")
            raise

    def writelines(self, lines: Any, /) -> Any:
        """Write each of the lines."""
        if _capturing.get() is None:
            return self.bgworker_below.writelines(lines)
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bgworker_below, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.bgworker_below, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.bgworker_below, name)

    # what Python asks of the type, not of the object; `structlog`, for one, keeps its locks by weak
    # references to streams

    def __eq__(self, other: object) -> bool:
        return self is other or bool(self.bgworker_below == getattr(other, "bgworker_below", other))

    def __enter__(self) -> Router:
        self.bgworker_below.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> Any:
        return self.bgworker_below.__exit__(*exc_info)

    __repr__, __hash__, __bool__ = _asked(repr), _asked(hash), _asked(bool)
    __dir__, __iter__, __next__ = _asked(dir), _asked(iter), _asked(next)

    if not TYPE_CHECKING:
        @property
        def __class__(self) -> type:
            # xml.sax, for one, asks isinstance(sys.stdout, io.TextIOBase)
            return type(self.bgworker_below)


class _Nowhere(io.TextIOBase):
    """Takes text as ``print`` does where ``sys.stdout`` is None (pythonw): nothing comes of it."""

    def write(self, text: str, /) -> int:
        return len(text)


class Tap(StandIn):
    """Stands in for the function, or the method of a class, that every warning or record
    passes."""

    __slots__ = ()

    def __get__(self, instance: object, owner: object = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args: Any) -> Any:
        capture = _capturing.get()
        if capture is None or not capture.is_active:
            return self.bgworker_below(*args)
        said = ask(self.bgworker_told, *args)
        if said is not None:
            capture.say(*said)
        return _hand_down(self.bgworker_below, *args)


def _of_record(logger: logging.Logger, record: logging.LogRecord) -> tuple[Stream, str]:
    level = record.levelno
    stream: Stream = (
        "error"
        if level >= logging.ERROR
        else (
            "warning"
            if level >= logging.WARNING
            else "output" if level >= logging.INFO else "verbose"
        )
    )
    # None where its arguments do not fit; the handlers report that, as ever
    text = ask(_text_of_record, record)
    return stream, text_of(record.msg) if text is None else text


def _text_of_record(record: logging.LogRecord) -> str:
    parts = [record.getMessage()]
    if record.exc_info or record.exc_text:
        parts.append(
            record.exc_text or logging.Formatter().formatException(record.exc_info or (None,) * 3)
        )
    return "\n".join([*parts, record.stack_info] if record.stack_info else parts)


def _of_warning(shown: Any) -> tuple[Stream, str]:
    return (
        "warning",
        f"{shown.filename}:{shown.lineno}: {shown.category.__name__}: {text_of(shown.message)}",
    )


def _hand_down(function: Callable[..., Any], *args: Any) -> Any:
    """Call what stood in our place with capture off, because the text has been emitted."""
    token = _capturing.set(None)
    try:
        return function(*args)
    finally:
        _capturing.reset(token)


_lock = RLock()  # guards our changes of the places; re-entrant because a finaliser may run a task
_nowhere = _Nowhere()


def _places() -> tuple[tuple[Any, str, type[StandIn], object], ...]:
    import warnings  # not before it is needed

    return (
        (sys, "stdout", Router, "output"),
        (sys, "stderr", Router, "error"),
        (logging.Logger, "callHandlers", Tap, _of_record),
        (warnings, "_showwarnmsg", Tap, _of_warning),
    )


def _stand_in() -> None:
    """Take every place in which we do not stand yet, not even below stand-ins of other copies."""
    for owner, name, kind, told in _places():
        if name not in vars(owner):
            continue
        below = found = vars(owner)[name]
        while not issubclass(type(found), StandIn) and hasattr(type(found), "bgworker_below"):
            found = found.bgworker_below
        if not issubclass(type(found), StandIn):
            setattr(owner, name, kind(_nowhere if below is None else below, told))


@in_child
def _renew_lock() -> None:
    """In a forked child: the lock may be held by a thread that is not here. The tasks are the
    parent's, and what is captured of them is silent here."""
    global _lock
    _lock = RLock()

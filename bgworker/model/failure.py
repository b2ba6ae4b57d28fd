"""How an exception becomes the texts of a failed task's record: type, message, traceback.

An exception is its author's code: its text, its notes and the loader of its module may raise, lie or take for ever. So
this runs on the task's thread before the task's end, and asks all of them through the guarded door; what Python itself
keeps of an exception (type, traceback, cause) is read where no subclass can hide it. However large an exception is and
whatever led to it, no more is made of it than fits.
"""

from __future__ import annotations

import builtins

from .errors import TaskTimedOut
from .text import ask, clean, fit, sanitise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from types import CodeType, TracebackType
    from typing import Any

MOST_SHOWN = 50
"""Exceptions in one traceback: the latest of a chain, the first of a group."""
MOST_FRAMES = 200
"""Frames of each, the latest."""
MOST_NOTES = 20
"""Notes of each."""

_BECAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
_DURING = "\nDuring handling of the above exception, another exception occurred:\n\n"

# As Python keeps them: no subclass and no metaclass stands before these.
_QUALNAME, _MODULE = [type.__dict__[name].__get__ for name in ("__qualname__", "__module__")]
_TRACEBACK, _CAUSE, _CONTEXT, _IS_ALONE = [BaseException.__dict__[name].__get__ for name in (
    "__traceback__", "__cause__", "__context__", "__suppress_context__")]
_GROUP: Any = getattr(builtins, "BaseExceptionGroup", None)  # from 3.11 on


def without_frames(error: BaseException, codes: Collection[CodeType]) -> BaseException:
    """Take the outermost frames, those that run one of ``codes``, out of an exception's traceback, and return it."""
    trace = _TRACEBACK(error)
    while trace is not None and any(trace.tb_frame.f_code is code for code in codes):
        trace = trace.tb_next
    return BaseException.with_traceback(error, trace)


def describe_failure(error: BaseException, max_bytes: int) -> tuple[str, str, str]:
    """Return type, message and traceback of an exception, each clean text of at most ``max_bytes``."""
    message = clean(error, max_bytes)
    return fit(_type_text(error), max_bytes)[0], message, _chain_text(error, message, set(), max_bytes)


def reason_of(error: BaseException, max_bytes: int) -> str:
    """Return why a `TaskCancelled` says that the task ends, as clean text of at most ``max_bytes``."""
    reason = ask(getattr, error, "reason")
    return (clean(reason, max_bytes) if reason is not None else "") or "task"


def _type_text(error: BaseException) -> str:
    """Return the name of a class, with its module unless that is ``builtins`` or that of bgworker's exceptions."""
    kind = type(error)
    module, name = _MODULE(kind), sanitise(_QUALNAME(kind))
    module = sanitise(module) if issubclass(type(module), str) else "?"
    return name if module in ("builtins", TaskTimedOut.__module__) else f"{module}.{name}"


def _chain_text(error: BaseException, message: str, shown: set[int], most: int) -> str:
    """Return the text of an exception and of what led to it, as Python orders them: the latest last.

    Args:
        shown: ids of the exceptions that were shown already.
        most: bytes; where that is too little the earliest are left out.
    """
    parts = []
    joint = ""
    while True:
        shown.add(id(error))
        part = fit(_text_of_one(error, message, shown, most) + joint, most)[0]
        parts.append(part)
        most -= len(part.encode())
        cause = _CAUSE(error)
        earlier = cause if cause is not None or _IS_ALONE(error) else _CONTEXT(error)
        if earlier is None or id(earlier) in shown or len(shown) >= MOST_SHOWN or most <= 0:
            return "".join(reversed(parts))
        error, joint, message = earlier, _DURING if cause is None else _BECAUSE, clean(earlier, most)


def _text_of_one(error: BaseException, message: str, shown: set[int], most: int) -> str:
    import traceback

    trace, text = _TRACEBACK(error), ""
    if trace is not None:
        frames = ask(traceback.format_tb, trace, -MOST_FRAMES) or _bare_frames(trace)
        text = f"Traceback (most recent call last):\n{fit(''.join(frames), most // 2)[0].rstrip()}\n"
    name = _type_text(error)
    text += f"{name}: {message}\n" if message else f"{name}\n"
    notes: Any = ask(getattr, error, "__notes__", None)
    if type(notes) in (list, tuple):
        text += "".join([f"{clean(note, most // 8)}\n" for note in notes[:MOST_NOTES]])
    for number, each in enumerate(_members_of(error), 1):
        if id(each) in shown or len(shown) >= MOST_SHOWN:
            return f"{text}  +---------------- and more\n"
        inner = _chain_text(each, clean(each, most), shown, most)
        text += f"  +---------------- {number} ----------------\n"
        text += "".join([f"    | {line}" for line in inner.splitlines(keepends=True)])
    return text


def _members_of(error: BaseException) -> tuple[BaseException, ...]:
    if _GROUP is None or not issubclass(type(error), _GROUP):
        return ()
    return _GROUP.__dict__["exceptions"].__get__(error)  # type: ignore[no-any-return]


def _bare_frames(trace: TracebackType | None) -> list[str]:
    """The frames without their lines of code, which a module's loader will not tell."""
    frames = []
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f'  File "{sanitise(code.co_filename)}", line {trace.tb_lineno}, in {sanitise(code.co_name)}\n')
        trace = trace.tb_next
    return frames[-MOST_FRAMES:]

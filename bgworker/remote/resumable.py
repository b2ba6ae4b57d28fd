"""Functions whose tasks another process may run again after a crash: `resumable` registers them.

A task of such a function is recorded with all of its arguments, as JSON, and with the name and
version of the function. So these alone say what is to be run: no module is imported for a task of a
file, and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import threading
from functools import partial
from types import FunctionType, MethodType, MappingProxyType

from ..model.checks import MOST_NAMED, number
from ..model.errors import ConfigurationError
from ..model.text import ENCODE, json_text, name_of, sanitise, show
from ..running.source import MARK, MarkedSource, source_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, TypeVar

    from ..model.records import TaskState

    F = TypeVar("F", bound=Callable[..., Any])

KEY = "resumable"
"""What the metadata of a task of such a function have its name and version under."""

MOST_DEPTH = 90
"""Most containers inside one another in an argument."""

_ROOM = 64
"""Bytes of metadata that are left for the id of the task that is run again."""

_registered: dict[str, ResumableSource] = {}
_lock = threading.Lock()  # guards changes of _registered


def resumable(name: str, *, version: int = 1) -> Callable[[F], F]:
    """Register a function, so that `Scheduler.resume` may run again what a crash has interrupted.

    The decorator returns the function itself. Its tasks run *at least once*: what it did before the
    crash it does again. Its arguments must be JSON values (None, bool, int, float, str, and lists
    and dicts of them); ``submit`` refuses all others, and records them in full.

    A task is run again only by a function with the same source, which is read here and now. Where
    none can be read (code from ``exec``, or files that are only there compiled) a change is not
    noticed: change ``version`` then.

    Args:
        name: what the function is known by in the history, whatever it is called and wherever it
            stands. One name, one function.
        version: a whole number from 0 on; change it when tasks of earlier versions can no longer be
            run by the function.

    Raises:
        ConfigurationError: name or version cannot be used, what is decorated is no function made
            with ``def``, or another function has the name.
    """
    if issubclass(type(name), FunctionType):
        raise ConfigurationError(
            f"resumable: expected a name, got the function {show(name)}; write "
            "@resumable(\"name\") above it")
    if (not issubclass(type(name), str) or not (exact := str.__str__(name)).strip()
            or exact != sanitise(exact) or len(exact.encode()) > MOST_NAMED):
        raise ConfigurationError(
            f"resumable: expected a name of 1 to {MOST_NAMED} bytes of text, got {show(name)}")
    version = number("version", version, least=0, whole=True)
    if version > MOST_VERSION:
        raise ConfigurationError(f"version: expected at most {MOST_VERSION}, got {version}")

    def register(function: F) -> F:
        if type(function) is not FunctionType:
            raise ConfigurationError(
                f"resumable({exact!r}): expected a function made with def, got {show(function)}; "
                "decorate the function itself, below @staticmethod")
        found = source_of(function)
        code = getattr(found, "code", None) or function.__code__
        source = ResumableSource(exact, version, function, code)  # type: ignore[arg-type]
        _ = source.script_hash  # reads the file now: later it may not be what runs here
        with _lock:
            other = _registered.get(exact)
            if other is not None and other.place != source.place:
                raise ConfigurationError(
                    f"resumable: the name {exact!r} belongs to {other.place} already, got "
                    f"{source.place}; give it another name")
            _registered[exact] = source
        setattr(function, MARK, source)
        return function

    return register


MOST_VERSION = 2**53
"""Greatest version: every reader of JSON knows it from the next."""


def registered() -> dict[str, ResumableSource]:
    """Return the functions that are registered in this process, by name."""
    with _lock:
        return dict(_registered)


class ResumableSource(MarkedSource):
    """The source of a registered function, which it holds."""

    __slots__ = ("key", "version", "function", "place")

    def __init__(self, key: str, version: int, function: FunctionType,
                 code: Any) -> None:
        super().__init__(function.__module__, function.__qualname__, code)
        self.key = key
        self.version = version
        self.function = function
        self.place = f"{function.__module__}.{function.__qualname__}"
        """Where it stands: a function that stands in the same place is the same, reloaded."""

    def __reduce__(self) -> Any:
        return type(None), ()  # some carry a function's attributes to other processes, none of ours

    def record(
        self, state: TaskState, function: Callable[..., Any], args: tuple[Any, ...],
        kwargs: dict[str, Any], metadata: Mapping[str, Any], max_bytes: int,
    ) -> Mapping[str, Any]:
        if function is not self.function:
            raise ConfigurationError(
                f"{self.place} is resumable as {self.key!r}, and this is not itself but "
                f"{_what(function)}; {_remedy(function)}")
        if KEY in metadata:
            raise ConfigurationError(
                f"metadata: the key {KEY!r} is bgworker's in tasks of {self.place}, which is "
                "resumable; choose another key")
        marked = {**metadata, KEY: {"name": self.key, "version": self.version}}
        text = json_text(marked)
        if len(text) > max_bytes - _ROOM and "rerun_of" not in marked or len(text) > max_bytes:
            raise ConfigurationError(
                f"metadata: those of tasks of {self.place}, which is resumable, must be recorded "
                f"in full, and have {len(text) + _ROOM} bytes with what bgworker adds; max_payload "
                f"is {max_bytes}: raise it, or leave something out")
        state.arguments = self._arguments_text(args, kwargs, max_bytes)
        state.metadata_json = text
        return MappingProxyType(marked)

    def _arguments_text(self, args: tuple[Any, ...], kwargs: dict[str, Any],
                        max_bytes: int) -> str:
        """Return arguments as JSON text that gives back exactly them."""
        budget = iter(range(max_bytes))  # each value takes a byte of the text
        try:
            for place, value in _arguments(args, kwargs):
                trouble = _trouble_with(value, MOST_DEPTH, budget)
                if trouble is not None:
                    path, what, remedy = trouble
                    at = f" at {path}" if path else ""
                    raise ConfigurationError(
                        f"{place} of {self.place}{at}: expected a JSON value, since the function "
                        f"is resumable, got {what}; {remedy}")
            text = ENCODE({"args": args, "kwargs": kwargs})
            size = f"{len(text)}"
        except _TooMany:
            text, size = "", f"more than {max_bytes}"
        if not text or len(text) > max_bytes:
            raise ConfigurationError(
                f"the arguments of {self.place}, which is resumable, must be recorded in full, and "
                f"have {size} bytes as JSON; max_payload is {max_bytes}: raise it, or give a path "
                "or an id that the function finds them by")
        return text


def _what(function: object) -> str:
    if issubclass(type(function), partial):
        return "a functools.partial of it"
    if type(function) is MethodType:
        return "a method of an object"
    return f"something around it ({show(function)})"


def _remedy(function: object) -> str:
    if issubclass(type(function), partial):
        return "submit the function with all of its arguments"
    if type(function) is MethodType:
        return "make it a function that finds the object by an id"
    return "put @resumable above its other decorators"


# ---------------------------------------------------------------- values

class _TooMany(Exception):
    pass


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for position, value in enumerate(args, 1):
        yield f"argument {position}", value
    for name, value in kwargs.items():
        if sanitise(name) != name:
            yield f"the name {show(name)} of an argument", name
        yield f"argument {name!r}", value


def _trouble_with(value: Any, depth: int, budget: Iterator[int]) -> tuple[str, str, str] | None:
    """Return what does not survive a round trip through JSON: where it is in the value, what it is,
    and what to give instead; None if all of it does.

    Raises:
        _TooMany: there are more values than the budget gives.
    """
    if next(budget, None) is None:
        raise _TooMany
    kind = type(value)
    if value is None or kind is bool:
        return None
    if kind is str:
        return None if sanitise(value) == value else (
            "", f"{show(value)}, which has a NUL or half a surrogate pair", "leave that out")
    if kind is int:
        return None if _has_text(value) else (
            "", "an integer too long to be read back", "give it as hex(...)")
    if kind is float:
        return None if math.isfinite(value) else ("", f"{value!r}", "give None instead")
    if kind is not list and kind is not dict:
        return "", f"{_article(name_of(kind))} {show(value)}", _instead(kind)
    if not depth:
        return "", f"more than {MOST_DEPTH} lists and dicts inside one another", "flatten it"
    if kind is list:
        items: Any = enumerate(list(value))
    else:
        items = list(value.items())
    for key, item in items:
        if kind is dict:
            if type(key) is not str:
                return "", (f"a dict with the key {show(key)}, which is "
                            f"{_article(name_of(type(key)))}"), "give it keys that are str"
            if sanitise(key) != key:
                return "", f"the key {show(key)}, which has a NUL or half a surrogate pair", (
                    "leave that out")
        trouble = _trouble_with(item, depth - 1, budget)
        if trouble is not None:
            return f"[{show(key)}]{trouble[0]}", *trouble[1:]
    return None


def _has_text(value: int) -> bool:
    try:
        int.__repr__(value)
    except ValueError:  # longer than sys.get_int_max_str_digits()
        return False
    return True


def _article(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"


def _instead(kind: type) -> str:
    for base, remedy in ((tuple, "give a list"), ((set, frozenset), "give a sorted list"),
                         (str, "give a plain str"), (int, "give a plain int"),
                         (float, "give a plain float"), (list, "give a plain list"),
                         (dict, "give a plain dict"), (bytes, "give text, or a path")):
        if issubclass(kind, base):
            return remedy
    return "give a text, a path or an id that the function finds it by"


def arguments_in(text: object) -> tuple[list[Any], dict[str, Any]] | None:
    """Return the arguments that a file has; None if they are not such as `ResumableSource.record`
    writes."""
    if not isinstance(text, str):
        return None
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.keys() != {"args", "kwargs"}:
        return None
    args, kwargs = found["args"], found["kwargs"]
    return (args, kwargs) if isinstance(args, list) and isinstance(kwargs, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(constant)

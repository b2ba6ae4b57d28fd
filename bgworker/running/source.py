"""Where a task's code comes from: names at submit, the source text when somebody first asks for it.

A source is shared by all tasks of one function. Reading it is file access and may run a module loader's code, so it
happens on the thread that builds the first snapshot, not on the task's; whatever it raises means "no source".
"""

from __future__ import annotations

import functools
from types import CodeType, FunctionType

from ..model.records import Source
from ..model.text import sanitise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")

_MOST_CACHED = 1024


class FunctionSource(Source):
    """The source of a Python function, or just the name of another callable."""

    __slots__ = ("module", "qualname", "_name", "_code", "_text", "_hash")

    def __init__(self, module: str | None, qualname: str, code: CodeType | None) -> None:
        super().__init__()
        self.module = module
        self.qualname = qualname
        self._name = sanitise(qualname)
        self._code = code
        self._text: str | None = None
        self._hash: str | None = None

    @property
    def name(self) -> str:
        """The qualified name: what a task is called unless it gets a name."""
        return self._name

    @property
    def script_id(self) -> str:
        return f"{sanitise(self.module or '?')}:{self._name}"

    @property
    def script_text(self) -> str | None:
        self._read()
        return self._text

    @property
    def script_hash(self) -> str:
        return self._hash or self._read()

    def _read(self) -> str:
        """Read the source once. Two threads may both do so; they find the same."""
        if self._hash is None:
            import hashlib
            import inspect

            try:
                self._text = sanitise(inspect.getsource(self._code)) if self._code else None
            except Exception:  # no file, no loader, a loader that fails: all mean that there is no source to record
                self._text = None
            named = self._text if self._text is not None else self.script_id
            self._hash = hashlib.sha256(named.encode("utf-8", "surrogatepass")).hexdigest()
        return self._hash


# id(code) -> its source; the entry holds the code object, so the id is not reused. Keyed by id because hashing a code
# object walks its constants (over 1 us), and by code rather than function so that closures share an entry and no
# function is kept alive.
_cache: dict[int, FunctionSource] = {}


def source_of(function: Callable[..., Any]) -> Source:
    """Return where ``function`` comes from, looking through ``functools.partial``, wrappers and bound methods."""
    code: CodeType | None
    module: str | None
    if type(function) is FunctionType and not function.__dict__:
        code, module, qualname = function.__code__, function.__module__, function.__qualname__
    else:
        own = _attribute(function, "source", Source)
        if own is not None:
            return own
        function = _innermost(function)
        code = _attribute(function, "__code__", CodeType)
        module = _attribute(function, "__module__", str)
        qualname = _attribute(function, "__qualname__", str) or type(function).__qualname__
    found = _cache.get(id(code))
    if found is None or found.qualname != qualname or found.module != module:  # one code object may serve several names
        found = FunctionSource(module, qualname, code)
        if code is not None:
            if len(_cache) >= _MOST_CACHED:
                _cache.clear()
            _cache[id(code)] = found
    return found


def _innermost(function: Any) -> Any:
    innermost = function
    for _ in range(100):  # a bound, because a wrapper may wrap itself
        if isinstance(innermost, functools.partial):
            innermost = innermost.func
        elif (wrapped := _attribute(innermost, "__wrapped__", object)) is not None:
            innermost = wrapped
        elif (method := _attribute(innermost, "__func__", object)) is not None:
            innermost = method
        else:
            break
    if _attribute(innermost, "__qualname__", str) or not callable(innermost):
        return innermost
    return type(innermost).__call__


def _attribute(owner: Any, name: str, kind: type[T]) -> T | None:
    """Return an attribute of that type; None where there is none, or where asking for it raises, as some proxies do."""
    try:
        value = getattr(owner, name, None)
    except Exception:
        return None
    return value if isinstance(value, kind) else None

"""Where a task's code comes from: names at submit, the source text when somebody first asks for it.

A source is shared by all tasks of one function. Its text is read where a record is first encoded,
on a sink's thread, or earlier by whoever marks the function: from the file, from what `linecache`
holds (a notebook's cells, say) or from a zip archive. Other loaders, and modules, are not asked:
they are somebody's code. Where anything goes wrong there is no source.
"""

from __future__ import annotations

import functools
import sys
from types import CodeType, FunctionType, ModuleType
from zipimport import zipimporter

from ..model.records import Source
from ..model.text import ask, sanitise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeVar

    from ..model.records import TaskState

    T = TypeVar("T")

_MOST_CACHED = 1024


class FunctionSource(Source):
    """The source of a Python function, or just the name of another callable; all in clean text."""

    __slots__ = ("module", "qualname", "_name", "_script_id", "code", "_text", "_hash")

    def __init__(self, module: str | None, qualname: str, code: CodeType | None) -> None:
        super().__init__()
        self.module = module
        self.qualname = qualname
        self._name = sanitise(qualname)
        self._script_id = f"{sanitise(module or '?')}:{self._name}"
        self.code = code
        self._text: str | None = None
        self._hash: str | None = None

    @property
    def name(self) -> str:
        """The qualified name: what a task is called unless it gets a name."""
        return self._name

    @property
    def script_id(self) -> str:
        return self._script_id

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

            text = None if self.code is None else ask(_block_of, self.code, self.module)
            self._text = sanitise(text) if text else None
            self._hash = hashlib.sha256((self._text or self.script_id).encode()).hexdigest()
        return self._hash


class MarkedSource(FunctionSource):
    """The source of a function that a decorator has marked: it has a say in what is recorded of its
    tasks. The mark is this very object, as an attribute of the function."""

    __slots__ = ()

    is_marked = True

    def record(
        self, state: TaskState, function: Callable[..., Any], args: tuple[Any, ...],
        kwargs: dict[str, Any], metadata: Mapping[str, Any], max_bytes: int,
    ) -> Mapping[str, Any]:
        """Write arguments and metadata into the state of a new task, and return the metadata that
        the task shows. On the submitter's thread.

        Args:
            function: what was submitted, and led to this source.

        Raises:
            ConfigurationError: they cannot be recorded so.
        """
        raise NotImplementedError


MARK = "_bgworker_mark"
"""The attribute that holds a function's `MarkedSource`."""


def _block_of(code: CodeType, module_name: str | None) -> str:
    """Return the lines of a function."""
    import inspect
    import linecache

    linecache.checkcache(code.co_filename)
    held = linecache.cache.get(code.co_filename, ())
    if len(held) == 1:  # not lines, but a loader that is to be asked for them
        del linecache.cache[code.co_filename]
    lines = linecache.getlines(code.co_filename)
    module = sys.modules.get(module_name or "")
    if (
        not lines
        and type(module) is ModuleType
        and type(loader := vars(module).get("__loader__")) is zipimporter
    ):
        lines = (loader.get_source(module.__name__) or "").splitlines(keepends=True)
    return "".join(inspect.getblock(lines[code.co_firstlineno - 1:]))


# id(code) -> its source; the entry holds the code object, so the id is not reused. Keyed by id
# because hashing a code object walks its constants (over 1 us), and by code rather than function so
# that closures share an entry and no function is kept alive.
_cache: dict[int, FunctionSource] = {}


def source_of(function: Callable[..., Any]) -> Source:
    """Return where ``function`` comes from, looking through ``functools.partial``, wrappers and
    bound methods.
    """
    if type(function) is FunctionType and not function.__dict__:
        found = _cache.get(id(function.__code__))
        if (
            found is not None
            and found.module is function.__module__
            and found.qualname is function.__qualname__
        ):
            return found
    else:
        own = _attribute(function, "source", Source)
        if own is not None:
            return own
        if (marked := _mark_of(function)) is not None:
            return marked
        function = _innermost(function)
        if (marked := _mark_of(function)) is not None:
            return marked  # a partial or a method of it, which the mark judges
    code = _attribute(function, "__code__", CodeType)
    module = _attribute(function, "__module__", str)  # one may set it to anything
    qualname = _attribute(function, "__qualname__", str) or _QUALNAME(type(function))
    found = _cache.get(id(code))
    if found is None or found.qualname != qualname or found.module != module:
        # one code object may serve several names
        found = FunctionSource(module, qualname, code)
        if code is not None:
            if len(_cache) >= _MOST_CACHED:
                _cache.clear()
            _cache[id(code)] = found
    return found


def _mark_of(function: object) -> MarkedSource | None:
    if type(function) is not FunctionType:
        return None
    mark = function.__dict__.get(MARK)
    return mark if issubclass(type(mark), MarkedSource) else None


_QUALNAME: Callable[[type], str] = type.__dict__["__qualname__"].__get__


def _innermost(function: Any) -> Any:
    innermost = function
    for _ in range(100):  # a bound, because a wrapper may wrap itself
        if issubclass(type(innermost), functools.partial):
            innermost = functools.partial.func.__get__(innermost)
        elif (wrapped := _attribute(innermost, "__wrapped__", object)) is not None:
            innermost = wrapped
        elif (method := _attribute(innermost, "__func__", object)) is not None:
            innermost = method
        else:
            break
    if _attribute(innermost, "__qualname__", str) or not callable(innermost):
        return innermost
    return ask(getattr, type(innermost), "__call__")


def _attribute(owner: Any, name: str, kind: type[T]) -> T | None:
    """Return an attribute of that type; None where there is none, or where the object raises when
    it is asked, as some proxies do.
    """
    value = ask(getattr, owner, name, None)
    if not issubclass(type(value), kind):
        return None
    return str.__str__(value) if kind is str else value  # type: ignore[return-value]

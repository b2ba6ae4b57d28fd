"""How calls are handed to a scheduler: ``submit`` and ``map``, and the settings of the tasks that
come of them.

All of it runs on the submitter's thread. Whatever a setting refuses is refused there, before a task
exists.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from itertools import islice
from types import MappingProxyType

from ..model.checks import flag, named, number
from ..model.clock import monotonic
from ..model.errors import ConfigurationError
from ..model.text import fit_json, json_text, show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, Coroutine, ParamSpec, TypeVar, overload

    from ..model.records import TaskState
    from .source import MarkedSource
    from .task import Task

    P = ParamSpec("P")
    T = TypeVar("T")
    Submit = Callable[["TaskOptions", Callable[..., Any], tuple[Any, ...], dict[str, Any]],
                      "Task[Any]"]
else:
    def overload(function):
        return None


class Submits:
    """What a scheduler and its `TaskOptions` have in common: both take calls."""

    __slots__ = ()

    if TYPE_CHECKING:
        @property
        def _settings(self) -> TaskOptions: ...
        @property
        def _submit(self) -> Submit: ...

    def _finder(self) -> Callable[[], Submits | None]:
        """Return what an iterator of `map` finds this by, as long as there is more to submit."""
        return lambda: self

    @overload
    def submit(
        self, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Task[T]: ...

    @overload
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Task[T]: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Task[Any]:
        """Queue ``fn(*args, **kwargs)`` and return its `Task`. All keywords go to ``fn``; settings
        go through `Scheduler.options`.

        A coroutine that ``fn`` returns, because it is an ``async def`` or wraps one, runs on an
        event loop of its worker; the task's result is the coroutine's.

        Context variables are captured now. Any thread; never blocks.

        Raises:
            ShutdownError: after `shutdown`, at interpreter exit, or when the initializer failed;
                also a ``RuntimeError``.
            PendingFull: ``max_pending`` tasks wait already; also a ``queue.Full``.
            PoolStuck: every thread is stuck past its task's deadline, ``max_stuck`` of them were
                replaced.
        """
        return self._submit(self._settings, fn, args, kwargs)

    @overload
    def map(
        self,
        fn: Callable[..., Coroutine[Any, Any, T]],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]: ...

    @overload
    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]: ...

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Submit a call for each item; return an iterator over the results, in order, as
        ``Executor.map`` does since 3.14.

        Args:
            timeout: seconds from this call for all of the results; the tasks' own timeout is a
                setting of `Scheduler.options`.
            chunksize: means nothing here, as in ``ThreadPoolExecutor``.
            buffersize: most calls whose results have not been taken; None submits all at once. On
                every Python.
        """
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        find = self._finder()
        until = None if timeout is None else monotonic() + timeout
        items = zip(*iterables)
        tasks: deque[Task[Any]] = deque()

        def submit(most: int | None) -> None:
            if (submitter := find()) is not None:
                tasks.extend(submitter.submit(fn, *args) for args in islice(items, most))

        def results() -> Iterator[Any]:
            try:
                while tasks:
                    if buffersize is not None:
                        submit(1)
                    # not by a name, which would hold the task while its result is elsewhere
                    yield _result_or_cancel(tasks.popleft(), until)
            finally:
                for task in tasks:
                    task.cancel()

        submit(buffersize)
        return results()


def _result_or_cancel(task: Task[Any], until: float | None) -> Any:
    try:
        return task.result(None if until is None else until - monotonic())
    finally:
        task.cancel()
        del task  # the traceback holds this frame, which would hold the task


class TaskOptions(Submits):
    """Settings for the tasks submitted through it, from `Scheduler.options`. Immutable; use it as
    often as you like."""

    __slots__ = (
        "_submit",
        "_name",
        "_timeout",
        "_metadata",
        "_metadata_json",
        "_capture_output",
        "_record_source",
        "_record_arguments",
        "_record_result",
        "_is_special",
        "_follows_run",
    )
    _submit: Submit

    def __init__(
        self,
        submit: Submit | None,
        *,
        name: str | None = None,
        timeout: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        capture_output: bool,
        record_source: bool,
        record_arguments: bool,
        record_result: bool,
    ) -> None:
        if submit is not None:  # a Scheduler's own defaults lack it: it would be a cycle
            self._submit = submit
        self._name = None if name is None else named("name", name)
        self._timeout = number("timeout", timeout, above=0, optional=True)
        self._metadata, self._metadata_json = _frozen(metadata)
        self._capture_output = flag("capture_output", capture_output)
        self._record_source = flag("record_source", record_source)
        self._record_arguments = flag("record_arguments", record_arguments)
        self._record_result = flag("record_result", record_result)
        self._is_special = bool(
            self._timeout or self._metadata_json or self._record_source or self._record_arguments
        )
        self._follows_run = self._capture_output or self._record_result

    @property
    def _settings(self) -> TaskOptions:
        return self

    def _apply(
        self, state: TaskState, function: Callable[..., Any], args: tuple[Any, ...],
        kwargs: dict[str, Any], max_bytes: int,
    ) -> Mapping[str, Any]:
        """Write what is set here, or marked at its function, into the state of a new task; return
        the metadata that the task shows."""
        state.timeout = self._timeout
        if self._metadata_json:
            state.metadata_json = fit_json(self._metadata_json, max_bytes)[0]
        if self._record_source:
            state.record_source = True
        if state.source is not None and state.source.is_marked:
            source: MarkedSource = state.source  # type: ignore[assignment]
            return source.record(state, function, args, kwargs, self._metadata, max_bytes)
        if self._record_arguments:
            state.arguments = fit_json(json_text({"args": args, "kwargs": kwargs}), max_bytes)[0]
        return self._metadata


class _Off(int):
    """What a setting is that nobody has given: False, unless the environment switches it on."""

    def __repr__(self) -> str:
        return "False"


OFF: bool = _Off()  # type: ignore[assignment]

_CAPTURES = {"output": "capture_output", "arguments": "record_arguments",
             "source": "record_source", "result": "record_result"}
"""Word of the environment variable BGWORKER_CAPTURE -> setting of a Scheduler."""


def with_environment(**settings: bool) -> dict[str, Any]:
    """Return settings of a Scheduler; those that were left `OFF` as the environment variable
    BGWORKER_CAPTURE has them.

    Raises:
        ConfigurationError: it has a word that means nothing.
    """
    words = [word.strip() for word in os.environ.get("BGWORKER_CAPTURE", "").split(",")]
    for word in words:
        if word and word not in _CAPTURES:
            raise ConfigurationError(
                f"the environment variable BGWORKER_CAPTURE: expected some of "
                f"{', '.join(_CAPTURES)}, separated by commas, got {show(word)}; correct or unset "
                "it")
    on = {_CAPTURES[word] for word in words if word}
    return {name: name in on if value is OFF else value for name, value in settings.items()}


def _frozen(metadata: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], str]:
    """Return a read-only copy of the metadata, with JSON values only, and its JSON text."""
    if metadata is None:
        return MappingProxyType({}), ""
    text = json_text(metadata) if issubclass(type(metadata), Mapping) else ""
    if not text.startswith("{"):  # no mapping, or one that will not tell what is in it
        raise ConfigurationError(
            f"metadata: expected a mapping of JSON values, got {show(metadata)}"
        )
    return MappingProxyType(json.loads(text)), text

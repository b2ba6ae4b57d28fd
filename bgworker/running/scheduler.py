"""The `Scheduler`: an executor whose tasks have an id, a status, progress, streams, a timeout, and
a history.

It puts the parts together (a pool that runs, a dispatcher that delivers, a memory of finished
tasks) and holds no thread itself. None of the parts holds the Scheduler, so that one that is
forgotten is collected: its queued tasks still run and its sinks are flushed.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import weakref
from collections.abc import Mapping
from time import time_ns
from types import MappingProxyType

from ..delivery.dispatcher import Dispatcher
from ..model.checks import MOST_LISTED, choice, flag, named, number
from ..model.clock import monotonic
from ..model.enums import TaskStatus
from ..model.errors import ConfigurationError, ShutdownError
from ..model.ids import new_id, new_run_id
from ..model.records import TaskState
from ..model.text import fit_json, json_text, listed, show
from .context import Limits
from .dropin import DropIn, default_workers, map_calls, number_of_workers
from .finished import Memory
from .pool import Pool
from .source import source_of
from .task import Task
from .variables import captured

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from typing import Any, Coroutine, Literal, ParamSpec, TypeVar, overload

    from ..delivery.options import SinkOptions
    from ..delivery.registry import Registry
    from ..delivery.subscription import Subscription
    from ..model.events import Event, EventType, TaskSnapshot
    from ..model.health import FlushReport, SchedulerHealth, SinkHealth
    from ..sinks.base import Sink

    P = ParamSpec("P")
    T = TypeVar("T")
else:
    def overload(function):
        return None


_NO_KEYWORDS: dict[str, Any] = {}


class TaskOptions:
    """Settings for the tasks submitted through it, from `Scheduler.options`. Immutable; use it as
    often as you like."""

    __slots__ = (
        "_scheduler",
        "_name",
        "_timeout",
        "_metadata",
        "_metadata_json",
        "_capture_output",
        "_record_source",
        "_record_arguments",
        "_is_special",
    )

    def __init__(self, scheduler: Scheduler | None, name: str | None, timeout: float | None,
                 metadata: Mapping[str, Any] | None, capture_output: bool, record_source: bool,
                 record_arguments: bool) -> None:
        self._scheduler = scheduler
        self._name = None if name is None else named("name", name)
        self._timeout = number("timeout", timeout, above=0, optional=True)
        self._metadata, self._metadata_json = _frozen(metadata)
        self._capture_output = flag("capture_output", capture_output)
        self._record_source = flag("record_source", record_source)
        self._record_arguments = flag("record_arguments", record_arguments)
        self._is_special = bool(
            self._timeout or self._metadata_json or self._record_source or self._record_arguments
        )

    def apply(
        self, state: TaskState, args: tuple[Any, ...], kwargs: dict[str, Any], max_bytes: int
    ) -> None:
        """Write what is set here into the state of a new task."""
        state.timeout = self._timeout
        if self._metadata_json:
            state.metadata_json = fit_json(self._metadata_json, max_bytes)[0]
        if self._record_source:
            state.record_source = True
        if self._record_arguments:
            state.arguments = fit_json(json_text({"args": args, "kwargs": kwargs}), max_bytes)[0]

    @overload
    def submit(
        self, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Task[T]: ...

    @overload
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Task[T]: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Task[Any]:
        """Submit a call with these settings; see `Scheduler.submit`."""
        assert self._scheduler is not None  # only a Scheduler's own defaults lack it
        return self._scheduler._submit(self, fn, args, kwargs)

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
        """Like `concurrent.futures.Executor.map`, each call a task with these settings.

        Args:
            timeout: seconds from this call for all of the results; the tasks' own timeout is a
                setting of the options.
        """
        return map_calls(lambda: self, fn, iterables, timeout, buffersize)


class Scheduler(DropIn):
    """Runs callables on background threads and records what they did. A drop-in for
    ``ThreadPoolExecutor``.

    Args:
        max_workers: threads that run tasks; None is min(32, CPUs + 4), as in
            ``ThreadPoolExecutor``.
        thread_name_prefix: another word for ``name``, in the place where ``ThreadPoolExecutor`` has
            it.
        initializer: called with ``initargs`` in each worker thread before its first task. The
            context variables that it sets are set in every task.
        name: prefix of the names of all threads.
        sinks: where the record goes: sinks, or specifications such as ``"jsonl:debug.jsonl"``.
            Those of the environment variable ``BGWORKER_SINKS`` are added.
        max_pending: most tasks that wait while every worker has one; ``submit`` raises
            `PendingFull` beyond it. None is no bound.
        keep_finished: newest finished tasks that `tasks` and `get` still know; None keeps all, 0
            none.
        keep_seconds: for how long they do; None is for ever.
        max_stuck: most threads beyond ``max_workers`` while some are stuck in tasks past their
            deadline. Then the pool goes on with fewer workers; when none is left, ``submit`` raises
            `PoolStuck`. None is no bound.
        close_timeout: seconds that all sinks together get at shutdown.
        capture_output, record_source, record_arguments: defaults of `options`.
        max_payload: most bytes of one stream event's text, of a failure's, and of a task's
            arguments and metadata. JSON that is larger gives way to ``{"truncated": <its bytes>,
            "head": "<its beginning>"}``.
        oversize: whether a larger one is cut ("truncate") or refused and counted ("reject").
        progress_interval: seconds between two progress events of a task ...
        progress_step: ... unless it moved by so many percent.

    Raises:
        ConfigurationError: a setting has a value that cannot be used; also a ``ValueError``.
        SinkError: a sink cannot be opened.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        thread_name_prefix: str | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        name: str = "bgworker",
        sinks: Iterable[Sink | str] = (),
        max_pending: int | None = None,
        keep_finished: int | None = 1000,
        keep_seconds: float | None = 1800.0,
        max_stuck: int | None = 256,
        close_timeout: float = 5.0,
        capture_output: bool = False,
        record_source: bool = False,
        record_arguments: bool = False,
        max_payload: int = 65536,
        oversize: Literal["truncate", "reject"] = "truncate",
        progress_interval: float = 0.1,
        progress_step: float = 1.0,
    ) -> None:
        if max_workers is None:
            max_workers = default_workers()
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a callable, got {show(initializer)}")
        if issubclass(type(sinks), str):
            raise ConfigurationError(
                f"sinks: expected a list of sinks or specifications, got the string {show(sinks)}; "
                f"write [{show(sinks)}]"
            )
        given: list[Sink | str] | None = listed(sinks, MOST_LISTED)
        if given is None:
            raise ConfigurationError(
                f"sinks: expected a list of sinks or specifications, got {show(sinks)}"
            )
        if _is_exiting:
            raise ShutdownError("cannot make a Scheduler: the interpreter is shutting down")
        max_workers = number_of_workers(max_workers)
        max_pending = number("max_pending", max_pending, least=1, whole=True, optional=True)
        max_stuck = number("max_stuck", max_stuck, least=0, whole=True, optional=True)
        close_timeout = number("close_timeout", close_timeout, least=0)
        prefix = (
            "" if thread_name_prefix is None else named("thread_name_prefix", thread_name_prefix)
        )
        self._name = name = prefix or named("name", name)
        self._limits = Limits(number("max_payload", max_payload, least=64, whole=True),
                              choice("oversize", oversize, ("truncate", "reject")),
                              number("progress_interval", progress_interval, least=0),
                              number("progress_step", progress_step, above=0))
        self._run_id = new_run_id(time_ns())
        self._memory = Memory(
            number("keep_finished", keep_finished, least=0, whole=True, optional=True),
            number("keep_seconds", keep_seconds, least=0, optional=True),
        )
        self._dispatcher = Dispatcher(name, self._memory.retire, close_timeout)
        self._made_registry: Registry | None = None
        self._pool = Pool(
            max_workers,
            name,
            initializer,
            initargs,
            max_pending,
            max_stuck,
            self._dispatcher.finish,
        )
        # without the Scheduler: a cycle would let a forgotten one wait for the garbage collector
        self._defaults = TaskOptions(
            None, None, None, None, capture_output, record_source, record_arguments
        )
        _live[self._pool] = self._dispatcher
        _schedulers.add(self)
        # a forgotten Scheduler winds down. Its pool is closed on the dispatcher's thread: the
        # garbage collector may run right inside the pool, which holds its lock
        weakref.finalize(self, _wind_down, self._dispatcher, self._pool).atexit = False
        try:
            for sink in given:
                self.register_sink(sink)
            if os.environ.get("BGWORKER_SINKS"):
                self._registry.register_of_environment()
        except BaseException:
            self.shutdown(wait=False)
            raise

    @property
    def _registry(self) -> Registry:
        """The sinks and subscriptions. Made, and its modules loaded, when it is first asked for."""
        with self._dispatcher.lock:
            if self._made_registry is None:
                # A sink's thread needs it for its first event. It is loaded here, because a fork
                # in the middle of an import leaves the child with half a module, for ever.
                import hashlib  # noqa: F401

                from ..delivery.registry import Registry

                self._made_registry = self._dispatcher.sinks = Registry(
                    self._dispatcher, self._name, self._dispatcher.close_timeout
                )
            return self._made_registry

    def _start_afresh(self) -> None:
        self._run_id = new_run_id(time_ns())
        self._memory.start_afresh()

    @property
    def run_id(self) -> str:
        """Id of this Scheduler in this process: 32 hex digits."""
        return self._run_id

    @overload
    def submit(
        self, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Task[T]: ...

    @overload
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Task[T]: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Task[Any]:
        """Queue ``fn(*args, **kwargs)`` and return its `Task`. All keywords go to ``fn``; settings
        go through `options`.

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
        return self._submit(self._defaults, fn, args, kwargs)

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
        ``Executor.map``.

        Args:
            timeout: seconds from this call for all of the results.
            chunksize: means nothing here, as in ``ThreadPoolExecutor``.
            buffersize: most calls whose results have not been taken; None submits all at once. On
                every Python.
        """
        return map_calls(weakref.ref(self), fn, iterables, timeout, buffersize)

    def options(
        self,
        *,
        name: str | None = None,
        timeout: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        capture_output: bool | None = None,
        record_source: bool | None = None,
        record_arguments: bool | None = None,
    ) -> TaskOptions:
        """Return settings with ``submit`` and ``map`` of their own.

        Args:
            name: what the task is called; None takes the callable's qualified name.
            timeout: seconds that the task may run, counted from its start; None is no limit.
            metadata: a mapping of JSON values that every event of the task's life cycle carries;
                copied now.
            capture_output: whether ``print``, ``logging`` and ``warnings`` of the task go to its
                streams too.
            record_source: whether the record holds the function's source text; its hash is always
                there.
            record_arguments: whether the record holds the arguments, as JSON.
            The last three take None for the Scheduler's default.
        """
        defaults = self._defaults
        return TaskOptions(
            self,
            name,
            timeout,
            metadata,
            defaults._capture_output if capture_output is None else capture_output,
            defaults._record_source if record_source is None else record_source,
            defaults._record_arguments if record_arguments is None else record_arguments,
        )

    def _submit(self, options: TaskOptions, fn: Callable[..., T], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> Task[T]:
        source = source_of(fn)
        now = time_ns()
        state = TaskState(new_id(now), options._name or source.name, self._run_id, now, source)
        if options._is_special:
            options.apply(state, args, kwargs, self._limits.max_payload)
        dispatcher = self._dispatcher
        task: Task[T] = Task(state, self._pool, dispatcher, self._limits, options._metadata)
        state.handle = weakref.ref(task)
        if options._capture_output:
            task._captures_output = True
        if not dispatcher.has_started:
            dispatcher.start()
        self._memory.add(state)
        try:
            # an empty dict of its own would only be work for the garbage collector
            self._pool.put(task, (fn, args, kwargs or _NO_KEYWORDS, captured()))
        except BaseException:
            self._memory.forget(state)
            raise
        return task

    def tasks(self, *, status: TaskStatus | str | None = None) -> list[TaskSnapshot]:
        """Return the tasks that run, wait, or have finished and are still kept, in the order of
        their creation.

        Args:
            status: only those with this status.
        """
        wanted = None if status is None else TaskStatus(
            choice("status", status, tuple(each.value for each in TaskStatus)))
        # the oldest may have become too old meanwhile
        self._dispatcher.call(lambda: self._memory.retire([]))
        snapshots = (state.snapshot_now() for state in self._memory.states())
        return [each for each in snapshots if wanted is None or each.status is wanted]

    def get(self, task_id: str) -> TaskSnapshot:
        """Return one task.

        Raises:
            KeyError: no task has this id, or it has finished and is kept no longer.
        """
        # it may have become too old meanwhile
        self._dispatcher.call(lambda: self._memory.retire([]))
        return self._memory.state(task_id).snapshot_now()

    def task(self, task_id: str) -> Task[Any]:
        """Return the task with that id. Its submitter need not keep it while it waits or runs.

        Raises:
            KeyError: as `get`; also when the task has ended and nobody holds it, since then its
                result is gone.
        """
        self._dispatcher.call(lambda: self._memory.retire([]))
        state = self._memory.state(task_id)
        found: Task[Any] | None = None if state.handle is None else state.handle()
        if found is None:
            raise KeyError(
                f"{state.id}: the task has ended, and nobody holds it; get() has its record"
            )
        return found

    def resize(self, max_workers: int) -> None:
        """Change the number of workers, up or down, while tasks run. A worker too many ends after
        its task."""
        self._pool.resize(number_of_workers(max_workers))

    def health(self) -> SchedulerHealth:
        """Return how the workers fare: how many there are, what waits, which threads are stuck on
        what. Any thread."""
        return self._pool.health(self._dispatcher.late_events())

    def subscribe(
        self,
        callback: Callable[[Event], object] | None = None,
        *,
        task: Task[Any] | str | None = None,
        types: Collection[EventType | str] | None = None,
        maxsize: int = 10_000,
        back_pressure: bool = False,
    ) -> Subscription:
        """Return the events from now on, to iterate over, to poll, or handed to ``callback`` on a
        thread of its own.

        Args:
            callback: called with each event, one after the other; what it raises is logged.
            task: a task or its id: only its events, beginning with those that are still in memory;
                the subscription ends with its terminal event.
            types: only events of these types.
            maxsize: most stream events that wait for the reader; beyond it the oldest are dropped,
                and counted in ``health()``. A slow reader slows nobody.
            back_pressure: let commands (`shell`) say no more than the reader keeps up with, so that
                it loses nothing of them. Functions never wait; nor do commands for a reader that
                takes next to nothing for some seconds.

        Raises:
            KeyError: no task has this id, or it has finished and is kept no longer.
        """
        maxsize = number("maxsize", maxsize, least=1, whole=True)
        if callback is not None and not callable(callback):
            raise ConfigurationError(f"callback: expected a callable or None, got {show(callback)}")
        if task is None:
            state = None
        elif issubclass(type(task), Task):
            state = task._task_state  # type: ignore[union-attr]
        else:
            state = self._memory.state(task)  # type: ignore[arg-type]
        if state is not None and state.run_id != self._run_id:
            raise KeyError(state.id)  # another Scheduler's
        return self._registry.subscribe(
            callback, state, types, maxsize, flag("back_pressure", back_pressure)
        )

    def register_sink(
        self,
        sink: Sink | str,
        *,
        name: str | None = None,
        options: SinkOptions | None = None,
        **config: Any,
    ) -> str:
        """Let a sink have all that is emitted from now on; return the name it is registered under.

        Waits for the sink to open, ``close_timeout`` seconds at most.

        Args:
            sink: the sink, or a specification: ``jsonl:PATH`` or ``package.module:factory``.
            name: None derives one from the kind of sink.
            options: how delivery treats it.
            config: keywords of a specified sink.

        Raises:
            SinkError: the specification is wrong, or the sink refuses to open.
            ConfigurationError: the name is taken.
        """
        return self._registry.register(sink, name, options, config)

    def unregister_sink(self, name: str, *, timeout: float = 5.0) -> SinkHealth:
        """Let a sink finish what was emitted so far, close it, and return its final account.

        Returns by ``timeout`` seconds at the latest; what the sink did not take by then is dropped
        and counted.

        Raises:
            KeyError: no sink has that name.
        """
        return self._registry.unregister(name, number("timeout", timeout, least=0))

    @property
    def sinks(self) -> Mapping[str, SinkHealth]:
        """The account and the condition of every sink, by name; after `shutdown` the final ones."""
        return self._registry.health()

    def flush(self, timeout: float | None = None) -> FlushReport:
        """Have all that was emitted before the call delivered and the sinks flushed; wait
        ``timeout`` seconds at most.

        Returns: a report that is truthy when every sink has all of it.
        """
        return self._registry.flush(number("timeout", timeout, least=0, optional=True))

    def shutdown(
        self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None
    ) -> None:
        """Take no more tasks, let the queued ones run, then flush and close the sinks.

        From inside one of its own tasks it waits for the others only; the sinks are closed once
        that task has ended. From inside a sink or a subscription's callback it waits for nothing.

        Args:
            wait: False returns at once; all of it still happens, in the background.
            cancel_futures: cancel the tasks that have not started.
            timeout: seconds for all of it together; a quarter, at most ``close_timeout``, is kept
                for the end. Tasks that still run then are asked to stop, and left to themselves if
                they don't. None waits for ever for the tasks; the sinks never get more than
                ``close_timeout``.
        """
        timeout = number("timeout", timeout, least=0, optional=True)
        until = None if timeout is None else monotonic() + timeout
        self._pool.close()
        if cancel_futures:
            self._pool.cancel_pending("shutdown")
        if not wait or self._dispatcher.waits_for_caller():
            return
        kept = 0.0 if timeout is None else min(self._dispatcher.close_timeout, timeout / 4)
        if self._pool.join(None if timeout is None else timeout - kept):
            self._pool.cancel_pending("shutdown")
            self._pool.stop_running("shutdown")
            self._pool.join(kept / 4)  # those that look stop now, and their end is recorded
            self._pool.give_up()
        elif self._pool.is_inside():
            return
        self._dispatcher.closed.wait(None if until is None else max(0.0, until - monotonic()))


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


def _wind_down(dispatcher: Dispatcher, pool: Pool) -> None:
    """Close the pool of a Scheduler that was forgotten; takes no lock."""
    if dispatcher.has_started:  # else there is no task, no sink, and nobody to close the pool
        dispatcher.intake.post(pool.close)


# -- the ends of a process, and its forks --

_live: weakref.WeakKeyDictionary[Pool, Dispatcher] = weakref.WeakKeyDictionary()
_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()
_is_exiting = False


def _finish_all() -> None:
    """At interpreter exit: let the tasks finish, as ``ThreadPoolExecutor`` does, and the sinks
    within their timeouts.

    Runs before `threading` joins the other threads, while new ones may mostly still start (not on
    3.12).
    """
    global _is_exiting
    _is_exiting = True
    live = list(_live.items())
    for pool, _ in live:
        pool.close("interpreter shutdown")
    for pool, dispatcher in live:
        pool.join(None)
        dispatcher.closed.wait()


def _register_at_exit() -> None:
    # The hook that concurrent.futures.thread uses. `atexit` itself runs after the joining of
    # non-daemon threads, which may wait for our tasks for ever.
    register = getattr(threading, "_register_atexit", None)
    try:
        if register is not None:
            register(_finish_all)
            return
    except RuntimeError:
        pass  # imported while the interpreter exits: nothing will be submitted any more
    atexit.register(_finish_all)


def _start_afresh_in_child() -> None:
    """In a forked child: the threads are the parent's, and so is the record of its tasks."""
    for pool, dispatcher in list(_live.items()):
        pool.start_afresh()
        dispatcher.start_afresh()
        if pool.has_ended:  # the parent was closing its sinks: here there is nothing to close
            dispatcher.finish()
    for scheduler in list(_schedulers):
        scheduler._start_afresh()


_register_at_exit()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh_in_child)

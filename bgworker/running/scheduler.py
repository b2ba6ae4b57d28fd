"""The `Scheduler`: an executor whose tasks have an id, a status, progress, streams, a timeout, and
a history.

It puts the parts together (a pool that runs, a dispatcher that delivers, a memory of finished
tasks) and has no thread of its own: each method runs on its caller's thread, and any thread may
call it. None of the parts holds the Scheduler, so that one that is forgotten is collected: its
queued tasks still run and its sinks are flushed.
"""

from __future__ import annotations

import os
import weakref
from time import time_ns

from ..delivery.dispatcher import Dispatcher
from ..model import ids
from ..model.checks import MOST_LISTED, choice, flag, member, named, number
from ..model.clock import monotonic
from ..model.enums import TaskStatus
from ..model.errors import ConfigurationError, MissingPart, ShutdownError
from ..model.records import TaskState
from ..model.text import listed, show
from . import process
from .context import Limits
from .dropin import DropIn, default_workers, number_of_workers
from .finished import Memory
from .options import OFF, Submits, TaskOptions, with_environment
from .pool import Pool, weakly
from .source import source_of
from .task import Task
from .variables import captured

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from concurrent.futures import Executor
    from typing import Any, Literal, NoReturn, TypeVar

    from ..delivery.options import SinkOptions
    from ..delivery.registry import Registry
    from ..delivery.subscription import Subscription
    from ..model.events import Event, EventType, TaskSnapshot
    from ..history.requests import Listener
    from ..model.health import FlushReport, SchedulerHealth, SinkHealth
    from ..remote.pool import RemotePool
    from ..remote.resume import Resumed
    from ..sinks.base import Sink

    T = TypeVar("T")


_NO_KEYWORDS: dict[str, Any] = {}


class Scheduler(Submits, DropIn):
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
        capture_output, record_source, record_arguments, record_result: defaults of `options`. One
            that is not given is on where the environment variable ``BGWORKER_CAPTURE`` has its last
            word, as in ``BGWORKER_CAPTURE=output,arguments``.
        max_payload: most bytes of one stream event's text, of a failure's, and of a task's
            arguments, result and metadata. JSON that is larger gives way to ``{"truncated": <its
            bytes>, "head": "<its beginning>"}``.
        oversize: whether a larger one is cut ("truncate") or refused and counted ("reject").
        progress_interval: seconds between two progress events of a task ...
        progress_step: ... unless it moved by so many percent.
        executor: runs the code of the tasks in the place of threads here: a
            ``ProcessPoolExecutor``, say, or that of a cluster. It stays its maker's, who shuts it
            down after this. Its workers import bgworker; functions, arguments and results are
            pickled. ``max_workers``, ``initializer`` and ``resize`` are its own business,
            ``max_stuck`` means nothing, and context variables stay here.
        channel: "HOST:PORT" (port 0: any that is free) where the executor's processes on other
            machines reach this one, with what their tasks say. None is for processes of this
            machine; what those of others say comes with their results then.

    Raises:
        ConfigurationError: a setting has a value that cannot be used; also a ``ValueError``.
        SinkError: a sink cannot be opened.
    """

    _settings: TaskOptions  # of the tasks that `submit` makes

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
        capture_output: bool = OFF,
        record_source: bool = OFF,
        record_arguments: bool = OFF,
        record_result: bool = OFF,
        max_payload: int = 65536,
        oversize: Literal["truncate", "reject"] = "truncate",
        progress_interval: float = 0.1,
        progress_step: float = 1.0,
        executor: Executor | None = None,
        channel: str | None = None,
    ) -> None:
        if executor is not None:
            _refuse_threads(max_workers=max_workers, initializer=initializer,
                            initargs=initargs or None)
        elif channel is not None:
            raise ConfigurationError(
                f"channel: is where the processes of an executor reach this one, got "
                f"{show(channel)} without an executor; give both or none")
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
        if process.is_exiting():
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
        self._run_id = ids.new_run_id(time_ns())
        self._memory = Memory(
            number("keep_finished", keep_finished, least=0, whole=True, optional=True),
            number("keep_seconds", keep_seconds, least=0, optional=True),
        )
        self._dispatcher = Dispatcher(name, self._memory, close_timeout)
        self._made_registry: Registry | None = None
        self._pool: Pool | RemotePool
        if executor is None:
            self._pool = Pool(max_workers, name, initializer, initargs, max_pending, max_stuck,
                              self._dispatcher.finish)
        else:
            self._pool = _remote_pool(executor, name, channel, max_pending, self._dispatcher)
        self._listener: Listener | None = None
        # without the Scheduler: a cycle would let a forgotten one wait for the garbage collector
        self._settings = TaskOptions(
            None,
            **with_environment(
                capture_output=capture_output,
                record_source=record_source,
                record_arguments=record_arguments,
                record_result=record_result,
            ),
        )
        process.enter(self, self._pool, self._dispatcher)
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
                from ..delivery.registry import Registry

                self._made_registry = self._dispatcher.sinks = Registry(
                    self._dispatcher, self._name, self._dispatcher.close_timeout
                )
            return self._made_registry

    def _start_afresh(self) -> None:
        """Go on under a new run id; in a forked child, which has none of its parent's tasks."""
        self._run_id = ids.new_run_id(time_ns())
        self._memory.start_afresh()
        if self._listener is not None:
            self._listener.start_afresh(self._run_id)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Scheduler cannot be pickled: it belongs to its process; make one where it is needed"
        )

    @property
    def run_id(self) -> str:
        """Id of this Scheduler in this process: 32 hex digits."""
        return self._run_id

    def _finder(self) -> Callable[[], Scheduler | None]:
        return weakref.ref(self)  # a forgotten one winds down

    def options(
        self,
        *,
        name: str | None = None,
        timeout: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        capture_output: bool | None = None,
        record_source: bool | None = None,
        record_arguments: bool | None = None,
        record_result: bool | None = None,
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
            record_result: whether the record of a completed task holds what it returned, as JSON.
                That is made before anybody can get the result, on the task's thread and within its
                timeout: who changes the result afterwards does not change the record.
            The last four take None for the Scheduler's default.
        """
        defaults = self._settings
        return TaskOptions(
            self._submit,
            name=name,
            timeout=timeout,
            metadata=metadata,
            capture_output=(
                defaults._capture_output if capture_output is None else capture_output
            ),
            record_source=defaults._record_source if record_source is None else record_source,
            record_arguments=(
                defaults._record_arguments if record_arguments is None else record_arguments
            ),
            record_result=defaults._record_result if record_result is None else record_result,
        )

    def _submit(self, options: TaskOptions, fn: Callable[..., T], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> Task[T]:
        source = source_of(fn)
        now = time_ns()
        state = TaskState(
            "", options._name or source.name, self._run_id, now, source,
            ids.next_number() & ids.MOST,
        )
        metadata = options._metadata
        if options._is_special or source.is_marked:
            metadata = options._apply(state, fn, args, kwargs, self._limits.max_payload)
        dispatcher = self._dispatcher
        task: Task[T] = self._pool.task_class(
            state, self._pool, dispatcher, self._limits, metadata)
        state.handle = weakref.ref(task)
        if options._follows_run:
            task._captures_output = options._capture_output
            task._records_result = options._record_result
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

    def _known(self) -> Memory:
        """Return the tasks that are still kept, without those that have become too old."""
        self._dispatcher.call(lambda: self._memory.retire([]))
        return self._memory

    def tasks(self, *, status: TaskStatus | str | None = None) -> list[TaskSnapshot]:
        """Return the tasks that run, wait, or have finished and are still kept, in the order of
        their creation.

        Args:
            status: only those with this status.
        """
        wanted = None if status is None else member("status", TaskStatus, status)
        snapshots = (state.snapshot_now() for state in self._known().states())
        return [each for each in snapshots if wanted is None or each.status is wanted]

    def get(self, task_id: str) -> TaskSnapshot:
        """Return one task.

        Raises:
            KeyError: no task has this id, or it has finished and is kept no longer.
        """
        return self._known().state(task_id).snapshot_now()

    def task(self, task_id: str) -> Task[Any]:
        """Return the task with that id. Its submitter need not keep it while it waits or runs.

        Raises:
            KeyError: as `get`; also when the task has ended and nobody holds it, since then its
                result is gone.
        """
        state = self._known().state(task_id)
        found: Task[Any] | None = None if state.handle is None else state.handle()
        if found is None:
            raise KeyError(
                f"{state.id}: the task has ended, and nobody holds it; get() has its record"
            )
        return found

    def listen(self, path: str | os.PathLike[str]) -> None:
        """Let ``bgworker cancel`` cancel tasks from now on: whoever may write to a history.

        A request cancels as `Task.cancel` does, and gives the reason. While tasks wait or run, a
        thread looks twice a second whether there is one; while none does it sleeps, and `shutdown`
        ends it. In a forked child it hears requests for the tasks of the child.

        Args:
            path: the file of a `SqliteSink` of this Scheduler. To listen to it again does nothing.

        Raises:
            HistoryError: there is no history at that path, or it cannot be read.
            ConfigurationError: it listens to another history already.
            MissingPart: this copy of bgworker was made without the history.
            ShutdownError: after `shutdown`.
        """
        try:
            from ..history.requests import Listener
        except ModuleNotFoundError as error:
            if "sqlite3" in (error.name or ""):
                raise  # it is this Python that lacks something
            raise MissingPart("history") from error
        listener = Listener(path, self._name, self._run_id, self._memory.task,
                            weakly(self._pool.is_busy))
        if self._listener is None:
            self._pool.listen(listener)
            self._listener = listener
        elif self._listener.path != listener.path:
            raise ConfigurationError(
                f"path: this Scheduler listens to {self._listener.path!r} already, got "
                f"{listener.path!r}; have another Scheduler listen to that")

    def resume(
        self, path: str | os.PathLike[str], *, attempts: int = 3,
        also: Collection[TaskStatus | str] = (),
    ) -> Resumed:
        """Run again what a crash has interrupted: the tasks of `resumable` functions in a history
        whose process, on this machine, is gone, whether they had begun or not.

        Each is a new task, whose metadata name the old one as ``rerun_of``, under the old name and
        timeout, with the settings of this Scheduler. It is claimed in the file before it is queued:
        of all processes that resume at once, one runs it. A task runs at least once: what its
        process did before it died, is done again.

        Only functions that are registered in this process are called, with JSON values; nothing
        that the file names is imported, and nothing is unpickled. Whoever may write to the file
        chooses among these calls.

        Any thread. Waits for the file, not for tasks: where ``max_pending`` has no room for more,
        the rest is left to a later call; see `Resumed.left`. It may be called as often as you like,
        such as every minute for tasks of other processes that have died meanwhile.

        What was queued before an error runs: the error has it as its attribute ``resumed``, a
        `Resumed`.

        Not resumed, and not counted as attempts, are tasks that the sink has pruned: choose its
        ``max_tasks`` and ``max_age`` such that it keeps them. A run whose sink was closed is over,
        though its process lives. Where tasks run on an executor, the old body may go on for up to
        5 s after its parent has died, on dask to its end. Runs under another host name, such as
        that of a recreated container without /etc/machine-id, are never found dead.

        Args:
            path: the file of a `SqliteSink` of this Scheduler.
            attempts: most times that a task is begun, the first included, as far as the history
                tells. It does not know of a task that ended its process within 0.1 s of beginning;
                so it makes no more than ten times as many, begun or not.
            also: "failed", "timed_out", or both: tasks that ended so are run again, too, once their
                run is over. Those that were cancelled never are.

        Raises:
            ConfigurationError: this Scheduler does not record into that history, or an argument
                cannot be used.
            HistoryError: the file cannot be used. What could not be given back is left until this
                process has ended.
            ShutdownError: as from ``submit``.
            PoolStuck: as from ``submit``.
            MissingPart: this copy of bgworker was made without its parts remote or history.
        """
        try:
            from ..remote.resume import resume
        except ModuleNotFoundError as error:
            raise MissingPart("remote") from error
        if self._pool.is_closed:
            raise ShutdownError("cannot resume after shutdown")
        return resume(path, self._registry.sinks(), self._run_id, self._settings,
                      self._limits.max_payload, self._submit, attempts, also)

    def resize(self, max_workers: int) -> None:
        """Change the number of workers, up or down, while tasks run. A worker too many ends after
        its task.

        Raises:
            ConfigurationError: it is no number of at least 1; or the workers are an executor's.
        """
        self._pool.resize(number_of_workers(max_workers))

    def health(self) -> SchedulerHealth:
        """Return how many workers and waiting tasks there are, and which threads are stuck on which
        task. Any thread."""
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


def _refuse_threads(**settings: object) -> None:
    """Refuse what is set of threads here where an executor runs the tasks."""
    for name, value in settings.items():
        if value is not None:
            raise ConfigurationError(
                f"{name}: belongs to the executor where there is one, got {show(value)}; give it "
                "to that, or leave out `executor`")


def _remote_pool(executor: Executor, name: str, channel: str | None, max_pending: int | None,
                 dispatcher: Dispatcher) -> RemotePool:
    try:
        from ..remote.pool import RemotePool
    except ModuleNotFoundError as error:
        if "remote" not in (error.name or ""):
            raise  # it is this Python that lacks something
        raise MissingPart("remote") from error
    return RemotePool(executor, name, channel, max_pending, dispatcher)

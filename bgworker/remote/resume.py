"""What a crash has interrupted goes on: `Scheduler.resume`.

A task of a history that was left undone is run again only if its function is registered in this
process, under the same name and version and with the same source, and its record has all of its
arguments. It is claimed first (see `history.claims`), and then queued under the id of its claim. So
of any number of processes that resume at once, one runs it. One that dies in between leaves a task
that the next one resumes.

All of it runs on the thread that resumes.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from time import time_ns

from ..model import ids
from ..model.checks import MOST, members, number
from ..model.enums import TaskStatus
from ..model.errors import ConfigurationError, HistoryError, MissingPart, PendingFull
from ..model.records import TaskState
from ..model.text import show
from ..running.options import TaskOptions
from ..sinks.opening import absolute, shown
from .resumable import KEY, arguments_in, registered

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from typing import Any

    from ..history.claims import Claims, LeftTask
    from ..history.sink import SqliteSink
    from ..running.options import Submit
    from ..running.task import Task
    from .resumable import ResumableSource

UNRECORDED = 10
"""Times ``attempts`` that a task is made at most: the start of one that killed its process at once
is not in the file, and what only waited each time is not to be given up for that."""

MOST_ATTEMPTS = 1000

_MAY_ALSO = (TaskStatus.FAILED, TaskStatus.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class SkippedTask:
    """A task that `Scheduler.resume` did not run again."""

    task_id: str
    """Of the task that was left undone, and still is."""
    name: str
    """What that task is called."""
    reason: str
    """Why it was not run again, and what can be done."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """What `Scheduler.resume` did."""

    tasks: tuple[Task[Any], ...] = ()
    """The new tasks, in the order in which the old ones were created; the metadata of each name the
    old one as ``rerun_of``."""
    skipped: tuple[SkippedTask, ...] = ()
    """Those that it did not run again, in the same order."""
    left: int = 0
    """At most so many more are left, since ``max_pending`` had no room: others may have claimed
    some, and some may be skipped. Resume again when tasks have ended."""


def resume(
    path: str | os.PathLike[str], sinks: Sequence[object], run_id: str, settings: TaskOptions,
    max_bytes: int, submit: Submit, attempts: int, also: Collection[TaskStatus | str],
) -> Resumed:
    """Run again what was left undone; see `Scheduler.resume`.

    Args:
        sinks: of the Scheduler, those that are open.
        run_id: of the Scheduler.
        settings: its defaults for tasks.
        max_bytes: its ``max_payload``.
        submit: queues a call with its options.
    """
    try:
        from ..history.claims import MOST_CLAIMED, Claims
        from ..history.sink import SqliteSink
    except ModuleNotFoundError as error:
        if "sqlite3" in (error.name or ""):
            raise  # it is this Python that lacks something
        raise MissingPart("history") from error
    path = absolute(path)
    attempts = number("attempts", attempts, least=1, whole=True)
    if attempts > MOST_ATTEMPTS:
        raise ConfigurationError(f"attempts: expected at most {MOST_ATTEMPTS}, got {attempts}")
    statuses = members("also", TaskStatus, also)
    for status in statuses.difference(_MAY_ALSO):
        raise ConfigurationError(
            f"also: expected some of {', '.join(_MAY_ALSO)}, got {show(status.value)}; what was "
            "interrupted is resumed in any case, what was cancelled never")
    sink = _sink_for(path, [each for each in sinks if isinstance(each, SqliteSink)])
    judge = _Judge(registered(), run_id, settings, max_bytes, attempts)
    tasks: list[Task[Any]] = []
    skipped: list[SkippedTask] = []
    left = 0
    try:
        with Claims(path, {TaskStatus.INTERRUPTED, *statuses}, f'"{KEY}"') as claims:
            keys = claims.left()
            while keys and not left:
                batch, keys = keys[:MOST_CLAIMED], keys[MOST_CLAIMED:]
                again: dict[str, _Again] = {}
                for task in claims.tasks(batch, attempts * UNRECORDED):
                    try:
                        again[task.task_id] = judge.again(task)
                    except ConfigurationError as error:
                        skipped.append(SkippedTask(task.task_id, task.name, str(error)))
                if again:
                    _show_presence(sink, run_id, path)
                    left = _queue(claims, again, submit, tasks)
            left = left and left + len(keys)
    except BaseException as error:  # Ctrl-C too: nobody else can tell what was queued until then
        error.resumed = Resumed(tuple(tasks), tuple(skipped))  # type: ignore[attr-defined]
        raise
    return Resumed(tuple(tasks), tuple(skipped), left)


def _sink_for(path: str, sinks: Sequence[SqliteSink]) -> SqliteSink:
    for sink in sinks:
        if os.path.realpath(sink.path) == os.path.realpath(path):
            return sink
    raise ConfigurationError(
        f"path: this Scheduler does not record its tasks into {shown(path)}, or not all of their "
        "life cycle, and there others are to see what it resumes; make it with "
        f"sinks=[{'sqlite:' + path!r}]")


def _show_presence(sink: SqliteSink, run_id: str, path: str) -> None:
    try:
        sink.show_presence({run_id})
    except OSError as error:
        raise HistoryError(
            f"cannot claim tasks of the history {shown(path)}: {error}; see whether this user may "
            "write to the lock file beside it") from error


def _queue(claims: Claims, again: Mapping[str, _Again], submit: Submit,
           tasks: list[Task[Any]]) -> int:
    """Claim tasks and queue them; return for how many there was no room."""
    ours = claims.claim({task_id: each.state for task_id, each in again.items()})
    waiting = deque([each for task_id, each in again.items() if task_id in ours])
    try:
        while waiting:
            first = waiting[0]
            tasks.append(submit(first, first.function, first.args, first.kwargs))
            waiting.popleft()
    except PendingFull:
        pass
    finally:
        if waiting:
            claims.give_back([each.state for each in waiting])
    return len(waiting)


# ---------------------------------------------------------------- one task

class _Again(TaskOptions):
    """A call that is made again, and the settings of its task, whose record is made beforehand."""

    __slots__ = ("function", "args", "kwargs", "state", "_shown")

    def __init__(self, source: ResumableSource, arguments: tuple[list[Any], dict[str, Any]],
                 run_id: str, settings: TaskOptions, max_bytes: int, name: str | None,
                 timeout: float | None, metadata: Mapping[str, Any]) -> None:
        super().__init__(
            None, name=name, timeout=timeout, metadata=metadata,
            capture_output=settings._capture_output, record_source=settings._record_source,
            record_arguments=True, record_result=settings._record_result)
        self.function = source.function
        self.args, self.kwargs = tuple(arguments[0]), arguments[1]
        now, count = time_ns(), ids.next_number() & ids.MOST
        self.state = TaskState(ids.id_of(now, count, ids.process_in(run_id)),
                               self._name or source.name, run_id, now, source, count)
        self._shown = super()._apply(self.state, self.function, self.args, self.kwargs, max_bytes)

    def _apply(
        self, state: TaskState, function: Callable[..., Any], args: tuple[Any, ...],
        kwargs: dict[str, Any], max_bytes: int,
    ) -> Mapping[str, Any]:
        claimed = self.state
        state._id, state.number, state.created_ns = claimed.id, claimed.number, claimed.created_ns
        state.timeout, state.record_source = claimed.timeout, claimed.record_source
        state.arguments, state.metadata_json = claimed.arguments, claimed.metadata_json
        self.state = state  # tells how far the task has got, if its submit fails
        return self._shown


class _Judge:
    """Tells which tasks can be run again in this process, and how."""

    def __init__(self, known: Mapping[str, ResumableSource], run_id: str, settings: TaskOptions,
                 max_bytes: int, attempts: int) -> None:
        self._known = known
        self._run_id = run_id
        self._settings = settings
        self._max_bytes = max_bytes
        self._attempts = attempts

    def again(self, task: LeftTask) -> _Again:
        """Return the call that runs a task again.

        Raises:
            ConfigurationError: it is not to be run again; the text says why.
        """
        mark = task.metadata.get(KEY)
        name, version = (mark.get("name"), mark.get("version")) if isinstance(mark, dict) else (
            None, None)
        if not isinstance(name, str) or type(version) is not int:
            raise ConfigurationError("its record does not tell its function; submit it anew")
        source = self._known.get(name)
        if source is None:
            raise ConfigurationError(
                f"no function is registered as {show(name)} in this process; import the module "
                "that has it before resume is called")
        if version != source.version:
            raise ConfigurationError(
                f"it was submitted to version {version} of {name!r}, and {source.place} has "
                f"version {source.version}; submit it anew")
        if task.script_hash != source.script_hash:
            raise ConfigurationError(
                f"the source of {source.place} is another than when it was submitted; submit it "
                "anew")
        if task.begun >= self._attempts:
            raise ConfigurationError(
                f"it was begun {_times(task.begun)} without coming to an end, and attempts is "
                f"{self._attempts}; see what it says before it is interrupted, or raise attempts")
        if task.made >= self._attempts * UNRECORDED:
            raise ConfigurationError(
                f"it was queued {_times(task.made)} without coming to an end, and attempts is "
                f"{self._attempts}; see why its process ends each time, or raise attempts")
        arguments = arguments_in(task.arguments)
        timeout = task.timeout
        if arguments is None or timeout is not None and not 0 < timeout <= MOST:
            raise ConfigurationError(
                "its arguments are not recorded as those of a resumable task are; submit it anew")
        metadata = {key: value for key, value in task.metadata.items() if key != KEY}
        return _Again(source, arguments, self._run_id, self._settings, self._max_bytes,
                      task.name or None, timeout, {**metadata, "rerun_of": task.task_id})


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"

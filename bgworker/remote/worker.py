"""What an engine runs in the place of a task: `perform`, in a worker process.

Here the body of the task runs as on a thread of a `Scheduler`: with a `TaskContext`, its output
captured if that was asked for, a coroutine on a loop of its own. How it ends goes back as a
report; nothing that the body does makes `perform` raise, but that its order cannot be read.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextvars import copy_context
from types import MappingProxyType

from ..model.clock import monotonic
from ..model.errors import RemoteError, ShutdownError, TaskTimedOut
from ..model.failure import describe_failure
from ..model.records import CANCELLED, COMPLETED, TIMED_OUT, TaskState
from ..model.text import describe, fit_json, json_text, name_of
from ..model.threads import own_thread
from ..running.context import CURRENT, Limits, context_of
from ..running.deadlines import keeps_time
from ..running.task import finished, is_coroutine, run_captured, verdict
from .channel import Body, close_all, enter, leave
from .messages import Order, Report, decode_order, dumps, encode_report, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .messages import Failure


def perform(order: bytes) -> bytes:
    """Run the body of a task, and return what is to be known of that. For engines: see
    `encode_order` and `decode_report`.

    Raises:
        RemoteError: it is no order, or one of another version of bgworker.
    """
    return encode_report(_report(decode_order(order)))


def _report(order: Order) -> Report:
    state = TaskState(order.task_id, order.name, order.run_id, time.time_ns())
    state.timeout = order.timeout
    body = Body(state, _stack)
    reason = enter(order.ticket, body)
    try:
        if reason is None:
            metadata = MappingProxyType(json.loads(order.metadata_json or "{}"))
            state.speaks_to = body.channel.intake, Limits(*order.limits), metadata
            report = _run(order, body)
        else:
            report = _outcome(CANCELLED, failure=(None, reason, None))
    finally:
        state.context = None
        first, records, losses = leave(body)
    return report._replace(attempt=body.attempt, first=first, records=records, losses=losses,
                           worker=body.channel.worker)


def _run(order: Order, body: Body) -> Report:
    """Run a body, and return how it has ended. The rest of the report is to be filled in."""
    state, variables, max_payload = body.state, copy_context(), order.limits[0]
    state.started_ns = time.time_ns()
    body.channel.tell_start(body, state.started_ns)
    started, duration, is_late = monotonic(), 0.0, False
    kind, payload, recorded = COMPLETED, b"", None
    failure: Failure | None = None
    try:
        variables.run(CURRENT.set, state)
        try:
            result = variables.run(_call, order, body, started)
        finally:
            duration = monotonic() - started
            is_late = body.is_watched and not body.channel.deadlines.forget(body)
        if not is_late:
            payload = variables.run(_pickled_result, result, order.name)
            if order.records_result:
                recorded = fit_json(variables.run(json_text, result), max_payload)[0]
    except BaseException as error:  # the boundary: all of it is raised by `result`
        kind, failure = verdict(error, state.context, max_payload, _run.__code__, _call.__code__)
        payload = b"" if kind == CANCELLED else _pickled_error(error, failure)
    if is_late:
        body.expired.wait()
        late = TaskTimedOut(f"ran longer than its timeout of {order.timeout:g} s")
        name, message, info = describe_failure(late, max_payload)
        kind, payload, failure = TIMED_OUT, dumps(late), (name, message, body.stack or info)
    if state.context is not None:
        state.context._say_last()
    return _outcome(kind, duration, payload, failure, recorded)


def _outcome(
    kind: int,
    duration: float = 0.0,
    payload: bytes = b"",
    failure: Failure | None = None,
    recorded: str | None = None,
) -> Report:
    """Return what a body's own end tells. Its channel knows the rest."""
    return Report(kind, payload, failure, recorded, duration, "", 1, [], {}, "")


def _call(order: Order, body: Body, started: float) -> Any:
    """Call the function of a task with the context variables that it is to have."""
    try:
        function, args, kwargs = loads(order.payload)
    except Exception as error:
        raise RemoteError(
            f"task {order.name!r} cannot be loaded in {_here()} ({describe(error)}): its function "
            "and its arguments must be of modules that can be imported there"
        ) from error
    state = body.state
    if order.timeout is not None and not keeps_time(function):
        _watch(body, started + order.timeout)
    if order.captures_output:
        return run_captured(context_of(state), function, args, kwargs)
    result = function(*args, **kwargs)
    return finished(result, context_of(state)) if is_coroutine(result) else result


def _watch(body: Body, due: float) -> None:
    """Have a body asked to stop when its time is over; the scheduler may not be reached then."""
    context_of(body.state)._deadline = due
    try:
        body.channel.deadlines.start()
    except ShutdownError:
        return  # no thread can be had: its scheduler sees to its time
    body.is_watched = True
    body.channel.deadlines.watch(body, due)


def _stack(state: TaskState, thread: int) -> str:
    from ..running import stacks

    assert state.speaks_to is not None  # it has begun
    return stacks.of_context(
        state.context, thread, _call.__code__, 0, state.speaks_to[1].max_payload)


def _pickled_result(result: object, name: str) -> bytes:
    try:
        return dumps(result)
    except Exception as error:
        raise RemoteError(
            f"the result of task {name!r} is of type {name_of(type(result))}, which cannot be "
            f"brought from {_here()} ({describe(error)}): return something that pickle takes"
        ) from error


def _pickled_error(error: BaseException, failure: Failure) -> bytes:
    """Return the pickle of what a body raised, or of an error that stands for it and keeps its
    text."""
    # dask has pickle take the traceback, too, which fails after a deep recursion
    BaseException.with_traceback(error, None)
    try:
        return dumps(error)
    except BaseException as trouble:  # the boundary, as in `_run`
        return dumps(RemoteError(
            f"the task raised {failure[0]}: {failure[1]}. The exception itself cannot be brought "
            f"from {_here()} ({describe(trouble)}): pickle must be able to take it"
        ))


def _here() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


if not own_thread("", perform).daemon:
    # an isolated subinterpreter, which waits for its threads at its end
    threading._register_atexit(close_all)  # type: ignore[attr-defined]

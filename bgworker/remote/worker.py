"""What an engine runs in the place of a task: `perform`, in a worker process.

Here the body of the task runs as on a thread of a `Scheduler`: with a `TaskContext`, its output
captured if that was asked for, a coroutine on a loop of its own. How it ends goes back as a
report; nothing that the body does makes `perform` raise, but that its order cannot be read.
"""

from __future__ import annotations

import json
import os
import socket
import time
from _thread import get_ident
from contextvars import copy_context
from types import MappingProxyType

from ..model.clock import monotonic
from ..model.errors import RemoteError
from ..model.records import CANCELLED, COMPLETED, STARTED, TaskState
from ..model.text import describe, fit_json, json_text, name_of
from ..running.context import CURRENT, Limits, context_of
from ..running.deadlines import keeps_time
from ..running.task import finished, is_coroutine, run_captured, verdict
from .channel import Body, Channel, enter
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
    thread = get_ident()
    body = Body(state, lambda: _stack(state, thread, order.limits[0]))
    channel, reason = enter(order.ticket, body)
    try:
        if reason is None:
            metadata = MappingProxyType(json.loads(order.metadata_json or "{}"))
            state.speaks_to = channel.intake, Limits(*order.limits), metadata
            report = _run(order, body, channel)
        else:
            report = _outcome(CANCELLED, 0.0, failure=(None, reason, None))
    finally:
        state.context = None
        first, records, losses = channel.end(body)
    return report._replace(attempt=body.attempt, first=first, records=records, losses=losses,
                           worker=channel.worker)


def _run(order: Order, body: Body, channel: Channel) -> Report:
    """Run a body, and return how it has ended. The rest of the report is to be filled in."""
    state, variables, max_payload = body.state, copy_context(), order.limits[0]
    state.started_ns = time.time_ns()
    channel.intake.emit_lifecycle(state, STARTED, state.started_ns)
    started, duration = time.monotonic_ns(), None
    try:
        variables.run(CURRENT.set, state)
        result = variables.run(_call, order, body, channel)
        duration = (time.monotonic_ns() - started) / 1e9
        payload = variables.run(_pickled_result, result, order.name)
        recorded = None
        if order.records_result:
            recorded = fit_json(variables.run(json_text, result), max_payload)[0]
        return _outcome(COMPLETED, duration, payload, None, recorded)
    except BaseException as error:  # the boundary: all of it is raised by `result`
        if duration is None:
            duration = (time.monotonic_ns() - started) / 1e9
        kind, failure = verdict(error, state.context, max_payload, _run.__code__, _call.__code__)
        payload = b"" if kind == CANCELLED else _pickled_error(error, failure)
        return _outcome(kind, duration, payload, failure)
    finally:
        if state.context is not None:
            state.context._say_last()


def _outcome(
    kind: int,
    duration: float,
    payload: bytes = b"",
    failure: Failure | None = None,
    recorded: str | None = None,
) -> Report:
    return Report(kind, payload, failure, recorded, duration, "", 1, [], {}, "")


def _call(order: Order, body: Body, channel: Channel) -> Any:
    """Call the function of a task with the context variables that it is to have."""
    try:
        function, args, kwargs = loads(order.payload)
    except Exception as error:
        raise RemoteError(
            f"task {order.name!r} cannot be loaded in {_here()} ({describe(error)}): its function "
            "and its arguments must be of modules that can be imported there"
        ) from error
    state = body.state
    if order.timeout is not None:
        state.timeout = order.timeout
        if not keeps_time(function):
            context_of(state)._deadline = channel.watch(body, order.timeout)
    if order.captures_output:
        return run_captured(context_of(state), function, args, kwargs)
    result = function(*args, **kwargs)
    return finished(result, context_of(state)) if is_coroutine(result) else result


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
    try:
        return dumps(error)
    except BaseException as trouble:  # the boundary, as in `_run`
        return dumps(RemoteError(
            f"the task raised {failure[0]}: {failure[1]}. The exception itself cannot be brought "
            f"from {_here()} ({describe(trouble)}): pickle must be able to take it"
        ))


def _here() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _stack(state: TaskState, thread: int, max_bytes: int) -> str:
    from ..running import stacks

    return stacks.of_context(state.context, thread, _call.__code__, 0, max_bytes)

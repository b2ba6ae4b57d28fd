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
from ..model.failure import describe_failure
from ..model.records import CANCELLED, COMPLETED, FAILED, STARTED, TaskState
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
    limits = Limits(*order.limits)
    thread = get_ident()
    body = Body(state, lambda: _stack(state, thread, limits.max_payload))
    channel, reason = enter(order.ticket, body)
    started = time.monotonic_ns()
    kind: int = CANCELLED
    payload = b""
    failure: Failure | None = (None, reason, None)
    recorded: str | None = None
    try:
        if reason is None:
            metadata = MappingProxyType(json.loads(order.metadata_json or "{}"))
            state.speaks_to = channel.intake, limits, metadata
            kind, payload, failure, recorded = _run(order, state, body, channel)
    finally:
        state.context = None
        duration = (time.monotonic_ns() - started) / 1e9
        first, records, losses = channel.end(body)
    return Report(kind, payload, failure, recorded, duration, body.attempt, first, records, losses,
                  channel.worker)


def _run(
    order: Order, state: TaskState, body: Body, channel: Channel
) -> tuple[int, bytes, Failure | None, str | None]:
    """Run the body. Returns how it ended, the pickle of what it gave, the texts of a failure and
    that of the result, if it is recorded."""
    variables = copy_context()
    max_payload = order.limits[0]
    state.started_ns = time.time_ns()
    channel.intake.emit_lifecycle(state, STARTED, state.started_ns)
    try:
        variables.run(CURRENT.set, state)
        result = variables.run(_call, order, state, body)
        recorded = None
        if order.records_result:
            recorded = fit_json(variables.run(json_text, result), max_payload)[0]
        try:
            return COMPLETED, variables.run(dumps, result), None, recorded
        except Exception as trouble:
            raise RemoteError(
                f"the result of task {order.name!r} is of type {name_of(type(result))}, which "
                f"cannot be brought from process {os.getpid()} on {socket.gethostname()} "
                f"({describe(trouble)}): return something that pickle takes"
            ) from trouble
    except BaseException as error:  # the boundary: all of it is raised by `result`
        kind, failure = verdict(error, state.context, max_payload, _run.__code__, _call.__code__)
        if kind == CANCELLED:
            return kind, b"", failure, None
        return kind, _pickled(error, failure), failure, None
    finally:
        if state.context is not None:
            state.context._say_last()


def _call(order: Order, state: TaskState, body: Body) -> Any:
    """Call the function of a task with the context variables that it is to have."""
    try:
        function, args, kwargs = loads(order.payload)
    except Exception as error:
        raise RemoteError(
            f"task {order.name!r} cannot be loaded in process {os.getpid()} on "
            f"{socket.gethostname()} ({describe(error)}): its function and its arguments must be "
            "of modules that can be imported there"
        ) from error
    if order.timeout is not None:
        state.timeout = order.timeout
        if not keeps_time(function):
            body.due = context_of(state)._deadline = monotonic() + order.timeout
    if order.captures_output:
        return run_captured(context_of(state), function, args, kwargs)
    result = function(*args, **kwargs)
    return finished(result, context_of(state)) if is_coroutine(result) else result


def _pickled(error: BaseException, failure: Failure) -> bytes:
    """Return the pickle of what a body raised, or of an error that stands for it and keeps its
    text."""
    try:
        return dumps(error)
    except Exception as trouble:
        return dumps(RemoteError(
            f"the task raised {failure[0]}: {failure[1]}. The exception itself cannot be brought "
            f"here ({describe(trouble)}): pickle must be able to take it"
        ))


def _stack(state: TaskState, thread: int, max_bytes: int) -> str:
    from ..running import stacks

    return stacks.of_context(state.context, thread, _call.__code__, 0, max_bytes)

"""What goes to an engine's worker process with a task, and what comes back.

An engine gets one object of bytes and returns one. So no engine's pickler, and no keyword of its
own, touches what is the user's, and what cannot be pickled or loaded is the failure of one task: a
``ProcessPoolExecutor`` would break as a whole.

The frame of both is `marshal`, which can be read though the user's part in it cannot be loaded. An
order and a report are believed: they come from the engine, which runs code of ours anyway.
"""

from __future__ import annotations

import marshal
import pickle
import sys
from typing import NamedTuple

from ..model.errors import RemoteError
from ..model.records import COMPLETED
from ..model.text import describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Literal, Tuple

    Ticket = Tuple[Any, bytes, int]
    """How a worker process finds the channel: address, key, and the process of the `Hub`."""
    Failure = Tuple["str | None", "str | None", "str | None"]
    """Type, message, and more about it, as a task's record has them."""
    Records = List[Tuple[int, int, Any]]
    """``(kind, ns, data)`` in order; ``data`` as in `model.records`, or a list of lines of text
    that came at the same moment (see `Intake.emit_lines`), or None for STARTED."""
    Losses = Dict[Tuple[int, str], int]
    """(kind, reason) -> events; totals since the channel began. The reasons are "intake",
    "oversize" (as `Intake.refuse` has them), and "late": after the end of their task."""
    LimitsTuple = Tuple[int, Literal["truncate", "reject"], float, float]

FORMAT = 1
"""Number of this layout of orders and reports."""

MARSHAL = 4
"""Version of `marshal` that all supported Pythons read."""

PICKLE = 5
"""Version of `pickle` that all supported Pythons read."""


MOST_PAYLOAD = 2**31 - 1
"""Bytes of one object that `marshal` takes."""


class Order(NamedTuple):
    """A task, as its worker process gets it."""

    task_id: str
    name: str
    run_id: str
    timeout: float | None
    """Seconds."""
    captures_output: bool
    records_result: bool
    limits: LimitsTuple
    """What `Limits` is made with: max_payload, oversize, progress_interval, progress_step."""
    metadata_json: str
    ticket: Ticket | None
    """`Hub.ticket`; None where there is no channel."""
    payload: bytes
    """`dumps` of ``(function, args, kwargs)``."""


class Report(NamedTuple):
    """How the body of a task has ended, and what it has said of which nobody knows yet."""

    kind: int
    """COMPLETED, FAILED, CANCELLED or TIMED_OUT of `model.records`."""
    payload: bytes
    """`dumps` of the result or of the exception; empty for a cancelled one. See `outcome_of`."""
    failure: Failure | None
    result_json: str | None
    duration: float
    """Seconds."""
    attempt: str
    """Tells this run of the body from others of the same task."""
    first: int
    """Number of the first of ``records`` in this attempt, whose records count 1, 2, 3 ..."""
    records: Records
    """Those that have not been acknowledged; they may have come over the channel all the same."""
    losses: Losses
    worker: str
    """Identifies the channel that the ``losses`` are of, as in `Peer.worker`."""


def encode_order(order: Order) -> bytes:
    """Return an order as bytes for the engine."""
    return marshal.dumps(("order", FORMAT, *order), MARSHAL)


def decode_order(data: bytes) -> Order:
    """Return what `encode_order` was given.

    Raises:
        RemoteError: it is none, or one of another version of bgworker.
    """
    return Order(*_decode(data, "order", len(Order._fields)))


def encode_report(report: Report) -> bytes:
    """Return a report as bytes for the engine."""
    return marshal.dumps(("report", FORMAT, *report), MARSHAL)


def decode_report(data: object) -> Report:
    """Return what `encode_report` was given.

    Raises:
        RemoteError: it is none, or one of another version of bgworker.
    """
    return Report(*_decode(data, "report", len(Report._fields)))


def _decode(data: Any, what: str, fields: int) -> list[Any]:
    try:
        rest: list[Any]
        found, number, *rest = unmarshal(data)
        if found != what:
            raise ValueError(f"it begins with {found!r:.20}")
    except Exception as error:
        raise RemoteError(
            f"expected the {what} of a task, got {type(data).__name__} that cannot be read as one "
            f"({describe(error)}): have the executor return what it was given, unchanged"
        ) from error
    if number != FORMAT or len(rest) != fields:
        raise RemoteError(
            f"expected the {what} of a task in format {FORMAT}, got format {number!r} with "
            f"{len(rest)} fields: install the same version of bgworker for the executor's workers "
            "as here"
        )
    return rest


if sys.version_info >= (3, 13):
    def unmarshal(data: bytes) -> Any:
        """Return the value that `marshal` made these bytes of; no code object is made."""
        return marshal.loads(data, allow_code=False)
else:
    def unmarshal(data: bytes) -> Any:
        """Return the value that `marshal` made these bytes of."""
        return marshal.loads(data)


def dumps(value: object, by_value: bool = False) -> bytes:
    """Pickle a value. Where `pickle` cannot, `cloudpickle` may, if the program has loaded it.

    Args:
        by_value: the other side has another ``__main__``: what is of this one is sent with its
            code, by `cloudpickle`.

    Raises:
        ValueError: that makes more bytes than go there at once.
        Exception: whatever pickling raises, which runs the code of the value's author.
    """
    data = _pickled(value, by_value)
    if len(data) > MOST_PAYLOAD:
        raise ValueError(
            f"expected at most {MOST_PAYLOAD:,} bytes when it is pickled, got {len(data):,}: "
            "write it to a file, and give its path"
        )
    return data


def _pickled(value: object, by_value: bool) -> bytes:
    other = sys.modules.get("cloudpickle")
    try:
        data = pickle.dumps(value, PICKLE)
    except Exception:
        if other is None:
            raise
        return other.dumps(value, PICKLE)  # type: ignore[no-any-return]
    if by_value and other is not None and b"__main__" in data:
        return other.dumps(value, PICKLE)  # type: ignore[no-any-return]
    return data


def loads(data: bytes) -> Any:
    """Return what `dumps` was given. Runs the code of the value's author, and imports its module.

    Raises:
        BaseException: whatever that raises.
    """
    return pickle.loads(data)


class RemoteTraceback(Exception):
    """The cause of an exception that was raised elsewhere: its text is the traceback of there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def outcome_of(report: Report) -> tuple[Any, BaseException | None]:
    """Return the result of a body and None, or None and what it has raised.

    Runs the code of the value's author. What cannot be loaded here becomes a `RemoteError`, also of
    a body that completed: such a task has failed. A cancelled one has neither.
    """
    if not report.payload:
        return None, None
    _, message, info = report.failure or (None, None, None)
    error: BaseException
    try:
        value = loads(report.payload)
        if report.kind == COMPLETED:
            return value, None
        if not isinstance(value, BaseException):
            raise TypeError(f"expected an exception, got {type(value).__name__}")
        error = value
    except BaseException as trouble:  # the boundary: one that exits, too
        what = "result" if report.kind == COMPLETED else "exception"
        text = f" It was: {message}" if message else ""
        error = RemoteError(
            f"the {what} of the task came back, but cannot be loaded here ({describe(trouble)}): "
            f"pickle must be able to make it again.{text}"
        )
        error.__cause__ = trouble
    if info:
        tell_where(error, info)
    return None, error


def tell_where(error: BaseException, traceback: str) -> None:
    """Have an exception tell by a text where it was raised, and hold no frame."""
    # not by assignment, which its class may refuse
    BaseException.with_traceback(error, None)
    BaseException.__setattr__(error, "__context__", None)
    BaseException.__setattr__(error, "__cause__", RemoteTraceback(traceback))

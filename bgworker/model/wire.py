"""The one codec: events to and from lines of JSON (wire format, version 1). The sanitiser that runs
before it is `text`.

Every sink, the park file and the command line go through here, so that a line reads the same
wherever it was written. Everything is a pure function, for any thread, and never blocks.
``decode(encode(event)) == event``; the rare texts that JSON cannot tell apart are named at
`encode`.

Lines are ASCII: U+2028, U+0085 and the like are line ends to ``str.splitlines`` and to some
editors, and a line that holds them only as escapes stays one line for every reader. (The one
exception is a hand-made JSON payload.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quote

from .errors import WireError
from .events import (
    Event,
    EventType,
    LifecycleEvent,
    LossEvent,
    StreamEvent,
    StreamType,
    TaskSnapshot,
    TaskStatus,
)
from .records import (
    CREATED,
    KINDS,
    LOST,
    PROGRESS,
    SCHEDULED,
    STARTED,
    STATUSES,
    STREAMS,
    TYPES,
    Source,
    TaskState,
    utc,
)
from .text import ENCODE as _ENCODE, json_text, show
from .told import Told, ns_of, records_of, refusing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "VERSION",
    "decode",
    "decode_object",
    "encode",
    "encode_each",
    "encode_lines",
]

VERSION = 1
"""The version that is written, and the greatest one that is read."""

# all by kind
_HEADS = [f'{{"v":{VERSION},"type":"{type_.value}","task_id":' for type_ in TYPES]
_STREAM_HEADS = {kind: f'","stream":"{stream.value}"' for kind, stream in STREAMS.items()}
_HOT_HEADS = {kind: (_HEADS[kind], f'{head},"payload":') for kind, head in _STREAM_HEADS.items()}

_CREATED_HEAD, _SCHEDULED_HEAD, _STARTED_HEAD = _HEADS[CREATED : STARTED + 1]
_MICROS = tuple(["%03dZ" % micros for micros in range(1000)])

_STATUS_TEXTS = tuple(status.value for status in STATUSES)
_OUTCOME = ("failure_type", "failure_message", "invocation_info", "result")
_REQUIRED: Any = object()

_LINE_BREAKERS = re.compile("[\n\r\x85\u2028\u2029\ud800-\udfff]")
_TIME = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]+))?"
                   r"([Zz]|[+-][0-9]{2}:[0-9]{2})")


# ---------------------------------------------------------------- writing

def encode(event: Event) -> str:
    """Return the event as one line of JSON, without a line end.

    What comes back from `decode` may differ in three ways only: infinite and NaN numbers are null;
    a high and a low surrogate side by side in a ``str`` are the one character that they mean, as in
    every JSON text; and a payload of format "json", which is embedded as it stands, gets a space
    for each line end and an escape for U+0085, U+2028, U+2029 and surrogates. Its other non-ASCII
    characters stay: escaped, they could not be told from escapes that were there before.
    `json_text` makes ASCII, so bgworker's own payloads always come back exactly.

    Raises:
        WireError: a time without a time zone, a payload of format "json" that is not JSON, or a
            type that does not fit the kind of event or its stream.
    """
    return encode_each([event])[0]


def encode_lines(events: Sequence[Event]) -> bytes:
    """Return the lines of a batch, each ended by a newline, in UTF-8: the bytes of `encode`,
    several times as fast."""
    # a slice at a time, whose lines are still in the processor's cache when they are joined and
    # encoded: a fifth faster
    return b"".join(["\n".join([*encode_each(events[start:start + _SLICE]), ""]).encode()
                     for start in range(0, len(events), _SLICE)])


_SLICE = 512


def encode_each(events: Sequence[Event]) -> list[str]:
    """Return what `encode` makes of each event, several times as fast.

    A `Batch` is encoded from its records, and no DTO is built for what tasks say.
    """
    with refusing():
        return _record_lines(records_of(events))


def _record_lines(records: Sequence[Any]) -> list[str]:  # Any, because only a loss has no state
    lines: list[str] = []
    append = lines.append
    speaker, stream, head, text_head = None, -1, "", ""
    last_ns: int | None = None  # a task is created and queued in the same moment
    time = ""
    # the current one, in nanoseconds and as text: formatting it costs 0.5 us
    millisecond, until_then = -10**21, ""
    for state, seq, kind, ns, data in records:
        if ns is not last_ns:
            last_ns = ns
            past = ns - millisecond
            if not 0 <= past < 1_000_000:
                past = ns % 1_000_000
                millisecond, until_then = ns - past, ns_text(ns)[:23]
            time = until_then + _MICROS[past // 1000]
        if kind >= PROGRESS:
            if data.__class__ is str:
                if state is not speaker or kind != stream:
                    speaker, stream, (head, text_head) = state, kind, _HOT_HEADS[kind]
                    head = f'{head}{_quote(state.id)},"seq":'
                append(f'{head}{seq},"time":"{time}{text_head}{_quote(data)}}}')
            elif kind == LOST:
                append(_loss_text(time, *data))
            else:
                append(
                    f'{_HEADS[kind]}{_quote(state.id)},"seq":{seq},"time":"{time}'
                    + _stream_text(kind, data, state.__class__ is Told)
                )
            continue
        if data is not None:  # the snapshot of a DTO
            append(
                f'{_HEADS[kind]}{_quote(state.id)},"seq":{seq},"time":"{time}",'
                f'"task":{_task_text(data, state.id)}}}'
            )
            continue
        # each line of the life cycle in one step, from what the task's lines share: a task without
        # output is nothing but these
        heads, whose, created, started, rest = state.wire_parts or _shared_parts(state, ns, time)
        if kind == CREATED:
            append(
                f'{_CREATED_HEAD}{whose}{seq},"time":"{time}{heads[CREATED]}'
                f'{created}"{rest}{seq}}}}}'
            )
        elif kind == SCHEDULED:
            append(
                f'{_SCHEDULED_HEAD}{whose}{seq},"time":"{time}{heads[SCHEDULED]}'
                f'{created}","scheduled_utc":"{created}"{rest}{seq}}}}}'
            )
        else:
            if not started:
                started = _note_start(state, ns, time)
            if kind == STARTED:
                append(
                    f'{_STARTED_HEAD}{whose}{seq},"time":"{time}{heads[STARTED]}'
                    f'{started}{rest}{seq}}}}}'
                )
            else:
                append(f'{_HEADS[kind]}{whose}{seq},"time":"{time}{heads[kind]}{started}'
                       f'{_end_text(state, ns, time, rest)}{seq}}}}}')
                # a task that has ended, and that somebody holds on to, needs no text for its lines
                state.wire_parts = None
    return lines


def _stream_text(kind: int, data: tuple[Any, ...], is_told: bool) -> str:
    """The line of a stream event from behind the time to the closing brace, for all that is not
    plain text. A payload of JSON of somebody else's (``is_told``) is checked."""
    is_progress = kind == PROGRESS
    text, progress = (data[2:], data[:2]) if is_progress else (data[:4], data[4:])
    percent, message = progress or (None, "")
    if not text:
        return (
            f'{_STREAM_HEADS[kind]},"percent":{_number_text(percent)},"message":{_quote(message)}}}'
        )
    payload, format_, truncated, original_bytes = text
    if format_ not in ("text", "json"):
        raise WireError(f"format must be 'text' or 'json', got {show(format_)}")
    if is_told and format_ == "json":
        _parse(payload, "a payload of format 'json'")
    parts = [_STREAM_HEADS[kind]]
    if payload or not is_progress:
        parts.append(f',"payload":{_embed(payload) if format_ == "json" else _quote(payload)}')
    if format_ == "json":
        parts.append(',"format":"json"')
    if truncated:
        parts.append(',"truncated":true')
    if original_bytes:
        parts.append(f',"original_bytes":{original_bytes}')
    if is_progress or percent is not None:
        parts.append(f',"percent":{_number_text(percent)}')
    if is_progress or message:
        parts.append(f',"message":{_quote(message)}')
    parts.append("}")
    return "".join(parts)


def _loss_text(time: str, sink: str, reason: str, count: int, by_type: Mapping[str, int]) -> str:
    return (
        f'{{"v":{VERSION},"type":"EventsLost","time":"{time}","sink":{_quote(sink)},'
        f'"count":{count},"reason":{_quote(reason)},"by_type":{_object_text(by_type)}}}'
    )


def _task_text(task: TaskSnapshot, event_task_id: str) -> str:
    parts = [] if task.task_id == event_task_id else [f'"task_id":{_quote(task.task_id)}']
    for name, kind in _TASK_FIELDS.items():
        value = getattr(task, name)
        if value is not None and (kind is not dict or value):
            parts.append(f'"{name}":{_TEXT_OF[kind](value)}')
    return f'{{{",".join(parts)}}}'


def _shared_parts(
    state: TaskState, ns: int, time: str
) -> tuple[tuple[str, ...], str, str, str, str]:
    """What the lines of a task's life cycle share: by kind what stands between the time of the
    event and that of the task's creation, the task's id, that time, what its lines tell of times
    once it has started (left to `_note_start`), and the rest."""
    global _latest
    script = "" if state.source is None else state.source.wire_text or _script_text(state.source)
    name, run_id, latest_script, heads, rest = _latest
    if name is not state.name or run_id is not state.run_id or script is not latest_script:
        heads = tuple(
            [
                f'","task":{{"name":{_quote(state.name)},"status":"{status}",'
                f'"run_id":{_quote(state.run_id)},"created_utc":"'
                for status in _STATUS_TEXTS
            ]
        )
        rest = f'{script},"last_seq":'
        _latest = state.name, state.run_id, script, heads, rest
    if (
        state.timeout is not None
        or state.record_source
        or state.arguments is not None
        or state.metadata_json
    ):
        rest = _rest(state)
    created = time if ns == state.created_ns else ns_text(state.created_ns)
    parts = state.wire_parts = (
        heads,
        f'{_quote(state.id)},"seq":',
        created,
        "",
        rest,
    )
    return parts


_latest: tuple[str | None, str | None, str | None, tuple[str, ...], str] = (
    None,
    None,
    None,
    (),
    "",
)
"""Name, run and script of the latest task, and what follows from them: most tasks share them with
the one before. Replaced as a whole, so no thread sees half of it."""


def _note_start(state: TaskState, ns: int, time: str) -> str:
    """The times of a task from its start on. A task that never started has no such time."""
    heads, whose, created, _, rest = state.wire_parts or _shared_parts(state, ns, time)
    if state.started_ns is None:
        return f'{created}","scheduled_utc":"{created}"'
    moment = time if ns == state.started_ns else ns_text(state.started_ns)
    started = f'{created}","scheduled_utc":"{created}","started_utc":"{moment}"'
    state.wire_parts = heads, whose, created, started, rest
    return started


def _end_text(state: TaskState, ns: int, time: str, rest: str) -> str:
    """What only the last line tells, and the rest."""
    duration = state.duration
    if ns == state.completed_ns and duration is not None:
        text = f',"completed_utc":"{time}","duration":{_number_text(duration)}'
    else:
        text = f',"completed_utc":"{ns_text(state.completed_ns)}"'
        if duration is not None:
            text += f',"duration":{_number_text(duration)}'
    if not (
        state.recorded_message is None
        and state.recorded_percent is None
        and state.failure_type is None
        and state.failure_message is None
        and state.result is None
        and (state.timeout is None or rest.startswith(_TIMEOUT))  # a command may get one late
    ):
        rest = _rest(state, ended=True)
    return text + rest


_TIMEOUT = ',"timeout":'


def _rest(state: TaskState, *, ended: bool = False) -> str:
    """What follows the times in a task, up to the value of ``last_seq``."""
    timeout = "" if state.timeout is None else f"{_TIMEOUT}{_number_text(state.timeout)}"
    progress = outcome = script = ""
    if ended:
        if state.recorded_percent is not None:
            progress = f',"last_progress_percent":{_number_text(state.recorded_percent)}'
        progress += _optional(state, ("recorded_message", "last_progress_message"))
        outcome = _optional(state, *[(field, field) for field in _OUTCOME])
    source = state.source
    if source is not None:
        script = source.wire_text or _script_text(source)
        if (text := state.script_text) is not None:
            script += f',"script_text":{_quote(text)}'
    if state.arguments is not None:
        script += f',"arguments":{_quote(state.arguments)}'
    metadata = f',"metadata":{state.metadata_json}' if len(state.metadata_json) > 2 else ""
    return f'{timeout}{progress}{script}{outcome}{metadata},"last_seq":'


def _script_text(source: Source) -> str:
    text = source.wire_text = (
        f',"script_id":{_quote(source.script_id)},"script_hash":{_quote(source.script_hash)}'
    )
    return text


def _optional(state: TaskState, *fields: tuple[str, str]) -> str:
    return "".join([f',"{name}":{_quote(value)}' for field, name in fields
                    if (value := getattr(state, field)) is not None])


def ns_text(ns: int) -> str:
    """Return wall-clock nanoseconds since the epoch as the wire has it; the text of a millisecond
    is made once (1 us)."""
    millisecond, past = divmod(ns, 1_000_000)
    text = _milliseconds.get(millisecond)
    if text is None:
        if len(_milliseconds) >= 1024:
            _milliseconds.clear()
        second, rest = divmod(millisecond, 1000)
        text = _milliseconds[millisecond] = f"{_second_text(second)}.{rest:03}"
    return text + _MICROS[past // 1000]


_milliseconds: dict[int, str] = {}


@lru_cache(64)
def _second_text(second: int) -> str:
    return utc(second * 1_000_000_000).isoformat()[:19]


def _number_text(value: float | None) -> str:
    if value.__class__ is float and value - value == 0.0:
        return repr(value)  # the usual case, at a third of the price
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "null"
    return float.__repr__(value) if isinstance(value, float) else int.__repr__(value)


def _object_text(value: Mapping[str, Any]) -> str:
    try:
        text = _ENCODE(dict(value))
    except (ValueError, TypeError, RecursionError):
        # NaN, odd keys, too deep: no JSON value, but never a lost event
        text = json_text(value)
    if not text.startswith("{"):
        raise WireError(f"expected a mapping, got {show(value)}")
    return text


def _embed(payload: str) -> str:
    """JSON text as part of one line. Valid JSON has line ends only as white space, the rest only
    inside strings."""
    if payload.isascii() and "\n" not in payload and "\r" not in payload:
        return payload
    return _LINE_BREAKERS.sub(
        lambda match: " " if match[0] in "\n\r" else f"\\u{ord(match[0]):04x}", payload
    )


# ---------------------------------------------------------------- reading

def decode(line: str | bytes | bytearray) -> Event:
    """Return the event of one line; a line end is allowed, fields that this version does not know
    are ignored.

    Raises:
        WireError: and nothing else, whatever the input. The message says what is wrong and shows
            the culprit.
    """
    if isinstance(line, (bytes, bytearray)):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise WireError(
                f"not UTF-8 ({error.reason} at byte {error.start}): {show(bytes(line))}"
            ) from error
    elif isinstance(line, str):
        text = line
    else:
        raise WireError(f"expected a line as str or bytes, got {show(line)}")
    value = _parse(text, "a line")
    is_json = isinstance(value, dict) and value.get("format") == "json" and "payload" in value
    return _event(value, _raw_payload(text, value["payload"]) if is_json else None)


def decode_object(obj: dict[str, Any]) -> Event:
    """Return the event of a wire object that was parsed already, such as one inside a line of a
    park file.

    A payload of format "json" is spelled anew by `json_text`: how its text was written is no longer
    known.

    Raises:
        WireError: as `decode`.
    """
    return _event(obj, None)


def _parse(text: str, what: str) -> Any:
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise WireError(f"{what} is nested too deep: {show(text)}") from error
    except ValueError as error:  # also for integers longer than sys.get_int_max_str_digits()
        raise WireError(f"{what} is not JSON ({error}): {show(text)}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _raw_payload(text: str, value: Any) -> str:
    """The text of a JSON payload as it stands in a line that `encode` wrote, whose fields come in
    its order; of another line the value, spelled anew.

    Neither mark can stand inside a string, where a quote has a backslash before it.
    """
    raw = text.partition(',"payload":')[2].rpartition(',"format":"json"')[0]
    try:
        if _DECODER.decode(raw) == value:
            return raw
    except ValueError:
        pass
    return json_text(value)


def _event(obj: Any, raw_payload: str | None) -> Event:
    if not isinstance(obj, dict):
        raise WireError(f"a wire object is a JSON object, got {show(obj)}")
    version = _take(obj, "v", int)
    if version > VERSION:
        raise WireError(
            f"wire format version {show(version)} is newer than version {VERSION}, the newest that "
            "this bgworker reads; upgrade bgworker"
        )
    if version < 1:
        raise WireError(f"there is no wire format version {show(version)}")
    type_ = _take(obj, "type", EventType)
    time = _take(obj, "time", datetime)
    if type_ is EventType.EVENTS_LOST:
        by_type = _take(obj, "by_type", dict, {})
        for name in by_type:
            _take(by_type, name, int)
        return LossEvent(
            type_,
            time,
            _take(obj, "sink", str),
            _take(obj, "count", int),
            _take(obj, "reason", str),
            by_type,
        )
    task_id, seq = _take(obj, "task_id", str), _take(obj, "seq", int)
    kind = KINDS[type_]
    if kind not in STREAMS:
        return LifecycleEvent(
            type_, task_id, seq, time, _snapshot(_take(obj, "task", dict), task_id)
        )
    stream = _take(obj, "stream", StreamType)
    if stream is not STREAMS[kind]:
        raise WireError(
            f"stream {show(stream.value)} does not fit an event of type {show(type_.value)}"
        )
    format_ = _take(obj, "format", str, "text")
    if format_ not in ("text", "json"):
        raise WireError(f"'format' must be 'text' or 'json', got {show(format_)}")
    if raw_payload is not None:
        payload = raw_payload
    elif format_ == "json":
        payload = json_text(_take(obj, "payload", object))
    else:
        payload = _take(obj, "payload", str, "" if stream is StreamType.PROGRESS else _REQUIRED)
    return StreamEvent(
        type_,
        task_id,
        seq,
        time,
        stream,
        payload,
        format_,
        _take(obj, "truncated", bool, False),
        _take(obj, "original_bytes", int, 0),
        _take(obj, "percent", float, None),
        _take(obj, "message", str, ""),
    )


def _snapshot(obj: dict[str, Any], event_task_id: str) -> TaskSnapshot:
    fields = {name: _take(obj, name, kind) for name, kind in _TASK_FIELDS.items()
              if name in _REQUIRED_OF_TASK or obj.get(name) is not None}
    return TaskSnapshot(task_id=_take(obj, "task_id", str, event_task_id), **fields)


def _take(obj: dict[str, Any], key: str, kind: Any, default: Any = _REQUIRED) -> Any:
    """The value of a field as its kind wants it; null is as good as absent where the field may be
    absent."""
    value = obj.get(key, _REQUIRED)
    if value is _REQUIRED and default is _REQUIRED:
        raise WireError(f"no field {show(key)} in {show(obj)}")
    if value is _REQUIRED or (value is None and default is not _REQUIRED):
        return default
    json_type, convert, expected = _KINDS[kind]
    if isinstance(value, json_type) and (not isinstance(value, bool) or kind in (bool, object)):
        # true is no integer
        try:
            return convert(value) if convert else value
        except (ValueError, OverflowError, KeyError):
            pass  # the right type, but no such time, number or name: said below in the same words
    raise WireError(f"{show(key)} must be {expected}, got {show(value)}")


def _read_time(text: str) -> datetime:
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError(text)
    date, clock, fraction, zone = match.groups()
    text = (
        f"{date}T{clock}.{(fraction or '').ljust(6, '0')[:6]}{'+00:00' if zone in 'Zz' else zone}"
    )
    # in the one spelling that 3.10 reads, too
    return datetime.fromisoformat(text).astimezone(timezone.utc)


def _read_number(value: float) -> float:
    if isinstance(value, float) and not math.isfinite(value):  # 1e999 is JSON
        raise ValueError(value)
    return value


# How a field reads: its JSON type, what makes the value of it or refuses, what to tell of a wrong
# one.
_KINDS: dict[Any, tuple[Any, Any, str]] = {
    str: (str, None, "a string"),
    int: (int, None, "an integer"),
    bool: (bool, None, "true or false"),
    float: ((int, float), _read_number, "a finite number"),
    dict: (dict, dict, "an object"),
    object: (object, None, "a JSON value"),
    datetime: (str, _read_time, "a time such as 2026-11-23T14:46:00.123456Z"),
    **{
        enum: (
            str,
            {member.value: member for member in enum}.__getitem__,
            f"one of {', '.join(enum)}",
        )
        for enum in (EventType, StreamType, TaskStatus)
    },
}

# The fields of the "task" object behind task_id, in order.
_TASK_FIELDS: dict[str, Any] = {
    "name": str,
    "status": TaskStatus,
    "run_id": str,
    "created_utc": datetime,
    "scheduled_utc": datetime,
    "started_utc": datetime,
    "completed_utc": datetime,
    "duration": float,
    "timeout": float,
    "last_progress_percent": float,
    "last_progress_message": str,
    "script_id": str,
    "script_hash": str,
    "script_text": str,
    "arguments": str,
    "failure_type": str,
    "failure_message": str,
    "invocation_info": str,
    "result": str,
    "metadata": dict,
    "last_seq": int,
}
_REQUIRED_OF_TASK = ("name", "status", "run_id", "created_utc")
_TEXT_OF: dict[Any, Any] = {str: _quote, TaskStatus: _quote, int: int.__repr__, float: _number_text,
                            dict: _object_text, datetime: lambda time: f'"{ns_text(ns_of(time))}"'}


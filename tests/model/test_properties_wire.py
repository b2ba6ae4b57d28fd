"""The wire format over everything that hypothesis can think of."""

from __future__ import annotations

import json
import re
import sqlite3
import tempfile
from contextlib import closing
from datetime import datetime, timedelta, timezone

from hypothesis import given, settings, strategies as st

from bgworker import SqliteSink
from bgworker.model import records, text as door, wire
from bgworker.model.errors import WireError
from bgworker.model.events import (
    EventType,
    LifecycleEvent,
    LossEvent,
    StreamEvent,
    StreamType,
    TaskSnapshot,
    TaskStatus,
)
from bgworker.model.failure import describe_failure
from bgworker.model.ids import new_id
from bgworker.running.context import _percent
from bgworker.running.source import source_of
from bgworker.webhook.cloudevents import encode_batch

PAIRS = re.compile("[\ud800-\udbff]+(?=[\udc00-\udfff])")

# All code points, lone surrogates included. A pair of surrogates is the one text that JSON cannot
# tell from another.
texts = st.text(
    st.one_of(st.characters(), st.sampled_from('\0\ud800\udfff\u2028\x85\n"\\\U0001f600é'))
).map(lambda text: PAIRS.sub("", text))
ids = st.one_of(st.text("0123456789abcdef", min_size=32, max_size=32), texts)
zones = st.one_of(
    st.just(timezone.utc), st.integers(-1439, 1439).map(lambda m: timezone(timedelta(minutes=m)))
)
times = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=zones)
numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers())
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=10,
)


def layouts(value):
    """JSON texts of one value: compact, spaced, with and without escapes, white space around it,
    keys twice."""
    return st.sampled_from([
        json.dumps(value), json.dumps(value, separators=(",", ":")), f" {json.dumps(value)}\t",
        f'{{"k" : {json.dumps(value)}, "k":1E5}}', re.sub("[\x85\u2028\u2029\ud800-\udfff]", "",
                                                         json.dumps(value, ensure_ascii=False))])


json_payloads = json_values.flatmap(layouts)
EVENT_TYPES = {stream: EventType(f"Task{stream.value.capitalize()}") for stream in StreamType}


@st.composite
def stream_events(draw):
    stream = draw(st.sampled_from(StreamType))
    is_json = draw(st.booleans())
    return StreamEvent(
        EVENT_TYPES[stream],
        draw(ids),
        draw(st.integers()),
        draw(times),
        stream,
        draw(json_payloads if is_json else texts),
        "json" if is_json else "text",
        draw(st.booleans()),
        draw(st.integers(0, 10**9)),
        draw(st.none() | numbers),
        draw(texts),
    )


lifecycle_types = [
    type_ for type_ in EventType if not type_.is_stream and type_ is not EventType.EVENTS_LOST
]
snapshots = st.builds(
    TaskSnapshot,
    task_id=ids,
    name=texts,
    status=st.sampled_from(TaskStatus),
    run_id=ids,
    created_utc=times,
    scheduled_utc=st.none() | times,
    started_utc=st.none() | times,
    completed_utc=st.none() | times,
    duration=st.none() | numbers,
    timeout=st.none() | numbers,
    last_progress_percent=st.none() | numbers,
    last_progress_message=st.none() | texts,
    script_id=st.none() | texts,
    script_hash=st.none() | texts,
    script_text=st.none() | texts,
    arguments=st.none() | texts,
    failure_type=st.none() | texts,
    failure_message=st.none() | texts,
    invocation_info=st.none() | texts,
    metadata=st.dictionaries(texts, json_values, max_size=4),
    last_seq=st.integers(),
)
lifecycle_events = st.builds(
    LifecycleEvent, st.sampled_from(lifecycle_types), ids, st.integers(), times, snapshots
)
loss_events = st.builds(
    LossEvent,
    st.just(EventType.EVENTS_LOST),
    times,
    texts,
    st.integers(),
    texts,
    st.dictionaries(texts, st.integers(), max_size=4),
)
events = st.one_of(stream_events(), lifecycle_events, loss_events)


# ------------------------------------------------------------ round trips

@given(stream_events())
def test_every_stream_event_comes_back(event):
    assert wire.decode(wire.encode(event)) == event


@given(lifecycle_events)
def test_every_lifecycle_event_comes_back(event):
    assert wire.decode(wire.encode(event)) == event


@given(loss_events)
def test_every_loss_event_comes_back(event):
    assert wire.decode(wire.encode(event)) == event


@given(st.lists(events, max_size=5))
def test_a_batch_is_its_events_line_by_line(batch):
    lines = wire.encode_lines(batch)
    assert [wire.decode(line) for line in lines.split(b"\n")[:-1]] == batch
    assert lines.decode().splitlines() == [wire.encode(event) for event in batch]


@given(events)
def test_a_wire_object_in_other_hands_says_the_same(event):
    back = wire.decode_object(json.loads(wire.encode(event)))
    if isinstance(event, StreamEvent) and event.format == "json":
        assert back.payload == wire.json_text(json.loads(event.payload))
    else:
        assert back == event


# ------------------------------------------------------------ records

own_json = json_values.map(wire.json_text)
stream_data = st.one_of(
    texts,
    st.tuples(texts, st.just("text"), st.booleans(), st.integers(0, 10**9)),
    st.tuples(own_json, st.just("json"), st.booleans(), st.integers(0, 10**9)),
)


@st.composite
def states(draw):
    state = records.TaskState(draw(ids), draw(texts), draw(ids), draw(st.integers(0, 2**61)))
    state.duration = draw(st.none() | st.floats())
    state.started_ns, state.completed_ns = draw(st.integers(0, 2**61)), draw(st.integers(0, 2**61))
    state.metadata_json = draw(
        st.just("") | st.dictionaries(texts, json_values, max_size=3).map(wire.json_text)
    )
    state.failure_message = draw(st.none() | texts)
    state.recorded_percent = draw(st.none() | st.floats() | st.integers())
    return state


@st.composite
def batches(draw):
    tasks = draw(st.lists(states(), min_size=1, max_size=3))
    moment, numbered = draw(st.integers(-10**15, 2**61)), []
    for seq in range(draw(st.integers(0, 8))):
        kind = draw(st.integers(records.CREATED, records.LOST))
        moment += draw(st.integers(-2 * 10**9, 2 * 10**9))
        state, data = draw(st.sampled_from(tasks)), None
        if kind == records.LOST:
            state, data = None, draw(
                st.tuples(texts, texts, st.integers(0), st.dictionaries(texts, st.integers()))
            )
        elif kind == records.PROGRESS:
            data = draw(st.tuples(st.none() | st.floats() | st.integers(), texts))
        elif kind > records.PROGRESS:
            data = draw(stream_data)
        numbered.append((state, seq, kind, moment, data))
    return numbered


@given(batches())
def test_records_are_encoded_to_the_bytes_of_their_dtos(numbered):
    expected = "".join(f"{wire.encode(records.event(record))}\n" for record in numbered).encode()
    assert wire.encode_lines(records.Batch(numbered)) == expected


@given(batches(), st.integers(0, 8))
def test_records_are_encoded_to_the_same_bytes_each_time_in_whatever_batches(numbered, middle):
    whole = wire.encode_lines(records.Batch(numbered))
    # the later first
    parts = [
        wire.encode_lines(records.Batch(part)) for part in (numbered[middle:], numbered[:middle])
    ]
    assert parts[1] + parts[0] == wire.encode_lines(records.Batch(numbered)) == whole


# ------------------------------------------------------------ whatever comes in

def decode_or_refuse(line):
    try:
        event = wire.decode(line)
    except WireError as error:
        assert str(error)
        return
    assert isinstance(event, (LifecycleEvent, StreamEvent, LossEvent))
    assert wire.encode_lines([event]).count(b"\n") == 1


@given(st.one_of(st.text(), st.binary(), st.text('{}[]":,0\\u \n'), st.none(), st.integers()))
def test_any_input_is_read_or_refused(line):
    decode_or_refuse(line)


@given(
    st.dictionaries(
        st.sampled_from(["v", "type", "task_id", "time", "stream", "payload", "format", "x"]),
        json_values,
    )
)
def test_any_json_object_is_read_or_refused(obj):
    decode_or_refuse(json.dumps(obj))
    decode_or_refuse(json.dumps({"v": 1, **obj}))


@given(events, st.data())
def test_a_line_with_a_wrong_field_is_read_or_refused(event, data):
    obj = json.loads(wire.encode(event))
    target = obj["task"] if "task" in obj and data.draw(st.booleans()) else obj
    key = data.draw(st.sampled_from(sorted(target)))
    if data.draw(st.booleans()):
        del target[key]
    else:
        target[key] = data.draw(json_values)
    decode_or_refuse(json.dumps(obj))
    try:
        wire.decode_object(obj)
    except WireError:
        pass


@given(events, st.data())
def test_a_damaged_line_is_read_or_refused(event, data):
    line = wire.encode_lines([event])
    start = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(start, min(len(line), start + 10)))
    damaged = line[:start] + data.draw(st.binary(max_size=5)) + line[end:]
    decode_or_refuse(damaged)
    decode_or_refuse(damaged.decode(errors="replace"))


# ------------------------------------------------------------ the sanitiser

@given(st.text(st.characters()))
def test_sanitised_text_can_be_stored_anywhere_and_keeps_its_length(text):
    clean = door.sanitise(text)
    assert "\0" not in clean and clean.encode().decode() == clean and len(clean) == len(text)
    assert all(new == old or new == "\ufffd" for old, new in zip(text, clean))
    assert door.sanitise(clean) == clean


@given(st.text(st.characters()), st.integers(-5, 60))
def test_fitted_text_is_the_longest_start_that_fits(text, limit):
    clean = door.sanitise(text)
    fitted, original = door.fit(text, limit)
    size = len(clean.encode())
    if size <= max(limit, 0):
        assert (fitted, original) == (clean, 0)
    else:
        assert (
            original == size and clean.startswith(fitted) and len(fitted.encode()) <= max(limit, 0)
        )
        assert len(clean[:len(fitted) + 1].encode()) > limit


class Odd:
    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text or str(1 / 0)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(),
    st.text(st.characters()),
    st.binary(),
    st.complex_numbers(),
    st.builds(Odd, st.text(max_size=3)),
    st.datetimes(),
)
anything = st.recursive(scalars, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.tuples(inner, inner), st.frozensets(scalars, max_size=4),
    st.dictionaries(scalars, inner, max_size=4)), max_leaves=12)


@given(anything)
def test_any_value_becomes_one_line_of_json_that_reads_as_itself(value):
    text = wire.json_text(value)
    assert (
        text.isascii() and len(text.splitlines()) <= 1 and "\\u0000" not in text.replace("\\\\", "")
    )
    assert wire.json_text(json.loads(text)) == text


@given(json_values)
def test_a_clean_json_value_keeps_its_meaning(value):
    if not re.search(r"\\x00|\\ud[89a-f]", repr(value)):
        assert json.loads(wire.json_text(value)) == value


@given(anything)
def test_a_json_payload_of_bgworkers_own_is_exact(value):
    event = StreamEvent(
        EventType.TASK_OUTPUT,
        "t",
        1,
        datetime.now(timezone.utc),
        StreamType.OUTPUT,
        wire.json_text(value),
        "json",
    )
    line = wire.encode(event)
    assert line.isascii() and wire.decode(line) == event


# ------------------------------------------------------------ from the door to the file

@st.composite
def door_records(draw):
    """Records as the emit methods and the end of a task make them, of anything."""
    source = draw(st.sampled_from([None, source_of(layouts), source_of(len)]))
    state = records.TaskState(
        new_id(draw(st.integers(0, 2**61))),
        door.clean(draw(anything), 1024),
        new_id(0),
        draw(st.integers(0, 2**61)),
        source,
    )
    state.arguments = draw(st.none() | anything.map(lambda value: cut_json([value])[0]))
    state.metadata_json = draw(
        st.just("") | st.dictionaries(texts, anything).map(lambda value: cut_json(value)[0])
    )
    state.timeout = draw(st.none() | st.floats(0.001, 9e9) | st.integers(1, 9 * 10**9))
    state.record_source = draw(st.booleans())
    state.result = draw(st.none() | anything.map(lambda value: cut_json(value)[0]))
    state.started_ns, state.completed_ns, state.duration = 0, 2**61, draw(st.floats(0, 9e9))
    state.failure_type, state.failure_message, state.invocation_info = draw(
        st.just((None, None, None))
        | anything.map(lambda value: describe_failure(ValueError(value), 1000))
    )
    made = []
    for seq in range(1, draw(st.integers(2, 8))):
        kind = draw(st.integers(records.CREATED, records.LOST))
        value, data, ns = draw(anything), None, draw(st.integers(-10**15, 2**61))
        if kind == records.LOST:
            made.append(
                (None, 0, kind, ns, (door.clean(value, 64), "overflow", seq, {"TaskOutput": seq}))
            )
            continue
        if kind == records.PROGRESS:
            data = _percent(value, draw(anything)), door.clean(value, 64)
        elif kind > records.PROGRESS:
            fitted, original = cut_json(value)
            data = draw(
                st.sampled_from(
                    [
                        door.clean(value, 64),
                        (fitted, "json", original > 0, original),
                        cut_text(value),
                    ]
                )
            )
        made.append((state, seq, kind, ns, data))
    return made


def cut_json(value):
    return door.fit_json(door.json_text(value), 64)


def cut_text(value):
    fitted, original = door.fit(door.text_of(value), 64)
    return fitted, "text", original > 0, original


@settings(max_examples=60)
@given(door_records())
def test_whatever_came_through_the_door_is_encoded_decoded_and_stored(made):
    batch = records.Batch(made)
    lines = wire.encode_lines(batch).split(b"\n")[:-1]
    assert [wire.decode(line) for line in lines] == list(batch)
    assert [json.loads(line) for line in lines] == [
        each["data"] for each in json.loads(encode_batch(batch, {})[0])
    ]
    with tempfile.TemporaryDirectory() as folder:
        sink = SqliteSink(f"{folder}/history.db")
        sink.write(batch)
        sink.close()
        with closing(sqlite3.connect(f"{folder}/history.db")) as connection:
            spoken = connection.execute("SELECT payload FROM task_streams ORDER BY seq").fetchall()
    told = [event for event in batch if isinstance(event, StreamEvent)]
    assert [payload for payload, in spoken] == [event.payload or event.message for event in told]

"""The wire format by example: the lines as documented, the lines that are refused, and the
sanitiser."""

from __future__ import annotations

import json
import math
import sys
from datetime import datetime, timedelta, timezone
from types import MappingProxyType

import pytest

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

TASK_ID = "0193a5f2c4d17e80b1c2d3e4f5061728"
RUN_ID = "0193a5f2c4d07e80b1c2d3e4f5061700"
TIME = datetime(2026, 11, 23, 14, 46, 0, 123456, tzinfo=timezone.utc)
HEAD = '"task_id":"%s","seq":4,"time":"2026-11-23T14:46:00.123456Z"' % TASK_ID
LINE = '{"v":1,"type":"TaskOutput",' + HEAD + ',"stream":"output","payload":"hello"}'


def output(payload="hello", **fields):
    return StreamEvent(
        EventType.TASK_OUTPUT, TASK_ID, 4, TIME, StreamType.OUTPUT, payload, **fields
    )


def progress(percent, message="", **fields):
    return StreamEvent(
        EventType.TASK_PROGRESS,
        TASK_ID,
        5,
        TIME,
        StreamType.PROGRESS,
        percent=percent,
        message=message,
        **fields,
    )


def failed(**fields):
    task = {
        "task_id": TASK_ID,
        "name": "load",
        "status": TaskStatus.FAILED,
        "run_id": RUN_ID,
        "created_utc": TIME,
        "last_seq": 9,
        **fields,
    }
    return LifecycleEvent(EventType.TASK_FAILED, TASK_ID, 9, TIME, TaskSnapshot(**task))


def changed(**fields):
    """The example line with some fields changed, or left out where the value is ``...``."""
    obj = {**json.loads(LINE), **fields}
    return json.dumps({name: value for name, value in obj.items() if value is not ...})


# ------------------------------------------------------------ the documented lines

GOLDEN = [
    (output(), LINE),
    (
        progress(40.0, "2 of 5"),
        f'{{"v":1,"type":"TaskProgress","task_id":"{TASK_ID}","seq":5,'
        '"time":"2026-11-23T14:46:00.123456Z",'
        '"stream":"progress","percent":40.0,"message":"2 of 5"}',
    ),
    (
        failed(
            started_utc=TIME,
            duration=0.25,
            failure_type="KeyError",
            failure_message="'x'",
            metadata={"a": [1]},
        ),
        f'{{"v":1,"type":"TaskFailed","task_id":"{TASK_ID}","seq":9,'
        '"time":"2026-11-23T14:46:00.123456Z",'
        f'"task":{{"name":"load","status":"failed","run_id":"{RUN_ID}",'
        '"created_utc":"2026-11-23T14:46:00.123456Z",'
        '"started_utc":"2026-11-23T14:46:00.123456Z","duration":0.25,"failure_type":"KeyError",'
        '"failure_message":"\'x\'","metadata":{"a":[1]},"last_seq":9}}',
    ),
    (
        LossEvent(EventType.EVENTS_LOST, TIME, "hook", 120, "overflow", {"TaskOutput": 120}),
        '{"v":1,"type":"EventsLost","time":"2026-11-23T14:46:00.123456Z","sink":"hook","count":120,'
        '"reason":"overflow","by_type":{"TaskOutput":120}}',
    ),
    (
        output('{"a": 1}', format="json"),
        '{"v":1,"type":"TaskOutput",'
        + HEAD
        + ',"stream":"output","payload":{"a": 1},"format":"json"}',
    ),
    (
        output("hel", truncated=True, original_bytes=5),
        '{"v":1,"type":"TaskOutput",'
        + HEAD
        + ',"stream":"output","payload":"hel","truncated":true,"original_bytes":5}',
    ),
    (
        progress(None),
        f'{{"v":1,"type":"TaskProgress","task_id":"{TASK_ID}","seq":5,'
        '"time":"2026-11-23T14:46:00.123456Z",'
        '"stream":"progress","percent":null,"message":""}',
    ),
]


@pytest.mark.parametrize("event, line", GOLDEN, ids=[line[7:35] for _, line in GOLDEN])
def test_the_documented_lines_are_written_and_read(event, line):
    assert wire.encode(event) == line
    assert wire.decode(line) == event
    assert wire.decode(line.encode() + b"\n") == event
    assert wire.decode(bytearray(line.encode() + b"\r\n")) == event
    assert wire.encode_lines([event, event]) == (line + "\n").encode() * 2


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "\0",
        "\ud800",
        "\udfff tail",
        "\u2028\u2029\x85\x0b\x0c\x1c",
        "\U0001f600",
        "\r\n",
        '"\\',
        "\x7f",
        "\ude00\ud83d",
    ],
)
def test_any_text_comes_back_and_its_line_is_one_line_of_ascii(payload):
    line = wire.encode(output(payload))
    assert line.isascii() and len(line.splitlines()) == 1
    assert wire.decode(line) == output(payload)


def test_two_surrogates_side_by_side_come_back_as_the_character_that_they_mean():
    assert wire.decode(wire.encode(output("\ud83d\ude00"))) == output("\U0001f600")


@pytest.mark.parametrize(
    "payload",
    [
        '{"a": 1}',
        "1E5",
        "1e999",
        '{"a":1,"a":2}',
        " [1 , 2]\t",
        "-0.0",
        "null",
        "true",
        '""',
        '"payload"',
        '{"payload":{"payload":"}"},"format":"json"}',
        '"\\u00e9\\/"',
        '"é 日本 \U0001f600"',
        "0.1000",
        "123456789012345678901234567890",
        "[]",
        "{}",
    ],
)
def test_a_json_payload_comes_back_with_the_very_text_that_it_had(payload):
    event = output(payload, format="json")
    assert wire.decode(wire.encode(event)) == event
    assert wire.decode(wire.encode_lines([event])) == event


def test_a_json_payload_takes_one_line_whatever_it_holds():
    event = output('[1,\r\n"\u2028\x85\u2029é\ud800"]', format="json")
    line = wire.encode(event)
    assert len(line.splitlines()) == 1
    assert wire.decode(line).payload == '[1,  "\\u2028\\u0085\\u2029é\\ud800"]'
    assert json.loads(wire.decode(line).payload) == json.loads(event.payload)
    assert wire.encode_lines([event]).decode() == line + "\n"


def test_a_json_payload_is_found_in_lines_laid_out_by_others():
    spread = json.dumps(json.loads(wire.encode(output('{"a": [1, 2]}', format="json"))), indent=2)
    assert wire.decode(spread).payload.replace("\n", "").replace(" ", "") == '{"a":[1,2]}'
    spaced = (
        '{ "payload" : [1] , "format":"json", "v": 1, "stream":"output", "type":"TaskOutput", '
        '%s, "p":"}" }'
        % HEAD
    )
    assert wire.decode(spaced) == output("[1]", format="json")
    twice = (
        '{"v":1,"payload":1,"pay\\u006coad":2,"format":"json","stream":"output",'
        '"type":"TaskOutput",%s}'
        % HEAD
    )
    assert wire.decode(twice) == output("2", format="json")


@pytest.mark.parametrize(
    "payload", ["", "{", "NaN", "[Infinity]", "1 2", "{'a':1}", '"\n"', "[" * 100_000, "9" * 5000]
)
def test_a_json_payload_that_nobody_could_read_is_not_written(payload):
    if payload.startswith("9") and not hasattr(sys, "set_int_max_str_digits"):
        pytest.skip("this interpreter reads integers of any length")
    with pytest.raises(WireError, match="payload"):
        wire.encode(output(payload, format="json"))


def test_a_wire_object_parsed_by_somebody_else_is_read_too():
    assert wire.decode_object(json.loads(LINE)) == output()
    assert wire.decode_object(
        json.loads(wire.encode(output('{"a": "é"}', format="json")))
    ) == output('{"a":"\\u00e9"}', format="json")
    assert wire.decode_object(json.loads(wire.encode(failed(metadata={"a": 1})))) == failed(
        metadata={"a": 1}
    )


def test_fields_of_a_later_minor_change_are_ignored():
    assert wire.decode(changed(priority=5, trace={"id": [1]})) == output()


def test_null_is_as_good_as_absent_where_a_field_may_be_absent():
    absent = dict.fromkeys(["format", "truncated", "original_bytes", "percent", "message"])
    assert wire.decode(changed(**absent)) == output()


# ------------------------------------------------------------ times and numbers

def test_other_time_zones_become_utc():
    berlin = TIME.astimezone(timezone(timedelta(hours=1)))
    assert '"time":"2026-11-23T14:46:00.123456Z"' in wire.encode(
        StreamEvent(EventType.TASK_OUTPUT, TASK_ID, 4, berlin, StreamType.OUTPUT))


@pytest.mark.parametrize(
    "text, time",
    [
        ("2026-11-23T15:46:00.123456+01:00", TIME),
        ("2026-11-23t14:46:00.123456789z", TIME),
        ("2026-11-23 14:46:00Z", TIME.replace(microsecond=0)),
        ("2026-11-23T14:46:00.5Z", TIME.replace(microsecond=500000)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=timezone.utc)),
    ],
)
def test_times_are_read_in_every_spelling_of_rfc_3339(text, time):
    event = wire.decode(changed(time=text))
    assert event.created_utc == time and event.created_utc.tzinfo is timezone.utc


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-11-23",
        "2026-11-23T14:46:00",
        "2026-02-30T00:00:00Z",
        "2026-11-23T14:46:60Z",
        "2026-11-23T14:46Z",
        "0001-01-01T00:00:00+05:00",
        "9999-12-31T23:59:59-01:00",
        "２026-11-23T14:46:00Z",
        "2026-11-23T14:46:00+99:00",
        "2026-11-23T14:46:00Z\n",
        "2026-W48-1T14:46:00Z",
        5,
        None,
        True,
    ],
)
def test_what_is_not_a_time_is_refused(text):
    with pytest.raises(WireError, match="'time' must be a time such as 2026"):
        wire.decode(changed(time=text))


@pytest.mark.parametrize(
    "time", [datetime(2026, 1, 1), datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1)))]
)
def test_a_time_that_is_no_moment_in_utc_is_not_written(time):
    with pytest.raises(WireError, match="datetime.datetime"):
        wire.encode(StreamEvent(EventType.TASK_OUTPUT, TASK_ID, 1, time, StreamType.OUTPUT))
    with pytest.raises(WireError):
        wire.encode(failed(started_utc=time))


@pytest.mark.parametrize("percent", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_null(percent):
    assert wire.decode(wire.encode(progress(percent))) == progress(None)
    assert wire.decode(wire.encode(failed(timeout=percent))) == failed()
    assert wire.decode(wire.encode(failed(metadata={"a": [percent]}))) == failed(
        metadata={"a": [None]}
    )


@pytest.mark.parametrize(
    "percent", [0, 40, 1 / 3, 1e-320, 5e-324, 1.7976931348623157e308, -0.0, 10**30]
)
def test_numbers_come_back_exactly(percent):
    back = wire.decode(wire.encode(progress(percent))).percent
    assert (repr(back), type(back)) == (repr(percent), type(percent))


# ------------------------------------------------------------ life-cycle and loss events

def test_a_snapshot_of_another_task_keeps_its_own_id():
    event = failed(task_id=RUN_ID)
    assert f'"task":{{"task_id":"{RUN_ID}","name"' in wire.encode(event)
    assert wire.decode(wire.encode(event)) == event


def test_every_field_of_a_snapshot_is_on_the_wire_in_its_order():
    full = {name: "x" for name in TaskSnapshot.__dataclass_fields__}
    full.update(
        status=TaskStatus.FAILED,
        duration=1.5,
        timeout=2,
        last_progress_percent=3.5,
        metadata={"k": "\0"},
        last_seq=9,
        **{name: TIME for name in full if name.endswith("_utc")},
    )
    line = wire.encode(failed(**full))
    assert list(json.loads(line)["task"]) == list(TaskSnapshot.__dataclass_fields__)
    assert wire.decode(line) == failed(**full)


def test_snapshots_share_no_metadata():
    line = wire.encode(failed())
    assert wire.decode(line).task.metadata is not wire.decode(line).task.metadata


@pytest.mark.parametrize(
    "metadata", [MappingProxyType({"a": 1}), {"a": (1, MappingProxyType({}))}, {(1, 2): {1}}]
)
def test_metadata_that_is_not_plain_json_is_written_all_the_same(metadata):
    assert wire.decode(wire.encode(failed(metadata=metadata))).task.metadata


def test_metadata_that_is_no_mapping_is_refused():
    with pytest.raises(WireError, match="mapping"):
        wire.encode(failed(metadata=[1]))


@pytest.mark.parametrize("event", [
    StreamEvent(EventType.TASK_OUTPUT, TASK_ID, 1, TIME, StreamType.ERROR),
    StreamEvent(EventType.TASK_STARTED, TASK_ID, 1, TIME, StreamType.OUTPUT),
    output("x", format="xml"),
    LossEvent(EventType.TASK_OUTPUT, TIME, "hook", 1, "overflow"),
    LifecycleEvent(EventType.TASK_OUTPUT, TASK_ID, 1, TIME, failed().task),
    LifecycleEvent(EventType.EVENTS_LOST, TASK_ID, 1, TIME, failed().task)])
def test_an_event_whose_parts_contradict_each_other_is_not_written(event):
    with pytest.raises(WireError):
        wire.encode(event)


# ------------------------------------------------------------ lines that are refused

def test_a_newer_version_is_refused_with_the_remedy():
    with pytest.raises(WireError, match="version 2 is newer than version 1.*upgrade bgworker"):
        wire.decode('{"v":2,"anything":"else"}')


TASK = json.loads(wire.encode(failed()))["task"]


@pytest.mark.parametrize(
    "line, message",
    [
        (b"\xff\xfe", "not UTF-8"),
        ("", "not JSON"),
        ("\n", "not JSON"),
        ("{", "not JSON"),
        (LINE + LINE, "not JSON"),
        (LINE[:-20], "not JSON"),
        ("\ufeff" + LINE, "not JSON"),
        ('{"v":NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("[]", "JSON object, got \\[\\]"),
        ("null", "JSON object"),
        ('"x"', "JSON object"),
        ("1", "JSON object"),
        (None, "expected a line"),
        (5, "expected a line"),
        ({}, "expected a line"),
        (memoryview(b"{}"), "expected a line"),
        ("{}", "no field 'v'"),
        (changed(v="1"), "'v' must be an integer, got '1'"),
        (changed(v=True), "got True"),
        (changed(v=1.0), "'v' must be an integer"),
        (changed(v=0), "no wire format version 0"),
        (changed(type=...), "no field 'type'"),
        (changed(type="TaskPaused"), "'type' must be one of TaskCreated,.*TaskPau"),
        (changed(type=[]), "'type' must be one of"),
        (changed(type="TaskStarted"), "no field 'task'"),
        (changed(type="TaskError"), "stream 'output' does not fit an event of type 'TaskError'"),
        (changed(stream="stdout"), "'stream' must be one of output, .*, got 'stdout'"),
        (changed(stream=...), "no field 'stream'"),
        (changed(seq=...), "no field 'seq'"),
        (changed(seq="4"), "'seq' must be an integer, got '4'"),
        (changed(seq=True), "'seq' must be an integer, got True"),
        (changed(seq=4.0), "'seq' must be an integer"),
        (changed(task_id=None), "'task_id' must be a string, got None"),
        (changed(payload=...), "no field 'payload'"),
        (changed(payload={}), "'payload' must be a string, got {}"),
        (changed(payload=..., format="json"), "no field 'payload'"),
        (changed(format="xml"), "'format' must be .*'xml'"),
        (changed(format=["json"]), "'format' must be a string"),
        (changed(truncated=1), "'truncated' must be true or false"),
        (changed(original_bytes=True), "'original_bytes' must be an integer"),
        (changed(percent="1"), "a finite number"),
        (changed(percent=True), "'percent' must be a finite number"),
        (changed(message=1), "'message' must be a string"),
        (
            LINE.replace('"payload"', '"percent":1e999,"payload"'),
            "'percent' must be a finite number, got inf",
        ),
        (changed(type="TaskFailed", task=[]), "'task' must be an object"),
        (changed(type="TaskFailed", task={}), "no field 'name'"),
        (
            changed(type="TaskFailed", task={**TASK, "status": "done"}),
            "'status' must be one of created,.*got 'done'",
        ),
        (
            changed(type="TaskFailed", task={**TASK, "started_utc": "soon"}),
            "'started_utc' must be a time.*got 'soon'",
        ),
        (
            changed(type="TaskFailed", task={**TASK, "duration": "1"}),
            "'duration' must be a finite number",
        ),
        (
            changed(type="TaskFailed", task={**TASK, "metadata": "x"}),
            "'metadata' must be an object",
        ),
        (changed(type="EventsLost"), "no field 'sink'"),
        (
            changed(type="EventsLost", by_type={"TaskOutput": True}),
            "'TaskOutput' must be an integer",
        ),
        (changed(type="EventsLost", by_type=[1]), "'by_type' must be an object"),
        (changed(type="EventsLost", sink="s", reason="r", count="1"), "'count' must be an integer"),
    ],
)
def test_a_bad_line_is_refused_and_the_message_says_why(line, message):
    with pytest.raises(WireError, match=message) as caught:
        wire.decode(line)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


@pytest.mark.skipif(
    not hasattr(sys, "set_int_max_str_digits"), reason="reads integers of any length"
)
def test_integers_beyond_what_the_interpreter_reads_are_refused():
    with pytest.raises(WireError, match="not JSON"):
        wire.decode(LINE.replace(":4,", ":%s," % ("4" * 5000)))
    with pytest.raises(WireError):
        wire.decode_object({**json.loads(LINE), "v": 10**5000})
    with pytest.raises(WireError):
        wire.decode_object({**json.loads(LINE), "seq": [10**5000]})


def test_messages_show_little_of_a_huge_line():
    for line in [
        "x" * 10**6,
        b"\xff" * 10**6,
        LINE + "x" * 10**6,
        json.dumps({"v": ["x" * 10**6] * 100}),
    ]:
        with pytest.raises(WireError) as caught:
            wire.decode(line)
        assert len(str(caught.value)) < 500


# ------------------------------------------------------------ batches

def test_a_batch_of_records_is_encoded_without_building_a_dto(monkeypatch):
    state = records.TaskState(TASK_ID, "load", RUN_ID, 1_795_445_160_000_000_000)
    data = [("hello"), ('{"a":1}', "json", False, 0), ("hel", "text", True, 5)]
    batch = records.Batch(
        [
            (state, seq, records.OUTPUT, 1_795_445_160_123_456_789, item)
            for seq, item in enumerate(data, 4)
        ]
        + [
            (state, 7, records.PROGRESS, 1_795_445_161_000_000_999, (40.0, "2 of 5")),
            (state, 8, records.COMPLETED, 1_795_445_161_000_000_999, None),
            (None, 0, records.LOST, 0, ("hook", "overflow", 1, {"TaskOutput": 1})),
        ]
    )
    expected = "".join(f"{wire.encode(event)}\n" for event in records.Batch(batch.records)).encode()
    monkeypatch.setattr(records, "event", None)
    monkeypatch.setattr(records.TaskState, "snapshot_at", None)
    assert wire.encode_lines(batch) == expected
    assert batch._events is None


def test_an_empty_batch_has_no_lines():
    assert wire.encode_lines([]) == wire.encode_lines(records.Batch([])) == b""


# ------------------------------------------------------------ the sanitiser

@pytest.mark.parametrize("text, clean", [
    ("", ""), ("abc\n\x1b", "abc\n\x1b"), ("a\0b", "a\ufffdb"), ("é\0", "é\ufffd"),
    ("\ud800x\udfff", "\ufffdx\ufffd"), ("日本 \U0001f600", "日本 \U0001f600")])
def test_nul_and_surrogates_are_replaced(text, clean):
    assert door.sanitise(text) == clean


def test_clean_text_is_not_copied():
    for text in ["x" * 1000, "é" * 1000]:
        assert door.sanitise(text) is text
        assert door.fit(text, 10_000)[0] is text


@pytest.mark.parametrize(
    "text, limit, cut",
    [
        ("abc", 3, ("abc", 0)),
        ("abcd", 3, ("abc", 4)),
        ("é", 1, ("", 2)),
        ("aé", 2, ("a", 3)),
        ("aé", 3, ("aé", 0)),
        ("\U0001f600\U0001f600", 7, ("\U0001f600", 8)),
        ("a\0", 3, ("a", 4)),
        ("a\0", 4, ("a\ufffd", 0)),
        ("", 0, ("", 0)),
        ("abc", 0, ("", 3)),
        ("abc", -1, ("", 3)),
        ("\ud800" * 3, 5, ("\ufffd", 9)),
    ],
)
def test_text_is_cut_between_characters_and_its_full_size_is_told(text, limit, cut):
    assert door.fit(text, limit) == cut


# ------------------------------------------------------------ any value as JSON

class Exploding:
    def __repr__(self):
        raise RuntimeError("boom")


class ExplodingMeta(type):
    @property
    def __name__(cls):
        raise RuntimeError("boom")


class Nameless(metaclass=ExplodingMeta):
    __str__ = Exploding.__repr__


class Liar:
    @property
    def __class__(self):
        raise RuntimeError("boom")


class ExplodingDict(dict):
    def items(self):
        raise RuntimeError("boom")


class Surrogate:
    def __str__(self):
        return "\ud800"


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "null"),
        ("é\u2028", '"\\u00e9\\u2028"'),
        ({"a": (1, 2.5, True)}, '{"a":[1,2.5,true]}'),
        ([math.nan, math.inf, {"x": -math.inf}], '[null,null,{"x":null}]'),
        ("a\0\ud800", '"a\\ufffd\\ufffd"'),
        ({"\0": "\\ud800", "k": "\\\ud800"}, '{"\\ufffd":"\\\\ud800","k":"\\\\\\ufffd"}'),
        ("\U0001f600", '"\\ud83d\\ude00"'),
        ({1: "a", 1.5: "b", None: "c", True: "d"}, '{"1":"d","1.5":"b","null":"c"}'),
        ({1: "a", "1": "b"}, '{"1":"b"}'),
        ({"true": 1, True: 2}, '{"true":2}'),
        ({(1, 2): 3, b"k": 4}, '{"(1, 2)":3,"k":4}'),
        ({math.nan: 1}, '{"null":1}'),
        ({5}, "[5]"),
        (frozenset(), "[]"),
        (b"a\xff", '"a\\ufffd"'),
        (bytearray(b"\0"), '"\\ufffd"'),
        (1j, '"1j"'),
        (MappingProxyType({"a": 1}), '{"a":1}'),
        (TaskStatus.FAILED, '"failed"'),
        (Surrogate(), '"\\ufffd"'),
        (timezone.utc, '"UTC"'),
        ([Exploding(), 1], '["<unprintable Exploding object>",1]'),
        (Nameless(), '"<unprintable object>"'),
        ({"a": ExplodingDict(b=1)}, '{"a":"<unprintable ExplodingDict object>"}'),
        ({Exploding(): 1}, '{"<unprintable Exploding object>":1}'),
        ([Liar(), math.nan], '["<unprintable Liar object>",null]'),
    ],
)
def test_any_value_becomes_json_text(value, text):
    assert wire.json_text(value) == text
    assert wire.json_text(json.loads(text)) == text


@pytest.mark.skipif(
    not hasattr(sys, "set_int_max_str_digits"), reason="prints integers of any length"
)
def test_integers_too_long_to_be_read_back_become_hexadecimal():
    huge = 16**5000
    assert wire.json_text([huge, {huge: -huge}]) == '["0x1%s",{"0x1%s":"-0x1%s"}]' % (
        ("0" * 5000,) * 3
    )


def test_a_circular_value_says_so_only_where_it_is_circular():
    value = {"a": 1}
    value["self"] = [value]
    assert wire.json_text(value) == '{"a":1,"self":["<unprintable dict object>"]}'
    shared = []
    assert wire.json_text([shared, shared, math.nan]) == "[[],[],null]"


def test_a_value_nested_too_deep_keeps_its_outer_part():
    value = "bottom"
    for _ in range(100_000):
        value = [value]
    text = wire.json_text(value)
    assert (
        text.startswith("[[[[")
        and "unprintable list" in text
        and wire.json_text(json.loads(text)) == text
    )


def test_json_text_returns_even_when_the_stack_is_full():
    def fall(depth):
        try:
            return fall(depth + 1)
        except RecursionError:
            return wire.json_text([[math.nan], Exploding()])
    assert json.loads(fall(0))

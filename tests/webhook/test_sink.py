"""The webhook sink when all goes well: what it sends, how that is signed and verified, what it
refuses."""

from __future__ import annotations

import base64
import gc
import hashlib
import hmac
import json
import os
import pickle
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pytest import MonkeyPatch

import bgworker
from bgworker import (
    ConfigurationError,
    Event,
    EventType,
    PermanentSinkError,
    Scheduler,
    StreamEvent,
    StreamType,
    TemporarySinkError,
    WebhookSink,
    current_task,
    open_sink,
)
from bgworker.model import records, wire
from bgworker.model.records import (
    COMPLETED,
    CREATED,
    LOST,
    OUTPUT,
    PROGRESS,
    STARTED,
    Batch,
    TaskState,
)
from bgworker.webhook import VerificationError, cloudevents, new_secret, signing, verify
from bgworker.webhook.cloudevents import KnownRuns, encode_batch
from tests.receiver import OTHER_SECRET, SECRET, SOON, Receiver, Request, answer
from tests.support import ROOT

NS = 1_795_445_160_123_456_789  # 2026-11-23T14:46:00.123456Z
RUN, TASK = "b" * 32, "a" * 32
STATE = TaskState(TASK, "task", RUN, NS)


def batch(*texts: str, first: int = 1) -> Batch:
    return Batch([(STATE, seq, OUTPUT, NS + seq, text) for seq, text in enumerate(texts, first)])


def life() -> list[records.Record]:
    state = TaskState("c" * 32, "life", "d" * 32, NS)
    state.started_ns, state.completed_ns, state.duration = NS + 1, NS + 2_000_000, 0.5
    return [
        (state, 1, CREATED, NS, None),
        (state, 2, STARTED, NS + 1000, None),
        (state, 3, PROGRESS, NS + 2000, (40.0, "2 of 5")),
        (state, 4, OUTPUT, NS + 3000, ('{"a":[1,null]}', "json", False, 0)),
        (state, 5, COMPLETED, NS + 4000, None),
    ]


LOSS: records.Record = (None, 0, LOST, NS, ("hook", "overflow", 3, {"TaskOutput": 3}))


def dtos(given: Sequence[records.Record]) -> list[Event]:
    return [records.event(record) for record in given]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        yield made


def sink_to(url: str, **config: Any) -> WebhookSink:
    return WebhookSink(url, **{"secret": SECRET, **config})


def in_fresh_interpreter(code: str, **environment: str) -> str:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:This process", "-c", code],
        timeout=120,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- the request --


def test_a_batch_is_one_post_with_the_headers_of_both_standards(receiver: Receiver) -> None:
    sink = sink_to(
        receiver.url + "?a=b&c", headers={"Authorization": "Bearer t0ken", "X-Team": "blue"}
    )
    sink.open()
    sink.write(batch("hello", "there"))
    sink.close()
    [request] = receiver.requests
    assert request.line == "POST /hook?a=b&c HTTP/1.1"
    assert request.headers["content-type"] == "application/cloudevents-batch+json"
    assert request.headers["user-agent"] == f"bgworker/{bgworker.__version__}"
    assert (request.headers["authorization"], request.headers["x-team"]) == ("Bearer t0ken", "blue")
    assert re.fullmatch("msg_[0-9a-f]{32}", request.message_id)
    assert request.payloads == ["hello", "there"]


def test_a_user_agent_of_ones_own_replaces_ours(receiver: Receiver) -> None:
    sink_to(receiver.url, headers={"User-Agent": "mine/2"}).write(batch("a"))
    assert receiver.requests[0].headers["user-agent"] == "mine/2"


def test_the_signature_is_the_one_that_the_standard_describes(receiver: Receiver) -> None:
    sink = sink_to(receiver.url)
    sink._now = lambda: 1_700_000_000.9  # type: ignore[method-assign]
    sink.write(batch("hello"))
    [request] = receiver.requests
    assert request.headers["webhook-timestamp"] == "1700000000"
    signed = f"{request.message_id}.1700000000.".encode() + request.body
    mac = hmac.new(base64.b64decode(SECRET.removeprefix("whsec_")), signed, hashlib.sha256)
    assert request.headers["webhook-signature"] == f"v1,{base64.b64encode(mac.digest()).decode()}"


def test_several_secrets_sign_each_and_a_receiver_with_any_of_them_is_content(
    receiver: Receiver,
) -> None:
    for secrets in (
        [SECRET, OTHER_SECRET],
        f"{SECRET} {OTHER_SECRET}",
        (each for each in (SECRET, OTHER_SECRET)),
    ):
        sink_to(receiver.url, secret=secrets).write(batch("hello"))
    for request in receiver.requests:
        assert len(request.headers["webhook-signature"].split(" ")) == 2
        for known in (SECRET, OTHER_SECRET, [new_secret(), OTHER_SECRET]):
            assert verify(known, request.headers, request.body) == request.message_id
        with pytest.raises(
            VerificationError, match="webhook-signature: none was made with a secret"
        ):
            verify(new_secret(), request.headers, request.body)


def test_a_batch_has_the_same_id_and_bytes_and_a_fresh_time_and_signature_on_each_attempt() -> None:
    with Receiver(answer(503), answer(500), answer(204)) as receiver:
        sink = sink_to(receiver.url)
        for now in (1_000.0, 2_000.0):
            sink._now = lambda: now  # type: ignore[method-assign]
            with pytest.raises(TemporarySinkError):
                sink.write(batch("hello", "there"))
        sink._now = lambda: 3_000.0  # type: ignore[method-assign]
        sink.write(batch("hello", "there"))
    first, second, third = receiver.requests
    assert [request.headers["webhook-timestamp"] for request in receiver.requests] == [
        "1000",
        "2000",
        "3000",
    ]
    assert first.body == second.body == third.body
    assert first.message_id == second.message_id == third.message_id
    assert len({request.headers["webhook-signature"] for request in receiver.requests}) == 3


def test_other_events_have_another_id(receiver: Receiver) -> None:
    sink = sink_to(receiver.url)
    for each in (
        batch("a", "b"),
        batch("a"),
        batch("b", first=2),
        batch("a", "c"),
        batch("a", "b", first=2),
        batch("b", "a"),
    ):
        sink.write(each)
    assert len({request.message_id for request in receiver.requests}) == 6


def test_a_batch_has_the_same_id_and_bytes_though_its_task_goes_on_between_two_attempts() -> None:
    from threading import Event as Flag

    failed, go_on = Flag(), Flag()

    def fail(connection: Any) -> None:
        connection.answer(503, of=connection.read())
        failed.set()
        assert go_on.wait(SOON)  # the retry comes when the task has ended

    def run() -> None:
        current_task().output("before")
        current_task().progress(3, 10, "three")
        assert failed.wait(SOON)
        current_task().progress(10, 10, "ten")

    with Receiver(fail) as receiver, Scheduler(1) as pool:
        pool.register_sink(
            sink_to(receiver.url),
            options=bgworker.SinkOptions(retry=bgworker.RetryPolicy(base=0.001)),
        )
        task = pool.submit(run)
        assert task.wait(SOON)
        pool.get(task.id)
        go_on.set()
        assert pool.flush(SOON)
    first, second = receiver.requests[:2]
    assert (first.message_id, first.body) == (second.message_id, second.body)
    assert receiver.requests[-1].elements[-1]["type"] == "io.bgworker.TaskCompleted.v1"


# -- the body --


def test_an_element_wraps_the_wire_object_as_it_is(receiver: Receiver) -> None:
    sink_to(receiver.url).write(batch('say "hi" \u2028 \U0001f642'))
    [element] = receiver.requests[0].elements
    data = element.pop("data")
    assert element == {
        "specversion": "1.0",
        "id": f"{TASK}:1",
        "source": f"/bgworker/{RUN}",
        "type": "io.bgworker.TaskOutput.v1",
        "subject": TASK,
        "time": "2026-11-23T14:46:00.123456Z",
        "sequence": "0000000001",
    }
    assert data == json.loads(
        wire.encode(records.event(batch('say "hi" \u2028 \U0001f642').records[0]))
    )


def test_every_kind_of_event_has_its_type_its_time_and_its_number() -> None:
    body, _ = encode_batch(Batch(life()), {})
    elements = json.loads(body)
    names = ["TaskCreated", "TaskStarted", "TaskProgress", "TaskOutput", "TaskCompleted"]
    assert [element["type"] for element in elements] == [f"io.bgworker.{name}.v1" for name in names]
    assert [element["sequence"] for element in elements] == [
        f"000000000{number}" for number in (1, 2, 3, 4, 5)
    ]
    for element, event in zip(elements, dtos(life())):
        assert (element["time"], element["data"]) == (
            element["data"]["time"],
            json.loads(wire.encode(event)),
        )
        assert (element["source"], element["subject"]) == (f"/bgworker/{'d' * 32}", "c" * 32)


def test_a_loss_has_an_id_of_its_own_that_stays_and_the_sink_as_its_subject() -> None:
    later = (None, 0, LOST, NS + 1000, LOSS[4])
    nameless = (None, 0, LOST, NS, ("", *LOSS[4][1:]))
    losses = [Batch([each]) for each in (LOSS, LOSS, later, nameless)]
    first, again, other, empty = (json.loads(encode_batch(each, {})[0])[0] for each in losses)
    assert first == again and re.fullmatch("lost:[0-9a-f]{32}", first["id"])
    assert (first["source"], first["subject"], first["type"]) == (
        "/bgworker",
        "hook",
        "io.bgworker.EventsLost.v1",
    )
    assert (first["time"], first["data"]["count"]) == ("2026-11-23T14:46:00.123456Z", 3)
    assert "sequence" not in first and other["id"] != first["id"]
    assert "subject" not in empty, "CloudEvents forbid an empty one"


texts = st.one_of(st.text(st.characters(codec="utf-8"), max_size=12),
                  st.sampled_from(['","time":"', '\\","time":"', "\u2028\x85\r\n"]))
ids = texts.filter(bool)


@st.composite
def batches(draw: Any) -> list[records.Record]:
    names = draw(st.lists(ids, min_size=1, max_size=3, unique=True))
    states = [
        TaskState(name, draw(texts), draw(texts), draw(st.integers(0, 2**61))) for name in names
    ]
    numbered: list[records.Record] = []
    for seq in range(1, draw(st.integers(1, 8))):
        kind = draw(st.integers(CREATED, LOST))
        state: TaskState | None = draw(st.sampled_from(states))
        data: Any = None
        if kind == LOST:
            by_type = st.dictionaries(texts, st.integers(0, 9))
            state, data = None, draw(st.tuples(texts, texts, st.integers(0, 9), by_type))
        elif kind == PROGRESS:
            data = draw(st.tuples(st.none() | st.floats(0, 100), texts))
        elif kind > PROGRESS:
            data = draw(texts | st.tuples(texts, st.just("text"), st.booleans(), st.integers(0, 9)))
        numbered.append(
            (state, 0 if state is None else seq, kind, draw(st.integers(0, 2**61)), data)
        )
    return numbered


@given(batches())
def test_a_batch_and_its_dtos_are_the_same_bytes_where_their_runs_are_known(
    numbered: list[records.Record],
) -> None:
    runs = {record[0].id: record[0].run_id for record in numbered if record[0] is not None}
    body, text = encode_batch(Batch(numbered), {})
    assert encode_batch(dtos(numbered), runs) == (body, text)
    assert encode_batch(dtos(numbered), {})[1] == text, "the id is the same though less is known"
    for element, record in zip(json.loads(body), numbered):
        line = wire.encode(records.event(record))
        assert element["data"] == json.loads(line) and element["time"] == element["data"]["time"]
        assert re.fullmatch(r"/bgworker(/[\w.%~-]+)?", element["source"], re.ASCII)
        assert record[0] is None or (element["id"], element["subject"]) == (
            f"{record[0].id}:{record[1]}",
            record[0].id,
        )


def test_the_run_of_what_a_task_says_is_learnt_from_life_cycle_events_that_were_taken() -> None:
    events = dtos(life())
    with Receiver(answer(503), answer(), answer(503), answer()) as receiver:
        sink = sink_to(receiver.url)
        for part in (events[2:4], events[:2], events[2:4], events[2:4], events[2:]):
            try:
                sink.write(part)
            except TemporarySinkError:
                sink.write(part)
        sink.write(events[2:4])
    sources = [[element["source"] for element in request.elements] for request in receiver.requests]
    known, unknown = f"/bgworker/{'d' * 32}", "/bgworker"
    assert sources[:2] == [[unknown] * 2] * 2, "nothing has told it yet"
    assert (
        sources[2:4] == [[known] * 2] * 2 and receiver.requests[2].body == receiver.requests[3].body
    )
    assert sources[4:7] == [[known] * 2, [known] * 2, [known] * 3]
    assert sources[7] == [unknown] * 2, "the task has ended: it is forgotten"


def test_no_more_runs_are_remembered_than_the_bound(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(cloudevents, "MOST_RUNS", 2)
    runs = KnownRuns()
    for name in "abc":
        runs.learn([records.event((TaskState(name, "", f"run {name}", NS), 1, CREATED, NS, None))])
    assert runs.known == {"b": "run b", "c": "run c"}


def test_an_event_without_a_wire_form_is_refused_for_good_and_nothing_is_sent(
    receiver: Receiver,
) -> None:
    bad = StreamEvent(
        EventType.TASK_OUTPUT, TASK, 1, datetime(2026, 1, 1), StreamType.OUTPUT, "naive"
    )
    complaint = f"cannot encode an event for http://127.0.0.1:{receiver.port}: a time needs"
    with pytest.raises(PermanentSinkError, match=complaint) as caught:
        sink_to(receiver.url).write([bad])
    assert caught.value.concerns == "event" and receiver.requests == []
    with pytest.raises(PermanentSinkError, match="an event cannot be encoded"):
        sink_to(receiver.url).write([object()])  # type: ignore[list-item]


# -- others' libraries --


def independent(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # theirs
        return pytest.importorskip(
            name, reason=f"needs {name.partition('.')[0]}, of the extra 'integration'"
        )


def requests_of_a_run() -> list[Request]:
    """Let a Scheduler deliver tasks of every sort of ending, and a loss, to a receiver that is down
    now and then."""
    def run(number: int) -> None:
        task = current_task()
        task.progress(number, 10, "\u2026")
        for stream in (task.output, task.error, task.warning, task.verbose):
            stream(f"{number} \U0001f642 \"quoted\"")
            stream({"number": number, "list": [1, None, "\xe9"]})
        if number == 3:
            raise ValueError("three")

    with Receiver(answer(503), answer(), answer(500)) as receiver:
        with Scheduler(2) as pool:
            pool.register_sink(
                sink_to(receiver.url, secret=[OTHER_SECRET, SECRET]),
                options=bgworker.SinkOptions(batch_size=7, retry=bgworker.RetryPolicy(base=0.001)),
            )
            pool._dispatcher.intake.refuse(OUTPUT, "oversize")
            tasks = [pool.submit(run, number) for number in range(10)]
            for task in tasks:
                assert task.wait(SOON)
            pool.flush(SOON)
        assert pool.sinks["webhook"].delivered == 10 * 13
    return receiver.requests


def test_every_request_verifies_with_the_independent_library_of_standard_webhooks() -> None:
    webhooks = independent("standardwebhooks.webhooks")
    for request in requests_of_a_run():
        for secret in (SECRET, OTHER_SECRET):
            assert (
                webhooks.Webhook(secret).verify(request.body, dict(request.headers))
                == request.elements
            )
        with pytest.raises(webhooks.WebhookVerificationError):
            webhooks.Webhook(new_secret()).verify(request.body, dict(request.headers))
        with pytest.raises(webhooks.WebhookVerificationError):
            webhooks.Webhook(SECRET).verify(request.body + b" ", dict(request.headers))


def test_what_the_independent_library_signs_verifies_here() -> None:
    webhook = independent("standardwebhooks.webhooks").Webhook(SECRET)
    now = datetime.now(timezone.utc)
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(int(now.timestamp())),
               "webhook-signature": webhook.sign("msg_1", now, '{"a":1}')}
    assert verify(SECRET, headers, b'{"a":1}') == "msg_1"
    with pytest.raises(VerificationError):
        verify(SECRET, headers, b'{"a":2}')


def test_every_element_is_an_event_to_the_independent_library_of_cloudevents() -> None:
    events = independent("cloudevents.core.v1.event")
    formats = independent("cloudevents.core.formats.json").JSONFormat()
    elements = [element for request in requests_of_a_run() for element in request.elements]
    assert {element["type"] for element in elements} >= {
        "io.bgworker.EventsLost.v1",
        "io.bgworker.TaskFailed.v1",
    }
    for element in elements:
        event = formats.read(events.CloudEvent, json.dumps(element))
        assert (event.get_id(), event.get_subject()) == (element["id"], element["subject"])
        assert event.get_time() == datetime.fromisoformat(element["time"].replace("Z", "+00:00"))
        assert event.get_data() == element["data"]
    for broken in (
        {"id": ""},
        {"source": ""},
        {"subject": ""},
        {"Sequence": "1"},
        {"specversion": "2"},
    ):
        with pytest.raises(Exception, match="validation errors"):
            formats.read(events.CloudEvent, json.dumps({**elements[0], **broken}))


# -- the receiver's side --


def signed(body: bytes = b"[]", secret: str = SECRET, timestamp: str = "1000") -> dict[str, str]:
    message_id, key = "msg_1", base64.b64decode(secret.removeprefix("whsec_"))
    mac = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, "sha256")
    return {"webhook-id": message_id, "webhook-timestamp": timestamp,
            "webhook-signature": f"v1,{base64.b64encode(mac.digest()).decode()}"}


@pytest.fixture
def at_1000(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "_now", lambda: 1000.0)


@pytest.mark.usefixtures("at_1000")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"webhook-id": None}, "webhook-id: the request has no such header"),
        ({"webhook-id": ""}, "webhook-id: the request has no such header"),
        ({"webhook-timestamp": None}, "webhook-timestamp: the request has no such header"),
        ({"webhook-signature": None}, "webhook-signature: the request has no such header"),
        ({"webhook-id": "msg_2"}, "webhook-signature: none was made"),
        ({"webhook-id": "msg_\udc80"}, "webhook-id: expected ASCII text"),
        ({"webhook-timestamp": "1001"}, "webhook-signature: none was made"),
        ({"webhook-timestamp": "1e3"}, "webhook-timestamp: expected whole seconds"),
        ({"webhook-timestamp": "-1000"}, "webhook-timestamp: expected whole seconds"),
        (
            {"webhook-timestamp": "\u0661\u0660\u0660\u0660"},
            "webhook-timestamp: expected whole seconds",
        ),
        ({"webhook-timestamp": "9" * 5000}, "webhook-timestamp: expected whole seconds"),
        ({"webhook-signature": "v1,"}, "webhook-signature: none was made"),
        ({"webhook-signature": "v1"}, "webhook-signature: none was made"),
        (
            {"webhook-signature": signed()["webhook-signature"].replace("v1,", "v2,")},
            "webhook-signature: none was made",
        ),
        (
            {"webhook-signature": signed()["webhook-signature"].removeprefix("v1,")},
            "webhook-signature: none was made",
        ),
        (
            {"webhook-signature": signed()["webhook-signature"][:-2]},
            "webhook-signature: none was made",
        ),
        ({"webhook-signature": "v1,\xe9\udc80"}, "webhook-signature: none was made"),
        (signed(secret=OTHER_SECRET), "webhook-signature: none was made"),
        (signed(timestamp="699"), "signed 301 s ago, more than 300 s"),
        (signed(timestamp="1301"), "signed 301 s ahead, more than 300 s"),
    ],
)
def test_a_request_that_is_not_genuine_is_refused_with_the_reason(
    changes: dict[str, str | None], message: str
) -> None:
    headers = {name: value for name, value in {**signed(), **changes}.items() if value is not None}
    with pytest.raises(VerificationError, match=message) as caught:
        verify(SECRET, headers, b"[]")
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, bgworker.BgworkerError)


@pytest.mark.usefixtures("at_1000")
def test_a_genuine_request_gives_its_id_however_its_headers_are_spelled() -> None:
    assert verify(SECRET, signed(), b"[]") == "msg_1"
    shouted = {name.upper(): value for name, value in signed().items()}
    assert verify([OTHER_SECRET, SECRET], shouted, bytearray(b"[]")) == "msg_1"
    several = {**signed(), "webhook-signature": f"v1a,abc v1,xyz {signed()['webhook-signature']}"}
    assert verify(f"{OTHER_SECRET} {SECRET}", several, memoryview(b"[]")) == "msg_1"
    for edge in ("700", "1300"):
        assert verify(SECRET, signed(timestamp=edge), b"[]") == "msg_1"
    assert verify(SECRET, signed(timestamp="1"), b"[]", tolerance=1e6) == "msg_1"
    with pytest.raises(VerificationError):
        verify(SECRET, signed(timestamp="999"), b"[]", tolerance=0)


@pytest.mark.parametrize(("arguments", "message"), [
    (("nothing", {}, b""), "secrets: it does not begin with whsec_"),
    (([], {}, b""), "secrets: expected at least one secret, got none"),
    ((None, {}, b""), "secrets: expected text, or a collection of texts, got NoneType"),
    ((SECRET, {}, "text"), "body: expected the bytes of the request as they came, got str"),
    ((SECRET, {}, b"", -1), "tolerance: expected a number >= 0, got -1"),
])
def test_a_receiver_that_is_set_up_wrongly_is_told(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        verify(*arguments)


def test_the_comparison_goes_through_the_function_that_takes_the_same_time(
    monkeypatch: MonkeyPatch,
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(signing, "_now", lambda: 1000.0)
    monkeypatch.setattr(
        signing.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b
    )
    verify(
        [SECRET, OTHER_SECRET],
        {**signed(), "webhook-signature": signed()["webhook-signature"] + " v1,x"},
        b"[]",
    )
    assert len(compared) == 4, "all with all, though the first fits"


# -- secrets --


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ("", "secret: expected at least one secret, got none"),
        ([], "secret: expected at least one secret, got none"),
        (
            "sup3r",
            "secret: it does not begin with whsec_; expected whsec_ and then base64 of 24 to "
            "64 random bytes",
        ),
        ("whsec_" + base64.b64encode(b"sup3r" * 4).decode(), "secret: it holds 20 bytes; expected"),
        (
            "whsec_" + base64.b64encode(b"sup3r" * 13).decode(),
            "secret: it holds 65 bytes; expected",
        ),
        (
            "whsec_sup3r-sup3r_sup3rsup3rsup3rsup3rsup3r",
            "secret: what follows whsec_ is not base64",
        ),
        ("whsec_sup3r\xe9", "secret: what follows whsec_ is not base64"),
        ("whsec_", "secret: it holds 0 bytes"),
        ([SECRET, "sup3r"], "secret 2 of 2: it does not begin with whsec_"),
        (f"{SECRET} whsec_sup3rsup {SECRET}", "secret 2 of 3: it holds 6 bytes"),
        (b"whsec_sup3r", "secret: expected text, or a collection of texts, got bytes"),
        (7, "secret: expected text, or a collection of texts, got int"),
        ([SECRET, None], "secret 2 of 2: expected text, got NoneType"),
    ],
)
def test_a_malformed_secret_is_refused_and_not_shown(secret: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        WebhookSink("https://example.com/hook", secret=secret)
    assert "sup3r" not in "".join(traceback.format_exception(caught.value))


def test_a_secret_is_taken_with_and_without_padding_from_24_bytes_to_64(receiver: Receiver) -> None:
    for size in (24, 25, 26, 64):
        secret = "whsec_" + base64.b64encode(os.urandom(size)).decode()
        sink_to(receiver.url, secret=secret.rstrip("=")).write(batch("a"))
        assert verify(secret, receiver.requests[-1].headers, receiver.requests[-1].body)


def test_a_new_secret_is_random_and_good() -> None:
    assert len({new_secret() for _ in range(100)}) == 100
    assert len(base64.b64decode(new_secret().removeprefix("whsec_"))) == 32
    WebhookSink("https://example.com", secret=new_secret())


def test_without_a_secret_the_environment_has_to_give_it(
    receiver: Receiver, monkeypatch: MonkeyPatch
) -> None:
    for nothing in (None, "", "  "):
        if nothing is not None:
            monkeypatch.setenv("BGWORKER_WEBHOOK_SECRET", nothing)
        with pytest.raises(
            ConfigurationError,
            match="give it as secret=, or in the environment variable BGWORKER_WEB",
        ):
            WebhookSink(receiver.url)
    monkeypatch.setenv("BGWORKER_WEBHOOK_SECRET", f" {SECRET}\n{OTHER_SECRET} ")
    WebhookSink(receiver.url).write(batch("a"))
    [request] = receiver.requests
    assert verify(SECRET, request.headers, request.body) and verify(
        OTHER_SECRET, request.headers, request.body
    )
    monkeypatch.setenv("BGWORKER_WEBHOOK_SECRET", f"{SECRET} sup3r")
    with pytest.raises(
        ConfigurationError, match="BGWORKER_WEBHOOK_SECRET 2 of 2: it does not begin with"
    ) as caught:
        WebhookSink(receiver.url)
    assert "sup3r" not in str(caught.value)


def test_keys_are_not_pickled() -> None:
    with pytest.raises(TypeError, match="a secret is not to leave its process"):
        pickle.dumps(sink_to("https://example.com"))


# -- what it refuses to be built with --


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "url: it is empty, or holds"),
        (7, "url: expected text such as https://example.com/hook, got int"),
        (b"https://h", "url: expected text such as https://example.com/hook, got bytes"),
        ("sup3r.example.com/hook", "url: it begins with neither https:// nor http://"),
        ("ftp://example.com/sup3r", "url: it begins with neither"),
        ("file:///etc/sup3r", "url: it begins with neither"),
        ("https:///sup3r", "url: it has no host, or one that cannot be"),
        ("https://", "url: it has no host"),
        ("https://exa..mple/sup3r", "url: it has no host, or one that cannot be"),
        ("https://" + "x" * 64 + "/sup3r", "url: it has no host, or one that cannot be"),
        (
            "https://user:sup3r@example.com/",
            "url: it holds a user name or a password, which end up in logs",
        ),
        ("https://sup3r@example.com/", "url: it holds a user name or a password"),
        ("https://example.com/sup3r#part", "url: it ends in a fragment"),
        ("https://example.com:99999/sup3r", "url: its host or its port is malformed"),
        ("https://example.com:sup3r/", "url: its host or its port is malformed"),
        *(
            (f"{scheme}://[::1]{rest}", "url: its host|url: it has no host, or one that cannot be")
            for scheme in ("http", "https")
            for rest in (".sup3r.example/", "sup3r.example/", "..", ":80sup3r", "%251")
        ),
        ("http://[::1]]/", "url: "),
        ("http://[127.0.0.1]/", "url: "),
        ("http://127.0.0.1:80:80/", "url: "),
        ("http://x[::1]/", "url: "),
        ("https://[::1/sup3r", "url: its host or its port is malformed"),
        ("https://example.com/sup3r x", "url: it is empty, or holds white space"),
        (
            "https://example.com/sup3r\r\nX-Evil: 1",
            "url: it is empty, or holds white space, a control character",
        ),
        ("https://example.com\\@sup3r", "url: .* a backslash"),
        ("https://ex\xe4mple.com/sup3r", "url: .* write such a host name as xn--"),
        (
            "http://example.com/sup3r",
            "url: http://example.com would send the events for everybody to read; use https://, "
            "or allow_http=True on a network that you trust",
        ),
        ("http://10.0.0.1:8080/sup3r", "url: http://10.0.0.1:8080 would send"),
        ("http://localhost.example.com/sup3r", "url: http://localhost.example.com would"),
        ("http://2130706433/sup3r", "url: http://2130706433 would"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_showing_what_may_be_secret(
    url: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        WebhookSink(url, secret=SECRET)
    assert "sup3r" not in str(caught.value).replace("http://2130706433", "")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com:8443/a/b?c=d",
        "HTTPS://EXAMPLE.com",
        "https://[::1]:1/",
        "http://localhost:1/",
        "http://127.0.0.1",
        "http://127.9.9.9:80/x",
        "http://[::1]:8080/x",
        "https://xn--exmple-cua.com/",
        "https://under_score.example./%20",
    ],
)
def test_https_goes_anywhere_and_plain_http_to_this_machine(url: str) -> None:
    WebhookSink(url, secret=SECRET)


def test_plain_http_goes_anywhere_if_allowed() -> None:
    WebhookSink("http://example.com/hook", secret=SECRET, allow_http=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"headers": {"X-A": "sup3r\r\nX-B: 1"}},
            "headers: the value of X-A is empty or no text, or holds a line end",
        ),
        ({"headers": {"X-A": "sup3r\n"}}, "headers: the value of X-A"),
        ({"headers": {"X-A": "sup3r\x00"}}, "headers: the value of X-A"),
        ({"headers": {"X-A": "sup3r\xe9"}}, "headers: the value of X-A"),
        ({"headers": {"X-A": ""}}, "headers: the value of X-A"),
        ({"headers": {"X-A": 7}}, "headers: the value of X-A"),
        ({"headers": {"X-A\r\nX-B": "sup3r"}}, "headers: a name is no header name"),
        ({"headers": {"sup3r: x": "y"}}, "headers: a name is no header name"),
        ({"headers": {"": "sup3r"}}, "headers: a name is no header name"),
        ({"headers": {7: "sup3r"}}, "headers: a name is no header name"),
        (
            {"headers": {"Webhook-Id": "sup3r"}},
            "headers: Webhook-Id is the sink's own; leave it out",
        ),
        ({"headers": {"content-TYPE": "sup3r"}}, "headers: content-TYPE is the sink's own"),
        (
            {"headers": {"Transfer-Encoding": "chunked"}},
            "headers: Transfer-Encoding is the sink's own",
        ),
        ({"headers": {"X-A": "sup3r", "x-a": "sup3r"}}, "headers: x-a is given twice"),
        (
            {"headers": [("X-A", "sup3r")]},
            "headers: expected a mapping of names to values, got list",
        ),
        ({"timeout": 0}, "timeout: expected a number > 0, got 0"),
        ({"timeout": None}, "timeout: expected a number > 0, got None"),
        ({"timeout": float("inf")}, "timeout: expected a number > 0, got inf"),
        ({"allow_http": "yes"}, "allow_http: expected True or False, got 'yes'"),
        ({"use_proxies": 1}, "use_proxies: expected True or False, got 1"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        sink_to("https://example.com", **config)
    assert "sup3r" not in str(caught.value)


@pytest.mark.parametrize(("url", "shown"), [
    ("https://example.com", "https://example.com"),
    ("https://EXAMPLE.com:8443/sup3r?t=sup3r", "https://example.com:8443"),
    ("http://[::1]:80?sup3r", "http://[::1]:80")])
def test_its_repr_shows_where_it_goes_and_no_more(url: str, shown: str) -> None:
    assert repr(sink_to(url, headers={"Authorization": "sup3r"})) == f"WebhookSink({shown!r})"


# -- specifications, the environment, a fork --


def test_a_specification_is_the_url_with_its_query_and_settings_go_beside_it(
    receiver: Receiver,
) -> None:
    with Scheduler(1) as pool:
        name = pool.register_sink(f"webhook:{receiver.url}?secret=none", secret=SECRET, timeout=3)
        pool.submit(len, "")
        assert pool.flush(SOON)
    assert name == "webhook" and receiver.requests[0].line == "POST /hook?secret=none HTTP/1.1"
    with pytest.raises(
        ConfigurationError,
        match="sink spec 'webhook:https://example.com': secret: expected the one",
    ):
        open_sink("webhook:https://example.com/sup3r")


def test_the_environment_adds_the_sink_to_a_script_that_knows_nothing_of_it(
    receiver: Receiver,
) -> None:
    in_fresh_interpreter(
        "import bgworker\nwith bgworker.Scheduler() as pool: pool.submit(print, 'hello').result()",
        BGWORKER_SINKS=f"webhook:{receiver.url}",
        BGWORKER_WEBHOOK_SECRET=SECRET,
    )
    assert receiver.requests[-1].elements[-1]["type"] == "io.bgworker.TaskCompleted.v1"
    for request in receiver.requests:
        assert verify(SECRET, request.headers, request.body)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_posts_its_own_events(receiver: Receiver) -> None:
    out = in_fresh_interpreter(f"""
import os
from bgworker import Scheduler, WebhookSink
pool = Scheduler(1)
pool.register_sink(WebhookSink({receiver.url!r}, secret={SECRET!r}))
ours = pool.submit(len, "")
assert pool.flush({SOON})
child = os.fork()
task = pool.submit(len, "")
assert pool.flush({SOON})
print(ours.id, task.id, flush=True)
if child == 0:
    pool.shutdown()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
pool.shutdown()
""")
    printed = {task_id for line in out.splitlines() for task_id in line.split()}
    assert len(printed) == 3
    assert {element["subject"] for element in receiver.elements} <= printed
    assert {
        element["subject"] for request in receiver.requests for element in request.elements
    } == printed
    assert (
        sum(len(request.ids) for request in receiver.requests) == 12
    ), "no event of the parent's came twice"


# -- proxies --


def through(monkeypatch: MonkeyPatch, **variables: str) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_the_proxies_of_the_environment_are_used_unless_switched_off(
        receiver: Receiver, monkeypatch: MonkeyPatch) -> None:
    through(monkeypatch, http_proxy=receiver.url)
    url = "http://receiver.invalid:8080/hook"
    sink_to(url, allow_http=True).write(batch("a"))
    assert receiver.requests[0].line == f"POST {url} HTTP/1.1"
    assert receiver.requests[0].headers["host"] == "receiver.invalid:8080"
    with pytest.raises(TemporarySinkError, match="cannot reach http://receiver.invalid:8080: "):
        sink_to(url, allow_http=True, use_proxies=False).write(batch("a"))
    monkeypatch.setenv("no_proxy", "receiver.invalid")
    with pytest.raises(TemporarySinkError):
        sink_to(url, allow_http=True).write(batch("a"))
    assert len(receiver.requests) == 1


def test_plain_http_to_this_machine_does_not_leave_it_through_a_proxy(
        receiver: Receiver, monkeypatch: MonkeyPatch) -> None:
    with Receiver() as proxy:
        through(monkeypatch, http_proxy=proxy.url)
        sink_to(receiver.url).write(batch("a"))
        assert (len(receiver.requests), len(proxy.requests)) == (1, 0)
        sink_to(receiver.url, allow_http=True).write(batch("a"))
        assert (len(receiver.requests), len(proxy.requests)) == (
            1,
            1,
        ), "who allows plain HTTP has what urllib does"


# http.client of 3.10 forgets what a proxy has answered
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_proxy_that_wants_a_password_is_named_and_its_own_words_are_not_repeated(
    monkeypatch: MonkeyPatch,
) -> None:
    heads: list[str] = []

    def refuse(connection: Any) -> None:
        heads.append(connection.read_head()[0])
        connection.sock.sendall(b"HTTP/1.1 407 sup3r Bearer sup3r\r\n\r\n")

    with Receiver(refuse) as proxy:
        through(monkeypatch, https_proxy=proxy.url)
        with pytest.raises(TemporarySinkError) as caught:
            sink_to("https://receiver.invalid/hook").write(batch("a"))
    assert heads == ["CONNECT receiver.invalid:443 HTTP/1.0"] or heads == [
        "CONNECT receiver.invalid:443 HTTP/1.1"
    ]
    assert (
        str(caught.value) == "cannot reach https://receiver.invalid: Tunnel connection failed: 407"
    )
    del caught
    gc.collect()


@pytest.mark.parametrize("url", ["https://receiver.invalid", "http://receiver.invalid"])
def test_a_proxy_that_is_dead_or_speaks_no_http_is_what_the_error_names(
    url: str, monkeypatch: MonkeyPatch
) -> None:
    def babble(connection: Any) -> None:
        connection.read_head()
        connection.sock.sendall(b"SSH-2.0-babble\r\n\r\n")

    with Receiver() as gone, Receiver(babble) as babbling:
        gone.__exit__(None, None, None)
        for proxy, said in (
            (f"http://user:sup3r@127.0.0.1:{gone.port}", "Connection refused"),
            (f"127.0.0.1:{gone.port}", "Connection refused"),
            ("http://proxy.invalid:3128", r"[\w ]+"),
            (f"http://127.0.0.1:{babbling.port}/", r"no answer in HTTP \(BadStatusLine\)"),
        ):
            through(monkeypatch, http_proxy=proxy, https_proxy=proxy)
            with pytest.raises(TemporarySinkError) as caught:
                sink_to(url, allow_http=True).write(batch("a"))
            assert re.fullmatch(
                f"cannot reach {url} through the proxy in the environment: {said}",
                str(caught.value),
            )


@pytest.mark.parametrize(
    "proxy",
    [
        "http:/user:sup3r@proxy.invalid:3128",
        "http://user:sup3r@.proxy.invalid:3128",
        "socks5://user:sup3r@127.0.0.1:1",
        "ftp://a:1",
        "http://127.0.0.1:sup3r",
        "http://127.0.0.1:-1",
        "http://127.0.0.1:123456",
        "http://sup3r sup3r:80",
        "http://[::1:80",
        "://",
        "http://",
        "http://:80",
        "file:///etc/sup3r",
        "direct://",
    ],
)
def test_a_malformed_proxy_is_reported_without_its_password(
    proxy: str, monkeypatch: MonkeyPatch
) -> None:
    through(monkeypatch, https_proxy=proxy)
    with pytest.raises(TemporarySinkError) as caught:
        sink_to("https://receiver.invalid/hook").write(batch("a"))
    assert str(caught.value) == (
        "cannot reach https://receiver.invalid: the proxy in the environment is malformed; "
        "set it as http://HOST:PORT"
    )
    assert caught.value.__cause__ is None and caught.value.__context__ is None


# -- what it costs to import --


def test_urllib_comes_with_the_first_sink_and_not_before() -> None:
    code = f"""
import bgworker
dear = ("urllib.request", "http.client", "ssl", "email.parser")
loaded = lambda: [name for name in dear if name in sys.modules]
assert loaded() == []
from bgworker.webhook import verify
bgworker.WebhookSink
assert loaded() == [], loaded()
bgworker.WebhookSink("http://127.0.0.1:1/hook", secret={SECRET!r})
assert "urllib.request" in loaded()
"""
    in_fresh_interpreter(code)


def test_a_python_without_ssl_is_told_so(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bgworker.webhook.posting", raising=False)
    monkeypatch.setitem(sys.modules, "ssl", None)
    complaint = (
        "this Python cannot post to https://example.com: .*ssl.*; use one with the ssl module"
    )
    with pytest.raises(ConfigurationError, match=complaint):
        sink_to("https://example.com/")

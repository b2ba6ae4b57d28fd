"""The webhook sink against receivers that refuse, break off, crawl, flood, lie and die: what
becomes of each event."""

from __future__ import annotations

import base64
import gc
import itertools
import json
import logging
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bgworker import (
    Event,
    PermanentSinkError,
    RetryPolicy,
    Scheduler,
    SinkError,
    SinkHealth,
    SinkOptions,
    Task,
    TemporarySinkError,
    WebhookSink,
    current_task,
)
from bgworker.park.replay import replay
from bgworker.delivery.retry import Breaker, Trouble
from bgworker.model.records import OUTPUT, Batch, TaskState
from bgworker.webhook import posting, verify
from tests.certificates import EXPIRED, GOOD, OTHER_NAME, server_context, trust
from tests.receiver import (
    OTHER_SECRET,
    SECRET,
    SOON,
    Behaviour,
    Connection,
    Receiver,
    Request,
    answer,
    judge,
    raw,
)
from tests.support import ROOT, until
from tests.couriers import FAST, Line, line

NOW = 1_795_445_160.0  # 2026-11-23T14:46:00Z
STATE = TaskState("1" * 32, "task", "2" * 32, 0)


def batch(*texts: str) -> Batch:
    return Batch(
        [(STATE, seq, OUTPUT, int(NOW * 1e9) + seq, text) for seq, text in enumerate(texts, 1)]
    )


TAKE = judge(lambda request: 204)
"""Take what comes."""


class Watched(WebhookSink):
    """Keeps what its writes raised."""

    def __init__(self, url: str, **config: Any) -> None:
        super().__init__(url, **{"secret": SECRET, **config})
        self.errors: list[Any] = []

    def write(self, events: Sequence[Event]) -> None:
        try:
            super().write(events)
        except BaseException as error:
            self.errors.append(error)
            raise


class Clock:
    """Stands in for the monotonic clock of all deadlines."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Have deadlines go by a clock that only the faults move."""
    monkeypatch.setattr(posting, "_now", CLOCK)
    return CLOCK


def parked(path: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in path.read_bytes().splitlines()] if path.exists() else []


def parked_payloads(path: Path) -> list[str]:
    return [each["event"]["payload"] for each in parked(path)]


# -- answers, one attempt each --


@pytest.mark.parametrize("status", [200, 201, 202, 204, 206, 299])
def test_any_2xx_is_a_delivery(status: int) -> None:
    with Receiver(answer(status)) as receiver:
        sink = Watched(receiver.url)
        sink.write(batch("a"))
    assert (len(receiver.requests), sink.errors) == (1, [])


@pytest.mark.parametrize(
    ("status", "kind", "meaning", "message"),
    [
        (199, TemporarySinkError, False, "199"),
        (
            300,
            PermanentSinkError,
            "batch",
            "300 Multiple Choices: redirects are not followed; give the URL that it leads",
        ),
        (301, PermanentSinkError, "batch", "301 Moved Permanently: redirects are not followed"),
        (302, PermanentSinkError, "batch", "302 Found: redirects are not followed"),
        (303, PermanentSinkError, "batch", "303 See Other: redirects are not followed"),
        (304, PermanentSinkError, "batch", "304 Not Modified: redirects are not followed"),
        (307, PermanentSinkError, "batch", "307 Temporary Redirect: redirects are not followed"),
        (308, PermanentSinkError, "batch", "308 Permanent Redirect: redirects are not followed"),
        (400, PermanentSinkError, "event", "400 Bad Request"),
        (
            401,
            TemporarySinkError,
            True,
            "401 Unauthorized; give it the secret or the credentials that it expects",
        ),
        (402, PermanentSinkError, "batch", "402 Payment Required"),
        (403, TemporarySinkError, True, "403 Forbidden; have it allow this sender"),
        (404, PermanentSinkError, "batch", "404 Not Found"),
        (405, PermanentSinkError, "batch", "405 Method Not Allowed"),
        (407, TemporarySinkError, True, "407 Proxy Authentication Required; give the proxy"),
        (408, TemporarySinkError, False, "408 Request Timeout"),
        (409, PermanentSinkError, "event", "409 Conflict"),
        (410, PermanentSinkError, "sink", "410 Gone: it wants no events any more"),
        (413, PermanentSinkError, "event", "413 "),
        (415, PermanentSinkError, "batch", "415 Unsupported Media Type"),
        (422, PermanentSinkError, "event", "422 "),
        (429, TemporarySinkError, False, "429 Too Many Requests"),
        (451, PermanentSinkError, "batch", "451 "),
        (499, PermanentSinkError, "batch", "499"),
        (500, TemporarySinkError, False, "500 Internal Server Error"),
        (501, TemporarySinkError, False, "501 Not Implemented"),
        (502, TemporarySinkError, False, "502 Bad Gateway"),
        (503, TemporarySinkError, False, "503 Service Unavailable"),
        (504, TemporarySinkError, False, "504 Gateway Timeout"),
        (599, TemporarySinkError, False, "599"),
        (600, TemporarySinkError, False, "600"),
        (999, TemporarySinkError, False, "999"),
    ],
)
def test_each_answer_means_one_thing_to_delivery_and_its_own_words_are_not_repeated(
        status: int, kind: type[SinkError], meaning: object, message: str) -> None:
    with Receiver(answer(status, {"X": "So It Is"}, b"So It Is")) as receiver:
        sink = Watched(receiver.url)
        with pytest.raises(kind) as caught:
            sink.write(batch("a"))
    assert str(caught.value).startswith(f"http://127.0.0.1:{receiver.port} answered {message}")
    assert getattr(caught.value, "hold", getattr(caught.value, "concerns", None)) == meaning
    assert "So It Is" not in str(caught.value) and "hook" not in str(caught.value)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


BACKOFF = 0.5
"""What `RetryPolicy()` waits at first, without jitter."""


@pytest.mark.parametrize(("retry_after", "asked", "waited"), [
    ("7", 7.0, 7.0),
    ("007", 7.0, 7.0),
    ("Mon, 23 Nov 2026 14:46:30 GMT", 30.0, 30.0),
    ("Monday, 23-Nov-26 14:46:30 GMT", 30.0, 30.0),
    ("Mon Nov 23 14:46:30 2026", 30.0, 30.0),
    ("Mon, 23 Nov 2026 15:46:30 +0100", 30.0, 30.0),
    ("120", 120.0, 60.0),
    ("Mon, 23 Nov 2099 14:46:30 GMT", None, 60.0),
    ("999999999999999999999", 1e21, 60.0),
    ("9" * 5000, float("inf"), 60.0),
    ("0", None, BACKOFF),
    ("-5", None, BACKOFF),
    ("1.5", None, BACKOFF),
    ("1e3", None, BACKOFF),
    ("soon", None, BACKOFF),
    ("Mon, 99 Foo 2026", None, BACKOFF),
    ("Mon, 23 Nov 2026 14:45:00 GMT", None, BACKOFF),
    ("Mon, 23 Nov 0000 14:45:00 GMT", None, BACKOFF),
    ("Mon, 23 Nov 99999999999 14:45:00 GMT", None, BACKOFF),
    ("\xb2", None, BACKOFF),
    (None, None, BACKOFF),
])
@pytest.mark.parametrize("status", [429, 503])
def test_a_retry_after_is_obeyed_within_the_cap_if_it_can_be_waited_for(
        status: int, retry_after: str | None, asked: float | None, waited: float) -> None:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    with Receiver(answer(status, headers)) as receiver:
        sink = Watched(receiver.url)
        sink._now = lambda: NOW  # type: ignore[method-assign]
        with pytest.raises(TemporarySinkError) as caught:
            sink.write(batch("a"))
    assert Breaker(RetryPolicy(jitter="none")).failed(Trouble.of(caught.value), 1).wait == waited
    assert asked is None or caught.value.retry_after == asked
    assert waited != BACKOFF or caught.value.retry_after is None


# -- no answer, and answers after which nothing counts --


def reset_at_once(connection: Connection) -> None:
    connection.reset()


def reset_before_the_body(connection: Connection) -> None:
    connection.read_head()
    connection.reset()


def reset_after_the_body(connection: Connection) -> None:
    connection.read()
    connection.reset()


def reset_in_the_body(connection: Connection) -> None:
    connection.read()
    connection.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
    connection.reset()


def say_nothing(connection: Connection) -> None:
    connection.read()
    connection.wait_for_close()


def send_until_closed(head: bytes, pieces: Callable[[], Iterator[bytes]]) -> Behaviour:
    """Read the request, send the head, and pieces until the sender has had enough."""
    def act(connection: Connection) -> None:
        connection.read()
        connection.sock.sendall(head)
        try:
            for piece in pieces():
                connection.sock.sendall(piece)
        except OSError:
            return

    return act


def endless(piece: bytes) -> Callable[[], Iterator[bytes]]:
    return lambda: itertools.repeat(piece)


def drip(data: bytes, seconds: float, size: int = 1000) -> Callable[[], Iterator[bytes]]:
    """Piece by piece; before each of the first, the clock goes on, until that makes ``seconds``.

    A reader takes 8 KiB at once, so with more data than fits into the first pieces it looks at the
    clock in between.
    """
    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), size):
            CLOCK.now += seconds / 16 if start < 16 * size else 0
            yield data[start:start + size]

    return pieces


SLOW = b"".join(b"X-%d: %b\r\n" % (number, b"x" * 50_000) for number in range(4)) + b"\r\n"

TEMPORARY: dict[str, tuple[Behaviour, str]] = {
    "reset at once": (reset_at_once, "cannot reach URL: "),
    "reset before the body": (reset_before_the_body, "cannot reach URL: "),
    "reset after the body": (reset_after_the_body, "cannot reach URL: Connection reset by peer"),
    "closed without a word": (
        raw(b""),
        "cannot reach URL: it closed the connection without an answer",
    ),
    "half a status line": (raw(b"HTTP/1."), "URL does not answer in HTTP (BadStatusLine)"),
    "half a status": (raw(b"HTTP/1.1 2"), "URL does not answer in HTTP (BadStatusLine)"),
    "half of the headers": (
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"),
        "URL does not answer in HTTP (IncompleteRead)",
    ),
    "half a header": (
        raw(b"HTTP/1.1 200 OK\r\nContent-Le"),
        "URL does not answer in HTTP (IncompleteRead)",
    ),
    "a status line alone": (
        raw(b"HTTP/1.1 204 No Content\r\n"),
        "URL does not answer in HTTP (IncompleteRead)",
    ),
    "another protocol": (
        raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        "URL does not answer in HTTP (BadStatusLine)",
    ),
    "a status that is none": (
        raw(b"HTTP/1.1 2e2 OK\r\n\r\n"),
        "URL does not answer in HTTP (BadStatusLine)",
    ),
    "noise": (raw(bytes(range(256)) * 10), "URL does not answer in HTTP (BadStatusLine)"),
    "endless headers": (
        send_until_closed(b"HTTP/1.1 200 OK\r\n", endless(b"X: y\r\n" * 1000)),
        "URL does not answer in HTTP (HTTPException)",
    ),
    "an endless line": (
        send_until_closed(b"HTTP/1.1 200 OK\r\nX: ", endless(b"y" * 65_536)),
        "URL does not answer in HTTP (LineTooLong)",
    ),
    "slow headers": (
        send_until_closed(b"HTTP/1.1 200 OK\r\n", drip(SLOW, 16)),
        "cannot reach URL: no answer within 15 s",
    ),
    "endless continuation": (
        send_until_closed(b"", drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, 16)),
        "cannot reach URL: no answer within 15 s",
    ),
    "408": (answer(408), "URL answered 408 Request Timeout"),
    "429": (answer(429), "URL answered 429 Too Many Requests"),
    "429 with Retry-After in seconds": (
        answer(429, {"Retry-After": "7"}),
        "URL answered 429 Too Many Requests",
    ),
    "429 with Retry-After as a date": (
        answer(429, {"Retry-After": "Mon, 23 Nov 2099 14:46:30 GMT"}),
        "URL answered 429 Too Many Requests",
    ),
    "429 with a garbled Retry-After": (
        answer(429, {"Retry-After": "soon"}),
        "URL answered 429 Too Many Requests",
    ),
    "429 with a huge Retry-After": (
        answer(429, {"Retry-After": "9" * 5000}),
        "URL answered 429 Too Many Requests",
    ),
    "429 with a negative Retry-After": (
        answer(429, {"Retry-After": "-5"}),
        "URL answered 429 Too Many Requests",
    ),
    "500": (answer(500), "URL answered 500 Internal Server Error"),
    "503": (answer(503), "URL answered 503 Service Unavailable"),
    "503 with an endless body": (
        send_until_closed(b"HTTP/1.1 503 No\r\n\r\n", endless(b"x" * 65_536)),
        "URL answered 503 Service Unavailable",
    ),
}
"""Faults that may pass -> what the sink says of them."""

TAKEN: dict[str, Behaviour] = {
    "half of the body": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"),
    "a body that is reset": reset_in_the_body,
    "a body in broken chunks": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "an endless body": send_until_closed(b"HTTP/1.1 200 OK\r\n\r\n", endless(b"x" * 65_536)),
    "an endless body in chunks": send_until_closed(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        endless(b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    ),
    "a body of absurd length": raw(
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nx"
    ),
    "a slow body": send_until_closed(
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", drip(b"x" * 999, 2, 1)
    ),
    "headers that are slow, but not too slow": send_until_closed(
        b"HTTP/1.1 200 OK\r\n", drip(SLOW, 14)
    ),
    "no reason and no headers": raw(b"HTTP/1.1 200\r\n\r\n"),
    "HTTP/1.0": raw(b"HTTP/1.0 200 OK\r\n\r\nthanks"),
}
"""Answers that say yes, and what follows does not matter."""


@contextmanager
def delivery(receiver: Receiver, folder: Path, **config: Any) -> Iterator[tuple[Watched, Line]]:
    """A sink with a courier of its own, and a park file; when "abcd" is said, that is two batches
    of two events."""
    sink = Watched(receiver.url, **config)
    with line(sink, park=folder / "park", batch_size=2) as it:
        yield sink, it


def account(health: SinkHealth) -> dict[str, int]:
    """The part of an account that is not zero."""
    names = ("emitted", "delivered", "coalesced", "dropped", "parked", "pending")
    return {name: getattr(health, name) for name in names if getattr(health, name)}


def told_of(error: str, receiver: Receiver, name: str) -> str:
    """What was said of a fault, without the port, and as by any version of http.client."""
    told = error.replace(receiver.url.removesuffix("/hook"), "URL")
    if name == "endless continuation":  # newer ones give up after a hundred interim answers
        return told.replace("URL does not answer in HTTP (HTTPException)", TEMPORARY[name][1])
    return told


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("name", TEMPORARY)
def test_a_fault_that_passes_delays_a_batch_and_changes_nothing(name: str, tmp_path: Path) -> None:
    fault, message = TEMPORARY[name]
    with (
        Receiver(fault, fault, always=TAKE) as receiver,
        delivery(receiver, tmp_path) as (sink, it),
    ):
        it.say(*"abcd")
        assert it.flush()
        health = it.health()
    assert account(health) == {"emitted": 4, "delivered": 4} and (health.retries, health.state) == (
        2,
        "ok",
    )
    assert receiver.payloads == list("abcd") and parked(tmp_path / "park") == []
    assert receiver.connections == 4, "two faults and two batches"
    assert len({request.message_id for request in receiver.requests}) == 2, "each has kept its id"
    for error in sink.errors:
        told = told_of(str(error), receiver, name)
        assert told.startswith(message)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("name", TEMPORARY)
def test_a_fault_that_stays_has_a_batch_parked_and_the_next_held_until_it_is_mended(
    name: str, tmp_path: Path
) -> None:
    fault, message = TEMPORARY[name]
    with Receiver(always=fault) as receiver, delivery(receiver, tmp_path) as (_, it):
        it.say(*"abcd")
        until(lambda: it.health().parked == 2 and it.health().retries > FAST.attempts + 3)
        health = it.health()
        assert (
            account(health) == {"emitted": 4, "parked": 2, "pending": 2} and health.state == "open"
        )
        assert receiver.taken == []
        receiver.always = TAKE
        assert it.flush()
        health = it.health()
    assert account(health) == {"emitted": 4, "delivered": 2, "parked": 2} and health.state == "ok"
    assert receiver.payloads == ["c", "d"] and parked_payloads(tmp_path / "park") == ["a", "b"]
    for each in parked(tmp_path / "park"):
        assert each["attempts"] == FAST.attempts
        assert message in told_of(each["error"], receiver, name)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("name", TAKEN)
def test_a_yes_is_a_yes_whatever_follows_it(name: str, tmp_path: Path) -> None:
    with Receiver(always=TAKEN[name]) as receiver, delivery(receiver, tmp_path) as (sink, it):
        it.say(*"abcd")
        assert it.flush()
        health = it.health()
    assert account(health) == {"emitted": 4, "delivered": 4} and (
        health.retries,
        health.last_error,
    ) == (0, None)
    assert [request.payloads for request in receiver.requests] == [
        ["a", "b"],
        ["c", "d"],
    ] and sink.errors == []


def test_nobody_listens_until_somebody_does(tmp_path: Path) -> None:
    with Receiver() as gone:
        pass
    with delivery(gone, tmp_path) as (sink, it):
        it.say(*"abcd")
        until(lambda: it.health().parked == 2 and it.health().retries > FAST.attempts + 3)
        assert account(it.health()) == {"emitted": 4, "parked": 2, "pending": 2}
        with Receiver(always=TAKE, port=gone.port) as receiver:
            assert it.flush()
            health = it.health()
    assert account(health) == {"emitted": 4, "delivered": 2, "parked": 2}
    assert receiver.payloads == ["c", "d"] and parked_payloads(tmp_path / "park") == ["a", "b"]
    assert str(sink.errors[0]) == f"cannot reach http://127.0.0.1:{gone.port}: Connection refused"


def test_a_receiver_that_says_nothing_costs_the_timeout_and_no_more(tmp_path: Path) -> None:
    """No clock can stand in here: it is the system that has to end the wait."""
    with (
        Receiver(say_nothing, always=TAKE) as receiver,
        delivery(receiver, tmp_path, timeout=1) as (sink, it),
    ):
        it.say(*"abcd")
        assert it.flush()
        health = it.health()
    assert account(health) == {"emitted": 4, "delivered": 4} and (health.retries, health.state) == (
        1,
        "ok",
    )
    [error] = sink.errors
    assert str(error) == f"cannot reach http://127.0.0.1:{receiver.port}: no answer within 1 s"


def test_a_receiver_that_reads_nothing_costs_the_timeout_and_no_more(tmp_path: Path) -> None:
    is_over = threading.Event()

    def read_nothing(connection: Connection) -> None:
        assert is_over.wait(SOON)

    script = [read_nothing] * FAST.attempts
    with (
        Receiver(*script, always=TAKE) as receiver,
        delivery(receiver, tmp_path, timeout=0.5) as (sink, it),
    ):
        it.say("x" * 20_000_000)  # more than the buffers of both sides hold
        until(lambda: it.health().parked == 1)
        is_over.set()
        complaint = f"cannot reach http://127.0.0.1:{receiver.port}: no answer within 0.5 s"
        assert [str(error) for error in sink.errors] == [complaint] * FAST.attempts
        assert (account(it.health()), it.health().state) == ({"emitted": 1, "parked": 1}, "open")


# -- refusals --


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 404, 405, 415])
def test_what_is_about_the_request_parks_each_batch_whole_after_one_attempt(
    status: int, tmp_path: Path
) -> None:
    with (
        Receiver() as elsewhere,
        Receiver(always=answer(status, {"Location": elsewhere.url})) as receiver,
    ):
        with delivery(receiver, tmp_path) as (_, it):
            it.say(*"abcd")
            assert it.flush()
            until(lambda: it.health().parked == 4)
            health = it.health()
    assert account(health) == {"emitted": 4, "parked": 4} and (health.retries, health.state) == (
        0,
        "ok",
    )
    assert (receiver.connections, elsewhere.connections) == (2, 0), "and a redirect is not followed"
    assert parked_payloads(tmp_path / "park") == list("abcd")
    assert {each["attempts"] for each in parked(tmp_path / "park")} == {1}


@pytest.mark.parametrize("status", [400, 409, 422])
def test_what_is_about_an_event_parks_that_one_and_delivers_its_neighbours(
    status: int, tmp_path: Path
) -> None:
    picky = judge(lambda request: status if "bad" in request.payloads else 204)
    with Receiver(always=picky) as receiver:
        with line(Watched(receiver.url), park=tmp_path / "park") as it:
            it.say("a", "b", "bad", "c", "d")
            assert it.flush()
            until(lambda: it.health().parked)
            health = it.health()
    assert account(health) == {"emitted": 5, "delivered": 4, "parked": 1}
    assert (health.retries, health.state) == (0, "ok")
    assert receiver.payloads == list("abcd") and parked_payloads(tmp_path / "park") == ["bad"]


def test_a_batch_that_is_too_large_comes_in_parts_and_an_event_that_is_too_large_is_parked(
    tmp_path: Path,
) -> None:
    limited = judge(lambda request: 413 if sum(map(len, request.payloads)) > 100 else 204)
    with Receiver(always=limited) as receiver:
        with line(Watched(receiver.url), park=tmp_path / "park") as it:
            it.say(*["x" * 30] * 8, "y" * 101, *["z" * 30] * 7)
            assert it.flush()
            until(lambda: it.health().parked)
            health = it.health()
    assert account(health) == {"emitted": 16, "delivered": 15, "parked": 1}
    assert receiver.payloads == ["x" * 30] * 8 + ["z" * 30] * 7 and parked_payloads(
        tmp_path / "park"
    ) == ["y" * 101]
    ids = [request.message_id for request in receiver.requests]
    assert len(ids) == len(set(ids)), "parts are other messages"


def test_a_413_that_comes_before_the_body_was_read_is_heard(tmp_path: Path) -> None:
    """The receiver answers by the headers and closes; the sender is still sending, and gets a reset
    besides."""
    def by_length(connection: Connection) -> None:
        _, headers, _ = connection.read_head()
        if int(headers["content-length"]) > 4_000_000:
            connection.answer(413)
            return
        connection.sock.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        connection.wait_for_close()

    with Receiver(always=by_length) as receiver, delivery(receiver, tmp_path) as (sink, it):
        it.say("\1" * 500_000, "\2" * 500_000)  # each takes six bytes in JSON
        assert it.flush()
        health = it.health()
    assert account(health) == {"emitted": 2, "delivered": 2} and receiver.connections == 3
    assert [str(error)[-len("Large") :] for error in sink.errors] in (
        ["Large"],
        ["large"],
    ), sink.errors


@pytest.mark.parametrize("status", [401, 403, 407])
def test_what_somebody_has_to_mend_holds_everything_beyond_all_attempts(
    status: int, tmp_path: Path
) -> None:
    with Receiver(always=answer(status)) as receiver, delivery(receiver, tmp_path) as (sink, it):
        it.say(*"abcd")
        until(lambda: it.health().retries > 5 * FAST.attempts)
        health = it.health()
        assert account(health) == {"emitted": 4, "pending": 4} and health.state == "open"
        assert len({request.message_id for request in receiver.requests}) == 1
        receiver.always = TAKE
        assert it.flush()
        health = it.health()
    assert account(health) == {"emitted": 4, "delivered": 4} and health.state == "ok"
    assert receiver.payloads == list("abcd") and parked(tmp_path / "park") == []


def test_a_receiver_that_is_gone_gets_no_further_request_and_all_is_parked(tmp_path: Path) -> None:
    with Receiver(TAKE, always=answer(410)) as receiver, delivery(receiver, tmp_path) as (_, it):
        it.say(*"abcdef")
        assert not it.flush()
        it.say("g")
        assert not it.flush()
        until(lambda: it.health().parked == 5)
        health = it.health()
        assert (
            account(health) == {"emitted": 7, "delivered": 2, "parked": 5}
            and health.state == "failed"
        )
        assert health.last_error == (
            f"PermanentSinkError: http://127.0.0.1:{receiver.port} answered 410 Gone: "
            "it wants no events any more"
        )
        health = it.close()
    assert (health.state, receiver.connections) == ("closed", 2)
    assert receiver.payloads == ["a", "b"] and parked_payloads(tmp_path / "park") == list("cdefg")


@pytest.mark.parametrize(("status", "reason"), [(503, "failed"), (404, "refused"), (410, "closed")])
def test_without_a_park_file_what_is_given_up_is_dropped_and_counted_by_its_reason(
    status: int, reason: str
) -> None:
    with Receiver(always=answer(status)) as receiver, line(Watched(receiver.url)) as it:
        it.say(*"abcd")
        until(lambda: it.health().dropped == 4)
        assert it.health().dropped_by_reason == {reason: 4}
        it.close(0.5)  # with the loss still to be told, which it goes on to try


# -- TLS --


@pytest.mark.parametrize(("certificate", "is_trusted", "complaint"), [
    (GOOD, False, "unable to get local issuer certificate"),
    (OTHER_NAME, True, "IP address mismatch"),
    (EXPIRED, True, "certificate has expired"),
])
def test_a_certificate_that_is_not_to_be_trusted_keeps_everything_here(
    certificate: str,
    is_trusted: bool,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", trust(tmp_path) if is_trusted else os.devnull)
    with (
        Receiver(tls=server_context(certificate, tmp_path)) as receiver,
        delivery(receiver, tmp_path) as (sink, it),
    ):
        it.say(*"ab")
        until(lambda: it.health().parked == 2)
        health = it.health()
    assert account(health) == {"emitted": 2, "parked": 2} and health.state == "open"
    assert receiver.requests == [], "not a byte of it was sent"
    assert "its certificate is not trusted" in str(sink.errors[0]) and complaint in str(
        sink.errors[0]
    )
    assert "SSL_CERT_FILE" in str(sink.errors[0])


def test_a_certificate_of_a_trusted_authority_lets_everything_through(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", trust(tmp_path))
    with Receiver(answer(503), always=TAKE, tls=server_context(GOOD, tmp_path)) as receiver:
        with delivery(receiver, tmp_path) as (_, it):
            it.say("a", "b", "c" * 1_000_000)
            assert it.flush()
            health = it.health()
    assert account(health) == {"emitted": 3, "delivered": 3} and health.retries == 1
    assert receiver.payloads == ["a", "b", "c" * 1_000_000]


def test_certificates_are_verified_though_the_program_has_switched_that_off_for_urllib(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssl, "_create_default_https_context", ssl._create_unverified_context)
    with Receiver(tls=server_context(GOOD, tmp_path)) as receiver:
        with pytest.raises(TemporarySinkError, match="its certificate is not trusted"):
            Watched(receiver.url).write(batch("a"))
    assert receiver.requests == []


def test_a_receiver_that_does_not_speak_tls_is_no_receiver(tmp_path: Path) -> None:
    def greet(connection: Connection) -> None:
        connection.sock.recv(1)
        connection.sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.wait_for_close()

    with Receiver(greet) as receiver:
        with pytest.raises(TemporarySinkError, match="cannot reach https://127.0.0.1:.*SSL"):
            Watched(receiver.url.replace("http:", "https:")).write(batch("a"))


# -- the harness would notice --


class Swallowing(Watched):
    """The twin that does what many do: it takes any answer for a delivery."""

    def write(self, events: Sequence[Event]) -> None:
        try:
            super().write(events)
        except SinkError:
            pass


def test_a_sink_that_takes_any_answer_for_a_delivery_would_not_pass(tmp_path: Path) -> None:
    with (
        Receiver(answer(503), always=TAKE) as receiver,
        line(Swallowing(receiver.url), batch_size=2) as it,
    ):
        it.say(*"abcd")
        assert it.flush()
        assert account(it.health()) == {"emitted": 4, "delivered": 4}
    assert receiver.payloads == ["c", "d"], "the account says four, the receiver has two"


# -- parked, and replayed --


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bgworker", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_was_parked_arrives_after_a_replay_with_the_ids_that_its_batches_had(
    tmp_path: Path,
) -> None:
    texts = [f"line {number} \U0001f642" for number in range(24)]
    with Receiver(always=answer(503)) as receiver:
        once = RetryPolicy(attempts=1, base=0.001, cap=0.002)
        with line(Watched(receiver.url), park=tmp_path / "park", batch_size=7, retry=once) as it:
            it.say(*texts)
            health = it.close(5)  # most of which it goes on to try
        assert account(health) == {"emitted": 24, "parked": 24}
        attempted = list(dict.fromkeys(request.message_id for request in receiver.requests))
        receiver.always = TAKE
        report = replay(tmp_path / "park", Watched(receiver.url), batch_size=7)
        assert (report.delivered, report.refused, report.skipped) == (24, 0, 0)
        assert receiver.payloads == texts and not (tmp_path / "park").exists()
        assert [request.message_id for request in receiver.taken] == attempted and len(
            attempted
        ) == 4
        first_ids = {each for request in receiver.requests[:1] for each in request.ids}
        assert {each for request in receiver.taken[:1] for each in request.ids} == first_ids
        with pytest.raises(FileNotFoundError):
            replay(tmp_path / "park", Watched(receiver.url))
        assert len(receiver.taken) == 4, "a second replay sends nothing"


@pytest.fixture
def parked_run(tmp_path: Path) -> tuple[Path, list[Request]]:
    """The park file of a whole run, each event a batch of its own, and the requests that were not
    taken."""
    def talk(number: int) -> None:
        current_task().progress(number, 10)
        current_task().output({"number": number, "text": "\xe9\U0001f642"})
        if number == 3:
            raise ValueError("three")

    with Receiver(always=answer(503)) as receiver, Scheduler(1) as pool:
        pool.register_sink(
            Watched(receiver.url),
            options=SinkOptions(
                park=tmp_path / "park",
                batch_size=1,
                retry=RetryPolicy(attempts=1, base=0.001, cap=0.001),
            ),
        )
        for task in [
            pool.options(metadata={"n": number, "\xe9": None}).submit(talk, number)
            for number in range(5)
        ]:
            assert task.wait(SOON)
    assert account(pool.sinks["watched"]) == {"emitted": 30, "parked": 30}
    return tmp_path / "park", receiver.requests


def test_a_run_comes_from_the_park_file_in_the_same_bytes(
    parked_run: tuple[Path, list[Request]],
) -> None:
    park, attempted = parked_run
    with Receiver(always=TAKE) as receiver:
        assert replay(park, Watched(receiver.url), batch_size=1).delivered == 30
    assert {(request.message_id, request.body) for request in receiver.taken} == {
        (request.message_id, request.body) for request in attempted}
    assert len(receiver.taken) == 30


def test_a_run_comes_from_the_park_file_by_the_command_line(
    parked_run: tuple[Path, list[Request]],
) -> None:
    park, attempted = parked_run
    with Receiver(always=TAKE) as receiver:
        arguments = "replay", str(park), "--to", f"webhook:{receiver.url}"
        done = command(*arguments, BGWORKER_WEBHOOK_SECRET=SECRET)
        assert (done.returncode, done.stdout) == (
            0,
            "30 delivered, 0 refused, 0 skipped\n",
        ), done.stderr
        assert (
            command(*arguments, BGWORKER_WEBHOOK_SECRET=SECRET).returncode == 2
        ), "there is no file any more"
    [request] = receiver.taken
    assert verify(SECRET, request.headers, request.body)
    known = {element["id"]: element for each in attempted for element in each.elements}
    assert (
        request.elements == [known[each] for each in request.ids]
        and len(known) == len(request.ids) == 30
    )


def test_a_replay_to_a_receiver_that_does_not_take_it_says_why_and_leaves_all_in_the_file(
    tmp_path: Path,
) -> None:
    with Receiver(always=answer(503)) as receiver:
        with line(
            Watched(receiver.url), park=tmp_path / "park", retry=RetryPolicy(attempts=1)
        ) as it:
            it.say(*"abc")
            it.close()
        before = (tmp_path / "park").read_bytes()
        arguments = "replay", str(tmp_path / "park"), "--to", f"webhook:{receiver.url}"
        for status, words in (
            (503, "Service Unavailable"),
            (401, "Unauthorized"),
            (404, "Not Found"),
            (410, "Gone"),
        ):
            receiver.always, sent = answer(status), len(receiver.requests)
            done = command(*arguments, BGWORKER_WEBHOOK_SECRET=SECRET)
            assert done.returncode == 1 and words in done.stderr and "is still in" in done.stderr
            assert (len(receiver.requests), (tmp_path / "park").read_bytes()) == (sent + 1, before)
        receiver.always = judge(lambda request: 400 if "b" in request.payloads else 204)
        report = replay(tmp_path / "park", Watched(receiver.url))
    assert (report.delivered, report.refused, receiver.payloads) == (2, 1, ["a", "c"])
    assert parked_payloads(tmp_path / "park") == ["b"] and "400 Bad Request" in report.problems[0]


# -- killed and restarted --

MORTAL = """
import os, socket, sys, time

log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", int(sys.argv[2])))
listener.listen(64)
print("ready", flush=True)
forgets = len(sys.argv) > 3
while True:
    sock, _ = listener.accept()
    with sock:
        data = b""
        while b"\\r\\n\\r\\n" not in data:
            data += sock.recv(65536) or sys.exit("half a request")
        head, _, body = data.partition(b"\\r\\n\\r\\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\\r\\n")[1:])
        while len(body) < int(fields[b"content-length"]):
            body += sock.recv(1 << 20) or sys.exit("half a request")
        if not forgets:
            # on a line of its own, behind what a death has torn
            os.write(log, b"\\n" + fields[b"webhook-id"] + b" " + body + b"\\n")
        time.sleep(0.001)  # its work on it: who dies now has kept a message and not taken it
        sock.sendall(b"HTTP/1.1 204 No Content\\r\\nConnection: close\\r\\n\\r\\n")
"""
"""A receiver that writes each message down before it takes it. (With a third argument it forgets
to.)"""


class Mortal:
    """A receiver in a process of its own, on one port for all its lives."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.log = folder / "received"
        self.log.touch()
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self._process: subprocess.Popen[str] | None = None

    def start(self, *, forgets: bool = False) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-S",
                "-c",
                MORTAL,
                str(self.log),
                str(self.port),
                *["forgets"] * forgets,
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def wait_for_load(self) -> None:
        """Wait until another message has come."""
        heard = self.log.stat().st_size
        until(lambda: self.log.stat().st_size > heard)

    def kill(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait(SOON)
        self._process.stdout.close()

    def messages(self) -> list[tuple[str, bytes]]:
        """What was written down, message by message; a line that a death has torn is none: it was
        not taken."""
        found = []
        for each in self.log.read_bytes().split(b"\n"):
            message_id, _, body = each.partition(b" ")
            try:
                json.loads(body)
            except ValueError:
                continue
            found.append((message_id.decode(), body))
        return found


def check_messages(messages: list[tuple[str, bytes]], wanted: set[str]) -> int:
    """Check that every event came, and what came again was the same; return how many messages came
    again."""
    bodies: dict[str, bytes] = {}
    events: dict[str, Any] = {}
    for message_id, body in messages:
        assert bodies.setdefault(message_id, body) == body, f"{message_id} came with other bytes"
        for element in json.loads(body):
            assert (
                events.setdefault(element["id"], element) == element
            ), f"{element['id']} came with another content"
    missing = wanted - set(events)
    assert not missing, f"{len(missing)} of {len(wanted)} events never came"
    assert set(events) == wanted, "an event came that nobody has sent"
    return len(messages) - len(bodies)


def chat(pool: Scheduler, is_over: threading.Event, tasks: list[Any]) -> None:
    """Submit tasks that talk, at a pace that the sink's queue bears, until it is over."""
    def talk() -> None:
        context = current_task()
        for number in range(100):
            context.output(f"{number}: {'x' * 60}")

    while not is_over.wait(0.002) and len(tasks) < 900:
        tasks.append(pool.submit(talk))


@pytest.mark.slow
def test_a_receiver_that_is_killed_and_restarted_fifty_times_under_load_gets_everything(
    tmp_path: Path,
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    receiver, is_over = Mortal(tmp_path), threading.Event()
    tasks: list[Task[Any]] = []
    with Scheduler(2, close_timeout=SOON) as pool:
        receiver.start()
        pool.register_sink(Watched(receiver.url, timeout=5), name="it", options=SinkOptions(
            queue_size=1_000_000, queue_bytes=1 << 30, batch_size=50,
            retry=RetryPolicy(attempts=100_000, base=0.002, cap=0.01)))
        talker = threading.Thread(target=chat, args=(pool, is_over, tasks))
        talker.start()
        try:
            for _ in range(50):
                receiver.wait_for_load()
                is_over.wait(rng.random() * 0.01)  # the fault's own moment, at random
                receiver.kill()
                receiver.start()
        finally:
            is_over.set()
            talker.join(SOON)
        assert not talker.is_alive()
        for task in tasks:
            assert task.wait(SOON)
        assert pool.flush(SOON)
        health = pool.sinks["it"]
    receiver.kill()
    wanted = {f"{task.id}:{seq}" for task in tasks for seq in range(1, 105)}
    assert (
        account(health) == {"emitted": len(wanted), "delivered": len(wanted)}
        and health.retries >= 25
    )
    twice = check_messages(receiver.messages(), wanted)
    assert (
        twice
    ), "no death has hit the moment between keeping and taking; the test has to be made harder"
    print(
        f"{len(wanted)} events, {len(receiver.messages())} messages, {twice} of them again, "
        f"{health.retries} retries"
    )


def test_a_receiver_that_takes_what_it_does_not_keep_would_be_noticed(tmp_path: Path) -> None:
    receiver = Mortal(tmp_path)
    receiver.start(forgets=True)
    try:
        with line(Watched(receiver.url)) as it:
            it.say("a")
            assert it.flush()
            assert account(it.health()) == {"emitted": 1, "delivered": 1}
    finally:
        receiver.kill()
    with pytest.raises(AssertionError, match="1 of 1 events never came"):
        check_messages(receiver.messages(), {f"{'1' * 32}:1"})
    same, other = b'[{"id":"a"}]', b'[{"id":"a","x":1}]'
    assert check_messages([("m", same), ("m", same), ("n", same)], {"a"}) == 1
    for messages in (
        [("m", same), ("m", other)],
        [("m", same), ("n", other)],
        [("m", same)],
        [("m", b'[{"id":"b"}]')],
    ):
        with pytest.raises(AssertionError):
            check_messages(messages, {"a", "c"} if len(messages) == 1 else {"a"})


# -- secrets --

PASSWORD, TOKEN = "Bearer-pAssw0rd", "pAth-t0ken"


def echo(connection: Connection) -> None:
    """Answer with all that came, wherever an answer has room for it."""
    line, headers, _ = connection.read_head()
    everything = f"{line} {' '.join(headers.values())}"
    connection.sock.sendall(
        f"HTTP/1.1 500 {everything}\r\nRetry-After: {everything}\r\nLocation: {everything}\r\n"
        f"WWW-Authenticate: {everything}\r\nContent-Length: 9\r\n\r\n{everything}".encode()
    )


def echo_as_a_status(connection: Connection) -> None:
    line, headers, _ = connection.read_head()
    connection.sock.sendall(f"{line} {' '.join(headers.values())}\r\n\r\n".encode())


def leaks(text: str) -> list[str]:
    """Return what of the secrets stands in the text, in any of the forms that it may take."""
    found = []
    for secret in (SECRET, OTHER_SECRET):
        encoded = secret.removeprefix("whsec_")
        key = base64.b64decode(encoded)
        forms = (secret, encoded, encoded.rstrip("="), key.decode(), key.hex(), repr(list(key)))
        found += [form for form in forms if form in text]
    return found + [each for each in (PASSWORD, TOKEN) if each in text]


def everything_of(error: BaseException | None) -> str:
    """The error with all that hangs on it, shown or not."""
    told = ""
    while error is not None:
        told += "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))
        error = error.__cause__ or error.__context__
    return told


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("is_thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_secret_is_in_a_repr_a_log_line_a_health_record_an_event_a_park_file_or_an_exception(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
        is_thorough: bool) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    statuses = [301, 400, 401, 403, 404, 407, 410, 413, 429, 503] if is_thorough else [401]
    faults = [answer(status, {"Retry-After": "1"}) for status in statuses]
    faults += [fault for fault, _ in TEMPORARY.values()] if is_thorough else []
    faults += [echo, echo_as_a_status]
    monkeypatch.setenv("BGWORKER_WEBHOOK_SECRET", f"{SECRET} {OTHER_SECRET}")
    for number, fault in enumerate(faults):
        park = tmp_path / f"park-{number}"
        with Receiver(always=fault) as receiver:
            sink = Watched(f"{receiver.url}/{TOKEN}?{TOKEN}", secret=None,
                           headers={"Authorization": PASSWORD, "X-Key": TOKEN})
            # most of that time it goes on to try; the park file of the two is needed below
            seconds = 4.0 if fault in (echo, echo_as_a_status) else 0.5
            with Scheduler(1, record_arguments=True, record_source=True,
                           close_timeout=seconds) as pool:
                pool.register_sink(sink, name="it", options=SinkOptions(
                    park=park, retry=RetryPolicy(attempts=2, base=0.001, cap=0.002)))
                pool.submit(lambda the_sink: current_task().output(repr(the_sink)), sink).wait(SOON)
                until(lambda: sink.errors)
                pool.flush(0.02)
                told += [repr(pool.sinks), repr(sink), repr(sink._keys), repr(pool.tasks())]
            told += [park.read_text(encoding="utf-8") if park.exists() else "", repr(pool.sinks)]
            told += [everything_of(error) for error in sink.errors]
            told += [request.body.decode() for request in receiver.requests]
            if park.exists():
                try:
                    told.append(repr(replay(park, sink)))
                except SinkError as error:
                    told.append(everything_of(error))
            if fault in (echo, echo_as_a_status):
                done = command("replay", str(park), "--to", f"webhook:{receiver.url}/{TOKEN}")
                assert done.returncode == 1
                told += [done.stdout, done.stderr]
    told += [caplog.text, *(repr(record.args) for record in caplog.records)]
    assert leaks("\n".join(told)) == []
    assert (
        "answered 500 Internal Server Error" in caplog.text and "BadStatusLine" in caplog.text
    ), "both echoes"


def test_a_secret_that_leaks_would_be_found() -> None:
    key = b"0123456789abcdef0123456789abcdef"
    for text in (
        f"x{SECRET}x",
        SECRET.removeprefix("whsec_"),
        repr(key),
        key.hex(),
        f"?{TOKEN}",
        repr([PASSWORD]),
    ):
        assert leaks(text), text
    assert leaks("whsec_ and nothing else") == []
    try:
        try:
            raise ValueError(SECRET)
        finally:
            raise KeyError("hidden behind another")
    except KeyError as error:
        assert leaks(everything_of(error))


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # by http.client of 3.10
def test_a_proxy_that_opens_a_tunnel_byte_by_byte_holds_its_sender_no_longer_than_the_timeout(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crawl(connection: Connection) -> None:
        connection.read_head()
        try:
            for piece in drip(b"HTTP/1.1 200 OK\r\n" + SLOW, 16)():
                connection.sock.sendall(piece)
        except OSError:
            return

    with Receiver(crawl) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with pytest.raises(TemporarySinkError) as caught:
            WebhookSink("https://receiver.invalid/hook", secret=SECRET).write(batch("a"))
    assert str(caught.value) == ("cannot reach https://receiver.invalid through the proxy in the "
                                 "environment: no answer within 15 s")
    del caught
    gc.collect()

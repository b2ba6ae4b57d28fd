"""The end of the channel that is here: whoever connects, and however badly, costs nobody else
anything."""

from __future__ import annotations

import logging
import marshal
import os
import signal
import socket
import struct
import sys
import threading
import time
from multiprocessing import AuthenticationError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.remote.receiving import Receiver, hub, introduced
from tests.support import SOON, Gate, exit_code, forked, in_time, joined, needs_fork, started, until

from bgworker import BgworkerError
from bgworker.model.errors import ConfigurationError
from bgworker.model.records import OUTPUT, PROGRESS, STARTED, VERBOSE
from bgworker.remote import hub as module
from bgworker.remote.hub import Hub
from bgworker.remote.link import Link, connect

ALL_SORTS = [
    (STARTED, 5, None), (OUTPUT, 6, "x"), (OUTPUT, 6, ["x", "y"]), (PROGRESS, 7, (5.0, "x")),
    (PROGRESS, 7, (None, "")), (VERBOSE, 8, ("[1]", "json", False, 0)),
    (VERBOSE, 8, ("[", "text", True, 100)),
]
RECORDS = [(STARTED, 5, None), (OUTPUT, 6, "hello")]
SAID = ("said", 1, [("task", "a", 1, RECORDS)], {})

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- where it listens --


@pytest.mark.parametrize("channel", [None, "localhost:0", "127.0.0.1:0", "[::1]:0", "0.0.0.0:0"])
def test_a_worker_reaches_it_at_the_address_of_its_ticket(channel: str | None) -> None:
    if channel == "[::1]:0" and not socket.has_ipv6:
        pytest.skip("needs IPv6")
    try:
        with hub(channel) as (made, receiver):
            link = introduced(made)
            link.send(SAID)
            assert link.receive() == ("ack", 1)
            assert receiver.records == {"a": {1: RECORDS[0], 2: RECORDS[1]}}
            [peer] = made.workers()
            assert (peer.worker, peer.pid, peer.host) == ("w", 1, socket.gethostname())
            assert str(peer) == f"process 1 on {socket.gethostname()}"
            link.close()
            until(lambda: receiver.left == ["w"] and made.workers() == [])
    except ConfigurationError as error:
        if channel != "[::1]:0":
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("channel", [
    "", "nonsense", ":0", "host:", "host:x", "host:-1", "host:65536", "host:0:0:", 7, b"a:0",
    "no.such.host.invalid:0", "192.0.2.1:0",
])
def test_a_channel_that_is_nothing_to_listen_at_is_refused_with_a_remedy(channel: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Hub("test", channel, Receiver())
    text = str(caught.value)
    assert isinstance(caught.value, BgworkerError) and repr(channel) in text
    assert "'HOST:PORT'" in text and ("leave it out" in text or "name an address" in text)


def test_a_port_that_is_taken_is_refused() -> None:
    with hub("127.0.0.1:0") as (made, _):
        with pytest.raises(ConfigurationError, match="nobody can listen there"):
            Hub("test", f"127.0.0.1:{made.ticket[0][1]}", Receiver())


@needs_proc
@pytest.mark.parametrize("channel", [None, "127.0.0.1:0"])
def test_nothing_is_left_after_the_close(channel: str | None) -> None:
    threads, before = threading.active_count(), descriptors()
    with hub(channel) as (made, receiver):
        links = [introduced(made, f"w{number}") for number in range(5)]
        stranger = socket.socket(made._listener.family)
        stranger.connect(made.ticket[0])
        until(lambda: len(made.workers()) == 5 and made._strangers)
    assert threading.active_count() == threads
    assert sorted(receiver.left) == ["w0", "w1", "w2", "w3", "w4"]
    for link in links:
        with pytest.raises((EOFError, OSError)):
            link.receive()
        link.close()
    stranger.close()
    assert descriptors() == before
    with pytest.raises(OSError):
        connect(made.ticket[0], 1.0)
    made.close()  # a second one does nothing


def test_one_that_was_never_started_closes_as_well() -> None:
    made = Hub("test", None, Receiver())
    made.stop("task", "user")
    made.close()
    made.start()  # too late
    assert threading.active_count() == 1 or not made.workers()


def test_it_may_be_closed_from_a_thread_of_its_own() -> None:
    with hub() as (made, receiver):
        receiver.gone = lambda peer: made.close()  # type: ignore[method-assign,assignment]
        introduced(made).close()
        until(lambda: made._is_closed)


# -- strangers --


def test_who_does_not_know_the_key_is_turned_away(caplog: pytest.LogCaptureFixture) -> None:
    with hub() as (made, receiver):
        link = connect(made.ticket[0], 10.0)
        with pytest.raises((AuthenticationError, EOFError, OSError)):
            link.prove(b"another key", accepts=False)
            link.send(("hello", "w", 1, "host"))
            link.receive()
        link.close()
        until(lambda: not made._strangers)
        assert made.workers() == [] and receiver.left == []
        until(lambda: "did not prove itself" in caplog.text)
        introduced(made).close()  # another one is welcome


@pytest.mark.parametrize("bytes_", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 1000, b"\xff" * 8, b""])
def test_who_talks_something_else_is_turned_away(bytes_: bytes) -> None:
    with hub("127.0.0.1:0") as (made, receiver):
        with socket.create_connection(made.ticket[0]) as stranger:
            stranger.sendall(bytes_)
            stranger.shutdown(socket.SHUT_WR)
            until(lambda: not made._strangers)
            while stranger.recv(1000):
                pass
        assert made.workers() == []
        introduced(made).close()


def test_who_says_nothing_is_given_up_and_costs_nobody_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    with hub() as (made, _):
        silent = []
        for _ in range(module.MOST_STRANGERS - 1):
            silent.append(socket.socket(made._listener.family))
            silent[-1].connect(made.ticket[0])
        began = time.monotonic()
        introduced(made).close()
        assert time.monotonic() - began < 0.5 or not made._strangers
        until(lambda: not made._strangers)
        for each in silent:
            each.close()


def test_there_are_never_more_strangers_than_so_many() -> None:
    with hub() as (made, _):
        silent = []
        for number in range(module.MOST_STRANGERS):
            silent.append(socket.socket(made._listener.family))
            silent[-1].connect(made.ticket[0])
            until(lambda: len(made._strangers) == number + 1)
        with pytest.raises((EOFError, OSError)):
            introduced(made)
        silent.pop().close()
        until(lambda: len(made._strangers) < module.MOST_STRANGERS)
        introduced(made).close()  # there is room again
        for each in silent:
            each.close()


# -- peers that misbehave --


@pytest.mark.parametrize("message", [
    ("unknown", 1), ("said",), ("said", "1", [], {}), ("said", 1, [], []), ("said", 1, 5, {}),
    ("said", 1, [("task", "a", 1)], {}), ("said", 1, [("task", 5, 1, [])], {}),
    ("said", 1, [("task", "a", "1", [])], {}), ("said", 1, [("task", "a", 1, [(OUTPUT, 1)])], {}),
    ("said", 1, [("task", "a", 1, [(99, 1, "x")])], {}),
    ("said", 1, [("task", "a", 1, [("8", 1, "x")])], {}),
    ("said", 1, [("task", "a", 1, [(OUTPUT, 1, 5)])], {}),
    ("said", 1, [("task", "a", 1, [(OUTPUT, 1, ["x", 5])])], {}),
    ("said", 1, [("task", "a", 1, [(OUTPUT, "1", "x")])], {}),
    ("said", 1, [("task", "a", 1, [(PROGRESS, 1, "x")])], {}),
    ("said", 1, [("task", "a", 1, [(STARTED, 1, "x")])], {}),
    ("said", 1, [("task", "a", 1, [(OUTPUT, 1, ("x", "json", 0))])], {}),
    ("said", 1, [], {"x": 1}), ("said", 1, [], {(8, "intake"): "1"}),
    ("overdue", "task", "a"), ("overdue", 1, "a", ""), ("hello", "w", 1, "host"),
])
def test_a_message_that_is_none_ends_its_connection_and_is_told_once(
    message: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with hub() as (made, receiver):
        good, bad = introduced(made, "good"), introduced(made, "bad", 77)
        bad.send(message)
        with pytest.raises((EOFError, OSError)):
            bad.receive()
        bad.close()
        until(lambda: receiver.left == ["bad"])
        good.send(SAID)
        assert good.receive() == ("ack", 1)  # nobody else notices
        assert list(receiver.records) == ["a"] and receiver.late == []
        until(lambda: caplog.text.count("process 77") == 1)
        good.close()


def test_each_sort_of_record_is_taken() -> None:
    with hub() as (made, receiver):
        link = introduced(made)
        link.send(("said", 1, [("task", "a", 1, ALL_SORTS)], {}))
        assert link.receive() == ("ack", 1)
        assert list(receiver.records["a"].values()) == ALL_SORTS
        link.close()


@pytest.mark.parametrize("bytes_", [b"", b"nonsense", marshal.dumps(5), marshal.dumps(()),
                                    marshal.dumps([1]), marshal.dumps(SAID)[:-4]])
def test_bytes_that_are_no_message_end_their_connection(
    bytes_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with hub() as (made, receiver):
        bad = introduced(made, "bad", 77)
        bad._connection.send_bytes(bytes_)
        with pytest.raises((EOFError, OSError)):
            bad.receive()
        bad.close()
        until(lambda: receiver.left == ["bad"])
        until(lambda: caplog.text.count("process 77") == 1)


def test_a_peer_that_stops_in_the_middle_of_a_message_holds_nobody_up() -> None:
    with hub() as (made, receiver):
        stalled = introduced(made, "stalled")
        os.write(stalled._connection.fileno(), struct.pack("!i", 1000) + b"half of it")
        other = introduced(made, "other")
        for number in range(100):
            other.send(("said", number, [], {}))
            assert other.receive() == ("ack", number)
        began = time.monotonic()
        made.close()
        assert time.monotonic() - began < module.CLOSE_TIMEOUT
        stalled.close()
        other.close()


def test_a_peer_that_does_not_read_is_cut_off_and_the_others_are_asked_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SEND_TIMEOUT", 0.3)
    with hub() as (made, receiver):
        deaf = introduced(made, "deaf")
        until(made.workers)
        longest = 0.0
        for number in range(module.MOST_STOPS):
            began = time.perf_counter()
            made.stop(f"task{number}", "user" * 100)
            longest = max(longest, time.perf_counter() - began)
        other = introduced(made, "other")
        asked = set()
        while "last" not in asked:
            asked.add(in_time(other.receive)[1])
            if len(asked) == 1:
                made.stop("last", "user")
        assert len(asked) > module.MOST_STOPS  # those of before it came, too
        until(lambda: "deaf" in receiver.left)
        assert longest < 1.0
        deaf.close()
        other.close()


def test_stops_are_remembered_for_those_that_come_later_but_not_without_end() -> None:
    with hub() as (made, _):
        for number in range(3 * module.MOST_STOPS):
            made.stop(f"task{number}", "user")
        until(lambda: len(made._stops) <= 1.2 * module.MOST_STOPS)
        late = introduced(made)
        kind, task_id, reason = in_time(late.receive)
        assert (kind, reason) == ("stop", "user")
        assert int(task_id.removeprefix("task")) > module.MOST_STOPS  # the oldest are forgotten
        late.close()


def test_what_a_receiver_fails_to_note_is_reported_and_does_not_come_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with hub() as (made, receiver):
        def fail(peer: object) -> None:
            raise LookupError("a defect")

        receiver.before = fail
        link = introduced(made)
        link.send(SAID)
        assert link.receive() == ("ack", 1)
        until(lambda: "LookupError: a defect" in caplog.text)
        assert caplog.records[-1].levelno == logging.ERROR
        link.close()


def test_losses_and_overdue_bodies_are_told() -> None:
    with hub() as (made, receiver):
        link = introduced(made)
        link.send(("said", 1, [], {(OUTPUT, "intake"): 7}))
        link.send(("overdue", "task", "a", "stack"))
        assert link.receive() == ("ack", 1)
        until(lambda: receiver.late == [("task", "stack")])
        assert receiver.lost == {"w": {(OUTPUT, "intake"): 7}}
        link.close()


# -- the same worker twice --


def test_a_worker_that_connects_again_is_told_of_one_thing_at_a_time() -> None:
    with hub() as (made, receiver):
        gate = Gate()
        receiver.before = lambda peer: gate()
        first = introduced(made)
        first.send(SAID)
        assert gate.entered.wait(10)
        second = introduced(made)  # the first one broke on its side alone
        second.send(("said", 1, [("task", "a", 1, RECORDS)], {}))
        second.send(("said", 2, [("task", "a", 3, [(OUTPUT, 7, "more")])], {}))
        time.sleep(0.2)
        assert receiver.came == {} and receiver.at_once["w"] == 1
        gate.open()
        assert [in_time(second.receive) for _ in range(2)] == [("ack", 1), ("ack", 2)]
        assert receiver.most_at_once == 1 and receiver.left == ["w"]
        assert receiver.came["a", 1] == 2 and receiver.came["a", 3] == 1
        assert len(made.workers()) == 1
        first.close()
        second.close()


def test_several_workers_are_told_of_at_the_same_time() -> None:
    with hub() as (made, receiver):  # the twin: the harness can tell
        gate = Gate()
        receiver.before = lambda peer: peer.worker == "w1" and gate()
        first, second = introduced(made, "w1"), introduced(made, "w2")
        first.send(SAID)
        assert gate.entered.wait(10)
        second.send(("said", 1, [("task", "b", 1, RECORDS)], {}))
        assert in_time(second.receive) == ("ack", 1)
        gate.open()
        first.close()
        second.close()


# -- forks --


@needs_fork
@pytest.mark.parametrize("discards", [True, False])
def test_a_forked_child_keeps_no_worker_from_seeing_that_its_parent_has_died(
    discards: bool, tmp_path: Path
) -> None:
    """The twin, which does not discard what it has inherited, does."""
    go, ticket = tmp_path / "go", tmp_path / "ticket"

    def parent() -> None:
        made = Hub("test", None, Receiver())
        made.start()
        (tmp_path / "part").write_bytes(marshal.dumps(made.ticket))
        (tmp_path / "part").rename(ticket)
        until(made.workers)
        if not discards:
            module._hubs.clear()
        forked(lambda: until(go.exists))
        os.kill(os.getpid(), signal.SIGKILL)

    pid = forked(parent)
    until(ticket.exists)
    link = introduced(SimpleNamespace(ticket=marshal.loads(ticket.read_bytes())))
    assert exit_code(pid) == -signal.SIGKILL
    gone = threading.Event()

    def watch() -> None:
        with pytest.raises((EOFError, OSError)):
            link.receive()
        gone.set()

    watching = started(watch)
    try:
        assert gone.wait(SOON if discards else 1.0) is discards
    finally:
        go.touch()
        joined(watching)
        link.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs the credentials of a local peer")
def test_another_user_is_turned_away_from_a_local_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to become another user")
    with hub() as (made, _):
        def child() -> None:
            os.setresuid(65534, 65534, 65534)
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(made.ticket[0])
            stranger.settimeout(5.0)
            try:
                answer = stranger.recv(1)
            except ConnectionResetError:
                answer = b""
            assert answer == b""

        assert exit_code(forked(child)) == 0
        assert isinstance(introduced(made), Link)


def test_a_worker_may_connect_again_and_again_while_it_is_not_heard() -> None:
    with hub() as (made, receiver):
        gate = Gate()
        receiver.before = lambda peer: gate()
        links = [introduced(made)]
        links[0].send(SAID)
        assert gate.entered.wait(10)
        for _ in range(3):
            links.append(introduced(made))
            links[-1].cut()
        gate.open()
        until(lambda: len(receiver.left) == 4 and made.workers() == [])
        links.append(introduced(made))
        links[-1].send(("said", 1, [("task", "a", 3, [(OUTPUT, 7, "more")])], {}))
        assert in_time(links[-1].receive) == ("ack", 1)
        assert receiver.most_at_once == 1
        for link in links:
            link.close()

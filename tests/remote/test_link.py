"""One end of a connection: whoever waits at it is let go when it is cut."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError

import pytest
from tests.support import SOON, in_time, joined, started

from bgworker.remote.link import Link

LARGE = ("x" * 10**7,)
"""More than a socket holds that nobody reads."""


@pytest.fixture(params=["local", "tcp"])
def sockets(request: pytest.FixtureRequest) -> tuple[socket.socket, socket.socket]:
    if request.param == "local":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


@pytest.fixture
def links(sockets: tuple[socket.socket, socket.socket]) -> Iterator[tuple[Link, Link]]:
    one, other = (Link(each, 10.0) for each in sockets)
    yield one, other
    one.close()
    other.close()


def proved(links: tuple[Link, Link], send_timeout: float = 0) -> tuple[Link, Link]:
    one, other = links
    proving = started(lambda: one.prove(b"key", accepts=True))
    other.prove(b"key", accepts=False)
    joined(proving)
    one.trust(send_timeout)
    other.trust()
    return links


def test_messages_arrive_whole_and_in_order_from_several_threads(links: tuple[Link, Link]) -> None:
    one, other = proved(links)

    def send(name: str) -> None:
        for number in range(200):
            one.send((name, number, "x" * 5000))

    threads = [started(lambda name=name: send(name)) for name in "abc"]  # type: ignore[misc]
    last: dict[str, int] = {}
    for _ in range(600):
        name, number, text = in_time(other.receive)
        assert number == last.get(name, -1) + 1 and text == "x" * 5000
        last[name] = number
    joined(*threads)


def test_both_sides_have_to_know_the_key(links: tuple[Link, Link]) -> None:
    one, other = links
    errors: list[BaseException] = []

    def prove() -> None:
        try:
            one.prove(b"key", accepts=True)
        except (AuthenticationError, EOFError, OSError) as error:
            errors.append(error)
        one.cut()

    proving = started(prove)
    with pytest.raises((AuthenticationError, EOFError, OSError)):
        other.prove(b"another", accepts=False)
    other.cut()
    joined(proving)
    assert errors


def test_who_does_not_answer_is_given_up() -> None:
    sockets = socket.socketpair()
    one = Link(sockets[0], 0.2)
    began = time.monotonic()
    with pytest.raises(OSError):
        one.prove(b"key", accepts=True)
    assert 0.1 < time.monotonic() - began < SOON
    one.close()
    sockets[1].close()


@pytest.mark.parametrize("end", [0, 1])
def test_a_cut_at_either_end_lets_go_who_reads_and_who_sends(
    links: tuple[Link, Link], end: int
) -> None:
    one, other = proved(links)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            one.receive()
        except (EOFError, OSError) as error:
            errors.append(error)

    def send() -> None:
        try:
            one.send(LARGE)
        except OSError as error:
            errors.append(error)

    threads = [started(read), started(send)]
    time.sleep(0.2)
    assert errors == [] and all(thread.is_alive() for thread in threads)  # both wait
    links[end].cut()
    if end == 1:
        other.close()  # as who reads it does then
    joined(*threads)
    assert len(errors) == 2 and one.is_cut
    with pytest.raises(OSError):
        one.send(("more",))


def test_what_was_sent_before_a_cut_arrives(links: tuple[Link, Link]) -> None:
    one, other = proved(links)
    for number in range(10):
        one.send((number,))
    one.cut()
    assert [other.receive() for _ in range(10)] == [(number,) for number in range(10)]
    with pytest.raises((EOFError, OSError)):
        other.receive()


def test_a_side_that_does_not_read_is_cut_off(links: tuple[Link, Link]) -> None:
    one, _ = proved(links, 0.2)
    began = time.monotonic()
    with pytest.raises(OSError):
        one.send(LARGE)
    assert 0.1 < time.monotonic() - began < SOON
    assert one.is_cut


def test_a_close_does_not_wait_for_one_who_sends(links: tuple[Link, Link]) -> None:
    one, _ = proved(links)
    sent = threading.Event()

    def send() -> None:
        with pytest.raises(OSError):
            one.send(LARGE)
        sent.set()

    sending = started(send)
    time.sleep(0.1)
    in_time(one.close)
    assert sent.wait(SOON)
    joined(sending)
    one.cut()  # and a late cut touches no descriptor that may be another's by now
    one.close()


def test_no_descriptor_is_left(sockets: tuple[socket.socket, socket.socket]) -> None:
    numbers = [each.fileno() for each in sockets]
    one, other = (Link(each, 10.0) for each in sockets)
    one.close()
    other.discard()
    other.discard()
    for number in numbers:
        with pytest.raises(OSError):
            os.fstat(number)


def test_who_will_not_wait_is_not_held_up_by_a_side_that_does_not_read(
    links: tuple[Link, Link],
) -> None:
    one, other = proved(links)
    sent = 0
    while in_time(lambda: one.send(("x" * 100,), wait=False)):
        sent += 1
    assert sent > 10 and not one.is_cut
    assert [in_time(other.receive) for _ in range(sent)] == [("x" * 100,)] * sent  # none was cut
    sending = started(lambda: one.send(LARGE))
    time.sleep(0.1)
    assert one.send(("x",), wait=False) is False  # somebody else does
    assert in_time(other.receive) == LARGE
    joined(sending)
    assert one.send(("x",), wait=False) is True

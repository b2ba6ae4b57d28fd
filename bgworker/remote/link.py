"""One end of a connection between a worker process and here: it carries small tuples.

Both ends prove to each other that they know the key (`multiprocessing.connection`) before the first
tuple is read. One thread reads a link and closes it; any thread may send, and any may `cut` it.
"""

from __future__ import annotations

import marshal
import os
import selectors
import socket
import struct
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from .messages import MARSHAL, unmarshal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOST_BYTES = 2**28
"""Bytes of a message beyond which the other side is taken to be broken."""

_Selector: type[selectors.BaseSelector] = getattr(
    selectors, "PollSelector", selectors.SelectSelector)

BROKEN = (OSError, EOFError, ValueError, AuthenticationError)
"""What a link raises when it is of no more use: gone, cut, or talking nonsense."""


class Link:
    """See the module.

    Args:
        connected: a socket, which belongs to the link from here on.
        patience: seconds that the other side may take for each step until it is `trusted`.
    """

    def __init__(self, connected: socket.socket, patience: float) -> None:
        connected.settimeout(None)
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            _tune(connected)
        _limit(connected, socket.SO_RCVTIMEO, patience)
        _limit(connected, socket.SO_SNDTIMEO, patience)
        self._connection = Connection(connected.detach())
        self._sending = threading.Lock()
        """Held while a message is sent: one at a time."""
        self._closing = threading.Lock()
        """Guards the descriptor: nobody cuts what is closed, and maybe another's by now. Held for
        moments."""
        self.is_cut = False

    def prove(self, key: bytes, *, accepts: bool) -> None:
        """Have both sides prove that they know the key; ``accepts`` is true on the one that
        listens.

        Raises:
            OSError, EOFError, AuthenticationError: the other side does not know the key, did not
                answer in time, or is gone.
        """
        steps = (deliver_challenge, answer_challenge)
        for step in steps if accepts else steps[::-1]:
            step(self._connection, key)

    def trust(self, send_timeout: float = 0) -> None:
        """Wait for messages for ever from here on, and ``send_timeout`` seconds for the other side
        to read one; 0 is for ever."""
        self._on_socket(lambda twin: _limit(twin, socket.SO_RCVTIMEO, 0))
        self._on_socket(lambda twin: _limit(twin, socket.SO_SNDTIMEO, send_timeout))

    def send(self, message: tuple[Any, ...], wait: bool = True) -> bool:
        """Send a message; wait for those that other threads send and for the other side to read,
        or return False without.

        Raises:
            OSError: the link is broken, or the other side did not read in time. A part of the
                message may be on its way: the link is cut.
        """
        data = marshal.dumps(message, MARSHAL)
        if not self._sending.acquire(wait):
            return False
        try:
            if self.is_cut:
                raise BrokenPipeError("the link is cut")
            if not wait and not self._has_room():
                return False
            self._connection.send_bytes(data)
        except BaseException:
            self.cut()
            raise
        finally:
            self._sending.release()
        return True

    def _has_room(self) -> bool:
        """Tell whether the system takes a short message at once."""
        with _Selector() as selector:
            selector.register(self._connection, selectors.EVENT_WRITE)
            return bool(selector.select(0))

    def receive(self) -> tuple[Any, ...]:
        """Return the next message. One thread.

        Raises:
            EOFError, OSError: the link is broken.
            ValueError: what came is no message.
        """
        data = self._connection.recv_bytes(MOST_BYTES)
        try:
            message = unmarshal(data)
        except Exception as error:
            raise ValueError(f"expected a message, got {data[:20]!r}") from error
        if type(message) is not tuple or not message:
            raise ValueError(f"expected a tuple that is a message, got {type(message).__name__}")
        return message

    def cut(self) -> None:
        """Let go whoever reads or sends here. The other end reads what was sent before, and then
        sees the cut; who sends there, at the latest when this end is closed. Any thread."""
        self.is_cut = True
        self._on_socket(lambda twin: twin.shutdown(socket.SHUT_RDWR))

    def close(self) -> None:
        """Close this end. Of its thread alone, after the last `receive`."""
        self.cut()  # a thread that sends holds the lock
        with self._sending, self._closing:
            self._connection.close()

    def discard(self) -> None:
        """Close the descriptor of a forked child, where the locks may be held for ever."""
        self.is_cut = True
        try:
            self._connection.close()
        except OSError:
            pass  # closed before

    def _on_socket(self, action: Any) -> None:
        with self._closing:
            if self._connection.closed:
                return
            twin = socket.socket(fileno=self._connection.fileno())
            try:
                action(twin)
            except OSError:
                pass  # the other side was first
            finally:
                twin.detach()


def connect(address: Any, patience: float) -> Link:
    """Return a link, not proved yet, to who listens at an address: the name of a local socket, or
    host and port.

    Raises:
        OSError: nobody does.
    """
    if type(address) is str:
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.settimeout(patience)
            connected.connect(address)
        except BaseException:
            connected.close()
            raise
    else:
        connected = socket.create_connection(address, patience)
    return Link(connected, patience)


def _tune(connected: socket.socket) -> None:
    """Send without delay, and notice within some minutes that the other machine has vanished."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)


def _limit(connected: socket.socket, option: int, seconds: float) -> None:
    """Bound the time that one step of the system's takes on a socket; 0 is for ever."""
    whole, part = int(seconds), int(seconds % 1 * 1e6)
    if os.name == "nt":
        connected.setsockopt(socket.SOL_SOCKET, option, int(seconds * 1000))
    else:
        connected.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, part))

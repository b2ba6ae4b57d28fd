"""A webhook receiver on this machine whose every byte a test decides. No test is in here."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

SOON = 30.0
"""Seconds after which what should have happened long ago counts as hanging."""

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
OTHER_SECRET = "whsec_ZmVkY2JhOTg3NjU0MzIxMGZlZGNiYTk4NzY1NDMyMTA="

Behaviour = Callable[["Connection"], None]
"""What becomes of one connection."""


class Request(NamedTuple):
    """One request as it came."""

    line: str
    headers: Mapping[str, str]
    """By lower-case name."""
    body: bytes

    @property
    def message_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def elements(self) -> list[dict[str, Any]]:
        return json.loads(self.body)  # type: ignore[no-any-return]

    @property
    def ids(self) -> list[str]:
        return [element["id"] for element in self.elements]

    @property
    def payloads(self) -> list[str]:
        return [
            element["data"]["payload"] for element in self.elements if "payload" in element["data"]
        ]


class Connection:
    """One accepted connection, in the hands of a behaviour."""

    def __init__(self, receiver: Receiver, sock: socket.socket) -> None:
        self._receiver = receiver
        self.sock = sock

    def read_head(self) -> tuple[str, dict[str, str], bytes]:
        """Read the request's line and its headers; return them, and what came of the body."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._receive(65_536)
        head, _, rest = data.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        named = (field.partition(":") for field in fields)
        return line, {name.lower(): value.strip() for name, _, value in named}, rest

    def read(self) -> Request:
        """Read one request whole, and note it."""
        line, headers, body = self.read_head()
        while len(body) < int(headers["content-length"]):
            body += self._receive(1 << 20)
        request = Request(line, headers, body)
        self._receiver.note(request, False)
        return request

    def _receive(self, most: int) -> bytes:
        piece = self.sock.recv(most)
        if not piece:
            raise ConnectionError("the sender closed before its request was complete")
        return piece

    def answer(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"",
               of: Request | None = None) -> None:
        """Send a whole answer; with 2xx the request ``of`` counts as taken."""
        if of is not None and 200 <= status < 300:
            self._receiver.note(of, True)
        fields = {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.sock.sendall(f"HTTP/1.1 {status} So It Is\r\n{head}\r\n".encode() + body)

    def reset(self) -> None:
        """Close so that the other side sees a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def wait_for_close(self) -> None:
        """Wait until the sender closes its side."""
        try:
            while self.sock.recv(65_536):
                pass
        except OSError:
            pass


def answer(
    status: int = 204, headers: Mapping[str, str] | None = None, body: bytes = b""
) -> Behaviour:
    """Read the request and answer it."""
    def act(connection: Connection) -> None:
        connection.answer(status, headers, body, connection.read())

    return act


def judge(status_of: Callable[[Request], int]) -> Behaviour:
    """Read the request and answer what a function makes of it."""
    def act(connection: Connection) -> None:
        request = connection.read()
        connection.answer(status_of(request), of=request)

    return act


def raw(data: bytes) -> Behaviour:
    """Read the request and send just these bytes."""
    def act(connection: Connection) -> None:
        connection.read()
        connection.sock.sendall(data)

    return act


class Receiver:
    """Listens on loopback. Each connection gets the next behaviour of the script; when that is used
    up, ``always``.

    A context manager. Leaving it checks that each behaviour could do what it does.
    """

    def __init__(
        self,
        *script: Behaviour,
        always: Behaviour | None = None,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
    ) -> None:
        self.always = answer() if always is None else always
        """May be changed at any time."""
        self._script = list(script)
        self._tls = tls
        self._news = threading.Condition()  # guards the lists
        self._requests: list[Request] = []
        self._taken: list[Request] = []
        self._failures: list[str] = []
        self.connections = 0
        """How many were accepted."""
        self._is_closing = False
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/hook"
        self._thread = threading.Thread(target=self._serve, name="receiver", daemon=True)
        self._thread.start()

    @property
    def requests(self) -> list[Request]:
        """What was read whole, in order; a copy."""
        with self._news:
            return list(self._requests)

    @property
    def taken(self) -> list[Request]:
        """What was answered with 2xx, in order; a copy."""
        with self._news:
            return list(self._taken)

    @property
    def elements(self) -> list[dict[str, Any]]:
        """All events taken, in order."""
        return [element for request in self.taken for element in request.elements]

    @property
    def payloads(self) -> list[str]:
        """The payloads of all events taken, in order."""
        return [payload for request in self.taken for payload in request.payloads]

    def note(self, request: Request, is_taken: bool) -> None:
        with self._news:
            (self._taken if is_taken else self._requests).append(request)
            self._news.notify_all()

    def wait_for(self, requests: int) -> None:
        """Wait until so many requests have come."""
        with self._news:
            came = self._news.wait_for(lambda: len(self._requests) >= requests, SOON)
        assert came, f"{len(self._requests)} requests came, not {requests}"

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        assert not self._failures, self._failures

    def close(self) -> None:
        """Stop listening: whoever connects from now on is refused."""
        self._is_closing = True
        try:
            socket.create_connection(("127.0.0.1", self.port), SOON).close()  # wakes the thread
        except OSError:
            pass
        self._thread.join(SOON)
        assert not self._thread.is_alive(), "a behaviour hangs"
        self._listener.close()

    def _serve(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            with sock:
                if self._is_closing:
                    return
                self.connections += 1
                sock.settimeout(SOON)
                try:
                    self._handle(sock)
                except ssl.SSLError:
                    # the sender does not like our certificate: what a test of that looks at is the
                    # sender
                    pass
                except Exception as error:
                    self._failures.append(f"{type(error).__name__}: {error}")

    def _handle(self, sock: socket.socket) -> None:
        if self._tls is None:
            (self._script.pop(0) if self._script else self.always)(Connection(self, sock))
            return
        with self._tls.wrap_socket(sock, server_side=True) as secure:
            (self._script.pop(0) if self._script else self.always)(Connection(self, secure))

"""An HTTP server with a bounded number of connections, each a thread and one request.

Where all places are taken, the oldest connection goes, of those that matter least: a crowd that
only connects keeps nobody out who has shown that he may ask.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from time import sleep

from ..model.clock import monotonic
from ..model.threads import own_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOST_CLIENTS = 32
MOST_LIVE = 16

IS_KNOWN, IS_LIVE = 1, 2
"""Ranks of a client who may ask, and of one whose answer goes on for as long as he likes."""

END_SECONDS = 10.0
"""How long the end of the server waits for the thread of a connection."""


@dataclass
class _Client:
    thread: threading.Thread
    rank: int = 0


class BoundedServer(ThreadingHTTPServer):
    """Listens at an address until `server_close`, which hangs up on everybody.

    Args:
        host: to bind, a name or an address.
        port: to bind; 0 takes any that is free.

    Raises:
        OSError: the address cannot be bound.
    """

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = os.name != "nt"  # where it would let another program share the port

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self._guard = threading.Lock()  # guards the one below
        self._clients: dict[socket.socket, _Client] = {}  # the oldest first
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        """Bind, and ask no name server for our name, as `HTTPServer` does."""
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a thread, if there is a place or one can be made."""
        if len(self._clients) >= MOST_CLIENTS and not self._make_room():
            self.shutdown_request(request)
            return
        thread = own_thread("bgworker-serve", self._answer, request, client_address)
        try:
            with self._guard:
                self._clients[request] = _Client(thread)
            thread.start()
        except BaseException as error:
            self._end(request)
            if not isinstance(error, RuntimeError):  # else the system has no thread left
                raise

    def _answer(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError:
            pass  # the client has gone, or takes too long: it hears no more of us
        except Exception:
            self.handle_error(request, client_address)
        finally:
            self._end(request)

    def _end(self, request: socket.socket) -> None:
        self.shutdown_request(request)
        with self._guard:
            self._clients.pop(request, None)

    def _make_room(self) -> bool:
        """Hang up on one who matters least; tell whether he has gone."""
        with self._guard:
            if self._clients:
                _hang_up(min(self._clients, key=lambda each: self._clients[each].rank))
        until = monotonic() + 0.2
        while len(self._clients) >= MOST_CLIENTS:
            if monotonic() > until:
                return False
            sleep(0.002)
        return True

    def promote(self, request: socket.socket, rank: int) -> bool:
        """Give a client a rank; False where too many have the highest one."""
        with self._guard:
            live = sum(each.rank == IS_LIVE for each in self._clients.values())
            if rank == IS_LIVE and live >= MOST_LIVE:
                return False
            self._clients[request].rank = rank
            return True

    def server_close(self) -> None:
        """Hang up on everybody, and wait for their threads. ``serve_forever`` must have ended."""
        super().server_close()
        with self._guard:
            clients = list(self._clients.values())
            for request in self._clients:
                _hang_up(request)
        for client in clients:
            client.thread.join(END_SECONDS)


def _hang_up(request: socket.socket) -> None:
    with suppress(OSError):  # the client was faster
        request.shutdown(socket.SHUT_RDWR)

"""The end of the channel that is here: worker processes connect to it and tell what bodies say.

One thread accepts connections. Each connection has a thread of its own, which proves that the other
side knows the key, and then reads: a peer that is silent, slow or stopped costs nobody else
anything. A batch is acknowledged when it is with `HubEvents`, whose methods may take their time:
then the worker's window fills, as a pipe does.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import weakref
from queue import SimpleQueue

from ..model.clock import monotonic
from ..model.errors import ConfigurationError
from ..model.forks import in_child
from ..model.ids import new_id
from ..model.latch import Latch
from ..model.records import LOST, PROGRESS, STARTED
from ..model.reports import report
from ..model.text import describe, show
from ..model.threads import own_thread
from .link import Link

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, Tuple

    from .messages import Losses, Records, Ticket

    Part = Tuple[str, str, int, Records]

    class HubEvents(Protocol):
        """Who is told what worker processes say. Called on the connection's thread: one call at a
        time for each worker, also where it connects again."""

        def said(
            self, peer: Peer, task_id: str, attempt: str, first: int, records: Records
        ) -> None:
            """Take records of a body, numbered from ``first``. The same may come again, here and
            in a report. Returns when they need not come again."""

        def losses(self, worker: str, totals: Losses) -> None:
            """Take how many events a worker has refused since its channel began."""

        def overdue(self, peer: Peer, task_id: str, attempt: str, stack: str) -> None:
            """A body runs longer than its timeout; ``stack`` tells where it is, "" if that cannot
            be told."""

        def gone(self, peer: Peer) -> None:
            """The connection ended; all that came over it has been told."""


PATIENCE = 10.0
"""Seconds that a peer may take for each step of its introduction."""

SEND_TIMEOUT = 5.0
"""Seconds after which a peer that does not read is cut off. It connects again when it goes on."""

MOST_STRANGERS = 64
"""Connections that have not proved themselves; further ones are refused, and try again."""

MOST_STOPS = 10_000
"""Requests to stop that are remembered for workers that connect later."""

CLOSE_TIMEOUT = 5.0
"""Seconds that `Hub.close` waits for the threads."""


class Peer:
    """A worker process that is connected."""

    def __init__(self, link: Link, worker: str, pid: int, host: str) -> None:
        self.worker = worker
        """Identifies its channel; the same when it connects again."""
        self.pid = pid
        self.host = host
        self.link = link
        self.ended = Latch()
        """Set when all that it said has been told, and `HubEvents.gone`."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    __repr__ = __str__


class Hub:
    """Listens from the start; reads once it is started. Any thread may call the methods.

    Args:
        name: of the scheduler; threads are named after it.
        channel: "HOST:PORT" for TCP, where port 0 is any; None for a socket of this machine.
        events: see `HubEvents`.

    Raises:
        ConfigurationError: the channel is nothing to listen at.
    """

    def __init__(self, name: str, channel: str | None, events: HubEvents) -> None:
        self._name = name
        self._events = events
        self._folder: str | None = None
        self._listener, address = self._local() if channel is None else _tcp(channel)
        self._dispose = weakref.finalize(self, _dispose, self._listener, self._folder)
        """Once, in `close`; or when nobody knows the hub any more, which was never started then."""
        self._dispose.atexit = False
        self._key = os.urandom(32)
        self.ticket: Ticket = (address, self._key, os.getpid())
        """How a worker process finds the way here: for its `Order`."""
        self._strangers: set[Link] = set()
        self._peers: dict[str, Peer] = {}
        """By `Peer.worker`. A peer is added before it is told the stops; `stop` adds one before it
        looks for peers."""
        self._stops: dict[str, str] = {}
        self._outbox: SimpleQueue[tuple[str, str, str] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        # guards the start and the end; a signal handler may close what is being started
        self._lock = threading.RLock()
        self._is_started = False
        self._is_closed = False
        _hubs.add(self)

    def _local(self) -> tuple[socket.socket, Any]:
        if not hasattr(socket, "AF_UNIX"):  # Windows
            return _tcp("127.0.0.1:0")
        listener = socket.socket(socket.AF_UNIX)
        try:
            if sys.platform == "linux":
                # a name without a file: nothing is left of it when this process is killed
                address = f"\0bgworker-{new_id(time.time_ns())}"
            else:
                self._folder = tempfile.mkdtemp(prefix="bgworker-")
                address = os.path.join(self._folder, "channel")
            listener.bind(address)
            listener.listen(MOST_STRANGERS)
        except OSError:  # the name of the folder may be too long
            listener.close()
            return _tcp("127.0.0.1:0")
        return listener, address

    def start(self) -> None:
        """Begin to accept connections, unless it was begun or closed.

        Raises:
            RuntimeError: no thread can be started.
        """
        with self._lock:
            if not self._is_started and not self._is_closed:
                self._start(f"{self._name}-stops", self._send_stops)
                try:
                    self._start(f"{self._name}-channel", self._accept)
                except BaseException:
                    self._outbox.put(None)  # the other one ends, and the next call begins anew
                    raise
                self._is_started = True

    def stop(self, task_id: str, reason: str) -> None:
        """Have a task asked to stop, in whatever worker process runs it or will. Never blocks,
        raises nothing; also from a signal handler."""
        self._stops[task_id] = reason
        self._outbox.put(("stop", task_id, reason))

    def forget(self, task_id: str) -> None:
        """Remember no request to stop a task that is over, for workers that connect later."""
        self._stops.pop(task_id, None)

    def is_mine(self, thread: threading.Thread) -> bool:
        """Tell whether it is a thread of the hub."""
        return thread in self._threads

    def workers(self) -> list[Peer]:
        """Return the worker processes that are connected now."""
        return list(self._peers.values())

    def close(self) -> None:
        """End all connections and threads, and wait for these up to `CLOSE_TIMEOUT` seconds. It may
        be called again, as after an interrupt."""
        with self._lock:
            self._is_closed = True
        self._outbox.put(None)
        self._end_accepting()
        until = monotonic() + CLOSE_TIMEOUT
        this = threading.current_thread()
        while monotonic() < until and (
            threads := [each for each in self._threads if each is not this and each.is_alive()]
        ):
            for link in [*self._strangers, *[peer.link for peer in self._peers.values()]]:
                link.cut()  # also of those that connected a moment ago
            for thread in threads:
                thread.join(0.1)
        self._dispose()

    def discard(self) -> None:
        """In a forked child, where no other thread is: close what was inherited, tell nobody. It
        is called in every child: an inherited end would keep the workers from seeing that the
        parent is gone."""
        self._is_closed = True
        self._lock = threading.RLock()
        self._threads = []
        self._dispose.detach()  # a folder is the parent's
        self._listener.close()
        for link in [*self._strangers, *[peer.link for peer in self._peers.values()]]:
            link.discard()

    # -- threads of its own --

    def _start(self, name: str, target: Any, *args: object) -> None:
        """Start a thread. Called by `start`, and then by the thread that accepts alone."""
        thread = own_thread(name, target, *args)
        self._threads = [*[each for each in self._threads if each.is_alive()], thread]
        thread.start()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connected, _ = self._listener.accept()
            except OSError as error:  # no descriptor is left, or it is closed
                if not self._is_closed:
                    report(logging.WARNING, "a worker process cannot connect: %s", describe(error))
                    time.sleep(1.0)
                continue
            try:
                self._meet(connected)
            except (OSError, RuntimeError, MemoryError):
                connected.close()  # it is gone already, or there is no room for a thread

    def _meet(self, connected: socket.socket) -> None:
        if self._is_closed or len(self._strangers) >= MOST_STRANGERS or not _is_ours(connected):
            connected.close()
            return
        link = Link(connected, PATIENCE)
        self._strangers.add(link)
        try:
            self._start(f"{self._name}-peer", self._serve, link)
        except BaseException:
            self._strangers.discard(link)
            link.close()
            raise

    def _end_accepting(self) -> None:
        """Wake the thread that accepts; of the two ways each system knows one at least."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        with socket.socket(self._listener.family) as caller:
            caller.settimeout(1.0)
            try:
                caller.connect(self._listener.getsockname())
            except OSError:
                pass

    def _send_stops(self) -> None:
        while (message := self._outbox.get()) is not None:
            surplus = len(self._stops) - MOST_STOPS
            if surplus > MOST_STOPS // 10:
                for task_id in list(self._stops)[:surplus]:
                    self._stops.pop(task_id, None)
            for peer in self.workers():
                try:
                    peer.link.send(message)
                except Exception as error:
                    if not isinstance(error, OSError):  # then it is gone: its own thread notices
                        report(logging.ERROR, "a task is not asked to stop: %s", describe(error))

    def _serve(self, link: Link) -> None:
        """Read one connection to its end."""
        peer: Peer | None = None
        try:
            link.prove(self._key, accepts=True)
            peer = self._welcome(link)
            for task_id, reason in list(self._stops.items()):
                link.send(("stop", task_id, reason))
            while True:
                self._hear(peer, link.receive())
        except Exception as error:
            if not self._is_closed and not isinstance(error, (OSError, EOFError)):
                who = str(peer) if peer is not None else "a peer that did not prove itself"
                report(logging.WARNING, "the connection of %s was ended: %s", who, describe(error))
        finally:
            link.close()
            self._strangers.discard(link)
            if peer is not None:
                self._take_leave(peer)

    def _welcome(self, link: Link) -> Peer:
        """Read how a peer introduces itself."""
        kind, worker, pid, host = link.receive()
        if (kind, type(worker), type(pid), type(host)) != ("hello", str, int, str):
            raise ValueError(f"expected an introduction, got {show(kind)}")
        link.trust(SEND_TIMEOUT)
        peer = Peer(link, worker, pid, host)
        while (earlier := self._peers.setdefault(worker, peer)) is not peer:
            # it connects again: first what it said before
            earlier.link.cut()
            earlier.ended.wait()
        self._strangers.discard(link)
        return peer

    def _hear(self, peer: Peer, message: tuple[Any, ...]) -> None:
        """Tell what a message holds, and acknowledge it.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            parts, losses, overdue = _checked(message)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"a message that cannot be read: {error}") from error
        try:
            for part in parts:
                self._events.said(peer, *part)
            if losses:
                self._events.losses(peer.worker, losses)
            if overdue:
                self._events.overdue(peer, *overdue)
        except Exception as error:  # it would come again for ever
            report(logging.ERROR, "what %s said was not noted: %s", str(peer), describe(error))
        if not overdue:
            peer.link.send(("ack", message[1]))

    def _take_leave(self, peer: Peer) -> None:
        try:
            self._events.gone(peer)
        except Exception as error:
            report(logging.ERROR, "the end of %s was not noted: %s", str(peer), describe(error))
        finally:
            self._peers.pop(peer.worker, None)
            peer.ended.set()


_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()


@in_child
def _discard_all() -> None:
    for hub in list(_hubs):
        hub.discard()
    _hubs.clear()


def _dispose(listener: socket.socket, folder: str | None) -> None:
    listener.close()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _checked(message: Any) -> tuple[list[Part], Losses, tuple[str, str, str] | None]:
    """Return what a message of a worker holds: what was said, what was lost, who is overdue.

    Raises:
        ValueError, TypeError: it holds something else.
    """
    if message[0] == "overdue":
        _, task_id, attempt, stack = message
        _expect_texts(task_id, attempt, stack)
        return [], {}, (task_id, attempt, stack)
    kind, number, parts, losses = message
    if kind != "said" or type(number) is not int:
        raise ValueError(f"expected a kind of message that is known, got {show(kind)}")
    for task_id, attempt, first, records in parts:
        _expect_texts(task_id, attempt)
        if type(first) is not int or type(records) is not list:
            raise TypeError("expected records and the number of the first")
        for record in records:
            if not _is_record(*record):
                raise TypeError(f"expected a record of a stream, got {show(record)}")
    for (record_kind, reason), total in losses.items():
        if type(record_kind) is not int or type(reason) is not str or type(total) is not int:
            raise TypeError("expected losses as totals by kind and reason")
    return parts, losses, None


def _is_record(kind: int, ns: int, data: Any) -> bool:
    if type(ns) is not int:
        return False
    if kind == STARTED:
        return data is None
    if kind == PROGRESS:
        return tuple(map(type, data)) in ((float, str), (type(None), str))
    if not PROGRESS < kind < LOST:
        return False
    if type(data) is list:
        return all([type(line) is str for line in data])
    return type(data) is str or tuple(map(type, data)) == (str, str, bool, int)


def _expect_texts(*values: object) -> None:
    for value in values:
        if type(value) is not str:
            raise TypeError(f"expected a text, got {show(value)}")


def _is_ours(connected: socket.socket) -> bool:
    """Tell whether a local connection comes from this user, where a local socket has no file whose
    permissions would see to that. Of TCP nobody knows; the key has to do."""
    if sys.platform != "linux" or connected.family != socket.AF_UNIX:
        return True
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[4:8], sys.byteorder) in (os.geteuid(), 0)


def _tcp(channel: str) -> tuple[socket.socket, Any]:
    """Return a socket that listens at "HOST:PORT", and the address for those that connect."""
    expected = (
        "expected channel to be 'HOST:PORT', such as 'localhost:0' (port 0: any that is free), "
        f"got {show(channel)}"
    )
    host, colon, digits = channel.rpartition(":") if isinstance(channel, str) else ("", "", "")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not digits.isdecimal() or int(digits) > 65535:
        raise ConfigurationError(
            f"{expected}; leave it out where the executor's workers are on this machine"
        )
    try:
        family = socket.getaddrinfo(host, int(digits), type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, int(digits)), family=family, backlog=MOST_STRANGERS)
    except OSError as error:
        raise ConfigurationError(
            f"{expected}, and nobody can listen there ({describe(error)}): name an address of this "
            "machine and a port that is free"
        ) from error
    is_any = host in ("0.0.0.0", "::")  # everybody reaches it under the name of this machine
    return listener, (socket.gethostname() if is_any else host, listener.getsockname()[1])

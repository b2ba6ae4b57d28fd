"""Servers that the tests of the stores start for themselves and may do anything to, and a network
to break between them and a sink."""

from __future__ import annotations

import glob
import importlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support import SOON, until

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A server process with a folder of its own, which a subclass fills and starts."""

    def __init__(self, user: str | None = None) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="bgworker-server-"))
        # as root this gives the folder to a user that a server accepts
        self.user = user if hasattr(os, "geteuid") and os.geteuid() == 0 else None
        if self.user is not None:
            shutil.chown(self.folder, self.user, self.user)
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        """Tell whether the server takes connections."""
        raise NotImplementedError

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.folder, user=self.user, group=self.user,
                extra_groups=None if self.user is None else [], start_new_session=True)
        until(self.is_ready)

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text(errors="replace")[-900:]
        return self.answers()

    def signal(self, number: int) -> None:
        """Send a signal to the server and all of its children, which may lead groups of their
        own."""
        assert self.process is not None
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)],
                                  stdout=subprocess.PIPE, text=True, timeout=SOON).stdout.split()
        for pid in [self.process.pid, *map(int, children)]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it has ended meanwhile

    def kill(self) -> None:
        """End it as a power failure would, for all that it knows."""
        if self.process is not None:
            if self.process.poll() is None:
                self.signal(signal.SIGKILL)
            self.process.wait(SOON)
            self.process = None

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def postgres_binaries() -> str | None:
    """Return the folder of the newest PostgreSQL that is installed."""
    found = shutil.which("initdb")
    folders = glob.glob("/usr/lib/postgresql/*/bin")
    return os.path.dirname(found) if found else max(
        folders, key=lambda path: float(path.split("/")[-2]), default=None)


class Postgres(Server):
    """A cluster of its own; its superuser "me" needs no password."""

    def __init__(self) -> None:
        binaries = postgres_binaries()
        if binaries is None:
            pytest.skip("needs PostgreSQL (Debian: apt install postgresql)")
        super().__init__("postgres")
        self._binaries = binaries
        self._data = self.folder / "data"
        made = subprocess.run(
            [f"{binaries}/initdb", "-D", self._data, "-U", "me", "-A", "trust", "-E", "UTF8",
             "--locale=C", "--no-sync"], cwd=self.folder, user=self.user, group=self.user,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        assert made.returncode == 0, made.stdout

    def command(self) -> Sequence[str]:
        return [f"{self._binaries}/postgres", "-D", str(self._data), "-p", str(self.port),
                "-c", f"listen_addresses={LOOPBACK}", "-c", "unix_socket_directories="]

    def answers(self) -> bool:
        import psycopg

        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def connect(self, *, port: int | None = None, user: str = "me", driver: str = "psycopg",
                **more: Any) -> Any:
        """Return a connection of a driver."""
        return importlib.import_module(driver).connect(
            host=LOOPBACK, port=port or self.port, user=user, dbname="postgres", connect_timeout=5,
            **more)

    def ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Execute a statement as the superuser, commit, and return its rows if it has some."""
        with self.connect(autocommit=True) as connection:
            cursor = connection.execute(sql, values or None)
            return cursor.fetchall() if cursor.description else []


class Proxy:
    """A network between a client and a server: passes bytes on, late, or cuts the connection.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self.delay: Callable[[], float] = lambda: 0.0
        """Returns the seconds that the next bytes of a client take."""
        self.budget: Callable[[], float] = lambda: float("inf")
        """Returns after how many bytes of the client a new connection is cut."""
        self.swallow: bytes | None = None
        """The server gets what holds this, and its answer is never heard of."""
        self.refuses = False
        """Connections are reset at once."""
        self.cuts = 0
        self._is_open = True
        self._threads: list[threading.Thread] = []
        self._sockets: set[socket.socket] = set()
        self._start(self._accept)

    def _start(self, run: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while self._is_open:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                if self.refuses:
                    raise ConnectionRefusedError
                server = socket.create_connection((LOOPBACK, self._target))
            except OSError:
                self._cut(client)
                continue
            self._sockets |= {client, server}
            self._start(self._pass_on, client, server, self.budget())
            self._start(self._pass_back, server, client)

    def _pass_on(self, client: socket.socket, server: socket.socket, budget: float) -> None:
        try:
            while data := client.recv(65536):
                time.sleep(self.delay())
                if self.swallow is not None and self.swallow in data:
                    self.swallow = None
                    self._forget_answer(data, client, server)
                    return
                budget -= len(data)
                server.sendall(data[:len(data) + int(budget)] if budget < 0 else data)
                if budget < 0:
                    self._cut(client, server)
                    return
            server.shutdown(socket.SHUT_WR)
        except OSError:
            self._cut(client, server, is_counted=False)

    def _forget_answer(self, data: bytes, client: socket.socket, server: socket.socket) -> None:
        """Cut the client off, and have the server do what it was told all the same."""
        self._cut(client)
        server.sendall(data)
        time.sleep(0.2)
        self._cut(server, is_counted=False)

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        try:
            while data := server.recv(65536):
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            self._cut(client, server, is_counted=False)

    def _cut(self, *sockets: socket.socket, is_counted: bool = True) -> None:
        """Reset connections: the other side gets an error, and no end."""
        self.cuts += is_counted
        for each in sockets:
            try:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RD)
            except OSError:
                pass  # the other side was faster
            each.close()

    def close_connections(self) -> None:
        """Reset those that are open."""
        while self._sockets:
            self._cut(self._sockets.pop(), is_counted=False)

    def close(self) -> None:
        self._is_open = False
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.close_connections()
        for thread in self._threads:
            thread.join(SOON)
            assert not thread.is_alive()


def random_budget(seed: int, most: int) -> Callable[[], float]:
    """Return a function that draws after how many bytes a connection is cut."""
    draw = random.Random(seed)
    return lambda: draw.randrange(most)


class Mongo(Server):
    """A server from the package index that speaks MongoDB's protocol over TCP."""

    package: str

    def answers(self) -> bool:
        import pymongo

        with pymongo.MongoClient(LOOPBACK, self.port, serverSelectionTimeoutMS=200) as client:
            try:
                client.admin.command("ping")
            except pymongo.errors.ConnectionFailure:
                return False
        return True

    def client(self, port: int | None = None, **more: Any) -> Any:
        """Return a client of pymongo."""
        import pymongo

        return pymongo.MongoClient(LOOPBACK, port or self.port, directConnection=True, **{
            "serverSelectionTimeoutMS": 300, "retryWrites": False, **more})


class SecantusDb(Mongo):
    package = "secantus"

    def command(self) -> Sequence[str]:
        return [sys.executable, "-m", "secantus", "--port", str(self.port), "--storage-path",
                str(self.folder / "data"), "--enable-test-commands",
                # else a kill costs it what it has not written yet, acknowledged or not
                "--sync-on-commit"]


class Nx27017(Mongo):
    package = "nx_27017"

    def command(self) -> Sequence[str]:
        files = ("--data-dir", "data", "--log-file", "its.log", "--pid-file", "pid")
        (self.folder / "data").mkdir(exist_ok=True)
        return [sys.executable, "-m", "nx_27017.nx_27017", "-p", str(self.port), *files]

"""The site besieged while somebody writes to its history: the writer never waits, the server stays
small, and answers."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tests.histories import Recorder
from tests.support import SOON, environment

from bgworker.history import schema
from bgworker.model.ids import new_id

TASKS, LINES = 5_000, 20
SECONDS = 8.0
PAGES = ("/", "/?status=failed", "/?name=*no+such*", "/?text=no+such+text", "/?since=1d&text=line",
         "/failures", "/timeline", "/runs", "/task/last", "/task/last?stream=error",
         "/report/../../etc/passwd", "/?before=%00", "/task/%2e%2e")

pytestmark = pytest.mark.slow


@contextmanager
def serving(path: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    with subprocess.Popen([sys.executable, "-W", "error", "-m", "bgworker", "serve", "--db", path],
                          env=environment(), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            address, _, token = process.stdout.readline().strip().partition("/?token=")
            yield process, int(address.rpartition(":")[2]), token
        finally:
            process.kill()


def fill(record: Recorder) -> None:
    record.connection.execute("BEGIN")
    for number in range(TASKS):
        record.task(f"job {number % 50}", "completed" if number % 10 else "failed",
                    created=record.ago(seconds=10 * number), failure_message=f"no {number}")
    record.connection.executemany(
        "INSERT INTO zz_stream_rows (task, seq, stream, created_us, payload) VALUES (?, ?, 0, "
        "0, ?)",
        (
            (key, seq, f"line {seq} " + "x" * 50)
            for key in range(1, TASKS + 1)
            for seq in range(4, 4 + LINES)
        ),
    )
    record.connection.execute("COMMIT")


def resident_mib(process: subprocess.Popen[str]) -> float:
    fields = dict(line.split(":", 1) for line in
                  Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


class Writer(threading.Thread):
    """Writes as a sink does, but waits for nobody: any lock that is held is an error at once."""

    def __init__(self, path: str, task_id: str) -> None:
        super().__init__(daemon=True)
        self._path, self._task_id = path, task_id
        self.enough = threading.Event()
        self.rows, self.largest_log = 0, 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with closing(schema.connect_to_write(self._path)) as connection:
                connection.execute("PRAGMA busy_timeout = 0")
                (key,) = connection.execute("SELECT key FROM tasks WHERE id = ?",
                                            (self._task_id,)).fetchone()
                for start in itertools.count(100, 500):
                    if self.enough.is_set():
                        break
                    with schema.transaction(connection):
                        connection.executemany(
                            "INSERT INTO zz_stream_rows (task, seq, stream, created_us, payload) "
                            "VALUES (?, ?, 0, 0, ?)",
                            [(key, seq, "y" * 60) for seq in range(start, start + 500)])
                        connection.execute("UPDATE tasks SET last_seq = ? WHERE key = ?",
                                           (start + 500, key))
                    self.rows += 500
                    self.largest_log = max(self.largest_log, os.path.getsize(self._path + "-wal"))
                    time.sleep(0.01)
        except Exception as error:
            self.error = error


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_siege_keeps_no_writer_waiting_and_leaves_the_server_small(tmp_path: Path) -> None:
    path = str(tmp_path / "history.db")
    record = Recorder(path)
    fill(record)
    going, busy = [record.task(name, "running", id=new_id(time.time_ns()))
                   for name in ("followed", "busy")]
    record.close()
    writer = Writer(path, busy)
    answers: list[int] = []
    over = threading.Event()

    with serving(path) as (process, port, token):
        cookie = f"bgworker-{port}={token}"

        def ask(page: str) -> int:
            request = urllib.request.Request(f"http://127.0.0.1:{port}{page}",
                                             headers={"Cookie": cookie})
            try:
                with urllib.request.urlopen(request, timeout=SOON) as answer:
                    answer.read()
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code
            except OSError:
                return 0  # hung up on: there was no place

        def hammer(number: int) -> None:
            for page in itertools.islice(itertools.cycle(PAGES), number, None):
                if over.is_set():
                    return
                answers.append(ask(page))

        for page in PAGES:
            ask(page)
        before = resident_mib(process)
        crowd = [socket.create_connection(("127.0.0.1", port), timeout=SOON) for _ in range(100)]
        for number, connection in enumerate(crowd):
            kind = (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
                    f"GET /task/{going}/live HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                    f"Cookie: {cookie}\r\n\r\n".encode())[number % 4]
            try:
                connection.sendall(kind)
            except OSError:
                continue  # hung up on already
        hammers = [threading.Thread(target=hammer, args=(number,)) for number in range(6)]
        for thread in [writer, *hammers]:
            thread.start()
        deadline, grown = time.monotonic() + SECONDS, 0.0
        while time.monotonic() < deadline:
            grown = max(grown, resident_mib(process) - before)
            time.sleep(0.1)
        over.set()
        writer.enough.set()
        for thread in [writer, *hammers]:
            thread.join(SOON)
            assert not thread.is_alive()
        for connection in crowd:
            connection.close()
        assert ask("/") == 200
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SOON) == ("", "") and process.returncode == 130

    print(
        f"{len(answers)} answers, {writer.rows} rows written, log {writer.largest_log / 2**20:.1f} "
        f"MiB, server {before:.0f} MiB and {grown:.1f} more"
    )
    assert writer.error is None and writer.rows > 0
    assert answers.count(200) > len(PAGES)
    assert {0, 200, 400, 404, 503} >= set(answers)
    assert grown < 80
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_writer_that_would_have_to_wait_says_so(tmp_path: Path) -> None:
    path = str(tmp_path / "history.db")
    record = Recorder(path)
    task = record.task("talks", "running")
    writer = Writer(path, task)
    record.connection.execute("BEGIN IMMEDIATE")
    writer.start()
    writer.join(SOON)
    record.close()
    assert writer.error is not None and "locked" in str(writer.error)

"""The SQLite history when things break: killed processes, many writers at once, full disks.

Each fault has a twin: the same harness over a sink that lacks the very part under test must
complain. `tools/stress.py` runs the kills and the crowd for longer.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bgworker import RetryPolicy, Scheduler, SinkHealth, SinkOptions, current_task
from bgworker.sinks import lockfile as files
from bgworker.model.errors import TemporarySinkError
from bgworker.model.events import Event, EventType, TaskStatus
from bgworker.history.reader import History
from bgworker.history.sink import SqliteSink
from tests.support import exit_code, forked, needs_fork

SOON = 60.0
FIRST = 4
"""Number of the first thing that a task says: before it come created, scheduled and started."""
def read_only(path: str) -> closing[sqlite3.Connection]:
    """Open a file as any other program would; the log stays as it is, so that the next process has
    to recover it."""
    return closing(sqlite3.connect(f"{Path(path).as_uri()}?mode=ro", uri=True, timeout=SOON))


# -- kill -9, at random moments and in the midst of a batch, a checkpoint, a prune --

KEPT = 100
"""Tasks that a round which prunes keeps: more than two rounds make."""
MOST_TASKS = 40
"""Tasks that a round makes."""
PATIENCE = 3.0
"""Seconds after which a round that does not come to its point is killed."""


class Point(NamedTuple):
    """Where a process dies. Neither a statement nor an acknowledgement: at a random moment, or in a
    checkpoint."""

    statement: str = ""
    """It dies as SQLite begins a statement that begins so, the ``nth`` one."""
    prunes: bool = False
    acknowledges: bool = False
    """It dies right after an acknowledgement, the ``nth`` one."""
    checkpoints: bool = False


POINTS = {
    "at random": Point(),
    "acknowledged": Point(acknowledges=True),
    "mid-batch, tasks": Point("INSERT INTO tasks"),
    "mid-batch, streams": Point("INSERT OR IGNORE INTO zz_stream_rows"),
    "mid-batch, commit": Point("COMMIT"),
    "mid-checkpoint": Point(checkpoints=True),
    "mid-prune, streams": Point("DELETE FROM zz_stream_rows", prunes=True),
    "mid-prune, tasks": Point("DELETE FROM tasks", prunes=True),
    "mid-prune, runs": Point("DELETE FROM runs", prunes=True),
    "mid-prune, shrinking": Point("PRAGMA incremental_vacuum", prunes=True),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class MortalSink(SqliteSink):
    """Has its process killed at a statement."""

    def __init__(self, path: str, point: Point, nth: int) -> None:
        super().__init__(path, max_tasks=KEPT if point.prunes else None)
        self._point = point
        self._left = nth

    def _connect(self) -> sqlite3.Connection:
        connection = super()._connect()
        if self._point.checkpoints:
            connection.execute("PRAGMA wal_autocheckpoint = 300")
        if self._point.statement:
            connection.set_trace_callback(self._see)
        return connection

    def _see(self, statement: str) -> None:
        if statement.startswith(self._point.statement):
            self._left -= 1
            if not self._left:
                die()


class HastySink(MortalSink):
    """The twin that acknowledges a batch before it is committed: with the one after it."""

    _held: Sequence[Event] = ()

    def write(self, events: Sequence[Event]) -> None:
        held, self._held = self._held, events
        if held:
            super().write(held)


def said(number: int) -> str:
    return f"{number} " + "x" * 150


def talk_until_killed(sink: SqliteSink, acknowledged: int, deaths: int) -> None:
    """Run tasks that talk; tell after each flush what each of them had said by then, and which had
    ended."""
    counts: Counter[str] = Counter()

    def talk(many: int) -> None:
        context = current_task()
        for number in range(counts[context.id], counts[context.id] + many):
            context.output(said(number))
        counts[context.id] += many

    def talk_on(orders: Any) -> None:
        while orders.get() is None:
            talk(60)
            done.put(None)

    from queue import SimpleQueue
    orders: Any = SimpleQueue()
    done: Any = SimpleQueue()
    pool = Scheduler(3, sinks=[sink], keep_seconds=0)
    talker = pool.submit(talk_on, orders)
    ended: list[str] = []
    for turn in itertools.count(1):
        orders.put(None)
        if len(ended) < MOST_TASKS - 1:
            short = [pool.submit(talk, 250) for _ in range(3)]
            for task in short:
                task.result(SOON)
            ended += [task.id for task in short]
        done.get(timeout=SOON)
        if not pool.flush(SOON):
            os._exit(2)
        words = [f"{task_id} {counts[task_id] + FIRST - 1} {task_id != talker.id:d}\n"
                 for task_id in [talker.id, *ended[-3:]]]
        os.write(acknowledged, "".join(words).encode())
        if turn == deaths:
            die()


class Acknowledged(NamedTuple):
    last_seq: int
    is_over: bool


class Kills:
    """Rounds of a process that is killed, on one file; what must be true of the file after each.

    Args:
        make: returns the sink of a round.
        chance: decides moments and numbers.
    """

    def __init__(
        self, path: str, make: Callable[[str, Point, int], SqliteSink], chance: random.Random
    ) -> None:
        self._path = path
        self._make = make
        self._chance = chance
        self._earlier: dict[str, Acknowledged] = {}  # without what may have been pruned
        self._latest: list[dict[str, Acknowledged]] = [{}, {}]
        self.reached: Counter[str] = Counter()
        self.acknowledged = 0

    def round(self, name: str) -> None:
        """Run a process, kill it, look at what it left."""
        point = POINTS[name]
        nth = self._chance.randint(1, 4)
        out, into = os.pipe()
        pid = forked(
            lambda: talk_until_killed(
                self._make(self._path, point, nth), into, nth * point.acknowledges
            )
        )
        os.close(into)
        moment = PATIENCE if name != "at random" else self._chance.uniform(0, 0.2)
        text, is_there = self._watch(pid, out, moment, point.checkpoints)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == -signal.SIGKILL, f"{name}: the process ended by itself, with {status}"
        self.reached[name] += name == "at random" or is_there and (
            not point.checkpoints or self._is_checkpoint_unfinished())
        self._note(text, point.prunes)
        self.check()

    def _watch(
        self, pid: int, out: int, seconds: float, until_checkpoint: bool
    ) -> tuple[str, bool]:
        """Read what the process acknowledges; kill it after so many seconds, or as soon as a
        checkpoint writes.

        Returns:
            What it acknowledged, and whether its time did not run out.
        """
        parts: list[bytes] = []
        is_killed, is_late = False, False
        deadline = time.monotonic() + seconds
        before = self._written()
        with open(out, "rb", buffering=0) as pipe:
            while True:
                wait = 0.0 if until_checkpoint and parts else max(0.0, deadline - time.monotonic())
                if select.select([pipe], [], [], None if is_killed else wait)[0]:
                    part = pipe.read(65536)
                    if not part:
                        return b"".join(parts).decode(), not is_late
                    parts.append(part)
                    # what opened the file may have written, too
                    before = before if len(parts) > 1 else self._written()
                elif (
                    (is_late := time.monotonic() >= deadline)
                    or self._written() != before
                    and until_checkpoint
                ):
                    os.kill(pid, signal.SIGKILL)
                    is_killed = True

    def _written(self) -> int:
        """Return when the file was last written to: with a write-ahead log, only checkpoints do
        that."""
        try:
            return os.stat(self._path).st_mtime_ns
        except FileNotFoundError:
            return 0

    def _is_checkpoint_unfinished(self) -> bool:
        """Tell from the index of the log whether a checkpoint was begun that did not end.

        Source: https://sqlite.org/walformat.html, nBackfill at byte 96, nBackfillAttempted at byte
            128.
        """
        index = Path(f"{self._path}-shm").read_bytes()
        return index[96:100] != index[128:132]

    def _note(self, text: str, prunes: bool) -> None:
        latest: dict[str, Acknowledged] = {}
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                task_id, last_seq, is_over = line.split()
                latest[task_id] = Acknowledged(int(last_seq), is_over == "1")
        self.acknowledged += len(latest)
        self._earlier.update(self._latest.pop(0))
        self._latest.append(latest)
        if prunes:
            self._earlier.clear()

    def check(self) -> None:
        """Look at the file as another program and as a `History`."""
        if not os.path.exists(self._path):
            return
        with read_only(self._path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                assert not self.acknowledged
                return  # killed before it was made
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            twice = connection.execute("SELECT task_id, seq FROM task_streams GROUP BY 1, 2 "
                                       "HAVING count(*) > 1").fetchall()
            assert not twice, f"doubled: {twice}"
            gaps = connection.execute("SELECT task_id FROM task_streams GROUP BY 1 "
                                      "HAVING max(seq) - min(seq) + 1 > count(*)")
            assert gaps.fetchall() == [], "rows are missing in the midst of a task"
            tasks = dict(connection.execute("SELECT id, status FROM tasks").fetchall())
            ends = {
                task_id: (low, high)
                for task_id, low, high in connection.execute(
                    "SELECT task_id, min(seq), max(seq) FROM task_streams GROUP BY 1"
                )
            }
            rows = {
                task_id: connection.execute(
                    "SELECT seq, payload FROM task_streams WHERE task_id = ? ORDER BY seq",
                    (task_id,),
                ).fetchall()
                for task_id in self._latest[-1]
            }
        for task_id, (last_seq, is_over) in {
            **self._earlier,
            **self._latest[0],
            **self._latest[1],
        }.items():
            assert task_id in tasks, f"an acknowledged task is missing: {task_id}"
            low, high = ends.get(task_id, (FIRST, 0))
            assert low == FIRST and high >= last_seq, (
                f"an acknowledged row is missing: {task_id} has {low} to {high} of {last_seq}")
            assert (
                not is_over or tasks[task_id] == "completed"
            ), f"an acknowledged end is missing: {task_id}"
        for task_id, found in rows.items():
            wanted = [(FIRST + number, said(number)) for number in range(len(found))]
            assert found == wanted, "a row is not what was said"
        self._compare(tasks, rows)

    def _compare(self, tasks: dict[str, str], rows: dict[str, list[tuple[int, str]]]) -> None:
        with History(self._path) as history:
            seen = {task.task_id: task.status for task in history.tasks(limit=None)}
            final = {"completed", "failed", "cancelled", "timed_out"}
            assert seen == {
                task_id: TaskStatus(status) if status in final else TaskStatus.INTERRUPTED
                for task_id, status in tasks.items()
            }, "the reader does not agree about the tasks"
            for task_id, found in rows.items():
                assert [(event.seq, event.payload) for event in history.streams(task_id)] == found
            assert not any(run.is_alive for run in history.runs())


def run_many(path: str) -> None:
    with Scheduler(2, sinks=[SqliteSink(path)]) as pool:
        for _ in range(KEPT):
            pool.submit(int)


def run_kills(path: str, rounds: int, seed: int) -> Counter[str]:
    """Run so many rounds on one file, the points taking turns; return how often each was
    reached."""
    kills = Kills(path, MortalSink, random.Random(seed))
    for number, name in enumerate(itertools.islice(itertools.cycle(POINTS), rounds)):
        if number == len(POINTS) // 2:  # from here on there is something to prune
            assert exit_code(forked(lambda: run_many(path))) == 0
        kills.round(name)
    assert kills.acknowledged > rounds, kills.acknowledged
    assert all(
        kills.reached[name] for name in POINTS
    ), f"never reached: {POINTS.keys() - (+kills.reached).keys()}"
    return kills.reached


@needs_fork
@pytest.mark.slow
def test_wherever_the_process_is_killed_the_file_is_sound_and_holds_all_that_was_acknowledged(
    tmp_path: Path,
) -> None:
    seed = random.SystemRandom().randrange(2 ** 32)
    print("seed", seed)
    run_kills(str(tmp_path / "history.db"), 50, seed)


@needs_fork
def test_a_few_kills_leave_the_file_sound_with_all_that_was_acknowledged(tmp_path: Path) -> None:
    kills = Kills(str(tmp_path / "history.db"), MortalSink, random.Random(1))
    for name in ("acknowledged", "mid-batch, streams", "mid-batch, commit", "mid-checkpoint"):
        kills.round(name)


@needs_fork
@pytest.mark.parametrize("name", ["acknowledged", "mid-batch, commit"])
def test_the_kill_harness_notices_a_sink_that_acknowledges_before_the_commit(
    tmp_path: Path, name: str
) -> None:
    kills = Kills(str(tmp_path / "history.db"), HastySink, random.Random(1))
    with pytest.raises(AssertionError, match="an acknowledged (row|task|end) is missing"):
        for _ in range(20):
            kills.round(name)


# -- several processes --

class ImpatientSink(SqliteSink):
    """The twin that does not wait for SQLite's lock, and in its test not for ours either."""

    def _connect(self) -> sqlite3.Connection:
        connection = super()._connect()
        connection.execute("PRAGMA busy_timeout = 0")
        return connection


class Log(logging.Handler):
    """Keeps what bgworker has to say."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        logging.getLogger("bgworker").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def close(self) -> None:
        logging.getLogger("bgworker").removeHandler(self)
        super().close()


def write_in_a_crowd(sink: SqliteSink, seconds: float, gate: int, told: int) -> None:
    """Run tasks that talk for so many seconds; tell how much each said, and whether anything went
    wrong."""
    counts: dict[str, int] = {}

    def talk(many: int) -> None:
        context = current_task()
        for number in range(many):
            context.output(said(number))
        counts[context.id] = many

    log = Log()
    with Scheduler(2, keep_seconds=0) as pool:
        pool.register_sink(sink, name="history")
        os.read(gate, 1)
        until = time.monotonic() + seconds
        chance = random.Random(os.getpid())
        for turn in itertools.count(1):
            for task in [pool.submit(talk, chance.randint(0, 150)) for _ in range(4)]:
                task.result(SOON)
            if time.monotonic() > until:
                break
            if turn % 10 == 0:
                # more than this the queue may not hold while the others have their turn
                assert pool.flush(SOON)
    health = pool.sinks["history"]
    report = {
        "log": log.messages,
        "last_error": health.last_error,
        "counts": counts,
        "emitted": health.emitted,
        "delivered": health.delivered,
        "run": pool.run_id,
    }
    with open(told, "w") as pipe:
        json.dump(report, pipe)


def run_crowd(path: str, make: Callable[[str], SqliteSink], seconds: float) -> int:
    """Let four processes write to one file while a reader follows; return how many rows they
    wrote."""
    first = make(path)
    first.open()
    first.close()
    gate, opener = os.pipe()
    pipes = [os.pipe() for _ in range(4)]

    def run(told: int) -> None:
        os.close(opener)
        write_in_a_crowd(make(path), seconds, gate, told)

    crowd = [forked(lambda: run(into)) for _, into in pipes]
    for fd in (gate, opener, *[into for _, into in pipes]):
        os.close(fd)
    texts = {out: b"" for out, _ in pipes}
    looks = 0
    with History(path) as history:
        while waiting := [out for out in texts if not texts[out].endswith(b"}")]:
            for out in select.select(waiting, [], [], 0.01)[0]:
                part = os.read(out, 1 << 20)
                assert part, "a process died"
                texts[out] += part
            for task in history.tasks(limit=3):  # raises HistoryError if it is locked out
                events = history.streams(task.task_id)
                assert [event.seq for event in events] == list(range(FIRST, FIRST + len(events)))
                looks += 1
            history.counts()
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in crowd] == [0] * 4
    for out in texts:
        os.close(out)
    reports = [json.loads(text) for text in texts.values()]
    assert looks, "the reader saw nothing"
    check_crowd(path, reports)
    return sum(sum(report["counts"].values()) for report in reports)


def check_crowd(path: str, reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["log"] == [] and report["last_error"] is None, (
            report["log"],
            report["last_error"],
        )
        said_all = sum(report["counts"].values())
        assert (
            report["emitted"] == report["delivered"] == said_all + 4 * len(report["counts"])
        ), report
    with read_only(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = connection.execute(
            "SELECT t.id, t.status, t.run_id, count(s.seq), max(s.seq) FROM tasks t "
            "LEFT JOIN task_streams s ON s.task_id = t.id GROUP BY t.id"
        ).fetchall()
        assert connection.execute("SELECT count(*) FROM losses").fetchone() == (0,)
    wanted = [(task_id, "completed", report["run"], many, FIRST + many - 1 if many else None)
              for report in reports for task_id, many in report["counts"].items()]
    assert sorted(found) == sorted(wanted), "rows are missing"


@needs_fork
@pytest.mark.parametrize("seconds", [1.0, pytest.param(6.0, marks=pytest.mark.slow)])
def test_four_processes_write_one_history_while_a_reader_follows_and_nobody_is_locked_out(
    tmp_path: Path, seconds: float
) -> None:
    assert run_crowd(str(tmp_path / "history.db"), SqliteSink, seconds) > 100 * seconds


@needs_fork
def test_the_crowd_harness_notices_who_does_not_wait_for_the_others(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = files.LockFile._wait_for
    monkeypatch.setattr(files.LockFile, "_wait_for",
                        lambda self, offset: wait(self, offset) if offset else None)
    with pytest.raises(AssertionError, match="database is locked"):
        for attempt in range(20):  # chance decides, though the first nearly always does
            run_crowd(str(tmp_path / f"{attempt}.db"), ImpatientSink, 1.0)


# -- a full disk --

class BoundedSink(SqliteSink):
    """Has room for so many pages."""

    most_pages = 60

    def write(self, events: Sequence[Event]) -> None:
        with self._database as connection:
            connection.execute(f"PRAGMA max_page_count = {self.most_pages}")
        super().write(events)


class ForgetfulSink(BoundedSink):
    """The twin that takes the first batch for stored which the disk did not take."""

    has_forgotten = False

    def write(self, events: Sequence[Event]) -> None:
        try:
            super().write(events)
        except TemporarySinkError:
            if self.has_forgotten:
                raise
            self.has_forgotten = True


def fill_and_go_on(sink: SqliteSink, make_room: Callable[[], object]) -> Counter[str]:
    """Fill the disk, go on for a while, make room; return what was lost, by type. Nothing else may
    be missing."""
    talked: dict[str, int] = {}

    def talk(many: int) -> None:
        context = current_task()
        for number in range(many):
            context.output(said(number))
        talked[context.id] = many

    retry = RetryPolicy(attempts=3, base=0.01, cap=0.05)
    with Scheduler(2, keep_seconds=0) as pool:
        pool.register_sink(
            sink, name="history", options=SinkOptions(queue_size=2000, batch_size=500, retry=retry)
        )

        def health() -> SinkHealth:
            return pool.sinks["history"]

        deadline = time.monotonic() + SOON
        while health().state != "open" or health().dropped_by_reason.keys() != {
            "overflow",
            "failed",
        }:
            assert time.monotonic() < deadline, f"the disk does not fill up: {health()}"
            pool.submit(talk, 100).result(SOON)  # tasks complete, whatever becomes of the sink
        assert "disk is full; make room" in str(health().last_error), health()
        assert health().retries
        for _ in range(30):
            pool.submit(talk, 100).result(SOON)
        assert not pool.flush(0.05)
        before = health()
        assert before.state == "open" and before.pending
        make_room()
        pool.flush(SOON)
        after = health()
        assert (after.state, after.pending, after.dropped) == ("ok", 0, before.dropped), (
            before,
            after,
        )
        assert after.delivered == before.delivered + before.pending
        last = pool.submit(talk, 5)
        last.result(SOON)
    return check_what_was_lost(sink.path, talked, pool.sinks["history"], last.id)


def check_what_was_lost(
    path: str, talked: dict[str, int], health: SinkHealth, last: str
) -> Counter[str]:
    """Compare the rows, the losses in the file, and the account."""
    lost: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with History(path) as history:
        for loss in history.losses():
            assert loss.sink == "history"
            lost.update(loss.by_type)
            reasons[loss.reason] += loss.count
        assert [event.payload for event in history.streams(last)] == [
            said(number) for number in range(5)
        ]
        assert history.task(last).status == "completed"
    assert (
        reasons == health.dropped_by_reason
    ), "the losses in the file are not those of the account"
    assert health.emitted == health.delivered + health.dropped and lost.total() == health.dropped
    with read_only(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        (stored,) = connection.execute("SELECT count(*) FROM task_streams").fetchone()
    wanted = sum(talked.values()) - lost[EventType.TASK_OUTPUT]
    assert stored == wanted, "rows are missing that were not counted as lost"
    return lost


def test_when_the_file_may_not_grow_tasks_go_on_and_what_is_lost_is_counted(tmp_path: Path) -> None:
    sink = BoundedSink(tmp_path / "history.db")
    assert (
        fill_and_go_on(sink, lambda: setattr(sink, "most_pages", 1_000_000))[EventType.TASK_OUTPUT]
        > 1000
    )


def test_the_full_disk_harness_notices_a_sink_that_takes_for_stored_what_was_not(
    tmp_path: Path,
) -> None:
    sink = ForgetfulSink(tmp_path / "history.db")
    with pytest.raises(
        AssertionError, match="rows are missing that were not counted as lost|losses in the file"
    ):
        fill_and_go_on(sink, lambda: setattr(sink, "most_pages", 1_000_000))


def mounted(directory: Path) -> bool:
    """Put a file system of 4 MiB there, if this machine lets us."""
    if not shutil.which("mount"):
        return False
    directory.mkdir()
    return (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)],
            capture_output=True,
            timeout=SOON,
        ).returncode
        == 0
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
def test_when_the_disk_is_full_tasks_go_on_and_what_is_lost_is_counted(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    if not mounted(disk):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(3 << 20))
        assert (
            fill_and_go_on(SqliteSink(disk / "history.db"), ballast.unlink)[EventType.TASK_OUTPUT]
            > 1000
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=SOON)

"""Kills, cuts and orphans at random: what the tests do a few times, and `tools/stress.py` often.

No test is in here.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bgworker import PendingFull, StreamEvent, Task, TaskStatus, TaskTimedOut
from tests.remote import functions
from tests.remote.engines import Engine, channels, descendants, open_sockets
from tests.support import SOON, RecordingSink, balanced, environment, until

SETTLED = 1.0
"""Seconds after which what a body has said must have been acknowledged, if anybody was there."""


def run_kills(times: int, name: str, seed: int) -> str:
    """Kill a random worker in the middle of its work, as often as that; return what was seen.

    A task whose worker is killed fails, the others of its executor too, and each ends once. What
    it had said for a while is in the record, without a gap; the account is exact.
    """
    chance = random.Random(seed)
    failed = completed = lines = 0
    for _ in range(times):
        engine = Engine(name)
        recorder = RecordingSink()
        try:
            with tempfile.TemporaryDirectory() as folder, \
                    engine.scheduler(sinks=[recorder], keep_finished=None) as pool:
                notes = [Path(folder, f"notes-{n}") for n in range(6)]
                tasks = [pool.submit(functions.recite_and_note, str(each), 80, 0.01)
                         for each in notes]
                until(lambda: notes[0].exists())
                time.sleep(chance.uniform(0.0, 1.5))
                killed = time.time()
                os.kill(chance.choice(engine.pids()), signal.SIGKILL)
                for task in tasks:
                    assert task.wait(SOON), f"{task} never ends"
                assert pool.flush(SOON)
            for task, note in zip(tasks, notes):
                lines += check_record(recorder, task.id, note, killed)
                failed += task.status is TaskStatus.FAILED
                completed += task.status is TaskStatus.COMPLETED
            assert balanced(pool.sinks["recording"])
            assert pool.sinks["recording"].delivered == len(recorder.events)
        finally:
            engine.close()  # which fails when a process is left
    assert channels() == []
    return f"{times} kills: {failed} tasks failed, {completed} completed, {lines} lines"


def check_record(recorder: RecordingSink, task_id: str, note: Path, killed: float) -> int:
    """Check that a task ended once, and that its lines have no gap and reach to where they must;
    return how many they are."""
    events = [each for each in recorder.events if getattr(each, "task_id", None) == task_id]
    assert [each.seq for each in events] == list(range(1, len(events) + 1))
    ends = [each for each in events if each.type.value in (
        "TaskCompleted", "TaskFailed", "TaskCancelled", "TaskTimedOut")]
    assert ends == events[-1:], "it ends once, and that is the last"
    said = [int(each.payload) for each in events if isinstance(each, StreamEvent)]
    assert said == list(range(len(said))), "what was said has no gap"
    noted = [line.split() for line in note.read_text().splitlines()] if note.exists() else []
    settled = [number for number, when in noted if float(when) < killed - SETTLED]
    assert len(said) >= len(settled), f"{len(settled)} lines were acknowledged, got {len(said)}"
    return len(said)


def run_cuts(times: int, name: str, seed: int) -> str:
    """Cut the connections of the channel in the middle of work, as often as that; nothing is
    lost."""
    chance = random.Random(seed)
    engine = Engine(name)
    recorder = RecordingSink()
    cut = 0
    try:
        with engine.scheduler(sinks=[recorder], keep_finished=None) as pool:
            tasks = []
            while cut < times:
                tasks += [pool.submit(functions.recite, 100, 20, 0.002) for _ in range(2)]
                time.sleep(chance.uniform(0.02, 0.3))
                cut += cut_connections()
            for task in tasks:
                assert task.result(SOON) == 100
            assert pool.flush(SOON)
        for task in tasks:
            assert recorder.said(task) == [
                ("output", f"{number} {'x' * 20}") for number in range(100)]
            assert recorder.types(task).count("TaskCompleted") == 1
        health = pool.sinks["recording"]
        assert balanced(health) and health.delivered == len(tasks) * 104 == len(recorder.events)
    finally:
        engine.close()
    assert channels() == []
    return f"{cut} connections cut during {len(tasks)} tasks"


def cut_connections() -> int:
    """Shut the connections down that worker processes have to here; return how many."""
    ours = open_sockets()
    connected = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        # 03 is connected; the listener is 01
        if len(fields) > 7 and "bgworker-" in fields[7] and fields[5] == "03":
            connected.add(fields[6])
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:[") and target[8:-1] in connected & ours:
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
                found += 1
        except OSError:
            continue
    return found


ORPHANS = """if True:
    import sys, time

    if __name__ == "__main__":
        from bgworker import Scheduler
        from tests.remote import functions
        from tests.remote.engines import executor

        name, folder, looks = sys.argv[1:]
        pool = Scheduler(executor=executor(name), sinks=[f"jsonl:{folder}/debug.jsonl"])
        tasks = [pool.submit(functions.serve, folder, looks == "looks") for _ in range(2)]
        print("up", flush=True)
        time.sleep(600)
"""


def run_orphans(times: int, name: str, seed: int, looks: bool = True) -> str:
    """Kill a program in the middle of its work, as often as that: its workers end, and what they
    had said for a while is in its record.

    Args:
        looks: whether the bodies look if they are to stop.
    """
    chance = random.Random(seed)
    longest, lines = 0.0, 0
    for _ in range(times):
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "program.py")
            script.write_text(ORPHANS)
            errors = Path(folder, "stderr")  # where Python tells of semaphores that are left
            with open(errors, "wb") as file:
                program = subprocess.Popen(
                    [sys.executable, str(script), name, folder, "looks" if looks else "blind"],
                    env=environment(), stdout=subprocess.PIPE, stderr=file,
                    start_new_session=True)
            assert program.stdout is not None
            try:
                said = program.stdout.readline()
                assert said == b"up\n", errors.read_text()
                until(lambda: len(list(Path(folder).glob("body-*"))) == 2)
                time.sleep(chance.uniform(0.0, 1.5))
                ours = [pid for pid in descendants() if pid != program.pid]
                killed = time.time()
                program.kill()
                program.wait(SOON)
                until(lambda: not members(program.pid), SOON)
                longest = max(longest, time.time() - killed)
                assert ours
            finally:
                program.stdout.close()
                for pid in members(program.pid):
                    os.kill(pid, signal.SIGKILL)
                program.kill()
                program.wait(SOON)
            lines += check_orphaned(Path(folder), killed)
    return f"{times} programs killed: {lines} lines, workers gone after {longest:.1f} s at most"


def check_orphaned(folder: Path, killed: float) -> int:
    said: dict[str, list[str]] = {}
    with open(folder / "debug.jsonl", "rb") as file:
        complete = file.read().rpartition(b"\n")[0]
    for line in complete.splitlines():
        event = json.loads(line)
        if event["type"] == "TaskOutput":
            said.setdefault(event["task_id"], []).append(str(event["payload"]))
    for lines in said.values():
        assert lines == [str(number) for number in range(len(lines))]
    for note in folder.glob("body-*"):
        noted = [line.split() for line in note.read_text().splitlines() if line.count(" ") == 2]
        settled = [number for _, number, when in noted if float(when) < killed - SETTLED]
        if settled:
            assert len(said.get(noted[0][0], [])) >= len(settled)
    return sum(map(len, said.values()))


def members(session: int) -> list[int]:
    """Return the processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def run_control(seconds: float, name: str, seed: int) -> str:
    """Submit, cancel, time out, cut and shut down at random; each task ends once, as its future
    says, and the account is exact."""
    chance = random.Random(seed)
    engine = Engine(name)
    ends: Counter[str] = Counter()
    pools = 0
    until_ = time.monotonic() + seconds
    try:
        while time.monotonic() < until_:
            control_one(engine, chance, ends)
            pools += 1
    finally:
        engine.close()
    assert channels() == []
    return f"{pools} pools: " + ", ".join(f"{n} {how}" for how, n in sorted(ends.items()))


def control_one(engine: Engine, chance: random.Random, ends: Counter[str]) -> None:
    """Lead one Scheduler through a short life at random."""
    recorder = RecordingSink()
    tasks: list[Task[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        pool = engine.scheduler(sinks=[recorder], keep_finished=None,
                                max_pending=chance.choice([None, 5]),
                                capture_output=chance.random() < 0.3)

        def act() -> None:
            what = chance.random()
            if what < 0.6:
                timeout = chance.choice([None, None, None, 0.01, 0.05, 0.2])
                body, *arguments = chance.choice(BODIES)
                if body in (functions.sleep, functions.hold):
                    arguments = [str(Path(folder, f"place-{len(tasks)}")), *arguments]
                try:
                    tasks.append(pool.options(timeout=timeout).submit(body, *arguments))
                except PendingFull:
                    pass
            elif what < 0.85 and tasks:
                chance.choice(tasks[-6:]).cancel(chance.choice(["user", "enough"]))
            elif what < 0.9:
                cut_connections()
            elif what < 0.95:
                pool.flush(chance.choice([0.0, 0.2]))
            else:
                time.sleep(chance.uniform(0.0, 0.1))

        for _ in range(chance.randrange(60)):
            act()
        how = chance.choice(["wait", "cancel", "timeout", "forget", "later"])
        for number in range(len(tasks)):
            Path(folder, f"place-{number}.open").touch()
        if how == "timeout":
            pool.shutdown(timeout=chance.uniform(0.0, 0.5))
        elif how == "later":
            pool.shutdown(wait=False, cancel_futures=chance.random() < 0.5)
        elif how == "forget":
            del pool
        else:
            pool.shutdown(cancel_futures=how == "cancel")
        for task in tasks:
            assert task.wait(SOON), f"after {how} {task} never ends"
        assert recorder.closed.wait(SOON), f"after {how} the sink is never closed"
        for task in tasks:
            check_end(recorder, task, how)
            ends[task.status.value] += 1
        if how != "forget":
            health = pool.sinks["recording"]
            assert balanced(health) and health.delivered == len(recorder.events)


BODIES: list[tuple[Any, ...]] = [
    (functions.nothing,), (functions.double, 4), (functions.recite, 30), (functions.boom,),
    (functions.boom, "Unpicklable"), (functions.boom, "SystemExit"), (functions.make, "lock"),
    (functions.echo, threading.Lock()), (functions.count_up, 50), (time.sleep, 0.03),
    (functions.sleep, 0.2), (functions.hold,), (functions.hold, None, True), (functions.chat, 3)]
"""Functions and their arguments; `sleep` and `hold` get a path before theirs."""

ENDS = {"TaskCompleted": "completed", "TaskFailed": "failed", "TaskCancelled": "cancelled",
        "TaskTimedOut": "timed_out"}


def check_end(recorder: RecordingSink, task: Task[Any], how: str) -> None:
    """Check that the record and the future tell the same end of a task."""
    events = recorder.of(task)
    assert [each.seq for each in events] == list(range(1, len(events) + 1)), events
    ended = [each.type.value for each in events if each.type.value in ENDS]
    if how == "timeout" and not ended:
        return  # it was left to itself, and ended after its sink was closed
    assert len(ended) == 1 and events[-1].type.value == ended[0], (task, ended)
    assert ENDS[ended[0]] == task.status.value, (task, ended)
    assert task.cancelled() == (task.status is TaskStatus.CANCELLED)
    if not task.cancelled():
        error = task.exception(0)
        assert (error is None) == (task.status is TaskStatus.COMPLETED)
        assert isinstance(error, TaskTimedOut) == (task.status is TaskStatus.TIMED_OUT)
    else:
        assert task.cancel_requested or how in ("cancel", "later", "timeout")

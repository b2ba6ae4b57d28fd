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
import time
from pathlib import Path

from bgworker import StreamEvent, TaskStatus
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

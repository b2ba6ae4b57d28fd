"""Delivery in the midst of signals, finalisers, forks, a stalled sink, and the ways in which a
process ends.

The scenarios are functions that run in a child process of their own, so that a deadlock is a
failure with a traceback of all threads instead of the end of the test run. `tools/stress.py` runs
them for longer.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import bgworker
from bgworker import Event, LossEvent, Scheduler, SinkHealth, SinkOptions, current_task
from bgworker.model import wire
from bgworker.delivery.intake import Intake
from bgworker.model.records import TaskState
from bgworker.testing import FlakySink, Hang, MemorySink
from tests.receiver import SECRET, Receiver, answer
from tests.support import ROOT

SOON = 60.0
posix = pytest.mark.skipif(
    not hasattr(signal, "setitimer") or not hasattr(os, "fork"), reason="needs POSIX"
)


def in_child(scenario: str, *arguments: Any, seconds: float = 120, code: int = 0) -> str:
    """Run one of this module's scenarios in a fresh process; return what it printed."""
    script = (f"import faulthandler; faulthandler.dump_traceback_later({seconds!r}, exit=True)\n"
              f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
              f"import {__name__} as scenarios; scenarios.{scenario}(*{arguments!r})")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )
    assert (
        done.returncode == code
    ), f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def check_account(health: SinkHealth, *, delivered: int | None = None) -> None:
    settled = health.delivered + health.coalesced + health.dropped + health.parked + health.pending
    assert health.emitted == settled, health
    assert delivered is None or health.delivered == delivered, (delivered, health)


def check_numbers(events: list[Event]) -> None:
    """Each task's events are there from 1 on, without a gap, in order, none twice."""
    by_task: dict[str, list[int]] = {}
    for event in events:
        by_task.setdefault(event.task_id, []).append(event.seq)  # type: ignore[union-attr]
    for task_id, numbers in by_task.items():
        assert numbers == list(range(1, len(numbers) + 1)), (task_id, numbers[:50])


# -- emitting from where no lock may be taken --


def signal_storm(seconds: float) -> None:
    """Emit from a signal handler that interrupts emits, flushes and reads of the account on the
    main thread."""
    sink = MemorySink()
    said = itertools.count()
    over = threading.Event()
    contexts: list[bgworker.TaskContext] = []

    def run() -> None:
        contexts.append(current_task())
        assert over.wait(seconds * 10 + SOON)

    def handle(*_: object) -> None:
        contexts[0].output(f"signal {next(said)}")
        contexts[0].error({"signal": True})
        if time.monotonic() < until:
            signal.setitimer(signal.ITIMER_REAL, 0.0002)

    with Scheduler(2, sinks=[sink]) as pool:
        task = pool.submit(run)
        while not contexts:
            time.sleep(0.001)
        until = time.monotonic() + seconds
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.0002)
        in_main = 0
        while time.monotonic() < until:
            for _ in range(50):
                contexts[0].output("main")
                in_main += 1
            pool.flush(0.01)
            pool.sinks
            task.streams(since=1_000_000_000)
            pool.submit(len, "")
        signal.setitimer(signal.ITIMER_REAL, 0)
        over.set()
        task.result(SOON)
        assert pool.flush(SOON)
    handled = next(said)
    texts = Counter(str(getattr(event, "payload", "")).partition(" ")[0] for event in sink.events)
    assert (texts["main"], texts["signal"], texts['{"signal":true}']) == (
        in_main,
        handled,
        handled,
    ), texts
    check_numbers(sink.events)
    check_account(pool.sinks["memory"], delivered=len(sink.events))
    print(handled, "signals")


def collector_storm(seconds: float) -> None:
    """Emit from finalisers that the garbage collector runs at every allocation, in whatever thread
    and place."""
    sink = MemorySink()
    said = itertools.count()
    over = threading.Event()

    class Cycle:
        def __init__(self, context: bgworker.TaskContext) -> None:
            self.itself = self
            self.context = context

        def __del__(self) -> None:
            self.context.output("finaliser")
            next(said)

    def run() -> int:
        context = current_task()
        count = 0
        while not over.is_set():
            Cycle(context)
            context.output("task")
            count += 1
            time.sleep(0)
        return count

    class Littering(MemorySink):
        def write(self, events: Any) -> None:
            super().write(events)
            for _ in range(3):
                Cycle(anchor[0])

    anchor: list[bgworker.TaskContext] = []
    keeper = threading.Event()

    def keep() -> None:
        anchor.append(current_task())
        assert keeper.wait(seconds * 10 + SOON)

    with Scheduler(4, sinks=[sink]) as pool:
        kept = pool.submit(keep)
        while not anchor:
            time.sleep(0.001)
        pool.register_sink(Littering(), name="littering")
        gc.set_threshold(1)
        tasks = [pool.submit(run) for _ in range(2)]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            Cycle(anchor[0])
            pool.flush(0.05)
            pool.sinks
        gc.set_threshold(700)
        over.set()
        in_tasks = sum(task.result(SOON) for task in tasks)
        pool.unregister_sink("littering", timeout=SOON)
        gc.collect()
        pool.flush(SOON)
        keeper.set()
        kept.result(SOON)
        pool.flush(SOON)
    late = pool._dispatcher.intake.late.read()
    texts = Counter(getattr(event, "payload", "") for event in sink.events)
    finalised = next(said)
    events = [event for event in sink.events if event.type != "EventsLost"]
    health = pool.sinks["memory"]
    check_account(health, delivered=len(events))
    said_in_all = texts["task"] + texts["finaliser"] + health.dropped + late
    assert said_in_all == in_tasks + finalised, (
        texts["task"],
        texts["finaliser"],
        health,
        late,
        in_tasks,
        finalised,
    )
    if not health.dropped:  # on a busy machine the sink may starve so long that its queue overflows
        check_numbers(events)
    print(finalised, "finalisers")


def asking_storm(question: str, seconds: float) -> None:
    """Ask from finalisers that the garbage collector runs wherever it strikes, also in the midst of
    what is asked, under its locks."""
    asked = itertools.count()
    over = threading.Event()
    asks = {
        "flush": lambda: pool.flush(),
        "streams": lambda: talker.streams(),
        "health": lambda: pool.health(),
        "tasks": lambda: pool.tasks(),
        "sinks": lambda: pool.sinks,
        "unregister": lambda: "passing" in pool.sinks and pool.unregister_sink("passing"),
        "shutdown": lambda: next(asked) > 300 and (over.set() or pool.shutdown()),
    }

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            try:
                asks[question]()
            except KeyError:
                pass  # another was faster to unregister it
            next(asked)

    class Littering(MemorySink):
        def write(self, events: Any) -> None:
            super().write(events)
            Cycle()

    def talk() -> None:
        while not over.is_set():
            current_task().output("text")
            Cycle()
            time.sleep(0.01)

    pool = Scheduler(4, close_timeout=5)
    for name in ("one", "two", "passing"):
        pool.register_sink(Littering(), name=name, options=SinkOptions(batch_size=5))
    talker = pool.submit(talk)
    gc.set_threshold(7)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        Cycle()
        pool.sinks
        pool.flush(0.01)
    gc.set_threshold(700)
    over.set()
    pool.shutdown()
    for health in pool.sinks.values():
        check_account(health)
    print(next(asked), "asked")


@pytest.mark.parametrize(
    "question", ["flush", "streams", "health", "tasks", "sinks", "unregister", "shutdown"])
def test_a_finaliser_that_asks_in_the_midst_of_delivery_never_waits_for_itself(
    question: str,
) -> None:
    assert int(in_child("asking_storm", question, 0.7, seconds=40).split()[0]) > 100


@posix
def test_emitting_from_a_storm_of_signals_deadlocks_nothing_and_loses_nothing() -> None:
    assert int(in_child("signal_storm", 1.0).split()[0]) > 100


def test_emitting_from_finalisers_deadlocks_nothing_and_loses_nothing() -> None:
    assert int(in_child("collector_storm", 1.0).split()[0]) > 100


class LockingIntake(Intake):
    """The twin that does what everybody does at first: it takes a lock."""

    __slots__ = ("lock",)

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def emit(self, state: TaskState, kind: int, data: object) -> None:
        with self.lock:
            super().emit(state, kind, data)
            time.sleep(0)  # widens the window in which a signal finds the lock taken


def locking_storm() -> None:
    bgworker.delivery.dispatcher.Intake = LockingIntake  # type: ignore[attr-defined]
    signal_storm(20.0)


@posix
@pytest.mark.slow
def test_the_same_storm_catches_an_intake_with_a_lock() -> None:
    with pytest.raises(AssertionError, match="Timeout"):
        in_child("locking_storm", seconds=5)


# -- fork --


def forks(times: int, folder: str) -> None:
    """Fork in the middle of bursts; each child runs a task of its own, over the same sinks, and
    looks at its account."""
    memory = MemorySink()
    over = threading.Event()

    def run() -> int:
        context = current_task()
        count = 0
        while not over.is_set():
            context.output(f"parent {os.getpid()}")
            count += 1
            if count % 20 == 0:
                time.sleep(0.0005)
        return count

    parent = os.getpid()
    path = os.path.join(folder, "events.jsonl")
    pool = Scheduler(3, sinks=[memory, f"jsonl:{path}"])
    talkers = [pool.submit(run) for _ in range(2)]
    pids = []
    for number in range(times):
        time.sleep(0.003 * (number % 7))
        pid = os.fork()
        if not pid:
            _be_a_child(pool, memory)
        pids.append(pid)
        if len(pids) >= 4:
            _reap(pids.pop(0))
    for pid in pids:
        _reap(pid)
    over.set()
    said = sum(talker.result(SOON) for talker in talkers)
    assert pool.flush(SOON), pool.sinks
    pool.shutdown()
    assert os.getpid() == parent
    for health in pool.sinks.values():
        check_account(health, delivered=said + 2 * 4)
    check_numbers(memory.events)
    with open(path, encoding="utf-8", newline="\n") as lines:
        events = [wire.decode(line) for line in lines]
    check_numbers(events)
    runs = Counter(getattr(event, "task").run_id for event in events if event.type == "TaskCreated")
    assert sorted(runs.values()) == [1] * times + [2], "each process has a run of its own"
    payloads = Counter(getattr(event, "payload", None) for event in events)
    assert payloads[f"parent {parent}"] == said
    assert (
        sum(count for payload, count in payloads.items() if payload and payload.startswith("child"))
        == 100 * times
    )
    print("ok")


def _be_a_child(pool: Scheduler, memory: MemorySink) -> None:
    code = 1
    try:
        def run() -> None:
            for _ in range(100):
                current_task().output(f"child {os.getpid()}")

        pool.submit(run).result(SOON)
        assert pool.flush(SOON), pool.sinks
        pool.shutdown()
        for health in pool.sinks.values():
            check_account(health, delivered=104)
        assert len(memory.events) == 104
        check_numbers(memory.events)
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _reap(pid: int) -> None:
    until = time.monotonic() + SOON
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "a child failed"
            return
        time.sleep(0.002)
    os.kill(pid, signal.SIGABRT)
    os.waitpid(pid, 0)
    raise AssertionError("a child hangs")


@posix
def test_forks_in_the_middle_of_bursts_repeat_nothing_and_lose_nothing_on_either_side(
    tmp_path: Path,
) -> None:
    assert in_child("forks", 20, str(tmp_path)) == "ok\n"


LOADED_MEANWHILE = """
import sys
sys.path.insert(0, sys.argv[1])
from bgworker import Event, HookSink, Scheduler, current_task

class Own(HookSink):
    def on_event(self, event):
        assert issubclass(type(event), Event.__args__) and str(event)

class Async(HookSink):
    async def on_task_output(self, event):
        pass

    async def flush(self):
        pass

def talk():
    for _ in range(50):
        current_task().output("text")
    current_task().output({"json": 1})
    current_task().progress(1)
    raise ValueError("and fail")

sink = {"own": Own(), "async": Async()}.get(sys.argv[2], sys.argv[2])
with Scheduler(2, sinks=[sink]) as pool:
    before = set(sys.modules)
    pool.submit(talk).exception(timeout=60)
    pool.flush(timeout=60)
    print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.parametrize(("sink", "first_answer"), [
    ("jsonl:lines.jsonl", 200), ("jsonl:lines.jsonl?max_bytes=1000&compress=true", 200),
    ("sqlite:history.db", 200), ("own", 200), ("async", 200), ("webhook:URL", 200),
    ("webhook:URL", 429), ("webhook:URL", 403)])
def test_no_thread_of_a_sink_imports_anything_which_a_fork_could_leave_half_done(
    tmp_path: Path, sink: str, first_answer: int
) -> None:
    when = {"Retry-After": "1" if first_answer == 403 else "Wed, 21 Oct 2015 07:28:00 GMT"}
    script = [answer(first_answer, when)] if "webhook" in sink else []
    with Receiver(*script) as receiver:
        done = subprocess.run(
            [sys.executable, "-c", LOADED_MEANWHILE, str(ROOT),
             sink.replace("URL", receiver.url.replace("127.0.0.1", "localhost"))],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**os.environ, "BGWORKER_WEBHOOK_SECRET": SECRET},
        )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


# -- a sink that takes nothing --


def resident() -> int:
    """Return the bytes of memory that this process has in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stalled(
    count: int, queue_bytes: int, text: str, repeat: int, says_progress: bool = False
) -> None:
    """Emit into a sink that hangs; memory stays within the queue's bound, and nothing goes
    uncounted."""
    hang = Hang()
    sink = FlakySink(hang)
    text *= repeat

    def run(most: int) -> None:
        context = current_task()
        for number in range(most):
            if says_progress:
                context.progress(number, None, text + str(number))
            else:
                context.output(text + str(number))
            if number % 1000 == 0:
                time.sleep(0.001)

    pool = Scheduler(4, close_timeout=5, progress_interval=0)
    pool.register_sink(sink, name="it", options=SinkOptions(queue_bytes=queue_bytes))
    pool.submit(run, 100).result(SOON)
    pool.flush(0.1)
    assert hang.entered.wait(SOON)
    gc.collect()
    before = resident()
    highest = 0
    tasks = [pool.submit(run, count // 4) for _ in range(4)]
    while not all(task.done() for task in tasks):
        highest = max(highest, resident())
        time.sleep(0.02)
    pool.flush(0.5)
    highest = max(highest, resident())
    health = pool.sinks["it"]
    check_account(health, delivered=0)
    grown = highest - before
    assert grown <= queue_bytes + 30 * 2 ** 20, f"grew by {grown >> 20} MiB"
    hang.release()
    pool.flush(SOON)
    pool.shutdown()
    health = pool.sinks["it"]
    check_account(health)
    assert health.emitted == 100 + 4 * (count // 4) + 5 * 4 and health.pending == 0, health
    lost = sum(event.count for event in sink.acknowledged if isinstance(event, LossEvent))
    assert lost == health.dropped and lost + health.coalesced > 0
    print(grown >> 20, "MiB")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_a_million_events_into_a_stalled_sink_stay_within_the_memory_bound_and_are_accounted() -> (
    None
):
    in_child("stalled", 1_000_000, SinkOptions().queue_bytes, "x", 100, seconds=240)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize(
    ("count", "text", "repeat", "says_progress"),
    [
        (200_000, "x", 1000, False),
        (30_000, "\U0001f642", 4090, False),
        (8_000, "x", 60_000, False),
        (30_000, "x", 10_000, True),
    ],
    ids=["1 kB", "emoji", "60 kB", "progress"],
)
def test_memory_stays_within_its_bound_whatever_the_size_of_the_payloads(
    count: int, text: str, repeat: int, says_progress: bool
) -> None:
    in_child("stalled", count, 16 * 2**20, text, repeat, says_progress)


# -- the ways in which a process ends --

BEGIN = """
import os, signal, sys, threading, time
sys.path.insert(0, {root!r})
from bgworker import Scheduler, current_task
pool = Scheduler(2, sinks=["jsonl:" + sys.argv[1]])
def run(count):
    for number in range(count):
        current_task().output(str(number))
"""


def ended_by(
    script: str, path: Path, code: int, *, stop: signal.Signals | None = None
) -> list[Event]:
    """Run a script to its end, or send it a signal once it says so; return what its sink has
    got."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-X",
            "faulthandler",
            "-c",
            BEGIN.format(root=str(ROOT)) + script,
            str(path),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if stop is not None:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            child.send_signal(stop)
        _, errors = child.communicate(timeout=SOON)
    except BaseException:
        child.kill()
        _, errors = child.communicate(timeout=SOON)  # closes the pipes, too
        print(errors)
        raise
    assert child.returncode == code, (child.returncode, errors)
    with open(path, encoding="utf-8", newline="\n") as lines:
        events = [wire.decode(line) for line in lines]
    check_numbers(events)
    return events


def delivered(events: list[Event]) -> int:
    assert not [event for event in events if event.type == "EventsLost"]
    return sum(event.type == "TaskOutput" for event in events)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("pool.submit(run, 3000)", 0),
        ("[pool.submit(run, 1000) for _ in range(3)]; sys.exit(3)", 3),
        ("pool.submit(run, 3000); raise RuntimeError('uncaught')", 1),
        ("pool.submit(run, 3000); del pool", 0),
        ("pool.submit(run, 3000)\nthreading.Thread(target=lambda: time.sleep(0.2)).start()", 0),
        ("import atexit; atexit.register(lambda: None); pool.submit(run, 3000).result()", 0),
    ],
    ids=[
        "end of main",
        "sys.exit",
        "uncaught exception",
        "forgotten",
        "a thread outlives main",
        "atexit",
    ],
)
def test_what_was_emitted_is_delivered_however_the_interpreter_ends(
    tmp_path: Path, script: str, code: int
) -> None:
    assert delivered(ended_by(script, tmp_path / "out", code)) == 3000


@posix
def test_sigterm_with_a_handler_that_exits_delivers_what_was_emitted(tmp_path: Path) -> None:
    script = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
pool.submit(run, 3000).result()
print("ready", flush=True)
while True: time.sleep(0.01)
"""
    events = ended_by(script, tmp_path / "out", 143, stop=signal.SIGTERM)
    assert delivered(events) == 3000
    assert events[-1].type == "TaskCompleted"


@posix
def test_ctrl_c_delivers_what_was_emitted(tmp_path: Path) -> None:
    script = """
signal.signal(signal.SIGINT, signal.default_int_handler)
pool.submit(run, 3000).result()
print("ready", flush=True)
while True: time.sleep(0.01)
"""
    assert delivered(ended_by(script, tmp_path / "out", -signal.SIGINT, stop=signal.SIGINT)) == 3000


@posix
def test_ctrl_c_while_a_result_is_awaited_and_the_pool_shut_down_delivers_what_was_emitted(
    tmp_path: Path,
) -> None:
    script = """
signal.signal(signal.SIGINT, signal.default_int_handler)
def stubborn():
    run(2000)
    print("ready", flush=True)
    current_task().sleep(0.3)
    run(1000)
with pool:
    pool.submit(stubborn).result()
"""
    assert delivered(ended_by(script, tmp_path / "out", -signal.SIGINT, stop=signal.SIGINT)) == 3000


def test_the_harness_sees_what_a_process_that_is_killed_outright_did_not_deliver(
    tmp_path: Path,
) -> None:
    script = "pool.flush()\npool.submit(run, 3000).result()\nos._exit(0)"
    path = tmp_path / "out"
    path.touch()
    with pytest.raises(AssertionError):
        assert delivered(ended_by(script, path, 0)) == 3000


def test_a_sink_that_flushes_its_own_scheduler_gets_a_report_instead_of_waiting_for_itself() -> (
    None
):
    reports: list[object] = []

    class Flushes:
        def write(self, events: object) -> None:
            reports.append(pool.flush())

        def close(self) -> None:
            pass

    with Scheduler(1) as pool:
        pool.register_sink(Flushes())
        pool.submit(len, "x").result(60)
        pool.flush(60)
    assert reports and not any(reports)

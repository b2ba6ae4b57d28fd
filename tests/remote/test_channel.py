"""What bodies say reaches the scheduler once, in order and whole, whatever happens to the
channel."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from tests.remote import bodies
from tests.remote.receiving import Receiver, hub, ordered
from tests.support import SOON, Gate, environment, in_time, joined, needs_fork, started, until

from bgworker.delivery.intake import SLOT
from bgworker.model.records import CANCELLED, OUTPUT, STARTED, TIMED_OUT
from bgworker.remote import channel as module
from bgworker.remote.hub import Hub
from bgworker.remote.link import Link
from bgworker.remote.messages import Report, decode_report, outcome_of
from bgworker.remote.worker import perform

METHODS = ["spawn", "forkserver", *(["fork"] if sys.version_info < (3, 14) else [])]

needs_stop = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")


@contextmanager
def engine(workers: int = 1, method: str = "spawn") -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(workers, mp_context=get_context(method)) as made:
        yield made


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """One worker process for the tests that leave it as they found it."""
    with engine() as made:
        made.submit(bodies.nothing).result(SOON)  # its threads run before any test
        yield made


def report_of(future: Future[bytes], seconds: float = SOON) -> Report:
    return decode_report(future.result(seconds))


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


# -- live --


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channel", [None, "127.0.0.1:0"])
def test_an_event_comes_while_its_body_runs(method: str, channel: str | None) -> None:
    ages: list[float] = []
    with hub(channel) as (made, receiver), engine(2, method) as pool:
        def note(peer: object, task_id: str, attempt: str, first: int, records: Any) -> None:
            ages.extend([(time.time_ns() - ns) / 1e9 for _, ns, _ in records])
            receiver.take(attempt, first, records)

        receiver.said = note  # type: ignore[method-assign]
        running = [pool.submit(perform, ordered(bodies.talk, 20, 0.05, ticket=made.ticket))
                   for _ in range(2)]
        reports = [report_of(each) for each in running]
        assert len({peer.pid for peer in made.workers()}) == len(made.workers()) <= 2
        for report in reports:
            assert receiver.outputs(report) == numbers(20)
    assert len(ages) > 20
    assert sorted(ages)[len(ages) // 2] < 0.5  # the first ones wait until it is connected


def test_a_body_that_was_heard_says_nothing_again_in_its_report(pool: ProcessPoolExecutor) -> None:
    with hub() as (made, receiver):
        future = pool.submit(perform, ordered(bodies.talk, 100, 0.01, ticket=made.ticket))
        report = report_of(future)
        assert report.first > 50 and len(report.records) < 50
        assert receiver.outputs(report) == numbers(100)


def test_a_body_whose_records_were_not_acknowledged_says_them_again_in_its_report(
    pool: ProcessPoolExecutor,
) -> None:
    with hub() as (made, receiver):  # the twin of the former
        gate = Gate()
        receiver.before = lambda peer: gate()
        future = pool.submit(perform, ordered(bodies.talk, 100, 0.01, ticket=made.ticket))
        report = report_of(future)
        assert report.first == 1 and len(report.records) == 101
        gate.open()


def test_short_bodies_are_not_told_one_by_one_unless_they_have_a_deadline(
    pool: ProcessPoolExecutor,
) -> None:
    with hub() as (made, receiver):
        for timeout in (20.0, None):
            receiver.batches = 0
            running = [pool.submit(perform, ordered(
                bodies.nothing, ticket=made.ticket, timeout=timeout)) for _ in range(100)]
            reports = [report_of(each) for each in running]
            assert [len(receiver.whole(report)) for report in reports] == [1] * 100
            assert receiver.batches >= 95 if timeout else receiver.batches < 50


# -- when it breaks --


def test_each_record_comes_once_however_often_the_channel_is_cut() -> None:
    count, cuts = 3_000, 0
    with hub() as (made, receiver), engine(2) as pool:
        running = [pool.submit(perform, ordered(bodies.talk, count, 0.001, ticket=made.ticket))
                   for _ in range(2)]
        chance = random.Random(5)
        while not all(each.done() for each in running):
            time.sleep(chance.uniform(0.01, 0.15))
            for peer in made.workers():
                peer.link.cut()
                cuts += 1
        for each in running:
            report = report_of(each)
            assert receiver.outputs(report) == numbers(count)
            assert report.losses == {}
    assert cuts > 20 and len(receiver.left) > 20
    assert receiver.most_at_once == 1


def test_the_check_of_the_former_finds_a_record_that_is_missing() -> None:
    receiver = Receiver()
    report = decode_report(perform(ordered(bodies.talk, 5)))
    cut_off = report._replace(first=report.first + 1, records=report.records[1:])
    with pytest.raises(AssertionError, match="missing"):
        receiver.whole(cut_off)
    with pytest.raises(AssertionError, match="two records"):
        receiver.whole(cut_off._replace(first=1))
        receiver.whole(report)


def test_what_was_not_acknowledged_comes_again_over_the_next_connection(
    pool: ProcessPoolExecutor,
) -> None:
    with hub() as (made, receiver):
        cut = threading.Event()

        def cut_it(peer: Any) -> None:
            if len(receiver.came) > 20 and not cut.is_set():
                cut.set()
                peer.link.cut()  # it is taken, and nobody learns of that

        receiver.before = cut_it
        future = pool.submit(perform, ordered(bodies.talk, 100, 0.01, ticket=made.ticket))
        report = report_of(future)
        assert receiver.outputs(report) == numbers(100)
        assert cut.is_set() and max(receiver.came.values()) == 2


@pytest.mark.parametrize("is_sent", [True, False])
def test_a_start_that_is_told_as_the_channel_breaks_leaves_no_gap(
    is_sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell, tried = Link.send, []

    def break_(self: Link, message: Any, wait: bool = True) -> bool:
        if wait:
            return tell(self, message, wait)
        tried.append(message)
        if is_sent:
            tell(self, message)
            time.sleep(0.1)  # it is acknowledged
        raise BrokenPipeError

    monkeypatch.setattr(Link, "send", break_)
    with hub() as (made, receiver):
        report = decode_report(perform(ordered(bodies.talk, 50, 0.01, ticket=made.ticket)))
        assert tried and receiver.outputs(report) == numbers(50)
        assert report.first > 10 and len(report.records) < 40


@pytest.mark.parametrize("ticket", [
    None, ("\0bgworker-nobody", b"key", 1), ("/nowhere/at/all", b"key", 1),
    (("127.0.0.1", 1), b"key", 1),
])
def test_without_a_channel_everything_comes_with_the_report(ticket: Any) -> None:
    report = decode_report(perform(ordered(bodies.talk, 500, 0.001, 20, ticket=ticket)))
    assert Receiver().outputs(report) == numbers(500) and report.first == 1


def test_a_hub_with_another_key_is_as_good_as_none() -> None:
    with hub() as (made, receiver):
        address, _, pid = made.ticket
        report = decode_report(perform(ordered(bodies.talk, 50, 0.01,
                                               ticket=(address, b"another key", pid))))
        assert Receiver().outputs(report) == numbers(50) and receiver.records == {}


def test_a_channel_that_opens_late_is_used_then() -> None:
    made = Hub("test", None, receiver := Receiver())
    with engine() as pool:
        try:
            future = pool.submit(perform, ordered(bodies.talk, 300, 0.01, ticket=made.ticket))
            time.sleep(1.0)
            made.start()
            until(lambda: receiver.came)
            assert not future.done()
            assert receiver.outputs(report_of(future)) == numbers(300)
        finally:
            made.close()


@pytest.mark.parametrize("message", [
    ("ack",), ("ack", "x"), ("ack", [1]), ("ack", 1, 2), ("ack", 10**9), ("stop", "task"),
    ("stop", [], "user"), ("unknown", 1), ("",),
])
def test_a_scheduler_that_sends_nonsense_costs_no_record(message: Any) -> None:
    with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory() as folder:
        listener.bind(address := os.path.join(folder, "s"))
        listener.listen()
        met = 0

        def answer() -> None:
            nonlocal met
            while True:
                try:
                    link = Link(listener.accept()[0], 0.5)
                except OSError:
                    return
                link.prove(b"key", accepts=True)
                link.receive()
                link.send(message)
                met += 1
                with contextlib.suppress(EOFError, OSError):
                    while True:
                        link.receive()
                link.close()

        answering = started(answer)
        report = decode_report(perform(ordered(bodies.talk, 30, 0.02, ticket=(address, b"key", 1))))
        assert Receiver().outputs(report) == numbers(30) and met
        listener.shutdown(socket.SHUT_RDWR)
        joined(answering)


# -- bounds --


def test_a_full_window_costs_a_body_events_which_are_counted_and_no_time(
    pool: ProcessPoolExecutor,
) -> None:
    most = module.BOUND // SLOT
    with hub() as (made, receiver):
        gate = Gate()
        receiver.before = lambda peer: gate()
        future = pool.submit(perform, ordered(bodies.talk, 3 * most, 0.0005, 100,
                                              ticket=made.ticket))
        report = report_of(future)  # though nobody has taken anything
        gate.open()
        kept = receiver.outputs(report)
        lost = report.losses[OUTPUT, "intake"]
        assert len(kept) + lost == 3 * most
        assert most / 3 < len(kept) <= most
        assert kept == sorted(kept, key=int)


def test_large_texts_are_bounded_by_their_bytes() -> None:
    report = decode_report(perform(ordered(
        say_much, 100_000, 1000, limits=(200_000, "truncate", 0.1, 1.0))))
    kept = Receiver().outputs(report)
    assert len(kept) + report.losses[OUTPUT, "intake"] == 1000
    assert module.BOUND / 2 < sum(len(text) for text, *_ in kept) <= module.BOUND


def say_much(size: int, count: int) -> None:
    from bgworker import current_task

    for _ in range(count):
        current_task().output("x" * size)


def test_a_burst_that_a_thread_would_hold_is_held(pool: ProcessPoolExecutor) -> None:
    with hub() as (made, receiver):
        pool.submit(perform, ordered(bodies.stay, 0.3, ticket=made.ticket)).result(SOON)
        report = report_of(pool.submit(perform, ordered(bodies.talk, 40_000, ticket=made.ticket)))
        assert receiver.outputs(report) == numbers(40_000)


def test_what_is_said_after_the_end_is_counted_as_late(
    tmp_path: Path, pool: ProcessPoolExecutor,
) -> None:
    path = tmp_path / "enough"
    with hub() as (made, receiver):
        order = ordered(bodies.leave_a_thread, str(path), ticket=made.ticket)
        first = report_of(pool.submit(perform, order))
        time.sleep(0.2)
        path.touch()
        report = report_of(pool.submit(perform, ordered(bodies.talk, 1, ticket=made.ticket)))
        assert report.losses[OUTPUT, "late"] > 10
        assert receiver.outputs(report) == ["0"]
        assert first.attempt != report.attempt and first.worker == report.worker


# -- stops and deadlines --


def test_a_body_that_runs_is_asked_to_stop(pool: ProcessPoolExecutor) -> None:
    with hub() as (made, receiver):
        future = pool.submit(perform, ordered(
            bodies.wait_to_be_stopped, ticket=made.ticket, task_id="this one"))
        until(lambda: receiver.came)
        made.stop("another one", "user")
        time.sleep(0.2)
        assert not future.done()
        made.stop("this one", "enough")
        report = report_of(future)
        assert (report.kind, report.failure) == (CANCELLED, (None, "enough", None))


def test_a_body_that_has_not_begun_does_not_when_it_was_asked_to_stop(
    pool: ProcessPoolExecutor,
) -> None:
    with hub() as (made, receiver):
        pool.submit(perform, ordered(bodies.talk, 1, ticket=made.ticket)).result(SOON)
        until(made.workers)
        running = pool.submit(perform, ordered(bodies.stay, 0.5, ticket=made.ticket))
        waiting = pool.submit(perform, ordered(
            bodies.talk, 5, ticket=made.ticket, task_id="not begun"))
        made.stop("not begun", "too late")
        assert outcome_of(report_of(running)) == (0.5, None)
        report = report_of(waiting)
        assert (report.kind, report.failure) == (CANCELLED, (None, "too late", None))
        assert receiver.whole(report) == [] and report.duration == 0
        again = report_of(pool.submit(perform, ordered(
            bodies.talk, 5, ticket=made.ticket, task_id="not begun")))
        assert outcome_of(again) == (5, None)  # a request is for one attempt


def test_a_worker_that_connects_late_is_told_of_earlier_requests(pool: ProcessPoolExecutor) -> None:
    with hub() as (made, receiver):
        made.stop("this one", "early")
        report = report_of(pool.submit(perform, ordered(
            bodies.wait_to_be_stopped, ticket=made.ticket, task_id="this one")))
        assert (report.kind, report.failure) == (CANCELLED, (None, "early", None))


def test_requests_for_tasks_that_never_come_are_remembered_but_not_without_end() -> None:
    made = module.Channel(None)
    for number in range(2 * module.MOST_STOPS):
        made._stop(f"task{number}", "user")
    assert len(made._stops) == module.MOST_STOPS
    assert f"task{2 * module.MOST_STOPS - 1}" in made._stops and "task0" not in made._stops


def test_a_deadline_is_told_with_the_stack_while_the_body_runs_on(
    pool: ProcessPoolExecutor,
) -> None:
    with hub() as (made, receiver):
        future = pool.submit(perform, ordered(
            bodies.stay, 2.0, ticket=made.ticket, timeout=0.3, task_id="late one"))
        until(lambda: receiver.late)
        assert not future.done()
        [(task_id, stack)] = receiver.late
        assert task_id == "late one"
        assert stack.startswith("Stack (most recent call last):\n") and "in stay" in stack
        report = report_of(future)
        assert report.kind == TIMED_OUT and report.failure is not None
        assert report.failure[2] == stack
        in_time = pool.submit(perform, ordered(
            bodies.stay, 0.1, ticket=made.ticket, timeout=20.0))
        assert outcome_of(report_of(in_time)) == (0.1, None)
    assert len(receiver.late) == 1


# -- processes that stop, fork and die --


@needs_stop
def test_a_worker_that_is_stopped_for_a_while_goes_on_where_it_was() -> None:
    with hub() as (made, receiver), engine(2) as pool:
        running = [pool.submit(perform, ordered(bodies.talk, 2000, 0.001, ticket=made.ticket))
                   for _ in range(2)]
        until(lambda: len(made.workers()) == 2 and receiver.came)
        stopped, other = made.workers()
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            time.sleep(0.1)  # what it has sent arrives
            heard = sum(receiver.came.values())
            until(lambda: sum(receiver.came.values()) > heard + 100)  # of the other one
            made.stop("nobody", "user")
            assert in_time(made.workers, 1.0)
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        for each in running:
            assert receiver.outputs(report_of(each)) == numbers(2000)


def test_what_a_worker_said_before_it_was_killed_has_come_when_it_is_gone() -> None:
    with hub() as (made, receiver), engine() as pool:
        future = pool.submit(perform, ordered(bodies.talk, 10**6, 0.0005, ticket=made.ticket))
        until(lambda: len(receiver.came) > 200)
        [peer] = made.workers()
        os.kill(peer.pid, signal.SIGKILL)
        until(lambda: receiver.left == [peer.worker] and made.workers() == [])
        [kept] = receiver.records.values()
        assert sorted(kept) == list(range(1, len(kept) + 1))  # no gap
        assert kept[1][0] == STARTED and kept[2][2] == "0"
        assert future.exception(SOON) is not None


@needs_fork
def test_a_child_that_a_body_forks_is_silent_and_holds_no_connection_open() -> None:
    with hub() as (made, receiver), engine() as pool:
        report = report_of(pool.submit(perform, ordered(
            bodies.fork_a_child, 30.0, ticket=made.ticket)))
        child, _ = outcome_of(report)
        try:
            time.sleep(0.3)
            assert receiver.outputs(report) == ["parent", "parent again"]
            [peer] = made.workers()
            os.kill(peer.pid, signal.SIGKILL)
            until(lambda: receiver.left == [peer.worker], 5.0)  # the child lives
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


PARENT = """
import sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from tests.remote import bodies
from tests.remote.receiving import hub, ordered
from bgworker.remote.worker import perform

if __name__ == "__main__":
    method, name, *args = sys.argv[1:]
    with hub() as (made, receiver):
        pool = ProcessPoolExecutor(2, mp_context=get_context(method))
        for number in range(2):
            pool.submit(perform, ordered(getattr(bodies, name), *map(eval, args),
                                         ticket=made.ticket))
        said = 0
        while said < 2:
            said = sum([kind == 8 for kept in list(receiver.records.values())
                        for kind, _, _ in list(kept.values())])
            time.sleep(0.01)
        for kept in receiver.records.values():
            for kind, _, data in kept.values():
                if kind == 8:
                    print(data, flush=True)
        sys.stdin.read(1)
        if name == "talk":
            time.sleep(1.0)  # its bodies have ended
        print("ready", flush=True)
        sys.stdin.read(1)
"""


def parent(tmp_path: Path, method: str, name: str, *args: object) -> subprocess.Popen[str]:
    script = tmp_path / "parent.py"
    script.write_text(PARENT, encoding="utf-8")
    return subprocess.Popen([sys.executable, str(script), method, name, *map(repr, args)],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=environment())


def lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name, args, seconds", [
    ("wait_to_be_stopped", (), 5.0),  # it looks, and ends soon
    ("stay", (600,), module.ORPHANED + 4.0),  # it does not look
])
def test_the_workers_of_a_parent_that_was_killed_end(
    method: str, name: str, args: tuple[object, ...], seconds: float, tmp_path: Path
) -> None:
    process = parent(tmp_path, method, name, *args)
    assert process.stdin is not None and process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    assert all(map(lives, pids))
    process.kill()
    process.wait(SOON)
    try:
        until(lambda: not any(map(lives, pids)), seconds)
    finally:
        for pid in filter(lives, pids):
            os.kill(pid, signal.SIGKILL)
        process.stdin.close()
        process.stdout.close()


def test_a_worker_whose_parent_lives_goes_on_without_its_channel() -> None:
    made = Hub("test", None, receiver := Receiver())
    made.start()
    with engine() as pool:
        future = pool.submit(perform, ordered(bodies.talk, 300, 0.01, ticket=made.ticket))
        until(lambda: receiver.came)
        made.close()
        report = report_of(future)
        assert receiver.outputs(report) == numbers(300)
        assert report.records


# -- in one process --


def test_bodies_on_threads_of_one_process_share_a_channel_which_ends_with_its_hub() -> None:
    reports: list[Report] = []
    with hub() as (made, receiver):
        def run() -> None:
            reports.append(decode_report(perform(ordered(
                bodies.talk, 200, 0.002, ticket=made.ticket))))

        joined(*[started(run) for _ in range(5)])
        assert len(made.workers()) == 1
        for report in reports:
            assert receiver.outputs(report) == numbers(200)
        assert len({report.attempt for report in reports}) == 5
        assert any(thread.name == "bgworker-channel" for thread in threading.enumerate())
    until(lambda: not module._channels)
    until(lambda: not any(thread.name.startswith("bgworker-") for thread in threading.enumerate()))


def test_two_hubs_get_what_is_said_to_each(pool: ProcessPoolExecutor) -> None:
    with hub() as (one, first), hub() as (two, second):
        reports = [report_of(pool.submit(perform, ordered(bodies.talk, 20, 0.01, ticket=ticket)))
                   for ticket in (one.ticket, two.ticket)]
        assert first.outputs(reports[0]) == second.outputs(reports[1]) == numbers(20)
        assert len(first.records) == len(second.records) == 1
        assert one.workers()[0].worker != two.workers()[0].worker
        assert one.workers()[0].pid == two.workers()[0].pid

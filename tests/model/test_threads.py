"""How our own threads begin."""

from __future__ import annotations

import ast
import contextvars
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import bgworker
from bgworker.model.threads import own_thread
from tests.interrupts import Interrupt, alarm, each_step, every_step, needs_signals
from tests.support import Gate, joined, until

SOON = 30.0
PACKAGE = Path(bgworker.__file__).parent


def test_a_thread_of_ours_sees_no_context_variable_of_who_starts_it() -> None:
    variable = contextvars.ContextVar("variable", default="empty")
    seen: list[object] = []
    variable.set("the starter's")
    thread = own_thread("mine", lambda *args: seen.append((variable.get(), *args)), 1, 2)
    thread.start()
    thread.join(SOON)
    assert not thread.is_alive()
    assert (seen, thread.name, thread.daemon) == ([("empty", 1, 2)], "mine", True)


def test_threads_of_ours_run_at_the_same_time() -> None:
    both = threading.Barrier(2)
    threads = [own_thread(str(number), both.wait, SOON) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert not both.broken


def test_every_thread_of_ours_is_made_in_one_place() -> None:
    makers = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            makes = [node.func] if isinstance(node, ast.Call) else getattr(node, "bases", ())
            for maker in makes:
                name = getattr(maker, "attr", getattr(maker, "id", None))
                if name in ("Thread", "Timer", "start_new_thread", "start_joinable_thread"):
                    makers.add(path.relative_to(PACKAGE).as_posix())
    assert makers == {"model/threads.py"}


# -- the end --


@needs_signals
def test_ctrl_c_in_a_wait_for_a_thread_does_not_make_it_dead_to_us() -> None:
    gate = Gate()
    thread = own_thread("mine", gate)
    thread.start()
    with pytest.raises(Interrupt), alarm(0.02):
        thread.join(SOON)
    assert thread.is_alive()
    before = time.monotonic()
    thread.join(0.02)
    assert time.monotonic() - before >= 0.02, "it is waited for again"
    gate.open()
    joined(thread)


@needs_signals
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="3.13 has mended it")
def test_it_does_make_a_thread_dead_that_is_not_ours() -> None:
    gate = Gate()
    thread = threading.Thread(target=gate, daemon=True)
    thread.start()
    with pytest.raises(Interrupt), alarm(0.02):
        thread.join(SOON)
    assert not thread.is_alive() and thread in threading.enumerate()
    gate.open()
    until(lambda: thread not in threading.enumerate())


@each_step
def test_wherever_an_interrupt_strikes_who_asks_for_a_thread_it_is_alive_until_it_ends() -> None:
    def ask() -> None:
        thread.is_alive()
        thread.join(0.002)

    gate = Gate()
    thread = own_thread("mine", gate)
    thread.start()
    for where in every_step(ask, everywhere=True):
        assert thread.is_alive(), where
    gate.open()
    joined(thread)
    for where in every_step(ask, everywhere=True):
        assert not thread.is_alive(), where


def test_the_end_of_a_thread_that_died_before_its_first_step_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thread = own_thread("mine", int)
    with monkeypatch.context() as patched:
        patched.setattr(type(thread), "run", lambda self: None)
        thread.start()
        until(lambda: not thread.is_alive())
    joined(thread)


def test_a_thread_cannot_be_waited_for_before_its_start_nor_by_itself() -> None:
    thread = own_thread("mine", lambda: refused.append(pytest.raises(RuntimeError, thread.join)))
    refused: list[object] = []
    assert not thread.is_alive()
    with pytest.raises(RuntimeError):
        thread.join()
    thread.start()
    joined(thread)
    assert len(refused) == 1


INHERITED = """
import contextvars, faulthandler, sys, threading, time
from bgworker import Scheduler, StreamEvent, current_task

faulthandler.dump_traceback_later(50, exit=True)
variable = contextvars.ContextVar("variable", default="empty")
seen = {}

def look(where):
    seen.setdefault(where, set()).add((variable.get(), bool(current_task().id)))
    print("from", where)

class Talking:
    def __init__(self, where):
        self.where = where
    def write(self, events):
        look(self.where)
    def close(self):
        pass

def outer():
    variable.set("the task's")
    with Scheduler(2, sinks=[Talking("sink")], initializer=look, initargs=["initializer"]) as inner:
        inner.register_sink(Talking("later sink"))
        subscription = inner.subscribe(lambda event: look("subscription"))
        inner.options(timeout=0.01).submit(current_task().sleep, 60).wait()
        inner.submit(int).result()
        inner.flush()
        while len(seen) < 4:
            time.sleep(0.001)

with Scheduler(1, capture_output=True) as pool:
    task = pool.submit(outer)
    task.result()
said = [event.payload for event in task.streams() if isinstance(event, StreamEvent)]
print(sorted(seen.items()), said)
"""


def test_no_thread_that_a_task_starts_takes_the_tasks_context_for_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "thread_inherit_context=1", "-W", "error", "-c", INHERITED],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    bare = {("empty", False)}
    wheres = ["initializer", "later sink", "sink", "subscription"]
    assert done.stdout.splitlines()[-1] == f"{[(each, bare) for each in wheres]} []"

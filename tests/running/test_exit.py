"""The end of a process: what was queued still runs, what was said is in the file, and nobody keeps
the interpreter alive."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.support import environment

LONG = 60.0

BEGIN = """\
import atexit, os, sys, threading, time
from bgworker import Scheduler, ShutdownError, current_task
"""


def run(tmp_path: Path, program: str, *, code: int = 0) -> tuple[str, str, list[dict[str, Any]]]:
    """Run a script to its end; return what it printed, on both streams, and the events of its JSONL
    sink."""
    script, record = tmp_path / "script.py", tmp_path / "debug.jsonl"
    script.write_text(BEGIN + textwrap.dedent(program), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        timeout=LONG,
        env=environment(BGWORKER_SINKS=f"jsonl:{record}"),
        cwd=tmp_path,
    )
    assert done.returncode == code, done.stderr
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    return done.stdout, done.stderr, [json.loads(line) for line in lines]


def ends(events: list[dict[str, Any]]) -> Counter[str]:
    """Count the terminal events, having checked that each task has one, as its last, and no number
    missing."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_task.setdefault(event["task_id"], []).append(event)
    terminal = ("TaskCompleted", "TaskFailed", "TaskCancelled", "TaskTimedOut")
    for of_task in by_task.values():
        assert [event["seq"] for event in of_task] == list(range(1, len(of_task) + 1))
        assert [event["type"] in terminal for event in of_task] == [False] * (len(of_task) - 1) + [
            True
        ]
    return Counter(of_task[-1]["type"] for of_task in by_task.values())


QUEUE = """
def work(n):
    time.sleep(0.01)
    current_task().output(n)

pool = Scheduler(2)
for n in range(20):
    pool.submit(work, n)
"""


@pytest.mark.parametrize(("ending", "code", "complaint"), [
    ("", 0, ""), ("sys.exit(3)", 3, ""), ("raise ValueError('uncaught')", 1, "uncaught"),
    ("threading.Thread(target=lambda: time.sleep(0.3)).start()", 0, ""), ("del pool", 0, ""),
    ("pool.shutdown(wait=False)", 0, "")])
def test_however_a_script_ends_its_queued_tasks_finish_and_the_record_is_complete(
    tmp_path: Path, ending: str, code: int, complaint: str
) -> None:
    _, errors, events = run(tmp_path, QUEUE + ending, code=code)
    assert ends(events) == {"TaskCompleted": 20} and (
        complaint in errors if complaint else errors == ""
    )
    assert sorted(
        int(event["payload"]) for event in events if event["type"] == "TaskOutput"
    ) == list(range(20))


def test_a_timed_out_task_that_never_looks_keeps_nobody_alive(tmp_path: Path) -> None:
    _, errors, events = run(tmp_path, """
        pool = Scheduler(2)
        task = pool.options(timeout=0.1).submit(time.sleep, 1000)
        task.wait(30)
        pool.submit(len, "")
    """)
    assert ends(events) == {"TaskTimedOut": 1, "TaskCompleted": 1} and errors == ""


def test_a_task_whose_time_is_over_only_during_the_exit_keeps_nobody_alive_either(
    tmp_path: Path,
) -> None:
    _, _, events = run(tmp_path, """
        started = threading.Event()
        pool = Scheduler(2)
        pool.options(timeout=0.5).submit(lambda: (started.set(), time.sleep(1000)))
        started.wait(30)
        pool.submit(len, "")
    """)
    assert ends(events) == {"TaskTimedOut": 1, "TaskCompleted": 1}


def test_a_task_with_a_timeout_that_starts_only_during_the_exit_times_out(tmp_path: Path) -> None:
    _, _, events = run(tmp_path, """
        pool = Scheduler(1)
        pool.submit(time.sleep, 0.3)
        pool.options(timeout=0.1).submit(time.sleep, 1000)
    """)
    assert ends(events) == {"TaskTimedOut": 1, "TaskCompleted": 1}


def test_what_waits_behind_the_only_worker_that_is_stuck_at_exit_runs_or_is_cancelled_but_ends(
    tmp_path: Path,
) -> None:
    _, _, events = run(tmp_path, """
        started = threading.Event()
        pool = Scheduler(1)
        pool.options(timeout=0.3).submit(lambda: (started.set(), time.sleep(1000)))
        started.wait(30)
        for _ in range(3):
            pool.submit(len, "")
    """)
    # an interpreter that exits may start no worker in place of the stuck one (3.12)
    assert ends(events) in (
        {"TaskTimedOut": 1, "TaskCompleted": 3},
        {"TaskTimedOut": 1, "TaskCancelled": 3},
    )


def test_a_task_given_up_by_a_shutdown_keeps_nobody_alive(tmp_path: Path) -> None:
    _, _, events = run(tmp_path, """
        pool = Scheduler(1)
        started = threading.Event()
        pool.submit(lambda: (started.set(), time.sleep(1000)))
        started.wait(30)
        pool.shutdown(timeout=0.3)
    """)
    assert [event["type"] for event in events] == ["TaskCreated", "TaskScheduled", "TaskStarted"]


def test_submit_at_exit_is_a_runtime_error(tmp_path: Path) -> None:
    output, _, events = run(tmp_path, """
        pool = Scheduler(1)
        pool.submit(len, "").result(30)

        @atexit.register
        def late():
            for use in (lambda: pool.submit(len, ""), lambda: Scheduler(1)):
                try:
                    use()
                except RuntimeError as error:
                    print(type(error).__name__)
    """)
    assert output.split() == ["ShutdownError", "ShutdownError"] and ends(events) == {
        "TaskCompleted": 1
    }


def test_a_task_that_submits_another_during_the_exit_gets_a_runtime_error_and_ends(
    tmp_path: Path,
) -> None:
    output, _, events = run(tmp_path, """
        pool = Scheduler(1)

        def work():
            time.sleep(0.3)
            try:
                pool.submit(len, "")
            except RuntimeError as error:
                print(type(error).__name__)

        pool.submit(work)
    """)
    assert output.split() == ["ShutdownError"] and ends(events) == {"TaskCompleted": 1}


def test_a_scheduler_that_was_shut_down_or_never_used_costs_the_exit_nothing(
    tmp_path: Path,
) -> None:
    _, errors, events = run(tmp_path, """
        unused = Scheduler(1)
        with Scheduler(1) as pool:
            pool.submit(len, "")
    """)
    assert ends(events) == {"TaskCompleted": 1} and errors == ""


def test_what_is_said_during_atexit_by_a_task_that_is_over_harms_nobody(tmp_path: Path) -> None:
    output, errors, _ = run(tmp_path, """
        pool = Scheduler(1)
        context = pool.submit(current_task).result(30)
        atexit.register(lambda: (context.output("late"), context.progress(5), print("said")))
    """)
    assert output.split() == ["said"] and errors == ""


def test_a_task_around_one_that_timed_out_is_waited_for_at_exit(tmp_path: Path) -> None:
    _, errors, events = run(tmp_path, """
        pool = Scheduler(1)
        started = threading.Event()

        def outer():
            try:
                inner = pool.options(timeout=0.1).submit(time.sleep, 0.3)
                started.set()  # from here on the exit takes no more tasks
                inner.result()
            except Exception as error:
                current_task().output(type(error).__name__)
            time.sleep(0.3)
            current_task().output("the end")

        pool.submit(outer)
        started.wait(30)
    """)
    assert ends(events) == {"TaskCompleted": 1, "TaskTimedOut": 1} and errors == ""
    assert [event["payload"] for event in events if event["type"] == "TaskOutput"] == [
        "TaskTimedOut",
        "the end",
    ]


def test_threads_that_die_before_their_first_task_keep_nobody_alive(tmp_path: Path) -> None:
    _, _, events = run(
        tmp_path,
        """
        pool = Scheduler(1, name="mortal")
        pool.flush(30)
        alive = threading.Thread.run
        threading.Thread.run = lambda thread: (
            None if thread.name.startswith("mortal_") else alive(thread))
        pool.submit(len, "")
    """,
    )
    assert ends(events) in ({"TaskFailed": 1}, {"TaskCancelled": 1})

"""``bgworker cancel``, from another process than that which runs the tasks: what it stops, and what
it says of that which it cannot stop."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bgworker import Scheduler, SqliteSink, TaskStatus, current_task
from bgworker.cli import cancel, main
from bgworker.history import requests, schema
from bgworker.history.presencelock import PresenceLock
from bgworker.history.presence import byte_of
from bgworker.model.ids import new_id
from tests.histories import Recorder, run_cli
from tests.support import SOON, Gate, environment, in_child, needs_fork, until

REQUESTS = "SELECT task_id, seen_utc IS NOT NULL FROM zz_requests"

WRITER = """
import sys, threading, time
from bgworker import Scheduler, current_task
def talk():
    for number in range(20):
        current_task().output(f"line {number}")
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
with Scheduler(2, sinks=["sqlite:" + sys.argv[1]]) as pool:
    while not stop.is_set():
        for task in [pool.submit(talk) for _ in range(20)]:
            task.result(30)
        time.sleep(0.05)  # else more is said than can be stored
"""

PROGRAM = """
import sys, threading, time
from bgworker import Scheduler, checkpoint
release = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), release.set()), daemon=True).start()
def heeds():
    while True:
        time.sleep(0.001)
        checkpoint()
def heeds_late():
    release.wait(60)
    checkpoint()
def heeds_never():
    release.wait(60)
with Scheduler(1, sinks=["sqlite:" + sys.argv[1]]) as pool:
    if "deaf" not in sys.argv:
        pool.listen(sys.argv[1])
    for name in sys.argv[2].split(","):
        pool.options(name=name).submit(globals()[name])
"""


@contextlib.contextmanager
def program(*words: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a Python program until its stdin is closed, at the end."""
    process = subprocess.Popen([sys.executable, "-c", *words], cwd=cwd, env=environment(),
                               stdin=subprocess.PIPE, text=True)
    try:
        yield process
        process.communicate(timeout=SOON)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def running(*commands: str, cwd: Path, jobs: int = 1) -> Iterator[subprocess.Popen[str]]:
    """Have commands run by ``bgworker run``; ends with it."""
    (cwd / "commands.txt").write_text("".join(f"{command}\n" for command in commands))
    process = subprocess.Popen(
        [sys.executable, "-m", "bgworker", "run", "-j", str(jobs), "-f", "commands.txt"], cwd=cwd,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=SOON)


def seen(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """Return what a reader finds who leaves no trace; nothing while there is no such table."""
    with contextlib.suppress(sqlite3.OperationalError):
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
            return reader.execute(sql).fetchall()
    return []


def wait_for(path: Path, name: str, status: str = "running") -> str:
    """Return the id of a task as soon as the history shows it with a status."""
    sql = f"SELECT id FROM tasks WHERE name LIKE '{name}' AND status = '{status}'"
    until(lambda: seen(path, sql))
    return str(seen(path, sql)[0][0])


def record_of(path: Path, name: str) -> tuple[Any, ...]:
    sql = f"SELECT status, failure_message FROM tasks WHERE name LIKE '{name}'"
    return tuple(seen(path, sql)[0])


def alive(mark: str) -> list[str]:
    """Return the processes whose command lines hold a mark."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            if entry.name.isdigit() and mark in words and (entry / "exe").exists():
                found.append(words)
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "bgworker.db"


# ---------------------------------------------------------------- what it stops

@pytest.fixture
def besieged(tmp_path: Path) -> Iterator[Path]:
    """A history to which four processes write all the time."""
    path = tmp_path / "bgworker.db"
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(program(WRITER, str(path), cwd=tmp_path))
        until(lambda: len(seen(path, "SELECT 1 FROM runs")) >= 4)
        yield path
        before = seen(path, "SELECT count(*) FROM tasks")
        until(lambda: seen(path, "SELECT count(*) FROM tasks") > before)  # they still write
    assert seen(path, REQUESTS) == []
    assert seen(path, "PRAGMA integrity_check") == [("ok",)]
    others = seen(path, "SELECT DISTINCT status FROM tasks WHERE name LIKE '%talk%'")
    assert others == [("completed",)]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_commands_whole_tree_is_stopped_while_four_processes_write(besieged: Path) -> None:
    mark = f"{4000 + os.getpid() % 1000}.{time.time_ns() % 10**9}"
    stubborn = f"trap '' TERM; sleep {mark}1 & while :; do wait; done"
    command = (f'sleep {mark}2 & sh -c "sleep {mark}3 & wait" & setsid sleep {mark}4 & '
               f'setsid sh -c "sleep {mark}5 & wait" & sh -c "{stubborn}" & sleep {mark}6; echo')
    with running(command, cwd=besieged.parent) as run:
        until(lambda: len({words.split("\0")[1] for words in alive(mark)
                           if words.startswith("sleep")}) == 6)
        task_id = wait_for(besieged, f"sleep {mark}2%")
        done = run_cli("cancel", task_id[-8:], cwd=besieged.parent)
        assert (done.returncode, done.stderr) == (0, "") and alive(mark) == []
        assert done.stdout.startswith(f"{task_id[-8:]} sleep {mark}2 & sh -c")
        assert ": cancelled after " in done.stdout and done.stdout.count("\n") == 1
        out, err = run.communicate(timeout=SOON)
        assert run.returncode == 1 and "cancelled (asked by bgworker cancel)" in err
    assert record_of(besieged, f"sleep {mark}2%") == (
        "cancelled", "asked by bgworker cancel")


def test_python_at_its_checkpoint_is_stopped_and_what_waits_while_four_processes_write(
        besieged: Path) -> None:
    with program(PROGRAM, str(besieged), "heeds,heeds_late", cwd=besieged.parent):
        first = wait_for(besieged, "heeds")
        second = wait_for(besieged, "heeds_late", "scheduled")
        done = run_cli("cancel", "heeds_late", "--reason", "not tonight", cwd=besieged.parent)
        assert (done.returncode, done.stdout, done.stderr) == (
            0, f"{second[-8:]} heeds_late: cancelled before it started\n", "")
        done = run_cli("cancel", "heeds", "--json", cwd=besieged.parent)
        assert done.returncode == 0 and done.stderr == ""
        (task,) = (answer := json.loads(done.stdout)).pop("tasks")
        assert answer == {"v": 1} and task.pop("message").startswith("cancelled after ")
        assert task == {"task_id": first, "name": "heeds", "outcome": "cancelled"}
    assert record_of(besieged, "heeds_late") == ("cancelled", "not tonight")
    assert record_of(besieged, "heeds") == ("cancelled", cancel.REASON)


def test_all_stops_what_runs_and_waits_in_every_process_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "bgworker.db"
    commands = [f"sleep 100{number}" for number in range(5)]
    with running("true", *commands, cwd=tmp_path, jobs=2) as run:
        with program(PROGRAM, str(path), "heeds,heeds", cwd=tmp_path):
            wait_for(path, "sleep 1001")
            wait_for(path, "heeds")
            done = run_cli("cancel", "--all", cwd=tmp_path)
            assert (done.returncode, done.stderr) == (0, "")
            lines = [line.partition(" ")[2] for line in done.stdout.splitlines()]
            assert sorted(line.partition(":")[0] for line in lines) == ["heeds"] * 2 + commands
            assert sum("cancelled before it started" in line for line in lines) == 4
        run.communicate(timeout=SOON)
        assert run.returncode == 1
    counts = dict(seen(path, "SELECT status, count(*) FROM tasks GROUP BY status"))
    assert counts == {"completed": 1, "cancelled": 7}
    done = run_cli("cancel", "--all", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "no task waits or runs\n", "")


def test_all_of_a_run_leaves_the_others_alone(
        here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sinks = [SqliteSink(here) for _ in range(2)]
    with Scheduler(1, sinks=sinks[:1]) as old, Scheduler(1, sinks=sinks[1:]) as new:
        for pool in (old, new):
            pool.listen(here)
        others = old.submit(lambda: current_task().sleep(1000))
        tasks = [new.submit(lambda: current_task().sleep(1000)) for _ in range(3)]
        assert old.flush(SOON) and new.flush(SOON)
        assert main(["cancel", "--all", "--run", "last"]) == 0
        assert all(task.cancelled() for task in tasks) and not others.cancel_requested
        assert main(["cancel", "--all", "--run", new.run_id]) == 0
        out, err = capfd.readouterr()
        assert err == "" and out.endswith("no task waits or runs\n") and out.count("\n") == 4
        assert main(["cancel", "--all", "--run", "no such"]) == 2
        assert "argument --run: expected" in capfd.readouterr().err
        assert main(["cancel", "last", "--run", old.run_id]) == 0 and others.cancelled()


@pytest.mark.skipif(os.name == "nt", reason="POSIX commands")
def test_a_command_that_was_cancelled_is_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "bgworker.db"
    run = subprocess.Popen(
        [sys.executable, "-m", "bgworker", "run", "--retries", "3", "--name", "tried", "--", "sh",
         "-c", "echo once >>tries; sleep 1000"], cwd=tmp_path, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(path, "tried")
    until((tmp_path / "tries").exists)
    assert run_cli("cancel", "tried", cwd=tmp_path).returncode == 0
    run.communicate(timeout=SOON)
    assert (tmp_path / "tries").read_text() == "once\n"
    assert record_of(path, "tried") == ("cancelled", cancel.REASON)


def test_commands_are_named_by_their_numbers_each_once(tmp_path: Path) -> None:
    with running(*[f"sleep 200{number}" for number in range(1, 5)], cwd=tmp_path, jobs=4) as run:
        wait_for(tmp_path / "bgworker.db", "sleep 2004")
        done = run_cli("cancel", "3", "1", "sleep 2003", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.count("\n") == 2
        statuses = dict(seen(tmp_path / "bgworker.db", "SELECT name, status FROM tasks"))
        assert statuses == {"sleep 2001": "cancelled", "sleep 2002": "running",
                            "sleep 2003": "cancelled", "sleep 2004": "running"}
        assert run.poll() is None


# ---------------------------------------------------------------- what does not stop in time

def test_what_looks_at_nothing_is_told_after_the_timeout_and_the_request_stands(
        tmp_path: Path) -> None:
    path = tmp_path / "bgworker.db"
    with program(PROGRAM, str(path), "heeds_late", cwd=tmp_path):
        task_id = wait_for(path, "heeds_late")
        done = run_cli("cancel", "last", "--timeout", "1.5", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.match(  # on a busy machine the last look comes late
            rf"bgworker cancel: {task_id[-8:]} heeds_late: still runs after \d\.\ds; it was asked",
            done.stderr)
        assert seen(path, REQUESTS) == [(task_id, 1)]
    assert record_of(path, "heeds_late") == ("cancelled", cancel.REASON)
    assert seen(path, REQUESTS) == []


def test_what_ends_by_itself_before_it_looks_has_ended_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "bgworker.db"
    with program(PROGRAM, str(path), "heeds_never", cwd=tmp_path) as process:
        wait_for(path, "heeds_never")
        asking = subprocess.Popen([sys.executable, "-m", "bgworker", "cancel", "last", "--json"],
                                  cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
                                  text=True)
        until(lambda: [row[1] for row in seen(path, REQUESTS)] == [1])
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        out, _ = asking.communicate(timeout=SOON)
    (task,) = json.loads(out)["tasks"]
    assert asking.returncode == 0 and task["outcome"] == "ended"
    assert task["message"].startswith("completed in ")
    assert task["message"].endswith("before it was stopped")
    assert record_of(path, "heeds_never") == ("completed", None)


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_an_interrupt_ends_the_waiting_and_the_request_stands(tmp_path: Path) -> None:
    path = tmp_path / "bgworker.db"
    with program(PROGRAM, str(path), "heeds_late", cwd=tmp_path):
        wait_for(path, "heeds_late")
        asking = subprocess.Popen([sys.executable, "-m", "bgworker", "cancel", "last"],
                                  cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True)
        until(lambda: [row[1] for row in seen(path, REQUESTS)] == [1])
        asking.send_signal(signal.SIGINT)
        out, err = asking.communicate(timeout=SOON)
        assert (asking.returncode, out) == (130, "")
        assert err == ("bgworker cancel: interrupted: 1 task has not ended yet; what was asked "
                       "stands\n")
        assert len(seen(path, REQUESTS)) == 1
    assert record_of(path, "heeds_late") == ("cancelled", cancel.REASON)


# ---------------------------------------------------------------- what it refuses

def refused(capfd: pytest.CaptureFixture[str], *words: str, code: int = 1) -> str:
    assert main(["cancel", *words]) == code
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    assert seen(Path("bgworker.db"), REQUESTS) == []
    return err


def test_what_has_ended_is_refused_with_how_and_when(
        record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    run = record.run(host=schema.this_host())
    record.task("done", run_id=run, took=3.0)
    record.task("cut off", "timed_out", run_id=run, took=60.0)
    said = refused(capfd, "done", "cut off").splitlines()
    assert said[0].endswith("done: it has ended: completed in 3.0s, 59m ago")
    assert said[1].endswith("cut off: it has ended: timed out after 1m00s, 59m ago")


def test_what_another_host_runs_is_refused_with_its_name(
        record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    record.task("far away", "running", run_id=record.run(host="elsewhere"))
    said = refused(capfd, "far away")
    assert "it runs on the host 'elsewhere', this is" in said and "cancel it there" in said


def test_what_this_machine_runs_under_its_former_name_is_asked(
        record: Recorder, capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel, "ANSWER", 0.3)
    run = record.run(new_id(5), host="laptop.at-home.example")
    record.task("moved", "running", run_id=run)
    lock = PresenceLock.share(schema.lock_path("bgworker.db"))
    offset = byte_of(run)
    assert offset is not None
    lock.hold(offset)
    try:
        assert "its process 4711 does not listen" in refused(capfd, "moved")
    finally:
        lock.release(offset)
        lock.leave()


def test_what_was_copied_here_is_refused(record: Recorder,
                                         capfd: pytest.CaptureFixture[str]) -> None:
    record.task("copied", "running", run_id=record.run())
    record.task("of no run", "running")
    assert "it was copied from another history" in refused(capfd, "copied")
    assert "it was copied from another history" in refused(capfd, "of no run")


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_what_died_with_its_process_is_refused_and_so_it_is_while_it_is_waited_for(
        tmp_path: Path) -> None:
    path = tmp_path / "bgworker.db"
    with contextlib.suppress(AssertionError), program(
            PROGRAM, str(path), "heeds_never", cwd=tmp_path) as process:
        wait_for(path, "heeds_never")
        asking = subprocess.Popen([sys.executable, "-m", "bgworker", "cancel", "last"],
                                  cwd=tmp_path, env=environment(), stderr=subprocess.PIPE,
                                  text=True)
        until(lambda: [row[1] for row in seen(path, REQUESTS)] == [1])
        process.kill()
        _, err = asking.communicate(timeout=SOON)
    assert asking.returncode == 1 and "heeds_never: its process has died meanwhile" in err
    done = run_cli("cancel", "last", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "heeds_never: it was interrupted: its process is gone" in done.stderr
    done = run_cli("cancel", "--all", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "no task waits or runs\n")


@pytest.mark.parametrize("timeout", ["60", "0.2"])
def test_who_does_not_listen_is_told_what_he_lacks_and_the_request_is_withdrawn(
        here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        timeout: str) -> None:
    monkeypatch.setattr(cancel, "ANSWER", 0.5)
    with Scheduler(1, sinks=[SqliteSink(here)]) as pool:
        gate = Gate()
        task = pool.options(name="deaf").submit(gate)
        assert pool.flush(SOON)
        said = refused(capfd, "deaf", "--timeout", timeout)
        assert f"deaf: its process {os.getpid()} does not listen, and the request is with" in said
        assert f"a program needs pool.listen('{here}')" in said
        assert not task.cancel_requested
        pool.listen(here)  # too late for that request
        time.sleep(1.2 * requests.LOOK_INTERVAL)
        assert not task.cancel_requested
        gate.open()
        # the twin: the same, where somebody listens
        other = pool.options(name="hears").submit(lambda: current_task().sleep(1000))
        assert pool.flush(SOON)
        assert main(["cancel", "hears"]) == 0 and other.cancelled()
        assert "hears: cancelled after" in capfd.readouterr().out
        assert task.status is TaskStatus.COMPLETED


@pytest.mark.skipif(os.name == "nt", reason="no SIGSTOP")
def test_who_listens_but_is_stopped_is_waited_for_and_then_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "bgworker.db"
    with program(PROGRAM, str(path), "heeds", cwd=tmp_path) as process:
        wait_for(path, "heeds")
        process.send_signal(signal.SIGSTOP)
        try:
            begun = time.monotonic()
            done = run_cli("cancel", "last", "--timeout", "3", cwd=tmp_path)
            assert time.monotonic() - begun >= 3 > cancel.ANSWER
            assert (done.returncode, done.stdout, seen(path, REQUESTS)) == (1, "", [])
            assert f"its process {process.pid} has not answered within 3." in done.stderr
            assert "it is stopped, or too busy" in done.stderr
            asking = subprocess.Popen([sys.executable, "-m", "bgworker", "cancel", "last"],
                                      cwd=tmp_path, env=environment(), stdout=subprocess.PIPE)
            time.sleep(cancel.ANSWER + 0.5)
            assert asking.poll() is None  # it listens, and may yet answer
        finally:
            process.send_signal(signal.SIGCONT)
        out, _ = asking.communicate(timeout=SOON)
        assert asking.returncode == 0 and b"heeds: cancelled after" in out


def test_one_that_cannot_be_asked_does_not_keep_the_others_from_it(
        here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Scheduler(2, sinks=[SqliteSink(here)]) as pool:
        pool.listen(here)
        pool.options(name="done").submit(len, "x").result(SOON)
        pool.options(name="runs").submit(lambda: current_task().sleep(1000))
        assert pool.flush(SOON)
        assert main(["cancel", "done", "runs"]) == 1
        out, err = capfd.readouterr()
        assert "done: it has ended: completed" in err and "runs: cancelled after" in out


def test_where_a_name_is_unknown_none_is_asked(
        here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Scheduler(2, sinks=[SqliteSink(here)]) as pool:
        pool.listen(here)
        gate = Gate()
        task = pool.options(name="runs").submit(gate)
        assert pool.flush(SOON)
        assert "there is no task 'nothing'" in refused(capfd, "runs", "nothing")
        assert not task.cancel_requested
        gate.open()


@pytest.mark.parametrize("words, told", [
    ([], "expected either TASK or --all, got neither; name tasks"),
    (["last", "--all"], "expected either TASK or --all, got both; name tasks"),
    (["last", "--timeout", "0"], "expected seconds > 0, or a duration such as 90s or 1h30m, got"),
    (["last", "--reason", " "], "expected 1 to 1,000 characters"),
    (["last", "--reason", "x" * 1001], "expected 1 to 1,000 characters, got 1,001"),
])
def test_a_command_line_that_is_wrong_is_refused(
        record: Recorder, capfd: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert told in refused(capfd, *words, code=2)


def test_a_history_of_an_older_bgworker_is_not_led_to_the_newest_version(
        here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(here) as old:
        for statement in schema.MADE[1]:
            old.execute(statement)
        old.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        old.execute("PRAGMA user_version = 2")
        old.execute("INSERT INTO runs (run_id, host) VALUES (?, ?)", ("a" * 32, schema.this_host()))
        old.execute("INSERT INTO tasks (id, run_id, name, status, created_utc, last_seq) "
                    "VALUES (?, ?, 'old', 'running', '', 1)", ("b" * 32, "a" * 32))
    old.close()
    assert main(["cancel", "old"]) == 2
    assert "an older bgworker, which cannot be asked" in capfd.readouterr().err
    assert seen(here, "PRAGMA user_version") == [(2,)]


@needs_fork
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs root, to be another user")
def test_who_may_not_write_to_the_history_is_told_so(
        here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Scheduler(1, sinks=[SqliteSink(here)]) as pool:
        pool.listen(here)
        gate = Gate()
        task = pool.options(name="not yours").submit(gate)
        assert pool.flush(SOON)
        for folder in (here.parent, *here.parent.parents[:2]):
            folder.chmod(0o755)
        for path in here.parent.iterdir():
            path.chmod(0o644)
        assert in_child(lambda: main(["cancel", "last"]), as_nobody=True) == "1"
        err = capfd.readouterr().err
        assert "cannot write a request to 'bgworker.db'" in err
        assert "see whether this user may write" in err and not task.cancel_requested
        gate.open()


def test_the_lines_of_untrusted_names_can_do_no_harm(
        here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Scheduler(1, sinks=[SqliteSink(here)]) as pool:
        pool.listen(here)
        pool.options(name="evil\x1b[2J\nname" + "x" * 100).submit(
            lambda: current_task().sleep(1000))
        assert pool.flush(SOON)
        assert main(["cancel", "last"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out and out.count("\n") == 1
    assert r"evil\x1b[2J\nname" in out and len(out) < 120

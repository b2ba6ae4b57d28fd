"""Runs whose process is dead: what the next writer records of them. (How a reader judges them:
test_reader.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Recorder, rows_of, text_of

from bgworker import History, Scheduler, current_task
from bgworker.history import presence, schema
from bgworker.history.retention import prune
from bgworker.history.sink import SqliteSink
from bgworker.model.ids import new_id
from tests.support import ROOT, needs_fork

KILLED = """
import os, signal, sys, threading
from bgworker import Scheduler, current_task
pool = Scheduler(2, sinks=["sqlite:" + sys.argv[1]])
pool.options(name="ended").submit(len, "x").result(30)
begun = threading.Event()
def run():
    current_task().output("the last sign")
    begun.set()
    threading.Event().wait()
pool.options(name="running").submit(run)
assert begun.wait(30) and pool.flush(30)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(path: str) -> None:
    """Leave the history of a process that was killed while a task of it ran."""
    done = subprocess.run([sys.executable, "-c", KILLED, path], timeout=60, cwd=ROOT)
    assert done.returncode == -9
    assert dict(rows_of(path, "SELECT name, status FROM tasks")) == {
        "ended": "completed", "running": "running"}


def open_and_close(path: str) -> None:
    sink = SqliteSink(path)
    sink.open()
    sink.close()


def statuses(path: str) -> dict[str, str]:
    return dict(rows_of(path, "SELECT name, status FROM tasks"))


@needs_fork
@pytest.mark.parametrize("write", [open_and_close, lambda path: prune(path, max_tasks=9)],
                         ids=["sink", "prune"])
def test_the_next_writer_records_that_tasks_of_a_dead_process_were_interrupted(path: str,
                                                                               write: Any) -> None:
    killed(path)
    record = Recorder(path)
    lives = record.task("lives", "running", run_id=record.run(new_id(1), host="another.example"))
    for task_id, in rows_of(path, "SELECT id FROM tasks"):
        record.insert("zz_requests", task_id=task_id, reason="user", created_utc="2026")
    record.close()
    with History(path) as history:
        before = history.tasks()
        assert sorted(task.status for task in history.tasks()) == [
            "completed", "interrupted", "running"]
        write(path)
        assert statuses(path) == {"ended": "completed", "running": "interrupted",
                                  "lives": "running"}
        assert rows_of(path, "SELECT task_id FROM zz_requests") == [(lives,)]
        assert history.tasks() == before, "a reader has known before"
        (run,) = [run for run in history.runs() if run.run_id == before[0].run_id]
        assert run.is_alive is False and run.ended_utc == max(task.started_utc for task in before)


@needs_fork
def test_what_lives_is_left_alone(path: str) -> None:
    """A run of another machine, a copied one, and one of this very process, which has closed its
    sink."""
    record = Recorder(path)
    for name, host in (("elsewhere", "another.example"), ("copied", None)):
        record.task(name, "running", run_id=record.run(new_id(len(name)), host=host))
    record.task("closed", "running", run_id=record.run(new_id(1), host="x", ended=record.now))
    record.close()
    with Scheduler(1, sinks=[SqliteSink(path)]) as pool:
        def change_sinks() -> None:
            assert pool.flush(30)
            pool.unregister_sink(next(iter(pool.sinks)))
            pool.register_sink(SqliteSink(path), name="again")
            current_task().output("still here")
            assert pool.flush(30)
            assert statuses(path) == {"elsewhere": "running", "copied": "running",
                                      "closed": "interrupted", "lives": "running"}

        pool.options(name="lives").submit(change_sinks).result(60)
    assert statuses(path)["lives"] == "completed"


@pytest.mark.parametrize("is_first", [False, True], ids=["ours", "of the first bgworker"])
def test_a_run_ended_with_the_last_that_is_known_of_it(path: str, is_first: bool) -> None:
    record = Recorder(path)
    run_id = record.run("0" * 31 + "7", host=schema.this_host())
    record.task("early", created=record.ago(hours=3), took=60.0, run_id=run_id)
    record.task("late", "running", created=record.ago(hours=2), run_id=run_id)
    note = 1 + int(run_id[-15:], 16) if is_first else presence.byte_of(run_id) or 0
    Path(schema.lock_path(path)).write_bytes(b"\n%x\n" % note)
    record.close()
    with History(path) as history:
        assert history.task("late").status == "interrupted"
    open_and_close(path)
    assert rows_of(path, "SELECT ended_utc FROM runs") == [(text_of(record.ago(hours=2)),)]
    assert statuses(path) == {"early": "completed", "late": "interrupted"}

"""``bgworker watch``: on a terminal a table of what others do, elsewhere a line for each change."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.histories import RUN, Recorder

from bgworker import History
from bgworker.cli.text import Surface, width_of
from bgworker.cli.watch import lines_of
from bgworker.history.schema import this_host
from tests.support import environment
from tests.terminal import Emulator, on_terminal

WAIT = 30.0
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals and terminals of POSIX")


@contextlib.contextmanager
def watching(cwd: Path, *words: str) -> Iterator[Any]:
    """Watch in another process; yields its output."""
    with subprocess.Popen(
        [sys.executable, "-m", "bgworker", "watch", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(PYTHONUTF8="1"),
    ) as process:
        try:
            yield process.stdout
        finally:
            process.kill()


def cells(line: str) -> list[str]:
    """Return name and status."""
    return re.split("  +", line)[1:3]


# ---------------------------------------------------------------- the table

def test_the_table_has_what_runs_then_what_ended_last_and_the_counts(record: Recorder) -> None:
    record.task("old", created=record.ago(hours=5))
    record.task(
        "runs",
        "running",
        created=record.ago(minutes=2),
        last_progress_pct=40.0,
        last_progress_msg="row 4",
    )
    record.task("ended", "failed", created=record.ago(minutes=1), failure_type="E")
    record.task("waits", "scheduled")
    with History(record.path) as history:
        lines = lines_of(history, Surface(100, 24))
        assert [line.split()[1] for line in lines[:-1]] == ["NAME", "runs", "ended", "old"]
        assert "40%" in lines[1] and "row 4" in lines[1]
        assert lines[-1] == "1 running, 1 waiting, 1 completed, 1 failed"
        assert [line.split()[1] for line in lines_of(history, Surface(100, 4))] == [
            "NAME",
            "runs",
            "running,",
        ]


def test_an_empty_history_has_a_table_too(record: Recorder) -> None:
    with History(record.path) as history:
        assert lines_of(history, Surface(80, 24))[1:] == ["no tasks yet"]


@pytest.mark.parametrize("size", [(20, 1), (40, 3), (80, 24), (300, 100)])
def test_the_table_fits_terminals_of_any_size(record: Recorder, size: tuple[int, int]) -> None:
    for number in range(120):
        record.task(
            "日本" * 50, "running" if number % 2 else "completed", last_progress_msg="m" * 500
        )
    with History(record.path) as history:
        lines = lines_of(history, Surface(*size))
    assert len(lines) <= max(3, size[1] - 1)
    assert max(map(width_of, lines)) <= size[0]


# ---------------------------------------------------------------- on a terminal


@POSIX
def test_on_a_terminal_the_table_follows_the_file_until_ctrl_c(
    record: Recorder, tmp_path: Path
) -> None:
    task_id = record.task("evil\x1b]0;title\x07\u202e", "running", last_progress_pct=10.0,
                          last_progress_msg="\x1b[2Jfirst")
    steps: list[str] = []

    def act(pid: int, sent: str) -> None:
        if not steps and r"\x1b[2Jfirst" in sent:
            record.connection.execute(
                "UPDATE tasks SET last_progress_pct = 60.0, last_progress_msg = 'second'"
            )
            steps.append("moved")
        elif steps == ["moved"] and "second" in sent:
            record.end(task_id)
            steps.append("ended")
        elif steps == ["moved", "ended"] and "1 completed" in sent:
            os.kill(pid, signal.SIGINT)
            steps.append("interrupted")

    code, sent = on_terminal("watch", cwd=tmp_path, act=act)
    assert (code, steps) == (130, ["moved", "ended", "interrupted"])
    terminal = Emulator(100, 12)
    terminal.feed(sent)
    assert terminal.is_cursor_visible
    assert [line.split()[0] for line in terminal.lines if line] == ["ID", task_id[-8:], "1"]
    assert terminal.lines[-1] == "" and terminal.lines[-2] == "1 completed"
    assert r"evil\x1b]0;title\x07" in terminal.lines[1] and "second" in terminal.lines[1]
    assert "\x1b]" not in sent and "\x07" not in sent and "\u202e" not in sent


@POSIX
def test_on_a_dumb_terminal_changes_are_printed(record: Recorder, tmp_path: Path) -> None:
    task_id = record.task("job", "running")
    interrupted: list[int] = []

    def act(pid: int, sent: str) -> None:
        if "running" in sent and "completed" not in sent:
            record.end(task_id)
        elif "completed" in sent and not interrupted:
            interrupted.append(pid)  # a second one would end it while it ends
            os.kill(pid, signal.SIGINT)

    code, sent = on_terminal("watch", cwd=tmp_path, act=act, TERM="dumb")
    assert code == 130 and "\x1b" not in sent
    assert [line.split()[2] for line in sent.splitlines()] == ["running", "completed"]


# ---------------------------------------------------------------- elsewhere


def test_without_a_terminal_a_line_is_printed_for_each_change(
    record: Recorder, tmp_path: Path
) -> None:
    record.task("long ago", created=record.ago(days=1))
    record.task("runs already", "running")
    with watching(tmp_path) as output:
        assert cells(output.readline()) == ["runs already", "running"]
        quick = record.task("quick", created=record.now)
        assert cells(output.readline()) == ["quick", "completed"]
        # which is no news
        record.connection.execute("UPDATE tasks SET last_progress_pct = 1.0 WHERE id = ?", (quick,))
        record.end(record.task("starts", "running"), "failed")
        assert "starts" in (line := output.readline())
        if "running" in line:  # seen between the two
            line = output.readline()
        assert cells(line) == ["starts", "failed"]


def test_the_json_has_a_task_a_line(record: Recorder, tmp_path: Path) -> None:
    task_id = record.task("job", "running")
    with watching(tmp_path, "--json") as output:
        first = json.loads(output.readline())
        record.end(task_id)
        second = json.loads(output.readline())
    assert list(first) == ["v", "task"] and first["v"] == 1
    assert [each["task"]["status"] for each in (first, second)] == ["running", "completed"]
    assert first["task"]["task_id"] == second["task"]["task_id"] == task_id


def test_that_a_process_died_is_noticed_though_nothing_is_written(
    record: Recorder, tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom bgworker.history import presence, schema\n"
        "from bgworker.history.presencelock import PresenceLock\n"
        "lock = PresenceLock.share(schema.lock_path('bgworker.db'))\n"
        "lock.hold(presence.byte_of(sys.argv[1]))\nprint(flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, RUN],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        record.task("job", "running", run_id=record.run(host=this_host()))
        with watching(tmp_path) as output:
            assert cells(output.readline()) == ["job", "running"]
            process.kill()
            assert process.wait(WAIT) is not None
            assert cells(output.readline()) == ["job", "interrupted"]

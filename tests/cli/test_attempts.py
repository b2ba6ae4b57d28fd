"""``--retries`` and ``--timeout`` of ``bgworker run``: real commands, and what is recorded of
them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bgworker import History
from bgworker.cli import main
from bgworker.cli.attempts import SHORTEST, TimeLimit, pause_after
from bgworker.model import wire
from tests.histories import run_cli

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the commands are those of POSIX")

FLAKY = 'echo x >>tries; test "$(wc -l <tries)" -ge {}'
"""Completes at an attempt whose number is to be filled in."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tasks() -> list[Any]:
    with History("bgworker.db") as history:
        return sorted(history.tasks(limit=None), key=lambda task: task.task_id)


def said(stream: str) -> list[str]:
    with History("bgworker.db") as history:
        return [event.payload for event in history.streams("last", types=[stream])]


# ---------------------------------------------------------------- retries


@pytest.mark.parametrize("most, code, attempts", [("1", 1, 1), ("2", 1, 2), ("3", 0, 3),
                                                  ("9", 0, 3), ("0", 0, 3)])
def test_a_command_is_tried_so_often_at_most_and_is_one_task(
    folder: Path, most: str, code: int, attempts: int
) -> None:
    assert main(["run", "--retries", most, "--", "sh", "-c", FLAKY.format(3)]) == code
    assert Path("tries").read_text() == "x\n" * attempts
    [task] = tasks()
    assert task.status == ("failed" if code else "completed")
    of = "" if most == "0" else f" of {most}"
    told = [re.sub(r"after [\d.]+m?s", "after a while", line) for line in said("warning")]
    assert told == [f"bgworker: attempt {number}{of} failed (exit code 1) after a while; trying "
                    "again" for number in range(1, attempts)]
    assert task.last_progress_message == (f"attempt {attempts}{of}" if attempts > 1 else None)


def test_the_exit_code_and_the_failure_are_those_of_the_last_attempt(folder: Path) -> None:
    script = "echo x >>tries; exit $(wc -l <tries)"
    assert main(["run", "--retries", "3", "--", "sh", "-c", script]) == 3
    [task] = tasks()
    assert "exit status 3" in task.failure_message


@pytest.mark.parametrize("script, how", [("kill -9 $$", "failed (SIGKILL)"),
                                         ("kill -40 $$", "failed (signal 40)")])
def test_a_signal_is_a_failure_that_is_tried_again(folder: Path, script: str, how: str) -> None:
    assert main(["run", "--retries", "2", "--", "sh", "-c", script]) > 128
    assert f"attempt 1 of 2 {how} after" in said("warning")[0]


def test_what_cannot_be_started_is_tried_again_too(folder: Path) -> None:
    assert main(["run", "--retries", "2", "--", "./nosuch"]) == 127
    assert "attempt 1 of 2 failed (there is no such program" in said("warning")[0]


def test_from_the_fourth_attempt_on_pauses_grow_to_ten_seconds() -> None:
    pauses = [pause_after(number) for number in range(1, 12)]
    assert pauses == [0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]
    assert pause_after(10**9) == 10


def test_what_fails_at_once_is_not_tried_a_thousand_times_and_a_stop_ends_its_pause(
        folder: Path) -> None:
    commands = ["echo x >>tries; exit 1", "sleep 1.5"]
    assert main(["run", "-j2", "--retries", "0", "--halt", "now,success=1", ":::", *commands]) == 0
    assert 2 <= len(Path("tries").read_text().split()) <= 6, "0.1 + 0.2 + 0.4 + 0.8 = 1.5"
    failing, _ = tasks()
    assert failing.status == "cancelled"
    with History("bgworker.db") as history:
        told = [event.payload for event in history.streams(failing.task_id, types=["warning"])]
    ends = [line.rpartition("trying again")[2] for line in told]
    assert ends == ["", "", " in 100ms", " in 200ms", " in 400ms", " in 800ms"][:len(told)]


def test_a_cancel_ends_the_attempts(folder: Path) -> None:
    done = run_cli("run", "-j2", "--fail-fast", "--retries", "2", ":::",
                   "until [ -e late ]; do sleep 0.02; done; exit 5",
                   "echo x >>tries; touch late; exec sleep 100", cwd=folder)
    assert done.returncode == 1
    assert Path("tries").read_text() == "x\n"
    assert [task.status for task in tasks()] == ["failed", "cancelled"]


# ---------------------------------------------------------------- time


def test_each_attempt_has_its_own_time(folder: Path) -> None:
    script = 'echo x >>tries; test "$(wc -l <tries)" -ge 3 || exec sleep 100; sleep 0.7'
    assert main(["run", "--retries", "3", "--timeout", "1", "--", "sh", "-c", script]) == 0
    [task] = tasks()
    assert (task.status, task.timeout) == ("completed", 1.0)
    assert task.duration > 2.5
    assert ["timed out after 1.0s" in line for line in said("warning")] == [True, True]


def test_a_command_whose_last_attempt_runs_too_long_timed_out(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "trap 'echo asked; exit 0' TERM; echo x >>tries; while :; do sleep 0.05; done"
    words = ["run", "--retries", "2", "--timeout", "0.5", "--jsonl", "e.jsonl", "--", "sh", "-c",
             script]
    assert main(words) == 124
    [task] = tasks()
    assert (task.status, task.timeout) == ("timed_out", 0.5)
    assert task.failure_message == "ran longer than its timeout of 0.5 s"
    assert "Traceback" not in (task.invocation_info or "")
    assert said("output") == ["asked", "asked"], "what it said when its time was over is kept"
    events = [wire.decode(line) for line in Path("e.jsonl").read_bytes().splitlines()]
    assert events[-1].type == "TaskTimedOut"
    assert "run: timed out after 1." in capfd.readouterr().err


def test_what_ignores_the_end_of_its_time_is_killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bgworker.shell import child
    monkeypatch.setattr(child, "KILL_AFTER", 0.3)
    script = "trap '' TERM; while :; do sleep 0.05; done"
    assert main(["run", "--timeout", "0.3", "--", "sh", "-c", script]) == 124
    assert tasks()[0].duration > 0.6


# ---------------------------------------------------------------- a share of the median


def test_a_share_is_one_of_the_earlier_runs_of_the_command(folder: Path) -> None:
    quick = ["--", "sh", "-c", "if [ -e slow ]; then exec sleep 100; fi; sleep 0.5"]
    for _ in range(3):
        assert main(["run", *quick]) == 0
    Path("slow").touch()
    assert main(["run", "--timeout", "300%", *quick]) == 124
    last = tasks()[-1]
    assert last.status == "timed_out" and 1.5 <= last.timeout <= 3.0
    assert main(["run", "--timeout", "1.5", *quick]) == 124, "nothing of this is a run that counts"
    assert main(["run", "--timeout", "300%", *quick]) == 124
    assert tasks()[-1].timeout == last.timeout


def test_without_earlier_runs_it_is_one_of_this_run_and_none_until_one_completed(
    folder: Path
) -> None:
    commands = ["exit 1", "sleep 100", "exec sleep 0.6", "exit 2"]
    words = ["--timeout", "250%", "-j", "2", "--jsonl", "e.jsonl"]
    assert main(["run", *words, ":::", *commands]) == 1
    found = tasks()
    assert [task.status for task in found] == ["failed", "timed_out", "completed", "failed"]
    assert found[0].timeout is None, "nothing had completed"
    assert 1.5 <= found[1].timeout <= 3.0
    assert found[2].timeout is None
    assert found[3].timeout is None or found[3].timeout >= 1.5
    ends = {event.task.name: event.task for line in Path("e.jsonl").read_bytes().splitlines()
            if (event := wire.decode(line)).type.is_terminal}  # type: ignore[union-attr]
    assert [ends[name].timeout for name in commands] == [task.timeout for task in found]


def test_a_limit_that_a_command_got_late_is_recorded_though_it_completed(folder: Path) -> None:
    slow = "until [ -e quick ]; do sleep 0.02; done; sleep 1.5"
    words = ["--timeout", "90000%", "-j", "2", "--jsonl", "e.jsonl"]
    assert main(["run", *words, ":::", slow, "touch quick"]) == 0
    first = tasks()[0]
    assert first.status == "completed" and first.timeout is not None
    ends = [event.task for line in Path("e.jsonl").read_bytes().splitlines()
            if (event := wire.decode(line)).type.is_terminal]  # type: ignore[union-attr]
    assert {task.timeout for task in ends} == {first.timeout, None}


def test_a_share_of_next_to_nothing_is_a_second() -> None:
    limit = TimeLimit(share=2.0)
    assert limit.of_this_run() is None and limit.is_any
    limit.note(0.001)
    assert limit.of_this_run() == SHORTEST
    for seconds in (4.0, 5.0, 60.0):
        limit.note(seconds)
    assert limit.of_this_run() == 10.0
    assert TimeLimit(3.0).of_this_run() is None and not TimeLimit().is_any


@pytest.mark.parametrize("text", ["100%", "0%", "nan%", "%", "1e3%", "3 %"])
def test_a_share_that_means_nothing_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    assert main(["run", "--timeout", text, "--", "true"]) == 2
    assert "expected more than 100% of the median, such as 300%, got" in capfd.readouterr().err


def test_commands_have_no_limit_unless_they_get_one(folder: Path) -> None:
    assert main(["run", "--", sys.executable, "-c", "pass"]) == 0
    assert tasks()[0].timeout is None

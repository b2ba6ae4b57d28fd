"""``--halt`` and ``--fail-fast``: when a run ends before all have run, and what its exit code
is."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from bgworker import History
from bgworker.cli import main
from bgworker.cli.halt import halt
from bgworker.model.events import TaskStatus

C, F, L, X = (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.CANCELLED)


@pytest.mark.parametrize("text, counts, total, is_met", [
    ("now,fail=1", {C: 9}, 10, False),
    ("now,fail=1", {F: 1}, 10, True),
    ("now,fail=1", {L: 1}, 10, True),
    ("now,fail=1", {X: 1}, 10, False),
    ("soon,fail=3", {F: 1, L: 1}, None, False),
    ("soon,fail=3", {F: 2, L: 1}, None, True),
    ("soon,success=2", {F: 5, C: 1}, None, False),
    ("soon,success=2", {C: 2}, None, True),
    ("now,done=3", {C: 1, F: 1, X: 9}, None, False),
    ("now,done=3", {C: 1, F: 1, L: 1}, None, True),
    ("soon,fail=10%", {F: 1}, 11, False),
    ("soon,fail=10%", {F: 2}, 11, True),
    ("soon,fail=10%", {F: 1}, 10, True),
    ("now,success=100%", {C: 9}, 10, False),
    ("now,success=100%", {C: 10}, 10, True),
])
def test_a_halt_counts_what_ended_so(
    text: str, counts: dict[TaskStatus, int], total: int | None, is_met: bool
) -> None:
    found = halt(text)
    assert found is not None
    assert found.is_met(Counter(counts), total) is is_met


@pytest.mark.parametrize(
    "text", ["", "now", "now,fail", "later,fail=1", "now,fail=0", "now,fail=-1", "now,fail=101%",
             "now,fail=0%", "soon;fail=1", "now,fails=1"])
def test_what_is_no_condition_is_refused_with_the_forms(
    capfd: pytest.CaptureFixture[str], text: str
) -> None:
    assert main(["run", "--no-db", "--halt", text, "--", "true"]) == 2
    assert "argument --halt: expected never, or now or soon, then fail" in capfd.readouterr().err


CASES = [
    ("never", ["exit 3", "true"], 1, ["failed", "completed"]),
    ("now,fail=1", ["exit 3", "true"], 1, ["failed", "cancelled"]),
    ("soon,fail=2", ["exit 3", "true", "exit 4", "true"], 1,
     ["failed", "completed", "failed", "cancelled"]),
    ("soon,fail=50%", ["exit 3", "exit 4", "true", "true"], 1,
     ["failed", "failed", "cancelled", "cancelled"]),
    ("soon,success=1", ["exit 3", "true", "exit 4"], 0, ["failed", "completed", "cancelled"]),
    ("soon,success=3", ["exit 3", "true", "exit 4"], 1, ["failed", "completed", "failed"]),
    ("soon,done=1", ["true", "exit 4"], 0, ["completed", "cancelled"]),
    ("soon,done=2", ["true", "exit 4", "true"], 1, ["completed", "failed", "cancelled"]),
]


@pytest.mark.skipif(os.name == "nt", reason="the commands are those of POSIX")
@pytest.mark.parametrize("text, commands, code, statuses", CASES, ids=[case[0] for case in CASES])
def test_what_has_not_run_is_cancelled_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, commands: list[str], code: int,
    statuses: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "-q", "-j1", "--halt", text, ":::", *commands]) == code
    with History("bgworker.db") as history:
        tasks = sorted(history.tasks(limit=None), key=lambda task: task.task_id)
    assert [task.status for task in tasks] == statuses


@pytest.mark.skipif(os.name == "nt", reason="the commands are those of POSIX")
@pytest.mark.parametrize("when, end", [("soon", "completed"), ("now", "cancelled")])
def test_soon_waits_for_what_runs_and_now_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], when: str,
    end: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = ["touch runs; sleep 1; echo whole", "until [ -e runs ]; do sleep 0.02; done; exit 1",
                *["echo never"] * 20]
    assert main(["run", "-j2", "--halt", f"{when},fail=1", ":::", *commands]) == 1
    out, err = capfd.readouterr()
    assert out == ("[1] whole\n" if when == "soon" else "")
    with History("bgworker.db") as history:
        assert history.tasks(name="touch*")[0].status == end
        assert history.counts()["cancelled"] == 20 + (when == "now")
        [reason] = {task.failure_message for task in history.tasks(status="cancelled")}
    assert reason == "another command failed"

"""``bgworker runs``: what became of each run, and what is left of it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from tests.histories import Recorder, kill_runs, run_cli

from bgworker.cli import main
from bgworker.cli.runs import _PAGE
from bgworker.history import schema
from bgworker.model.ids import new_id

RUNS = tuple([new_id(number * 10**18) for number in (1, 2, 3)])


def shown(capfd: pytest.CaptureFixture[str], *words: object) -> list[list[str]]:
    """Return the cells of the table, without those that are empty."""
    assert main(["runs", *map(str, words)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return [re.split("  +", line) for line in out.splitlines()]


def test_each_run_tells_how_its_tasks_ended_and_what_is_left(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    record.run(RUNS[0], ended=record.ago(seconds=-312))
    record.run(RUNS[1], host=schema.this_host())
    record.run(RUNS[2], host="elsewhere")
    failed = [record.task("bad", "failed", run_id=RUNS[0]) for _ in range(3)]
    record.task("good", run_id=RUNS[0])
    record.task("runs", "running", run_id=RUNS[1], rerun_of=failed[0])
    record.task("again", run_id=RUNS[1], rerun_of=failed[1])
    found = shown(capfd)
    assert re.fullmatch(r"\d+ms|\d\.\ds", found[2].pop(2)), "as long as it lasts, until now"
    assert found == [
        ["RUN", "STARTED", "DURATION", "LEFT", "TASKS", "PROCESS"],
        [RUNS[2][-8:], "now", "-", "0", "none", "not known: 4711 on elsewhere"],
        [RUNS[1][-8:], "now", "1", "1 running, 1 completed",
         f"running: 4711 on {schema.this_host()}"],
        [RUNS[0][-8:], "now", "5m12s", "1", "1 completed, 3 failed"],
    ]
    kill_runs(record.path, RUNS[1])
    assert shown(capfd)[2] == [
        RUNS[1][-8:], "now", "-", "1", "1 completed, 1 interrupted",
        f"died: 4711 on {schema.this_host()}"]


def test_a_run_of_another_history_has_no_process(record: Recorder,
                                                 capfd: pytest.CaptureFixture[str]) -> None:
    record.insert("runs", run_id=RUNS[0])
    assert shown(capfd)[1] == [RUNS[0][-8:], "2001-09-09", "-", "0", "none",
                               "copied from another history"]


def test_runs_are_limited_and_filtered(record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    assert capfd.readouterr().out == "no runs yet\n"
    for number in range(30):
        record.run(new_id((number + 1) * 10**15), ended=record.ago(hours=30 - number))
    assert len(shown(capfd)) == 21
    assert len(shown(capfd, "--limit", 0)) == 31
    assert len(shown(capfd, "--limit", 3)) == 4
    assert len(shown(capfd, "--since", "5h30m")) == 6
    assert shown(capfd, "--since", "10m") == [["no such runs"]]


def test_more_runs_than_are_asked_for_at_once_are_all_listed(
        record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(_PAGE + 5):
        record.run(f"{number + 1:032x}", ended=record.now)
    for limit, count in ((0, _PAGE + 5), (_PAGE, _PAGE), (_PAGE + 2, _PAGE + 2)):
        assert main(["runs", "--json", "--limit", str(limit)]) == 0
        found = json.loads(capfd.readouterr().out)
        ids = [int(each["run"]["run_id"], 16) for each in found["runs"]]
        assert ids == list(range(_PAGE + 5, 0, -1))[:count]


def test_so_much_of_an_id_is_shown_as_tells_runs_apart(
        record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    ids = [record.run(f"01a2b3c4d5e67{number:011x}deadbeef", ended=record.now)
           for number in range(2)]
    assert [row[0] for row in shown(capfd)[1:]] == ids[::-1]


@pytest.mark.skipif(os.name == "nt", reason="shell commands of POSIX")
def test_a_real_run_is_listed(tmp_path: Path) -> None:
    run_cli("run", "-f", "-", cwd=tmp_path, input="true\nexit 1\nexit 2", stdin=None)
    done = run_cli("runs", "--json", cwd=tmp_path)
    [found] = json.loads(done.stdout)["runs"]
    assert (found["counts"], found["left"]) == ({"completed": 1, "failed": 2}, 2)
    assert found["run"]["ended_utc"] and found["run"]["is_alive"] is False
    [line] = run_cli("runs", cwd=tmp_path).stdout.splitlines()[1:]
    assert line.startswith(found["run"]["run_id"][-8:]) and line.endswith("1 completed, 2 failed")

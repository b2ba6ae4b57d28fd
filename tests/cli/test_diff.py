"""``bgworker diff``: two runs, real and written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Recorder, run_cli

from bgworker.cli import main
from bgworker.model.ids import new_id

RUNS = tuple([new_id(number * 10**18) for number in (1, 2)])


def shown(capfd: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[str]:
    assert main(["diff", *map(str, words)]) == code
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()


def written(
    record: Recorder, pairs: dict[str, tuple[str | None, str | None, float, float]]
) -> None:
    """Two runs, the second of which is the newest: by name how a function ended and how long it
    took in each."""
    for run in RUNS:
        record.run(run, ended=record.now)
    for name, (*statuses, first, second) in pairs.items():
        for run, status, took in zip(RUNS, statuses, (first, second)):
            if status is not None:
                record.task(str(name), str(status), run_id=run, took=float(str(took)),
                            script_id=f"jobs:{name}", failure_type="OSError",
                            failure_message=f"no {name}")


PAIRS: dict[str, tuple[str | None, str | None, float, float]] = {
    "broken": ("completed", "failed", 1.0, 2.0),
    "late": ("cancelled", "timed_out", 1.0, 90.0),
    "bad": (None, "failed", 0.0, 1.0),
    "mended": ("failed", "completed", 1.0, 1.0),
    "slow": ("completed", "completed", 1.0, 3.0),
    "fast": ("completed", "completed", 3.0, 1.0),
    "new": (None, "completed", 0.0, 1.0),
    "gone": ("completed", None, 1.0, 0.0),
    "same": ("completed", "completed", 1.0, 1.0),
    "still": ("failed", "failed", 1.0, 1.0),
    "stopped": ("completed", "cancelled", 1.0, 1.0),
}


def test_each_change_is_told_with_both_ends(record: Recorder,
                                            capfd: pytest.CaptureFixture[str]) -> None:
    written(record, PAIRS)
    first, empty, heading, *lines, last_empty, summary = shown(capfd, code=1)
    assert first == f"{RUNS[0][-8:]} (now) -> {RUNS[1][-8:]} (now)"
    assert (empty, last_empty) == ("", "")
    assert heading.split() == ["CHANGE", "TASK", "NAME", "BEFORE", "NOW", "MESSAGE"]
    cells = [re.split("  +", line) for line in lines]
    assert [[cell for at, cell in enumerate(row) if at != 1] for row in cells] == [
        ["newly failed", "broken", "completed, 1.0s", "failed, 2.0s", "OSError: no broken"],
        ["newly failed", "late", "cancelled, 1.0s", "timed out, 1m30s", "no late"],
        ["newly failed", "bad", "-", "failed, 1.0s", "OSError: no bad"],
        ["mended", "mended", "failed, 1.0s", "completed, 1.0s", "no mended"],
        ["slower", "slow", "completed, 1.0s", "completed, 3.0s", "no slow"],
        ["faster", "fast", "completed, 3.0s", "completed, 1.0s", "no fast"],
        ["new", "new", "-", "completed, 1.0s", "no new"],
        ["gone", "gone", "completed, 1.0s", "-"],
    ]
    assert summary == ("3 newly failed, 1 mended, 1 slower, 1 faster, 1 new, 1 gone; "
                       "1 unchanged, 1 still failing, 1 unfinished")
    for task, name in [row[1:3] for row in cells]:
        assert main(["show", task]) == 0
        assert capfd.readouterr().out.startswith(name)


def test_the_json_has_every_change_and_count(record: Recorder,
                                             capfd: pytest.CaptureFixture[str]) -> None:
    written(record, PAIRS)
    [line] = shown(capfd, "--json", code=1)
    answer: dict[str, Any] = json.loads(line)
    kinds = ["newly_failed", "mended", "slower", "faster", "new", "gone"]
    assert list(answer) == ["v", "before", "after", "is_rerun", "counts", *kinds]
    assert [answer[run]["run_id"] for run in ("before", "after")] == [*RUNS]
    assert answer["counts"] == {
        "newly_failed": 3, "mended": 1, "slower": 1, "faster": 1, "new": 1, "gone": 1,
        "unchanged": 1, "still_failing": 1, "unfinished": 1, "not_run_again": 0}
    assert list(answer["mended"][0]["before"]) == [
        "task_id", "name", "status", "duration", "failure_type", "failure_message"]
    assert answer["mended"][0]["before"]["status"] == "failed"
    assert (answer["new"][0]["before"], answer["gone"][0]["after"]) == (None, None)


@pytest.mark.parametrize("statuses, code", [
    (("completed", "completed"), 0), (("failed", "failed"), 0), (("completed", "failed"), 1),
    (("completed", "cancelled"), 0), (("failed", "completed"), 0), ((None, "timed_out"), 1)])
def test_the_exit_code_tells_whether_something_newly_failed(
        record: Recorder, capfd: pytest.CaptureFixture[str],
        statuses: tuple[str | None, str | None], code: int) -> None:
    written(record, {"job": (*statuses, 1.0, 1.0)})
    shown(capfd, code=code)
    shown(capfd, "--json", code=code)


def test_nothing_that_could_steer_a_terminal_is_sent(
        record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    written(record, {"a\x1b[2J\x9b31m\u202e\x07b": (None, "failed", 1.0, 1.0)})
    for words in ([], ["--json"]):
        text = "".join(shown(capfd, *words, code=1))
        assert text.isascii() and text.isprintable() and "a" in text


def test_so_many_of_each_change_are_listed_as_were_asked_for(
        record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    written(record, {f"n{number}": (None, "completed", 0.0, 1.0) for number in range(30)})
    assert [len(shown(capfd, *words)) - 5 for words in ([], ["--limit", 3], ["--limit", 0])] == [
        20, 3, 30]
    assert shown(capfd)[-1] == "30 new; --limit 0 shows them all"
    assert shown(capfd, "--limit", 0)[-1] == "30 new"


def test_two_equal_runs_have_no_difference(record: Recorder,
                                           capfd: pytest.CaptureFixture[str]) -> None:
    written(record, {"job": ("completed", "completed", 1.0, 1.0)})
    for words in ([], ["last", "last"]):
        assert shown(capfd, *words)[1:] == ["no difference; 1 unchanged"]


def test_a_run_that_is_not_there_is_refused(record: Recorder,
                                            capfd: pytest.CaptureFixture[str]) -> None:
    for run in RUNS:
        record.run(run, ended=record.now)
    for words in (["last~2"], ["nope", "last"], ["last", "nope"]):
        assert main(["diff", *words]) == 2
        err = capfd.readouterr().err
        assert err.startswith("bgworker diff: error: argument RUN: expected the id of a run")
        assert f"the newest are {RUNS[1][-8:]}" in err and err.count("\n") == 1


def test_without_two_runs_that_is_told_and_not_of_names_that_nobody_typed(
        record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    for count, run in enumerate(RUNS):
        assert main(["diff"]) == 2
        assert capfd.readouterr().err == (
            f"bgworker diff: error: expected two runs to compare, got {count} in the history; run "
            "something again first, as with bgworker rerun\n")
        record.run(run, ended=record.now)


@pytest.mark.skipif(os.name == "nt", reason="shell commands of POSIX")
def test_real_runs_are_compared_and_what_resumes_one_too(tmp_path: Path) -> None:
    lines = "true\ntest -e flag\ntest ! -e flag\nexit 5"

    def diff(*words: str, code: int) -> str:
        done = run_cli("diff", *words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (code, "")
        return done.stdout.splitlines()[-1]

    run_cli("run", "-f", "-", cwd=tmp_path, input=lines, stdin=None)
    (tmp_path / "flag").touch()
    run_cli("run", "--resume", "-f", "-", cwd=tmp_path, input=lines, stdin=None)
    assert diff(code=0) == "1 mended; 1 still failing, 2 not run again"
    run_cli("run", "-f", "-", cwd=tmp_path, input=lines, stdin=None)
    assert diff("last~2", code=1) == "1 newly failed, 1 mended; 1 unchanged, 1 still failing"

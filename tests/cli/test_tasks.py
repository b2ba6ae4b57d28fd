"""``bgworker tasks``, on a history that a real Scheduler recorded and on one with known times."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tests.histories import Nightly, Recorder

from bgworker.cli import main
from bgworker.model.ids import new_id


def shown(capfd: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main(["tasks", *map(str, words)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()


def test_the_tasks_of_a_real_run_are_listed_newest_first(
    nightly: Nightly, capfd: pytest.CaptureFixture[str]
) -> None:
    heading, *lines = shown(capfd, "--db", nightly.path)
    assert heading.split() == ["ID", "NAME", "STATUS", "PROGRESS", "STARTED", "DURATION", "MESSAGE"]
    patterns = [
        r"cleanup +cancelled +- +- +not tonight",
        r"load items +completed +100% +\S+( ago)? +\S+ +row 20",
        r"load orders +failed +100% +\S+( ago)? +\S+ +ValueError: row 2 is bad and so is the next",
        r"load users +completed +100% +\S+( ago)? +\S+ +row 5",
        r"slow +timed out +\S+( ago)? +\S+ +\S.*",
    ]
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns):
        assert re.fullmatch(f"[0-9a-f]{{8,20}} +{pattern}", line), line


def test_the_ids_that_are_shown_name_their_tasks(
    nightly: Nightly, capfd: pytest.CaptureFixture[str]
) -> None:
    for line in shown(capfd, "--db", nightly.path)[1:]:
        task_id, name = line.split()[:2]
        assert main(["show", "--db", nightly.path, task_id]) == 0
        assert capfd.readouterr().out.startswith(name)


def test_filters_are_applied(record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    record.task("load users", created=record.ago(days=9))
    record.task("load orders", "failed", created=record.ago(hours=5))
    record.task("clean", "failed", created=record.ago(hours=3))
    record.task("load items", "running", created=record.ago(hours=1))

    def listed(*words: object) -> str:
        return " ".join(re.split("  +", line)[1].split()[-1] for line in shown(capfd, *words)[1:])

    assert listed() == "items clean orders users"
    assert listed("--status", "failed") == "clean orders"
    assert listed("--name", "load*") == "items orders users"
    assert listed("--since", "1d") == "items clean orders"
    assert listed("--since", "4h", "--status", "failed") == "clean"
    assert listed("--limit", 2) == "items clean"
    assert listed("--limit", 0) == listed()
    assert listed("--status", "running", "--name", "*") == "items"
    assert shown(capfd, "--status", "cancelled") == ["no such tasks"]
    record.task("late", "timed_out", created=record.ago(hours=1))
    record.task("next", "scheduled")
    assert (listed("--status", "timed out"), listed("--status", "waiting")) == ("late", "next")


def test_an_empty_history_says_so(record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    assert shown(capfd) == ["no tasks yet"]
    assert shown(capfd, "--json") == ['{"v":1,"tasks":[]}']


def test_times_are_relative_for_people_and_exact_for_programs(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    record.task("a", created=record.ago(hours=7, minutes=1), took=312.0)
    assert re.search(r"  7h ago  5m12s", shown(capfd)[1])
    [line] = shown(capfd, "--json")
    [task] = json.loads(line)["tasks"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", task["started_utc"])
    assert task["duration"] == 312.0


def test_the_json_of_a_task_has_every_field_always(nightly: Nightly, record: Recorder,
                                                   capfd: pytest.CaptureFixture[str]) -> None:
    record.task("bare", "scheduled")
    fields = [
        "task_id",
        "name",
        "status",
        "run_id",
        "created_utc",
        "scheduled_utc",
        "started_utc",
        "completed_utc",
        "duration",
        "timeout",
        "last_progress_percent",
        "last_progress_message",
        "script_id",
        "script_hash",
        "script_text",
        "arguments",
        "failure_type",
        "failure_message",
        "invocation_info",
        "result",
        "metadata",
        "last_seq",
    ]
    for words in ([], ["--db", nightly.path]):
        [line] = shown(capfd, "--json", *words)
        answer = json.loads(line)
        assert list(answer) == ["v", "tasks"] and answer["v"] == 1
        assert answer["tasks"]
        for task in answer["tasks"]:
            assert list(task) == fields
    tasks: Any = {task["name"]: task for task in answer["tasks"]}
    assert tasks["load users"]["metadata"] == {"ticket": 7, "tags": ["a", "b"]}
    assert tasks["load users"]["arguments"] == '{"args":[5],"kwargs":{}}'
    assert (tasks["load users"]["result"], tasks["load orders"]["result"]) == ("5", None)
    assert "def load(rows: int" in tasks["load users"]["script_text"]
    assert tasks["load orders"]["failure_message"] == "row 2 is bad\nand so is the next"


def test_lines_fit_the_terminal_or_columns_and_are_whole_elsewhere(
    record: Recorder, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record.task("a", last_progress_msg="m" * 300)
    assert shown(capfd)[1].endswith("m" * 300)
    monkeypatch.setenv("COLUMNS", "70")
    assert len(shown(capfd)[1]) == 70
    monkeypatch.setenv("COLUMNS", "nonsense")
    assert len(shown(capfd)[1]) > 300


@pytest.mark.parametrize("words, message", [
    (["--status", "done"], "argument --status: invalid choice: 'done'"),
    (["--since", "yesterday"], "expected a duration such as"),
    (["--limit", "-1"], "--limit"), (["--limit", "ten"], "expected a whole number >= 0, got 'ten'"),
    (["extra"], "unrecognized arguments: extra"),
    (["--since", "99999999999999d"], "up to 36500d")])
def test_a_wrong_filter_is_one_line_and_code_2(
    record: Recorder, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["tasks", *words]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("bgworker tasks: error: ")
    assert message in err


def test_one_run_and_what_is_left_of_it_are_listed(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [record.run(new_id(number), ended=record.now) for number in (1, 2)]
    old = record.task("old", "failed", run_id=runs[0])
    record.task("older", run_id=runs[0])
    record.task("bad", "timed_out", run_id=runs[0])
    assert " older " not in "".join(shown(capfd, "--left"))
    assert len(shown(capfd, "--left")) == 3
    record.task("again", run_id=runs[1], rerun_of=old)
    [_, line] = shown(capfd, "--left")
    assert " bad " in line
    assert shown(capfd, "--left", "--run", "last") == ["nothing is left"]
    assert len(shown(capfd, "--run", "last~1")) == 4
    assert main(["tasks", "--run", "last~2"]) == 2
    assert capfd.readouterr().err == (
        "bgworker tasks: error: argument --run: expected the id of a run of this history, the "
        "beginning of one or its last 8 digits, last, or last~1 for the one before it, got "
        f"'last~2', which no run has; the newest are {runs[1][-8:]}, {runs[0][-8:]}\n")

"""``bgworker stats``, on a history with known rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.histories import Recorder, make_nightly

from bgworker.cli import main
from bgworker.history.schema import COMMAND_FAILED
from bgworker.model.ids import new_id


def shown(capfd: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main(["stats", *map(str, words)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()


def test_counts_failures_durations_and_losses_have_a_section_each(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    for seconds in range(1, 21):
        record.task("load users", took=float(seconds), created=record.ago(hours=2))
    record.task(
        "load orders",
        "failed",
        took=61.0,
        created=record.ago(hours=3),
        failure_type="OSError",
        failure_message="no\nway",
    )
    record.task("waits", "scheduled")
    record.lost(1234, at=record.ago(hours=5))
    assert shown(capfd) == [
        "        1 waiting", "       20 completed", "        1 failed",
        "",
        "FAILURES  TYPE     LATEST  MESSAGE",
        r"       1  OSError  2h ago  no\nway",
        "",
        "TASKS    P50    P95    MAX  NAME",
        "   20  10.0s  19.0s  20.0s  load users",
        "    1  1m01s  1m01s  1m01s  load orders",
        "",
        " LOST  SINK  REASON    LATEST",
        "1,234  hook  overflow  5h ago",
    ]


def test_commands_are_grouped_by_program_and_code_and_what_timed_out_failed_too(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    then = record.ago(minutes=110)
    for name, end in (("a", "returned non-zero exit status 1"), ("b", "died with "
                      "<Signals.SIGKILL: 9>"), ("c", "returned non-zero exit status 1")):
        record.task(name, "failed", script_id="gzip", failure_type=COMMAND_FAILED,
                    created=record.ago(minutes=110 - ord(name) % 10),
                    failure_message=f"Command 'gzip -t {name}' {end}.")
    record.task("d", "timed_out", created=then, failure_type="TaskTimedOut",
                failure_message="too long")
    record.task("e", "cancelled", failure_message="user")
    lines = shown(capfd)
    start = lines.index("FAILURES  TYPE               LATEST  MESSAGE")
    assert lines[start + 1:start + 5] == [
        "       2  gzip: exit code 1  1h ago  c",
        "       1  TaskTimedOut       1h ago  too long",
        "       1  gzip: SIGKILL      1h ago  b",
        ""]


def test_a_long_section_is_cut_for_people_and_whole_for_programs(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(30):
        record.task(f"name {number}")
    assert shown(capfd)[-1] == "... and 10 more"
    assert len(json.loads(shown(capfd, "--json")[0])["durations"]) == 30


def test_since_leaves_out_what_ended_before(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    record.task("old", created=record.ago(days=2))
    record.task("new", created=record.ago(hours=2))
    assert shown(capfd, "--since", "1d")[-1].split()[-1] == "new"
    assert shown(capfd, "--since", "1m") == ["no such tasks"]


def test_the_json_has_four_fields_of_known_shape(tmp_path: Path, record: Recorder,
                                                 capfd: pytest.CaptureFixture[str]) -> None:
    [line] = shown(capfd, "--json")
    assert line == '{"v":1,"counts":{},"failures":[],"durations":[],"losses":[]}'
    make_nightly(tmp_path / "nightly.db")
    record.lost(3)
    [line] = shown(capfd, "--json", "--db", tmp_path / "nightly.db")
    answer = json.loads(line)
    assert answer["counts"] == {"completed": 2, "failed": 1, "cancelled": 1, "timed_out": 1}
    assert [list(each) for each in answer["failures"]] == [
        ["failure_type", "count", "latest_utc", "latest_task_id", "latest_message", "program",
         "exit_code", "latest_name"]] * 2
    assert [each["failure_type"] for each in answer["failures"]] == [
        "TaskTimedOut", "ValueError"]
    assert [list(each) for each in answer["durations"]] == [
        ["name", "count", "p50", "p95", "max", "total", "slowest_task_id"]
    ] * 4
    [line] = shown(capfd, "--json")
    assert list(json.loads(line)["losses"][0]) == ["sink", "reason", "count", "latest_utc"]


def test_one_run_is_summed_up_alone(record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    for number, status in ((1, "failed"), (2, "completed")):
        record.task(status, status, run_id=record.run(new_id(number), ended=record.now))
    assert shown(capfd, "--run", "last")[0] == "        1 completed"
    assert shown(capfd, "--run", "last~1")[0] == "        1 failed"

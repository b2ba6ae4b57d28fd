"""``bgworker grep``: lines of what tasks said."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from tests.histories import Nightly, Recorder
from tests.terminal import on_terminal

from bgworker.cli import main


def grepped(capfd: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[str]:
    assert main(["grep", *map(str, words)]) == code
    out, err = capfd.readouterr()
    assert (err == "") == (code != 2)
    return [*out.splitlines(), *err.splitlines()]


@pytest.fixture
def ids(record: Recorder) -> list[str]:
    """Two tasks that said much the same, the newer one first."""
    tasks = []
    for name, hours in (("new", 1), ("old", 2)):
        task = record.task(name, "failed" if name == "old" else "completed",
                           created=record.ago(hours=hours))
        for text, stream in (("opening a.csv", "output"), ("cannot OPEN a.csv", "error"),
                             ("first\nopen (2)\nlast", "output"), ("half open", "progress")):
            record.said(task, text, stream, percent=50.0 if stream == "progress" else None)
        tasks.append(task[-8:])
    return tasks


def test_each_line_that_matches_is_printed_with_its_task_and_stream(
    ids: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert grepped(capfd, "open") == [f"{task}:{line}" for task in ids for line in (
        "output:opening a.csv", "output:open (2)", "progress:half open")]
    assert grepped(capfd, "^open.*[)]$") == [f"{task}:output:open (2)" for task in ids]
    assert grepped(capfd, "-F", "open (2)") == [f"{task}:output:open (2)" for task in ids]
    assert grepped(capfd, "-i", "cannot open", "--limit", 1) == [
        f"{ids[0]}:error:cannot OPEN a.csv"]
    assert grepped(capfd, "-m", 1, "open") == [f"{task}:output:opening a.csv" for task in ids]
    assert grepped(capfd, "open", "--limit", 4)[3:] == [f"{ids[1]}:output:opening a.csv"]


@pytest.mark.parametrize("words", [["cannot open"], ["open (2)"], ["-F", "open.*"], ["x.y"],
                                   ["open", "--stream", "error"], ["open", "--name", "o"],
                                   ["open", "--since", "1m"], ["open", "--status", "cancelled"]])
def test_where_nothing_is_found_the_code_is_one(
    ids: list[str], capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert grepped(capfd, *words, code=1) == []


def test_what_is_searched_can_be_narrowed(
    record: Recorder, ids: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(grepped(capfd, "-i", "open", "--stream", "error", "--stream", "progress")) == 4
    for words in (["--status", "failed"], ["--name", "ol*"]):
        assert {line[:8] for line in grepped(capfd, "open", *words)} == {ids[1]}
    assert {line[:8] for line in grepped(capfd, "open", "--since", "100m")} == {ids[0]}
    record.said(record.task("of a run", run_id=record.run()), "open")
    assert [line[9:] for line in grepped(capfd, "open", "--run", "last")] == ["output:open"]
    assert "no run has" in grepped(capfd, "open", "--run", "nope", code=2)[0]


def test_tasks_are_counted_listed_or_only_looked_for(
    ids: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert grepped(capfd, "-c", "open") == [f"{task}:3" for task in ids]
    assert grepped(capfd, "-c", "-m", 2, "open", "--limit", 1) == [f"{ids[0]}:2"]
    assert grepped(capfd, "-l", "open") == ids
    assert grepped(capfd, "-q", "open") == [] == grepped(capfd, "-q", "nothing", code=1)
    for task in grepped(capfd, "-l", "open"):
        assert main(["show", task]) == 0
    capfd.readouterr()


def test_failures_are_searched(nightly: Nightly, capfd: pytest.CaptureFixture[str]) -> None:
    task = nightly.ids["load orders"][-8:]
    lines = grepped(capfd, "--db", nightly.path, "is bad")
    assert lines[-1] == f"{task}:failure:ValueError: row 2 is bad"
    assert grepped(capfd, "--db", nightly.path, "is bad", "--stream", "failure") == lines
    assert grepped(capfd, "--db", nightly.path, "is bad", "--stream", "error", code=1) == []
    [line] = grepped(capfd, "--db", nightly.path, "File .*in load")
    assert "histories.py" in line


def test_the_json_has_a_line_an_object(ids: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    first, *_ = [json.loads(line) for line in grepped(capfd, "--json", "open")]
    assert list(first) == ["v", "task_id", "name", "status", "stream", "seq", "time", "line"]
    assert (first["v"], first["task_id"][-8:], first["name"], first["seq"], first["line"]) == (
        1, ids[0], "new", 4, "opening a.csv")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\S+Z", first["time"])
    assert [json.loads(line)["count"] for line in grepped(capfd, "--json", "-c", "open")] == [3, 3]
    assert list(json.loads(grepped(capfd, "--json", "-l", "open")[0])) == [
        "v", "task_id", "name", "status"]


def test_what_tasks_said_cannot_steer_the_terminal(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    task = record.task("n\x1b[2J")
    record.said(task, "\x1b[31mnee\x1b[0mdle \x1b]0;title\x07 \u202e\r")
    record.task("f", "failed", failure_type="\x1b[2J", failure_message="needle\x9b")
    lines = grepped(capfd, "needle")
    assert lines == [f"{lines[0][:8]}:failure:\\x1b[2J: needle\\x9b",
                     f"{task[-8:]}:output:needle \\x1b]0;title\\x07 \\u202e\\r"]
    assert "\x1b" not in "".join(grepped(capfd, "--json", "needle"))


@pytest.mark.skipif(os.name == "nt", reason="there are no pseudo-terminals")
def test_on_a_terminal_lines_stand_under_their_task_and_what_was_found_is_red(
    record: Recorder, tmp_path: Path
) -> None:
    task = record.task("load\x1b[2J", "failed")
    record.said(task, "\x1b[32ma needle\x1b[0m, and a needle\x07", "error")
    record.said(task, f"{'x' * 5000}needle{'y' * 5000}")
    code, sent = on_terminal("grep", "need.e", cwd=tmp_path)
    red = "\x1b[1;31mneedle\x1b[0m"
    assert code == 0 and sent.replace("\r\n", "\n").splitlines() == [
        f"{task[-8:]} load\\x1b[2J (\x1b[31mfailed\x1b[0m, 59m ago)",
        f"  error: a {red}, and a {red}\\x07",
        f"  output: …{'x' * 125}{red}{'y' * 369}…", ""]


@pytest.mark.parametrize("words, complaint", [
    (["("], "expected a regular expression, got '('"), ([], "expected one PATTERN, got none"),
    (["a", "b"], "unrecognized arguments: b"), (["a", "--", "b"], "expected one PATTERN, got a b"),
    (["-m", "0", "a"], "expected a whole number >= 1"), (["-c", "-l", "a"], "not allowed with"),
    (["a", "--stream", "stdout"], "invalid choice: 'stdout'"),
    (["a", "--db", "nowhere.db"], "there is no history at")])
def test_what_is_wrong_is_said_in_one_line_and_the_code_is_two(
    record: Recorder, capfd: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    [line] = grepped(capfd, *words, code=2)
    assert complaint in line and line.startswith("bgworker grep: error: ")


def test_a_pattern_may_begin_with_a_dash_and_hold_what_is_no_text(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    task = record.task()
    record.said(task, "run with -x and [[")
    assert grepped(capfd, "--", "-x") == [f"{task[-8:]}:output:run with -x and [["]
    assert len(grepped(capfd, "[[]")) == 1, "no warning of a set in a set"
    assert grepped(capfd, os.fsdecode(b"\xff"), code=1) == grepped(capfd, "\0", code=1) == []

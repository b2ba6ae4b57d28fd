"""``bgworker why``: how a task ended, and what led there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.histories import Nightly, Recorder
from tests.support import environment

from bgworker.cli import main
from bgworker.history.schema import COMMAND_FAILED, this_host
from bgworker.model.wire import decode_object

POSIX = pytest.mark.skipif(os.name == "nt", reason="the commands are POSIX commands")


def told(capfd: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert main(["why", *map(str, words)]) == code
    out, err = capfd.readouterr()
    assert (err == "") == (code == 0)
    return out + err


def command(record: Recorder, end: str, *said: str, name: str = "gzip -t a") -> str:
    task = record.task(name, "failed", script_id="gzip", failure_type=COMMAND_FAILED,
                       failure_message=f"Command '{name}' {end}.", metadata={"command": name})
    for line in said:
        record.said(task, line, "error")
    return task


@POSIX
def test_a_command_that_failed_is_told_with_its_last_words_and_what_its_like_did(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = "echo begun; test -e good || { echo no good >&2; exit 7; }"
    (tmp_path / "good").touch()
    assert main(["run", "sh", "-c", script]) == 0
    (tmp_path / "good").unlink()
    assert main(["run", "sh", "-c", script]) == 7
    capfd.readouterr()
    text = told(capfd)
    assert re.fullmatch(
        r"sh -c .*: failed \(exit code 7\) after \S+, \S+(?: ago)?\n"
        r"\nerror, the last .*:\n  no good\n"
        r"\noutput, the last .*:\n  begun\n"
        r"\nbefore: completed once, the last .*, median \S+\n"
        r"\n.* show ([0-9a-f]{8})   all that is recorded of it\n.* tail \1   all that it said\n"
        r".* rerun \1  run it again\n", text), text
    (tmp_path / "good").touch()
    assert main(["run", "sh", "-c", script]) == 0
    capfd.readouterr()
    assert re.search(r"\nbefore: .*\nsince:  the newest one completed, ", told(capfd, "--db",
                     "bgworker.db", re.findall(" show (.{8})", text)[0]))


@pytest.mark.parametrize("end, meaning", [
    ("returned non-zero exit status 127", "Exit code 127 means usually that the shell found no "),
    ("returned non-zero exit status 126", "Exit code 126 means usually that a file was found "),
    ("returned non-zero exit status 137", "Exit code 137 is 128 + 9, usually that SIGKILL ended it:"
     " somebody killed it, or the system did, perhaps because it was out of memory"),
    ("returned non-zero exit status 130", "Exit code 130 is 128 + 2, usually that SIGINT ended it: "
     "somebody typed Ctrl-C."),
    ("died with <Signals.SIGKILL: 9>", "SIGKILL means somebody killed it, or the system did"),
    ("died with <Signals.SIGSEGV: 11>", "SIGSEGV means it used memory that is not its own"),
    ("returned non-zero exit status 1", ""), ("returned non-zero exit status 128", ""),
    ("returned non-zero exit status 255", ""), ("died with unknown signal 99", ""),
    ("was odd", "")])
def test_what_an_exit_code_usually_means_is_said_where_that_is_known(
    record: Recorder, capfd: pytest.CaptureFixture[str], end: str, meaning: str
) -> None:
    if not hasattr(signal, "SIGKILL") and "SIGKILL" in meaning:
        pytest.skip("it has no such signal")
    command(record, end)
    second = told(capfd).splitlines()[1]
    assert second.startswith(f"  {meaning}") if meaning else second == ""
    assert (json.loads(told(capfd, "--json"))["meaning"] or "").startswith(meaning)


def test_a_sentence_is_wrapped_to_the_terminal(
    record: Recorder, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(record, "returned non-zero exit status 127")
    monkeypatch.setenv("COLUMNS", "40")
    lines = told(capfd).splitlines()
    assert max(map(len, lines[1:5])) <= 40 and lines[1].startswith("  Exit code 127")
    assert "all that it said" not in "".join(lines), "what does not fit is left out"


def test_a_function_is_told_with_its_innermost_calls(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = "".join(f'  File "m.py", line {number}, in f{number}\n    f{number}(\x1b[2J)\n'
                    for number in range(9))
    trace = f"Traceback (most recent call last):\n{calls}ValueError: bad\n  more of it\n"
    record.task("load", "failed", script_id="m:load", failure_type="ValueError",
                failure_message="bad", invocation_info=trace)
    text = told(capfd)
    assert "\nit happened at:\n    " not in text
    assert re.findall(r"in (f\d)\n", text) == ["f6", "f7", "f8"]
    assert r"    f8(\x1b[2J)" in text and "more of it" not in text
    record.task("late", "timed_out", script_id="m:load", failure_type="TaskTimedOut",
                failure_message="too long", timeout_sec=5.0, invocation_info=calls)
    assert re.search(r"^late: timed out after 1\.5s, \d+m ago\n\nit was at:\n  File .*f6$",
                     told(capfd), re.MULTILINE)
    record.task("cmd", "failed", script_id="sleep", failure_type=COMMAND_FAILED,
                failure_message="x", invocation_info=calls)
    assert "File" not in told(capfd), "of a command our own code says nothing"
    record.task("both", "timed_out", script_id="m:load", failure_type="TaskTimedOut",
                failure_message="too long", invocation_info=f"{calls}processes of it: 12\n")
    assert "    f8(" in (text := told(capfd)) and "\n  processes of it: 12\n" in text
    for info, shown in (("processes of it: 12\n", "\nit was at:\n  processes of it: 12\n"),
                        ("bgworker.TaskTimedOut: too long\n", ""), (None, "")):
        record.task("cmd", "timed_out", script_id="sleep", failure_type="TaskTimedOut",
                    failure_message="too long", invocation_info=info)
        text = told(capfd)
        assert shown in text and ("it was at" in text) == bool(shown)


def test_the_stack_of_a_real_failure_ends_where_it_was_raised(
    nightly: Nightly, capfd: pytest.CaptureFixture[str]
) -> None:
    text = told(capfd, "--db", nightly.path, "load orders")
    assert text.startswith("load orders: failed (ValueError: row 2 is bad and so is the next) ")
    assert re.search(r'\nit happened at:\n  File "[^\n]*histories\.py", line \d+, in load\n'
                     r'    raise ValueError\(', text)
    assert "\nprogress, the last " in text and "  100% row 2\n" in text
    assert text.index("\nerror, ") < text.index("\noutput, ")


def test_a_task_that_runs_is_told_with_what_is_usual(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    record.run("r" * 32, host="far.example")
    for hours in (5, 6, 7):
        record.task("load", created=record.ago(hours=hours), took=60.0)
    task = record.task("load", "running", created=record.ago(minutes=5), run_id="r" * 32)
    record.said(task, "row 5", "progress", percent=50.0)
    text = told(capfd)
    assert text.startswith("load: running for 5m00s, 4m00s longer than the median, in process 4711 "
                           "on far.example\n\nprogress, the last now:\n  50% row 5\n")
    assert "\nbefore: completed 3 times, the last 4h ago, median 1m00s\n" in text
    assert " tail -f " in text and " cancel " in text and " rerun " not in text
    record.task("load", "running", created=record.ago(seconds=10))
    assert re.match(r"load: running for 10\.\ds, (49|50)\.\ds less than the median\n", told(capfd))
    record.task("new", "scheduled", created=record.ago(minutes=2))
    assert re.match(r"new: waiting for 2m0\ds\n", told(capfd, "new"))


def test_what_was_interrupted_or_cancelled_is_told_with_when_and_by_what(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    record.run("d" * 32, host="far.example", ended=record.ago(hours=1))
    begun = record.task("load", "running", created=record.ago(hours=2), run_id="d" * 32)
    assert told(capfd).startswith("load: interrupted: it started 2h ago, was last heard of 2h ago, "
                                  "and process 4711 on far.example is gone\n")
    record.said(begun, "still here")
    assert "was last heard of now" in told(capfd)
    record.task("wait", "scheduled", created=record.ago(hours=1), run_id="d" * 32)
    assert told(capfd).startswith("wait: interrupted before it started: process 4711 on far")
    record.task("stop", "cancelled", started_utc=None, took=None, failure_message="not tonight")
    assert re.match(r"stop: cancelled \(not tonight\), before it started, 1h ago\n",
                    told(capfd, "stop"))


@POSIX
def test_a_process_that_was_killed_is_told_to_be_gone(tmp_path: Path,
                                                      capfd: pytest.CaptureFixture[str]) -> None:
    script = ("import os, time\nfrom bgworker import Scheduler, current_task\n"
              "pool = Scheduler(sinks=['sqlite:h.db'])\n"
              "pool.submit(lambda: current_task().output('begun') or time.sleep(60))\n"
              "time.sleep(0.5)\npool.flush(30)\nos.kill(os.getpid(), 9)")
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment(),
                            timeout=60)
    assert killed.returncode == -9
    text = told(capfd, "--db", tmp_path / "h.db")
    assert re.match(r".*: interrupted: it started .*, was last heard of .*, and process \d+ on "
                    rf"{re.escape(this_host())} is gone\n", text), text


def test_how_those_before_it_ended_is_told(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    def before() -> str:
        return re.findall("before: (.*)", told(capfd))[0]

    record.task("load", "failed", created=record.ago(hours=9))
    assert before() == "no task of this name, or of this command, has ended"
    record.task("load", "timed_out", created=record.ago(hours=8))
    assert before() == "ended once, and never completed: 1 failed"
    record.task("load", created=record.ago(hours=7), took=2.0)
    assert before() == "ended 2 times, and never completed: 1 failed, 1 timed out"
    record.task("load", "cancelled", created=record.ago(hours=6))
    assert before() == ("completed 1 of 3 times, the last 6h ago, median 2.0s; of the last 3: "
                        "1 failed, 1 timed out")
    for hours in range(5, 0, -1):
        record.task("load", "failed", created=record.ago(hours=hours))
    record.task("load", created=record.ago(minutes=50))
    assert before() == ("completed 1 of 9 times, the last 6h ago, median 2.0s; of the last 5: "
                        "5 failed")
    for minutes in range(40, 30, -1):
        record.task("load", created=record.ago(minutes=minutes), took=2.0)
    assert before() == ("completed 11 of 19 times, the last 31m ago, median 2.0s; of the last 5: "
                        "all completed")


def test_what_ran_it_again_is_told_and_is_what_to_look_at_next(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    first = command(record, "returned non-zero exit status 1")
    assert " rerun " in told(capfd, first)
    again = record.task("gzip -t a", script_id="gzip", rerun_of=first,
                        created=record.ago(minutes=5))
    text = told(capfd, first)
    assert re.search(r"\nsince:  run again, and completed, 4m ago\n", text)
    assert f" why {again[-8:]} " in text and " rerun " not in text


def test_the_json_has_all_of_it(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    task = command(record, "returned non-zero exit status 127", *map(str, range(9)))
    record.said(task, "half", "progress", percent=50.0)
    answer = json.loads(told(capfd, "--json", "-n", 2))
    assert list(answer) == ["v", "task", "run", "reason", "meaning", "stack", "past", "last"]
    assert answer["task"]["task_id"] == task and answer["reason"] == "exit code 127"
    assert list(answer["past"]) == ["earlier", "completed", "median", "latest", "last_completed",
                                    "later", "rerun"]
    events = [decode_object(each) for each in answer["last"]]
    assert [event.seq for event in events] == [11, 12, 13]  # type: ignore[union-attr]


def test_what_a_task_says_cannot_steer_the_terminal(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;title\x07\u202e"
    task = record.task(f"n{evil}", "failed", failure_type=f"T{evil}", failure_message=f"m{evil}",
                       invocation_info=f'  File "{evil}", line 1\n    {evil}\n{evil}')
    for stream in ("output", "error", "progress"):
        record.said(task, f"p{evil}", stream)
    text = told(capfd)
    assert not {"\x1b", "\x07", "\u202e"} & set(text) and text.count("\\u202e") >= 6


@pytest.mark.parametrize("words, code, message", [
    (["nope"], 1, "there is no task 'nope'"), ([], 1, "there is no task in this history yet"),
    (["-n", "x"], 2, "expected a whole number"), (["a", "b"], 2, "unrecognized arguments: b")])
def test_what_cannot_be_told_is_one_line(record: Recorder, capfd: pytest.CaptureFixture[str],
                                         words: list[str], code: int, message: str) -> None:
    text = told(capfd, *words, code=code)
    assert message in text and text.count("\n") == 1


def test_what_can_be_resumed_is_told_until_it_was(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = {"resumable": {"name": "load", "version": 1}}
    first = record.task("load", "interrupted", metadata=mark, script_id="jobs:load")
    line = "\nnext:   Scheduler.resume in its own program runs it again\n"
    assert line in told(capfd)
    again = {**mark, "rerun_of": first}
    second = record.task("load", "failed", metadata=again, rerun_of=first, script_id="jobs:load")
    assert line not in told(capfd, first) and line not in told(capfd, second)
    record.task("load", "interrupted", script_id="jobs:load")
    assert line not in told(capfd), "no other function can"

"""``bgworker show``, on a history that a real Scheduler recorded."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Nightly, Recorder, run_cli

from bgworker import TaskStatus
from bgworker.cli import main
from bgworker.model.wire import decode_object
from bgworker.running.deadlines import HAS_GIL


def shown(capfd: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert main(["show", *map(str, words)]) == code
    out, err = capfd.readouterr()
    assert (err == "") == (code == 0)
    return out + err


def test_a_failed_task_shows_why_and_its_last_lines(
    nightly: Nightly, capfd: pytest.CaptureFixture[str]
) -> None:
    text = shown(capfd, "--db", nightly.path, "load orders")
    assert text.startswith("load orders: failed\n")
    assert f"\n  id         {nightly.ids['load orders']}\n" in text
    assert re.search(
        r"\n  started    \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \((now|\d+[sm] ago)\)\n", text
    )
    assert re.search(
        r"\n  progress   100% row 2\n"
        r"  script     tests\.histories:load \(sha256 [0-9a-f]{12}\)\n",
        text,
    )
    assert '\n  arguments  {"args":[2],"kwargs":{"fail":true}}\n' in text
    assert "\n  result " not in text, "it has none"
    assert "\n  result     5\n" in shown(capfd, "--db", nightly.path, "load users")
    assert re.search(
        rf"\n  run        [0-9a-f]+ \(process {os.getpid()} on \S.*, Python 3\.\d+\.\d+\S*, "
        r"ended\)\n",
        text,
    )
    assert "\nfailure:\n  ValueError: row 2 is bad\n  and so is the next\n" in text
    assert "\n  Traceback (most recent call last):\n" in text
    assert text.endswith("\noutput:\n  loaded row 1\n  loaded row 2\n"
                         "\nerror:\n  one row was odd\n\nwarning:\n  {\"odd\":[3,null]}\n")


@pytest.mark.skipif(os.name == "nt", reason="the commands are POSIX commands")
def test_what_was_past_its_deadline_shows_where_it_was(
        tmp_path: Path, nightly: Nightly, capfd: pytest.CaptureFixture[str]) -> None:
    text = shown(capfd, "--db", nightly.path, "slow")
    assert "\nfailure:\n  TaskTimedOut: ran longer than its timeout of 0.05 s\n" in text
    assert ("\n\n  Stack (most recent call last):\n" in text) == HAS_GIL
    assert ("current_task().sleep(60)" in text) == HAS_GIL
    run_cli("run", "--timeout", 0.3, "--", "sleep", 30, cwd=tmp_path)
    text = shown(capfd, "--db", str(tmp_path / "bgworker.db"), "last")
    assert re.search(r"\nfailure:\n  TaskTimedOut: ran longer than its timeout of 0.3 s\n\n"
                     r"  processes of the command: \d+( \(sleep\))?\n\Z", text)


@pytest.mark.skipif(os.name == "nt", reason="the commands are POSIX commands")
@pytest.mark.parametrize(
    "words, failure, end",
    [
        (
            ["sh", "-c", "echo out; printf '\\033[31mbad\\033[0m\\n' >&2; exit 3"],
            "exit code 3",
            "\nerror:\n  bad\n\noutput:\n  out\n",
        ),
        (["sh", "-c", "kill -9 $$"], "SIGKILL", "\nfailure:\n  SIGKILL\n"),
        (["./nosuch"], "there is no such program", ": './nosuch'\n"),
    ],
)
def test_a_failed_command_shows_how_it_ended_and_what_it_said_but_no_code_of_ours(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], failure: str, end: str
) -> None:
    db = str(tmp_path / "h.db")
    assert main(["run", "--db", db, *words]) > 0
    capfd.readouterr()
    text = shown(capfd, "--db", db, "last")
    assert f"\nfailure:\n  {failure}" in text and text.endswith(end)
    assert "Traceback" not in text and ".py" not in text
    if words[0] == "sh":
        assert f"\n  command    {shlex.join(words)}\n" in text, "it says what ran"


def test_as_many_lines_are_shown_of_each_stream_as_were_asked_for(
    nightly: Nightly, capfd: pytest.CaptureFixture[str]
) -> None:
    def lines(*words: object) -> list[str]:
        return re.findall("loaded row .*", shown(capfd, "--db", nightly.path, "load items", *words))

    assert lines() == [f"loaded row {row}" for row in range(16, 21)]
    assert lines("-n", 2) == ["loaded row 19", "loaded row 20"]
    assert len(lines("-n", 100)) == 20
    assert lines("-n", 0) == []


def test_without_a_task_it_is_the_last(
    nightly: Nightly, capfd: pytest.CaptureFixture[str]
) -> None:
    assert shown(capfd, "--db", nightly.path).startswith("cleanup: cancelled\n")


BASH = shutil.which("bash")
ODD = ["plain", "", "two words", "it's", '"$HOME"', "a\nb", "tab\there", "back\\slash", "\x1b[2J",
       "é \u202e", os.fsdecode(b"\xff\xe9'"), "-n", "*", "\\n"]


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
@pytest.mark.parametrize("is_line", [False, True], ids=["words", "a line"])
def test_what_is_shown_of_a_command_runs_it_again_when_it_is_pasted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    is_line: bool
) -> None:
    folder = tmp_path / "it's here\n\x1b[2J"
    folder.mkdir()
    monkeypatch.chdir(folder)
    db = str(tmp_path / "h.db")
    print_all = [sys.executable, "-c", "import os, sys; sys.stdout.buffer.write(repr((os.getcwd(), "
                 "[os.fsencode(word) for word in sys.argv[1:]])).encode())", *ODD]
    if is_line:
        commands = tmp_path / "commands"
        print_all.remove("a\nb")
        commands.write_bytes(os.fsencode(shlex.join(print_all)))
        assert main(["run", "--db", db, "-f", str(commands)]) == 0
    else:
        assert main(["run", "--db", db, "--", *print_all]) == 0
    said = capfd.readouterr().out
    assert "it's here" in said and "two words" in said
    text = shown(capfd, "--db", db)
    facts = dict(re.findall(r"^  (command|directory) +(.*)$", text, re.MULTILINE))
    pasted = subprocess.run([str(BASH), "-c", f"cd {facts['directory']} && {facts['command']}"],
                            cwd="/", capture_output=True, timeout=60)
    assert (pasted.stdout.decode() + "\n", pasted.stderr) == (said, b"")


def test_metadata_that_are_no_commands_are_shown_as_they_are(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    for metadata in ({"command": 5, "cwd": None}, {"command": "ls", "argv": [["x"]]},
                     {"cwd": "/"}, {"command": {"latin-1": 1}}):
        record.task(script_id="ls", metadata=metadata)
        text = shown(capfd)
        assert f"\n  metadata  {json.dumps(metadata)}\n" in text and "\n  command" not in text
    record.task(script_id="m:f", metadata={"command": "ls"})
    assert '\n  metadata  {"command": "ls"}\n' in shown(capfd), "no command, but a function"
    record.task(script_id="ls", metadata={"command": "ls", "ticket": 7})
    assert '\n  command    ls\n  directory  -\n  metadata   {"ticket": 7}\n' in shown(capfd)


def test_how_other_tasks_ended_is_shown(
    nightly: Nightly, capfd: pytest.CaptureFixture[str]
) -> None:
    text = shown(capfd, "--db", nightly.path, "cleanup")
    assert text.startswith("cleanup: cancelled\n") and "\n  started    -\n" in text
    assert "\nwhy it was cancelled:\n  not tonight\n" in text
    text = shown(capfd, "--db", nightly.path, nightly.ids["slow"])
    assert text.startswith("slow: timed out\n") and "(timeout 50ms)\n" in text
    assert "last" not in shown(capfd, "--db", nightly.path, "last").splitlines()[0]


def test_a_task_that_runs_shows_how_long_it_has_been_running(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = Recorder(tmp_path / "h.db")
    record.task("job", "running", created=record.ago(minutes=5, seconds=30))
    text = shown(capfd, "--db", record.path, "job")
    assert text.startswith("job: running\n") and re.search(
        r"\n  ended     -\n  duration  5m3\ds\n", text
    )
    record.close()


def test_the_json_has_the_task_its_run_and_wire_events(
    nightly: Nightly, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = json.loads(shown(capfd, "--db", nightly.path, "--json", "load orders"))
    assert list(answer) == ["v", "task", "run", "streams"] and answer["v"] == 1
    assert answer["task"]["task_id"] == nightly.ids["load orders"]
    assert list(answer["run"]) == [
        "run_id",
        "host",
        "pid",
        "started_utc",
        "ended_utc",
        "python",
        "version",
        "is_alive",
    ]
    assert answer["run"]["pid"] == os.getpid() and answer["run"]["is_alive"] is False
    events: Any = [decode_object(each) for each in answer["streams"]]
    assert [event.seq for event in events] == sorted(event.seq for event in events)
    assert [event.payload for event in events if event.stream_type == "warning"] == [
        '{"odd":[3,null]}'
    ]


def test_a_task_that_is_not_there_is_code_1_and_the_candidates_are_listed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = Recorder(tmp_path / "h.db")
    for end in "12":
        record.task(f"job\x1b[31m{end}", id="abcdef".ljust(31, "0") + end)
    assert shown(capfd, "--db", record.path, "nope\x1b", code=1) == (
        "bgworker show: there is no task 'nope\\x1b' in this history; expected an id, the "
        "beginning of one or its last 8 digits, a name, last, or the number of a command\n"
    )
    first, *candidates = shown(capfd, "--db", record.path, "abc", code=1).splitlines()
    assert first == "bgworker show: 2 tasks have ids that begin or end with 'abc'; give more digits"
    assert candidates == [
        f"bgworker show: abcdef{'0' * 25}{end} job\\x1b[31m{end} (completed)" for end in "21"
    ]
    record.close()


def test_what_ran_a_task_again_and_what_it_ran_again_are_named(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    first = record.task(script_id="ls", metadata={"command": "ls"}, status=TaskStatus.FAILED)
    assert "again" not in shown(capfd), "nothing was"
    second = record.task(script_id="ls", metadata={"command": "ls", "rerun_of": first},
                         rerun_of=first)
    text = shown(capfd)
    assert re.search(rf"\n  runs again +{first}\n", text) and "rerun_of" not in text
    assert re.search(rf"\n  run again as +{second}, ", shown(capfd, first))


@pytest.mark.parametrize(("mark", "told"), [
    ({"name": "load", "version": 2}, "load, version 2"),
    ({"name": "a\x07b", "version": 2}, r"a\x07b, version 2"),
    ({"name": ["load"], "version": 2}, ""),
    ({"name": "load"}, ""),
    ("load", ""),
])
def test_a_resumable_task_is_told_to_be_one(
    record: Recorder, capfd: pytest.CaptureFixture[str], mark: object, told: str
) -> None:
    record.task(metadata={"ticket": 7, "resumable": mark})
    text = shown(capfd)
    assert (f"  resumable  {told}\n" in text) == bool(told)
    assert ('metadata   {"ticket": 7}\n' in text) == bool(told)
    assert text.count("resumable") == 1, "once, whatever it is"

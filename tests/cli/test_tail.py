"""``bgworker tail``, of what has ended, and following a process that runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Nightly, Recorder, run_cli

from bgworker.cli import main
from bgworker.model.wire import decode
from tests.support import environment

WAIT = 30.0


def shown(capfd: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main(["tail", *map(str, words)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()


def test_everything_that_a_task_said_is_printed_in_order(
    nightly: Nightly, capfd: pytest.CaptureFixture[str]
) -> None:
    assert shown(capfd, "--db", nightly.path, "load orders") == [
        "[progress] 50% row 1",
        "loaded row 1",
        "[progress] 100% row 2",
        "loaded row 2",
        "[error] one row was odd",
        '[warning] {"odd":[3,null]}',
    ]


def test_only_some_streams_and_only_the_last_lines(
    nightly: Nightly, capfd: pytest.CaptureFixture[str]
) -> None:
    assert shown(capfd, "--db", nightly.path, "load orders", "--stream", "output") == [
        "loaded row 1",
        "loaded row 2",
    ]
    assert shown(capfd, "--db", nightly.path, "load orders", "--stream", "progress") == [
        "50% row 1",
        "100% row 2",
    ]
    assert shown(
        capfd, "--db", nightly.path, "load orders", "--stream", "error", "--stream", "warning"
    ) == ["[error] one row was odd", '[warning] {"odd":[3,null]}']
    last = shown(capfd, "--db", nightly.path, "load items", "-n", 3, "--stream", "output")
    assert last == [f"loaded row {number}" for number in (18, 19, 20)]
    assert shown(capfd, "--db", nightly.path, "load items", "-n", 0) == []
    assert shown(capfd, "--db", nightly.path, "cleanup") == []


def test_more_events_than_are_read_at_a_time_come_whole(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    record.many_said(record.task("job"), 2500)
    assert shown(capfd, "job") == [f"line {number}" for number in range(4, 2504)]
    assert shown(capfd, "job", "-n", 1200) == [f"line {number}" for number in range(1304, 2504)]


def test_the_json_is_the_wire_format_exactly(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    task_id = record.task("job")
    record.said(task_id, "tab\t\x1b[31m\x7f\x9b\u202eé日")
    record.said(task_id, '["\u00e9\u0085\x7f"]', "error", is_json=True)
    lines = shown(capfd, "job", "--json")
    assert all(line.isascii() and line.isprintable() for line in lines)
    events: Any = [decode(line) for line in lines]
    assert events[0].payload == "tab\t\x1b[31m\x7f\x9b\u202eé日"
    assert json.loads(events[1].payload) == ["\u00e9\u0085\x7f"]


def test_lines_of_a_payload_are_lines_and_a_cut_one_says_so(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    task_id = record.task("job")
    record.said(task_id, "one\ntwo\r", "error")
    record.said(task_id, "begin", original_bytes=70_000)
    record.said(task_id, "", percent=None, stream="progress")
    record.said(task_id, "")
    assert shown(capfd, "job") == [
        "[error] one",
        r"[error] two\r",
        "begin",
        "[cut: 70,000 bytes]",
        "[progress] ",
        "",
    ]


def test_following_ends_with_the_task_and_tells_how_it_ended(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    task_id = record.task("job", "running")
    record.said(task_id, "before")
    codes: list[int] = []
    follower = threading.Thread(target=lambda: codes.append(main(["tail", "-f", "job"])))
    follower.start()
    for number in range(50):
        record.said(task_id, f"line {number}")
    record.connection.execute("UPDATE tasks SET failure_type = 'E', failure_message = 'bad\x1b'")
    record.end(task_id, "failed")
    follower.join(WAIT)
    assert not follower.is_alive() and codes == [0]
    out, err = capfd.readouterr()
    assert out.splitlines() == ["before", *(f"line {number}" for number in range(50))]
    assert err == "bgworker tail: failed (E: bad\\x1b) after 1.0s\n"


def test_following_what_has_ended_prints_it_and_ends(
    nightly: Nightly, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["tail", "-f", "-n", "2", "--db", nightly.path, "load users"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["[error] one row was odd", '[warning] {"odd":[3,null]}']
    assert re.fullmatch(r"bgworker tail: completed in \S+\n", err)


@pytest.mark.parametrize("words", [["-n", "0"], ["-n", "0", "--stream", "output"]])
def test_following_without_what_was_said_before_prints_only_what_comes(
    nightly: Nightly, record: Recorder, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["tail", "-f", *words, "--db", nightly.path, "load users"]) == 0
    assert capfd.readouterr().out == ""
    task_id = record.task("job", "running")
    record.said(task_id, "before")
    codes: list[int] = []
    follower = threading.Thread(
        target=lambda: codes.append(main(["tail", "-f", "-n", "1", *words[2:], "job"]))
    )
    follower.start()
    while not (out := capfd.readouterr().out):
        assert follower.is_alive()
    record.said(task_id, "after")
    record.end(task_id, "completed")
    follower.join(WAIT)
    assert not follower.is_alive() and codes == [0]
    assert (out + capfd.readouterr().out).splitlines() == ["before", "after"]


RECORDED = """
import sys, time
from bgworker import Scheduler, SqliteSink, current_task

def job():
    task = current_task()
    for number in range(10**9):
        task.output(f"line {number}")
        task.sleep(0.01)

with Scheduler(1, sinks=[SqliteSink("bgworker.db")]) as pool:
    pool.options(name="job").submit(job)
    pool.flush()
    print("recorded", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="kills by signal")
def test_following_a_process_that_is_killed_ends_too(tmp_path: Path) -> None:
    with (
        subprocess.Popen(
            [sys.executable, "-c", RECORDED],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as writer,
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; sys.stdin.readline(); from bgworker.cli import main; "
                "sys.exit(main(['tail', '-f', '--stream', 'output', 'job']))",
            ],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as follower,
    ):
        try:
            assert writer.stdout is not None and writer.stdout.readline() == "recorded\n"
            assert (
                follower.stdin is not None
                and follower.stdout is not None
                and follower.stderr is not None
            )
            follower.stdin.write("go\n")
            follower.stdin.flush()
            assert [follower.stdout.readline() for _ in range(20)] == [
                f"line {number}\n" for number in range(20)
            ]
            writer.send_signal(signal.SIGKILL)
            assert writer.wait(WAIT) == -signal.SIGKILL
            rest = follower.stdout.read().splitlines()
            assert rest == [f"line {number}" for number in range(20, 20 + len(rest))]
            assert follower.stderr.read() == "bgworker tail: interrupted\n"
            assert follower.wait(WAIT) == 0
        finally:
            writer.kill()
            follower.kill()


def test_a_task_that_is_not_there_is_code_1(nightly: Nightly, tmp_path: Path) -> None:
    for words in (["tail", "nope"], ["tail", "-f", "nope"], ["tail", "--json", "nope"]):
        done = run_cli(*words, "--db", nightly.path, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("bgworker tail: there is no task 'nope'")


def test_without_a_task_it_is_the_last(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["tail"]) == 1
    assert "there is no task in this history yet" in capfd.readouterr().err
    record.said(record.task("old", created=record.ago(hours=2)), "then")
    record.said(record.task("new"), "now")
    for words in ([], ["-f"], ["-n", "1", "--stream", "output"]):
        assert main(["tail", *words]) == 0
        assert capfd.readouterr().out == "now\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["x", "y"], "unrecognized"),
        (["x", "--stream", "stdout"], "--stream"),
        (["x", "-n", "-1"], "-n"),
    ],
)
def test_a_wrong_command_line_is_code_2(
    record: Recorder, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["tail", *words]) == 2
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1

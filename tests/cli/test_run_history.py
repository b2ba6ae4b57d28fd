"""``bgworker run`` and the history: what is recorded where, and what ``--resume`` leaves out."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Recorder, run_cli

from bgworker import History
from bgworker.cli import estimate, live, main, run
from tests.support import environment

POSIX = pytest.mark.skipif(os.name == "nt", reason="shell commands and signals of POSIX")


def command(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


def runs_of(path: Path, name: str) -> list[str]:
    """Return what became of the tasks of a name, oldest first."""
    with History(path) as history:
        return [
            str(task.status)
            for task in reversed(history.tasks(name=name.replace("[", "[[]"), limit=None))
        ]


# ---------------------------------------------------------------- where

def test_a_plain_run_is_recorded_in_bgworker_db(tmp_path: Path) -> None:
    done = run_cli("run", "--", sys.executable, "-c", "print('hello')", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")
    with History(tmp_path / "bgworker.db") as history:
        [task] = history.tasks()
        words = [sys.executable, "-c", "print('hello')"]
        assert (task.status, task.name) == ("completed", shlex.join(words))
        assert task.metadata == {
            "cwd": os.path.realpath(tmp_path),
            "number": 1,
            "command": shlex.join(words),
            "argv": words,
        }
        assert [event.payload for event in history.streams("last")] == ["hello"]
        assert [(run.is_alive, run.ended_utc is None) for run in history.runs()] == [(False, False)]


def test_the_environment_and_then_the_option_name_another_file(tmp_path: Path) -> None:
    def files(*words: str, **env: str) -> set[str]:
        assert (
            run_cli(
                "run", *words, "--", sys.executable, "-c", "pass", cwd=tmp_path, env=env
            ).returncode
            == 0
        )
        found = {path.name for path in tmp_path.glob("*.db")}
        for path in tmp_path.glob("*.db*"):
            path.unlink()
        return found

    assert files(BGWORKER_DB="env.db") == {"env.db"}
    assert files("--db", "option.db", BGWORKER_DB="env.db") == {"option.db"}
    assert files(BGWORKER_DB="") == {"bgworker.db"}
    assert files("--no-db", BGWORKER_DB="env.db") == set()


def test_without_a_history_nothing_is_left_behind(tmp_path: Path) -> None:
    assert (
        run_cli("run", "--no-db", "--", sys.executable, "-c", "pass", cwd=tmp_path).returncode == 0
    )
    assert list(tmp_path.iterdir()) == []


@POSIX
def test_many_commands_are_recorded_with_how_they_ended(tmp_path: Path) -> None:
    lines = [
        command("print('fine')"),
        command("import sys; print('odd', file=sys.stderr); sys.exit(3)"),
        command("import time; time.sleep(600)"),
    ]
    done = run_cli(
        "run",
        "-q",
        "-j",
        "3",
        "--timeout",
        "3",
        "--name",
        "job",
        "-f",
        "-",
        cwd=tmp_path,
        input="\n".join(lines),
        stdin=None,
    )
    assert done.returncode == 1
    with History(tmp_path / "bgworker.db") as history:
        tasks = {task.name: task for task in history.tasks()}
        assert {name: str(task.status) for name, task in tasks.items()} == {
            "job-1": "completed", "job-2": "failed", "job-3": "timed_out"}
        assert tasks["job-2"].failure_type == "subprocess.CalledProcessError"
        assert [(event.stream_type, event.payload) for event in history.streams("job-2")] == [
            ("error", "odd")
        ]


def test_a_file_that_is_no_history_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "bgworker.db").write_bytes(b"x" * 5000)
    done = run_cli("run", "--", sys.executable, "-c", "print('never')", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not a history" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "bgworker.db").read_bytes() == b"x" * 5000


def test_a_place_where_nothing_can_be_written_is_refused_with_the_way_out(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--db", "missing/h.db", "--", "true"]) == 2
    err = capfd.readouterr().err
    assert "argument --db: cannot write to" in err and "create it first" in err and "--no-db" in err
    assert err.count("\n") == 1
    assert main(["run", "--db", "", "--", "true"]) == 2
    assert "expected the path of a file" in capfd.readouterr().err


# ---------------------------------------------------------------- --resume


def resume(
    folder: Path, *lines: str, words: tuple[str, ...] = (), **how: Any
) -> subprocess.CompletedProcess[str]:
    return run_cli(
        "run",
        "--resume",
        "-j",
        "1",
        *words,
        "-f",
        "-",
        cwd=folder,
        input="\n".join(lines),
        stdin=None,
        **how,
    )


@POSIX
def test_what_completed_before_is_skipped_and_the_rest_runs_again(tmp_path: Path) -> None:
    good, flaky, late = "echo good", "test -e ready && echo flaky", "echo late"
    first = resume(tmp_path, good, flaky)
    assert first.returncode == 1 and first.stdout == "[1] good\n"
    assert "completed before" not in first.stderr
    (tmp_path / "ready").touch()
    second = resume(tmp_path, good, flaky, late)
    assert (second.returncode, second.stdout) == (0, "[1] flaky\n[2] late\n")
    assert second.stderr.startswith("bgworker run: 1 of 3 commands completed before, 2 are left\n")
    third = resume(tmp_path, good, flaky, late)
    assert (third.returncode, third.stdout) == (0, "")
    assert third.stderr == "bgworker run: 3 of 3 commands completed before, 0 are left\n"
    assert runs_of(tmp_path / "bgworker.db", good) == ["completed"]
    assert runs_of(tmp_path / "bgworker.db", flaky) == ["failed", "completed"]


@POSIX
def test_a_command_is_known_by_its_text_and_directory_not_by_its_name(tmp_path: Path) -> None:
    assert resume(tmp_path, "pwd", words=("--name", "one")).returncode == 0
    assert resume(tmp_path, "pwd", words=("--name", "other")).stdout == ""
    assert resume(tmp_path, "pwd ").stdout == "", "blanks around a line do not belong to it"
    assert resume(tmp_path, "pwd -P").stdout != ""
    (tmp_path / "below").mkdir()
    done = resume(tmp_path / "below", "pwd", words=("--db", "../bgworker.db"))
    assert done.stdout == f"{os.path.realpath(tmp_path / 'below')}\n"


@POSIX
def test_equal_lines_are_skipped_as_often_as_they_completed(tmp_path: Path) -> None:
    once = "mkdir taken"  # succeeds once
    assert resume(tmp_path, once, once).returncode == 1
    (tmp_path / "taken").rmdir()
    done = resume(tmp_path, once, once)
    assert done.returncode == 0 and "1 of 2 commands completed before, 1 are left" in done.stderr
    assert "2 of 2 commands completed before" in resume(tmp_path, once, once).stderr


@POSIX
def test_a_resumed_run_takes_the_place_of_what_it_runs_again(tmp_path: Path) -> None:
    lines = ["echo good", "test -e ready", "exit 3", "test -e ready"]
    assert resume(tmp_path, *lines).returncode == 1
    resume(tmp_path / "..", "test -e ready", words=("--db", str(tmp_path / "bgworker.db")))
    (tmp_path / "ready").touch()
    assert resume(tmp_path, *lines, "exit 4").returncode == 1
    with History(tmp_path / "bgworker.db") as history:
        first, second = [history.tasks(run=run)[::-1] for run in ("last~2", "last")]
        assert [task.name for task in second] == [*lines[1:], "exit 4"]
        again = [task.metadata.get("rerun_of") for task in second]
        assert again == [first[3].task_id, first[2].task_id, first[1].task_id, None]
        assert [task.name for task in history.tasks(left=True)] == [
            "exit 4", "exit 3", "test -e ready"]
        assert [each.left for each in history.run_counts()] == [2, 1, 0], "elsewhere is not here"
    assert resume(tmp_path, *lines, "exit 4").returncode == 1
    with History(tmp_path / "bgworker.db") as history:
        assert [each.left for each in history.run_counts()] == [2, 0, 1, 0]


def test_one_command_that_completed_is_skipped_too(tmp_path: Path) -> None:
    words = ["run", "--resume", "--", sys.executable, "-c", "print('ran')"]
    assert run_cli(*words, cwd=tmp_path).stdout == "ran\n"
    done = run_cli(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "bgworker run: 1 of 1 commands completed before, 0 are left\n"


@POSIX
def test_what_was_interrupted_or_cancelled_runs_again(tmp_path: Path) -> None:
    """Both halves are real: one run is killed outright, one stopped by Ctrl-C."""
    for number in (signal.SIGKILL, signal.SIGINT):
        with subprocess.Popen(
            [sys.executable, "-m", "bgworker", "run", "-j", "1", "-f", "-"],
            cwd=tmp_path,
            text=True,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(
                "echo begun\necho $$ >pid~; mv pid~ pid; exec sleep 600\necho never\n"
            )
            process.stdin.close()
            assert process.stdout.readline() == "[1] begun\n"
            with History(tmp_path / "bgworker.db") as history:
                while not (
                    history.tasks(name="*sleep*", status="running") and (tmp_path / "pid").exists()
                ):
                    assert process.poll() is None
                child = int((tmp_path / "pid").read_text())
                (tmp_path / "pid").unlink()
                process.send_signal(number)
                process.stdout.read()
                process.wait(30)
                if number == signal.SIGKILL:
                    os.kill(child, signal.SIGKILL)
                assert {str(task.status) for task in history.tasks(name="*sleep*", limit=1)} == {
                    "interrupted" if number == signal.SIGKILL else "cancelled"}
    done = resume(tmp_path, "echo begun", "echo never")
    assert done.stdout == "never\n"


def test_without_a_history_or_with_a_broken_one_there_is_nothing_to_resume(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--resume", "--no-db", "--", "true"]) == 2
    assert (
        "argument --resume: expected a history to look into; leave out --no-db"
        in capfd.readouterr().err
    )
    Path("bgworker.db").write_bytes(b"x" * 5000)
    assert main(["run", "--resume", "--", "true"]) == 2
    assert "is not a history" in capfd.readouterr().err


def test_an_empty_file_is_resumed_like_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    words = ["run", "--resume", "--db", "empty.db", "--", sys.executable, "-c", "print('ran')"]
    assert [run_cli(*words, cwd=tmp_path).stdout for _ in range(2)] == ["ran\n", ""]


@POSIX
def test_a_long_record_is_searched_by_source(tmp_path: Path) -> None:
    """Only tasks of the very source count, whatever else completed in that directory."""
    record = Recorder(tmp_path / "bgworker.db")
    for number in range(500):
        record.insert("scripts", hash=f"{number:064x}")
        record.task(
            f"n{number}", script_hash=f"{number:064x}", metadata={"cwd": os.path.realpath(tmp_path)}
        )
    record.close()
    done = resume(tmp_path, "echo new")
    assert done.stdout == "new\n" and not re.search("completed before", done.stderr)


# ---------------------------------------------------------------- two sinks and one file

def test_a_history_is_never_taken_for_a_file_of_lines(tmp_path: Path) -> None:
    words = ["--", sys.executable, "-c", "print('ran')"]
    assert run_cli("run", "--db", "h.db", *words, cwd=tmp_path).stdout == "ran\n"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = run_cli("run", "--no-db", "--jsonl", "h.db", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        "h.db': it holds something else than lines of JSON objects" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert runs_of(tmp_path / "h.db", "*") == ["completed"]


@POSIX
@pytest.mark.parametrize("prepare", ["", "touch one", "touch one; ln one hard", "ln -s one soft"])
def test_two_sinks_with_one_file_are_refused_whatever_they_call_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], prepare: str
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(prepare, shell=True, check=True, timeout=30)
    before = sorted(os.listdir())
    other = {"touch one; ln one hard": "hard", "ln -s one soft": "soft"}.get(
        prepare, "../" + tmp_path.name + "/one"
    )
    for words in (
        ["--db", "one", "--jsonl", other],
        ["--no-db", "--jsonl", "one", "--sink", f"jsonl:{other}"],
        ["--db", other, "--sink", "jsonl:one"],
    ):
        assert main(["run", *words, "--", "true"]) == 2
        err = capfd.readouterr().err
        assert (
            "is the file of argument --" in err and "name another" in err and err.count("\n") == 1
        )
        assert sorted(os.listdir()) == before
    assert (
        main(
            [
                "run",
                "-q",
                "--no-db",
                "--jsonl",
                "/dev/null",
                "--sink",
                "jsonl:/dev/null",
                "--",
                "true",
            ]
        )
        == 0
    )


# ---------------------------------------------------------------- the time left

@POSIX
def test_lines_tell_how_long_commands_may_take_that_ran_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # the last one is the long one: the mean of the others tells nothing of it
    Path("commands").write_text("".join(f"sleep 0.0{n}\n" for n in range(1, 10)) + "sleep 30\n")
    Path("quick").write_text("".join(f"sleep 0.0{n}\n" for n in range(1, 10)) + "sleep 0.4\n")
    record = Recorder("bgworker.db")
    script = hashlib.sha256(b"sleep 30").hexdigest()
    record.insert("scripts", hash=script)
    record.task(took=30.0, script_hash=script)
    record.close()
    monkeypatch.setattr(live, "SOON", 0.0)
    monkeypatch.setattr(live, "PAUSE", 0.0)
    monkeypatch.setattr(estimate, "APART", 0.05)

    def told(*words: str) -> list[str]:
        main(["run", "-j", "1", "-q", *words])
        out, err = capfd.readouterr()
        assert out == ""
        return [line for line in err.splitlines() if line.startswith("bgworker run: ")]

    lines = told("-f", "commands", "--timeout", "1s")
    assert lines and all(
        re.fullmatch(r"bgworker run: \d of 10, [\d.]+m?s, about (29|30)s left, 1 running", line)
        for line in lines), lines
    assert not [line for line in told("-f", "quick") if "left" in line and "about 30" in line]
    assert told("--", "sleep", "0.3") == []
    monkeypatch.setattr(estimate, "APART", 10.0)
    assert told("-f", "quick") == [], "it is over too soon"


def test_a_history_that_cannot_be_read_tells_nothing_and_disturbs_nothing(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no history " * 100)
    for path in ("missing", "text", "."):
        assert run._usual_seconds(str(tmp_path / path), ["a"]) == {}
    assert run._usual_seconds(None, ["a"]) == {}
    assert sorted(os.listdir(tmp_path)) == ["text"]


def test_many_commands_are_asked_for_some_at_a_time_and_all_are_found(
    record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(25):
        record.insert("scripts", hash=str(number))
        record.task(took=float(number), script_hash=str(number))
    monkeypatch.setattr(run, "MOST_ASKED", 10)
    asked = [str(number) for number in range(30)]
    assert run._usual_seconds(record.path, asked) == {
        str(number): float(number) for number in range(25)}

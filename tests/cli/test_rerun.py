"""``bgworker rerun``, with real commands: exactly those that are meant run again, as they ran."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tests.histories import RUN, Recorder, rows_of

from bgworker import History
from bgworker.cli import main
from bgworker.history import schema
from bgworker.model.ids import new_id
from tests.support import environment, until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="shell commands and file names of POSIX")


def cli(folder: Path, *words: object, input: bytes | None = None,
        code: int | None = 0) -> subprocess.CompletedProcess[bytes]:
    """Run the command line with words that may be any bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "bgworker", *[os.fsencode(str(word)) for word in words]],
        cwd=folder, input=input, capture_output=True, env=environment(PYTHONWARNINGS="error"),
        timeout=120)
    assert code is None or done.returncode == code, done.stderr.decode()
    return done


def told(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    return done.stderr.decode().splitlines()


# ---------------------------------------------------------------- exactly what ran

ODD = [b"plain", b"two words", b"", b" ", b"quote's", b'"double"', b"new\nline", b"tab\there",
       b"back\\slash", b"$HOME `id` $(id)", b"*", b"?", b"~", b"#", b"-n", b"--", b";", b"{}",
       "é日本👩‍🚀".encode(), b"\xff\xfe bytes", b"caf\xe9", b"\x1b[31mred", b"a\rb", b"\x80\n'\"",
       b"%s %d", b"!x", b"\xed\xa0\x80", b"\xef\xbb\xbf"]
"""Words of a command, of which some are no UTF-8."""

TELL = [sys.executable, "-S", "-c",
        "import os, sys; sys.stdout.write(repr(([os.fsencode(each) for each in sys.argv[1:]], "
        "os.getcwdb())))"]


@pytest.mark.parametrize("word", [b"plain", b"new\nline", b"caf\xe9", b" 'x' ", ODD[18]], ids=ascii)
def test_words_and_directory_come_back_byte_for_byte(tmp_path: Path, word: bytes) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"in " + word.replace(b"\0", b"") + b" here")
    os.mkdir(folder)
    first = subprocess.run(
        [sys.executable, "-m", "bgworker", "run", "--db", os.fsencode(tmp_path / "h.db"), "--",
         *TELL, word, b"and", word], cwd=folder, capture_output=True, env=environment(), timeout=60)
    assert first.returncode == 0, first.stderr
    assert eval(first.stdout) == ([word, b"and", word], os.path.realpath(folder))
    done = cli(tmp_path, "rerun", "--db", "h.db", "last")
    assert done.stdout == first.stdout
    with History(tmp_path / "h.db") as history:
        again, before = history.tasks()
    assert again.metadata == {**before.metadata, "rerun_of": before.task_id}
    assert (again.name, again.script_id, again.script_hash) == (
        before.name, before.script_id, before.script_hash)
    assert again.run_id != before.run_id


def test_a_line_for_the_shell_comes_back_byte_for_byte(tmp_path: Path) -> None:
    line = b"printf '%s\\n' \"caf\xe9 $((1 + 2))\" '\xc3\xa9 `x`' | od -An -tx1; pwd"
    first = cli(tmp_path, "run", "--no-prefix", "-f", "-", input=line)
    (tmp_path / "below").mkdir()
    done = cli(tmp_path / "below", "rerun", "--db", "../bgworker.db", "last")
    assert done.stdout == first.stdout and first.stdout.count(b"\n") >= 2
    assert first.stdout.endswith(os.fsencode(os.path.realpath(tmp_path)) + b"\n")


# ---------------------------------------------------------------- 300 commands

COUNT, FAILING = 300, 20
WANTS = {number for number in range(1, COUNT + 1) if number % (COUNT // FAILING) == 7}
"""Numbers of the commands that fail as long as there is no flag in their directory."""

WORK = """
{ pwd -P; printf '\\0'; printf '%s\\0' "$@"; } >>"$JOURNAL/$1"
case " $WANTS " in *" $1 "*) test -e flag ;; esac
"""
"""Notes where and with what it runs."""


class Bench:
    """Commands that have run once, of which one in 15 failed: 20 of 300."""

    def __init__(self, root: Path, count: int = COUNT) -> None:
        self.root = root
        self.home = Path(os.fsdecode(
            os.path.join(os.fsencode(os.path.realpath(root)), b"caf\xe9 'o' \n")))
        self.journal = root / "journal"
        self.home.mkdir()
        self.journal.mkdir()
        for folder in (root, self.home):
            (folder / "work.sh").write_text(WORK)
        self.words = [b"%d %s" % (number, ODD[number % len(ODD)])
                      for number in range(1, count + 1)]
        self.run(self.words, self.home, ["sh", "work.sh", "{#}", "{}", "and", "{}"])
        self.check({number: 1 for number in range(1, count + 1)})

    def run(self, words: list[bytes], cwd: Path, command: list[str]) -> None:
        """Run a command once for each of these words."""
        self.cli(["run", "-q", "-j", "4", "-0", "-a", "-", "--", *command], 1, cwd,
                 b"".join(word + b"\0" for word in words))

    def cli(self, words: list[str], code: int, cwd: Path | None = None,
            input: bytes | None = None) -> str:
        """Run the command line, away from the home of the commands; return what it told."""
        done = subprocess.run(
            [sys.executable, "-m", "bgworker", *words], cwd=cwd or self.root, input=input,
            capture_output=True, timeout=300, env=environment(
                JOURNAL=str(self.journal), BGWORKER_DB=str(self.root / "h.db"),
                WANTS=" ".join(map(str, sorted(WANTS)))))
        assert done.returncode == code, done.stderr.decode()
        return done.stdout.decode() + done.stderr.decode()

    def check(self, times: dict[int, int]) -> None:
        """See that each command ran so often, always in its directory and with its words."""
        for number, words in enumerate(self.words, 1):
            noted = b"%s\n\0%d\0%s\0and\0%s\0" % (os.fsencode(self.home), number, words, words)
            assert (self.journal / str(number)).read_bytes() == noted * times[number], number


AGAIN = {number: 2 if number in WANTS else 1 for number in range(1, COUNT + 1)}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_of_300_commands_exactly_the_20_that_failed_run_again(bench: Bench) -> None:
    (bench.home / "flag").touch()
    told = bench.cli(["rerun", "--failed", "-j", "4"], 0)
    assert re.match(r"bgworker rerun: 20 of the run [0-9a-f]{8} are left to run again\n", told)
    bench.check(AGAIN)
    with History(bench.root / "h.db") as history:
        first, second = [history.tasks(run=run, limit=None) for run in ("last~1", "last")]
        assert len(first) == COUNT and len(second) == FAILING
        failed = {task.task_id: task for task in first if task.status == "failed"}
        assert {task.metadata["rerun_of"] for task in second} == failed.keys()
        assert {task.status for task in second} == {"completed"}
        for task in second:
            before = failed[task.metadata["rerun_of"]]
            assert (task.name, task.metadata["argv"], task.metadata["cwd"]) == (
                before.name, before.metadata["argv"], before.metadata["cwd"])
        assert history.tasks(left=True) == []
    told = bench.cli(["diff"], 0)
    assert told.splitlines()[-1] == "20 mended; 280 not run again"
    told = bench.cli(["rerun", "--failed"], 0)
    assert "nothing of the run" in told and "of the run" not in told.partition("again")[2]
    bench.check(AGAIN)


def test_what_is_not_mended_stays_left(bench: Bench) -> None:
    """A twin: the same steps without the flag."""
    assert "20 commands: 0 completed, 20 failed" in bench.cli(
        ["rerun", "--failed", "-q"], 1)
    bench.check(AGAIN)
    with History(bench.root / "h.db") as history:
        left = history.tasks(left=True, limit=None)
        assert len(left) == FAILING and {task.run_id for task in left} == {history.run_id("last")}
    assert bench.cli(["diff"], 0).splitlines()[-1] == (
        "no difference; 20 still failing, 280 not run again")


@pytest.mark.parametrize("how", ["as it was", "all again", "elsewhere", "other words"])
def test_a_rerun_of_something_else_would_be_seen(tmp_path: Path, how: str) -> None:
    """A twin: by hand, what was run is run again, and then something else than that."""
    bench = Bench(tmp_path, 45)
    words = bench.words if how == "all again" else [
        bench.words[number - 1] for number in sorted(WANTS) if number <= 45]
    link = "or" if how == "other words" else "and"
    bench.run(words, bench.root if how == "elsewhere" else bench.home,
              ["sh", "-c", f'exec sh work.sh "${{1%% *}}" "$1" {link} "$1"', "sh", "{}"])
    with nullcontext() if how == "as it was" else pytest.raises(AssertionError):
        bench.check(AGAIN)


def test_commands_of_several_directories_run_again_together_each_in_its_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        cli(tmp_path / name, "run", "-q", "--db", "../h.db", "-f", "-",
            input=b"true\ntest -e flag && pwd", code=1)
    with History(tmp_path / "h.db") as history:
        ids = [task.task_id for task in history.tasks(left=True)]
    cli(tmp_path, "rerun", "-q", "--db", "h.db", *ids, ids[0][-8:], code=1)
    for name in ("one", "two"):
        (tmp_path / name / "flag").touch()
    done = cli(tmp_path, "rerun", "-k", "--no-prefix", "--db", "h.db", "--failed")
    assert done.stdout.decode().split() == [
        os.path.realpath(tmp_path / name) for name in ("two", "one")], "in the order of then"
    with History(tmp_path / "h.db") as history:
        assert [each.left for each in history.run_counts()] == [0] * 4
        assert [len(history.tasks(run=run)) for run in ("last", "last~1")] == [2, 2]


# ---------------------------------------------------------------- what --failed means

def test_failed_is_what_ended_without_completing_and_was_not_run_again(tmp_path: Path) -> None:
    record = Recorder(tmp_path / "bgworker.db")
    older = record.run(new_id(1), ended=record.now)
    run = record.run(new_id(2), host="elsewhere")
    place = {"cwd": os.path.realpath(tmp_path)}
    record.task("older", "failed", run_id=older, metadata={"command": "echo older", **place})
    for status in ("completed", "failed", "timed_out", "cancelled", "interrupted", "running",
                   "scheduled"):
        for name in (status, f"{status} once more"):
            task_id = record.task(name, status, run_id=run,
                                  metadata={"command": f"echo '{name}'", **place})
        record.task("again", rerun_of=task_id)
    record.close()
    done = cli(tmp_path, "rerun", "--failed", "-j", "1", "--no-prefix")
    assert told(done)[0] == (f"bgworker rerun: 4 of the run {run[-8:]} are left to run again; "
                             "2 run or wait, and are left alone")
    assert done.stdout.decode().split("\n")[:-1] == [
        "failed", "timed_out", "cancelled", "interrupted"]
    done = cli(tmp_path, "rerun", "--failed")
    assert told(done) == [
        f"bgworker rerun: nothing of the run {runs_of(tmp_path)[0][-8:]} is left to run again; "
        f"of the run {run[-8:]} there are 2: python -m bgworker rerun --failed "
        f"--run {run[-8:]}".replace("python", os.path.basename(sys.executable))]
    done = cli(tmp_path, "rerun", "--failed", "--run", run[-8:])
    assert told(done) == [f"bgworker rerun: nothing of the run {run[-8:]} is left to run again; "
                          "2 run or wait, and are left alone"]
    assert cli(tmp_path, "rerun", "--failed", "--run", "last~2").stdout == b"older\n"


def runs_of(folder: Path) -> list[str]:
    with History(folder / "bgworker.db") as history:
        return [run.run_id for run in history.runs()]


def test_what_was_interrupted_by_a_kill_runs_again(tmp_path: Path) -> None:
    with subprocess.Popen(
            [sys.executable, "-m", "bgworker", "run", "-j", "1", "-f", "-"], cwd=tmp_path,
            env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"echo begun; test -e flag || { echo $$ >pid~; mv pid~ pid; "
                            b"exec sleep 600; }\necho never\n")
        process.stdin.close()
        assert process.stdout.readline() == b"[1] begun\n"
        until((tmp_path / "pid").exists)
        with History(tmp_path / "bgworker.db") as history:
            until(lambda: history.counts().keys() == {"running", "scheduled"})
            refused = told(cli(tmp_path, "rerun", "1", code=2))
            assert refused[1].endswith(
                "it has not ended; wait for it, or stop it with bgworker cancel")
            process.kill()
            process.wait(30)
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    (tmp_path / "flag").touch()
    done = cli(tmp_path, "rerun", "--failed", "-j", "1")
    assert done.stdout == b"[1] begun\n[2] never\n"
    assert cli(tmp_path, "tasks", "--left").stdout == b"nothing is left\n"


# ---------------------------------------------------------------- the options of run

def test_the_time_limit_of_then_holds_unless_another_is_given(tmp_path: Path) -> None:
    cli(tmp_path, "run", "--timeout", "0.3", "--", "sleep", "60", code=124)
    cli(tmp_path, "rerun", "last", code=124)
    cli(tmp_path, "rerun", "last", "--timeout", "0.2", code=124)
    with History(tmp_path / "bgworker.db") as history:
        assert [task.timeout for task in history.tasks()] == [0.2, 0.3, 0.3]


def test_the_exit_code_and_the_options_are_those_of_run(tmp_path: Path) -> None:
    cli(tmp_path, "run", "-q", "-f", "-",
        input=b"exit 3\necho x >>count; test $(wc -l <count) -ge 3\nkill -9 $$", code=1)
    cli(tmp_path, "rerun", "1", code=3)
    done = cli(tmp_path, "rerun", "2", "--retries", "2", "--run", "last~1", "--tag", "--jsonl",
               "e.jsonl", "--sink", "sqlite:other.db")
    assert (tmp_path / "count").read_text() == "x\n" * 3
    assert b"attempt 1 of 2 failed" in done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert lines[-1]["task"]["metadata"]["rerun_of"]
    assert rows_of(tmp_path / "other.db", "SELECT rerun_of FROM tasks") == [
        (lines[-1]["task"]["metadata"]["rerun_of"],)]
    cli(tmp_path, "rerun", "3", "--run", "last~2", code=137)
    done = cli(tmp_path, "rerun", "--failed", "--fail-fast", code=137)
    assert b"--no-db" not in cli(tmp_path, "rerun", "--help").stdout


# ---------------------------------------------------------------- what is refused

def test_all_that_cannot_run_again_is_listed_before_anything_runs(tmp_path: Path) -> None:
    record = Recorder(tmp_path / "bgworker.db")
    run = record.run(ended=record.now)
    good = {"command": "touch ran", "cwd": os.path.realpath(tmp_path)}
    bad: dict[str, dict[str, Any]] = {
        "gone": {**good, "cwd": "/no/such\nplace"},
        "nowhere": {"command": "touch ran"},
        "cut": {"truncated": 70_000, "head": '{"number":1'},
        "other": {"ticket": 7},
        "damaged": {**good, "command": 5},
        "damaged words": {**good, "argv": ["touch", {"latin-1": "\u20ac"}]},
        "damaged argv": {**good, "argv": "touch ran"},
        "NUL": {**good, "command": "touch ran\0"},
        "empty": {**good, "argv": []},
        "half": {**good, "command": "\ud800"},
        "elsewhere": {**good, "cwd": "."},
    }
    reasons = [
        r"its directory '/no/such\nplace' is not there any more; create it, or run the command",
        "its directory is not recorded, since it was gone already; run the command anew",
        "its command was too long to be recorded whole; run it anew",
        "its command is not recorded, as only bgworker run does that; run it anew",
        *["its record is damaged; run the command anew"] * 3,
        "expected no NUL character in a command, got", "expected a command, got ",
        *["its record is damaged; run the command anew"] * 2,
        "it is the Python function jobs:load, which only its own program can call; submit it there",
        "it is the Python function jobs:load, which only its own program can call; there, "
        "Scheduler.resume runs it again with also=[\"failed\"]",
        "it is the Python function jobs:load, which only its own program can call; there, "
        "Scheduler.resume runs it again",
    ]
    ids = [record.task(name, "failed", run_id=run, metadata=each) for name, each in bad.items()]
    ids.append(record.task("load", "failed", run_id=run, script_id="jobs:load"))
    mark = {"resumable": {"name": "load", "version": 1}}
    for status in ("failed", "interrupted"):
        ids.append(record.task("load", status, run_id=run, script_id="jobs:load", metadata=mark))
    record.task("fine", "failed", run_id=run, metadata=good)
    done = cli(tmp_path, "rerun", "--failed", code=2)
    first, heading, *lines = told(done)
    assert heading == ("bgworker rerun: error: 14 of 15 cannot be run again, so nothing was "
                       "started:")
    for line, task_id, name, reason in zip(lines, ids, [*bad, *["load"] * 3], reasons, strict=True):
        assert line.startswith(f"bgworker rerun: {task_id[-8:]} ({name}): {reason}"), line
    assert done.stdout == b"" and not (tmp_path / "ran").exists()
    cli(tmp_path, "rerun", "fine")
    assert (tmp_path / "ran").exists(), "the twin: nothing but the others stood in its way"
    record.close()


@pytest.mark.parametrize("timeout", [-5.0, 0.0, 1e12])
def test_a_time_limit_that_no_task_can_have_is_refused(
        record: Recorder, capfd: pytest.CaptureFixture[str], timeout: float) -> None:
    record.task("job", "failed", run_id=record.run(ended=record.now), timeout_sec=timeout,
                metadata={"command": "touch ran", "cwd": os.getcwd()})
    assert main(["rerun", "job"]) == 2
    assert capfd.readouterr().err.endswith("(job): its record is damaged; run the command anew\n")
    assert not os.path.exists("ran")


def test_of_an_empty_history_nothing_is_left(record: Recorder,
                                             capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["rerun", "--failed"]) == 0
    assert capfd.readouterr().err == "bgworker rerun: nothing is recorded yet\n"


def test_more_than_a_hundred_refusals_are_counted(record: Recorder,
                                                  capfd: pytest.CaptureFixture[str]) -> None:
    run = record.run(ended=record.now)
    for number in range(130):
        record.task(f"load {number}", "failed", run_id=run, script_id="jobs:load")
    assert main(["rerun", "--failed"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 103 and lines[-1] == "bgworker rerun: ... and 30 more"


def test_what_was_run_again_is_refused_and_the_last_attempt_named(tmp_path: Path) -> None:
    cli(tmp_path, "run", "--name", "job", "--", "false", code=1)
    cli(tmp_path, "rerun", "job", code=1)
    cli(tmp_path, "rerun", "job", code=1)
    assert told(cli(tmp_path, "rerun", "last", code=1))[0].startswith(
        "bgworker rerun: failed (exit code 1) after "), "its lines have its own name"
    with History(tmp_path / "bgworker.db") as history:
        last, _, _, first = history.tasks()
    done = cli(tmp_path, "rerun", first.task_id, "nobody", "job", code=2)
    assert told(done)[1:] == [
        f"bgworker rerun: {first.task_id} (job): it was run again already; the last time as "
        f"{last.task_id[-8:]} (failed), which can be named instead",
        "bgworker rerun: there is no task 'nobody' in this history; expected an id, the beginning "
        "of one or its last 8 digits, a name, last, or the number of a command"]
    with History(tmp_path / "bgworker.db") as history:
        assert len(history.tasks()) == 4


@pytest.mark.parametrize("words, complaint", [
    ([], "expected either TASK or --failed, got neither; name tasks, or use --failed for all "),
    (["last", "--failed"], "expected either TASK or --failed, got both; "),
    (["last", "--", "true"], "expected TASK or --failed, got -- true; what is not recorded is run"),
    (["--failed", "--run", "nope"], "argument --run: expected the id of a run of this history"),
    (["last", "--no-db"], "unrecognized arguments: --no-db"),
    (["last", "-j", "0"], "argument -j/--jobs: expected a whole number >= 1"),
    (["last", "--jsonl", "no/such/place"], "argument --jsonl: cannot write to '"),
])
def test_a_wrong_command_line_is_one_line_and_code_2(
        record: Recorder, capfd: pytest.CaptureFixture[str], words: list[str],
        complaint: str) -> None:
    record.task("job", "failed", run_id=record.run(ended=record.now),
                metadata={"command": "touch ran", "cwd": os.getcwd()})
    assert main(["rerun", *words]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"bgworker rerun: error: {complaint}"), err
    assert err.count("\n") == 1 and not os.path.exists("ran")


def test_a_file_of_an_earlier_version_is_read_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "bgworker.db"
    import sqlite3
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in schema.MADE[0]:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    connection.execute("PRAGMA user_version = 1")
    connection.execute("INSERT INTO runs (run_id, ended_utc) VALUES (?, '2025')", (RUN,))
    connection.execute(
        "INSERT INTO tasks (id, run_id, name, status, created_utc, metadata_json, last_seq) "
        "VALUES (?, ?, 'old', 'failed', '2025', ?, 1)",
        (RUN, RUN, json.dumps({"cwd": str(tmp_path), "command": "echo again"})))
    connection.close()
    assert cli(tmp_path, "rerun", "--failed").stdout == b"again\n"
    assert rows_of(path, "SELECT name, rerun_of FROM tasks WHERE rerun_of IS NOT NULL") == [
        ("old", RUN)]

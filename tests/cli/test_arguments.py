"""The commands that ``bgworker run`` makes of arguments, and how it reads them: real processes,
files and pipes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from bgworker import History
from bgworker.cli import jobs, main
from bgworker.cli.commands import original
from bgworker.model import wire
from tests.histories import run_cli
from tests.support import environment, until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the commands are those of POSIX")

TELL = [sys.executable, "-S", "-c",
        "import os, sys; print([os.fsencode(word) for word in sys.argv[1:]])"]
"""Tells its arguments exactly."""

ODD = ["a b", "it's", '"', "$(touch evil)", "a;touch evil", "`touch evil`", "*", "\\", "", "-x",
       "{}", "new\nline", "gr\u00fc\u00dfe \u20ac", "caf\udce9 \udcff"]


class Cli:
    """Runs the command line in this process and in this folder."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *words: str, code: int = 0) -> tuple[list[str], str]:
        """Return the lines of stdout, sorted, and stderr."""
        assert main(["run", *words]) == code
        out, err = self._capfd.readouterr()
        return sorted(out.splitlines()), err


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(capfd)


def told(*runs: list[str]) -> list[str]:
    """Return what commands print that tell these arguments."""
    return sorted(f"[{number}] {[os.fsencode(word) for word in words]}"
                  for number, words in enumerate(runs, 1))


def recorded(path: Path) -> list[Any]:
    """Return the tasks of the history in the order of their creation."""
    with History(path) as history:
        return sorted(history.tasks(limit=None), key=lambda task: task.task_id)


# ---------------------------------------------------------------- words


def test_no_argument_is_seen_by_a_shell_and_each_is_recorded_exactly(
    run: Cli, tmp_path: Path
) -> None:
    assert run("--", *TELL, "{}", ":::", *ODD)[0] == told(*([odd] for odd in ODD))
    assert "evil" not in os.listdir()
    tasks = recorded(tmp_path / "bgworker.db")
    assert [[original(word) for word in task.metadata["argv"]] for task in tasks] == [
        [*TELL, odd] for odd in ODD]
    for task, odd in zip(tasks, ODD):
        assert original(task.metadata["command"]) == shlex.join([*TELL, odd])
        assert original(task.metadata["cwd"]) == os.getcwd()


def test_a_long_command_is_recorded_whole_and_its_end_is_told(run: Cli, tmp_path: Path) -> None:
    words = ["sh", "-c", "exit 3", *[letter * 120_000 for letter in "abc"]]
    _, err = run("--", *words, code=3)
    assert err.startswith("bgworker run: failed (exit code 3) after ") and len(err) < 500
    [task] = recorded(tmp_path / "bgworker.db")
    assert task.metadata["argv"] == words
    out, _ = run("--", "seq", "-s", ".", "30000")
    with History("bgworker.db") as history:
        lines = [event.payload for event in history.streams("last")]
    assert (len(lines), len(lines[0])) == (3, 65_536), "and lines come in pieces as ever"
    assert sorted(lines) == out


def test_a_shell_that_is_asked_for_sees_them_and_runs_what_they_say(run: Cli) -> None:
    run("--", "sh", "-c", "echo {}", ":::", "a;touch evil")
    assert os.path.exists("evil"), "the harness could not tell"
    os.remove("evil")
    run("--", "sh", "-c", 'echo "$1"', "sh", "{}", ":::", "a;touch evil")
    assert not os.path.exists("evil")


@pytest.mark.parametrize("words", [
    [*TELL, "{}", ":::", "-q", "b"],
    ["--", *TELL, "{}", ":::", "-q", "b"],
    ["-j2", *TELL, ":::", "-q", "b"],
    ["--arg-sep", ",,", "--", *TELL, "{}", ",,", "-q", "b"],
    ["-I", ",,", "--", *TELL, ",,", ":::", "-q", "b"],
])
def test_arguments_follow_three_colons_with_and_without_dashes(run: Cli, words: list[str]) -> None:
    assert run("--no-db", *words)[0] == told(["-q"], ["b"])


def test_dashes_inside_a_command_and_among_arguments_stay(run: Cli) -> None:
    assert run("--no-db", *TELL, "--", "{}", ":::", "-j", "--")[0] == told(["--", "-j"],
                                                                       ["--", "--"])


def test_a_literal_separator_is_had_by_choosing_another(run: Cli) -> None:
    assert run("--no-db", "--arg-sep", ",,", "--", *TELL, ":::", "::::")[0] == [
        "[b':::', b'::::']"]
    assert run("--no-db", "--arg-sep", ",,", "--", *TELL, ":::", ",,", "a", "b")[0] == (
        told([":::", "a"], [":::", "b"]))


def test_several_sources_give_every_combination_in_order(run: Cli) -> None:
    Path("list").write_text("x\ny z\n")
    assert run("--no-db", "--", *TELL, "{#}", "{2}", "{1}", ":::", "a", "b", "::::", "list")[0] == (
        told(["1", "x", "a"], ["2", "y z", "a"], ["3", "x", "b"], ["4", "y z", "b"]))
    assert run("--no-db", "-a", "list", "--", *TELL, ":::", "a")[0] == told(["x", "a"],
                                                                       ["y z", "a"])


def test_without_a_command_each_argument_is_a_line_for_the_shell(run: Cli) -> None:
    out, _ = run("--no-db", ":::", "echo a | tr a b", "exit 3", code=1)
    assert out == ["[1] b"]


def test_no_argument_is_nothing_to_run(run: Cli) -> None:
    Path("empty").touch()
    for words in (["--", "false", ":::"], ["--", "false", "{}", ":::", "a", ":::"],
                  ["-a", "empty", "--", "false"]):
        assert run(*words) == ([], "bgworker run: there is no argument, so nothing was run\n")
    assert os.listdir() == ["empty"]


def test_one_argument_is_one_command_and_its_exit_code_is_ours(run: Cli) -> None:
    out, err = run("--no-db", "--", "sh", "-c", "echo said; exit {}", ":::", "7", code=7)
    assert out == ["said"] and err.startswith("bgworker run: failed (exit code 7)")


REFUSED = [
    (["-f", "list", "--", "x", ":::", "a"], "expected either a command or -f FILE, got both -f list"
     " and x ::: a; leave one out, or use -a FILE"),
    (["-f", "list", "-a", "list"], "expected either a command or -f FILE"),
    (["-a", "list"], "argument -a: expected a command to give each line of 'list' to"),
    (["-a", "missing", "--", "x"], "argument -a: cannot read 'missing'"),
    (["--", "x", "::::", "missing"], "argument ::::: cannot read 'missing'"),
    (["--", "x", ":::", "a", ":::+", "b"], ":::+: expected ::: or ::::, which combine"),
    (["-I", ",,", "--", "x", ",,"], "argument -I: expected a command and arguments"),
    (["-I", "", "--", "x", ":::", "a"], "argument -I: expected at least one character"),
    (["--", "x", "{2}", ":::", "a"], "expected {1} to {1}, for there is one source of arguments"),
    (["--", "{}", ":::", "ok", ""], "argument 2: expected a command, got"),
    (["-a", "nul", "--", "x"], "argument 2: expected no NUL"),
]


@pytest.mark.parametrize("words, message", REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_cannot_be_used_is_refused_in_one_line_and_nothing_runs(
    run: Cli, words: list[str], message: str
) -> None:
    Path("list").write_text("a\n")
    Path("nul").write_bytes(b"a\nb\0c\n")
    before = sorted(os.listdir())
    out, err = run(*words, code=2)
    assert out == [] and err.count("\n") == 1
    assert message in err
    assert sorted(os.listdir()) == before


def test_stdin_is_read_once(tmp_path: Path) -> None:
    done = run_cli("run", "-a", "-", "--", "x", "::::", "-", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("bgworker run: error: expected to read stdin once, got - twice; "
                           "name a file\n")


# ---------------------------------------------------------------- lines


def started(*words: str, cwd: Path, **how: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "bgworker", "run", *words], cwd=cwd,
        env=environment(PYTHONWARNINGS="error"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True, **how)


def test_each_line_of_a_file_is_one_argument_whatever_is_in_it(run: Cli) -> None:
    lines = [odd for odd in ODD if "\n" not in odd] + [" blanks ", "# no comment", "cr\r", ""]
    Path("list").write_bytes(b"".join(os.fsencode(line) + b"\n" for line in lines))
    assert run("--no-db", "-a", "list", "--", *TELL)[0] == told(*([line] for line in lines))
    Path("list").write_bytes(b"no\nend")
    assert run("--no-db", "-a", "list", "--", *TELL)[0] == told(["no"], ["end"])


def test_names_with_newlines_come_with_a_nul_behind_them(run: Cli) -> None:
    Path("list").write_bytes(b"".join(os.fsencode(odd) + b"\0" for odd in ODD))
    assert run("--no-db", "-0", "-a", "list", "--", *TELL)[0] == told(*([odd] for odd in ODD))
    assert "argument --retries: expected a whole number" in run("--retries", "-1", "x", code=2)[1]


def test_lines_out_of_a_pipe_are_the_same_as_those_of_a_file(tmp_path: Path) -> None:
    data = b"".join(b"%d %s\n" % (n, b"x" * (n * 997 % 70_000)) for n in range(40)) + b"\nlast"
    (tmp_path / "list").write_bytes(data)
    code = "import sys, zlib; print(zlib.crc32(sys.argv[1].encode()))"
    words = ["--no-db", "-q", "-j1", "--", sys.executable, "-S", "-c", code, "{}"]
    outs = []
    for first, sent in (("list", b""), ("-", data)):
        with started("-a", first, *words, cwd=tmp_path) as proc:
            outs.append(proc.communicate(sent, timeout=60)[0])
    assert outs[0] == outs[1] and outs[0].count(b"\n") == 42


@pytest.mark.parametrize("words, line", [
    (["-f", "-"], "echo out; echo ran >ran"),
    (["-a", "-", "--", "sh", "-c", "echo out; echo ran >$1", "sh", "{}"], "ran"),
])
def test_the_first_command_runs_before_the_pipe_is_closed(
    tmp_path: Path, words: list[str], line: str
) -> None:
    with started(*words, cwd=tmp_path) as proc:
        assert proc.stdin is not None and proc.stdout is not None
        proc.stdin.write(f"{line}\n{line}".encode())
        proc.stdin.flush()
        assert proc.stdout.readline() == b"[1] out\n"
        assert proc.poll() is None, "the last line may not have ended"
        out, err = proc.communicate(timeout=60)
    assert (proc.returncode, out) == (0, b"[2] out\n")
    assert err.splitlines()[-1].startswith(b"2 commands: 2 completed in ")


def test_what_needs_to_know_how_many_there_are_waits_for_all(tmp_path: Path) -> None:
    with started("--halt", "now,done=50%", "-j1", "-f", "-", cwd=tmp_path) as proc:
        assert proc.stdin is not None
        proc.stdin.write(b"echo 1\necho 2\necho 3\necho 4\n")
        proc.stdin.flush()
        time.sleep(1.0)
        assert list(tmp_path.iterdir()) == []
        out, err = proc.communicate(timeout=60)
    assert (proc.returncode, out) == (0, b"[1] 1\n[2] 2\n")
    assert b"4 commands: 2 completed, 2 cancelled in " in err


def test_a_signal_is_answered_while_the_pipe_is_silent(tmp_path: Path) -> None:
    with started("-j1", "-f", "-", cwd=tmp_path) as proc:
        assert proc.stdin is not None and proc.stdout is not None
        proc.stdin.write(b"echo go; exec sleep 600\necho never\n")
        proc.stdin.flush()
        assert proc.stdout.readline() == b"[1] go\n"
        until(lambda: len(recorded(tmp_path / "bgworker.db")) == 2)
        proc.send_signal(signal.SIGINT)
        assert proc.wait(30) == 130
        proc.stdin.close()
        assert proc.stdout.read() == b""
        proc.stderr.close()  # type: ignore[union-attr]
    assert [task.status for task in recorded(tmp_path / "bgworker.db")] == ["cancelled"] * 2


def test_what_is_no_command_fails_alone_where_others_run_already(tmp_path: Path) -> None:
    with started("-f", "-", cwd=tmp_path) as proc:
        _, err = proc.communicate(b"echo a\necho b\0c\necho d\n", timeout=60)
    assert proc.returncode == 1
    assert b"[2] failed (ConfigurationError: line 2 of 'stdin': expected no NUL" in err
    assert b"3 commands: 2 completed, 1 failed in" in err
    tasks = recorded(tmp_path / "bgworker.db")
    assert [task.status for task in tasks] == ["completed", "failed", "completed"]
    assert "command" not in tasks[1].metadata, "nothing that could be run again"


def test_a_pipe_is_read_no_further_than_commands_may_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "AHEAD", 20)
    os.mkfifo("list")
    script = 'until [ -e go ]; do sleep 0.05; done; echo "$1"'
    words = ["-q", "--no-db", "--jsonl", "e.jsonl", "-j1", "-a", "list", "--", "sh", "-c", script,
             "sh"]
    codes: list[int] = []
    thread = Thread(target=lambda: codes.append(main(["run", *words])))
    thread.start()
    with open("list", "wb") as pipe:
        pipe.write(b"".join(b"%d\n" % number for number in range(100)))

    def tasks() -> int:
        lines = Path("e.jsonl").read_bytes().splitlines() if os.path.exists("e.jsonl") else []
        return len({wire.decode(line).task_id for line in lines})  # type: ignore[union-attr]

    until(lambda: tasks() == 20)
    time.sleep(0.5)
    assert tasks() == 20
    Path("go").touch()
    thread.join(60)
    assert codes == [0] and tasks() == 100


# ---------------------------------------------------------------- resumed


def test_a_resumed_run_knows_its_commands_by_their_words_and_keeps_the_numbers(run: Cli) -> None:
    words = ["--resume", "--name", "job", "--", "sh", "-c", "echo {#}; test {} != b || test -e ok",
             ":::", "a", "b", "c"]
    assert run(*words, code=1)[0] == ["[1] 1", "[2] 2", "[3] 3"]
    Path("ok").touch()
    out, err = run(*words)
    assert out == ["2"] and "2 of 3 commands completed before, 1 are left" in err
    assert run(*words)[0] == []

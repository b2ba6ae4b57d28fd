"""``bgworker run`` as its users see it: real processes, real files, a real pseudo-terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bgworker.model import wire
from bgworker.cli import main
from bgworker.model.events import LifecycleEvent
from tests.support import ROOT, environment, until
from tests.terminal import Emulator, on_terminal

PYTHON = os.path.basename(sys.executable)
WAIT = 30.0
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals and shell commands of POSIX")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def line(code: str) -> str:
    return shlex.join(python(code)) if os.name != "nt" else subprocess.list2cmdline(python(code))


def strict_environment(**more: str) -> dict[str, str]:
    return environment(**{"PYTHONWARNINGS": "error", "PYTHONUTF8": "1", **more})


def cli(
    *words: str, cwd: Path, input: str | bytes = b"", **env: str
) -> subprocess.CompletedProcess[str]:
    data = input.encode() if isinstance(input, str) else input
    done = subprocess.run(
        [sys.executable, "-m", "bgworker", *words],
        cwd=cwd,
        env=strict_environment(**env),
        input=data,
        capture_output=True,
        timeout=WAIT,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args,
        done.returncode,
        done.stdout.decode().replace("\r\n", "\n"),
        done.stderr.decode().replace("\r\n", "\n"),
    )


@contextlib.contextmanager
def started(*words: str, cwd: Path, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The command line in a session of its own, killed with all of it at the end if need be."""
    with subprocess.Popen(
        [sys.executable, "-m", "bgworker", *words],
        cwd=cwd,
        env=strict_environment(),
        start_new_session=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
    ) as proc:
        try:
            yield proc
        finally:
            if proc.poll() is None:
                proc.kill()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return (
            "zombie" not in Path(f"/proc/{pid}/status").read_text()
            if Path("/proc/self").exists()
            else True
        )
    except (ProcessLookupError, FileNotFoundError):
        return False


def writes_pid(path: Path, code: str) -> str:
    """Code that tells its process id in a file once it can be signalled."""
    return (
        f"import os, signal, time\n{code}\nopen({str(path)!r} + '~', 'w').write(str(os.getpid()))\n"
        f"os.rename({str(path)!r} + '~', {str(path)!r})\ntime.sleep(600)"
    )


def events_of(path: Path) -> dict[str, list[Any]]:
    """Return the events of each task in the file; fail if a line does not parse."""
    found: dict[str, list[Any]] = {}
    for text in path.read_bytes().splitlines():
        event: Any = wire.decode(text)
        found.setdefault(event.task_id, []).append(event)
    return found


def check_record(path: Path, tasks: int) -> list[LifecycleEvent]:
    """Check that each task's numbers have no gap and that it ends once, and last; return the
    ends."""
    record = events_of(path)
    assert len(record) == tasks
    for events in record.values():
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.type.is_terminal for event in events] == [False] * (len(events) - 1) + [True]
    return [events[-1] for events in record.values()]


# ---------------------------------------------------------------- one command

def test_a_command_that_succeeds_prints_only_what_it_says(tmp_path: Path) -> None:
    done = cli(
        "run",
        "--",
        *python("import sys; print('out'); print('err', file=sys.stderr)"),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")


def test_a_command_needs_no_dashes_before_it_and_keeps_those_of_its_own(tmp_path: Path) -> None:
    code = "import sys; print(sys.argv[1:])"
    assert (
        cli("run", *python(code), "-j", "--", "--help", cwd=tmp_path).stdout
        == "['-j', '--', '--help']\n"
    )
    assert cli("run", "--", *python(code), "--", "-q", cwd=tmp_path).stdout == "['--', '-q']\n"


def test_the_exit_code_is_that_of_the_one_command(tmp_path: Path) -> None:
    done = cli("run", "--", *python("raise SystemExit(3)"), cwd=tmp_path)
    assert done.returncode == 3
    assert re.fullmatch(
        r"bgworker run: failed \(exit code 3\) after [\d.]+m?s: .*raise SystemExit\(3\).*\n",
        done.stderr,
    )


@POSIX
def test_a_command_that_dies_of_a_signal_gives_128_and_the_signal(tmp_path: Path) -> None:
    done = cli("run", "--", *python("import os; os.kill(os.getpid(), 9)"), cwd=tmp_path)
    assert done.returncode == 137
    assert "failed (SIGKILL)" in done.stderr


@POSIX
def test_127_is_no_such_program_and_126_not_executable(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    done = cli("run", "--", "./nosuch", cwd=tmp_path)
    assert (
        done.returncode == 127 and "no such program" in done.stderr and "Errno" not in done.stderr
    )
    done = cli("run", "--", "./data", cwd=tmp_path)
    assert done.returncode == 126 and "may not be executed" in done.stderr
    assert cli("run", "-f", "-", cwd=tmp_path, input="./nosuch").returncode == 127
    assert cli("run", "-f", "-", cwd=tmp_path, input="./data").returncode == 126


def test_124_is_a_command_that_ran_too_long(tmp_path: Path) -> None:
    done = cli(
        "run", "--timeout", "0.5", "--", *python("import time; time.sleep(600)"), cwd=tmp_path
    )
    assert done.returncode == 124
    assert re.match(r"bgworker run: timed out after ([5-9]\d\dms|[1-9]\.\ds): ", done.stderr)


# ---------------------------------------------------------------- many commands

def test_many_commands_are_labelled_counted_and_summed_up(tmp_path: Path) -> None:
    (tmp_path / "commands").write_text(
        "\ufeff# comment\n\n  \t\n"
        + line("print('one\\ntwo')")
        + "\r\n"
        + "  # indented\n"
        + line("raise SystemExit(4)")
        + "\n",
        encoding="utf-8",
    )
    done = cli("run", "-f", "commands", "-j", "1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == "[1] one\n[1] two\n"
    first, second, *failures, summary = done.stderr.splitlines()
    assert re.match(r"\[1\] completed in [\d.]+m?s: ", first)
    assert re.match(r"\[2\] failed \(exit code 4\) after [\d.]+m?s: ", second)
    assert [text.split()[:1] for text in failures] == [
        [], ["ID"], ["[2]"], ["To"], ["To"]]
    assert re.fullmatch(r"2 commands: 1 completed, 1 failed in [\d.]+m?s", summary)


@pytest.mark.parametrize(
    "commands, code",
    [
        (["pass", "pass"], 0),
        (["pass", "import time; time.sleep(600)"], 124),
        (["1/0", "import time; time.sleep(600)"], 1),
    ],
)
def test_the_exit_code_of_many_tells_the_worst(
    tmp_path: Path, commands: list[str], code: int
) -> None:
    done = cli(
        "run",
        "--timeout",
        "2",
        "-j",
        "9",
        "-f",
        "-",
        cwd=tmp_path,
        input="\n".join(map(line, commands)),
    )
    assert done.returncode == code, done.stderr


def test_quiet_leaves_out_only_what_completed(tmp_path: Path) -> None:
    done = cli(
        "run",
        "-q",
        "-f",
        "-",
        cwd=tmp_path,
        input=line("pass") + "\n" + line("raise SystemExit(1)"),
    )
    lines = done.stderr.splitlines()
    assert [text[:12] for text in (lines[0], lines[-1])] == ["[2] failed (", "2 commands: "]
    assert not any("completed in" in text for text in lines)


def test_fail_fast_cancels_the_rest(tmp_path: Path) -> None:
    lines = [
        line("import time; time.sleep(600)"),
        line("raise SystemExit(7)"),
        *[line("print('never')")] * 50,
    ]
    done = cli(
        "run",
        "--fail-fast",
        "-j",
        "2",
        "-f",
        "-",
        "--jsonl",
        "e.jsonl",
        cwd=tmp_path,
        input="\n".join(lines),
    )
    assert done.returncode == 1
    assert "never" not in done.stdout
    assert "[1] cancelled (another command failed) after" in done.stderr
    assert "52 commands: 0 completed, 1 failed, 51 cancelled in" in done.stderr
    assert len(done.stderr.splitlines()) == 8, "no line for what never ran"
    check_record(tmp_path / "e.jsonl", 52)


@POSIX
def test_what_failed_is_shown_once_more_at_the_end_with_what_to_type_next(tmp_path: Path) -> None:
    commands = "\n".join(["echo fine", "exit 3", *["true"] * 20, "sleep 600"])
    done = cli("run", "-f", "-", "--timeout", "1s", "-j", "3", cwd=tmp_path, input=commands)
    empty, heading, *rows, hint, again, summary = done.stderr.splitlines()[23:]
    assert (empty, heading.split()) == ("", ["ID", "NAME", "STATUS", "DURATION", "MESSAGE"])
    cells = [re.split("  +", row) for row in rows]
    assert [row[:3] + row[4:] for row in cells] == [
        ["[2]", "exit 3", "failed", "exit code 3"],
        ["[23]", "sleep 600", "timed out", "ran longer than its timeout of 1 s"],
    ]
    assert hint == f"To see more: {PYTHON} -m bgworker show 2"
    assert again == f"To run again what did not complete: {PYTHON} -m bgworker rerun --failed"
    assert summary.startswith("23 commands: 21 completed, 1 failed, 1 timed out in ")
    shown = cli(*hint.split("bgworker ")[1].split(), cwd=tmp_path)
    assert (shown.returncode, shown.stdout.splitlines()[0]) == (0, "exit 3: failed")


@POSIX
def test_only_the_first_failures_are_shown_once_more_and_the_others_are_counted(
    tmp_path: Path,
) -> None:
    done = cli("run", "-q", "-f", "-", "--db", "a b.db", cwd=tmp_path, input="exit 1\n" * 13)
    *rows, more, hint, again, summary = done.stderr.splitlines()[15:]
    numbers = [int(re.match(r"\[(\d+)\] +exit 1 ", row)[1]) for row in rows]  # type: ignore[index]
    assert len(numbers) == 10 and numbers == sorted(numbers)
    assert (more, summary[:24]) == ("... and 3 more", "13 commands: 0 completed")
    assert hint == f"To see more: {PYTHON} -m bgworker show --db 'a b.db' {numbers[0]}"
    assert again.endswith("bgworker rerun --db 'a b.db' --failed")
    done = cli("run", "-q", "-f", "-", "--no-db", cwd=tmp_path, input="true\nexit 1")
    assert "To see more" not in done.stderr, "nothing was recorded"
    assert done.stderr.splitlines()[3].startswith("[2]  exit 1  failed  ")


@POSIX
def test_the_number_of_a_command_names_its_task_in_the_newest_run_or_another(
        tmp_path: Path) -> None:
    def shown(*words: str) -> str:
        done = cli("show", *words, cwd=tmp_path)
        return (done.stdout or done.stderr).splitlines()[0]

    cli("run", "-f", "-", cwd=tmp_path, input="\n".join(f"echo {n}" for n in range(1, 31)))
    assert [shown(word) for word in ("1", "17", "30")] == [
        "echo 1: completed", "echo 17: completed", "echo 30: completed"]
    assert cli("tail", "17", cwd=tmp_path).stdout == "17\n"
    for word in ("31", "99", "99999999999999"):
        assert "there is no task" in shown(word)
    cli("run", "-f", "-", cwd=tmp_path, input="echo new\necho newer")
    assert [shown(word) for word in ("1", "2")] == ["echo new: completed", "echo newer: completed"]
    assert "there is no task '3'" in shown("3"), "not of the run before"
    assert shown("[3]", "--run", "last~1") == "echo 3: completed"
    assert cli("tail", "--run", "last~1", "17", cwd=tmp_path).stdout == "17\n"
    assert "got 'last~2', which no run has" in shown("3", "--run", "last~2")
    cli("run", "--name", "2", "--", *python("pass"), cwd=tmp_path)
    assert shown("2") == "2: completed", "a name comes first"


def test_names_are_numbered_given_or_taken_from_the_command(tmp_path: Path) -> None:
    two = line("pass") + "\n" + line("pass  # " + "x" * 300)

    def names(*words: str, input: str = "") -> list[str]:
        (tmp_path / "e.jsonl").unlink(missing_ok=True)
        assert (
            cli("run", "-q", "--jsonl", "e.jsonl", *words, cwd=tmp_path, input=input).returncode
            == 0
        )
        return [
            event.task.name
            for event in sorted(
                check_record(tmp_path / "e.jsonl", 1 + (input == two)),
                key=lambda event: event.task_id,
            )
        ]

    assert names("--", *python("pass")) == [shlex.join(python("pass"))]
    assert names("--name", "it", "--", *python("pass")) == ["it"]
    (tmp_path / "one").write_text(line("pass"))
    assert names("-f", "one", "--name", "it") == ["it"]
    assert names("-f", "-", "--name", "it", input=line("pass")) == ["it-1"], "more may have come"
    assert names("-f", "-", "--name", "it", input=two) == ["it-1", "it-2"]
    assert names("-f", "-", input=two) == [each[:200] for each in two.split("\n")]


def test_no_line_is_lost_when_the_output_is_read_late(tmp_path: Path) -> None:
    count = 60_000
    (tmp_path / "many.py").write_text(f"for n in range({count}): print('line', n, 'x' * 60)")
    (tmp_path / "commands").write_text("\n".join([shlex.join([sys.executable, "many.py"])] * 3))
    with started("run", "-q", "-j", "3", "-f", "commands", cwd=tmp_path) as proc:
        time.sleep(1.0)  # the pipe is full, and so is every queue before it
        out, err = proc.communicate(timeout=WAIT)
    assert proc.returncode == 0, err
    lines = out.decode().splitlines()
    assert len(lines) == 3 * count
    for label in "123":
        numbers = [int(text.split()[2]) for text in lines if text.startswith(f"[{label}] ")]
        assert numbers == list(range(count))


def test_what_is_no_terminal_gets_the_payload_untouched(tmp_path: Path) -> None:
    done = cli(
        "run",
        "--",
        *python(r"print('\x1b[31mr\u00e9d\x1b[0m\t\u202e')"),
        cwd=tmp_path,
        PYTHONIOENCODING="utf-8",
    )
    assert done.stdout == "\x1b[31mr\u00e9d\x1b[0m\t\u202e\n"


def test_an_outcome_line_shows_control_characters_escaped_everywhere(tmp_path: Path) -> None:
    done = cli("run", "--", *python("raise SystemExit(1)  # \x1b]0;evil\x07\n"), cwd=tmp_path)
    assert r"# \x1b]0;evil\x07\n" in done.stderr
    assert "\x1b" not in done.stderr


def test_sinks_come_from_the_options_and_from_the_environment(tmp_path: Path) -> None:
    done = cli(
        "run",
        "--jsonl",
        "a.jsonl",
        "--sink",
        "jsonl:b.jsonl",
        "--sink",
        "jsonl:c.jsonl?max_bytes=1M",
        "--",
        *python("print(1)"),
        cwd=tmp_path,
        BGWORKER_SINKS="jsonl:d.jsonl",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    for name in "abcd":
        [end] = check_record(tmp_path / f"{name}.jsonl", 1)
        assert end.task.status == "completed"


def test_a_sink_that_loses_events_is_told_of_and_harms_no_command(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "from bgworker.model.errors import PermanentSinkError\nclass Bad:\n"
        "    def write(self, events): raise PermanentSinkError('no\\x1bthanks')\n"
        "    def close(self): pass\n"
    )
    done = cli("run", "--sink", "bad:Bad", "--", *python("print(1)"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert "bgworker run: sink 'bad' lost 5 events; " in done.stderr
    assert "Traceback" not in done.stderr and "\x1b" not in done.stderr


# ---------------------------------------------------------------- what cannot be used

REFUSED = [
    (["-j", "0", "--", "x"], "expected a whole number >= 1, got '0'"),
    (["-j", "two", "--", "x"], "expected a whole number >= 1, got 'two'"),
    (
        ["--timeout", "-1", "--", "x"],
        "expected seconds > 0, or a duration such as 90s or 1h30m, got '-1'",
    ),
    (["--timeout", "nan", "--", "x"], "or 1h30m, got 'nan'; or a share of the median"),
    (["--timeout", "0m", "--", "x"], "or 1h30m, got '0m'"),
    (["--name", " ", "--", "x"], "expected a name"),
    (["--sink", "nosuch:x", "--", "x"], "sink spec 'nosuch:x'"),
    (["--sink", "jsonl:a.jsonl?colour=red", "--", "x"], "no option 'colour'"),
    (["--sink", "jsonl:missing/a.jsonl", "--", "x"], "create it first"),
    (["--jsonl", "ok.jsonl", "--sink", "jsonl:missing/a.jsonl", "--", "x"], "create it first"),
    (["--jsonl", ".", "--", "x"], "it is a directory"),
    (["--jsonl", "", "--", "x"], "expected the path of a file"),
    (["--jsonl", "missing/a.jsonl", "--", "x"], "there is no directory"),
    (["-f", "missing"], "cannot read 'missing'"),
    (["-f", "."], "cannot read '.'"),
    (["-f", "empty", "--jsonl", "e.jsonl"], "there is no command in 'empty'"),
    (["-f", "nul", "--jsonl", "e.jsonl"], "line 1 of 'nul': expected no NUL"),
    (["-f", "empty", "--", "x"], "expected either a command or -f FILE"),
    ([], "expected a command behind --, or -f FILE"),
    (["--"], "expected a command behind --, or -f FILE"),
    (["--", ""], "expected a command, got"),
    (["--nosuch\x1b", "--", "x"], r"unrecognized arguments: --nosuch\x1b"),
    (["--time", "3", "--", "x"], "unrecognized arguments"),
]


@pytest.mark.parametrize("words, message", REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_cannot_be_used_is_refused_in_one_line_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("# only a comment\n\n")
    Path("nul").write_bytes(b"echo \0\n")
    before = sorted(os.listdir())
    assert main(["run", *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"bgworker run: error: [^\n]+\n", err)
    assert message in err
    assert sorted(os.listdir()) == before


@POSIX
@pytest.mark.parametrize(
    "locale",
    [
        {"PYTHONUTF8": "1"},
        {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
        {"PYTHONUTF8": "0", "LC_ALL": "en_US.ISO-8859-1"},
    ],
    ids=["UTF-8", "C", "Latin-1"],
)
def test_the_bytes_of_a_command_reach_it_as_they_were_written_whatever_the_locale(
        tmp_path: Path, locale: dict[str, str]) -> None:
    if "ISO" in locale.get("LC_ALL", ""):
        made = shutil.which("localedef") and subprocess.run(
            ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / "en_US.ISO-8859-1")],
            capture_output=True,
        )
        if not made or made.returncode:
            pytest.skip("there is no such locale, and none can be made")
        locale = {**locale, "LOCPATH": str(tmp_path)}
    words = "gr\xfc\xdfe \u20ac".encode() + b" caf\xe9 \xff"
    dump = b"%s -c 'import os, sys; print(os.fsencode(sys.argv[1]).hex())' " % os.fsencode(
        sys.executable
    )
    (tmp_path / "commands").write_bytes(b"\xef\xbb\xbf%s '%s'\n" % (dump, words))
    for given in (
        ["-f", "commands"],
        ["-f", "-"],
        ["--", *map(os.fsdecode, shlex.split(dump.decode())), words],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "bgworker", "run", "--jsonl", "e.jsonl", "--no-db", *given],
            cwd=tmp_path,
            env=strict_environment(**locale),
            capture_output=True,
            timeout=WAIT,
            check=False,
            input=(tmp_path / "commands").read_bytes(),
        )
        label = "[1] " * (given == ["-f", "-"])
        said = f"{label}{words.hex()}\n"
        assert (done.stdout.decode(), done.returncode) == (said, 0), done.stderr
    ends = check_record(tmp_path / "e.jsonl", 3)
    assert len({end.task.script_hash for end in ends[:2]}) == 1
    for end in ends:
        assert "gr\xfc\xdfe \u20ac" in end.task.name
        recorded: Any = end.task.metadata.get("argv", [end.task.metadata["command"]])
        assert (
            recorded[-1]["latin-1"]
            .encode("latin-1")
            .endswith(words if "argv" in end.task.metadata else b"'%s'" % words)
        )


@POSIX
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"])
def test_without_standard_streams_everything_is_recorded_and_nothing_printed_into_a_file(
        tmp_path: Path, closed: str) -> None:
    code = "import sys; print('out'); print('bad', file=sys.stderr); sys.exit(3)"
    command = shlex.join(
        [sys.executable, "-m", "bgworker", "run", "--jsonl", "e.jsonl", "--", *python(code)]
    )
    done = subprocess.run(
        ["sh", "-c", f"{command} {closed}"],
        cwd=tmp_path,
        env=strict_environment(),
        capture_output=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 3
    assert b"Traceback" not in done.stderr and (done.stdout == b"out\n") == (
        ">&-" not in closed.split()
    )
    check_record(tmp_path / "e.jsonl", 1)
    again = cli("tail", "last", cwd=tmp_path)
    assert (sorted(again.stdout.splitlines()), again.stderr) == (["[error] bad", "out"], "")


def test_a_python_without_sqlite_runs_commands_and_tells_what_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "sitecustomize.py").write_text(
        "import sys; sys.modules['_sqlite3'] = None"
    )
    path = os.pathsep.join([str(tmp_path / "lacking"), str(ROOT)])
    done = cli(
        "run",
        "--no-db",
        "--jsonl",
        "e.jsonl",
        "--",
        *python("print(1)"),
        cwd=tmp_path,
        PYTHONPATH=path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    for words in (
        ["run", "--", *python("print(1)")],
        ["tasks"],
        ["show", "last"],
        ["prune", "--keep", "1"],
    ):
        done = cli(*words, cwd=tmp_path, PYTHONPATH=path)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(
            r"bgworker: error: this Python has no _sqlite3 module[^\n]+\n", done.stderr
        )


@POSIX
def test_where_the_directory_is_gone_commands_run_and_files_need_a_whole_path(
    tmp_path: Path,
) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        place = tmp_path / "place"
        place.mkdir()
        return subprocess.run(
            [
                "sh",
                "-c",
                'rmdir ../place; exec "$@"',
                "sh",
                sys.executable,
                "-m",
                "bgworker",
                *words,
            ],
            cwd=place,
            env=strict_environment(),
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )

    done = run("run", "--db", str(tmp_path / "h.db"), "--", "/bin/echo", "hi")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hi\n", "")
    for words in (
        ["run", "--", "/bin/echo", "hi"],
        ["run", "--no-db", "--jsonl", "e", "--", "true"],
        ["tasks"],
    ):
        done = run(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(
            r"bgworker \w+: error: [^\n]*current directory, which is gone[^\n]*\n", done.stderr
        )


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_that_may_not_be_written_to_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").touch(mode=0o400)
    assert main(["run", "--jsonl", str(tmp_path / "a.jsonl"), "--", "x"]) == 2
    assert "permission denied" in capfd.readouterr().err


def test_a_wrong_sink_in_the_environment_is_refused(tmp_path: Path) -> None:
    done = cli(
        "run",
        "--jsonl",
        "a.jsonl",
        "--",
        *python("print(1)"),
        cwd=tmp_path,
        BGWORKER_SINKS="jsonl:missing/x",
    )
    assert done.returncode == 2
    assert re.fullmatch(r"bgworker run: error: BGWORKER_SINKS[^\n]+\n", done.stderr)
    assert os.listdir(tmp_path) == []


def test_every_level_has_help_with_an_example_and_the_version_is_told(
    capfd: pytest.CaptureFixture[str],
) -> None:
    from bgworker import __version__
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"bgworker {__version__}\n"
    for words in (["--help"], ["run", "--help"]):
        assert main(words) == 0
        shown = capfd.readouterr().out
        assert "example" in shown and "bgworker run -j 4" in shown
        assert max(map(len, shown.splitlines())) < 100
    assert "exit codes:" in shown and "141" in shown
    assert main([]) == 2
    assert "usage: bgworker" in capfd.readouterr().err


def test_the_command_line_is_imported_by_nothing_else(tmp_path: Path) -> None:
    code = (
        "import sys, bgworker; bgworker.shell; "
        "assert not any('.cli' in n or n == 'argparse' for n in sys.modules)"
    )
    subprocess.run(python(code), cwd=tmp_path, env=strict_environment(), timeout=WAIT, check=True)


# ---------------------------------------------------------------- ends by force

ENDING = [
    name
    for name in (
        "SIGINT",
        "SIGTERM",
        "SIGHUP",
        "SIGUSR1",
        "SIGUSR2",
        "SIGALRM",
        "SIGVTALRM",
        "SIGPROF",
        "SIGXCPU",
        "SIGABRT",
        "SIGPOLL",
        "SIGPWR",
        "SIGSTKFLT",
        "SIGRTMIN",
    )
    if hasattr(signal, name)
]


@POSIX
@pytest.mark.parametrize("name", ENDING)
def test_whatever_signal_ends_us_ends_the_command_first_and_records_it(
    tmp_path: Path, name: str
) -> None:
    pid = tmp_path / "pid"
    with started(
        "run", "--jsonl", "e.jsonl", "--", *python(writes_pid(pid, "")), cwd=tmp_path
    ) as proc:
        until(pid.exists)
        proc.send_signal(getattr(signal, name))
        proc.communicate(timeout=WAIT)
    assert proc.returncode == 128 + getattr(signal, name)
    assert not is_alive(int(pid.read_text()))
    [end] = check_record(tmp_path / "e.jsonl", 1)
    assert end.task.status == "cancelled"


@POSIX
def test_ctrl_backslash_kills_the_commands_at_once(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = writes_pid(pid, "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    with started("run", "--", *python(code), cwd=tmp_path) as proc:
        until(pid.exists)
        proc.send_signal(signal.SIGQUIT)
        proc.communicate(timeout=WAIT)
    assert proc.returncode == 131
    until(lambda: not is_alive(int(pid.read_text())))


@POSIX
def test_a_second_signal_kills_also_what_made_a_group_or_a_session_of_its_own(
    tmp_path: Path,
) -> None:
    code = "echo $$ >{0}~; mv {0}~ {0}; while :; do sleep 0.05; done"
    grouped, apart = code.format("one"), code.format("two")
    jobs = f"timeout 600 sh -c '{grouped}' & setsid sh -c '{apart}' & wait; wait; wait"
    with started("run", "--", "sh", "-c", f"trap '' TERM; {jobs}", cwd=tmp_path) as proc:
        until(lambda: (tmp_path / "one").exists() and (tmp_path / "two").exists())
        proc.send_signal(signal.SIGINT)
        proc.send_signal(signal.SIGQUIT)
        proc.communicate(timeout=WAIT)
    for name in ("one", "two"):
        until(lambda: not is_alive(int((tmp_path / name).read_text())))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into Linux's /proc")
def test_ctrl_z_stops_the_commands_too_and_they_go_on_with_us(tmp_path: Path) -> None:
    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]

    pid = tmp_path / "pid"
    code = writes_pid(pid, "").replace(
        "time.sleep(600)", "while not os.path.exists('go'): time.sleep(0.02)"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "bgworker", "run", "--no-db", "--", *python(code)],
        cwd=tmp_path,
        env=strict_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=os.setpgrp,
    ) as proc:
        # as a shell does, which could continue us
        try:
            until(pid.exists)
            proc.send_signal(signal.SIGTSTP)
            until(lambda: state(proc.pid) == "T")
            # it was sent the signal before, and stops when it next gets a processor
            until(lambda: state(int(pid.read_text())) == "T")
            proc.send_signal(signal.SIGCONT)
            until(lambda: state(int(pid.read_text())) != "T")
            (tmp_path / "go").touch()
            assert proc.wait(WAIT) == 0
        finally:
            (tmp_path / "go").touch()
            proc.send_signal(signal.SIGKILL)


@POSIX
def test_a_failed_command_fails_though_who_started_us_ignores_the_end_of_children(
    tmp_path: Path,
) -> None:
    starter = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    done = subprocess.run(
        [
            *python(starter),
            sys.executable,
            "-m",
            "bgworker",
            "run",
            "--no-db",
            "--",
            *python("exit(3)"),
        ],
        cwd=tmp_path,
        env=strict_environment(),
        capture_output=True,
        timeout=WAIT,
        check=False,
    )
    assert (done.returncode, b"exit code 3" in done.stderr) == (3, True)


@POSIX
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_commands_and_records_how_they_end(
    tmp_path: Path, number: int, code: int
) -> None:
    pids = [tmp_path / f"pid{n}" for n in (1, 2)]
    scripts = []
    for pid in pids:
        pid.with_suffix(".py").write_text(writes_pid(pid, ""))
        scripts.append(shlex.join([sys.executable, f"{pid.name}.py"]))
    (tmp_path / "commands").write_text("\n".join([*scripts, *["echo never"] * 20]))
    with started("run", "-j", "2", "-f", "commands", "--jsonl", "e.jsonl", cwd=tmp_path) as proc:
        until(lambda: all(map(Path.exists, pids)))
        os.kill(proc.pid, number)
        out, err = proc.communicate(timeout=WAIT)
    assert proc.returncode == code
    assert out == b""
    assert err.decode().count(") after ") == 2
    assert "22 commands: 0 completed, 22 cancelled in" in err.decode().splitlines()[-1]
    assert not any(is_alive(int(pid.read_text())) for pid in pids)
    assert {end.task.status for end in check_record(tmp_path / "e.jsonl", 22)} == {"cancelled"}


@POSIX
def test_a_second_signal_kills_what_does_not_stop(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = writes_pid(pid, "signal.signal(signal.SIGTERM, lambda *_: open('asked', 'w').close())")
    with started("run", "--jsonl", "e.jsonl", "--", *python(code), cwd=tmp_path) as proc:
        until(pid.exists)
        proc.send_signal(signal.SIGINT)
        until((tmp_path / "asked").exists)
        proc.send_signal(signal.SIGINT)
        proc.communicate(timeout=WAIT)
    assert proc.returncode == 130
    until(lambda: not is_alive(int(pid.read_text())))
    check_record(tmp_path / "e.jsonl", 1)


def waiting_in(pipe: Any) -> int:
    """Return how many bytes wait for the reader of a pipe."""
    import fcntl
    import termios

    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


@POSIX
def test_a_second_signal_ends_a_run_whose_output_nobody_reads(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = writes_pid(pid, "import threading\ndef talk():\n while True: print('x' * 1000)\n"
                           "threading.Thread(target=talk, daemon=True).start()")
    with started("run", "--", *python(code), cwd=tmp_path) as proc:
        until(pid.exists)
        assert proc.stdout is not None
        until(lambda: waiting_in(proc.stdout) > 60_000)  # the pipe is full
        proc.send_signal(signal.SIGINT)
        until(lambda: not is_alive(int(pid.read_text())))
        proc.send_signal(signal.SIGINT)
        assert proc.wait(WAIT) == 130


@POSIX
@pytest.mark.slow
def test_a_command_that_ignores_its_end_is_killed_after_its_timeout(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = writes_pid(pid, "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    done = cli("run", "--timeout", "1", "--jsonl", "e.jsonl", "--", *python(code), cwd=tmp_path)
    left = is_alive(int(pid.read_text()))
    if left:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert (done.returncode, left) == (124, False)
    check_record(tmp_path / "e.jsonl", 1)


@POSIX
def test_a_reader_that_has_gone_stops_the_run_quietly(tmp_path: Path) -> None:
    code = "import time\nfor n in range(10**9): print(n, flush=True); time.sleep(0.001)"
    with started("run", "--jsonl", "e.jsonl", "--", *python(code), cwd=tmp_path) as proc:
        assert proc.stdout is not None and proc.stderr is not None
        assert proc.stdout.readline() == b"0\n"
        proc.stdout.close()
        assert proc.wait(WAIT) == 141
        assert proc.stderr.read() == b""
    check_record(tmp_path / "e.jsonl", 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with (
        open("/dev/full", "wb") as full,
        started("run", "--", *python("print(1)"), cwd=tmp_path, stdout=full) as proc,
    ):
        _, err = proc.communicate(timeout=WAIT)
    assert proc.returncode == 1
    assert re.fullmatch(r"bgworker run: error: cannot write the output: [^\n]+\n", err.decode())


# ---------------------------------------------------------------- on a terminal

@POSIX
def test_on_a_terminal_a_table_shows_what_runs_and_nothing_of_a_payload_is_obeyed(
    tmp_path: Path,
) -> None:
    evil = r"import sys, time; print('\x1b]0;evil\x07\x1b[2J\x9b31m\u202e' * 2, flush=True); " \
           r"print('\x1b[1;1Hbad', file=sys.stderr, flush=True); time.sleep(1.5); print('the end')"
    (tmp_path / "commands").write_text("\n".join([*[line(evil)] * 5, line("raise SystemExit(3)")]))
    code, sent = on_terminal("run", "-j", "3", "-f", "commands", cwd=tmp_path)
    terminal = Emulator(100, 12)
    terminal.feed(sent)
    assert code == 1
    assert (
        "evil\x07" not in sent
        and "\x1b]" not in sent
        and "\x1b[2J" not in sent
        and "\u202e" not in sent
    )
    assert r"[1] \x1b]0;evil\x07\x1b[2J\x9b31m\u202e" in sent
    assert r"[1] \x1b[1;1Hbad" in sent
    assert re.search(r"ID +TIME +NAME +MESSAGE\r\n\[1\] ", sent), "there was no table"
    assert re.search(r"\[>? +\] 0 of 6, [\d.]+m?s, 3 running", sent)
    assert terminal.is_cursor_visible
    assert terminal.lines[-1] == ""
    assert re.fullmatch(r"6 commands: 5 completed, 1 failed in \d+\.\ds", terminal.lines[-2])
    assert not any(
        re.search("running", text) for text in terminal.lines
    ), "the table was not taken off"
    assert sum(text.endswith("] the end") for text in terminal.lines) == 5
    assert "\x1b[31mfailed\x1b[0m" in sent


@POSIX
def test_without_colour_or_on_a_dumb_terminal_the_lines_are_plain(tmp_path: Path) -> None:
    (tmp_path / "commands").write_text(line("print('\\x1b[31m')") + "\nfalse")
    _, sent = on_terminal("run", "-f", "commands", cwd=tmp_path, NO_COLOR="1")
    assert re.search("\x1b\\[J", sent) and not re.search("\x1b\\[[0-9]*m", sent)
    _, sent = on_terminal("run", "-f", "commands", cwd=tmp_path, TERM="dumb")
    assert "\x1b" not in sent and "[1] \r\n" in sent


@POSIX
def test_one_command_on_a_terminal_has_no_table(tmp_path: Path) -> None:
    code, sent = on_terminal("run", "--", *python("print('\\x1b[31mtext')"), cwd=tmp_path)
    assert (code, sent) == (0, "text\r\n")


JOB = """
import fcntl, os, signal, subprocess, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
proc = subprocess.Popen([sys.executable, "-m", "bgworker", *sys.argv[1:]], preexec_fn=os.setpgrp)
if {is_foreground}:
    os.tcsetpgrp(0, proc.pid)
sys.exit(proc.wait())
"""


@POSIX
@pytest.mark.parametrize("is_foreground", [True, False])
def test_a_job_in_the_background_shows_lines_and_draws_no_table(
    tmp_path: Path, is_foreground: bool
) -> None:
    (tmp_path / "commands").write_text(
        "\n".join([line("import time; print('said', flush=True); time.sleep(1.5)")] * 2)
    )
    code, sent = on_terminal(
        "run",
        "-j",
        "2",
        "-f",
        "commands",
        cwd=tmp_path,
        job=JOB.format(is_foreground=is_foreground),
    )
    assert code == 0 and sent.count("] said\r\n") == 2
    assert ("running" in sent) == ("\x1b[J" in sent) == is_foreground


@POSIX
@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_the_table_fits_terminals_of_any_width(tmp_path: Path, columns: int) -> None:
    long = line("import time; print('m' * 300, flush=True); time.sleep(1.5)  # " + "x" * 200)
    (tmp_path / "commands").write_text("\n".join([long] * 3))
    code, sent = on_terminal("run", "-j", "3", "-f", "commands", cwd=tmp_path, columns=columns)
    assert code == 0
    drawn = [
        part
        for picture in re.findall(r"\x1b\[\?25l(.*?)\x1b\[\?25h", sent, re.DOTALL)
        for part in picture.split("\r\n")
    ]
    assert drawn and max(len(re.sub("\x1b\\[[0-9]+m", "", part)) for part in drawn) < columns


@POSIX
def test_ctrl_c_takes_the_table_off_and_leaves_the_cursor_visible(tmp_path: Path) -> None:
    (tmp_path / "commands").write_text(
        "\n".join([line("import time; print('ready', flush=True); time.sleep(600)")] * 6)
    )
    asked: list[int] = []

    def interrupt(pid: int, sent: str) -> None:
        if not asked and sent.count("] ready") >= 2 and "running" in sent:
            asked.append(pid)
            os.kill(pid, signal.SIGINT)

    code, sent = on_terminal("run", "-j", "2", "-f", "commands", cwd=tmp_path, act=interrupt)
    terminal = Emulator(100, 12)
    terminal.feed(sent)
    assert code == 130
    assert terminal.is_cursor_visible
    assert "6 commands: 0 completed, 6 cancelled in" in terminal.lines[-2]
    assert not any("running" in text for text in terminal.lines)


# ---------------------------------------------------------------- all of it together


@POSIX
def test_two_hundred_commands_are_recorded_without_a_gap_and_leave_no_process(
    tmp_path: Path,
) -> None:
    (tmp_path / "good.json").write_text(json.dumps(list(range(50))))
    (tmp_path / "bad.json").write_text("{")
    lines = [f"cat {'missing' if n % 20 == 0 else 'good.json'} # {n}" for n in range(199)]
    too_long = f"sleep 613.{os.getpid()}"  # not one of another run of the tests
    lines.insert(50, too_long)
    (tmp_path / "commands.txt").write_text("\n".join(lines))
    done = cli(
        "run",
        "-j",
        "4",
        "--timeout",
        "3",
        "--jsonl",
        "events.jsonl",
        "-f",
        "commands.txt",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "200 commands: 189 completed, 10 failed, 1 timed out in" in done.stderr.splitlines()[-1]
    ends = check_record(tmp_path / "events.jsonl", 200)
    assert sorted({str(end.type) for end in ends}) == [
        "TaskCompleted",
        "TaskFailed",
        "TaskTimedOut",
    ]
    listing = subprocess.run(
        ["ps", "-A", "-o", "args="], capture_output=True, text=True, check=False
    ).stdout
    assert too_long not in listing

"""Commands that run: their lines, their end, and that nothing of them stays behind. With real
children."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bgworker import Scheduler, StreamEvent, shell
from bgworker.shell import child, command, pipes
from bgworker.model.errors import TaskCancelled
from bgworker.model.records import OUTPUT
from bgworker.running.context import Limits
from bgworker.testing import MemorySink
from tests.support import until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the children are POSIX commands")

FOREVER = 1000
WAIT = 30.0


class FakeContext:
    """Records what a task context is told; `on_line` may act on each line as it comes."""

    def __init__(self) -> None:
        self.cancel_requested = False
        self.cancel_reason: str | None = None
        self.outputs: list[str] = []
        self.errors: list[str] = []
        self.on_line: Callable[[str], object] = lambda line: None
        self._limits = Limits(65536, "truncate", 0.1, 1.0)
        self._callback: Callable[[], object] | None = None
        self._lock = threading.Lock()

    def _emit_lines(self, kind: int, lines: list[str]) -> None:
        for line in lines:
            (self.outputs if kind == OUTPUT else self.errors).append(line)
            self.on_line(line)

    def _wait_for_room(self, size: int) -> int:
        return 1000

    def checkpoint(self) -> None:
        if self.cancel_requested:
            raise TaskCancelled(self.cancel_reason)

    @contextlib.contextmanager
    def _woken_by(self, wake: Callable[[], object], where: object) -> Iterator[None]:
        with self._lock:
            self._callback = wake
            now = self.cancel_requested
        if now:
            wake()
        yield
        self._callback = None

    def cancel(self, reason: str = "user") -> None:
        with self._lock:
            self.cancel_reason = reason
            self.cancel_requested = True
            callback = self._callback
        if callback is not None:
            callback()

    def cancel_on(self, wanted: str) -> None:
        """Cancel from another thread as soon as this line came."""
        def look(line: str) -> None:
            if line == wanted:
                self.on_line = lambda line: None
                threading.Thread(target=self.cancel).start()
        self.on_line = look


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> FakeContext:
    fake = FakeContext()
    monkeypatch.setattr(command, "current_task", lambda: fake)
    return fake


@pytest.fixture(params=["polled", "polled without pidfd", "threaded"])
def pump(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once with each way to wait for a child."""
    if request.param == "threaded":
        monkeypatch.setattr(child, "open_pump", pipes.ThreadedPump)
    elif request.param == "polled without pidfd":
        # for bgworker alone: subprocess of 3.15 uses it, too
        others = {name: value for name, value in vars(os).items() if name != "pidfd_open"}
        monkeypatch.setattr(pipes, "os", SimpleNamespace(**others))
    return str(request.param)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves an unreaped child or an open descriptor."""
    before, kept = descriptors(), children()
    yield
    # threads that a test's `finally` set free still have to close their pipe
    deadline = time.monotonic() + 5.0
    while descriptors() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert descriptors() == before
    assert children() == kept


def children() -> set[str]:
    """The children of this process, ended ones that nobody has reaped among them. Python keeps some
    to its end: those of `multiprocessing` that other tests have used."""
    if not os.path.isdir("/proc/self/fd"):
        return set()
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[1]) == os.getpid():
            found.add(entry)
    return found


def descriptors() -> list[str]:
    """The open descriptors of this process; none where they cannot be listed."""
    return sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []


def state(pid: int | str) -> str:
    """The letter with which ps shows what the process does; empty when there is none."""
    return subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()[:1]


def is_alive(pid: int | str) -> bool:
    """Tell whether the process runs; a zombie, which a container's first process may never reap,
    does not."""
    return state(pid) not in ("", "Z", "X")


def python(code: str, *args: object) -> list[str]:
    return [sys.executable, "-S", "-c", code, *map(str, args)]


@contextlib.contextmanager
def killed_afterwards(pids: list[str]) -> Iterator[None]:
    """Kill what a test lets escape; the list may still be empty on entry."""
    try:
        yield
    finally:
        for pid in filter(str.isdecimal, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


# What comes out


def test_lines_of_both_streams_arrive_without_their_ends(context: FakeContext, pump: str) -> None:
    assert shell("echo one; echo two; echo oops >&2")() == 0
    assert (context.outputs, context.errors) == (["one", "two"], ["oops"])


def test_a_last_line_without_newline_is_emitted(context: FakeContext, pump: str) -> None:
    shell("printf 'one\\ntwo'; printf three >&2")()
    assert (context.outputs, context.errors) == (["one", "two"], ["three"])


def test_only_newlines_end_a_line_and_empty_lines_count(context: FakeContext) -> None:
    shell(["printf", "a\\r\\n\\n\\fb\\302\\205c\\342\\200\\250d\\n"])()
    assert context.outputs == ["a", "", "\fb\x85c\u2028d"]


def test_a_line_that_was_overwritten_shows_its_last_state(context: FakeContext) -> None:
    shell("printf '10%%\\r20%%\\r30%%\\n10%%\\r20%%\\r\\r\\nleft\\rright'")()
    assert context.outputs == ["30%", "20%", "right"]


def test_a_progress_bar_longer_than_a_piece_is_one_line(context: FakeContext) -> None:
    shell(python("import sys\nfor n in range(30000): sys.stdout.write(f'\\r{n:9}')\nprint()"))()
    assert context.outputs == [f"{29999:9}"]


def test_carriage_returns_alone_take_no_memory_and_say_nothing(context: FakeContext) -> None:
    shell(python("print('\\r' * 300000, end='')"))()
    assert context.outputs == []


def test_bytes_that_are_not_utf8_are_replaced(context: FakeContext) -> None:
    shell("printf 'caf\\351 \\303\\251 \\342\\202\\n'; printf 'end \\303'")()
    assert context.outputs == ["caf\ufffd \xe9 \ufffd", "end \ufffd"]


def test_a_character_split_over_two_reads_stays_whole(context: FakeContext, pump: str) -> None:
    shell("for byte in 342 202 254 12; do printf \"\\\\$byte\"; sleep 0.02; done")()
    assert context.outputs == ["\u20ac"]


@pytest.mark.parametrize("character", ["x", "\xe9", "\u20ac", "\U0001f600"])
def test_a_huge_line_comes_in_pieces_cut_between_characters(
    context: FakeContext, pump: str, character: str
) -> None:
    line = "a" + character * 150_000
    code = "import sys; sys.stdout.buffer.write(('a' + sys.argv[1] * 150_000 + '\\nlast').encode())"
    shell(python(code, character))()
    assert context.outputs[-1] == "last"
    assert "".join(context.outputs[:-1]) == line
    assert max(len(piece.encode()) for piece in context.outputs) <= 65536
    assert len(context.outputs) <= len(line.encode()) // 65536 + 3


def test_a_huge_line_of_broken_bytes_comes_in_pieces_that_fit(context: FakeContext) -> None:
    shell(python("import sys; sys.stdout.buffer.write(b'\\x80' * 200_000 + b'\\n')"))()
    assert "".join(context.outputs) == "\ufffd" * 200_000
    assert max(len(piece.encode()) for piece in context.outputs) <= 65536


@pytest.mark.parametrize("max_payload", [100, 65536])
def test_no_byte_of_a_line_is_lost_to_the_limit_of_payloads(max_payload: int) -> None:
    sink = MemorySink()
    with Scheduler(1, sinks=[sink], max_payload=max_payload) as pool:
        pool.submit(shell("seq 20000 | tr '\\n' '\\0'; echo; seq 300 | tr '\\n' _")).result(WAIT)
    said = [event for event in sink.events if isinstance(event, StreamEvent)]
    assert not any(event.truncated for event in said)
    assert "".join(event.payload for event in said) == "".join(
        [*(f"{n}\ufffd" for n in range(1, 20001)), *(f"{n}_" for n in range(1, 301))])


def test_a_hundred_thousand_lines_arrive_in_order(context: FakeContext, pump: str) -> None:
    shell("seq 1 100000")()
    assert context.outputs == [str(n) for n in range(1, 100001)]


def test_lines_arrive_while_the_child_runs(context: FakeContext, pump: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    context.on_line = lambda line: answer.touch() if line == "question" else None
    shell(
        [
            "sh",
            "-c",
            'echo question; while ! [ -e "$0" ]; do sleep 0.01; done; echo "got it"',
            answer,
        ]
    )()
    assert context.outputs == ["question", "got it"]


def test_standard_input_is_empty(context: FakeContext) -> None:
    assert shell("cat; echo done")() == 0
    assert context.outputs == ["done"]


def test_a_sequence_is_run_directly_and_a_string_by_the_shell(context: FakeContext) -> None:
    shell(["echo", "$HOME", "a  b", "*"])()
    shell("echo $((6 * 7))")()
    assert context.outputs == ["$HOME a  b *", "42"]


def test_directory_and_environment_are_the_given_ones(context: FakeContext, tmp_path: Path) -> None:
    env = {"GREETING": "hi", "PATH": os.environ["PATH"]}
    shell("pwd -P; echo $GREETING; echo ${HOME-none}", cwd=tmp_path, env=env)()
    assert context.outputs == [os.path.realpath(tmp_path), "hi", "none"]


def test_an_inherited_environment_lacks_the_secret_of_the_webhook_and_a_given_one_is_left_alone(
        context: FakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREETING", "hi")
    monkeypatch.setenv("BGWORKER_WEBHOOK_SECRET", "whsec_sup3r")
    shell("echo $GREETING ${BGWORKER_WEBHOOK_SECRET-none}")()
    shell("echo $GREETING ${BGWORKER_WEBHOOK_SECRET-none}", env=dict(os.environ))()
    assert context.outputs == ["hi none", "hi whsec_sup3r"]
    assert (
        os.environ["BGWORKER_WEBHOOK_SECRET"] == "whsec_sup3r"
    ), "the sink reads it after the first command, too"


def test_a_relative_directory_is_the_one_of_the_moment_when_the_command_was_made(
        context: FakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    command = shell("pwd -P", cwd="sub")
    monkeypatch.chdir("/")
    command()
    assert context.outputs == [os.path.realpath(tmp_path / "sub")]


# How it ends


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("exit 3", 3, "exit status 3"),
        ("kill -KILL $$", -9, "SIGKILL"),
        (["false"], 1, "exit status 1"),
        ("no-such-program-here", 127, "exit status 127"),
    ],
)
def test_another_exit_code_than_0_is_an_error(
        context: FakeContext, pump: str, command: str | list[str], code: int, says: str) -> None:
    with pytest.raises(subprocess.CalledProcessError, match=says) as caught:
        shell(command)()
    assert (caught.value.returncode, caught.value.cmd) == (code, command)


def test_a_missing_program_is_named(context: FakeContext) -> None:
    with pytest.raises(FileNotFoundError, match="no such program.*'no-such-program-here'"):
        shell(["no-such-program-here", "--now"], cwd="/")()


def test_a_program_that_may_not_be_executed_is_named(context: FakeContext, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    with pytest.raises(PermissionError, match="may not be executed.*script"):
        shell([script])()


@pytest.mark.skipif(sys.platform != "linux", reason="how long a word may be differs")
def test_what_the_system_refuses_for_another_reason_is_not_called_missing(
    context: FakeContext, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="too long .see getconf ARG_MAX.*'true'") as refused:
        shell(["true", "x" * 200_000])()
    assert refused.value.errno == errno.E2BIG
    (tmp_path / "empty").touch(mode=0o700)
    with pytest.raises(OSError, match="cannot be started: Exec format error: .*empty'"):
        shell([str(tmp_path / "empty")])()


def test_a_missing_interpreter_is_told_from_a_missing_program(
    context: FakeContext, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(FileNotFoundError, match="interpreter.*script"):
        shell(["./script"], cwd=tmp_path)()


@pytest.mark.parametrize("command", ["true", ["true"]])
def test_a_directory_that_vanished_is_told_from_a_missing_program(
        context: FakeContext, tmp_path: Path, command: str | list[str]) -> None:
    place = tmp_path / "place"
    place.mkdir()
    made = shell(command, cwd=place)
    place.rmdir()
    with pytest.raises(FileNotFoundError, match="working directory.*place"):
        made()


def test_a_command_runs_any_number_of_times(context: FakeContext) -> None:
    command = shell("echo again")
    assert [command(), command()] == [0, 0]
    assert context.outputs == ["again", "again"]


def test_commands_run_on_many_threads_at_once(context: FakeContext) -> None:
    threads = [threading.Thread(target=shell(f"seq {n}000 {n}999")) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert sorted(map(int, context.outputs)) == list(range(1000, 9000))


# Cancelling


def test_a_task_that_was_asked_to_stop_before_starts_no_child(
    context: FakeContext, pump: str, tmp_path: Path
) -> None:
    context.cancel("timeout")
    with pytest.raises(TaskCancelled, match="timeout"):
        shell(["touch", tmp_path / "file"])()
    assert not list(tmp_path.iterdir())


def test_a_cancel_ends_the_whole_group(context: FakeContext, pump: str) -> None:
    context.cancel_on("ready")
    with pytest.raises(TaskCancelled, match="user"):
        shell(f"sleep {FOREVER} & echo $!; sh -c 'echo $$; sleep {FOREVER}; true' & "
              "echo $$; sleep 0.1; echo ready; wait")()
    assert len(context.outputs) == 4
    assert not any(is_alive(pid) for pid in context.outputs if pid != "ready")


OWN_GROUPS = [  # with the job that tells its number and then does nothing for long in $JOB
    'timeout 1000 sh -c "$JOB"; echo',
    'set -m 2>/dev/null; sh -c "$JOB" & wait',
    'setsid sh -c "$JOB"; echo',
    """setsid sh -c 'sh -c "$JOB" & wait'; echo""",
    'sh -c "$JOB" & setsid setsid -w sh -c "$JOB"; echo',
    """python3 -c 'import os; os.setpgid(0, 0)
os.execlp("sh", "sh", "-c", os.environ["JOB"])'; echo""",
    """sh -c 'set -m; timeout 1000 sh -c "$JOB" & wait' 2>/dev/null; echo""",
]


@pytest.mark.parametrize("command", OWN_GROUPS)
def test_a_cancel_ends_also_what_made_a_group_or_a_session_of_its_own(
        context: FakeContext, pump: str, command: str) -> None:
    jobs = 2 if command.startswith("sh -c \"$JOB") else 1

    def look(line: str) -> None:
        if len(context.outputs) == jobs:
            threading.Thread(target=context.cancel).start()
    context.on_line = look
    with killed_afterwards(context.outputs):
        with pytest.raises(TaskCancelled):
            shell(command, env={**os.environ, "JOB": f"echo $$; exec sleep {FOREVER}"})()
        assert len(context.outputs) == jobs
        assert not any(map(is_alive, context.outputs))


def test_what_made_a_session_of_its_own_and_ignores_sigterm_is_killed(
        context: FakeContext, pump: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "KILL_AFTER", 0.3)
    stubborn = "trap \"\" TERM; echo $$; while :; do sleep 0.02; done"
    context.cancel_on("ready")
    with killed_afterwards(context.outputs):
        with pytest.raises(TaskCancelled):
            shell(f"setsid sh -c '{stubborn}' & sleep 0.2; echo ready; wait")()
        assert not is_alive(context.outputs[0])


def test_a_stray_may_be_ended_by_the_command_that_made_it(context: FakeContext, pump: str) -> None:
    """Its own session gets no signal before the command, which knows better how to end it, is
    gone."""
    context.cancel_on("ready")
    with pytest.raises(TaskCancelled):
        shell("""setsid sh -c 'trap "echo saved; exit" USR1; trap "echo shot; exit" TERM; echo ready
              while :; do sleep 0.02; done' & trap "kill -USR1 $!; wait $!; exit" TERM; wait""")()
    assert context.outputs == ["ready", "saved"]


def test_a_cancel_wakes_the_wait_for_a_child_that_closed_its_streams(
    context: FakeContext, pump: str
) -> None:
    threading.Timer(0.1, context.cancel).start()
    with pytest.raises(TaskCancelled):
        shell(f"exec sleep {FOREVER} >/dev/null 2>&1")()


def test_what_is_said_after_the_cancel_is_recorded(context: FakeContext, pump: str) -> None:
    context.cancel_on("ready")
    with pytest.raises(TaskCancelled):
        shell(
            "trap 'echo cleaning; sleep 0.1; echo bye; exit 0' TERM; echo ready; while :; do "
            "sleep 0.05; done"
        )()
    assert context.outputs == ["ready", "cleaning", "bye"]


def test_who_ignores_sigterm_gets_sigkill(
    context: FakeContext, pump: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "KILL_AFTER", 0.2)
    context.cancel_on("ready")
    with pytest.raises(TaskCancelled):
        shell("trap '' TERM; echo $$; echo ready; while :; do sleep 0.02; echo still here; done")()
    assert "still here" in context.outputs
    assert not is_alive(context.outputs[0])


def test_a_grandchild_gets_the_grace_of_a_cancel_though_its_parent_ended(
        context: FakeContext, pump: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "STRAGGLERS_AFTER", 0.0)
    monkeypatch.setattr(child, "LINGER", 0.0)
    context.cancel_on("ready")
    with pytest.raises(TaskCancelled):
        shell(
            "sh -c 'trap \"sleep 0.2; echo saved; exit\" TERM; echo ready; while :; do sleep "
            "0.02; done' & wait"
        )()
    assert context.outputs == ["ready", "saved"]


def test_a_cancel_after_the_end_of_the_command_does_not_undo_it(
    context: FakeContext, pump: str
) -> None:
    def cancel_late(line: str) -> None:
        until(lambda: not is_alive(line))
        context.cancel()
    context.on_line = cancel_late
    shell("echo $$")()
    assert len(context.outputs) == 1


def test_a_chatty_child_is_stopped_by_a_cancel(context: FakeContext, pump: str) -> None:
    context.cancel_on("y")
    with pytest.raises(TaskCancelled):
        shell(["yes"])()


def test_what_survives_sigkill_is_reported_and_left(
    context: FakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "KILL_AFTER", 0.05)
    monkeypatch.setattr(child, "GIVE_UP_AFTER", 0.05)
    children: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(child.Child, "_signal", lambda self, kill: children.append(self._proc))
    context.cancel_on("ready")
    try:
        with pytest.raises(TaskCancelled):
            shell(f"echo ready; exec sleep {FOREVER}")()
        assert is_alive(children[0].pid)
        assert context.errors == [
            f"bgworker: processes of session {children[0].pid} are still there after SIGKILL "
            "and are left behind"
        ]
    finally:
        os.killpg(children[0].pid, signal.SIGKILL)
        children[0].wait()


# Nothing stays behind


@pytest.mark.parametrize("streams", ["", ">/dev/null 2>&1"])
@pytest.mark.parametrize("command", [f"sleep {FOREVER}", f"timeout {FOREVER} sleep {FOREVER}"])
def test_what_an_exited_shell_left_in_the_background_is_ended(
    context: FakeContext, pump: str, monkeypatch: pytest.MonkeyPatch, command: str, streams: str
) -> None:
    monkeypatch.setattr(child, "LINGER", 0.05)
    assert shell(f"{command} {streams} & echo $!; sleep 0.05")() == 0
    assert not is_alive(context.outputs[0])


def test_what_ignores_sigterm_in_the_background_is_killed(
        context: FakeContext, pump: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "LINGER", 0.02)
    monkeypatch.setattr(child, "STRAGGLERS_AFTER", 0.1)
    with pytest.raises(subprocess.CalledProcessError, match="status 7"):
        shell("sh -c 'trap \"\" TERM; echo $$; while :; do sleep 0.02; done' & sleep 0.1; exit 7")()
    assert not is_alive(context.outputs[0])


def test_a_filter_that_outlives_its_shell_for_a_moment_loses_nothing(
        context: FakeContext, pump: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "LINGER", WAIT)
    shell("(sleep 0.1; echo late) & echo early")()
    assert context.outputs == ["early", "late"]


ESCAPE = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    print(os.getpid(), flush=True)
    while sys.argv[1] == 'chatty':
        print('endless')
    time.sleep(1000)
time.sleep(0.05)
print('over', flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["silent", "chatty"])
def test_a_process_that_left_the_group_does_not_keep_the_task_waiting(
        context: FakeContext, pump: str, kind: str) -> None:
    escaped: list[str] = []
    context.on_line = lambda line: escaped.append(line) if line.isdecimal() else None
    with killed_afterwards(escaped):
        assert shell(python(ESCAPE, kind))() == 0
        if kind == "silent":  # the chatty one ends when its next write finds the pipe closed
            assert is_alive(escaped[0])  # also proves that is_alive can say so
            assert context.outputs[1:] == ["over"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_while_reading_ends_the_child_and_passes(
        context: FakeContext, pump: str, error: type[BaseException]) -> None:
    def fail(line: str) -> None:
        raise error("from the stream")
    context.on_line = fail
    with pytest.raises(error, match="from the stream"):
        shell(f"echo $$; sleep {FOREVER}")()
    assert len(context.outputs) == 1
    assert not is_alive(context.outputs[0])


def test_a_reader_that_cannot_be_set_up_ends_the_child(
        context: FakeContext, pump: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def fail(self: object, proc: subprocess.Popen[bytes], *lines: object) -> None:
        started.append(proc.pid)
        assert proc.stdout is not None and proc.stderr is not None
        proc.stdout.close()
        proc.stderr.close()
        raise OSError("no room")
    for kind in (pipes.PolledPump, pipes.ThreadedPump):
        monkeypatch.setattr(kind, "attach", fail)
    with pytest.raises(OSError, match="no room"):
        shell(["sleep", str(FOREVER)])()
    assert not is_alive(started[0])


def test_an_interrupt_ends_the_child(context: FakeContext, pump: str) -> None:
    context.on_line = lambda line: threading.Timer(
        0.1, os.kill, (os.getpid(), signal.SIGINT)
    ).start()
    with pytest.raises(KeyboardInterrupt):
        shell(f"echo $$; sleep {FOREVER}")()
    assert not is_alive(context.outputs[0])


def test_a_second_interrupt_kills_the_child_at_once(
        context: FakeContext, pump: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "STRAGGLERS_AFTER", FOREVER)
    monkeypatch.setattr(child, "KILL_AFTER", FOREVER)

    def interrupt_twice(line: str) -> None:
        for seconds in (0.05, 0.2):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    context.on_line = interrupt_twice
    with pytest.raises(KeyboardInterrupt):
        shell(f"trap '' TERM; echo $$; sleep {FOREVER}")()
    assert not is_alive(context.outputs[0])


def test_a_signal_handler_may_cancel(context: FakeContext, pump: str) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: context.cancel("signal"))
    context.on_line = lambda line: os.kill(os.getpid(), signal.SIGUSR1)
    try:
        with pytest.raises(TaskCancelled, match="signal"):
            shell(f"echo ready; sleep {FOREVER}")()
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_the_group_is_never_signalled_once_its_leader_is_reaped(
        context: FakeContext, pump: str, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled: list[str] = []
    killpg = os.killpg

    def watched(group: int, number: int) -> None:
        signalled.append(state(group))
        killpg(group, number)
    monkeypatch.setattr(os, "killpg", watched)
    monkeypatch.setattr(child, "LINGER", 0.05)
    shell(f"sleep {FOREVER} & echo left")()
    assert signalled and set(signalled) == {"Z"}  # still there, as a zombie


@pytest.mark.parametrize("code", [0, 3])
def test_where_sigchld_is_ignored_no_command_passes_for_a_success(
    context: FakeContext, pump: str, code: int
) -> None:
    previous = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(
            ChildProcessError, match="how the command ended is not known.*SIGCHLD to SIG_DFL"
        ):
            shell(f"echo fine; exit {code}")()
    finally:
        signal.signal(signal.SIGCHLD, previous)
    assert context.outputs == ["fine"]


def test_where_another_thread_reaps_any_child_no_failed_command_passes_for_a_success(
        context: FakeContext, pump: str) -> None:
    has_ended = threading.Event()

    def reap() -> None:
        while not has_ended.is_set():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
    reaper = threading.Thread(target=reap)
    reaper.start()
    try:
        for _ in range(20):
            with pytest.raises(
                (ChildProcessError, subprocess.CalledProcessError), match="not known|exit status 3"
            ):
                shell("exit 3")()
    finally:
        has_ended.set()
        reaper.join(WAIT)
    assert not reaper.is_alive()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux 5.3")
def test_the_thread_sleeps_while_the_child_says_nothing(
    context: FakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float | None] = []
    wait = pipes.PolledPump.wait

    def counted(self: Any, timeout: float | None) -> bool:
        waits.append(timeout)
        return bool(wait(self, timeout))
    monkeypatch.setattr(pipes.PolledPump, "wait", counted)
    shell(["sleep", "0.3"])()
    assert len(waits) <= 5
    assert waits[0] is None


def test_many_runs_leave_no_descriptor_thread_or_zombie(context: FakeContext, pump: str) -> None:
    before = descriptors(), threading.active_count(), children()
    for _ in range(25):
        shell("echo x")()
        with pytest.raises(subprocess.CalledProcessError):
            shell(["false"])()
        with pytest.raises(FileNotFoundError):
            shell(["no-such-program-here"])()
    assert (descriptors(), threading.active_count(), children()) == before

"""Where descriptors or processes run out, commands wait for one another. Each limit is real, in a
process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from bgworker import History
from tests.support import ROOT, environment

WAIT = 60.0
CGROUPS = Path("/sys/fs/cgroup/pids")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the limits are those of POSIX")

RUN = """
from collections import Counter
from bgworker import Scheduler, shell

with Scheduler({workers}) as pool:
    tasks = [pool.submit(shell({command!r})) for _ in range({count})]
    pool.shutdown()
    print(dict(Counter(type(task.exception()).__name__ for task in tasks)))
"""


def run(code: str, limit: str) -> str:
    """Run Python code under a limit that the shell sets."""
    code = textwrap.dedent(code)
    done = subprocess.run(
        ["sh", "-c", f'{limit}; exec "$@"', "sh", sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("descriptors", [20, 40, 64])
def test_commands_wait_for_descriptors(descriptors: int) -> None:
    assert (
        run(
            RUN.format(workers=40, count=120, command="exec sleep 0.05"), f"ulimit -n {descriptors}"
        )
        == "{'NoneType': 120}\n"
    )


def test_what_fails_by_itself_fails_under_a_limit_too() -> None:
    assert (
        run(RUN.format(workers=40, count=60, command="exit 3"), "ulimit -n 40")
        == "{'CalledProcessError': 60}\n"
    )


def test_where_there_will_never_be_room_a_command_fails_with_a_remedy() -> None:
    told = run("""
        import resource
        from bgworker import Scheduler, shell
        from bgworker.shell import room

        room.PATIENCE = 0.5
        with Scheduler(2) as pool:
            pool.submit(shell("true")).result(30)
            full = []
            try:
                while True:
                    full.append(open("/dev/null"))
            except OSError:
                pass
            for _ in range(3):
                full.pop().close()
            error = pool.submit(shell("true")).exception(30)
            while full:
                full.pop().close()
            pool.submit(shell("true")).result(30)
        print(type(error).__name__, error)
        """, "ulimit -n 64")
    assert told.startswith(
        "OSError [Errno 24] there is no room for a process (Too many open files), and no command"
    )
    assert "raise the limit (ulimit -n" in told


def test_what_was_hopeless_for_one_command_is_not_waited_for_again() -> None:
    told = run("""
        import resource, time
        from bgworker import Scheduler, shell
        from bgworker.shell import room

        room.PATIENCE = 1.0
        with Scheduler(1) as pool:
            pool.submit(shell("true")).result(30)
            full = []
            try:
                while True:
                    full.append(open("/dev/null"))
            except OSError:
                pass
            for _ in range(3):
                full.pop().close()
            started = time.monotonic()
            errors = [pool.submit(shell("true")) for _ in range(20)]
            assert all(type(task.exception(30)) is OSError for task in errors)
            took = time.monotonic() - started
            while full:
                full.pop().close()
            pool.submit(shell("true")).result(30)
        print("once" if 1.0 <= took < 10.0 else took)
        """, "ulimit -n 64")
    assert told == "once\n"


def test_a_command_that_waits_for_room_can_be_cancelled() -> None:
    assert run("""
        import threading
        from bgworker import Scheduler, shell
        from bgworker.shell import room

        looked = threading.Event()
        wait = room.room.wait
        room.room.wait = lambda error: looked.set() or wait(error)
        with Scheduler(30) as pool:
            tasks = [pool.submit(shell("exec sleep 1000")) for _ in range(30)]
            assert looked.wait(30)
            for task in tasks:
                task.cancel()
        print({task.status.value for task in tasks})
        """, "ulimit -n 40") == "{'cancelled'}\n"


@pytest.fixture
def few_processes() -> Iterator[str]:
    """What makes a shell join a control group that may have 14 processes and threads."""
    group = CGROUPS / f"bgworker-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("needs the right to make a control group")
    try:
        (group / "pids.max").write_text("14")
        yield f"echo $$ >{group}/cgroup.procs"
    finally:
        group.rmdir()


def test_commands_wait_for_processes(few_processes: str) -> None:
    assert (
        run(RUN.format(workers=7, count=100, command="exec sleep 0.05"), few_processes)
        == "{'NoneType': 100}\n"
    )


def test_places_that_others_hold_are_waited_for_longer_and_that_is_told(
    few_processes: str, tmp_path: Path
) -> None:
    """Sleepers of somebody else hold the places for a while; none of our commands runs."""
    code = textwrap.dedent("""
        import subprocess, sys, threading
        from bgworker.cli import main
        from bgworker.shell import room

        room.PATIENCE = 0.5
        sleepers = [subprocess.Popen(["sleep", "3"]) for _ in range(int(sys.argv[1]))]
        threading.Thread(target=lambda: [each.wait() for each in sleepers]).start()
        sys.exit(main(["run", "--no-db", "--timeout", "2", "--", "echo", "ran"]))
        """)
    done = subprocess.run(
        ["sh", "-c", f'{few_processes}; exec "$@"', "sh", sys.executable, "-c", code, "9"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=WAIT, check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
    assert done.stderr.count("there is no room for a process (Resource temporarily unavailable): "
                             "waiting until other programs end; raise the limit") == 1


CLI = """
import sys
from bgworker.cli import main
open("commands", "w").write("exec sleep 0.02\\n" * 200)
sys.exit(main(["run", "-q", "-j", "40", "-f", "commands"]))
"""


def run_line(limit: str, folder: Path) -> str:
    """Run two hundred commands, forty at a time, under a limit; return the last line of what is
    said."""
    done = subprocess.run(
        ["sh", "-c", f'{limit}; exec "$@"', "sh", sys.executable, "-c", CLI],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("descriptors", [40, 64])
def test_the_command_line_runs_all_though_descriptors_are_few(
    tmp_path: Path, descriptors: int
) -> None:
    assert run_line(f"ulimit -n {descriptors}", tmp_path).startswith(
        "200 commands: 200 completed in "
    )
    with History(tmp_path / "bgworker.db") as history:
        assert history.counts() == {"completed": 200}


def test_the_command_line_runs_all_though_processes_are_few(
    tmp_path: Path, few_processes: str
) -> None:
    """Forty threads would take all fourteen places, and leave none for a command."""
    assert run_line(few_processes, tmp_path).startswith("200 commands: 200 completed in ")

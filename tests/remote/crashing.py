"""A program with resumable tasks, for tests that kill it. Run as
``python -m tests.remote.crashing FOLDER WHAT [more]``; it waits for a line of its input before it
begins.

What the bodies do stands in a log of theirs, which loses nothing when the process dies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bgworker import Scheduler, current_task, resumable
from bgworker.history import claims
from tests.histories import rows_of
from tests.support import environment

WORKERS = 2
SECONDS = 0.03
"""That a body takes."""


def note(folder: str, *words: object) -> None:
    """Append a line, as one write."""
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(log, (" ".join(map(str, (*words, os.getpid()))) + "\n").encode())
    os.close(log)


@resumable("step", version=1)
def step(folder: str, number: int, *, seconds: float) -> int:
    note(folder, "begin", number, current_task().id)
    time.sleep(seconds)
    note(folder, "end", number, current_task().id)
    return number


@resumable("deadly")
def deadly(folder: str, seconds: float) -> None:
    """Ends its process, once its start is in the history or before."""
    note(folder, "deadly", 0, current_task().id)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, what: str, *more: str) -> None:
    path = f"{folder}/history.db"
    if "unguarded" in more:  # the twin that shows what the tests would notice
        claims._STILL_LEFT = "SELECT value FROM json_each(:ids)"
    pool = Scheduler(WORKERS, sinks=[f"sqlite:{path}"])
    print("ready", flush=True)
    sys.stdin.readline()
    if what == "submit":
        for number in range(int(more[0])):
            pool.submit(step, folder, number, seconds=SECONDS)
        pool.flush()
        print("submitted", flush=True)
    elif what == "deadly":
        pool.submit(deadly, folder, float(more[0]))
    else:
        resumed = pool.resume(path)
        print(len(resumed.tasks), len(resumed.skipped), resumed.left, flush=True)
    pool.shutdown()
    if "held" in more:
        signal.pause()  # until it is killed


# ---------------------------------------------------------------- those who run it

class Program:
    """The program as a process of a group, which is killed as one."""

    def __init__(self, folder: Path, *words: object, beside: Program | None = None) -> None:
        group = 0 if beside is None else beside.process.pid
        how: dict[str, Any] = ({"process_group": group} if sys.version_info >= (3, 11) else
                               {"preexec_fn": lambda: os.setpgid(0, group)})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.remote.crashing", str(folder), *map(str, words)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), **how)

    def await_ready(self) -> None:
        assert self.line() == "ready"

    def line(self) -> str:
        """Wait for the next line that it prints."""
        assert self.process.stdout is not None
        return str(self.process.stdout.readline().strip())

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """Kill it, and all that run beside it, at one moment."""
        os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, seconds: float = 120.0) -> str:
        """Wait for its end, and return what it printed."""
        out, _ = self.process.communicate(timeout=seconds)
        return str(out)


def run(folder: Path, *words: object) -> str:
    """Run the program to its end."""
    program = Program(folder, *words)
    program.await_ready()
    program.begin()
    return program.end()


def crash(folder: Path, seconds: float, *words: object, processes: int = 1) -> None:
    """Begin the program in some processes at once, and kill them after so many seconds."""
    programs: list[Program] = []
    for _ in range(processes):
        programs.append(Program(folder, *words, beside=programs[0] if programs else None))
    for program in programs:
        program.await_ready()
    for program in programs:
        program.begin()
    if words[0] == "submit":  # what is not recorded is nobody's to resume
        assert programs[0].line() == "submitted"
    time.sleep(seconds)
    programs[0].kill()
    for program in programs:
        program.end()
        assert program.process.returncode == -signal.SIGKILL, "it had ended before"


def run_kills(folder: Path, tasks: int, kills: int, pause: Any) -> tuple[int, int]:
    """Submit tasks, kill the process at a random point, have two processes resume at once, kill
    them, and so on; then let one go on to the end. Return how many bodies began, and how many of
    them no process ended.

    Args:
        pause: returns the seconds until the next kill.
    """
    note(str(folder), "round", 0)
    crash(folder, pause(), "submit", tasks, "held")
    for number in range(1, kills):
        note(str(folder), "round", number)
        crash(folder, pause(), "resume", "held", processes=2)
        check(folder)
    note(str(folder), "round", kills)
    left = int(run(folder, "resume").split()[0])
    log = check(folder)
    ended = {line[1] for line in log if line[0] == "end"}
    completed = rows_of(folder / "history.db", CHAINS_COMPLETED)[0][0]
    assert completed == len(ended) == tasks, (completed, len(ended), left)
    assert run(folder, "resume").split() == ["0", "0", "0"], "nothing is left"
    begun = sum(line[0] == "begin" for line in log)
    return begun, begun - sum(line[0] == "end" for line in log)


# by its first task, each chain that has a task that completed
CHAINS_COMPLETED = """WITH RECURSIVE chain(first, id) AS (
  SELECT id, id FROM tasks WHERE rerun_of IS NULL
  UNION ALL SELECT first, tasks.id FROM chain JOIN tasks ON rerun_of = chain.id)
SELECT count(DISTINCT first) FROM chain JOIN tasks USING (id) WHERE status = 'completed'"""


def check(folder: Path) -> Sequence[Sequence[str]]:
    """Assert that nothing was claimed twice, nor begun twice in one round, nor more often than
    three times as far as the history tells; return the lines of the log."""
    twice = rows_of(folder / "history.db", "SELECT rerun_of, count(*) FROM tasks "
                    "WHERE rerun_of IS NOT NULL GROUP BY rerun_of HAVING count(*) > 1")
    assert not twice, f"{len(twice)} tasks were claimed twice"
    log = [line.split() for line in (folder / "log").read_text().splitlines()]
    begun: Counter[str] = Counter()
    for word, number, *_ in log:
        if word == "round":
            begun.clear()  # whoever ran is dead
        elif word == "begin":
            begun[number] += 1
            assert begun[number] == 1, f"{number} was begun twice at the same time"
    (most,), = rows_of(folder / "history.db", """WITH RECURSIVE chain(last, earlier, begun) AS (
  SELECT id, rerun_of, started_utc IS NOT NULL FROM tasks
  UNION ALL SELECT last, rerun_of, started_utc IS NOT NULL
  FROM chain JOIN tasks ON id = earlier)
SELECT max(total) FROM (SELECT total(begun) AS total FROM chain GROUP BY last)""")
    assert most is None or most <= 3
    return log


if __name__ == "__main__":
    main(*sys.argv[1:])

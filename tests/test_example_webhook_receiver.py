"""The example of a receiver: it gets the whole life of a task, and ends with it."""


from __future__ import annotations

from pathlib import Path

from tests.readme import run_block
from tests.support import ROOT


def test_the_receiver_gets_all_events_of_the_task(tmp_path: Path) -> None:
    sample = (ROOT / "tools" / "examples" / "webhook_receiver.py").read_text(encoding="utf-8")
    done = run_block(sample, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0].split(".")[2] for line in done.stdout.splitlines()
            if line.startswith("io.bgworker.")] == [
        "TaskCreated", "TaskScheduled", "TaskStarted", "TaskCompleted"]

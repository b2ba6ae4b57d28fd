"""The example of a progress page: it is served while the tasks run, and ends with them."""


from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.support import ROOT, SOON, environment, until


def sample() -> str:
    return (ROOT / "tools" / "examples" / "progress_page.py").read_text(encoding="utf-8")


def test_the_page_shows_what_the_tasks_do(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text(sample(), encoding="utf-8")
    with subprocess.Popen([sys.executable, "-W", "error", "sample.py"], cwd=tmp_path, text=True,
                          env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        address = run.stdout.readline().strip()

        def page() -> str:
            with urllib.request.urlopen(address, timeout=SOON) as answer:
                return str(answer.read().decode())

        until(lambda: "<td>work<td>running<td><progress max=100 value=" in page())
        until(lambda: " of 20" in page())
        run.communicate(timeout=SOON)
    assert run.returncode == 0


def test_the_sample_is_at_most_forty_lines_long() -> None:
    assert len([line for line in sample().splitlines() if line.strip()]) <= 40

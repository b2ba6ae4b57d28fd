"""Other projects' test suites pass on the Scheduler as they pass on ``ThreadPoolExecutor``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "suites.py"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("standardwebhooks") is None,
    reason="needs the package index; runs where the extra 'integration' is installed",
)
def test_no_test_of_other_projects_fails_for_the_swap_of_their_executor() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    if done.returncode == 2:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout


def test_an_unknown_suite_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "nonsense"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "no such suite: nonsense" in done.stdout

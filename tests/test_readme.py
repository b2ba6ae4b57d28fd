"""What the README says is true: its examples run, its commands are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import ROOT
from tests.readme import README, Block, python_blocks, run_block

NEWCOMER_COMMANDS = ("python3 tools/check.py", "python3 -m bgworker run ")
"""Set up and test the project; run something with it."""

def text() -> str:
    return README.read_text(encoding="utf-8") if README.exists() else ""


def runnable() -> list[object]:
    return [
        pytest.param(block.code, id=f"line {block.line}")
        for block in python_blocks(text())
        if block.no_run is None
    ]


@pytest.mark.parametrize("code", runnable())
def test_an_example_runs(code: str, tmp_path: Path) -> None:
    done = run_block(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_readme_has_examples_that_run() -> None:
    assert runnable(), f"no ```python block in {README.name} that is run"


@pytest.mark.parametrize("command", NEWCOMER_COMMANDS)
def test_a_newcomers_command_stands_at_the_top(command: str) -> None:
    assert command in "\n".join(text().splitlines()[:40])


def test_every_subcommand_is_mentioned() -> None:
    verbs = subcommands()
    assert "run" in verbs and "replay" in verbs
    missing = [verb for verb in verbs if not re.search(rf"(?:bgworker |`){verb}\b", text())]
    assert not missing


def subcommands() -> list[str]:
    """Return the verbs that the command line's own help lists."""
    environment = {**os.environ, "COLUMNS": "1000", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bgworker", "--help"],
        cwd=ROOT,
        env=environment,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^    ([a-z]+)  ", done.stdout, re.MULTILINE)
    assert listed, done.stdout
    return listed


# --- the extraction itself ---

SAMPLE = """\
# Title
```python
print("one")
```
<!-- no-run: needs a server -->
```python
two()
```
<!-- no-run: too far away -->
Text.
```python
raise SystemExit("three")
```
```sh
ls
```
````python
'''
```
'''
````
"""


def test_blocks_are_found_and_only_a_comment_directly_before_one_skips_it() -> None:
    assert list(python_blocks(SAMPLE)) == [
        Block(2, 'print("one")\n', None),
        Block(6, "two()\n", "needs a server"),
        Block(11, 'raise SystemExit("three")\n', None),
        Block(17, "'''\n```\n'''\n", None),
    ]


def test_an_example_that_fails_is_noticed(tmp_path: Path) -> None:
    assert run_block("import bgworker\nraise SystemExit('three')\n", tmp_path).returncode == 1

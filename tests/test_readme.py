"""What the README says is true: its examples run, its commands are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

NEWCOMER_COMMANDS = ("python3 tools/check.py", "python3 -m bgworker run ")
"""Set up and test the project; run something with it."""

BLOCK = re.compile(
    r"^(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)[ ]*$",
    re.DOTALL | re.MULTILINE,
)
NO_RUN = re.compile(r"<!-- no-run: (?P<reason>[^>]*\S) -->\s*\Z")


class Block(NamedTuple):
    line: int
    code: str
    no_run: str | None
    """Why it is not run; None for a block that is."""


def python_blocks(text: str) -> Iterator[Block]:
    """Yield every ```python block, with the reason of a no-run comment that stands directly before
    it."""
    for found in BLOCK.finditer(text):
        if found["language"] == "python":
            comment = NO_RUN.search(text, 0, found.start())
            yield Block(
                text.count("\n", 0, found.start()) + 1,
                found["code"],
                comment["reason"] if comment else None,
            )


def text() -> str:
    return README.read_text(encoding="utf-8") if README.exists() else ""


def runnable() -> list[object]:
    return [
        pytest.param(block.code, id=f"line {block.line}")
        for block in python_blocks(text())
        if block.no_run is None
    ]


def run_block(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the code as a script in a folder of its own, with this checkout's bgworker and no setting
    from outside."""
    script = folder / "example.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=folder,
        env=environment,
        timeout=120,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


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

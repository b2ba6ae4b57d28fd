"""The examples of the README. No test is in here."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT, environment

README = ROOT / "README.md"

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


def run_block(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the code as a script in a folder of its own, with this checkout's bgworker and no setting
    from outside."""
    script = folder / "example.py"
    script.write_text(code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=folder,
        env=environment(),
        timeout=120,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )

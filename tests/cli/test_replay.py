"""``bgworker replay``, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bgworker.model.wire import decode
from tests.support import ROOT

def bgworker(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bgworker", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_was_parked_is_delivered_and_counted(parked: Path, tmp_path: Path) -> None:
    done = bgworker("replay", parked, "--to", f"jsonl:{tmp_path / 'out.jsonl'}")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "24 delivered, 0 refused, 0 skipped\n",
        "",
    )
    assert [decode(line).seq for line in (tmp_path / "out.jsonl").read_text().splitlines()] == list(
        range(1, 25)
    )
    assert not parked.exists()


def test_a_line_that_cannot_be_read_is_shown_harmlessly_and_ends_with_1(
    parked: Path, tmp_path: Path
) -> None:
    with parked.open("a") as file:
        file.write('{"event":{"v":1,"type":"\x1b[31mred"}}\n')
    done = bgworker("replay", parked, "--to", f"jsonl:{tmp_path / 'out.jsonl'}")
    assert done.returncode == 1 and done.stdout == "24 delivered, 0 refused, 1 skipped\n"
    assert "line at byte" in done.stderr and "\x1b" not in done.stderr


@pytest.mark.parametrize(("words", "message"), [
    (["none.jsonl", "--to", "jsonl:x.jsonl"], "cannot read 'none.jsonl'"),
    (["PARK", "--to", "pigeon"], "argument --to: "),
    (["PARK"], "--to"),
    ([], "FILE"),
])
def test_bad_input_is_one_line_and_exit_code_2(
    parked: Path, words: list[str], message: str
) -> None:
    before = parked.read_bytes()
    done = bgworker("replay", *[str(parked) if word == "PARK" else word for word in words])
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert parked.read_bytes() == before


def test_a_sink_that_cannot_be_opened_leaves_the_file_as_it_was(
    parked: Path, tmp_path: Path
) -> None:
    before = parked.read_bytes()
    done = bgworker("replay", parked, "--to", f"jsonl:{tmp_path}")
    assert done.returncode == 1 and "is a directory" in done.stderr and done.stderr.count("\n") == 1
    assert parked.read_bytes() == before

"""Histories that somebody has damaged, or made to do harm, through every verb.

`tools/stress.py histories` goes on for longer.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import mutations
import pytest
from tests.histories import Recorder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="verbs run in forked children")
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@FORKS
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_no_verb_hangs_or_breaks_or_fills_the_memory_whatever_is_in_a_history(seed: int) -> None:
    mutations.run_for(0.0, seed, verbs=5)


@FORKS
@pytest.mark.parametrize("what", mutations.TRICKS)
def test_what_is_no_plain_table_of_ours_does_no_harm(tmp_path: Path, what: str) -> None:
    path = str(tmp_path / "h.db")
    record = Recorder(path)
    record.said(record.task("job", "failed", run_id=record.run(host="x")), "said")
    record.close()
    with mutations.opened(path) as connection:
        try:
            mutations.play(connection, what)
        except sqlite3.Error:
            pass  # half of it may be as bad
    for words in (["tasks"], ["stats"], ["prune", "--keep", "0"]):
        outcome = mutations.run([*words, "--db", path], str(tmp_path))
        assert not outcome.fault, outcome


@FORKS
@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="no limit for texts can be set there")
def test_a_value_of_hundreds_of_megabytes_is_not_read(tmp_path: Path) -> None:
    path = str(tmp_path / "h.db")
    record = Recorder(path)
    for number in range(300):
        record.said(record.task(f"task {number}", created=record.ago(minutes=number)), "said")
    record.close()
    # elsewhere: a verb that ran in this process has limited what SQLite may take here
    script = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).executescript(sys.argv[2])"
    subprocess.run([sys.executable, "-c", script, path, """
        UPDATE zz_stream_rows SET payload = printf('%.*c', 120000000, 'x') WHERE task = 1;
        UPDATE tasks SET arg_json = printf('%.*c', 120000000, 'x') WHERE key = 2;
    """], check=True, timeout=60)
    for words in mutations.HISTORY.verbs:
        if words[0] != "watch" and "-f" not in words:
            each = [str(tmp_path / "other") if word == "OTHER" else word for word in words]
            outcome = mutations.run([*each, "--db", path], str(tmp_path))
            assert not outcome.fault, outcome


def hang() -> None:
    while True:
        time.sleep(0.01)


def grow() -> None:
    bytearray(mutations.MOST_MEMORY + 2**20)[::4096] = b"x" * (mutations.MOST_MEMORY // 4096 + 256)


@FORKS
def test_what_the_tests_before_have_left_in_memory_does_not_count(tmp_path: Path) -> None:
    left = b"x" * mutations.MOST_MEMORY
    assert mutations.run(["tasks", "--help"], str(tmp_path)).fault == "", len(left)


@FORKS
@pytest.mark.parametrize(("act", "fault"), [
    (hang, "hang"), (grow, "MiB"), (lambda: 1 // 0, "traceback"), (lambda: os._exit(3), "code 3"),
    (lambda: os.kill(os.getpid(), 9), "code -9")])
def test_the_harness_would_notice_a_verb_that_does(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Any, fault: str) -> None:
    monkeypatch.setattr("bgworker.cli.main", lambda words: act() or 0)
    if fault == "hang":  # whatever else goes wrong is noticed at once, and may take its time
        monkeypatch.setattr(mutations, "PATIENCE", 0.2)
    assert fault in mutations.run(["tasks"], str(tmp_path)).fault

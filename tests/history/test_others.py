"""The files by which other programs show a history or its events: what they name is there, and the
programs take them, where they are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.histories import make_nightly, rows_of

from bgworker import JsonlSink, Scheduler, current_task

TOOLS = Path(__file__).parents[2] / "tools"
DATASETTE: dict[str, Any] = json.loads((TOOLS / "datasette.json").read_text())
LNAV: dict[str, Any] = json.loads((TOOLS / "lnav.json").read_text())["bgworker_log"]
KINDS = "type IN ('table', 'view') AND name NOT LIKE 'sqlite%'"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("others") / "bgworker.db"
    make_nightly(path)
    return path


def test_datasette_is_told_of_all_tables_and_only_of_columns_that_are_there(history: Path) -> None:
    tables = DATASETTE["databases"]["bgworker"]["tables"]
    assert {name for name, in rows_of(history, f"SELECT name FROM sqlite_master WHERE {KINDS}")
            } == set(tables)
    for name, table in tables.items():
        columns = {row[1] for row in rows_of(history, f"PRAGMA table_info({name})")}
        named = {*table.get("facets", ()), *table.get("columns", ())}
        named |= {table[key] for key in ("sort_desc", "label_column") if key in table}
        assert named <= columns, name


def recorded(path: Path) -> list[dict[str, Any]]:
    """Record events of all that lnav is told of; return them."""
    def work() -> None:
        current_task().progress(1, 2, "half")
        current_task().output("hello")
        raise ValueError("bad")

    with Scheduler(sinks=[JsonlSink(path)]) as pool:
        pool.options(name="load").submit(work).wait(30)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lnav_is_told_only_of_fields_that_events_have(tmp_path: Path) -> None:
    fields: set[str] = set()
    for event in recorded(tmp_path / "events.jsonl"):
        fields |= {*event, *(f"task/{name}" for name in event.get("task", ()))}
    named = {LNAV[f"{key}-field"] for key in ("timestamp", "level", "body", "opid")}
    named |= {part["field"] for part in LNAV["line-format"] if part != " "} | {*LNAV["value"]}
    assert named <= fields


@pytest.mark.skipif(shutil.which("lnav") is None, reason="lnav is not installed")
def test_lnav_shows_a_line_an_event(tmp_path: Path) -> None:
    recorded(tmp_path / "events.jsonl")
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("XDG_CONFIG_HOME", None)
    for words in (["-i", str(TOOLS / "lnav.json")], ["-n", "events.jsonl"]):
        done = subprocess.run(["lnav", *words], cwd=tmp_path, env=environment, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 2)[2].split() for line in done.stdout.splitlines()]
    assert ["TaskOutput", "hello"] in lines and ["TaskProgress", "half"] in lines
    assert ["TaskFailed", "load", "bad"] in lines

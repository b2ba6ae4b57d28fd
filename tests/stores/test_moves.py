"""A history moves from a store of any kind to one of any other, and is equal afterwards."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.histories import run_cli
from tests.stores.events import in_order
from tests.stores.servers import Mongo, Postgres
from tests.stores.stages import MongoStage, PostgresStage

from bgworker import Scheduler, current_task
from bgworker.model import wire

STORES = """
from tests.stores.stages import store

def pg():
    return store("PostgresStage", {pg}, "jobs")

def mongo():
    return store("MongoStage", {mongo}, "{name}")

def nothing():
    from bgworker.testing import MemorySink
    return MemorySink()
"""


@pytest.fixture
def folder(tmp_path: Path, postgres: Postgres, on_postgres: PostgresStage) -> Path:
    """A folder with the factories of a team."""
    (tmp_path / "stores.py").write_text(STORES.format(pg=postgres.port, mongo=0, name=""))
    return tmp_path


def cli(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_cli(*words, cwd=folder)


def fill(path: Path) -> None:
    """Record tasks of each outcome, with all that they can say."""
    def talk(number: int) -> None:
        task = current_task()
        for line in range(100):
            task.output(f"{number} line {line} \u65e5 \" \\ \t")
        task.error({"number": 1e23, "text": None})
        task.progress(number, 4, "some")
        if number == 2:
            raise ValueError("two")

    with Scheduler(2, sinks=[f"sqlite:{path}"]) as pool:
        options = pool.options(metadata={"z": 1, "a": [1e23, "\u00e9"]}, record_arguments=True,
                               record_source=True)
        for task in [options.submit(talk, number) for number in range(4)]:
            task.wait(30)
        blocked = pool.submit(lambda: current_task().sleep(60))
        blocked.cancel()
        blocked.wait(30)


def exported(path: Path) -> list[Any]:
    with open(path, encoding="utf-8") as file:
        return in_order(map(wire.decode, file))


def move(folder: Path, kinds: list[str]) -> list[list[Any]]:
    """Move the history of first.db through stores of these kinds; return what each exports."""
    seen = []
    source = ["--db", "first.db"]
    for number, kind in enumerate(kinds):
        lines = f"{number}.jsonl"
        done = cli(folder, "export", *source, "--jsonl", lines)
        assert done.returncode == 0, done.stderr
        seen.append(exported(folder / lines))
        spec = f"sqlite:{number}.db" if kind == "sqlite" else f"stores:{kind}"
        done = cli(folder, "replay", lines, "--to", spec)
        assert (done.returncode, done.stdout) == (
            0, f"{len(seen[-1])} delivered, 0 refused, 0 skipped\n"), done
        source = ["--db", f"{number}.db"] if kind == "sqlite" else ["--from", spec]
    done = cli(folder, "export", *source, "--jsonl", "last.jsonl")
    assert done.returncode == 0, done.stderr
    return [*seen, exported(folder / "last.jsonl")]


def test_a_history_moves_from_a_file_to_postgresql_and_back_and_a_replay_again_changes_nothing(
        folder: Path) -> None:
    fill(folder / "first.db")
    first, *others = move(folder, ["pg", "sqlite"])
    assert len(first) == 4 * 103 + 1
    assert others == [first, first]
    assert cli(folder, "replay", "0.jsonl", "--to", "stores:pg").returncode == 0
    assert cli(folder, "export", "--from", "stores:pg", "--jsonl", "again.jsonl").returncode == 0
    assert exported(folder / "again.jsonl") == first


def test_a_history_moves_between_all_kinds_of_stores(
        folder: Path, mongo: Mongo, on_mongo: MongoStage, postgres: Postgres) -> None:
    (folder / "stores.py").write_text(
        STORES.format(pg=postgres.port, mongo=mongo.port, name=on_mongo.name))
    fill(folder / "first.db")
    first, *others = move(folder, ["mongo", "pg", "sqlite"])
    assert others == [first, first, first]


@pytest.mark.parametrize("arguments, message", [
    (["--from", "stores:nothing"], "argument --from: 'stores:nothing' is no sink that can be read"),
    (["--from", "stores:absent"], "argument --from: sink spec 'stores:absent': module 'stores'"),
    (["--from", "sqlite:x.db"], "argument --from: 'x.db' is a file; name it with --db"),
    (["--from", "stores:pg", "--run", "last"], "argument --run: goes with --db only"),
    (["--from", "stores:pg"], "the schema 'jobs' of PostgreSQL has no history of this"),
])
def test_what_cannot_be_exported_is_named_in_one_line(
        folder: Path, arguments: list[str], message: str) -> None:
    done = cli(folder, "export", *arguments, "--jsonl", "out.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "out.jsonl").exists()

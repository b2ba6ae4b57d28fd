"""A newer bgworker brings a history on a server to its version, whoever writes to it meanwhile."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tests.stores.events import said
from tests.stores.load import Load
from tests.stores.servers import Postgres, Proxy
from tests.stores.stages import PostgresStage, Stage, on_every_server
from tests.support import SOON, balanced, environment, in_time, until

from bgworker import PermanentSinkError, Scheduler, SinkError, current_task
from bgworker.model.ids import new_id
from bgworker.stores import mongo, tables

pytestmark = on_every_server

NEWER = """
import sys
from tests.stores import stages

kind, port, name, seconds = sys.argv[1:]
getattr(stages, kind).add_step(float(seconds))
sink = stages.store(kind, int(port), name)
print("ready", flush=True)
sys.stdin.readline()
sink.open()
sink.close()
"""


def newer(
    stage: Stage, seconds: float = 0.0, *, waits: bool = False
) -> subprocess.Popen[str]:
    """Start a process that brings the history to a version that this one does not know.

    Args:
        waits: only once its standard input ends; now it is ready to.
    """
    words = type(stage).__name__, str(stage.server.port), stage.name, str(seconds)
    process = subprocess.Popen([sys.executable, "-c", NEWER, *words], env=environment(), text=True,
                               stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if waits:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return process


def succeeded(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        text, _ = process.communicate(timeout=SOON)
        assert process.returncode == 0, text


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget after the test what it adds to the steps."""
    for module in (tables, mongo):
        monkeypatch.setattr(module, "STEPS", module.STEPS)


def make(stage: Stage) -> None:
    """Make a history with one run."""
    sink = stage.sink()
    sink.open()
    stage.make_run("somebody", 0)
    sink.close()


def test_a_newer_history_is_refused_and_left_alone(stage: Stage) -> None:
    make(stage)
    stage.set_version(99)
    with Scheduler(1) as pool, pytest.raises(
            PermanentSinkError, match="version 99.*up to 1; upgrade bgworker, or name another"):
        pool.register_sink(stage.sink())
    sink = stage.sink()
    with pytest.raises(PermanentSinkError, match="version 99") as caught:
        sink.write([said(new_id(1), 1)])
    assert caught.value.concerns == "sink"
    assert stage.tasks() == []
    with pytest.raises(PermanentSinkError, match="version 99"):
        list(sink.events())


def test_a_reader_makes_nothing(stage: Stage) -> None:
    for _ in range(2):
        with pytest.raises(SinkError, match="no history of this version; have a sink open it fir"):
            list(stage.sink().events())


def test_a_sink_that_is_connected_stops_when_a_newer_one_has_come_and_loses_nothing(
        stage: Stage, network: Proxy, tmp_path: Path) -> None:
    load = Load(stage, network, park=tmp_path / "park")
    try:
        load.goes_on()
        succeeded(newer(stage))
        until(lambda: load.health.state == "failed")
    finally:
        load.finish(is_delivered=False)
    health = load.health
    assert "has a history of version 2, and this bgworker knows versions up to 1; upgrade" in (
        health.last_error or "")
    assert balanced(health) and health.dropped == 0
    assert health.delivered + health.parked == sum(load.said) + 2 * 4
    # two tasks have begun, of which a history keeps no event
    assert sum(rows for rows, _ in stage.lines()) == health.delivered - 2 * 3
    ended = [end for _, pid, end, _ in stage.runs() if pid]
    assert ended == [None]


def test_of_two_that_come_at_once_one_does_the_step(stage: Stage) -> None:
    make(stage)
    second = newer(stage, waits=True)
    first = newer(stage, 1.0)
    until(stage.is_in_step)
    succeeded(second, first)  # the first is in the step when the second's input ends
    assert (stage.versions(), stage.cities()) == ([1, 2], ["Ulm"])
    assert not stage.is_in_step()


def test_one_that_is_killed_in_the_middle_is_followed_by_the_next(
        stage: Stage, steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongo, "LEASE", 0.5)
    make(stage)
    first = newer(stage, SOON)
    until(stage.is_in_step)
    first.kill()
    first.communicate(timeout=SOON)
    if isinstance(stage, PostgresStage):
        # the server does not look after the client of a statement that takes its time
        stage.server.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                         "WHERE query LIKE 'SELECT pg_sleep%'")
    assert stage.versions() == [1]
    stage.add_step()
    sink = stage.sink()
    sink.write([said(new_id(1), 1)])
    sink.close()
    assert (stage.versions(), stage.cities()) == ([1, 2], ["Ulm"])


def test_a_step_that_fails_is_no_version_and_keeps_nobody_waiting(
        stage: Stage, steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongo, "LEASE", 1e9)
    make(stage)
    with monkeypatch.context() as patch:
        for module in (tables, mongo):
            patch.setattr(module, "STEPS", module.STEPS)
        stage.add_step(fails=True)
        with pytest.raises(SinkError):
            stage.sink().open()
    assert stage.versions() == [1]
    stage.add_step()
    sink = stage.sink()
    for _ in range(2):
        in_time(sink.open)
        sink.close()
    assert (stage.versions(), stage.cities()) == ([1, 2], ["Ulm"])

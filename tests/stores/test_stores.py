"""A history on a server is the same as one in a file, whoever keeps it and however many do. Real
servers, started for these tests."""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from tests.stores.events import NOW, RUN, ended, in_order, said
from tests.stores.stages import PostgresStage, Stage, everywhere, on_every_server
from tests.support import SOON, Gate, exit_code, forked, needs_fork

from bgworker import (
    Event,
    EventType,
    History,
    LifecycleEvent,
    LossEvent,
    Scheduler,
    SqliteSink,
    TaskSnapshot,
    TaskStatus,
    current_task,
)
from bgworker import stores
from bgworker.history.schema import this_host
from bgworker.model.ids import new_id, new_run_id
from bgworker.stores import mongo, postgres, store
from bgworker.testing import MemorySink, check_sink


@pytest.fixture
def sink(stage: Stage) -> Iterator[Any]:
    made = stage.sink()
    yield made
    made.close()


def all_kinds_of_tasks(pool: Scheduler) -> None:
    """Run tasks that have each column of their row, some of them several states in a batch."""
    def talk(number: int) -> None:
        task = current_task()
        task.output(f"{number} \u65e5\u672c \" \\ {{}} %s ' \t\r\n \x1b[1m")
        task.output({"number": number, "texts": ["a", None, 1e23]})
        task.error("x" * 100_000)
        task.warning("")
        task.progress(number, 8, "some")
        if number == 3:
            raise ValueError("three\nlines\n")

    options = pool.options(metadata={"b": 1, "a": [1e23, "\u00e9"], "rerun_of": "f" * 5000},
                           record_arguments=True, record_source=True,
                           name="n" * 9000)
    tasks = [options.submit(talk, number) for number in range(4)]
    tasks += [pool.submit(talk, 5)]
    for task in tasks:
        task.wait(SOON)


# ---------------------------------------------------------------- the contract


@everywhere
def test_the_sink_keeps_every_promise_of_the_contract(stage: Stage) -> None:
    check_sink(stage.sink, read_back=all_events, is_idempotent=True)


def all_events(sink: Any) -> Iterator[Event]:
    """Yield what a sink has kept, with the first life-cycle events, which a history does not keep:
    the gaps in the numbers of a task are its life."""
    types = [EventType.TASK_CREATED, EventType.TASK_SCHEDULED, EventType.TASK_STARTED]
    seqs: Counter[str] = Counter()
    for event in in_order(sink.events()):
        if isinstance(event, LossEvent) or event.seq <= seqs[event.task_id]:
            continue
        for seq in range(seqs[event.task_id] + 1, min(event.seq, 4)):
            task = TaskSnapshot(event.task_id, "", TaskStatus.RUNNING, "", NOW)
            yield LifecycleEvent(types[seq - 1], event.task_id, seq, NOW, task)
        seqs[event.task_id] = event.seq
        yield event


@everywhere
def test_what_it_keeps_is_what_a_file_keeps(
        sink: Any, tmp_path: Path) -> None:
    with Scheduler(4) as pool:
        pool.register_sink(sink, name="shared")
        pool.register_sink(SqliteSink(tmp_path / "h.db"), name="file")
        all_kinds_of_tasks(pool)
        assert pool.flush(SOON)
        (health, other) = (pool.sinks["shared"], pool.sinks["file"])
        assert (health.delivered, health.dropped) == (other.delivered, 0)
    with History(tmp_path / "h.db") as history:
        expected = in_order(history.events())
    assert len(expected) == 5 * 6
    assert in_order(sink.events()) == expected


# not on nx-27017, which compares a text that begins as a time does as if it were one
def test_what_is_read_in_many_pages_is_all_there_in_order(
        sink: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (postgres, mongo):
        monkeypatch.setattr(module, "READ_TASKS", 2)
        monkeypatch.setattr(module, "READ_ROWS", 3)
    # by number 10 comes behind 9, by text before
    tasks = [[*(said(id_, seq) for seq in range(1, 12)), ended(id_, 12)]
             for id_ in sorted(new_id(number) for number in range(5))]
    losses: list[Event] = [
        LossEvent(EventType.EVENTS_LOST, NOW + timedelta(seconds=number), "hook", 3, "overflow", {})
        for number in range(7)]
    expected = [*(event for task in tasks for event in task), *losses]
    sink.write([*losses, *(event for task in reversed(tasks) for event in task)])
    assert list(sink.events()) == expected


@everywhere
@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_any_parts_leads_to_the_same_history_as_in_a_file(
        sink: Any, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    memory = MemorySink()
    with Scheduler(4, sinks=[memory]) as pool:
        all_kinds_of_tasks(pool)
        assert pool.flush(SOON)
    events = [*memory.events, ended(new_id(1), 3, result='{"b": 1e+23,  "a": [1.0, "\\u00e9"]}'),
              LossEvent(EventType.EVENTS_LOST, NOW, "hook", 3, "overflow",
                        {"TaskOutput": 2, "TaskProgress": 1})]
    draw.shuffle(events)
    file = SqliteSink(tmp_path / "h.db")
    for _ in range(12):
        start = draw.randrange(len(events))
        part = events[start:start + draw.randrange(1, 12)]
        sink.write(part)
        file.write(part)
    sink.close()
    file.close()
    with History(tmp_path / "h.db") as history:
        assert in_order(sink.events()) == in_order(history.events())


@everywhere
def test_a_row_never_goes_back_and_is_there_once(stage: Stage, sink: Any) -> None:
    task_id = new_id(1)
    late = ended(task_id, 9, failure_message=None)
    batch = [said(task_id, 4, "a"), late]
    sink.write(batch)
    sink.write(batch)
    sink.write([ended(task_id, 3, TaskStatus.RUNNING), said(task_id, 4, "another")])
    assert list(sink.events()) == [said(task_id, 4, "a"), late]
    assert stage.tasks() == [(task_id, "completed", 9)]


# ---------------------------------------------------------------- runs


def test_it_tells_which_process_runs_since_when_and_was_seen_when(
        stage: Stage, sink: Any) -> None:
    with Scheduler(1) as pool:
        pool.register_sink(sink, name="shared")
        pool.submit(int).result(SOON)
        assert pool.flush(SOON)
        ((_, pid, end, seen),) = stage.runs()
        assert (pid, end) == (os.getpid(), None) and seen is not None
        time.sleep(0.002)  # a server may count milliseconds
        pool.submit(lambda: current_task().output("still here")).result(SOON)
        assert pool.flush(SOON)
        ((_, _, _, later),) = stage.runs()
        assert later > seen
    ((_, _, end, last),) = stage.runs()
    assert end is not None and last >= later


@on_every_server
def test_a_batch_that_tells_of_no_task_of_a_run_shows_all_the_same_that_it_lives(
        stage: Stage, sink: Any) -> None:
    loss = LossEvent(EventType.EVENTS_LOST, NOW, "hook", 3, "overflow", {"TaskOutput": 3})
    with Scheduler(1) as pool:
        pool.register_sink(sink, name="shared")
        pool.submit(int).result(SOON)
        assert pool.flush(SOON)
        for others in ([loss], [said(new_id(1), 1)], [ended(new_id(2), 3, run_id="")]):
            ((_, _, _, before),) = stage.runs()
            time.sleep(0.002)  # a server may count milliseconds
            sink.write(others)
            ((_, _, _, seen),) = stage.runs()
            assert seen > before


@on_every_server
def test_who_runs_where_since_when_is_one_question(stage: Stage, sink: Any) -> None:
    sink.write([ended(new_id(1), 3, TaskStatus.RUNNING)])  # a copy
    stage.make_run("silent", 600)
    gone = stage.sink()
    with Scheduler(1) as pool:
        pool.register_sink(gone, name="gone")
        pool.submit(int).result(SOON)
    gate = Gate()
    with Scheduler(1) as pool:
        pool.register_sink(sink, name="shared")
        task = pool.submit(gate)
        assert gate.entered.wait(SOON) and pool.flush(SOON)
        sql, mongosh = re.findall(r"\n\n((?:    .*\n)+)", stores.__doc__ or "")
        if isinstance(stage, PostgresStage):
            silent, living = stage.server.ask(sql.replace("bgworker.", "jobs."))
            host, pid, since, seen, age, running = living
            assert timedelta() <= age < timedelta(seconds=SOON) < silent[4]
            assert (silent[0], running) == ("a", 1) and since <= seen
        else:
            found = eval(mongosh, {"database": stage.db})  # type: ignore[attr-defined]
            silent, living = found
            assert silent["host"] == "a" and silent["last_seen"] < living["last_seen"]
            host, pid = living["host"], living["pid"]
        assert (host, pid) == (this_host(), os.getpid())
        gate.open()
        task.result(SOON)


def test_a_run_that_is_only_told_of_is_never_seen(stage: Stage, sink: Any) -> None:
    sink.write([ended(new_id(1), 3, TaskStatus.RUNNING)])
    assert stage.runs() == [(RUN, None, None, None)]


def test_an_unfinished_task_of_a_run_that_has_ended_is_read_as_interrupted(sink: Any) -> None:
    sink.write([ended(new_id(1), 3, TaskStatus.RUNNING, run_id=new_run_id(1))])
    events: list[Any] = list(sink.events())
    sink.close()
    events += sink.events()
    assert [each.task.status for each in events] == ["running", "interrupted"]


@needs_fork
@pytest.mark.filterwarnings("ignore:MongoClient opened before fork:UserWarning")
def test_a_forked_child_and_its_parent_go_on_side_by_side(stage: Stage, sink: Any) -> None:
    sink.write([said(new_id(1), 1)])
    before = getattr(sink, "_connection", None)

    def child() -> None:
        sink.open()
        sink.write([said(new_id(2), 1)])
        sink.close()

    assert exit_code(forked(child)) == 0
    assert exit_code(forked(sink.close)) == 0
    sink.write([said(new_id(3), 1)])
    assert getattr(sink, "_connection", None) is before  # it was not ended by the child
    assert stage.counts()[0] == 3


@everywhere
def test_the_first_of_many_sinks_makes_the_history(stage: Stage) -> None:
    sinks = [stage.sink() for _ in range(8)]
    with Scheduler(8) as pool:
        for task in [pool.submit(each.write, [said(new_id(number), 1)])
                     for number, each in enumerate(sinks)]:
            task.result(SOON)
    for each in sinks:
        each.close()
    assert stage.counts()[0] == 8


# ---------------------------------------------------------------- retention


def old(number: int, age: float, **more: Any) -> LifecycleEvent:
    """Return the end of a task some seconds ago."""
    then = datetime.now(timezone.utc) - timedelta(seconds=age)
    return ended(f"{number:032x}", 9, **{"completed_utc": then, "created_utc": then, **more})


def kept(stage: Stage) -> list[int]:
    return [int(id_, 16) for id_, _, _ in stage.tasks()]


def test_what_is_older_than_max_age_goes_whole(stage: Stage) -> None:
    sink = stage.sink(max_age=100)
    sink.write([said(f"{1:032x}", 4), old(1, 200, script_hash="a", script_id="m:a"),
                old(2, 50, script_hash="b", script_id="m:b"),
                LossEvent(EventType.EVENTS_LOST, datetime.now(timezone.utc) - timedelta(hours=1),
                          "hook", 3, "overflow", {})])
    assert kept(stage) == [2]
    assert stage.counts() == (0, 1, 0)
    sink.close()


def test_what_is_too_much_goes_oldest_end_first(stage: Stage) -> None:
    sink = stage.sink(max_tasks=3)
    sink.write([old(number, 100 + number) for number in range(1, 8)])
    assert kept(stage) == [1, 2, 3]
    sink.close()


def test_a_task_that_may_still_run_stays(stage: Stage) -> None:
    running = {"status": TaskStatus.RUNNING, "completed_utc": None}
    sink = stage.sink(max_age=100)
    sink.write([old(1, 200, **running), old(2, 200, **running), old(3, 200, **running)])
    # one of a run that lives, one of a run that was silent for long, one of a copied run
    assert kept(stage) == []
    for number, run, seen in ((1, "live", 0), (2, "dead", 200)):
        stage.make_run(run, seen)
        plain = stage.sink()
        plain.write([old(number, 200, **running)])
        plain.close()
        stage.set_run(f"{number:032x}", run)
    sink._next_look = 0.0
    sink.write([old(4, 1)])
    assert kept(stage) == [1, 4]
    sink.close()


def test_a_bound_on_the_number_spares_a_task_that_nobody_knows_to_have_ended(
        stage: Stage) -> None:
    running = {"status": TaskStatus.RUNNING, "completed_utc": None}
    sink = stage.sink(max_tasks=1)
    # a copy of the history of a run that may still go on elsewhere
    sink.write([old(1, 200, **running), old(2, 100), old(3, 50)])
    assert kept(stage) == [1]
    sink.close()


def test_a_task_with_more_rows_than_go_at_once_goes_in_several_steps(
        stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "MOST_ROWS", 100)
    monkeypatch.setattr(store, "PRUNE_SECONDS", SOON)
    sink = stage.sink(max_tasks=0)
    sink.write([*(said(f"{1:032x}", seq) for seq in range(1, 1001)), old(1, 5)])
    assert kept(stage) == []
    assert stage.counts()[0] == 0
    sink.close()


def test_sinks_that_prune_at_once_do_not_remove_too_much(
        stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PRUNE_SECONDS", SOON)
    for module in (postgres, mongo):
        monkeypatch.setattr(module, "MOST_TASKS", 10)
    plain = stage.sink()
    plain.write([old(number, 200 - number) for number in range(120)])
    plain.close()
    sinks = [stage.sink(max_tasks=60) for _ in range(4)]
    with Scheduler(4) as pool:
        tasks = [pool.submit(each.write, [old(number, 0)])
                 for number, each in enumerate(sinks, 1000)]
        for task in tasks:
            task.result(SOON)
    for each in sinks:
        each.close()
    assert len(kept(stage)) >= 60
    last = stage.sink(max_tasks=60)
    last.write([old(2000, 0)])
    last.close()
    assert len(kept(stage)) == 60

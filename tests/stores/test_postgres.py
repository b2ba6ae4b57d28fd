"""A history in PostgreSQL: the same as in a file, kept by any number of sinks, and by the contract
of sinks. A real server, started for these tests."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from tests.stores.servers import Postgres
from tests.support import SOON, environment, exit_code, forked, needs_fork, until

from bgworker import (
    ConfigurationError,
    Event,
    EventType,
    History,
    LifecycleEvent,
    LossEvent,
    PermanentSinkError,
    RetryPolicy,
    Scheduler,
    SinkError,
    SinkOptions,
    SqliteSink,
    StreamEvent,
    StreamType,
    TaskSnapshot,
    TaskStatus,
    TemporarySinkError,
    current_task,
    open_sink,
)
from bgworker.model.ids import new_id, new_run_id
from bgworker.stores import PostgresSink, tables
from bgworker.testing import MemorySink, check_sink

NOW = datetime(2026, 11, 23, 14, 46, 0, 123456, tzinfo=timezone.utc)
EAGER = SinkOptions(retry=RetryPolicy(base=0.01, cap=0.05))


@pytest.fixture
def sink(postgres: Postgres, schema: str) -> Iterator[PostgresSink]:
    made = PostgresSink(postgres.connect, schema=schema)
    yield made
    made.close()


def said(task_id: str, seq: int, text: str = "hello", **more: Any) -> StreamEvent:
    return StreamEvent(EventType.TASK_OUTPUT, task_id, seq, NOW, StreamType.OUTPUT, text, **more)


def ended(task_id: str, seq: int, status: TaskStatus = TaskStatus.COMPLETED,
          **more: Any) -> LifecycleEvent:
    type_ = {"completed": EventType.TASK_COMPLETED, "failed": EventType.TASK_FAILED,
             "running": EventType.TASK_STARTED}[status.value]
    done = None if status is TaskStatus.RUNNING else NOW
    values = {"completed_utc": done, "created_utc": NOW, **more}
    return LifecycleEvent(type_, task_id, seq, NOW, TaskSnapshot(
        task_id=task_id, name="job", status=status, run_id="r" * 32, last_seq=seq, **values))


def in_order(events: Any) -> list[Event]:
    return sorted(events, key=lambda event: ("~", 0) if isinstance(event, LossEvent)
                  else (event.task_id, event.seq))


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


def test_the_sink_keeps_every_promise_of_the_contract(postgres: Postgres, schema: str) -> None:
    def read_back(sink: Any) -> list[Event]:
        return [event for event in MemorySinkLike(sink).events]

    check_sink(lambda: PostgresSink(postgres.connect, schema=schema), read_back=read_back,
               is_idempotent=True)


class MemorySinkLike:
    """What a sink has kept, with the life-cycle events that a history does not keep: the gaps
    between the streams of a task are its life."""

    def __init__(self, sink: PostgresSink) -> None:
        self.events: list[Event] = []
        types = [EventType.TASK_CREATED, EventType.TASK_SCHEDULED, EventType.TASK_STARTED]
        seqs: Counter[str] = Counter()
        for event in in_order(sink.events()):
            if isinstance(event, LossEvent):
                continue
            while seqs[event.task_id] < event.seq - 1:
                seqs[event.task_id] += 1
                seq = seqs[event.task_id]
                if seq <= 3:
                    task = TaskSnapshot(event.task_id, "", TaskStatus.RUNNING, "", NOW)
                    self.events.append(
                        LifecycleEvent(types[seq - 1], event.task_id, seq, NOW, task))
            if event.seq > seqs[event.task_id]:
                self.events.append(event)
                seqs[event.task_id] = event.seq


def test_what_it_keeps_is_what_a_file_keeps(
        sink: PostgresSink, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_any_parts_leads_to_the_same_history_as_in_a_file(
        sink: PostgresSink, tmp_path: Path, seed: int) -> None:
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


def test_a_row_never_goes_back_and_is_there_once(postgres: Postgres, sink: PostgresSink) -> None:
    task_id = new_id(1)
    late = ended(task_id, 9, failure_message=None)
    batch = [said(task_id, 4, "a"), late]
    sink.write(batch)
    sink.write(batch)
    sink.write([ended(task_id, 3, TaskStatus.RUNNING), said(task_id, 4, "another")])
    assert list(sink.events()) == [said(task_id, 4, "a"), late]
    assert postgres.ask("SELECT status, last_seq FROM jobs.tasks") == [("completed", 9)]


def test_people_find_the_tables_and_the_view_of_a_file(
        postgres: Postgres, sink: PostgresSink) -> None:
    task_id = new_id(1)
    sink.write([said(task_id, 4, '{"a": 1}', format="json"),
                said(task_id, 5, "cut", truncated=True, original_bytes=99),
                StreamEvent(EventType.TASK_PROGRESS, task_id, 6, NOW, StreamType.PROGRESS,
                            percent=40.0, message="2 of 5"),
                ended(task_id, 7, metadata={"who": ["me"]}, duration=1.5, script_hash="h",
                      script_id="m:f", script_text="def f(): ...")])
    assert postgres.ask(
        "SELECT task_id, seq, stream_type, payload, format, truncated, created_utc, percent, "
        "original_bytes FROM jobs.task_streams ORDER BY seq") == [
        (task_id, 4, "output", '{"a": 1}', "json", False, NOW, None, None),
        (task_id, 5, "output", "cut", "text", True, NOW, None, 99),
        (task_id, 6, "progress", "2 of 5", "text", False, NOW, 40.0, None)]
    assert postgres.ask(
        "SELECT name, duration_sec, metadata_json -> 'who' ->> 0, text, completed_utc "
        "FROM jobs.tasks JOIN jobs.scripts ON hash = script_hash") == [
        ("job", 1.5, "me", "def f(): ...", NOW)]


def test_a_text_that_postgresql_cannot_hold_is_refused_alone(sink: PostgresSink) -> None:
    task_id = new_id(1)
    for poison in (said(task_id, 2, "nul \0"), said(task_id, 2, "surrogate \ud800"),
                   ended(task_id, 2, failure_message="nul \0"), said(task_id, 2**31)):
        with pytest.raises(PermanentSinkError) as caught:
            sink.write([said(task_id, 1), poison])
        assert caught.value.concerns == "event"
    assert list(sink.events()) == []
    sink.write([said(task_id, 1)])
    assert [event.seq for event in sink.events()] == [1, 0]  # and a placeholder of its task


# ---------------------------------------------------------------- runs


def test_it_tells_which_process_of_which_machine_runs_since_when_and_was_seen_when(
        postgres: Postgres, sink: PostgresSink) -> None:
    def row() -> Any:
        (found,) = postgres.ask(
            "SELECT pid, host, started_utc, ended_utc, last_seen FROM jobs.runs")
        return found

    with Scheduler(1) as pool:
        pool.register_sink(sink, name="shared")
        pool.submit(int).result(SOON)
        assert pool.flush(SOON)
        pid, host, started, end, seen = row()
        assert (pid, end) == (os.getpid(), None) and host
        assert started <= seen <= postgres.ask("SELECT clock_timestamp()")[0][0]
        pool.submit(lambda: current_task().output("still here")).result(SOON)
        assert pool.flush(SOON)
        assert row()[4] > seen
    pid, host, started, end, seen = row()
    assert end == seen


def test_a_run_that_is_only_told_of_is_never_seen(postgres: Postgres, sink: PostgresSink) -> None:
    sink.write([ended(new_id(1), 3, TaskStatus.RUNNING)])
    assert postgres.ask("SELECT run_id, host, last_seen FROM jobs.runs") == [("r" * 32, None, None)]


def test_an_unfinished_task_of_a_run_that_has_ended_is_read_as_interrupted(
        postgres: Postgres, sink: PostgresSink) -> None:
    run = new_run_id(1)
    event = ended(new_id(1), 3, TaskStatus.RUNNING)
    sink.write([replace(event, task=replace(event.task, run_id=run))])
    events: list[Any] = list(sink.events())
    sink.close()
    events += sink.events()
    assert [each.task.status for each in events] == ["running", "interrupted"]


@needs_fork
def test_a_forked_child_connects_anew_and_leaves_its_parents_connection_alone(
        postgres: Postgres, sink: PostgresSink) -> None:
    sink.write([said(new_id(1), 1)])
    before = sink._connection

    def child() -> None:
        sink.open()
        sink.write([said(new_id(2), 1)])
        sink.close()

    assert exit_code(forked(child)) == 0
    sink.write([said(new_id(3), 1)])
    assert sink._connection is before is not None
    assert postgres.ask("SELECT count(*) FROM jobs.task_streams") == [(3,)]


# ---------------------------------------------------------------- versions and rights


def test_the_first_of_many_sinks_makes_the_tables(postgres: Postgres, schema: str) -> None:
    with Scheduler(8) as pool:
        sinks = [PostgresSink(postgres.connect, schema=schema) for _ in range(8)]
        for task in [pool.submit(each.open) for each in sinks]:
            task.result(SOON)
    for each in sinks:
        each.close()
    assert postgres.ask("SELECT version FROM jobs.schema_version") == [(tables.VERSION,)]


def test_an_older_schema_is_led_to_the_newest_version_once(
        postgres: Postgres, sink: PostgresSink, monkeypatch: pytest.MonkeyPatch) -> None:
    sink.write([said(new_id(1), 1)])
    sink.close()
    step = ("ALTER TABLE {s}.runs ADD COLUMN city text", "UPDATE {s}.runs SET city = 'Ulm'")
    monkeypatch.setattr(tables, "STEPS", (*tables.STEPS, step))
    monkeypatch.setattr(tables, "VERSION", tables.VERSION + 1)
    for _ in range(2):
        sink.open()
        sink.close()
    assert postgres.ask("SELECT version FROM jobs.schema_version ORDER BY 1") == [
        (number,) for number in range(1, tables.VERSION + 1)]
    sink.write([said(new_id(2), 1)])
    assert postgres.ask("SELECT count(*) FROM jobs.task_streams") == [(2,)]


def test_a_step_that_fails_changes_nothing(
        postgres: Postgres, sink: PostgresSink, monkeypatch: pytest.MonkeyPatch) -> None:
    sink.open()
    sink.close()
    step = ("ALTER TABLE {s}.runs ADD COLUMN city text", "SELECT 1 / 0")
    monkeypatch.setattr(tables, "STEPS", (*tables.STEPS, step))
    monkeypatch.setattr(tables, "VERSION", tables.VERSION + 1)
    with pytest.raises(SinkError, match="division by zero"):
        sink.open()
    assert postgres.ask("SELECT max(version) FROM jobs.schema_version") == [(tables.VERSION - 1,)]
    assert not postgres.ask("SELECT 1 FROM information_schema.columns "
                            "WHERE table_schema = 'jobs' AND column_name = 'city'")


def test_a_newer_schema_is_refused_and_left_alone(postgres: Postgres, sink: PostgresSink) -> None:
    sink.open()
    sink.close()
    postgres.ask("INSERT INTO jobs.schema_version VALUES (99)")
    with Scheduler(1) as pool, pytest.raises(
            PermanentSinkError, match="version 99.*up to 1; upgrade bgworker, or name another"):
        pool.register_sink(sink)
    with pytest.raises(PermanentSinkError, match="version 99") as caught:
        sink.write([said(new_id(1), 1)])
    assert caught.value.concerns == "sink"
    assert postgres.ask("SELECT count(*) FROM jobs.tasks") == [(0,)]


def test_a_schema_with_tables_of_somebody_else_is_refused_and_left_alone(
        postgres: Postgres, sink: PostgresSink) -> None:
    postgres.ask("CREATE SCHEMA jobs")
    postgres.ask("CREATE TABLE jobs.runs (distance integer)")
    with pytest.raises(PermanentSinkError, match="'jobs' has a name that a history needs.*runs"):
        sink.open()
    assert postgres.ask("SELECT tablename FROM pg_tables WHERE schemaname = 'jobs'") == [("runs",)]


def test_tables_that_somebody_dropped_are_made_anew(
        postgres: Postgres, sink: PostgresSink) -> None:
    sink.write([said(new_id(1), 1)])
    postgres.ask("DROP SCHEMA jobs CASCADE")
    with pytest.raises(TemporarySinkError, match="does not exist"):
        sink.write([said(new_id(2), 1)])
    sink.write([said(new_id(2), 1)])
    assert postgres.ask("SELECT count(*) FROM jobs.task_streams") == [(1,)]


@pytest.fixture
def role(postgres: Postgres) -> Iterator[str]:
    postgres.ask("CREATE ROLE clerk LOGIN")
    yield "clerk"
    postgres.ask("DROP OWNED BY clerk")
    postgres.ask("DROP ROLE clerk")


def test_a_role_without_rights_is_told_what_to_grant_and_loses_nothing(
        postgres: Postgres, sink: PostgresSink, role: str) -> None:
    sink.open()
    poor = PostgresSink(lambda: postgres.connect(user=role), schema="jobs")
    with Scheduler(1) as pool:
        pool.register_sink(poor, name="poor", options=EAGER)
        tasks = [pool.submit(lambda: current_task().output("hello")) for _ in range(20)]
        for task in tasks:
            task.wait(SOON)
        until(lambda: "GRANT USAGE ON SCHEMA" in (pool.sinks["poor"].last_error or ""))
        for grant in ("USAGE ON SCHEMA jobs",
                      "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA jobs"):
            postgres.ask(f"GRANT {grant} TO {role}")
        assert pool.flush(SOON)
        assert (pool.sinks["poor"].delivered, pool.sinks["poor"].dropped) == (20 * 5, 0)
    assert postgres.ask("SELECT count(*) FROM jobs.task_streams") == [(20,)]


def test_a_role_that_may_not_make_the_schema_says_so(
        postgres: Postgres, schema: str, role: str) -> None:
    poor = PostgresSink(lambda: postgres.connect(user=role), schema=schema)
    with pytest.raises(TemporarySinkError, match="permission denied.*CREATE on it") as caught:
        poor.open()
    assert caught.value.hold


def test_a_reader_needs_no_right_but_to_read_and_makes_nothing(
        postgres: Postgres, sink: PostgresSink, role: str) -> None:
    reader = PostgresSink(lambda: postgres.connect(user=role), schema="jobs")
    with pytest.raises(SinkError, match="no history of this version; have a sink open it first"):
        list(reader.events())
    sink.write([said(new_id(1), 1)])
    postgres.ask(f"GRANT USAGE ON SCHEMA jobs TO {role}")
    postgres.ask(f"GRANT SELECT ON ALL TABLES IN SCHEMA jobs TO {role}")
    assert len(list(reader.events())) == 2


# ---------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("arguments, message", [
    ({"connect": "dbname=jobs"}, "connect: expected a function that returns a connection"),
    ({"schema": "a-b"}, "schema: expected a letter or underscore.*got 'a-b'"),
    ({"schema": "x" * 64}, "up to 62 letters"),
    ({"schema": 'a"; DROP TABLE'}, "schema: expected"),
    ({"max_age": 0}, "max_age: expected a number > 0 or None, got 0"),
    ({"max_tasks": -1}, "max_tasks: expected a whole number >= 0 or None, got -1"),
])
def test_an_argument_that_cannot_be_used_is_named(
        arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PostgresSink(**{"connect": lambda: None, **arguments})


def test_a_connect_that_is_wrong_is_refused_when_the_sink_is_registered() -> None:
    def connect() -> Any:
        raise TypeError("connect() got an unexpected keyword argument 'hots'")

    with Scheduler(1) as pool, pytest.raises(
            PermanentSinkError, match="connect does not connect: TypeError.*'hots'"):
        pool.register_sink(PostgresSink(connect))


def test_a_driver_that_is_missing_is_named_with_the_way_to_get_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect() -> Any:
        import no_such_driver  # type: ignore[import-not-found]

        return no_such_driver.connect()

    with pytest.raises(PermanentSinkError, match="python -m pip install no_such_driver"):
        PostgresSink(connect).open()
    (tmp_path / "eager_stores.py").write_text("import no_such_driver\ndef shared(): pass\n")
    (tmp_path / "lazy_stores.py").write_text("def shared():\n    import no_such_driver.pool\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("eager_stores", "lazy_stores"):
        with pytest.raises(SinkError, match="python -m pip install no_such_driver"):
            open_sink(f"{module}:shared")


def test_no_password_of_a_connection_string_is_shown() -> None:
    def connect() -> Any:
        raise OSError("no host in postgresql://me:hunter2@db/jobs, password='hunter2 x' "
                      "password=hunter2")

    with pytest.raises(TemporarySinkError) as caught:
        PostgresSink(connect).open()
    assert "hunter2" not in str(caught.value) and "no host in" in str(caught.value)


def test_importing_bgworker_loads_nothing_of_the_stores() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import bgworker, sys; bgworker.Scheduler(1).shutdown(); "
         "print([name for name in sys.modules if 'stores' in name])"],
        env=environment(), capture_output=True, text=True, timeout=SOON, check=True)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------- retention


def old(number: int, age: float, **more: Any) -> LifecycleEvent:
    """Return the end of a task some seconds ago."""
    then = datetime.now(timezone.utc) - timedelta(seconds=age)
    return ended(f"{number:032x}", 9, **{"completed_utc": then, "created_utc": then, **more})


def kept(postgres: Postgres) -> list[int]:
    return [int(id_, 16) for id_, in postgres.ask("SELECT id FROM jobs.tasks ORDER BY id")]


def test_what_is_older_than_max_age_goes_whole(postgres: Postgres, schema: str) -> None:
    sink = PostgresSink(postgres.connect, schema=schema, max_age=100)
    sink.write([said(f"{1:032x}", 4), old(1, 200, script_hash="a", script_id="m:a"),
                old(2, 50, script_hash="b", script_id="m:b"),
                LossEvent(EventType.EVENTS_LOST, datetime.now(timezone.utc) - timedelta(hours=1),
                          "hook", 3, "overflow", {})])
    assert kept(postgres) == [2]
    assert postgres.ask("SELECT hash FROM jobs.scripts") == [("b",)]
    assert postgres.ask("SELECT count(*) FROM jobs.zz_stream_rows") == [(0,)]
    assert postgres.ask("SELECT count(*) FROM jobs.losses") == [(0,)]
    sink.close()


def test_what_is_too_much_goes_oldest_end_first(postgres: Postgres, schema: str) -> None:
    sink = PostgresSink(postgres.connect, schema=schema, max_tasks=3)
    sink.write([old(number, 100 + number) for number in range(1, 8)])
    assert kept(postgres) == [1, 2, 3]
    sink.close()


def test_a_task_that_may_still_run_stays(postgres: Postgres, schema: str) -> None:
    running = {"status": TaskStatus.RUNNING, "completed_utc": None}
    sink = PostgresSink(postgres.connect, schema=schema, max_age=100)
    sink.write([old(1, 200, **running), old(2, 200, **running), old(3, 200, **running)])
    # one of a run that lives, one of a run that was silent for long, one of a copied run
    postgres.ask("INSERT INTO jobs.runs (run_id, host, last_seen) VALUES "
                 "('live', 'a', now()), ('dead', 'b', now() - interval '200 s')")
    for number, run in ((1, "live"), (2, "dead")):
        sink.write([old(number, 200, **running)])
        postgres.ask("UPDATE jobs.tasks SET run_id = %s WHERE id = %s", run, f"{number:032x}")
    sink._next_look = 0.0
    sink.write([old(4, 1)])
    assert kept(postgres) == [1, 4]
    sink.close()


def test_a_task_with_more_rows_than_go_at_once_goes_in_several_steps(
        postgres: Postgres, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bgworker.stores import postgres as module

    monkeypatch.setattr(module, "MOST_ROWS", 100)
    monkeypatch.setattr(module, "PRUNE_SECONDS", SOON)
    sink = PostgresSink(postgres.connect, schema=schema, max_tasks=0)
    sink.write([*(said(f"{1:032x}", seq) for seq in range(1, 1001)), old(1, 5)])
    assert kept(postgres) == []
    assert postgres.ask("SELECT count(*) FROM jobs.zz_stream_rows") == [(0,)]
    sink.close()


def test_sinks_that_prune_at_once_do_not_remove_too_much(
        postgres: Postgres, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bgworker.stores import postgres as module

    monkeypatch.setattr(module, "PRUNE_SECONDS", SOON)
    monkeypatch.setattr(module, "MOST_TASKS", 10)
    plain = PostgresSink(postgres.connect, schema=schema)
    plain.write([old(number, 1000 - number) for number in range(1000)])
    plain.close()
    sinks = [PostgresSink(postgres.connect, schema=schema, max_tasks=500) for _ in range(4)]
    with Scheduler(4) as pool:
        tasks = [pool.submit(each.write, [old(number, 0)])
                 for number, each in enumerate(sinks, 1000)]
        for task in tasks:
            task.result(SOON)
    for each in sinks:
        each.close()
    assert len(kept(postgres)) >= 500
    last = PostgresSink(postgres.connect, schema=schema, max_tasks=500)
    last.write([old(2000, 0)])
    last.close()
    assert len(kept(postgres)) == 500

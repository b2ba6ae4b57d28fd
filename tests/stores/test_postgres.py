"""What is PostgreSQL's own in a history there: tables, versions, rights. A real server, started for
these tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.stores.events import NOW, RUN, ended, said
from tests.stores.servers import Postgres
from tests.stores.stages import PostgresStage
from tests.support import SOON, environment, until

from bgworker import (
    ConfigurationError,
    EventType,
    PermanentSinkError,
    RetryPolicy,
    Scheduler,
    SinkError,
    SinkOptions,
    StreamEvent,
    StreamType,
    TaskStatus,
    TemporarySinkError,
    current_task,
    open_sink,
)
from bgworker.model.ids import new_id
from bgworker.stores import PostgresSink, tables
from bgworker.stores.postgres import MOST_RACES

EAGER = SinkOptions(retry=RetryPolicy(base=0.01, cap=0.05))


@pytest.fixture
def sink(postgres: Postgres, schema: str) -> Iterator[PostgresSink]:
    made = PostgresSink(postgres.connect, schema=schema)
    yield made
    made.close()


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


def test_writers_of_the_same_tasks_wait_for_each_other_in_one_order(
        postgres: Postgres, sink: PostgresSink) -> None:
    first, second, other = sorted(new_id(number) for number in range(3))
    for task_id in (second, first, other):
        sink.write([ended(task_id, 3, TaskStatus.RUNNING)])
    progress = [StreamEvent(EventType.TASK_PROGRESS, task_id, 4, NOW, StreamType.PROGRESS,
                            percent=40.0, message="2 of 5") for task_id in (second, first)]
    with Scheduler(1) as pool, closing(postgres.connect()) as rival:
        rival.execute("SELECT FROM jobs.tasks WHERE id = %s FOR NO KEY UPDATE", (first,))
        task = pool.submit(sink.write, [*progress, ended(other, 9)])
        until(lambda: postgres.ask("SELECT 1 FROM pg_locks WHERE NOT granted") != [])
        # it has none of what the rival would come to next
        for task_id in (second, other):
            rival.execute("SELECT FROM jobs.tasks WHERE id = %s FOR NO KEY UPDATE NOWAIT",
                          (task_id,))
        rival.execute("SET LOCAL lock_timeout = 1000")
        rival.execute("INSERT INTO jobs.zz_stream_rows (task, seq, stream, created_us, payload) "
                      "SELECT key, 4, 1, 0, '' FROM jobs.tasks")
        rival.rollback()
        task.result(SOON)
    assert postgres.ask("SELECT last_progress_pct FROM jobs.tasks ORDER BY id LIMIT 2") == [
        (40.0,), (40.0,)]


# ---------------------------------------------------------------- versions


def test_who_brings_a_newer_version_waits_for_the_batches_that_are_under_way(
        postgres: Postgres, sink: PostgresSink, monkeypatch: pytest.MonkeyPatch) -> None:
    sink.open()
    sink.close()
    monkeypatch.setattr(tables, "STEPS", tables.STEPS)
    PostgresStage.add_step()
    with Scheduler(1) as pool, closing(postgres.connect()) as rival:
        rival.execute(tables.FIND_VERSION.format(s="jobs"))  # as each batch does before all else
        task = pool.submit(sink.open)
        until(lambda: postgres.ask("SELECT 1 FROM pg_locks WHERE NOT granted") != [])
        # it has none of what the batch comes to next
        rival.execute("SET LOCAL lock_timeout = 1000")
        rival.execute("INSERT INTO jobs.tasks (id, name, status, created_utc, last_seq) "
                      "VALUES ('a', 'job', 'running', now(), 1)")
        rival.execute(tables.SEE_RUNS.format(s="jobs"), ('[{"run_id": "mine", "host": "a"}]',))
        rival.commit()
        task.result(SOON)
    assert postgres.ask("SELECT run_id, city FROM jobs.runs") == [("mine", "Ulm")]


# ---------------------------------------------------------------- other transactions


@pytest.mark.parametrize("code", ["40001", "40P01", "23503"])
def test_what_another_transaction_has_spoilt_is_done_again_at_once(
        postgres: Postgres, sink: PostgresSink, code: str) -> None:
    sink.open()
    # a sequence is not undone
    postgres.ask(f"""CREATE SEQUENCE jobs.attempts;
CREATE FUNCTION jobs.spoil() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN IF nextval('jobs.attempts') < {MOST_RACES} THEN
  RAISE EXCEPTION 'spoilt' USING ERRCODE = '{code}'; END IF;
RETURN NEW; END $$;
CREATE TRIGGER spoil BEFORE INSERT ON jobs.tasks FOR EACH ROW EXECUTE FUNCTION jobs.spoil()""")
    sink.write([ended(new_id(1), 3)])
    assert postgres.ask("SELECT last_value FROM jobs.attempts") == [(MOST_RACES,)]
    postgres.ask("ALTER SEQUENCE jobs.attempts RESTART")
    postgres.ask(f"ALTER SEQUENCE jobs.attempts MINVALUE -{MOST_RACES} START -1 RESTART")
    with pytest.raises(TemporarySinkError, match="spoilt"):
        sink.write([ended(new_id(2), 3)])


def test_two_that_bring_the_same_new_tasks_and_wait_for_each_other_both_come_through(
        postgres: Postgres, sink: PostgresSink) -> None:
    first, second = sorted(new_id(number) for number in range(2))
    sink.open()
    insert = ("INSERT INTO jobs.tasks (id, name, status, created_utc, last_seq) "
              "VALUES (%s, '', 'running', now(), 0)")
    with Scheduler(1) as pool, closing(postgres.connect()) as rival:
        rival.execute("SET deadlock_timeout = '30s'")  # the server ends the sink's transaction
        rival.execute(insert, (first,))
        # a placeholder goes in behind the tasks that are told of
        task = pool.submit(sink.write, [said(first, 1), ended(second, 3)])
        until(lambda: postgres.ask("SELECT 1 FROM pg_locks WHERE NOT granted") != [])
        rival.execute(insert, (second,))
        rival.commit()
        task.result(SOON)
    assert postgres.ask("SELECT deadlocks > 0 FROM pg_stat_database WHERE datname = 'postgres'"
                        ) == [(True,)]
    assert postgres.ask("SELECT id, last_seq FROM jobs.tasks ORDER BY 1") == [
        (first, 0), (second, 3)]


REFERRING = ("INSERT INTO jobs.tasks (id, run_id, script_hash, name, status, created_utc, last_seq)"
             " VALUES ('live', %s, 'h', 'job', 'running', now(), 1)")


def test_what_is_pruned_beside_a_batch_that_refers_to_the_same_rows_waits_for_nobody(
        postgres: Postgres, sink: PostgresSink, caplog: pytest.LogCaptureFixture) -> None:
    sink.write([ended(new_id(1), 3, script_hash="h", script_id="m:f")])
    pruner = PostgresSink(postgres.connect, schema="jobs", max_tasks=0)
    with Scheduler(1) as pool, closing(postgres.connect()) as rival:
        rival.execute(REFERRING, (RUN,))
        pool.submit(pruner.write, []).result(SOON)
        assert postgres.ask("SELECT count(*) FROM jobs.tasks") == [(0,)]
        rival.commit()
    pruner.close()
    assert postgres.ask("SELECT run_id, hash FROM jobs.runs, jobs.scripts") == [(RUN, "h")]
    assert "could not be pruned" not in caplog.text


def test_a_batch_whose_script_is_pruned_meanwhile_brings_it_again(
        postgres: Postgres, sink: PostgresSink) -> None:
    sink.write([ended(new_id(1), 3, script_hash="h", script_id="m:f")])
    postgres.ask("DELETE FROM jobs.tasks")
    with Scheduler(1) as pool, closing(postgres.connect()) as rival:
        rival.execute("DELETE FROM jobs.scripts")
        task = pool.submit(sink.write, [ended(new_id(2), 3, script_hash="h", script_id="m:f")])
        until(lambda: postgres.ask("SELECT 1 FROM pg_locks WHERE NOT granted") != [])
        rival.commit()
        task.result(SOON)
    assert postgres.ask("SELECT script_hash FROM jobs.tasks") == [("h",)]


# ---------------------------------------------------------------- tables and rights


def test_a_schema_with_tables_of_somebody_else_is_refused_and_left_alone(
        postgres: Postgres, sink: PostgresSink) -> None:
    postgres.ask("CREATE SCHEMA jobs")
    postgres.ask("CREATE TABLE jobs.runs (distance integer)")
    with pytest.raises(PermanentSinkError, match="none of bgworker's.*runs.*name another sch"):
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


def test_a_history_whose_version_is_taken_away_is_one_that_we_do_not_know(
        postgres: Postgres, sink: PostgresSink) -> None:
    sink.write([said(new_id(1), 1)])
    postgres.ask("DELETE FROM jobs.schema_version")
    with pytest.raises(TemporarySinkError, match="taken its version out of schema_version"):
        sink.write([said(new_id(2), 1)])
    with pytest.raises(PermanentSinkError, match="schema_version.*name another schema") as caught:
        sink.write([said(new_id(2), 1)])
    assert caught.value.concerns == "sink"
    with pytest.raises(SinkError, match="no history of this version"):
        list(sink.events())
    postgres.ask("INSERT INTO jobs.schema_version VALUES (1)")
    sink.write([said(new_id(2), 1)])
    assert postgres.ask("SELECT count(*) FROM jobs.task_streams") == [(2,)]


def test_a_version_that_is_no_number_is_none_of_ours(
        postgres: Postgres, sink: PostgresSink) -> None:
    postgres.ask("CREATE SCHEMA jobs")
    postgres.ask("CREATE TABLE jobs.schema_version AS SELECT text '3.1' AS version")
    with pytest.raises(PermanentSinkError, match="'3.1'.*name another schema") as caught:
        sink.open()
    assert caught.value.concerns == "sink"


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


@pytest.mark.parametrize("module, package", [
    ("psycopg", '"psycopg[binary]"'), (None, '"psycopg[binary]"'),
    ("psycopg2", "psycopg2-binary"), ("psycopg2._psycopg", "psycopg2-binary")])
def test_a_driver_is_installed_with_the_library_that_it_needs(
        module: str | None, package: str) -> None:
    def connect() -> Any:
        raise ImportError("no driver", name=module)

    with pytest.raises(PermanentSinkError) as caught:
        PostgresSink(connect).open()
    assert str(caught.value).endswith(f"python -m pip install {package}")


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

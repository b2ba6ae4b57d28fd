"""PostgreSQL shut down, full or stubborn: nothing that was acknowledged is lost, the account is
exact, and what it refuses is named."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.stores.load import EAGER, Load
from tests.stores.servers import Postgres
from tests.stores.stages import PostgresStage
from tests.support import SOON, until


@pytest.fixture
def stage(on_postgres: PostgresStage) -> PostgresStage:
    return on_postgres


def test_a_server_that_shuts_down_orderly_and_comes_back_has_each_line_once(
        postgres: Postgres, load: Load) -> None:
    load.goes_on()
    assert postgres.process is not None
    postgres.process.send_signal(signal.SIGINT)  # "fast": ends all connections
    postgres.process.wait(SOON)
    postgres.start()
    load.goes_on()
    load.check()


TRIGGER = """CREATE FUNCTION jobs.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN IF NEW.payload LIKE '%{like}' THEN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END IF;
RETURN NEW; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON jobs.zz_stream_rows
FOR EACH ROW EXECUTE FUNCTION jobs.refuse()"""


def test_a_line_that_the_database_refuses_costs_no_other_line(
        postgres: Postgres, load: Load) -> None:
    load.goes_on()
    postgres.ask(TRIGGER.format(like=" 777", code="23514"))
    until(lambda: load.health.dropped == 2)
    assert load.health.dropped_by_reason == {"refused": 2}
    load.goes_on()
    load.check(lost=2)
    assert postgres.ask("SELECT count(*) FROM jobs.task_streams WHERE payload = 'line 777'") == [
        (0,)]
    assert postgres.ask("SELECT sum(count) FROM jobs.losses") == [(2,)]


def test_a_full_disk_is_waited_for_and_named(postgres: Postgres, load: Load) -> None:
    load.goes_on()
    postgres.ask(TRIGGER.format(like="", code="53100"))
    load.fails(EAGER.attempts + 1, "make room on the server's disk")
    postgres.ask("DROP TRIGGER refuse ON jobs.zz_stream_rows")
    load.check()


def test_a_table_that_is_gone_is_waited_for_and_named(postgres: Postgres, load: Load) -> None:
    load.goes_on()
    postgres.ask("ALTER TABLE jobs.tasks RENAME TO elsewhere")
    load.fails(EAGER.attempts + 1, "jobs.tasks\" does not exist")
    load.fails(1, "somebody has changed the tables; put them back")
    postgres.ask("ALTER TABLE jobs.elsewhere RENAME TO tasks")
    load.goes_on()
    load.check()


@contextmanager
def small_disk(postgres: Postgres) -> Iterator[str]:
    """Mount a file system of 6 MiB that the server may write to, if this machine lets us."""
    folder = tempfile.mkdtemp(prefix="bgworker-disk-")
    try:
        if not shutil.which("mount") or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True,
                timeout=SOON).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        try:
            if postgres.user is not None:
                shutil.chown(folder, postgres.user, postgres.user)
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True, timeout=SOON)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
def test_a_disk_that_is_full_in_earnest_is_waited_for(postgres: Postgres, load: Load) -> None:
    load.goes_on()
    with small_disk(postgres) as folder:
        postgres.ask(f"CREATE TABLESPACE small LOCATION '{folder}'")
        try:
            postgres.ask("ALTER TABLE jobs.zz_stream_rows SET TABLESPACE small")
            postgres.ask("CREATE TABLE jobs.ballast (text text) TABLESPACE small")
            with pytest.raises(Exception, match="No space left"):
                postgres.ask("INSERT INTO jobs.ballast SELECT repeat('x', 1000) "
                             "FROM generate_series(1, 9000)")
            load.fails(1, "No space left")
            postgres.ask("DROP TABLE jobs.ballast")
            postgres.ask("CHECKPOINT")  # until then the server keeps its first segment
            postgres.ask("ALTER TABLE jobs.zz_stream_rows SET TABLESPACE pg_default")
            load.goes_on()
            load.check()
        finally:
            postgres.ask("ALTER TABLE IF EXISTS jobs.zz_stream_rows SET TABLESPACE pg_default")
            postgres.ask("DROP TABLE IF EXISTS jobs.ballast")
            postgres.ask("DROP TABLESPACE small")

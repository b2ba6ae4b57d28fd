"""PostgreSQL killed, cut off, full, slow or stubborn: nothing that was acknowledged is lost,
nothing is there twice, the account is exact, and no task waits."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.stores.servers import Postgres, Proxy, random_budget
from tests.support import SOON, balanced, environment, until

from bgworker import RetryPolicy, Scheduler, SinkOptions, current_task
from bgworker.stores import PostgresSink

EAGER = RetryPolicy(base=0.01, cap=0.05)


class Load:
    """Tasks that say numbered lines until they are stopped, to a sink in small batches."""

    def __init__(self, sink: PostgresSink) -> None:
        self.pool = Scheduler(2, close_timeout=SOON)
        self.pool.register_sink(sink, name="shared", options=SinkOptions(
            batch_size=200, queue_size=2_000_000, queue_bytes=2**31, retry=EAGER))
        self.stop = threading.Event()
        self.said: list[int] = []
        self.tasks = [self.pool.submit(self.talk) for _ in range(2)]

    def talk(self) -> None:
        number = 0
        while not self.stop.is_set():
            for _ in range(20):
                current_task().output(f"line {number}")
                number += 1
            time.sleep(0.01)
        self.said.append(number)

    @property
    def delivered(self) -> int:
        return self.pool.sinks["shared"].delivered

    def goes_on(self, events: int = 200) -> None:
        """Wait until the sink has taken so many more."""
        goal = self.delivered + events
        until(lambda: self.delivered >= goal)

    def check(self, postgres: Postgres, *, lost: int = 0) -> None:
        """End the tasks; see that each line is there once, and the account is exact."""
        self.stop.set()
        for task in self.tasks:
            task.result(SOON)
        assert self.pool.flush(SOON).done, self.pool.sinks["shared"]
        self.pool.shutdown()
        health = self.pool.sinks["shared"]
        assert balanced(health)
        assert (health.dropped, health.pending) == (lost, 0)
        assert health.delivered == sum(self.said) + 2 * 4 - lost
        found = postgres.ask("SELECT count(*), count(DISTINCT payload) FROM jobs.task_streams "
                             "GROUP BY task_id ORDER BY 1")
        if lost:
            assert sum(rows for rows, _ in found) == sum(self.said) - lost
        else:
            assert found == sorted((number, number) for number in self.said)
        assert postgres.ask("SELECT status, last_seq FROM jobs.tasks ORDER BY 2") == [
            ("completed", number + 4) for number in sorted(self.said)]


@pytest.fixture
def load(postgres: Postgres, schema: str, network: Proxy) -> Iterator[Load]:
    """Load over a network that can be broken."""
    made = Load(PostgresSink(lambda: postgres.connect(port=network.port), schema=schema))
    yield made
    made.stop.set()
    made.pool.shutdown()


# ---------------------------------------------------------------- the server dies


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_under_load_has_each_line_once(
        postgres: Postgres, load: Load) -> None:
    for _ in range(20):
        load.goes_on()
        postgres.kill()
        postgres.start()
    load.goes_on()
    assert load.pool.sinks["shared"].retries >= 20
    load.check(postgres)


def test_a_server_that_is_away_for_longer_than_all_attempts_costs_nothing(
        postgres: Postgres, load: Load) -> None:
    load.goes_on()
    postgres.kill()
    retries = load.pool.sinks["shared"].retries
    # twice as many as after which a batch is given up otherwise
    until(lambda: load.pool.sinks["shared"].retries > retries + 2 * EAGER.attempts)
    postgres.start()
    load.check(postgres)


def test_tasks_do_not_wait_for_a_server_that_stands_still(
        postgres: Postgres, load: Load) -> None:
    load.goes_on()
    postgres.signal(signal.SIGSTOP)
    try:
        time.sleep(0.1)
        before = load.delivered
        load.stop.set()
        for task in load.tasks:
            task.result(SOON)
        # one more, from its beginning to its end
        load.pool.submit(int).result(SOON)
        assert load.delivered <= before + 200
        assert load.pool.sinks["shared"].pending > 0
    finally:
        postgres.signal(signal.SIGCONT)
    assert load.pool.flush(SOON)
    assert load.pool.sinks["shared"].dropped == 0


def test_a_server_that_shuts_down_orderly_and_comes_back_has_each_line_once(
        postgres: Postgres, load: Load) -> None:
    load.goes_on()
    assert postgres.process is not None
    postgres.process.send_signal(signal.SIGINT)  # "fast": ends all connections
    postgres.process.wait(SOON)
    postgres.start()
    load.goes_on()
    load.check(postgres)


def test_the_harness_notices_a_line_that_is_lost_and_one_that_is_there_twice(
        postgres: Postgres, load: Load) -> None:
    load.goes_on()
    load.stop.set()
    for task in load.tasks:
        task.result(SOON)
    assert load.pool.flush(SOON)
    postgres.ask("UPDATE jobs.zz_stream_rows SET payload = 'line 0' WHERE payload = 'line 1'")
    with pytest.raises(AssertionError, match=r"assert \[\(\d+, \d+\), \(\d+, \d+\)\] =="):
        load.check(postgres)


# ---------------------------------------------------------------- many processes

WRITER = """
import psycopg, sys
from bgworker import LifecycleEvent, Scheduler, current_task
from bgworker.model import wire
from bgworker.stores import PostgresSink

port, shared = sys.argv[1:]

def talk(number):
    for line in range(500):
        current_task().output(f"line {line}")

sink = PostgresSink(lambda: psycopg.connect(f"host=127.0.0.1 port={port} user=me dbname=postgres"),
                    schema="jobs")
with Scheduler(4, sinks=[sink]) as pool:
    for task in [pool.submit(talk, number) for number in range(20)]:
        task.result(60)
    assert pool.flush(60)
    assert pool.sinks["postgres"].dropped == 0
with open(shared, encoding="utf-8") as file:
    events = [wire.decode(line) for line in file]
sink.open()
for start in range(0, len(events), 50):
    sink.write(events[start:start + 50])
sink.close()
"""
"""Has tasks of its own, and replays a file that the others replay at the same time."""


def test_processes_that_write_at_once_keep_all_of_theirs_and_share_what_they_both_bring(
        postgres: Postgres, schema: str, tmp_path: Path) -> None:
    shared = tmp_path / "shared.jsonl"
    with Scheduler(2, sinks=[f"jsonl:{shared}"]) as pool:
        tasks = [pool.submit(lambda: [current_task().output(f"line {line}") for line in range(100)])
                 for _ in range(10)]
        for task in tasks:
            task.result(SOON)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(postgres.port), str(shared)],
                                env=environment(), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True) for _ in range(3)]
    for writer in writers:
        said, _ = writer.communicate(timeout=2 * SOON)
        assert writer.returncode == 0, said
    assert postgres.ask("SELECT count(*), count(DISTINCT (task_id, payload)) "
                        "FROM jobs.task_streams") == [(3 * 20 * 500 + 10 * 100,) * 2]
    assert postgres.ask("SELECT status, last_seq, count(*) FROM jobs.tasks GROUP BY 1, 2 "
                        "ORDER BY 2") == [("completed", 104, 10), ("completed", 504, 60)]
    runs = postgres.ask("SELECT pid, count(*) FROM jobs.runs JOIN jobs.tasks USING (run_id) "
                        "WHERE ended_utc = last_seen GROUP BY pid")
    assert sorted(runs) == sorted((writer.pid, 20) for writer in writers)


# ---------------------------------------------------------------- the network breaks


@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_cuts_connections_in_mid_batch_costs_and_doubles_nothing(
        postgres: Postgres, load: Load, network: Proxy, seed: int) -> None:
    load.goes_on()
    network.budget = random_budget(seed, 60_000)
    network.close_connections()
    until(lambda: network.cuts >= 15)
    network.budget = lambda: float("inf")
    load.goes_on()
    load.check(postgres)


def test_a_commit_of_which_nobody_hears_is_not_repeated(
        postgres: Postgres, load: Load, network: Proxy) -> None:
    for _ in range(10):
        load.goes_on()
        cuts = network.cuts
        network.swallow = b"COMMIT"
        until(lambda: network.cuts > cuts)
    load.check(postgres)


def test_a_slow_network_that_refuses_connections_now_and_then_costs_nothing(
        postgres: Postgres, load: Load, network: Proxy) -> None:
    draw = random.Random(1)
    network.delay = lambda: draw.random() / 20
    for _ in range(5):
        load.goes_on()
        network.refuses = True
        network.close_connections()
        cuts = network.cuts
        until(lambda: network.cuts > cuts + 3)
        network.refuses = False
    network.delay = lambda: 0.0
    load.check(postgres)


# ---------------------------------------------------------------- the server refuses

TRIGGER = """CREATE FUNCTION jobs.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN IF NEW.payload LIKE '%{like}' THEN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END IF;
RETURN NEW; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON jobs.zz_stream_rows
FOR EACH ROW EXECUTE FUNCTION jobs.refuse()"""


def test_a_line_that_the_database_refuses_costs_no_other_line(
        postgres: Postgres, load: Load) -> None:
    load.goes_on()
    postgres.ask(TRIGGER.format(like=" 777", code="23514"))
    until(lambda: load.pool.sinks["shared"].dropped == 2)
    assert load.pool.sinks["shared"].dropped_by_reason == {"refused": 2}
    load.goes_on()
    load.check(postgres, lost=2)
    assert postgres.ask("SELECT count(*) FROM jobs.task_streams WHERE payload = 'line 777'") == [
        (0,)]
    assert postgres.ask("SELECT sum(count) FROM jobs.losses") == [(2,)]


def test_a_full_disk_is_waited_for_and_named(postgres: Postgres, load: Load) -> None:
    load.goes_on()
    postgres.ask(TRIGGER.format(like="", code="53100"))
    until(lambda: "make room on the server's disk" in (
        load.pool.sinks["shared"].last_error or ""))
    retries = load.pool.sinks["shared"].retries
    until(lambda: load.pool.sinks["shared"].retries > retries + EAGER.attempts)
    postgres.ask("DROP TRIGGER refuse ON jobs.zz_stream_rows")
    load.check(postgres)


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
            until(lambda: "No space left" in (load.pool.sinks["shared"].last_error or ""))
            postgres.ask("DROP TABLE jobs.ballast")
            postgres.ask("CHECKPOINT")  # until then the server keeps its first segment
            postgres.ask("ALTER TABLE jobs.zz_stream_rows SET TABLESPACE pg_default")
            load.goes_on()
            load.check(postgres)
        finally:
            postgres.ask("ALTER TABLE IF EXISTS jobs.zz_stream_rows SET TABLESPACE pg_default")
            postgres.ask("DROP TABLE IF EXISTS jobs.ballast")
            postgres.ask("DROP TABLESPACE small")

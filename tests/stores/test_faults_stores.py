"""A server killed, cut off, slow or standing still: nothing that was acknowledged is lost, nothing
is there twice, the account is exact, and no task waits."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.stores.load import EAGER, Load
from tests.stores.servers import Proxy, random_budget
from tests.stores.stages import PostgresStage, Stage, on_every_server
from tests.support import SOON, environment, until

from bgworker import Scheduler, current_task

# ---------------------------------------------------------------- the server


@on_every_server
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_server_that_is_killed_and_restarted_under_load_has_each_line_once(
        stage: Stage, load: Load, times: int) -> None:
    for _ in range(times):
        load.goes_on()
        stage.server.kill()
        stage.server.start()
    load.goes_on()
    assert load.health.retries >= times // 4  # a driver may reconnect between two batches
    load.check()


def test_a_server_that_is_away_for_longer_than_all_attempts_costs_nothing(
        stage: Stage, load: Load) -> None:
    load.goes_on()
    stage.server.kill()
    # more than after which a batch is given up otherwise
    load.fails(EAGER.attempts + 2)
    stage.server.start()
    load.check()


def test_tasks_do_not_wait_for_a_server_that_stands_still(stage: Stage, load: Load) -> None:
    load.goes_on()
    stage.server.signal(signal.SIGSTOP)
    try:
        time.sleep(0.1)
        before = load.health.delivered
        load.stop.set()
        for task in load.tasks:
            task.result(SOON)
        # one more, from its beginning to its end
        load.pool.submit(int).result(SOON)
        assert load.health.delivered <= before + 200
        assert load.health.pending > 0
    finally:
        stage.server.signal(signal.SIGCONT)
    assert load.pool.flush(SOON)
    assert load.health.dropped == 0


def test_the_harness_notices_a_line_that_is_lost_and_one_that_is_there_twice(
        stage: Stage, load: Load) -> None:
    load.goes_on()
    load.finish()
    stage.double_a_line()
    with pytest.raises(AssertionError, match=r"\[\(\d+, \d+\), \(\d+, \d+\)\]"):
        load.check()


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("seed", range(2))
def test_a_network_that_cuts_connections_in_mid_batch_costs_and_doubles_nothing(
        load: Load, network: Proxy, seed: int) -> None:
    load.goes_on()
    network.budget = random_budget(seed, 30_000)
    network.close_connections()
    until(lambda: network.cuts >= 12)
    network.budget = lambda: float("inf")
    load.goes_on()
    load.check()


@on_every_server
def test_a_batch_of_which_nobody_hears_that_it_was_stored_is_there_once(
        stage: Stage, load: Load, network: Proxy) -> None:
    for _ in range(5):
        load.goes_on()
        cuts = network.cuts
        network.swallow = b"COMMIT" if isinstance(stage, PostgresStage) else b"insert\0"
        until(lambda: network.cuts > cuts)
    load.check()


def test_a_slow_network_that_refuses_connections_now_and_then_costs_nothing(
        load: Load, network: Proxy) -> None:
    draw = random.Random(1)
    network.delay = lambda: draw.random() / 20
    for _ in range(4):
        load.goes_on()
        network.refuses = True
        network.close_connections()
        cuts = network.cuts
        until(lambda: network.cuts > cuts + 3)
        network.refuses = False
    network.delay = lambda: 0.0
    load.check()


# ---------------------------------------------------------------- many processes

WRITER = """
import sys
from bgworker import LifecycleEvent, Scheduler, current_task
from bgworker.model import wire
from tests.stores.stages import store

kind, port, name, shared = sys.argv[1:]

def talk(number):
    for line in range(100):
        current_task().output(f"line {line}")

sink = store(kind, int(port), name)
with Scheduler(4) as pool:
    pool.register_sink(sink, name="shared")
    for task in [pool.submit(talk, number) for number in range(20)]:
        task.result(60)
    assert pool.flush(60)
    assert pool.sinks["shared"].dropped == 0
with open(shared, encoding="utf-8") as file:
    events = [wire.decode(line) for line in file]
sink.open()
for start in range(0, len(events), 50):
    sink.write(events[start:start + 50])
sink.close()
"""
"""Has tasks of its own, and replays a file that the others replay at the same time."""


def test_processes_that_write_at_once_keep_all_of_theirs_and_share_what_they_both_bring(
        stage: Stage, tmp_path: Path) -> None:
    shared = tmp_path / "shared.jsonl"
    with Scheduler(2, sinks=[f"jsonl:{shared}"]) as pool:
        tasks = [pool.submit(lambda: [current_task().output(f"line {line}") for line in range(40)])
                 for _ in range(10)]
        for task in tasks:
            task.result(SOON)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, type(stage).__name__,
                                 str(stage.server.port), stage.name, str(shared)],
                                env=environment(), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True) for _ in range(3)]
    for writer in writers:
        said, _ = writer.communicate(timeout=2 * SOON)
        assert writer.returncode == 0, said
    assert stage.lines() == [(40, 40)] * 10 + [(100, 100)] * 60
    ends = [(status, last_seq) for _, status, last_seq in stage.tasks()]
    assert sorted(ends) == [("completed", 44)] * 10 + [("completed", 104)] * 60
    found = [(pid, end is not None, seen is not None) for _, pid, end, seen in stage.runs() if pid]
    assert sorted(found) == sorted((writer.pid, True, True) for writer in writers)

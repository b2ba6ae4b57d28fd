"""Tasks that go on and on, whatever happens to the server that their history is on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from tests.stores.servers import Proxy
from tests.stores.stages import Stage
from tests.support import SOON, balanced, until

from bgworker import RetryPolicy, Scheduler, SinkHealth, SinkOptions, current_task

EAGER = RetryPolicy(base=0.01, cap=0.05)


class Load:
    """Two tasks that say numbered lines until they are stopped, to a sink in small batches, over a
    network that can be broken."""

    def __init__(self, stage: Stage, network: Proxy, park: Path | None = None) -> None:
        self.stage = stage
        self.pool = Scheduler(2, close_timeout=SOON)
        self.pool.register_sink(stage.sink(port=network.port), name="shared", options=SinkOptions(
            batch_size=200, queue_size=2_000_000, queue_bytes=2**31, retry=EAGER,
            park=park))
        self.stop = threading.Event()
        self.said: list[int] = []
        self.tasks = [self.pool.submit(self.talk) for _ in range(2)]

    def talk(self) -> None:
        number = 0
        while not self.stop.is_set():
            for _ in range(self.stage.pace):
                current_task().output(f"line {number}")
                number += 1
            time.sleep(0.01)
        self.said.append(number)

    @property
    def health(self) -> SinkHealth:
        return self.pool.sinks["shared"]

    def goes_on(self, events: int = 100) -> None:
        """Wait until the sink has taken so many more."""
        goal = self.health.delivered + events
        until(lambda: self.health.delivered >= goal)

    def fails(self, times: int, text: str = "") -> None:
        """Wait until the sink has failed so many times more, and says so."""
        goal = self.health.retries + times
        until(lambda: self.health.retries >= goal and text in (self.health.last_error or ""))

    def finish(self, *, is_delivered: bool = True) -> None:
        """End the tasks, and wait until the sink has all that they said, or the pool has ended."""
        self.stop.set()
        for task in self.tasks:
            task.result(SOON)
        if is_delivered:
            assert self.pool.flush(SOON).done, self.health
        else:
            self.pool.shutdown()

    def check(self, *, lost: int = 0) -> None:
        """End the tasks; see that each line is there once, and the account is exact."""
        self.finish()
        self.pool.shutdown()
        assert balanced(self.health)
        assert (self.health.dropped, self.health.pending) == (lost, 0)
        assert self.health.delivered == sum(self.said) + 2 * 4 - lost
        found = self.stage.lines()
        if lost:
            assert sum(rows for rows, _ in found) == sum(self.said) - lost
        else:
            assert found == sorted((number, number) for number in self.said), found
        ends = [(status, last_seq) for _, status, last_seq in self.stage.tasks()]
        assert sorted(ends) == [("completed", number + 4) for number in sorted(self.said)]

"""The scheduler's side of a channel in the tests of this room: what it is told, and orders."""

from __future__ import annotations

import itertools
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bgworker.model.records import OUTPUT
from bgworker.remote.hub import Hub, Peer
from bgworker.remote.link import Link, connect
from bgworker.remote.messages import Order, Report, dumps, encode_order

_numbers = itertools.count(1)


class Receiver:
    """Keeps what a hub is told, each record once, by attempt and number."""

    def __init__(self) -> None:
        self.records: dict[str, dict[int, Any]] = {}
        """By attempt, and by number in it."""
        self.came: Counter[tuple[str, int]] = Counter()
        """How often each came over the channel."""
        self.lost: dict[str, dict[tuple[int, str], int]] = {}
        self.late: list[tuple[str, str]] = []
        self.left: list[str] = []
        self.before: Callable[[Peer], object] = lambda peer: None
        """Called before anything is taken."""
        self.at_once: Counter[str] = Counter()
        self.most_at_once = 0
        self.batches = 0

    def said(self, peer: Peer, task_id: str, attempt: str, first: int, records: Any) -> None:
        self.batches += 1
        self.at_once[peer.worker] += 1
        self.most_at_once = max(self.most_at_once, self.at_once[peer.worker])
        try:
            self.before(peer)
            for number in range(first, first + len(records)):
                self.came[attempt, number] += 1
            self.take(attempt, first, records)
        finally:
            self.at_once[peer.worker] -= 1

    def take(self, attempt: str, first: int, records: Any) -> None:
        kept = self.records.setdefault(attempt, {})
        for number, record in enumerate(records, first):
            assert kept.setdefault(number, record) == record, "a number stands for two records"

    def losses(self, worker: str, totals: dict[tuple[int, str], int]) -> None:
        self.lost[worker] = totals

    def overdue(self, peer: Peer, task_id: str, attempt: str, stack: str) -> None:
        self.late.append((task_id, stack))

    def gone(self, peer: Peer) -> None:
        self.left.append(peer.worker)

    def whole(self, report: Report) -> list[Any]:
        """Return all records of the attempt that a report is of; fail if one is missing."""
        self.take(report.attempt, report.first, report.records)
        kept = self.records.get(report.attempt, {})
        assert sorted(kept) == list(range(1, len(kept) + 1)), "a record is missing"
        return [kept[number] for number in sorted(kept)]

    def outputs(self, report: Report) -> list[str]:
        """Return what the attempt has put out."""
        return [data for kind, _, data in self.whole(report) if kind == OUTPUT]


@contextmanager
def hub(channel: str | None = None) -> Iterator[tuple[Hub, Receiver]]:
    """Give a hub that is started, and who it tells; close it at the end."""
    receiver = Receiver()
    made = Hub("test", channel, receiver)
    made.start()
    try:
        yield made, receiver
    finally:
        made.close()


def order(
    function: Callable[..., object], *args: object, ticket: Any = None, **other: Any
) -> Order:
    """Return an order with an id of its own."""
    settings: dict[str, Any] = dict(
        task_id=f"task{next(_numbers)}", name="a task", run_id="run", timeout=None,
        captures_output=False, records_result=False, limits=(65536, "truncate", 0.1, 1.0),
        metadata_json="", ticket=ticket, payload=b"")
    settings.update(other)
    settings["payload"] = settings["payload"] or dumps((function, args, {}))
    return Order(**settings)


def ordered(
    function: Callable[..., object], *args: object, ticket: Any = None, **other: Any
) -> bytes:
    """Return an order as an engine gets it."""
    return encode_order(order(function, *args, ticket=ticket, **other))


def introduced(made: Any, worker: str = "w", pid: int = 1) -> Link:
    """Return a link of a worker that has introduced itself to a hub."""
    address, key, _ = made.ticket
    link = connect(address, 10.0)
    link.prove(key, accepts=False)
    link.send(("hello", worker, pid, socket.gethostname()))
    link.trust()
    return link

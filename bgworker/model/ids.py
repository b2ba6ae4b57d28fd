"""Ids: 32 hex digits that sort by creation time, unique across processes and machines.

Laid out as a UUID of version 7: 48 bits of milliseconds, 12 bits that grow within the millisecond
(in units of 256 ns), then here random bits of the process, and at the end a counter, which orders
the ids that a process makes in the same unit. The counter begins at random, so that the last
`SHORT` digits alone name a task in all but the largest histories.
Source: RFC 9562, sections 5.7 and 6.2.
"""

from __future__ import annotations

import os
from itertools import count

from .forks import in_child

SHORT = 8
"""Digits at the end of an id that people are shown."""

MOST = 0xFFFFFFFF
"""The greatest number that an id has room for; those beyond begin anew."""

_own_runs: set[str] = set()


@in_child
def _reseed() -> None:
    """Begin at random. A forked child continues neither its parent's ids nor its numbers, and its
    parent's runs are not its own."""
    global _random, next_number
    _random = "%08x" % (0x80000000 | int.from_bytes(os.urandom(4), "big") >> 2)
    next_number = count(int.from_bytes(os.urandom(4), "big")).__next__
    _own_runs.clear()


_random = ""
next_number = count().__next__
"""Return the next number for an id: one atomic step, safe from any thread. Another one after a
fork."""
_reseed()

# Most ids of a burst share the millisecond, and 4,096 in a row the head of the counter: both are
# kept as text, what is left is looked up, and an id costs half of what formatting it does. Each
# pair is replaced as a whole: no thread sees half.
_millisecond: tuple[int | None, str] = (None, "")
_head: tuple[int | None, str] = (None, "")
_HEX = tuple(["%03x" % number for number in range(4096)])


def new_id(ns: int) -> str:
    """Return a new id for the wall-clock time ``ns``, in nanoseconds since the epoch."""
    return id_of(ns, next_number(), _random)


def number_in(id_: str) -> int:
    """Return the number that an id was made with, but for what is beyond its 32 bits.

    Raises:
        ValueError: it is no id.
    """
    return int(id_[24:32], 16)


def process_in(id_: str) -> str:
    """Return the digits that an id has in common with all others of its process."""
    return id_[16:24]


def short(id_: str) -> str:
    """Return what people are shown of an id."""
    return id_[-SHORT:]


def id_of(ns: int, number: int, process: str) -> str:
    """Return the id for a time, a `next_number`, and what `process_in` returns."""
    global _millisecond, _head
    ms, rest = divmod(ns, 1_000_000)
    moment = _millisecond
    if moment[0] != ms:
        # a clock before 1970 is wrong, and an id has no sign
        moment = _millisecond = ms, "%012x7" % max(ms, 0)
    head = _head
    if head[0] != number >> 12:
        head = _head = number >> 12, "%05x" % (number >> 12 & 0xFFFFF)
    return f"{moment[1]}{_HEX[rest >> 8]}{process}{head[1]}{_HEX[number & 0xFFF]}"


def new_run_id(ns: int) -> str:
    """Return a new id for a run of this process: a Scheduler's life in it."""
    run_id = new_id(ns)
    _own_runs.add(run_id)
    return run_id


def is_own_run(run_id: str) -> bool:
    """True for a run of this very process; False for one that is only told of, such as a replayed
    one. Any thread."""
    return run_id in _own_runs

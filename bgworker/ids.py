"""Ids: 32 hex digits that sort by creation time, unique across processes and machines.

Laid out as a UUID of version 7: 48 bits of milliseconds, 12 bits that grow within the millisecond (in units of 256 ns),
then here a counter, which orders ids of the same unit, and random bits of the process.
Source: RFC 9562, sections 5.7 and 6.2.
"""

from __future__ import annotations

import os
from itertools import count

_random = os.urandom(4).hex()
_next = count(int.from_bytes(os.urandom(3), "big")).__next__  # one atomic step, safe from any thread


def _reseed() -> None:
    """A forked child must not continue its parent's ids."""
    global _random
    _random = os.urandom(4).hex()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reseed)


_millisecond = (-1, "")  # the latest one, and as text: most ids of a burst share it. Replaced as a whole: no thread sees half


def new_id(ns: int) -> str:
    """Return a new id for the wall-clock time ``ns``, in nanoseconds since the epoch."""
    global _millisecond
    ms, rest = divmod(ns, 1_000_000)
    known = _millisecond
    if known[0] != ms:
        known = _millisecond = ms, "%012x" % ms
    # one conversion to hex for version, time, variant and counter: each costs a third of the whole
    return "%s%x%s" % (known[1], 0x7000_8000_0000 | rest >> 8 << 32 | _next() & 0x3FFF_FFFF, _random)

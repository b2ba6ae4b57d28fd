"""Ids: 32 hex digits that sort by creation time, unique across processes and machines.

Laid out as a UUID of version 7: 48 bits of milliseconds, 12 bits of the fraction of that millisecond, then here a counter,
which orders ids of the same quarter of a microsecond, and random bits of the process.
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


def new_id(ns: int) -> str:
    """Return a new id for the wall-clock time ``ns``, in nanoseconds since the epoch."""
    ms, rest = divmod(ns, 1_000_000)
    return f"{ms << 16 | 0x7000 | (rest << 12) // 1_000_000:016x}{0x80000000 | _next() & 0x3FFFFFFF:08x}{_random}"

"""Which runs live: the processes that record them hold a byte each of the lock file, which the
kernel frees when they die.

A task that has not ended though its run is over was interrupted. Readers judge so whenever they are
asked; the next writer records it (`settle`), so that SQL says the same.
"""

from __future__ import annotations

import json
import re
import sys
from functools import lru_cache

from ..model.ids import is_own_run
from .schema import this_host, transaction
from .statements import DELETE_REQUESTS, GIVEN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from .connections import Database
    from .presencelock import PresenceLock

MOST_RUNS = 1_000
"""Runs that are judged: the newest of those whose end is not recorded."""

OPEN_RUNS = f"""SELECT run_id FROM runs
WHERE ended_utc IS NULL AND host IS NOT NULL AND run_id < x''
ORDER BY run_id DESC LIMIT {MOST_RUNS}"""

_OPEN_TASKS = "status IN ('created', 'scheduled', 'running')"
_END_RUNS = f"""UPDATE runs SET ended_utc = coalesce(
  (SELECT max(coalesce(completed_utc, started_utc, created_utc)) FROM tasks
   WHERE tasks.run_id = runs.run_id), started_utc, '')
WHERE ended_utc IS NULL AND run_id {GIVEN}"""
_ENDED_RUNS = f"""SELECT run_id FROM runs WHERE ended_utc IS NOT NULL AND run_id < x''
AND run_id IN (SELECT run_id FROM tasks WHERE {_OPEN_TASKS}) LIMIT {MOST_RUNS}"""
_INTERRUPT = f"""UPDATE tasks SET status = 'interrupted' WHERE {_OPEN_TASKS}
AND run_id IN (SELECT run_id FROM runs WHERE ended_utc IS NOT NULL AND run_id {GIVEN})"""


def byte_of(run_id: object) -> int | None:
    """Return the byte of the lock file that a process holds as long as it records a run.

    None if ``run_id`` is no run id. Each machine has another byte for it, since one machine may not
    see the locks of another. The name of a machine may change with its network, so its id counts.
    """
    if not isinstance(run_id, str) or not re.fullmatch("[0-9a-f]{32}", run_id):
        return None  # a file may hold anything
    # ext4 seeks no further than 2**44, others less; a prime, so that every digit counts
    return 1 + (int(run_id, 16) + _machine()) % _PLACES


_PLACES = 2**42 - 11


def listening_byte_of(run_id: object) -> int | None:
    """Return the byte that a process holds as long as it hears requests to cancel tasks of a run;
    None as for `byte_of`."""
    offset = byte_of(run_id)
    return None if offset is None else 1 + (offset + _PLACES // 2) % _PLACES


@lru_cache
def _machine() -> int:
    """Return a number that tells this machine from others, by its id if it has one."""
    found = b""
    if sys.platform == "linux":
        for name in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
            try:
                with open(name, "rb") as file:
                    found = found or file.read(64).strip()
            except OSError:
                continue  # as in most containers
    elif sys.platform == "darwin":
        import ctypes

        room, patience = ctypes.create_string_buffer(16), (ctypes.c_long * 2)(1, 0)
        if not ctypes.CDLL(None).gethostuuid(room, patience):
            found = room.raw
    return int.from_bytes(found or this_host().encode(), "big")


def is_alive(run_id: str, lock: PresenceLock) -> bool:
    """Tell whether the process that records a run lives; True when that cannot be found out, as on
    another machine."""
    offset = byte_of(run_id)
    if offset is None:
        return True
    try:
        return not (lock.is_abandoned(offset) or lock.is_abandoned(_first_presence(run_id)))
    except OSError:
        return True


def _first_presence(run_id: str) -> int:
    """Return the byte that the first bgworker held instead, as any machine did. Its histories have
    the same version."""
    return 1 + int(run_id[-15:], 16)


def dead_runs(database: Database, lock: PresenceLock, run_ids: Collection[str]) -> set[str]:
    """Return which of these runs are such that their tasks will never end.

    Those are runs whose record was closed, whose process has died, or that were copied from another
    file. Runs of another machine may be alive. The caller must not hold the lock: this function
    asks it, and gives the connection back before. (The thread that has the lock may wait for a
    fork, and the fork for the connection.)
    """
    with database as connection:
        found = connection.execute(
            f"SELECT run_id, host, ended_utc FROM runs WHERE run_id {GIVEN}",
            (json.dumps(list(run_ids)),),
        ).fetchall()
    return {run_id for run_id, host, ended in found
            if ended is not None or host is None or not is_alive(run_id, lock)}


def settle(database: Database, lock: PresenceLock) -> None:
    """Record the end of runs whose process is dead, and open tasks of ended runs as interrupted.

    A dead run ended with the last start or end of a task of it. Requests to cancel its tasks go.
    The caller does not hold the lock.
    """
    with database as connection:
        unended = [run_id for run_id, in connection.execute(OPEN_RUNS)]
        ended = [run_id for run_id, in connection.execute(_ENDED_RUNS) if not is_own_run(run_id)]
    dead = [run_id for run_id in unended if not is_alive(run_id, lock)]
    if dead or ended:
        with lock, database as connection, transaction(connection):
            connection.execute(_END_RUNS, (json.dumps(dead),))
            connection.execute(_INTERRUPT, (json.dumps(dead + ended),))
            connection.execute(DELETE_REQUESTS)

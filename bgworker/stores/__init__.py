"""Histories that a team shares, on a server: in PostgreSQL, and in MongoDB.

Neither sink imports a driver: the caller hands over what connects.

Who runs where, and since when? Each process that records has a row in ``runs``. In psql:

    SELECT host, pid, started_utc, last_seen, now() - last_seen AS silent,
      (SELECT count(*) FROM bgworker.tasks
       WHERE tasks.run_id = runs.run_id AND status = 'running') AS running
    FROM bgworker.runs WHERE ended_utc IS NULL AND last_seen IS NOT NULL
    ORDER BY host, started_utc;

And with pymongo, where ``database`` is the one that `MongoSink` was given:

    database.runs.find({"ended_utc": None, "last_seen": {"$exists": True}}).sort("host")

What ``last_seen`` proves: then, by the server's clock, the process stored a batch, whatever was in
it, and lived. What it does not: that the process still lives, since it may have died just after;
nor, however long ago it was, that it does not: it may be cut off, or run tasks that say nothing. A
run without ``last_seen`` is a copy: its history came from elsewhere.
"""

from __future__ import annotations

from .mongo import MongoSink
from .postgres import PostgresSink

__all__ = ["MongoSink", "PostgresSink"]

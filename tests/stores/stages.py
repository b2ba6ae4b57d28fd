"""One history on a server of each kind, seen past the sink: by SQL, or by a client of its own."""

from __future__ import annotations

import itertools
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from tests.stores.servers import LOOPBACK, Mongo, Postgres, Server

from bgworker.stores import MongoSink, PostgresSink, mongo, tables


everywhere = pytest.mark.parametrize("stage", ["postgres", "psycopg2", "mongo", "nx"],
                                     indirect=True)
"""With every driver and every server."""
on_every_server = pytest.mark.parametrize("stage", ["postgres", "mongo", "nx"], indirect=True)
"""On every server."""


_numbers = itertools.count()


def store(kind: str, port: int, name: str) -> Any:
    """Return a sink that writes to the history of a stage, in whatever process."""
    if kind == "MongoStage":
        import pymongo

        client: Any = pymongo.MongoClient(LOOPBACK, port, directConnection=True)
        return MongoSink(client[name])
    import psycopg

    connect = f"host={LOOPBACK} port={port} user=me dbname=postgres"
    return PostgresSink(lambda: psycopg.connect(connect), schema=name)


class Stage:
    """An empty history, which a sink makes when it first opens."""

    server: Server
    name = "jobs"
    """Of the schema or the database."""
    pace = 10
    """Lines that each task of a load says in a hundredth of a second: half of what the server
    takes."""

    def sink(self, *, port: int | None = None, **options: Any) -> Any:
        """Return another sink that writes to it.

        Args:
            port: of a proxy in front of the server.
        """
        raise NotImplementedError

    def lines(self) -> list[tuple[int, int]]:
        """Return of each task how many stream rows it has, and how many different payloads."""
        raise NotImplementedError

    def tasks(self) -> list[tuple[str, str, int]]:
        """Return id, status and last_seq of each task, by id."""
        raise NotImplementedError

    def runs(self) -> list[tuple[str, int | None, Any, Any]]:
        """Return id, pid, end and last sign of each run, by id."""
        raise NotImplementedError

    def counts(self) -> tuple[int, int, int]:
        """Return how many stream rows, scripts and losses there are."""
        raise NotImplementedError

    def make_run(self, run_id: str, seconds: float) -> None:
        """Note a run of another machine that was seen so long ago."""
        raise NotImplementedError

    def set_run(self, task_id: str, run_id: str) -> None:
        raise NotImplementedError

    def set_version(self, version: int) -> None:
        raise NotImplementedError

    def versions(self) -> list[int]:
        """Return those that the history has had."""
        raise NotImplementedError

    @staticmethod
    def add_step(seconds: float = 0.0, *, fails: bool = False) -> None:
        """Have this process know a version more, in which each run has a city. Its step takes so
        long, in the middle."""
        raise NotImplementedError

    def is_in_step(self) -> bool:
        """Tell whether somebody is in the middle of that step."""
        raise NotImplementedError

    def cities(self) -> list[str]:
        """Return those of the runs."""
        raise NotImplementedError

    def double_a_line(self) -> None:
        """Make the second line of each task the same as the first."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the server."""


class PostgresStage(Stage):
    def __init__(self, server: Postgres, driver: str = "psycopg") -> None:
        self.server: Postgres = server
        self.driver = driver
        server.ask("DROP SCHEMA IF EXISTS jobs CASCADE")

    def sink(self, *, port: int | None = None, **options: Any) -> PostgresSink:
        return PostgresSink(lambda: self.server.connect(port=port, driver=self.driver),
                            schema=self.name, **options)

    def lines(self) -> list[tuple[int, int]]:
        return self.server.ask("SELECT count(*), count(DISTINCT payload) FROM jobs.task_streams "
                               "GROUP BY task_id ORDER BY 1")

    def tasks(self) -> list[tuple[str, str, int]]:
        return self.server.ask("SELECT id, status, last_seq FROM jobs.tasks ORDER BY id")

    def runs(self) -> list[tuple[str, int | None, Any, Any]]:
        return self.server.ask(
            "SELECT run_id, pid, ended_utc, last_seen FROM jobs.runs ORDER BY run_id")

    def counts(self) -> tuple[int, int, int]:
        (found,) = self.server.ask("SELECT (SELECT count(*) FROM jobs.zz_stream_rows), "
                                   "(SELECT count(*) FROM jobs.scripts), "
                                   "(SELECT count(*) FROM jobs.losses)")
        return found  # type: ignore[return-value]

    def make_run(self, run_id: str, seconds: float) -> None:
        self.server.ask("INSERT INTO jobs.runs (run_id, host, last_seen) "
                        "VALUES (%s, 'a', now() - %s * interval '1 s')", run_id, seconds)

    def set_run(self, task_id: str, run_id: str) -> None:
        self.server.ask("UPDATE jobs.tasks SET run_id = %s WHERE id = %s", run_id, task_id)

    def set_version(self, version: int) -> None:
        self.server.ask("INSERT INTO jobs.schema_version VALUES (%s)", version)

    def versions(self) -> list[int]:
        return [version for version, in self.server.ask(
            "SELECT version FROM jobs.schema_version ORDER BY 1")]

    @staticmethod
    def add_step(seconds: float = 0.0, *, fails: bool = False) -> None:
        tables.STEPS += ((
            "ALTER TABLE {s}.runs ADD COLUMN city text",
            "SELECT 1 / 0" if fails else f"SELECT pg_sleep({seconds})",
            "UPDATE {s}.runs SET city = concat(city, 'Ulm')"),)

    def is_in_step(self) -> bool:
        return self.server.ask("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"
                               ) != []

    def cities(self) -> list[str]:
        return [city for city, in self.server.ask("SELECT city FROM jobs.runs")]

    def double_a_line(self) -> None:
        self.server.ask(
            "UPDATE jobs.zz_stream_rows SET payload = 'line 0' WHERE payload = 'line 1'")


class MongoStage(Stage):
    pace = 2

    def __init__(self, server: Mongo) -> None:
        self.server: Mongo = server
        self._clients = [server.client(retryWrites=True, serverSelectionTimeoutMS=20_000)]
        # one of its own: a server may take as long to drop a document as to insert it
        self.name = f"jobs{next(_numbers)}"
        self.db = self._clients[0][self.name]

    def sink(self, *, port: int | None = None, **options: Any) -> MongoSink:
        self._clients.append(self.server.client(port))
        return MongoSink(self._clients[-1][self.name], **options)

    def lines(self) -> list[tuple[int, int]]:
        said: dict[str, list[str]] = {}
        for each in self.db.task_streams.find({}, {"task_id": 1, "payload": 1}):
            said.setdefault(each["task_id"], []).append(each["payload"])
        return sorted((len(payloads), len({*payloads})) for payloads in said.values())

    def tasks(self) -> list[tuple[str, str, int]]:
        return [(each["_id"], each["status"], each["last_seq"])
                for each in self.db.tasks.find().sort("_id", 1)]

    def runs(self) -> list[tuple[str, int | None, Any, Any]]:
        return [(each["_id"], each.get("pid"), each.get("ended_utc"), each.get("last_seen"))
                for each in self.db.runs.find().sort("_id", 1)]

    def counts(self) -> tuple[int, int, int]:
        streams, scripts, losses = (self.db[name].count_documents({})
                                    for name in ("task_streams", "scripts", "losses"))
        return streams, scripts, losses

    def make_run(self, run_id: str, seconds: float) -> None:
        then = datetime.now(timezone.utc) - timedelta(seconds=seconds)
        self.db.runs.insert_one({"_id": run_id, "host": "a", "last_seen": then})

    def set_run(self, task_id: str, run_id: str) -> None:
        self.db.tasks.update_one({"_id": task_id}, {"$set": {"run_id": run_id}})

    def set_version(self, version: int) -> None:
        self.db.schema_version.insert_one({"_id": version, "since": "now"})

    def versions(self) -> list[int]:
        return sorted(each["_id"] for each in self.db.schema_version.find({"_id": {"$gt": 0}}))

    @staticmethod
    def add_step(seconds: float = 0.0, *, fails: bool = False) -> None:
        def step(database: Any) -> None:
            for run in database.runs.find({"city": None}):
                database.steps.insert_one({"run": run["_id"]})
                time.sleep(seconds)
                if fails:
                    database.command("no such command")
                database.runs.update_one({"_id": run["_id"]}, {"$set": {"city": "Ulm"}})

        mongo.STEPS += (step,)

    def is_in_step(self) -> bool:
        return self.db.steps.count_documents({}) > len(self.cities())

    def cities(self) -> list[str]:
        return [run["city"] for run in self.db.runs.find({"city": {"$gt": ""}})]

    def double_a_line(self) -> None:
        self.db.task_streams.update_many({"payload": "line 1"}, {"$set": {"payload": "line 0"}})

    def fail(self, command: str, code: int, times: int) -> None:
        """Have the server answer the next commands of a name with an error."""
        self.db.client.admin.command({
            "configureFailPoint": "failCommand", "mode": {"times": times},
            "data": {"failCommands": [command], "errorCode": code}})

    def close(self) -> None:
        for client in self._clients:
            client.close()

"""A server of each kind for all tests of a session, and an empty history for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.stores.load import Load
from tests.stores.servers import Mongo, Nx27017, Postgres, Proxy, SecantusDb, Server
from tests.stores.stages import MongoStage, PostgresStage, Stage


@contextmanager
def eager_clients() -> Iterator[None]:
    """Have pymongo look after a server at once: after each trouble it waits half a second."""
    import pymongo

    usual = pymongo.common.MIN_HEARTBEAT_INTERVAL
    pymongo.common.MIN_HEARTBEAT_INTERVAL = 0.02  # type: ignore[misc]
    yield
    pymongo.common.MIN_HEARTBEAT_INTERVAL = usual  # type: ignore[misc]


def serve(kind: Callable[[], Server], *packages: str) -> Iterator[Any]:
    """Give a server while the session lasts; skip where a package for it is missing."""
    for name in packages:
        pytest.importorskip(name, reason=f"needs {name}; the extra 'integration' installs it where "
                                         "there is one for this Python", exc_type=ImportError)
    server = kind()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    yield from serve(Postgres, "psycopg")


@pytest.fixture(scope="session")
def mongo() -> Iterator[Mongo]:
    yield from serve(SecantusDb, "pymongo", SecantusDb.package)


@pytest.fixture(scope="session")
def nx() -> Iterator[Mongo]:
    yield from serve(Nx27017, "pymongo", Nx27017.package)


@pytest.fixture
def on_postgres(postgres: Postgres) -> PostgresStage:
    return PostgresStage(postgres)


@pytest.fixture
def on_psycopg2(postgres: Postgres) -> PostgresStage:
    pytest.importorskip("psycopg2", reason="needs psycopg2; the extra 'integration' installs it",
                        exc_type=ImportError)
    return PostgresStage(postgres, "psycopg2")


@pytest.fixture
def on_mongo(mongo: Mongo) -> Iterator[MongoStage]:
    with eager_clients():
        made = MongoStage(mongo)
        yield made
        made.close()


@pytest.fixture
def on_nx(nx: Mongo) -> Iterator[MongoStage]:
    with eager_clients():
        made = MongoStage(nx)
        yield made
        made.close()


@pytest.fixture(params=["postgres", "mongo"])
def stage(request: pytest.FixtureRequest) -> Stage:
    """Of each kind; a test that is `everywhere` has more."""
    found: Stage = request.getfixturevalue(f"on_{request.param}")
    return found


@pytest.fixture
def schema(on_postgres: PostgresStage) -> str:
    """The name of a schema that is not there yet."""
    return "jobs"


@pytest.fixture
def network(stage: Stage) -> Iterator[Proxy]:
    """What a sink may reach the server through."""
    proxy = Proxy(stage.server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def load(stage: Stage, network: Proxy) -> Iterator[Load]:
    made = Load(stage, network)
    yield made
    made.stop.set()
    made.pool.shutdown()

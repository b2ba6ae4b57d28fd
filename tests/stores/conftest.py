"""A server of each kind for all tests of a session, and an empty history for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.stores.load import Load
from tests.stores.servers import Mongo, Postgres, Proxy
from tests.stores.stages import MongoStage, PostgresStage, Stage


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason="needs psycopg; the extra 'integration' installs it",
                        exc_type=ImportError)
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def mongo() -> Iterator[Mongo]:
    for name in ("pymongo", "secantus"):
        pytest.importorskip(name, reason=f"needs {name}; the extra 'integration' installs it where "
                                         "there is one for this Python", exc_type=ImportError)
    server = Mongo()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def on_postgres(postgres: Postgres) -> PostgresStage:
    return PostgresStage(postgres)


@pytest.fixture
def on_mongo(mongo: Mongo) -> Iterator[MongoStage]:
    made = MongoStage(mongo)
    yield made
    made.close()


@pytest.fixture(params=["postgres", "mongo"])
def stage(request: pytest.FixtureRequest) -> Stage:
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

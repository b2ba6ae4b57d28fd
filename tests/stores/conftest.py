"""A PostgreSQL for all tests of a session, and a schema of its own for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.stores.servers import Postgres, Proxy


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


@pytest.fixture
def schema(postgres: Postgres) -> Iterator[str]:
    """The name of a schema that is not there, or was removed again."""
    postgres.ask("DROP SCHEMA IF EXISTS jobs CASCADE")
    yield "jobs"


@pytest.fixture
def network(postgres: Postgres) -> Iterator[Proxy]:
    proxy = Proxy(postgres.port)
    yield proxy
    proxy.close()

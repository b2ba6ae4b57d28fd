"""What the tests of the history share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bgworker.history.reader import History
from tests.histories import Recorder


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where a history may be made."""
    return str(tmp_path / "history.db")


@pytest.fixture
def record(path: str) -> Iterator[Recorder]:
    """A history into which a test writes what it wants."""
    recorder = Recorder(path)
    yield recorder
    recorder.close()


@pytest.fixture
def history(record: Recorder, path: str) -> Iterator[History]:
    """The same history, read."""
    with History(path) as opened:
        yield opened

"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.histories import Nightly, Recorder


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """The history of this folder, into which a test writes what it wants."""
    monkeypatch.chdir(tmp_path)
    recorder = Recorder("bgworker.db")
    yield recorder
    recorder.close()


@pytest.fixture(scope="session")
def nightly(tmp_path_factory: pytest.TempPathFactory) -> Nightly:
    """A history that a real Scheduler has recorded, and that nobody writes to."""
    return Nightly(tmp_path_factory.mktemp("nightly") / "nightly.db")

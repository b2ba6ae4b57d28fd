"""A history to write into, and the site that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.histories import Recorder
from tests.web.browsing import site

from bgworker.web.server import Server


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Recorder]:
    recorder = Recorder(tmp_path / "bgworker.db")
    yield recorder
    recorder.close()


@pytest.fixture
def server(record: Recorder) -> Iterator[Server]:
    with site(record.path) as running:
        yield running

"""The executors, one after the other; each is there for all tests of a module that it runs, and no
longer: a child that is forked beside subinterpreters crashes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.remote.engines import ELSEWHERE, NAMES, Engine, channels, made
from tests.support import SOON, RecordingSink, until

from bgworker import Scheduler


@pytest.fixture(scope="module", params=[
    # that starts workers as fork does, or as loky
    pytest.param(name, marks=pytest.mark.slow) if name in ("spawn", "forkserver") else name
    for name in NAMES])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Each of the executors. A test leaves it as it was."""
    yield from made(request.param)


@pytest.fixture
def elsewhere(engine: Engine) -> Engine:
    """Each of those that run tasks elsewhere."""
    if engine.name not in ELSEWHERE:
        pytest.skip("is about code that runs elsewhere")
    return engine


class Hold:
    """Where a body waits until its test lets it go; see `functions.hold`."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._entered = Path(f"{path}.entered")
        self._open = Path(f"{path}.open")

    def begun(self) -> list[int]:
        """Return the processes that have come here, in order."""
        try:
            return [int(line) for line in self._entered.read_text().split()]
        except FileNotFoundError:
            return []

    def wait(self, times: int = 1) -> int:
        """Wait until bodies have come so often; return the process of the last."""
        until(lambda: len(self.begun()) >= times)
        return self.begun()[-1]

    def open(self) -> None:
        self._open.touch()


class Holds:
    """Makes places to wait at."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[Hold] = []

    def __call__(self) -> Hold:
        self._made.append(Hold(self._folder / f"hold-{len(self._made)}"))
        return self._made[-1]

    def open(self) -> None:
        for each in self._made:
            each.open()


@pytest.fixture
def holds(tmp_path: Path) -> Iterator[Holds]:
    """Makes places to wait at, all of which are opened before the Scheduler of the test ends."""
    made = Holds(tmp_path)
    yield made
    made.open()


@pytest.fixture
def recorder() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def pool(engine: Engine, recorder: RecordingSink, holds: Holds) -> Iterator[Scheduler]:
    """A Scheduler on each of the executors, whose events are recorded."""
    with engine.scheduler(sinks=[recorder]) as made:
        yield made
        holds.open()


@pytest.fixture
def hold(holds: Holds) -> Hold:
    return holds()


@pytest.fixture(autouse=True)
def no_channel_left() -> Iterator[None]:
    """Fail a test that leaves the socket of a channel open."""
    before = set(channels())
    yield
    until(lambda: set(channels()) <= before, SOON)

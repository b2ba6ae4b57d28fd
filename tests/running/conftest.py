"""What the tests of the running room share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from bgworker import Scheduler


@pytest.fixture
def pool() -> Iterator[Scheduler]:
    """A Scheduler with four workers."""
    with Scheduler(4) as made:
        yield made


@pytest.fixture
def hasty_switching() -> Iterator[None]:
    """Threads are switched as often as can be, so that races are run into."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)

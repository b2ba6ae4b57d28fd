"""What differs where Python runs without the GIL."""

from __future__ import annotations

import sys

from bgworker import Scheduler

IS_FREE = not getattr(sys, "_is_gil_enabled", lambda: True)()


def runs_on(pool: Scheduler) -> bool:
    """Have an idle worker run.

    Without the GIL a thread counts only then what others have released of the objects that it made.
    """
    if IS_FREE:
        assert pool.submit(int).wait(30.0)
    return True

"""How every thread of ours begins: as a daemon, and with an empty context.

Where threads inherit their starter's context (``-X thread_inherit_context``, the default of
free-threaded 3.14), one that a task happens to start would take the task's context variables for
its own: a sink's ``print`` would land in that task's streams.
"""

from __future__ import annotations

import threading
from contextvars import Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def own_thread(name: str, target: Callable[..., object], *args: object) -> threading.Thread:
    """Return a daemon thread, not started, that calls ``target(*args)`` with no context variable
    set."""
    run = Context().run
    try:
        return threading.Thread(target=run, args=(target, *args), name=name, daemon=True)
    except RuntimeError:
        # an isolated subinterpreter (3.12) has no daemons; it waits for its threads at its end
        return threading.Thread(target=run, args=(target, *args), name=name, daemon=False)

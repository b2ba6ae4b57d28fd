"""How every thread of ours begins: as a daemon, and with an empty context.

Where threads inherit their starter's context (``-X thread_inherit_context``, the default of free-threaded 3.14), one that
a task happens to start would take the task's context variables for its own: a sink's ``print`` would land in that task's
streams.
"""

from __future__ import annotations

import threading
from contextvars import Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def own_thread(name: str, target: Callable[..., object], *args: object) -> threading.Thread:
    """Return a daemon thread, not started, that calls ``target(*args)`` with no context variable set."""
    return threading.Thread(target=Context().run, args=(target, *args), name=name, daemon=True)

"""What begins anew in a forked child: only the thread that forked is there. A lock that another one
held is held for ever, and what the parent recorded is the parent's.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def in_child(begin_anew: Callable[[], None]) -> Callable[[], None]:
    """Have a function called in every forked child, on its only thread. A decorator.

    Such functions are called in the order in which their modules were loaded. Where there is no
    fork (Windows) none is called.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=begin_anew)
    return begin_anew

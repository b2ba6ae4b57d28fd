"""Commands as tasks: the function ``shell``, the child process and its pipes.

``bgworker.shell`` is the function. Python sets that name to this room when a module of it is
imported first; so the room can be called, too, and does the same.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from .command import shell

        return shell(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

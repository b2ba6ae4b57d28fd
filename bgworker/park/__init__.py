"""What could not be delivered: the park file, and ``replay``, which delivers it later."""

from __future__ import annotations

# at once: a module that is loaded later would take the place of its function here
from .replay import replay

__all__ = ["replay"]

"""What could not be delivered: the park file, and ``replay``, which delivers it later."""

from __future__ import annotations

from .replay import replay  # at once: a module that is loaded later would take the place of its function here

__all__ = ["replay"]

"""What could not be delivered: the park file, and ``replay``, which delivers it later."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .replay import replay

__all__ = ["replay"]


def __getattr__(name: str) -> object:
    if name != "replay":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .replay import replay  # most who park never replay

    return replay

"""The event loop of an async sink, on the sink's own thread."""

from __future__ import annotations

from types import FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from typing import Any


_COROUTINE = 0x80
"""Flag of a function that is ``async def``, in ``co_flags`` of its code."""


def prepare(sink: object) -> None:
    """Load `asyncio` if a method of the sink is a coroutine function, on the thread of whoever
    registers it: a fork in the middle of an import leaves the child with half a module, for ever.
    """
    for kind in type(sink).__mro__:
        for method in vars(kind).values():
            if type(method) is FunctionType and method.__code__.co_flags & _COROUTINE:
                import asyncio  # noqa: F401


class SinkLoop:
    """Runs to its end what a sink's method returned. The loop comes with the first awaitable."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, sink: object, method: str, *arguments: object) -> None:
        """Call a method of ``sink`` if it has that one, to its end also where it is async."""
        function = getattr(sink, method, None)
        if function is not None:
            self.finish(function(*arguments))

    def finish(self, result: Any) -> None:
        """Await what an async method returned. What a plain one returned is nobody's affair."""
        if not hasattr(type(result), "__await__"):
            return
        import asyncio

        async def finish() -> None:
            await result

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(finish())

    def close(self) -> None:
        """End the loop, and before that what a sink has left on it: its tasks are cancelled."""
        if self._loop is None:
            return
        try:
            self._loop.run_until_complete(_wind_up(self._loop))
        finally:
            self._loop.close()


async def _wind_up(loop: asyncio.AbstractEventLoop) -> None:
    import asyncio

    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()

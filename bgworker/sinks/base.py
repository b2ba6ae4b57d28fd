"""What a sink is: the contract between delivery and whatever takes the events in, and its per-event
form.

With `specs`, which builds one from a specification, this is all that delivery knows of sinks.
"""

from __future__ import annotations

from typing import Protocol

from ..model.events import Event, EventType, LifecycleEvent, LossEvent, StreamEvent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator, Sequence
    from typing import Any


class Sink(Protocol):
    """Takes events in. Any object with these two methods is a sink; deriving from this class is not
    needed.

    *Thread.* Every call, from the first to ``close``, comes from one thread that belongs to this
    sink, never two at once. A sink needs no lock of its own, may keep things that are bound to a
    thread, and may block: only its own queue fills meanwhile. Tasks, other sinks and a shutdown
    past its timeout go on.

    *Failure.* A sink raises, delivery decides. It should neither retry nor swallow: only what was
    raised is counted, reported and tried again.

    These are optional; without them nothing is called or read:

    ``open()``
        called before the first ``write``, and again in a child after ``fork``, where it has to let
        go of what the parent opened without disturbing the parent's use of it.
        `PermanentSinkError` says that the sink is of no use as it is configured, and refuses its
        registration. An ``open`` that raises leaves nothing open.
    ``flush()``
        called when the scheduler is flushed, after the events before the flush were written.
        Returns when they are as safe as this sink makes them.
    ``preferred_batch: int``
        most events that it wants in one ``write`` (500 without it). ``SinkOptions.batch_size`` goes
        before.

    ``open``, ``flush`` and ``close`` may be coroutine functions too.
    """

    def write(self, events: Sequence[Event]) -> Awaitable[None] | None:
        """Take the events in; on return they are this sink's, and are not sent again.

        It may be a coroutine function, or return any other awaitable: that is awaited on an event
        loop of the sink's thread before the next call. Anything else that it returns is ignored.
        Tasks that are left on the loop are cancelled after ``close``.

        Args:
            events: 1..batch_size events, in the order in which they were numbered; ``seq`` ascends
                per task. To be read, not changed, and not kept past the call (a copy may be).

        Raises:
            TemporarySinkError: try the same events again, after ``retry_after`` seconds if that is
                given. With ``hold=True`` they are not to blame: they are kept, however long it
                takes, and tried again once in the ``cap`` of the sink's `RetryPolicy`, until
                somebody has mended the sink or its other side.
            PermanentSinkError: they will never be accepted, and are parked, or dropped and counted
                as "refused". What is refused, ``concerns`` tells. "event": some of them, so a batch
                of many is halved until the event that offends stands alone. "batch": all of them,
                whatever is in them; nothing is halved. "sink": nothing is taken any more: it is
                closed, its state is "failed", and what waits and comes is parked, or dropped and
                counted as "closed".
            Exception: any other is treated as temporary.

        A batch that raised comes again, whole or in parts, before any later event: delivery is *at
        least once*. A sink that took in some of it should know them again, by ``(task_id, seq)``.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything. The last call, made once; also after writes that failed."""
        raise NotImplementedError


HOOKS: dict[EventType, str] = {type_: f"on_{type_.name.lower()}" for type_ in EventType}
"""Method of `HookSink` by event type."""


class HookSink:
    """A sink that calls one method per event: derive from it and override the hooks that matter,
    plain or ``async``.

    ``on_event`` is called for every event, then the hook of its type. Hooks are called one after
    the other in the order of the events, on the sink's thread, under all that `Sink` says; async
    ones are awaited before the next.

    A hook that raises has the *whole batch* delivered again, and so the hooks of the events before
    it in that batch are called again with the same events. Hooks therefore either bear that
    (knowing an event again by ``(task_id, seq)``), or catch their own exceptions, or set
    ``preferred_batch = 1`` in the class: then only the event whose hook raised comes again, at the
    price of more work per event.

    Defining a method ``on_...`` that is no hook raises a `TypeError` at once: it would never be
    called.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = {"on_event", *HOOKS.values()}
        for name, value in vars(cls).items():
            if (
                name.startswith("on_")
                and name not in known
                and (callable(value) or isinstance(value, classmethod))
            ):
                from difflib import get_close_matches
                close = get_close_matches(name, known, n=1)
                hint = (
                    f"did you mean {close[0]}?"
                    if close
                    else f"the hooks are {', '.join(sorted(known))}"
                )
                raise TypeError(
                    f"{cls.__qualname__}.{name} is not a hook of HookSink and would never be "
                    f"called; {hint} (a method that is not meant as a hook needs another name)"
                )

    def write(self, events: Sequence[Event]) -> Awaitable[None] | None:
        """Call the hooks of the events in order; from the first that returns an awaitable on, as a
        coroutine."""
        to_await = self._call_hooks(events)
        for first in to_await:
            return _await_all(first, to_await)
        return None

    def close(self) -> None:
        """Do nothing; there to be overridden."""

    def _call_hooks(self, events: Sequence[Event]) -> Iterator[Awaitable[None]]:
        """Call the hooks; pause with each awaitable that one returns, until asked for the next."""
        for event in events:
            for name in ("on_event", HOOKS[event.type]):
                result = getattr(self, name)(event)
                if hasattr(result, "__await__"):
                    yield result

    def on_event(self, event: Event) -> Awaitable[None] | None:
        """Something happened: called for every event, before the hook of its type."""
        return None

    def on_task_created(self, event: LifecycleEvent) -> Awaitable[None] | None:
        """The task was submitted; ``event.task`` tells all that is known of it, here and in the
        hooks like this."""
        return None

    def on_task_scheduled(self, event: LifecycleEvent) -> Awaitable[None] | None:
        """It waits for a worker."""
        return None

    def on_task_started(self, event: LifecycleEvent) -> Awaitable[None] | None:
        """A worker runs it."""
        return None

    def on_task_progress(self, event: StreamEvent) -> Awaitable[None] | None:
        """It reported progress: ``percent`` and ``message``."""
        return None

    def on_task_output(self, event: StreamEvent) -> Awaitable[None] | None:
        """It said something on its output stream: ``payload``."""
        return None

    def on_task_error(self, event: StreamEvent) -> Awaitable[None] | None:
        """It said something on its error stream; it has not failed."""
        return None

    def on_task_warning(self, event: StreamEvent) -> Awaitable[None] | None:
        """It said something on its warning stream."""
        return None

    def on_task_verbose(self, event: StreamEvent) -> Awaitable[None] | None:
        """It said something on its verbose stream."""
        return None

    def on_task_completed(self, event: LifecycleEvent) -> Awaitable[None] | None:
        """It returned. The last event of the task."""
        return None

    def on_task_failed(self, event: LifecycleEvent) -> Awaitable[None] | None:
        """It raised. The last event of the task."""
        return None

    def on_task_cancelled(self, event: LifecycleEvent) -> Awaitable[None] | None:
        """It was cancelled, before or while it ran. The last event of the task."""
        return None

    def on_task_timed_out(self, event: LifecycleEvent) -> Awaitable[None] | None:
        """It ran longer than its timeout. The last event of the task."""
        return None

    def on_events_lost(self, event: LossEvent) -> Awaitable[None] | None:
        """This sink did not get some events: they did not fit, or could not be delivered."""
        return None


async def _await_all(first: Awaitable[None], others: Iterator[Awaitable[None]]) -> None:
    await first
    for other in others:
        await other

"""The sinks and subscriptions of one scheduler: their names, their coming and going, their
accounts.

Guarantees. Any thread may call the methods, except where a section says otherwise. A sink has a
part in all that is emitted once `register` has returned, and in nothing that is emitted after
`unregister` has. No call waits for a sink beyond its timeout, nor for the thread that it is on.
"""

from __future__ import annotations

# The first event of a sink needs these two, on the sink's thread. They are loaded here: a fork in
# the middle of an import leaves the child with half a module, for ever.
import datetime  # noqa: F401
import hashlib  # noqa: F401
import logging
import threading
from itertools import count

from ..model.checks import key, members, named
from ..model.clock import monotonic
from ..model.enums import EventType
from ..model.errors import ConfigurationError, ShutdownError, SinkError
from ..model.health import FlushReport, SinkHealth
from ..model.records import PROGRESS
from ..model.reports import report, wait_for_reports
from ..model.text import ask, name_of, show
from ..sinks.specs import open_sink, sinks_from_environ
from .courier import Courier, Mark, close_all, options_for
from .options import SinkOptions, kinds_of
from .subscription import Subscription

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Any

    from ..model.events import Event
    from ..model.records import TaskState
    from ..sinks.base import Sink
    from .consumer import Consumer
    from .dispatcher import Dispatcher


LOG_GRACE = 0.5
"""Seconds that the log gets at most for the lines about an end: its handlers may block for
ever."""


class Registry:
    """What a dispatcher hands events to. Its maker sets it as the ``sinks`` of the dispatcher.

    Args:
        dispatcher: whose consumers these are.
        name: of the scheduler; threads are named after it.
        close_timeout: seconds that a sink gets to open.
    """

    def __init__(self, dispatcher: Dispatcher, name: str, close_timeout: float) -> None:
        self._dispatcher = dispatcher
        self._name = name
        self._close_timeout = close_timeout
        self._lock = threading.RLock()  # guards _sinks; re-entrant as a courier's
        self._sinks: dict[str, Courier] = {}
        # in a forked child: those that wait for its first task
        self._inherited: tuple[Courier, ...] = ()
        self._subscribed = count(1).__next__

    def register(
        self,
        sink: Sink | str,
        name: str | None,
        options: SinkOptions | None,
        config: dict[str, Any],
    ) -> str:
        """Open a sink and let it have all that is emitted from now on; return its name.

        Raises:
            SinkError: the specification is wrong, or the sink refuses to open.
            ConfigurationError: the name is taken, or an option is none.
        """
        if name is not None:
            name = named("name", name)
        sink, kind = _open_spec(sink, config)
        if options is not None and not issubclass(type(options), SinkOptions):
            raise ConfigurationError(
                f"options: expected a SinkOptions or None, got {show(options)}"
            )
        self._dispatcher.start()
        options = options_for(sink, options or SinkOptions())
        with self._lock:
            if name is None:
                name = next(
                    each
                    for n in count(1)
                    if (each := kind if n == 1 else f"{kind}-{n}") not in self._sinks
                )
            elif name in self._sinks and not self._sinks[name].is_closed:
                raise ConfigurationError(
                    f"name: a sink called {name!r} is registered already; choose another name, "
                    "or unregister it first"
                )
            courier = self._sinks[name] = Courier(name, sink, options, self._name)
        try:
            courier.start(self._close_timeout)
            # the call is waited for, so that the sink has a part in all that the intake refuses
            # from now on
            if self._dispatcher.call(lambda: self._attach(courier)) is False:
                raise ShutdownError(f"cannot register sink {name!r} after shutdown")
        except BaseException:
            close_all([courier], monotonic() + self._close_timeout)  # its park file, too
            with self._lock:
                if self._sinks.get(name) is courier:
                    del self._sinks[name]
            raise
        return name

    def register_of_environment(self) -> None:
        """Register the sinks that the environment variable BGWORKER_SINKS names, and tell where a
        wrong one stands."""
        for spec in sinks_from_environ():
            try:
                self.register(spec, None, None, {})
            except SinkError as error:
                raise SinkError(
                    f"the environment variable BGWORKER_SINKS asks for it: {error}"
                ) from error

    def unregister(self, name: str, timeout: float) -> SinkHealth:
        """Let a sink finish what it has been given, close it and return its final account, by
        ``timeout`` at the latest.

        From inside that sink it returns at once, with the account so far: the sink is closed after
        the call that it is in.

        Raises:
            KeyError: no sink has that name.
        """
        name, deadline = key(name), monotonic() + timeout
        with self._lock:
            courier = self._sinks[name]
        self._dispatcher.call(lambda: self._detach(courier))
        close_all([courier], deadline)
        wait_for_reports(monotonic() + LOG_GRACE)
        with self._lock:
            if self._sinks.get(name) is courier:  # else the name is another's by now
                del self._sinks[name]
        return courier.health()

    def subscribe(
        self,
        callback: Callable[[Event], object] | None,
        state: TaskState | None,
        types: Collection[EventType | str] | None,
        maxsize: int,
        back_pressure: bool,
    ) -> Subscription:
        """Return a subscription to what is emitted from now on; one to a task begins with what is
        in memory of it."""
        kinds = None if types is None else kinds_of(members("types", EventType, types))
        subscription = Subscription(
            f"{self._name}-subscription-{self._subscribed()}",
            state,
            kinds,
            maxsize,
            back_pressure,
            lambda self_: self._dispatcher.call(lambda: self._detach(self_)),
        )

        def attach() -> None:
            # first: see `Dispatcher.end_unheard`
            is_attached = self._attach(subscription)
            subscription.begin()
            if not is_attached:
                subscription.end()

        try:
            self._dispatcher.start()
            if callback is not None:
                subscription.call(callback)  # first: there may be no thread for it
            self._dispatcher.call(attach)
        except BaseException:
            subscription.end()
            raise
        return subscription

    def health(self) -> dict[str, SinkHealth]:
        """Return the account and the condition of every sink, by name; after `finish` the final
        ones."""
        with self._lock:
            couriers = list(self._sinks.values())
        return {courier.name: courier.health() for courier in couriers}

    def sinks(self) -> list[Sink]:
        """Return the sinks themselves, those of them that still take each step of tasks' lives."""
        with self._lock:
            couriers = list(self._sinks.values())
        return [courier.sink for courier in couriers if courier.takes(range(PROGRESS))
                and courier.health().state not in ("failed", "closed")]

    def flush(self, timeout: float | None) -> FlushReport:
        """Have all that was emitted before the call delivered, and the sinks flushed."""
        marked = self._dispatcher.call(self._mark)
        marks = marked or []
        if self._dispatcher.is_this_thread or any([courier.is_this_thread for courier, _ in marks]):
            # a sink that flushes, or a finaliser: it would wait for itself, or for one that waits
            # for it
            timeout = 0.0
        deadline = None if timeout is None else monotonic() + timeout
        done = marked is not None
        for courier, mark in marks:
            done &= mark.wait(None if deadline is None else max(0.0, deadline - monotonic()))
        # events that come during the flush do not count
        left = {courier.name: mark.left for courier, mark in marks}
        health = self.health()
        return FlushReport(
            pending={name: min(each.pending, left.get(name, 0)) for name, each in health.items()},
            lost={name: each.dropped + each.parked for name, each in health.items()},
            done=done,
        )

    # -- the dispatcher's thread --

    def _mark(self) -> list[tuple[Courier, Mark]]:
        # events that were refused before the flush are lost before it
        self._dispatcher.pass_refusals()
        return [
            (consumer, consumer.mark())
            for consumer in self._dispatcher.consumers
            if isinstance(consumer, Courier)
        ]

    def _attach(self, consumer: Consumer) -> bool:
        return self._dispatcher.set_consumers((*self._dispatcher.consumers, consumer))

    def _detach(self, consumer: Consumer) -> None:
        self._dispatcher.set_consumers(
            tuple(each for each in self._dispatcher.consumers if each is not consumer)
        )

    def close_all(self, deadline: float) -> None:
        """Have all sinks finish and close, and all subscriptions end, by ``deadline``
        (monotonic)."""
        consumers = self._dispatcher.consumers
        subscriptions = [each for each in consumers if isinstance(each, Subscription)]
        for subscription in subscriptions:
            subscription.end()
        close_all([each for each in consumers if isinstance(each, Courier)], deadline)
        for subscription in subscriptions:
            if not subscription.join(deadline):
                report(
                    logging.ERROR,
                    "the callback of %s did not finish in time and is left to itself",
                    subscription.name,
                )
        wait_for_reports(monotonic() + LOG_GRACE)

    # -- a forked child --

    def start_afresh(self, consumers: Sequence[Consumer]) -> None:
        """Give each sink an empty queue and account, to be opened with the child's first task; end
        the subscriptions."""
        for consumer in consumers:
            if isinstance(consumer, Subscription):
                consumer.end_in_child()
        self._lock = threading.RLock()
        self._sinks = {
            name: courier.twin() for name, courier in self._sinks.items() if not courier.is_closed
        }
        self._inherited = tuple(self._sinks.values())

    def start_inherited(self) -> tuple[Courier, ...]:
        """Start the couriers of the sinks that a fork has handed down; none in any other
        process."""
        inherited, self._inherited = self._inherited, ()
        for courier in inherited:
            courier.start_inherited()
        return inherited


def _open_spec(sink: Sink | str, config: dict[str, Any]) -> tuple[Sink, str]:
    """Return the sink that ``sink`` is or specifies, and what to call it."""
    if issubclass(type(sink), str):
        spec = str.__str__(sink)
        return open_sink(spec, **config), spec.partition(":")[0]
    if config:
        raise ConfigurationError(
            f"{', '.join(config)}: settings go with a specification such as 'jsonl:PATH'; "
            f"give them to the constructor of {name_of(type(sink))} instead"
        )
    if issubclass(type(sink), type) or not all(
        [callable(ask(getattr, sink, name)) for name in ("write", "close")]
    ):
        raise ConfigurationError(
            f"sink: expected an object with write(events) and close(), or a specification such as "
            f"'jsonl:PATH', got {show(sink)}"
        )
    name = name_of(type(sink)).lower().removesuffix("sink") or "sink"
    return sink, name  # type: ignore[return-value]

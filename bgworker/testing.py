"""For tests of what uses bgworker, and of sinks written for it: a sink that remembers, one that
fails on cue, a check.

    def test_my_sink_keeps_the_contract(tmp_path):
        check_sink(lambda: MySink(tmp_path / "events"))

Works with any test framework: all that it does is raise `AssertionError`.
"""

from __future__ import annotations

import gc
import inspect
import os
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from time import sleep

from .delivery.loop import SinkLoop
from .model import records
from .model.clock import monotonic
from .model.errors import PermanentSinkError, TemporarySinkError
from .model.events import Event, LossEvent, StreamEvent
from .model.latch import Latch, News
from .model.text import describe
from .model.threads import own_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from .sinks.base import Sink

    Write = Callable[[Sequence[Event]], None]
    Act = Callable[[Sequence[Event], Write], object]

__all__ = [
    "FlakySink",
    "Hang",
    "MemorySink",
    "Step",
    "check_sink",
    "crawl",
    "fail",
    "partial",
    "work",
]


class MemorySink:
    """Keeps all events in memory, in order, duplicates included. Any thread may read and wait.

    In a forked child it starts empty: what the parent's tasks said is the parent's.
    """

    def __init__(self) -> None:
        self.is_open = False
        """True between ``open`` and ``close``."""
        self.flushes = 0
        """How often it was flushed."""
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()  # guards all below
        self._news = News()
        self._batches: list[list[Event]] = []
        self._pid = os.getpid()

    @property
    def events(self) -> list[Event]:
        """All events so far, in order; a copy."""
        return [event for batch in self.batches for event in batch]

    @property
    def batches(self) -> list[list[Event]]:
        """The events as they came, one list per ``write``; a copy."""
        with self._lock:
            batches = [list(batch) for batch in self._batches]
        return batches

    def wait_for(
        self, condition: int | Callable[[list[Event]], object], timeout: float = 10.0
    ) -> list[Event]:
        """Wait until the sink has what is expected, and return all of its events. Sleeps until a
        ``write`` wakes it.

        Args:
            condition: how many events at least, or a function of all events that returns something
                true.
            timeout: seconds.

        Raises:
            AssertionError: it did not come in time; tells what there is instead.
        """
        until = monotonic() + timeout
        while True:
            with self._lock:
                events, following = self.events, self._news.following
            if condition(events) if callable(condition) else len(events) >= condition:
                return events
            if (left := until - monotonic()) <= 0:
                break
            following.wait(left)
        wanted = "the condition" if callable(condition) else f"{condition} events"
        last = f", the last a {events[-1].type}" if events else ""
        raise AssertionError(
            f"waited {timeout:g} s for {wanted}; there are {len(events)} events{last}"
        )

    def open(self) -> None:
        """Note it; after a fork, begin anew."""
        if self._pid != os.getpid():
            self._start()  # the lock too: a thread that is not here may have held it
        self.is_open = True

    def write(self, events: Sequence[Event]) -> None:
        """Keep the events and wake who waits for them."""
        batch = list(events)
        with self._lock:
            self._batches.append(batch)
            self._news.tell()

    def flush(self) -> None:
        """Count it."""
        self.flushes += 1

    def close(self) -> None:
        """Note it."""
        self.is_open = False


# -- a sink that fails on cue --


class Step:
    """One step of a `FlakySink`'s script: what the next calls do. Write your own, or use `fail`,
    `Hang` and the others.

    Args:
        act: called with the events and the way on: a function that writes events to the sink
            behind.
        times: how many calls it is for; None is for all that follow.
    """

    def __init__(self, act: Act, times: int | None = 1) -> None:
        self.act = act
        self.times = times


def work(times: int | None = 1) -> Step:
    """Let calls through."""
    return Step(lambda events, write: write(events), times)


def fail(
    times: int | None = 1, error: BaseException | Callable[[], BaseException] | None = None
) -> Step:
    """Raise, and take nothing in.

    Args:
        error: an exception, or a function that makes one; None is a `TemporarySinkError`.
            `PermanentSinkError` and unknown exceptions are what delivery treats differently.
    """
    def act(events: Sequence[Event], write: Write) -> None:
        raise _made(error)

    return Step(act, times)


def partial(
    count: int,
    times: int | None = 1,
    error: BaseException | Callable[[], BaseException] | None = None,
) -> Step:
    """Take in the first ``count`` events of a batch, then raise: the sink behind will see them
    again."""
    def act(events: Sequence[Event], write: Write) -> None:
        if count:
            write(list(events)[:count])
        raise _made(error)

    return Step(act, times)


def crawl(
    per_second: float, times: int | None = None, wait: Callable[[float], object] = sleep
) -> Step:
    """Take ``1 / per_second`` seconds for each event.

    Args:
        wait: called with the seconds of each event; a test's own clock, or the ``wait`` of an event
            that ends the test.
    """
    def act(events: Sequence[Event], write: Write) -> None:
        for event in events:
            wait(1 / per_second)
            write([event])

    return Step(act, times)


class Hang(Step):
    """Block until released, then let the call through, or raise.

    Args:
        error: what to raise once released; None lets the call through.

    Always `release` it in the end, else its thread stays for ever.
    """

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__(self._hang)
        self.error = error
        """What it raises once released."""
        self.entered = Latch()
        """Set when a call hangs in it."""
        self._released = Latch()

    def release(self) -> None:
        """Let the call go on; any thread."""
        self._released.set()

    def _hang(self, events: Sequence[Event], write: Write) -> None:
        self.entered.set()
        self._released.wait()
        if self.error is not None:
            raise self.error
        write(events)


class FlakySink:
    """A sink that does what a script says, for tests of what must bear it, and keeps a record of
    both sides.

        hang = Hang()
        sink = FlakySink(fail(3), work(), hang,
                         poison=lambda event: "bad" in getattr(event, "payload", ""))

    The first three writes fail, the next goes through, the next hangs until ``hang.release()``,
    later ones go through.

    Args:
        steps: what the writes do, one after the other; when they are used up, writes go through.
        poison: a batch with an event for which this is true raises a `PermanentSinkError`, before
            any step.
        on_open, on_flush, on_close: steps for the other calls (with no events).
        to: the plain (not async) sink behind it; a `MemorySink` unless given.
    """

    def __init__(
        self,
        *steps: Step,
        poison: Callable[[Event], object] | None = None,
        on_open: Iterable[Step] = (),
        on_flush: Iterable[Step] = (),
        on_close: Iterable[Step] = (),
        to: Sink | None = None,
    ) -> None:
        self.sink: Any = MemorySink() if to is None else to
        """The sink behind: what it has was taken in, acknowledged or not."""
        self.poison = poison
        """May be changed at any time; None when there is no poison."""
        self._lock = threading.Lock()  # guards all below
        self._scripts = {
            "open": _spelled_out(on_open),
            "write": _spelled_out(steps),
            "flush": _spelled_out(on_flush),
            "close": _spelled_out(on_close),
        }
        self._attempts: list[list[Event]] = []
        self._acknowledged: list[Event] = []
        self._calls: list[str] = []

    @property
    def attempts(self) -> list[list[Event]]:
        """What each ``write`` was given, failed ones included; a copy."""
        with self._lock:
            return list(self._attempts)

    @property
    def acknowledged(self) -> list[Event]:
        """The events of all writes that returned, in order; a copy."""
        with self._lock:
            return list(self._acknowledged)

    @property
    def calls(self) -> list[str]:
        """"open", "write", "flush" and "close", in order; a copy."""
        with self._lock:
            return list(self._calls)

    def then(self, *steps: Step) -> None:
        """Add steps to what the writes do; any thread."""
        with self._lock:
            self._scripts["write"] += _spelled_out(steps)

    def recover(self) -> None:
        """Forget the steps that the writes have not come to, and the poison; any thread."""
        with self._lock:
            self._scripts["write"].clear()
            self.poison = None

    def open(self) -> None:
        """Do the next step for opening."""
        self._call("open", (), lambda events: self._pass_on("open"))

    def write(self, events: Sequence[Event]) -> None:
        """Do the next step of the script."""
        seen = list(events)
        with self._lock:
            self._attempts.append(seen)
            poison = self.poison
        if poison is not None and any(map(poison, seen)):
            raise PermanentSinkError("the batch holds an event that is poison to this sink")
        self._call("write", seen, self.sink.write)
        with self._lock:
            self._acknowledged += seen

    def flush(self) -> None:
        """Do the next step for flushing."""
        self._call("flush", (), lambda events: self._pass_on("flush"))

    def close(self) -> None:
        """Do the next step for closing."""
        self._call("close", (), lambda events: self._pass_on("close"))

    def _call(self, what: str, events: Sequence[Event], go_on: Write) -> None:
        with self._lock:
            self._calls.append(what)
            script = self._scripts[what]
            step = script[0] if script else work()
            if script and step.times is not None:
                del script[0]
        step.act(events, go_on)

    def _pass_on(self, what: str) -> None:
        method = getattr(self.sink, what, None)
        if method is not None:
            method()


def _spelled_out(steps: Iterable[Step]) -> list[Step]:
    """Return each step as often as it is for; once if it is for all that follow."""
    return [step for step in steps for _ in range(1 if step.times is None else step.times)]


def _made(error: BaseException | Callable[[], BaseException] | None) -> BaseException:
    if error is None:
        return TemporarySinkError("failing as scripted")
    return error if isinstance(error, BaseException) else error()


# -- does a sink keep the contract? --


def check_sink(
    factory: Callable[[], Sink],
    *,
    read_back: Callable[[Sink], Iterable[Event]] | None = None,
    is_idempotent: bool = False,
    timeout: float = 60.0,
) -> None:
    """Check that a sink keeps the promises of `bgworker.Sink`, by using it as delivery does.

    Sinks from ``factory`` are opened, written to, flushed and closed, one after the other, each on
    a thread of its own: events of every type, odd payloads, batches of one and of many, given
    lazily and as a plain list; a batch that cannot be read; ``open`` again on an open sink, as a
    forked child does. Sync and async sinks are checked alike.

    Args:
        factory: makes a sink; called several times. All of them may use the same file or table,
            which others than this check should not be writing to.
        read_back: returns the events that the sink has taken in, in order, among others perhaps (of
            loss events, none are expected). Called after a flush and after the close, on the thread
            of the check. With it, the check also looks at what arrived.
        is_idempotent: the sink knows events again by ``(task_id, seq)``; checked with ``read_back``
            only.
        timeout: seconds for the whole; a sink that hangs breaks a promise too.

    Raises:
        AssertionError: a promise is broken; the message lists all that were found.
    """
    check = _Check(factory, read_back, is_idempotent)
    thread = own_thread("bgworker-check-sink", check.run)
    thread.start()
    thread.join(timeout)
    broken = list(check.broken)
    if thread.is_alive():
        broken.append(f"{check.step} has not returned: the check took longer than {timeout:g} s")
    if broken:
        raise AssertionError(
            "\n".join(["the sink breaks its contract:", *(f"- {each}" for each in broken)])
        )


class _Lent(Sequence[Event]):
    """A batch that notices when it is kept, or read after it was taken back."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events
        self.is_taken_back = False
        self.was_read_late: list[bool] = []

    def __len__(self) -> int:
        return len(self._events)

    def __getitem__(self, index: Any) -> Any:
        if self.is_taken_back:
            self.was_read_late.append(True)
        return self._events[index]


class _Unreadable(Sequence[Event]):
    """A batch whose second event cannot be had."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events
        self.was_read = False

    def __len__(self) -> int:
        return len(self._events)

    def __getitem__(self, index: Any) -> Any:
        if index != 0:
            self.was_read = True
            raise RuntimeError("this event cannot be read (as planned by check_sink)")
        return self._events[0]


class _Failed(Exception):
    """A call raised where it should not; the rest of this run makes no sense."""


class _Check:
    """What `check_sink` does, all of it on one thread.

    Args: as those of `check_sink`.
    """

    def __init__(
        self,
        factory: Callable[[], Sink],
        read_back: Callable[[Sink], Iterable[Event]] | None,
        is_idempotent: bool,
    ) -> None:
        self.broken: list[str] = []
        """The promises that were found broken."""
        self.step = "the factory"
        """What is being done."""
        self._factory = factory
        self._read_back = read_back
        self._is_idempotent = is_idempotent
        self._written: list[Event] = []

    def run(self) -> None:
        """Use sinks in each way."""
        for scenario in (self._use, self._leave_unused, self._fail):
            self._loop = SinkLoop()
            try:
                scenario()
            except _Failed:
                pass
            except BaseException as error:
                # the thread's boundary: whatever it is, the sink led to it
                self._break(f"{self.step} raised {describe(error)}")
            finally:
                self._loop.close()

    # -- scenarios --

    def _use(self) -> None:
        sink = self._opened()
        try:
            for what, numbered in _sample():
                self._write_in_each_form(sink, what, numbered)
            self._call(sink, "flush")
            if hasattr(sink, "flush"):
                self._compare(sink, "after flush")
            if hasattr(sink, "open"):
                self._call(sink, "open", "open, called again as in a forked child,")
                self._write(sink, "a batch after open was called again", _events(7, 1))
        finally:
            self._call(sink, "close")
        self._compare(sink, "after close")
        if self._is_idempotent and self._read_back is not None:
            self._deliver_again()

    def _deliver_again(self) -> None:
        again = list(self._written)
        sink = self._opened()
        try:
            self._write(sink, "events that came before", again)
        finally:
            self._call(sink, "close")
        kept = Counter(map(_key, self._read(sink)))
        for task_id, seq in map(_key, again):
            if kept[task_id, seq] > 1:
                self._break(
                    f"events that are delivered twice are kept twice: task {task_id}, seq {seq}"
                )
                return

    def _leave_unused(self) -> None:
        sink = self._opened()
        self._call(sink, "close", "close of a sink that was never written to")
        if hasattr(sink, "open"):
            self._call(self._made(), "close", "close of a sink that was never opened")

    def _fail(self) -> None:
        sink = self._opened()
        unreadable = _Unreadable(_events(8, 3))
        self.step = "write of a batch that cannot be read"
        try:
            self._loop.finish(sink.write(unreadable))
        except Exception:
            pass  # as it should
        else:
            if unreadable.was_read:
                self._break(
                    "write swallows exceptions: a batch whose events cannot be read counts as "
                    "delivered"
                )
        try:
            self._write(sink, "a batch after one that failed", _events(9, 1))
        finally:
            self._call(sink, "close", "close after a write that failed")

    # -- steps --

    def _made(self) -> Any:
        self.step = "the factory"
        sink: Any = self._factory()
        faults = []
        if isinstance(sink, type):
            faults.append(
                f"the factory returned the class {sink.__name__}; it should return a sink"
            )
        else:
            for name in ("write", "close", "open", "flush"):
                method = getattr(sink, name, None)
                if method is None and name in ("write", "close"):
                    faults.append(f"it has no method {name}")
                elif method is not None and not callable(method):
                    faults.append(f"{name} is no method")
        if faults:
            self._break(*faults)
            raise _Failed
        batch = getattr(sink, "preferred_batch", None)
        if batch is not None and (type(batch) is not int or batch < 1):
            self._break(f"preferred_batch: expected a whole number >= 1, got {batch!r}")
        return sink

    def _opened(self) -> Any:
        sink = self._made()
        self._call(sink, "open")
        return sink

    def _call(self, sink: Any, name: str, what: str | None = None, *args: object) -> None:
        """Call a method to its end, if the sink has it."""
        method = getattr(sink, name, None)
        if method is None:
            return
        self.step = what or name
        try:
            result = method(*args)
            if result is None or inspect.isawaitable(result):
                self._loop.finish(result)
            else:
                kind = type(result).__name__
                self._break(
                    f"{name} returned {'an' if kind[:1] in 'aeiou' else 'a'} {kind}; it should "
                    "return None, or an awaitable"
                )
        except BaseException as error:  # a third party's code: this is what we are here to tell
            self._break(f"{self.step} raised {describe(error)}")
            raise _Failed from error

    def _write(self, sink: Any, what: str, batch: Sequence[Event]) -> None:
        events = list(batch)  # first: the sink may change the batch
        self._call(sink, "write", f"write of {what}", batch)
        self._written += [event for event in events if not isinstance(event, LossEvent)]

    def _break(self, *faults: str) -> None:
        self.broken += [each for each in faults if each not in self.broken]

    def _write_in_each_form(
        self, sink: Any, what: str, numbered: Sequence[records.Record]
    ) -> None:
        """Write some of the records as the lazy batch that delivery uses, some as a list, the rest
        as a lent batch."""
        third = max(1, len(numbered) // 3)
        self._write(sink, f"{what}, as a lazy batch", records.Batch(numbered[:third]))
        if as_list := [records.event(record) for record in numbered[third : 2 * third]]:
            given = list(as_list)
            self._write(sink, f"{what}, as a list", given)
            if given != as_list:
                self._break("write changes the batch that it is given")
        if rest := numbered[2 * third :]:
            self._lend(sink, what, [records.event(record) for record in rest])

    def _lend(self, sink: Any, what: str, events: list[Event]) -> None:
        lent = _Lent(events)
        self._write(sink, f"{what}, as a sequence", lent)
        lent.is_taken_back = True
        seen, was_read_late = weakref.ref(lent), lent.was_read_late
        del lent
        gc.collect()
        if seen() is not None or was_read_late:
            self._break("write keeps the batch past the call; it may keep a copy of what is in it")

    # -- what arrived --

    def _read(self, sink: Any) -> list[Any]:
        assert self._read_back is not None
        self.step = "read_back"
        return [event for event in self._read_back(sink) if not isinstance(event, LossEvent)]

    def _compare(self, sink: Any, when: str) -> None:
        if self._read_back is None:
            return
        arrived = self._read(sink)
        last: Counter[str] = Counter()
        for event in arrived:
            if event.seq < last[event.task_id]:
                self._break(
                    f"{when}, seq does not ascend in task {event.task_id}: "
                    f"{event.seq} comes after {last[event.task_id]}"
                )
                break
            last[event.task_id] = event.seq
        found = {_key(event): event for event in reversed(arrived)}
        missing = [event for event in self._written if _key(event) not in found]
        if missing:
            self._break(
                f"{when}, {len(missing)} of {len(self._written)} events that write took are not "
                f"there, the first a {missing[0].type}"
            )
        for event in self._written:
            there = _content(found.get(_key(event), event))
            if there != _content(event):
                self._break(
                    f"{when}, an event has changed: {_shown(_content(event))} became "
                    f"{_shown(there)}"
                )
                break


def _shown(content: object) -> str:
    text = ascii(content)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _key(event: Any) -> tuple[str, int]:
    return event.task_id, event.seq


def _content(event: Event) -> tuple[object, ...]:
    if isinstance(event, StreamEvent):
        return event.type, event.stream_type, event.payload, event.percent, event.message
    return (event.type,)


# -- the events that a sink is checked with --

_PAYLOADS = (
    "hello",
    "",
    " ",
    "two\nlines\r\n",
    "\t\x07\x1b[31mred\x1b[0m\x7f",
    "\"quoted\" \\ 'too' %s {} $1 ?",
    "null",
    "gr\xfc\xdfe \u65e5\u672c\u8a9e \u0627\u0644",
    "\U0001f642\ufffd\u2028\u2029\x85",
    "x" * 65_536,
    "'); DROP TABLE tasks; --",
)
_NS = 1_700_000_000_123_456_789


def _state(number: int) -> records.TaskState:
    state = records.TaskState(f"{number:032x}", f"task \u2116{number}", f"{0xbeef:032x}", _NS)
    state.metadata_json = '{"who": "check_sink", "n": [1, null, "\\u00e9"]}'
    return state


def _outputs(task: int, count: int) -> list[records.Record]:
    state = _state(task)
    return [(state, seq, records.OUTPUT, _NS + seq, f"event {seq}") for seq in range(1, count + 1)]


def _events(task: int, count: int) -> list[Event]:
    return [records.event(record) for record in _outputs(task, count)]


def _sample() -> list[tuple[str, list[records.Record]]]:
    """Return what to write: a description, and numbered records in order."""
    lost = "checked", "overflow", 3, {"TaskOutput": 2, "TaskProgress": 1}
    return [
        ("one event", _life(1)[:1]),
        ("events of every type", [*_life(2), (None, 0, records.LOST, _NS, lost)]),
        ("events of a task that failed", _life(3, records.FAILED)),
        ("events of a task that was cancelled", _life(4, records.CANCELLED)),
        ("events of a task that timed out", _life(5, records.TIMED_OUT)),
        ("many events", _outputs(6, 1500)),
    ]


def _life(number: int, end: int = records.COMPLETED) -> list[records.Record]:
    state = _state(number)
    data: list[tuple[int, object]] = [
        (records.CREATED, None),
        (records.SCHEDULED, None),
        (records.STARTED, None),
        (records.PROGRESS, (0.0, "")),
        (records.PROGRESS, (None, "no total \u2026")),
        (records.PROGRESS, (100.0, "ok")),
    ]
    said = [
        *_PAYLOADS,
        ('{"a":[1,2.5,null,"\\u00e9"]}', "json", False, 0),
        ("cut", "text", True, 100_000),
    ]
    for kind in (records.OUTPUT, records.ERROR, records.WARNING, records.VERBOSE):
        data += [(kind, each) for each in said]
    data.append((end, None))
    state.started_ns = _NS + 1000
    state.completed_ns = _NS + 10_000_000
    state.duration = 0.01
    state.timeout = 1.5
    state.status = records.STATUSES[end]
    state.recorded_percent, state.recorded_message = 100.0, "ok"
    if end == records.FAILED:
        state.failure_type, state.failure_message = "ValueError", "no \"such\" thing: \u65e5"
        state.invocation_info = (
            "Traceback (most recent call last):\n  ...\nValueError: no such thing\n"
        )
    elif end == records.CANCELLED:
        state.failure_message = "user"
    elif end == records.COMPLETED:
        state.result = '{"rows":[1,null,"\\u00e9"]}'
    return [(state, seq, kind, _NS + 1000 * seq, each) for seq, (kind, each) in enumerate(data, 1)]

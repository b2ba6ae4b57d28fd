"""The end of the channel that is in a worker process: it carries what bodies say to the parent.

All bodies that run here for one scheduler share a `Channel`. They emit into its intake, which is
the one of threads: an `output` costs what it costs there and never waits. One thread takes from the
intake, numbers the records of each body 1, 2, 3 ... and sends them in batches; another one reads
acknowledgements and requests to stop. What is not acknowledged is kept, up to `BOUND` bytes
together with what waits in the intake; what does not fit is refused and counted.

When a body ends, all of its records that are not acknowledged go into its report. So the parent has
them with the result, whatever happens to the channel, and drops those that it has twice by their
numbers. Between two bodies there is nothing to lose here.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from itertools import count
from math import inf
from multiprocessing import parent_process

from ..delivery.intake import BACKSTOP, RESERVED, SLOT, Intake, cost, cost_of_lines
from ..model.clock import monotonic
from ..model.forks import in_child
from ..model.ids import new_id
from ..model.latch import Latch
from ..model.records import PROGRESS, STARTED
from ..model.reports import report
from ..model.text import ask, describe
from ..model.threads import own_thread
from ..running.context import ask_to_stop
from ..running.deadlines import Deadlines
from .link import BROKEN, Link, connect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Tuple

    from ..model.records import TaskState
    from .messages import Losses, Records, Ticket

    Part = Tuple[int, Records, int]
    """Some records of a body: the number of the first, all of them, and the bytes they count."""

BOUND = 2**24
"""Bytes of memory for all records that are not acknowledged, as `delivery.intake` estimates
them."""

WINDOW = 2**22
"""Bytes that may be on their way without an acknowledgement before no more is sent."""

GATHER = 0.05
"""Seconds that records are let come in before they are sent, as in the dispatcher."""

PATIENCE = 10.0
"""Seconds that the parent may take for each step of the introduction."""

BACKOFF, MOST_BACKOFF = 0.1, 5.0
"""Seconds before the first new attempt to connect, and most; doubled in between."""

FAREWELL = 1.0
"""Seconds during which a channel without bodies tries to connect again, and looks whether the
parent has died."""

CONNECT = 1.0
"""Seconds that the first body of a process waits for the channel before it begins."""

ORPHANED = 5.0
"""Seconds that bodies get to end when the parent has died."""

MOST_STOPS = 10_000
"""Requests to stop tasks that have not begun here which are remembered."""


class Body:
    """A body that runs. What its channel knows of it is guarded by the lock of that.

    Args:
        state: of its task.
        where: tells where it is: the stack of a thread, from its own function inward.
    """

    def __init__(self, state: TaskState, where: Callable[[TaskState, int], str]) -> None:
        self.state = state
        self.where = where
        self.channel: Channel
        self.is_watched = False
        """True when its time is limited here."""
        self.expired = Latch()
        """Set when that is over, and the next is known."""
        self.stack = ""
        """Where it was then."""
        self.attempt = ""
        self.unsent: Records = []
        """Its records that are in no batch yet."""
        self.size = 0
        """Bytes that those count."""
        self.next = 1
        """Number of the first of them."""
        self.is_command = False
        """True when it has said something in blocks of lines, as commands alone do."""


class Channel:
    """See the module. Made by `enter`, which calls `begin`. Any thread may call the methods.

    Args:
        ticket: how to find the parent's `Hub`; None if there is none.
    """

    def __init__(self, ticket: Ticket | None) -> None:
        self.worker = new_id(time.time_ns())
        """Identifies this channel."""
        self.intake = Intake(BOUND // SLOT)
        self.intake.crowded_above = sys.maxsize  # nobody waits for a channel that is not there
        self.deadlines = Deadlines(self._expire, "bgworker-deadlines")
        self.ticket = ticket
        self._news = threading.Condition(threading.Lock())
        """Its lock guards what follows, and sees to it that one thread at a time takes from the
        intake. Held for the time of a batch, never while anything is sent. Tells of
        acknowledgements, and of the end of a link."""
        self._bodies: dict[TaskState, Body] = {}
        self._batches: dict[int, dict[Body, Part]] = {}
        """Those that are not acknowledged, by number, in order."""
        self._under_way = 0
        """Bytes of the records in those."""
        self._waiting = 0
        """Bytes of the records that are in no batch yet."""
        self._losses: Losses = {}
        self._told_losses: Losses = {}
        self._told_start = -inf
        """When the start of a body was last told at once, on the monotonic clock."""
        self._overdue: deque[Body] = deque()
        """Of which the parent is to be told."""
        self._stops: dict[str, str] = {}
        """Of tasks that have not begun here."""
        self._next_batch = count(1).__next__
        self._next_attempt = count(1).__next__
        self._link: Link | None = None
        self._is_open = False
        """True while there is somebody at the other end of that link."""
        self._has_tried = Latch()
        """Set when the first attempt to connect has ended."""
        self._thread: threading.Thread | None = None
        self._is_closed = Latch()
        self._was_heard = False
        """True when the parent has said something since the latest attempt to connect."""
        self._has_complained = False
        self._parent = os.getppid()

    # -- for the bodies --

    def begin(self, body: Body) -> str | None:
        """Let a body speak, and return why it is to stop if that was asked before."""
        with self._news:
            self._bodies[body.state] = body
            body.attempt = f"{self.worker}-{self._next_attempt()}"
            if self.ticket is not None and self._thread is None:
                self._start()
            return self._stops.pop(body.state.id, None)

    def tell_start(self, body: Body, ns: int) -> None:
        """Tell that a body begins, on its own thread and at once: its code may hold the interpreter
        lock for as long as it runs (one long call in C), and then no other thread here says
        anything. The parent sees to its deadline then.

        Without a deadline, one that begins just after another waits for the next batch: to tell
        each at once takes longer than a short body.
        """
        if self._thread is not None:
            self._has_tried.wait(CONNECT)
        link, record, now = self._link, (STARTED, ns, None), monotonic()
        is_urgent = body.state.timeout is not None or now > self._told_start + GATHER
        if link is None or not self._is_open or not is_urgent:
            self.intake.emit_lifecycle(body.state, STARTED, ns)
            return
        self._told_start = now
        with self._news:
            number = self._next_batch()
            self._batches[number] = {body: (1, [record], SLOT)}
            self._under_way += SLOT
            body.next = 2
        try:
            if link.send(("said", number, [(body.state.id, body.attempt, 1, [record])], {}), False):
                return
        except BROKEN:
            pass  # the next link may be open already, and not know of this batch
        with self._news:  # another one speaks, or it broke
            if self._batches.pop(number, None) is None:
                return  # it was told all the same, and acknowledged
            self._under_way -= SLOT
            body.next = 1
        self.intake.emit_lifecycle(body.state, STARTED, ns)

    def end(self, body: Body) -> tuple[int, Records, Losses]:
        """Let a body speak no more. Returns the number of its first record that is not
        acknowledged, all from there on, and the totals of what was refused so far."""
        with self._news:
            for _ in range(self.intake.turns):
                self._take()
            # What a command says waits for the sinks of there. In its report it could not: others
            # wait for that.
            while (body.is_command and self._is_open and body.state.stop_reason is None
                   and (body.unsent or any([body in each for each in self._batches.values()]))):
                self.intake.hurry()
                self._news.wait(BACKSTOP)
            first = body.next
            records: Records = []
            for parts in self._batches.values():
                number, part, size = parts.pop(body, (first, [], 0))
                first = min(first, number)
                records += part
                self._under_way -= size
            records += body.unsent
            self._waiting -= body.size
            self._allow()
            del self._bodies[body.state]
            return first, records, dict(self._losses)

    def close(self) -> None:
        """End the threads, without waiting for them."""
        self._is_closed.set()
        self.deadlines.stop()
        self._break(self._link)

    def discard(self) -> None:
        """In a forked child, where no other thread is: have the bodies be silent, and close what
        was inherited."""
        self.intake.close()
        self._news = threading.Condition(threading.Lock())  # nobody may be there to release it
        if self._link is not None:
            self._link.discard()

    def is_unused(self) -> bool:
        """Tell whether no body runs."""
        return not self._bodies

    # -- under the lock --

    def _start(self) -> None:
        self._thread = own_thread("bgworker-channel", self._run)
        try:
            self._thread.start()
        except (RuntimeError, MemoryError):
            # none to be had, as at the exit: what is said comes with the report
            self._thread = None

    def _take(self) -> None:
        """Take some records from the intake."""
        last: TaskState | None = None
        body: Body | None = None
        for state, kind, ns, data in self.intake.take():
            if state is not last:
                last = state
                body = self._bodies.get(state) if state is not None else None
            if body is None:  # its body has ended: a thread was left behind
                lines = len(data) if data.__class__ is list else 1
                self._losses[kind, "late"] = self._losses.get((kind, "late"), 0) + lines
                continue
            body.unsent.append((kind, ns, data))
            if data.__class__ is list:
                body.is_command = True
                size = cost_of_lines(data)
            else:
                size = cost(kind, data) if kind >= PROGRESS else SLOT
            body.size += size
            self._waiting += size
        for kind, reason, total in self.intake.take_refusals():
            if total:
                self._losses[kind, reason] = total
        self._allow()

    def _allow(self) -> None:
        """Have the intake take so much less as is held here."""
        self.intake.allow(BOUND - RESERVED * SLOT - self._under_way - self._waiting)

    # -- the thread that sends --

    def _run(self) -> None:
        backoff, until = BACKOFF, monotonic() + FAREWELL
        while not self._is_closed.is_set():
            try:
                self._speak()
                until = monotonic() + FAREWELL
            except Exception as error:  # the thread's boundary: bodies go on without a channel
                if self._bodies and monotonic() > until and not self._has_complained:
                    self._has_complained = True
                    report(logging.WARNING, "no channel from this process to the scheduler, so "
                           "events come with the results: %s", describe(error))
            self._has_tried.set()
            if self._is_orphan():
                self._end_process()
            if monotonic() > until and _forget(self):
                return
            self._is_closed.wait(backoff if self._bodies else BACKOFF)
            backoff = BACKOFF if self._was_heard else min(2 * backoff, MOST_BACKOFF)

    def _speak(self) -> None:
        """Connect, and send until the link breaks.

        Raises:
            Exception: there was none to be had. That one breaks later is no error.
        """
        assert self.ticket is not None
        self._was_heard = False
        address, key, _ = self.ticket
        link = self._link = connect(address, PATIENCE)
        try:
            link.prove(key, accepts=False)
            link.send(("hello", self.worker, os.getpid(), socket.gethostname()))
            link.trust()
            reader = own_thread("bgworker-acks", self._listen, link)
            reader.start()
        except BaseException:
            link.close()
            raise
        self.intake.crowded_above = BOUND // SLOT // 8
        try:
            for number in list(self._batches):
                self._send(link, number)
            self._is_open = True
            self._has_tried.set()
            self._send_all(link)
        except BROKEN:
            pass
        finally:
            self._is_open = False
            self.intake.crowded_above = sys.maxsize
            self._break(link)
            reader.join()

    def _send_all(self, link: Link) -> None:
        is_flowing = False
        while not link.is_cut:
            if not is_flowing:
                self.intake.wait(BACKSTOP)
            self.intake.gather(GATHER)
            is_flowing = False
            for _ in range(self.intake.turns):
                if (number := self._make_batch()) is not None:
                    is_flowing = True
                    self._send(link, number)
                    self._wait_for_window(link)
            while self._overdue:
                body = self._overdue.popleft()
                link.send(("overdue", body.state.id, body.attempt, body.stack))

    def _wait_for_window(self, link: Link) -> None:
        with self._news:
            while self._under_way >= WINDOW and not link.is_cut:
                self._news.wait(BACKSTOP)

    def _make_batch(self) -> int | None:
        """Make a batch of what is there; None if there is nothing to tell."""
        with self._news:
            self._take()
            parts = {body: (body.next, body.unsent, body.size)
                     for body in self._bodies.values() if body.unsent}
            if not parts and self._losses == self._told_losses:
                return None
            for body, (_, records, size) in parts.items():
                body.next += len(records)
                body.unsent, body.size = [], 0
                self._under_way += size
                self._waiting -= size
            self._told_losses = dict(self._losses)
            number = self._next_batch()
            self._batches[number] = parts
            return number

    def _send(self, link: Link, number: int) -> None:
        with self._news:
            parts = [(body.state.id, body.attempt, first, records)
                     for body, (first, records, _) in self._batches.get(number, {}).items()]
            losses = dict(self._losses)
        link.send(("said", number, parts, losses))

    def _is_orphan(self) -> bool:
        """Tell whether this is a process of the parent's, which has died. Others go on: their
        engine decides."""
        parent = parent_process()
        if parent is None or self.ticket is None or parent.pid != self.ticket[2]:
            return False
        # A sibling that was forked later may hold the end of the pipe that ``is_alive`` looks at.
        if os.getppid() != self._parent:
            return True
        try:
            return not parent.is_alive()
        except ValueError:  # loky starts its processes in a way of its own, without that pipe
            return False

    def _end_process(self) -> None:
        """End a process that would wait for ever for a parent that has died."""
        for state in list(self._bodies):
            ask_to_stop(state, "parent died")
        until = monotonic() + ORPHANED
        while self._bodies and monotonic() < until:
            time.sleep(0.05)
        os._exit(1)

    # -- the thread of the deadlines --

    def _expire(self, body: Body, thread: int) -> None:
        try:
            body.stack = ask(body.where, body.state, thread) or ""
            self._overdue.append(body)
            self.intake.hurry()
            ask_to_stop(body.state, "timeout")
        finally:
            body.expired.set()

    # -- the thread that reads --

    def _listen(self, link: Link) -> None:
        try:
            while True:
                kind, *rest = link.receive()
                self._was_heard, self._has_complained = True, False
                if kind == "ack":
                    self._acknowledge(*rest)
                elif kind == "stop":
                    self._stop(*rest)
        except (OSError, EOFError):
            pass
        except Exception as error:
            report(logging.WARNING, "the scheduler sent what cannot be read: %s", describe(error))
        finally:
            self._break(link)
            link.close()

    def _break(self, link: Link | None) -> None:
        """Cut a link, and let go the thread that sends on it."""
        if link is not None:
            link.cut()
        with self._news:
            self._news.notify_all()
        self.intake.hurry()

    def _acknowledge(self, number: int) -> None:
        with self._news:
            for _, _, size in self._batches.pop(number, {}).values():
                self._under_way -= size
            self._allow()
            self._news.notify_all()

    def _stop(self, task_id: str, reason: str) -> None:
        with self._news:
            states = [state for state in self._bodies if state.id == task_id]
            if not states:
                self._stops[task_id] = reason
                if len(self._stops) > MOST_STOPS:
                    del self._stops[next(iter(self._stops))]
        for state in states:
            ask_to_stop(state, reason)


_channels: dict[Ticket | None, Channel] = {}
_lock = threading.Lock()
"""Guards the channels, and that none leaves while a body begins."""


def enter(ticket: Ticket | None, body: Body) -> str | None:
    """Give a body the channel for a ticket, and return why it is to stop if that was asked
    before."""
    with _lock:
        channel = _channels.get(ticket)
        if channel is None:
            channel = _channels[ticket] = Channel(ticket)
        body.channel = channel
        return channel.begin(body)


def leave(body: Body) -> tuple[int, Records, Losses]:
    """End a body; returns what `Channel.end` does."""
    rest = body.channel.end(body)
    if body.channel.ticket is None:
        _forget(body.channel)
    return rest


def close_all() -> None:
    """End the threads of all channels, without waiting for them."""
    for channel in list(_channels.values()):
        channel.close()


def _forget(channel: Channel) -> bool:
    """Forget a channel if no body runs; False if one does."""
    with _lock:
        if channel.is_unused():
            if _channels.get(channel.ticket) is channel:
                del _channels[channel.ticket]
            channel.deadlines.stop()
            return True
        return False


@in_child
def _start_afresh() -> None:
    """In a forked child: its channels are its parent's."""
    global _lock
    _lock = threading.Lock()
    for channel in _channels.values():
        channel.discard()
    _channels.clear()

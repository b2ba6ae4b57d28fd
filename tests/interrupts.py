"""Interrupts, as Ctrl-C is one, at a step of one's choice.

No test is in here.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import bgworker

OURS = os.path.dirname(bgworker.__file__)
THREADING = threading.__file__


class AtStep:
    """A trace function that does something once, before the n-th step of bgworker's own code on
    this thread; ``everywhere`` adds that of `threading`.

    A step is where the interpreter looks for interrupts: after a call, at the start of a function,
    at the end of a loop.
    """

    def __init__(
        self,
        number: int,
        action: Callable[[], object],
        inside: tuple[str, ...] = (),
        everywhere: bool = False,
    ) -> None:
        self.left = number
        self.places = (OURS, THREADING) if everywhere else (OURS,)
        self.action = action
        self.inside = inside
        self.struck = ""
        self.before: dict[Any, str] = {}

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if (
            not frame.f_code.co_filename.startswith(self.places)
            or self.inside
            and frame.f_code.co_name not in self.inside
        ):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.step

    def step(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "opcode" and not self.struck:
            now = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            before, self.before[frame] = self.before.get(frame, ""), now
            if now in ("RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE") or before.startswith("CALL"):
                self.left -= 1
                if self.left < 0:
                    self.struck = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                    self.action()
        return self.step


@contextlib.contextmanager
def traced(steps: AtStep) -> Iterator[None]:
    before = sys.gettrace()
    gc.disable()  # a finaliser that happens to run here is not meant
    sys.settrace(steps)
    try:
        yield
    finally:
        sys.settrace(before)
        gc.enable()


class Interrupt(BaseException):
    """As Ctrl-C, but nothing that pytest would stop for."""


def interrupt() -> None:
    raise Interrupt


def interrupt_late() -> None:
    """Let other threads run first, as far as they can."""
    time.sleep(0.005)
    raise Interrupt


one_step_at_a_time = pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="3.12 does not trace single opcodes so"
)

each_step = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="later ones do not trace every opcode"
)
"""Of the tests that use `every_step`; in an interpreter that does, the steps are the same."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Have a real signal raise `Interrupt` in the main thread after some time, unless the block
    ends before."""
    before = signal.signal(signal.SIGALRM, lambda *_: interrupt())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


needs_signals = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs SIGALRM")


def every_step(
    act: Callable[[], object], *, everywhere: bool = False, inside: tuple[str, ...] = ()
) -> Iterator[str]:
    """Call ``act`` again and again, interrupted one step later each time, until it was not; yield
    where, after each."""
    number = 0
    while True:
        steps = AtStep(number, interrupt, inside, everywhere)
        with contextlib.suppress(Interrupt), traced(steps):
            act()
        yield f"step {number}, in {steps.struck}"
        if not steps.struck:
            break
        number += 1
    assert number, "nothing of ours was interrupted"

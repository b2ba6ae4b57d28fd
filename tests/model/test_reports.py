"""The guarded door to the log: nobody who reports waits for a handler, or suffers from one."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator

import pytest

from bgworker.model.reports import MOST_LINES, report, wait_for_reports

SOON = 30.0
logger = logging.getLogger("bgworker")


class Handler(logging.Handler):
    """Notes what comes in; blocks, or raises, when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.entered = threading.Event()
        self.error: BaseException | None = None

    def handle(self, record: logging.LogRecord) -> bool:
        self.entered.set()
        assert self.may_go_on.wait(SOON)
        if self.error is not None:
            raise self.error
        self.said.append(record.getMessage())
        return True


@pytest.fixture
def handler() -> Iterator[Handler]:
    made = Handler()
    logger.addHandler(made)
    try:
        yield made
    finally:
        made.may_go_on.set()
        wait_for_reports(time.monotonic() + SOON)
        logger.removeHandler(made)


def test_lines_come_to_the_handlers_in_order_from_any_thread(handler: Handler) -> None:
    for number in range(100):
        report(logging.WARNING, "line %d of %s", number, "it")
    wait_for_reports(time.monotonic() + SOON)
    assert handler.said == [f"line {number} of it" for number in range(100)]


@pytest.mark.parametrize(
    "error", [ValueError("boom"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()]
)
def test_a_handler_that_raises_costs_its_line_only(handler: Handler, error: BaseException) -> None:
    handler.error = error
    report(logging.ERROR, "first")
    wait_for_reports(time.monotonic() + SOON)
    handler.error = None
    report(logging.ERROR, "second")
    wait_for_reports(time.monotonic() + SOON)
    assert handler.said == ["second"]


def test_nobody_waits_for_a_handler_that_blocks_and_what_waits_is_bounded(handler: Handler) -> None:
    handler.may_go_on.clear()
    report(logging.ERROR, "blocks")
    assert handler.entered.wait(SOON)
    for number in range(2 * MOST_LINES):
        report(logging.ERROR, "%d", number)
    wait_for_reports(time.monotonic() + 0.01)  # comes back though the handler does not
    assert handler.said == []
    handler.may_go_on.set()
    wait_for_reports(time.monotonic() + SOON)
    assert handler.said == ["blocks", *map(str, range(MOST_LINES))]


def test_a_handler_that_reports_itself_blocks_nobody(handler: Handler) -> None:
    class Chatty(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            if record.getMessage() == "once":
                report(logging.ERROR, "again")
                wait_for_reports(time.monotonic() + 0.01)
            return True

    chatty = Chatty()
    logger.addHandler(chatty)
    try:
        report(logging.ERROR, "once")
        wait_for_reports(time.monotonic() + SOON)
    finally:
        logger.removeHandler(chatty)
    assert handler.said == ["once", "again"]


def test_where_no_thread_starts_the_lines_come_all_the_same(handler: Handler) -> None:
    before = threading.stack_size(1 << 46)  # more than any machine has
    try:
        with pytest.raises(RuntimeError):
            threading.Thread(target=print).start()
        report(logging.ERROR, "said")
    finally:
        threading.stack_size(before)
    assert handler.said == ["said"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_reports_though_the_parents_handler_blocked_at_the_fork(
    handler: Handler,
) -> None:
    handler.may_go_on.clear()
    report(logging.ERROR, "the parent's")
    assert handler.entered.wait(SOON)
    child = os.fork()
    if child == 0:
        logger.handlers = [other := Handler()]
        report(logging.ERROR, "the child's")
        wait_for_reports(time.monotonic() + SOON)
        os._exit(0 if other.said == ["the child's"] else 1)
    assert os.waitpid(child, 0)[1] == 0

"""How our own threads begin."""

from __future__ import annotations

import contextvars
import threading

from bgworker.model.threads import own_thread

SOON = 30.0


def test_a_thread_of_ours_sees_no_context_variable_of_who_starts_it() -> None:
    variable = contextvars.ContextVar("variable", default="empty")
    seen: list[object] = []
    variable.set("the starter's")
    thread = own_thread("mine", lambda *args: seen.append((variable.get(), *args)), 1, 2)
    thread.start()
    thread.join(SOON)
    assert not thread.is_alive()
    assert (seen, thread.name, thread.daemon) == ([("empty", 1, 2)], "mine", True)


def test_threads_of_ours_run_at_the_same_time() -> None:
    both = threading.Barrier(2)
    threads = [own_thread(str(number), both.wait, SOON) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert not both.broken

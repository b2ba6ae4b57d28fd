"""Whatever happens to tasks in whatever order: each is numbered without a gap, ends once, and as
its future says."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import Any

from hypothesis import HealthCheck, given, settings, strategies as st

from bgworker import LifecycleEvent, Scheduler, Task, TaskCancelled, TaskTimedOut, current_task
from bgworker.testing import MemorySink

LONG = 30.0


class Steered:
    """The body of a task that does as it is told, step by step, from outside."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.ending = "return"

    def __call__(self) -> str:
        context = current_task()
        context.output("begin")
        context.progress(10)
        context.progress(10.1)
        if self.ending == "sleep":
            context.sleep(LONG)
        assert self.let_go.wait(LONG)
        context.output("end")
        if self.ending == "raise":
            raise ValueError("told to")
        if self.ending == "stop":
            raise TaskCancelled("told to")
        if self.ending == "look":
            context.checkpoint()
        return self.ending


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.sampled_from(["return", "raise", "stop", "look", "sleep", "timeout"]),
        ),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("finish"), st.integers(0, 30)),
        st.tuples(st.just("resize"), st.integers(1, 4)),
        st.tuples(st.just("flush"), st.just(0)),
    ),
    min_size=1,
    max_size=40,
)


def outcome(task: Task[Any]) -> str:
    try:
        task.result(LONG)
    except CancelledError:
        return "TaskCancelled"
    except TaskTimedOut:
        return "TaskTimedOut"
    except ValueError:
        return "TaskFailed"
    return "TaskCompleted"


STATUS = {
    "TaskCancelled": "cancelled",
    "TaskTimedOut": "timed_out",
    "TaskFailed": "failed",
    "TaskCompleted": "completed",
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(ACTIONS, st.integers(1, 3), st.booleans())
def test_every_task_is_numbered_without_a_gap_and_ends_once_as_its_future_says(
    actions: list[tuple[str, Any]], workers: int, cancel_rest: bool
) -> None:
    sink = MemorySink()
    tasks: list[tuple[Task[Any], Steered]] = []
    pool = Scheduler(workers, sinks=[sink], keep_finished=3)
    for action, value in actions:
        if action == "submit":
            steered = Steered()
            steered.ending = value
            tasks.append(
                (
                    pool.options(timeout=0.005 if value == "timeout" else None).submit(steered),
                    steered,
                )
            )
        elif action == "resize":
            pool.resize(value)
        elif action == "flush":
            assert pool.flush(LONG)
        elif tasks:
            task, steered = tasks[value % len(tasks)]
            if action == "finish":
                steered.let_go.set()
            else:
                task.cancel()
    if cancel_rest:
        pool.shutdown(wait=False, cancel_futures=True)
    for task, steered in tasks:
        steered.let_go.set()
        if steered.ending == "sleep":
            task.cancel()
    outcomes = [outcome(task) for task, _ in tasks]
    pool.shutdown()
    assert [task.status for task, _ in tasks] == [STATUS[each] for each in outcomes]
    for (task, _), end in zip(tasks, outcomes):
        check(
            task,
            end,
            [each for each in sink.events if getattr(each, "task_id", None) == task.id],
        )
    assert len(pool.tasks()) == min(3, len(tasks))
    health = pool.sinks["memory"]
    assert (health.emitted, health.pending, health.dropped) == (len(sink.events), 0, 0)


def check(task: Task[Any], end: str, events: list[Any]) -> None:
    names = [each.type.value for each in events]
    assert [each.seq for each in events] == list(range(1, len(events) + 1))
    assert names[:2] == ["TaskCreated", "TaskScheduled"] and names[-1] == end
    assert sum(each.type.is_terminal for each in events) == 1
    assert isinstance(events[-1], LifecycleEvent) and events[-1].task == task.snapshot()
    assert events[-1].task.last_seq == len(events)
    if "TaskStarted" in names:
        assert names[2] == "TaskStarted" and names.count("TaskStarted") == 1
    else:
        assert names == ["TaskCreated", "TaskScheduled", "TaskCancelled"]
    if end in ("TaskCompleted", "TaskFailed"):
        assert names[3:-1].count("TaskProgress") == 2 and names[3:-1].count("TaskOutput") == 2

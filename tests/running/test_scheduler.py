"""The `Scheduler` as a whole: a drop-in for ``ThreadPoolExecutor`` that tells exactly what its
tasks did."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import inspect
import json
import math
import queue
import re
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from bgworker import (
    BgworkerError,
    ConfigurationError,
    LifecycleEvent,
    PendingFull,
    Scheduler,
    ShutdownError,
    SinkError,
    Task,
    TaskCancelled,
    TaskSnapshot,
    TaskStatus,
    TaskTimedOut,
    checkpoint,
    current_task,
)
from bgworker.model.records import TaskState
from bgworker.testing import MemorySink
from tests.support import ROOT, Gate, RecordingSink, fail, until

LONG = 30.0


@pytest.fixture
def recorder() -> RecordingSink:
    return RecordingSink()


def blocked(pool: Scheduler, workers: int = 1) -> Gate:
    """Occupy that many workers until the gate is opened."""
    gate = Gate()
    barrier = threading.Barrier(workers + 1)
    for _ in range(workers):
        pool.submit(lambda: (barrier.wait(LONG), gate()))
    barrier.wait(LONG)
    return gate


def echo(*args: object, **kwargs: object) -> tuple[tuple[object, ...], dict[str, object]]:
    return args, kwargs


# -- submit, options, map --


def test_submit_passes_every_argument_to_the_function_whatever_its_name(pool: Scheduler) -> None:
    kwargs: dict[str, Any] = {
        "name": "n",
        "timeout": 0.001,
        "metadata": 1,
        "fn": 2,
        "self": 3,
        "sinks": 4,
        "reason": "r",
        "capture_output": 5,
        "options": 6,
        "task": 7,
        "function": 8,
        "context": 9,
        "args": 10,
    }
    assert pool.submit(echo, 1, 2, **kwargs).result(LONG) == ((1, 2), kwargs)
    assert pool.options(name="given").submit(echo, 1, **kwargs).result(LONG) == ((1,), kwargs)


def test_a_scheduler_is_an_executor_and_its_tasks_run_on_named_threads() -> None:
    with Scheduler(1, name="jobs") as pool:
        assert isinstance(pool, Executor)
        name = pool.submit(lambda: threading.current_thread().name).result(LONG)
    assert name.startswith("jobs_")


def test_map_keeps_the_order_and_cancels_the_rest_when_its_time_runs_out(pool: Scheduler) -> None:
    assert list(pool.map(pow, range(5), [2] * 5)) == [0, 1, 4, 9, 16]
    assert list(
        pool.options(name="squares", timeout=LONG).map(pow, range(5), [2] * 5, timeout=LONG)
    ) == [0, 1, 4, 9, 16]
    assert [each.name for each in pool.tasks()].count("squares") == 5
    gate = Gate()
    with Scheduler(1) as one:
        results = one.map(lambda each: gate(), range(3), timeout=0.05)
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)
        assert len(one.tasks(status="cancelled")) == 2
        gate.open()


def test_map_raises_what_the_function_raised(pool: Scheduler) -> None:
    with pytest.raises(ZeroDivisionError):
        list(pool.map(lambda each: 1 // each, [1, 0]))


@pytest.mark.parametrize(("settings", "message"), [
    ({"timeout": 0}, "timeout: expected a number > 0 or None, got 0"),
    ({"timeout": -1}, "timeout: expected a number > 0 or None, got -1"),
    ({"timeout": "5"}, "timeout: expected a number > 0 or None, got '5'"),
    ({"timeout": True}, "timeout: expected a number > 0 or None, got True"),
    ({"timeout": float("nan")}, "timeout: expected a number > 0 or None, got nan"),
    ({"name": 5}, "name: expected a str or None, got 5"),
    ({"metadata": [1]}, "metadata: expected a mapping of JSON values, got [1]")])
def test_wrong_options_are_refused_with_their_value_and_what_was_expected(
    pool: Scheduler, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        pool.options(**settings)
    assert str(caught.value) == message and isinstance(caught.value, (ValueError, BgworkerError))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_workers": 0}, "max_workers must be greater than 0, got 0"),
        ({"max_workers": 1.5}, "max_workers: expected a whole number, got 1.5"),
        ({"max_pending": 0}, "max_pending: expected a whole number >= 1 or None, got 0"),
        ({"keep_finished": -1}, "keep_finished: expected a whole number >= 0 or None, got -1"),
        ({"keep_seconds": -1.0}, "keep_seconds: expected a number >= 0 or None, got -1.0"),
        ({"close_timeout": None}, "close_timeout: expected a number >= 0, got None"),
        ({"max_payload": 10}, "max_payload: expected a whole number >= 64, got 10"),
        ({"oversize": "drop"}, "oversize: expected 'truncate' or 'reject', got 'drop'"),
        ({"progress_interval": -0.1}, "progress_interval: expected a number >= 0, got -0.1"),
        ({"progress_step": 0}, "progress_step: expected a number > 0, got 0"),
        (
            {"sinks": "jsonl:x"},
            "sinks: expected a list of sinks or specifications, got the string 'jsonl:x'; "
            "write ['jsonl:x']",
        ),
    ],
)
def test_wrong_settings_are_refused_with_their_value_and_what_was_expected(settings: dict[str, Any],
                                                                           message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Scheduler(**settings)
    assert str(caught.value) == message


def test_an_initializer_that_cannot_be_called_is_a_type_error_as_in_the_standard_library() -> None:
    with pytest.raises(TypeError, match="initializer"):
        Scheduler(initializer=5)  # type: ignore[arg-type]


def test_a_name_of_odd_characters_is_cleaned_and_bounded(pool: Scheduler) -> None:
    assert pool.options(name="a\0b\ud800").submit(len, "").name == "a�b�"
    assert len(pool.options(name="x" * 5000).submit(len, "").name) == 1024


# -- events: which, in what order, and what they know --

START = ["TaskCreated", "TaskScheduled", "TaskStarted"]


def played(work: Callable[[], object], recorder: RecordingSink, **options: Any) -> Task[Any]:
    with Scheduler(1, sinks=[recorder]) as pool:
        task = pool.options(**options).submit(work)
        assert task.wait(LONG)
    return task


def test_a_completed_tasks_events_are_exactly_these(recorder: RecordingSink) -> None:
    def work() -> None:
        current_task().output("a")
        current_task().progress(50)
        current_task().error("b")

    task = played(work, recorder)
    assert recorder.types(task) == [
        *START,
        "TaskOutput",
        "TaskProgress",
        "TaskError",
        "TaskCompleted",
    ]
    assert [each.seq for each in recorder.of(task)] == list(range(1, 8))
    assert recorder.closed.is_set() and len(recorder.events) == 7


def test_a_failed_tasks_last_event_tells_what_it_raised_and_where(recorder: RecordingSink) -> None:
    task = played(lambda: fail(KeyError("missing")), recorder)
    assert recorder.types(task) == [*START, "TaskFailed"]
    end = recorder.of(task)[-1].task
    assert (end.status, end.failure_type, end.failure_message) == (
        TaskStatus.FAILED,
        "KeyError",
        "'missing'",
    )
    assert (
        end.invocation_info.startswith("Traceback (most recent call last):")
        and "in fail" in end.invocation_info
    )
    assert end.invocation_info.rstrip().endswith("KeyError: 'missing'")


def test_a_task_cancelled_before_its_start_was_never_started(recorder: RecordingSink) -> None:
    with Scheduler(1, sinks=[recorder]) as pool:
        gate = blocked(pool)
        task = pool.submit(len, "")
        assert task.cancel("changed my mind")
        gate.open()
    assert recorder.types(task) == ["TaskCreated", "TaskScheduled", "TaskCancelled"]
    end = recorder.of(task)[-1].task
    assert (end.started_utc, end.duration, end.failure_type, end.failure_message) == (
        None,
        None,
        None,
        "changed my mind",
    )
    assert end.completed_utc is not None


def test_a_task_cancelled_while_it_runs_has_a_duration_and_a_reason(
    recorder: RecordingSink,
) -> None:
    task = played(lambda: fail(TaskCancelled("enough")), recorder)
    assert recorder.types(task) == [*START, "TaskCancelled"]
    end = recorder.of(task)[-1].task
    assert end.duration is not None and (end.failure_type, end.failure_message) == (None, "enough")


def test_a_timed_out_tasks_last_event_tells_so_and_what_comes_later_is_discarded_and_counted(
    recorder: RecordingSink,
) -> None:
    with Scheduler(1, sinks=[recorder]) as pool:
        gate = Gate()

        def work() -> int:
            current_task().output("in time")
            gate()
            current_task().output("too late")
            current_task().progress(100)
            return 5

        task = pool.options(timeout=0.05).submit(work)
        assert isinstance(task.exception(LONG), TaskTimedOut)
        gate.open()
        pool.submit(len, "").result(LONG)
        until(lambda: pool.health().stuck == ())
        pool.flush(LONG)
        assert pool.health().late_events == 2
        assert task.status is TaskStatus.TIMED_OUT and isinstance(task.exception(0), TaskTimedOut)
    assert recorder.types(task) == [*START, "TaskOutput", "TaskTimedOut"]
    end = recorder.of(task)[-1].task
    assert (end.status, end.duration, end.timeout, end.failure_type) == (
        TaskStatus.TIMED_OUT,
        0.05,
        0.05,
        "TaskTimedOut",
    )


def test_a_task_whose_worker_cannot_be_initialized_fails_without_a_start(
    recorder: RecordingSink, caplog: pytest.LogCaptureFixture
) -> None:
    held = threading.Event()

    def initializer() -> None:
        assert held.wait(LONG)
        raise ValueError("no database")

    with Scheduler(1, sinks=[recorder], initializer=initializer) as pool:
        tasks = [pool.submit(len, "") for _ in range(3)]
        held.set()
        for task in tasks:
            assert isinstance(task.exception(LONG), BrokenExecutor) and "no database" in str(
                task.exception()
            )
        with pytest.raises(BrokenExecutor, match="no database"):
            pool.submit(len, "")
    for task in tasks:
        assert recorder.types(task) == ["TaskCreated", "TaskScheduled", "TaskFailed"]
    assert "exception in the pool's initializer" in caplog.text


def test_snapshots_know_nothing_that_happened_later(recorder: RecordingSink) -> None:
    def work() -> None:
        current_task().progress(40, message="so far")
        raise ValueError("boom")

    task = played(work, recorder, timeout=60.0, metadata={"a": [1]})
    created, scheduled, started, ended = (
        each.task for each in recorder.of(task) if isinstance(each, LifecycleEvent)
    )
    assert [each.status for each in (created, scheduled, started, ended)] == [
        "created",
        "scheduled",
        "running",
        "failed",
    ]
    assert [each.last_seq for each in (created, scheduled, started, ended)] == [1, 2, 3, 5]
    assert [each.scheduled_utc is None for each in (created, scheduled, started, ended)] == [
        True,
        False,
        False,
        False,
    ]
    assert [each.started_utc is None for each in (created, scheduled, started, ended)] == [
        True,
        True,
        False,
        False,
    ]
    for early in (created, scheduled, started):
        assert (
            early.completed_utc,
            early.duration,
            early.last_progress_percent,
            early.last_progress_message,
            early.failure_type,
            early.failure_message,
            early.invocation_info,
        ) == (None,) * 7
    assert (ended.last_progress_percent, ended.last_progress_message) == (40, "so far")
    for each in (created, scheduled, started, ended):
        assert (
            each.timeout == 60.0
            and each.metadata == {"a": [1]}
            and each.task_id == task.id
            and each.name == task.name
        )
    assert ended == task.snapshot()


def test_times_are_aware_ascend_and_agree_with_the_events(recorder: RecordingSink) -> None:
    task = played(lambda: time.sleep(0.02), recorder)
    end = recorder.of(task)[-1].task
    assert (
        end.created_utc <= end.started_utc <= end.completed_utc
        and end.created_utc.utcoffset() == timedelta(0)
    )
    assert [each.created_utc for each in recorder.of(task)] == [
        end.created_utc,
        end.scheduled_utc,
        end.started_utc,
        end.completed_utc,
    ]
    assert end.duration >= 0.015


def test_no_live_object_sits_in_an_event(recorder: RecordingSink) -> None:
    class Live(Exception):
        pass

    error = Live("x")
    followed = weakref.ref(error)
    task = played(
        functools.partial(fail, error), recorder, metadata={"key": Live}, record_arguments=True
    )
    del error, task
    gc.collect()
    assert followed() is None and recorder.events


def test_the_record_of_source_and_arguments_is_switched_on_per_scheduler_or_per_task(
    recorder: RecordingSink,
) -> None:
    with Scheduler(1, sinks=[recorder], record_source=True, record_arguments=True) as pool:
        on = pool.submit(echo, 1, "zwei", drei={3})
        off = pool.options(record_source=False, record_arguments=False).submit(echo, 1)
    for event in recorder.of(on):
        assert json.loads(event.task.arguments) == {"args": [1, "zwei"], "kwargs": {"drei": [3]}}
        assert event.task.script_text.startswith("def echo(")
    for event in recorder.of(off):
        assert (event.task.arguments, event.task.script_text) == (None, None)
        assert event.task.script_hash == recorder.of(on)[0].task.script_hash
    with Scheduler(1) as plain:
        switched = (
            plain.options(record_source=True, record_arguments=True).submit(echo, 1).snapshot()
        )
        assert switched.arguments == '{"args":[1],"kwargs":{}}' and switched.script_text
        assert plain.submit(echo).snapshot().arguments is None


def test_arguments_are_recorded_as_they_were_at_submit_and_bounded() -> None:
    with Scheduler(1, record_arguments=True, max_payload=64) as pool:
        gate, argument = blocked(pool), [1]
        task = pool.submit(argument.append, 2)
        long = pool.submit(echo, "x" * 1000)
        gate.open()
        task.result(LONG)
        assert task.snapshot().arguments == '{"args":[2],"kwargs":{}}'
        assert len(long.snapshot().arguments or "") <= 64
        assert json.loads(long.snapshot().arguments or "") == {
            "truncated": 1025,
            "head": '{"args":["' + "x" * 23,
        }


def test_what_is_recorded_of_a_task_is_json_however_large_it_is(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    large = {"text": "x" * 100, "quotes": '"' * 100, "snow": "\u2603" * 100}
    with Scheduler(1, sinks=[f"sqlite:{path}"], record_arguments=True, max_payload=100) as pool:
        options = pool.options(metadata=large)
        told = options.submit(lambda given: dict(current_task().metadata), large).result(LONG)
    assert told == large, "the task itself has all of its metadata"
    with closing(sqlite3.connect(path)) as connection:
        row = connection.execute("SELECT arg_json, metadata_json FROM tasks").fetchone()
    for text in row:
        assert len(text) <= 100 and set(json.loads(text)) == {"truncated", "head"}


class OddMapping(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise RuntimeError("no")

    __iter__ = keys = items


class Odd:
    def __repr__(self) -> str:
        raise SystemExit

    __str__ = __hash__ = __eq__ = __bool__ = __repr__  # type: ignore[assignment]
    __float__ = __index__ = __len__ = __iter__ = __repr__
    __class__ = property(__repr__)  # type: ignore[assignment]


@pytest.mark.parametrize(
    "settings",
    [
        {"name": Odd},
        {"name": lambda: b"x"},
        {"timeout": Odd},
        {"timeout": lambda: 1e300},
        {"timeout": lambda: 10**400},
        {"timeout": lambda: math.nan},
        {"metadata": Odd},
        {"metadata": lambda: OddMapping(a=1)},
        {"metadata": lambda: [1]},
        {"capture_output": Odd},
        {"record_source": Odd},
        {"record_arguments": Odd},
        {"record_result": Odd},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_an_option_that_cannot_be_used_is_refused_by_name_whatever_it_is(
    settings: dict[str, Any], pool: Scheduler
) -> None:
    (name, make), = settings.items()
    with pytest.raises(ConfigurationError, match=f"^{name}: expected .*, got .+"):
        pool.options(**{name: make()})


def test_names_and_numbers_of_odd_types_are_taken_as_what_they_hold(pool: Scheduler) -> None:
    class Name(str):
        def __str__(self) -> str:
            raise SystemExit

        __len__ = encode = isascii = replace = __str__  # type: ignore[assignment]
        __contains__ = __format__ = __eq__ = __str__  # type: ignore[assignment]

    class Seconds(float):
        def __eq__(self, other: object) -> bool:
            raise SystemExit

        __gt__ = __le__ = __sub__ = __repr__ = __bool__ = __eq__  # type: ignore[assignment]

    task = pool.options(name=Name("a\0b\ud800"), timeout=Seconds(20)).submit(int)
    assert task.result(LONG) == 0 and task.name == "a\ufffdb\ufffd" and type(task.name) is str
    assert (task.snapshot().timeout, type(task.snapshot().timeout)) == (20.0, float)


@pytest.mark.parametrize(
    "ask",
    [
        lambda pool, odd: pool.get(odd),
        lambda pool, odd: pool.subscribe(task=odd),
        lambda pool, odd: pool.unregister_sink(odd),
    ],
)
def test_no_object_but_a_known_text_is_a_key(ask: Any, pool: Scheduler) -> None:
    for odd in (Odd(), [], None, "unknown"):
        if odd is None and "task=" in inspect.getsource(ask):
            continue
        with pytest.raises(KeyError):
            ask(pool, odd)


@pytest.mark.parametrize(
    "ask",
    [
        lambda pool, odd: pool.tasks(status=odd),
        lambda pool, odd: pool.subscribe(types=odd),
        lambda pool, odd: pool.subscribe(types=[odd]),
        lambda pool, odd: pool.register_sink(odd),
        lambda pool, odd: pool.register_sink(MemorySink(), name=odd),
        lambda pool, odd: pool.register_sink(MemorySink(), options=odd),
        lambda pool, odd: pool.resize(odd),
        lambda pool, odd: pool.flush(odd),
        lambda pool, odd: pool.submit(int).streams(types=[odd]),
        lambda pool, odd: pool.shutdown(timeout=odd),
        lambda pool, odd: Scheduler(name=odd),
        lambda pool, odd: Scheduler(oversize=odd),
        lambda pool, odd: Scheduler(keep_seconds=odd),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused_whatever_it_is(
    ask: Any, pool: Scheduler
) -> None:
    with pytest.raises(ConfigurationError, match=": expected "):
        ask(pool, Odd())


def test_every_sink_sees_the_same_events_in_the_same_order() -> None:
    recorders = [RecordingSink() for _ in range(3)]
    with Scheduler(4, sinks=recorders) as pool:
        for task in [
            pool.submit(lambda: [current_task().output(n) for n in range(20)]) for _ in range(30)
        ]:
            task.result(LONG)
    keys = [
        [(each.task_id, each.seq) for each in recorder.events if hasattr(each, "task_id")]
        for recorder in recorders
    ]
    assert keys[0] == keys[1] == keys[2] and len(keys[0]) == 30 * 24


# -- what it remembers --


def test_tasks_tells_waiting_running_and_finished_ones_in_order_and_by_status() -> None:
    with Scheduler(1) as pool:
        done = pool.submit(len, "")
        done.result(LONG)
        gate = Gate()
        running = pool.submit(gate)
        assert gate.entered.wait(LONG)
        waiting = pool.submit(len, "")
        assert [(each.task_id, each.status) for each in pool.tasks()] == [
            (done.id, "completed"), (running.id, "running"), (waiting.id, "scheduled")]
        assert [each.task_id for each in pool.tasks(status="running")] == [running.id]
        assert [each.task_id for each in pool.tasks(status=TaskStatus.SCHEDULED)] == [waiting.id]
        assert pool.tasks(status="failed") == []
        with pytest.raises(
            ConfigurationError, match="status: expected one of created, .*, got 'gone'"
        ):
            pool.tasks(status="gone")
        assert (
            isinstance(pool.get(running.id), TaskSnapshot)
            and pool.get(running.id).completed_utc is None
        )
        gate.open()


def test_get_of_an_unknown_id_is_a_key_error(pool: Scheduler) -> None:
    with pytest.raises(KeyError):
        pool.get("0" * 32)


@pytest.mark.parametrize(("keep", "left"), [(None, 30), (0, 0), (7, 7)])
def test_the_newest_finished_tasks_are_kept(keep: int | None, left: int) -> None:
    with Scheduler(1, keep_finished=keep, keep_seconds=None) as pool:
        tasks = [pool.submit(len, "") for _ in range(30)]
        for task in tasks:
            task.result(LONG)
        assert [each.task_id for each in pool.tasks()] == [task.id for task in tasks[30 - left:]]
        if left:
            assert pool.get(tasks[-1].id).status == "completed"
        if left < 30:
            with pytest.raises(KeyError):
                pool.get(tasks[0].id)
        assert tasks[0].snapshot().status == "completed", "who holds the task can always ask it"


def test_finished_tasks_are_forgotten_after_keep_seconds_and_running_ones_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr("bgworker.running.finished.monotonic", lambda: now[0])
    with Scheduler(2, keep_seconds=60.0) as pool:
        gate = Gate()
        running = pool.submit(gate)
        old = pool.submit(len, "")
        old.result(LONG)
        assert len(pool.tasks()) == 2
        now[0] += 50
        young = pool.submit(len, "")
        young.result(LONG)
        assert pool.get(old.id) and pool.get(young.id)
        now[0] += 20
        with pytest.raises(KeyError):
            pool.get(old.id)
        assert [each.task_id for each in pool.tasks()] == [running.id, young.id]
        gate.open()


def test_tasks_still_answers_after_the_shutdown() -> None:
    with Scheduler(1, keep_finished=2) as pool:
        tasks = [pool.submit(len, "") for _ in range(3)]
    assert [each.task_id for each in pool.tasks()] == [each.id for each in tasks[1:]]
    assert pool.get(tasks[2].id).status == "completed"


def test_twenty_thousand_tasks_leave_no_more_behind_than_are_kept() -> None:
    with Scheduler(2, keep_finished=100) as pool:
        pool.submit(len, "").result(LONG)
        for _ in range(20):
            tasks = [pool.submit(len, "") for _ in range(1000)]
            concurrent.futures.wait(tasks, timeout=LONG)
        del tasks
        assert len(pool.tasks()) == 100 and len(pool._memory._states) == 100 == len(
            pool._memory._finished
        )

        def leftovers() -> list[object]:
            gc.collect()
            # by type(): isinstance() asks each object for its __class__, and other tests' objects
            # explode
            return [
                each
                for each in gc.get_objects()
                if type(each) is Task and each._runner is pool._pool
            ]

        # a worker lets go of its last task a moment after its end
        until(lambda: not leftovers())
        ours = [
            each
            for each in gc.get_objects()
            if type(each) is TaskState and each.run_id == pool.run_id
        ]
        assert len(ours) == 100


MANY = """if True:
    import sys, weakref
    from bgworker import Scheduler

    class Thing:
        pass

    alive = weakref.WeakSet()

    def thing(given=None):
        made = Thing()
        alive.add(made)
        return made

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    kept = []
    with Scheduler(4, keep_finished=100) as pool:
        for number in range(100):
            tasks = [pool.submit(thing, thing()) for _ in range(1000)]
            for task in tasks:
                task.result(60)
            if "hoard" in sys.argv:
                kept.append(tasks)
            if number == 19:
                pool.flush()
                before = resident()
        del task, tasks
        pool.flush()
        grown = resident() - before
        known = len(pool.tasks())
    print(known, len(alive), grown // 2 ** 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", ["as it is", "hoard"])
def test_a_hundred_thousand_tasks_leave_no_argument_and_no_result_behind_and_the_memory_flat(
    how: str,
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MANY, how],
        cwd=ROOT,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    known, alive, grown = map(int, done.stdout.split())
    assert known == 100
    if how == "hoard":
        # whoever keeps the tasks keeps the results, which shows that all this would notice
        assert alive == 100_000 and grown > 50
    else:
        assert alive == 0 and grown < 8


# -- bounds --


def test_submit_refuses_what_max_pending_has_no_room_for_and_cancelled_tasks_make_room() -> None:
    with Scheduler(1, max_pending=3) as pool:
        gate = blocked(pool)
        waiting = [pool.submit(len, "") for _ in range(3)]
        with pytest.raises(PendingFull, match="max_pending: 3 tasks are waiting") as caught:
            pool.submit(len, "")
        assert isinstance(caught.value, (queue.Full, BgworkerError)) and len(pool.tasks()) == 4
        assert waiting[1].cancel() and waiting[0].cancel()
        waiting += [pool.submit(len, ""), pool.submit(len, "")]
        with pytest.raises(PendingFull):
            pool.submit(len, "")
        gate.open()
        assert [each.wait(LONG) and each.cancelled() for each in waiting] == [
            True,
            True,
            False,
            False,
            False,
        ]
        for _ in range(3):
            pool.submit(len, "").result(LONG)


def test_signs_to_stop_after_a_resize_take_no_room_in_max_pending() -> None:
    with Scheduler(4, max_pending=2) as pool:
        gate = blocked(pool, 4)
        pool.resize(1)
        tasks = [pool.submit(len, "") for _ in range(2)]
        with pytest.raises(PendingFull):
            pool.submit(len, "")
        gate.open()
        assert [task.result(LONG) for task in tasks] == [0, 0]


def test_tasks_that_free_workers_are_about_to_take_need_no_room_in_max_pending() -> None:
    gate = Gate()
    with Scheduler(3, max_pending=2, initializer=gate) as pool:  # started, and at no task yet
        tasks = [pool.submit(len, "") for _ in range(5)]
        with pytest.raises(PendingFull):
            pool.submit(len, "")
        gate.open()
        assert [task.result(LONG) for task in tasks] == [0] * 5


def most_at_once(pool: Scheduler, tasks: int) -> int:
    """Run tasks that all wait for a moment; return how many of them ran at the same time at
    most."""
    lock, now, most = threading.Lock(), [0], [0]

    def work() -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1

    for task in [pool.submit(work) for _ in range(tasks)]:
        task.result(LONG)
    return most[0]


def test_resize_up_starts_workers_for_what_waits() -> None:
    with Scheduler(1) as pool:
        gate = blocked(pool)
        barrier = threading.Barrier(3)
        tasks = [pool.submit(barrier.wait, LONG) for _ in range(3)]
        pool.resize(4)
        assert sorted(each.result(LONG) for each in tasks) == [0, 1, 2]
        gate.open()


def test_resize_down_lets_surplus_workers_end_after_their_task_and_not_after_the_whole_queue() -> (
    None
):
    with Scheduler(4) as pool:
        gate = blocked(pool, 4)
        counting = threading.Thread(target=lambda: found.append(most_at_once(pool, 20)))
        found: list[int] = []
        counting.start()
        until(lambda: len(pool.tasks(status="scheduled")) == 20)
        pool.resize(1)
        gate.open()
        counting.join(LONG)
        assert found == [1]


def test_resize_down_and_up_while_idle_keeps_the_bound() -> None:
    with Scheduler(4) as pool:
        assert most_at_once(pool, 16) == 4
        for size in (1, 3, 2, 1, 4):
            pool.resize(size)
            assert most_at_once(pool, 12) == size
    with pytest.raises(ConfigurationError, match="max_workers must be greater than 0, got 0"):
        pool.resize(0)


def test_what_waits_runs_even_if_signs_to_stop_of_several_resizes_stand_before_it_at_shutdown() -> (
    None
):
    pool = Scheduler(4)
    gate = blocked(pool, 4)
    for size in (1, 2, 1):
        pool.resize(size)
    tasks = [pool.submit(len, "") for _ in range(5)]
    pool.shutdown(wait=False)
    gate.open()
    assert [each.result(LONG) for each in tasks] == [0] * 5
    pool.shutdown()


def test_resize_under_fire_loses_no_task() -> None:
    with Scheduler(1) as pool:
        tasks = []
        for number in range(400):
            tasks.append(pool.submit(len, ""))
            if number % 5 == 0:
                pool.resize(1 + number % 7)
        assert [each.result(LONG) for each in tasks] == [0] * 400


# -- timeouts --


def test_tasks_that_never_look_cannot_eat_the_pool() -> None:
    with Scheduler(4) as pool:
        let_go = threading.Event()
        stuck = [pool.options(timeout=0.05).submit(let_go.wait, LONG) for _ in range(40)]
        quick = [pool.submit(abs, -n) for n in range(40)]
        assert [each.result(LONG) for each in quick] == list(range(40))
        assert all(isinstance(each.exception(LONG), TaskTimedOut) for each in stuck)
        assert len(pool.tasks(status="timed_out")) == 40
        let_go.set()
        assert most_at_once(pool, 12) == 4, "the replaced workers came back to the pool"


def test_the_timeout_counts_from_the_start_of_the_run() -> None:
    with Scheduler(1) as pool:
        gate = blocked(pool)
        task = pool.options(timeout=0.2).submit(len, "abc")
        assert not task.wait(0.25)
        gate.open()
        assert task.result(LONG) == 3


def test_a_task_that_ends_in_time_is_left_alone(pool: Scheduler) -> None:
    tasks = [pool.options(timeout=LONG).submit(len, "abc") for _ in range(50)]
    assert [each.result(LONG) for each in tasks] == [3] * 50 and not pool._pool.deadlines._watched


def test_the_end_and_the_timeout_race_and_exactly_one_of_them_counts(
    recorder: RecordingSink,
) -> None:
    with Scheduler(4, sinks=[recorder]) as pool:
        tasks = [
            pool.options(timeout=0.02).submit(time.sleep, 0.015 + n % 10 / 1000) for n in range(100)
        ]
        concurrent.futures.wait(tasks, timeout=LONG)
    for task in tasks:
        late = isinstance(task.exception(0), TaskTimedOut)
        assert recorder.types(task) == [*START, "TaskTimedOut" if late else "TaskCompleted"]
        assert task.status == ("timed_out" if late else "completed")


# -- the initializer --


def test_the_initializer_runs_once_in_each_worker_with_its_arguments() -> None:
    local = threading.local()

    def initialize(value: str) -> None:
        local.value = value

    with Scheduler(3, initializer=initialize, initargs=("ready",)) as pool:
        assert {
            each.result(LONG) for each in [pool.submit(lambda: local.value) for _ in range(20)]
        } == {"ready"}
        stuck = threading.Event()
        assert pool.options(timeout=0.02).submit(stuck.wait, LONG).wait(LONG)
        assert [
            each.result(LONG) for each in [pool.submit(lambda: local.value) for _ in range(20)]
        ] == ["ready"] * 20
        stuck.set()


# -- the end --


def test_the_with_statement_waits_for_the_tasks_and_closes_the_sinks(
    recorder: RecordingSink,
) -> None:
    with Scheduler(2, sinks=[recorder]) as pool:
        tasks = [pool.submit(time.sleep, 0.01) for _ in range(6)]
    assert all(each.done() for each in tasks) and recorder.closed.is_set()
    assert pool.sinks["recording"].state == "closed" and pool.sinks["recording"].pending == 0
    assert pool.sinks["recording"].delivered == len(recorder.events) == 24


@pytest.mark.parametrize(
    "use",
    [
        lambda pool: pool.submit(len, ""),
        lambda pool: pool.options(name="x").submit(len, ""),
        lambda pool: list(pool.map(len, [""])),
    ],
)
def test_submit_after_shutdown_is_a_runtime_error_and_leaves_no_trace(
    use: Callable[[Scheduler], object],
) -> None:
    pool = Scheduler(1)
    pool.shutdown()
    pool.shutdown()
    with pytest.raises(ShutdownError, match="after shutdown") as caught:
        use(pool)
    assert isinstance(caught.value, (RuntimeError, BgworkerError)) and pool.tasks() == []
    with pytest.raises(ShutdownError):
        pool.register_sink(RecordingSink())


def test_shutdown_without_waiting_returns_while_the_tasks_run_on(recorder: RecordingSink) -> None:
    pool = Scheduler(1, sinks=[recorder])
    gate = blocked(pool)
    waiting = pool.submit(len, "abc")
    pool.shutdown(wait=False)
    assert not waiting.done() and not recorder.closed.is_set()
    gate.open()
    assert waiting.result(LONG) == 3 and recorder.closed.wait(LONG)
    assert recorder.types(waiting)[-1] == "TaskCompleted"


def test_shutdown_can_cancel_what_waits_and_lets_finish_what_runs(recorder: RecordingSink) -> None:
    pool = Scheduler(1, sinks=[recorder])
    gate = Gate()
    running = pool.submit(gate)
    assert gate.entered.wait(LONG)
    waiting = [pool.submit(len, "") for _ in range(5)]
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(each.cancelled() and each.cancel_reason == "shutdown" for each in waiting)
    with pytest.raises(CancelledError):
        waiting[0].result(0)
    gate.open()
    pool.shutdown()
    assert running.result(0) is None and recorder.types(running)[-1] == "TaskCompleted"
    assert [recorder.types(each)[-1] for each in waiting] == ["TaskCancelled"] * 5


def test_shutdown_with_a_timeout_leaves_a_stuck_task_to_itself_and_still_delivers(
    recorder: RecordingSink,
) -> None:
    pool = Scheduler(2, sinks=[recorder])
    gate = Gate()
    stuck = pool.submit(gate)
    assert gate.entered.wait(LONG)
    done = pool.submit(len, "abc")
    done.result(LONG)
    pool.shutdown(timeout=0.4)
    assert recorder.closed.wait(LONG) and recorder.types(done)[-1] == "TaskCompleted"
    assert recorder.types(stuck) == START and not stuck.done()
    assert stuck.cancel_requested and stuck.cancel_reason == "shutdown"
    gate.open()
    assert stuck.result(LONG) is None, "it is resolved even so, when it ends"


def test_a_task_that_stops_when_the_shutdown_runs_out_of_time_has_its_end_recorded(
    recorder: RecordingSink,
) -> None:
    pool = Scheduler(1, sinks=[recorder])
    reached = threading.Event()

    def look() -> None:
        reached.set()
        current_task().sleep(100_000)

    task, waiting = pool.submit(look), pool.submit(len, "")
    assert reached.wait(LONG)
    pool.shutdown(timeout=1.0)
    assert task.cancelled() and waiting.cancelled() and recorder.closed.wait(LONG)
    assert (
        recorder.types(task)[-1] == "TaskCancelled"
        and recorder.types(waiting)[-1] == "TaskCancelled"
    )


def test_a_task_given_up_by_shutdown_still_times_out() -> None:
    pool = Scheduler(1)
    gate = Gate()
    task = pool.options(timeout=0.4).submit(gate)
    assert gate.entered.wait(LONG)
    pool.shutdown(timeout=0.1)
    assert isinstance(task.exception(LONG), TaskTimedOut)
    gate.open()


def test_shutdown_does_not_wait_for_a_task_that_times_out_meanwhile_and_never_looks(
    recorder: RecordingSink,
) -> None:
    pool = Scheduler(1, sinks=[recorder])
    gate = Gate()
    task = pool.options(timeout=0.2).submit(gate)
    waiting = pool.submit(len, "abc")
    assert gate.entered.wait(LONG)
    pool.shutdown()
    assert task.status == "timed_out" and waiting.result(0) == 3 and recorder.closed.is_set()
    gate.open()


def test_a_task_may_shut_its_own_scheduler_down(recorder: RecordingSink) -> None:
    pool = Scheduler(2, sinks=[recorder])
    other = pool.submit(time.sleep, 0.05)
    task = pool.submit(pool.shutdown)
    assert task.wait(LONG), "it waits for itself"
    assert task.exception(0) is None and other.done() and recorder.closed.wait(LONG)


def test_a_forgotten_scheduler_runs_what_waits_and_closes_its_sinks_without_the_garbage_collector(
        recorder: RecordingSink) -> None:
    gc.collect()
    gc.disable()
    try:
        pool = Scheduler(1, sinks=[recorder])
        gate = blocked(pool)
        waiting = [pool.submit(len, "abc") for _ in range(5)]
        followed = weakref.ref(pool)
        del pool
        until(lambda: followed() is None)
        assert not recorder.closed.is_set()
        gate.open()
        assert [each.result(LONG) for each in waiting] == [3] * 5
        assert recorder.closed.wait(LONG)
        assert [recorder.types(each)[-1] for each in waiting] == ["TaskCompleted"] * 5
    finally:
        gc.enable()


def test_a_scheduler_that_was_never_used_leaves_nothing_behind() -> None:
    followed = []
    for _ in range(3):
        pool = Scheduler(1)
        followed += [weakref.ref(pool), weakref.ref(pool._pool), weakref.ref(pool._dispatcher)]
        del pool
    gc.collect()
    assert [each() for each in followed] == [None] * 9


def test_options_keep_their_scheduler_alive() -> None:
    options = Scheduler(1).options(name="kept")
    gc.collect()
    task = options.submit(len, "abc")
    assert task.result(LONG) == 3
    closed = task._dispatcher.closed
    assert not closed.is_set()
    del options
    gc.collect()
    assert closed.wait(LONG), "nothing else keeps it"


# -- sinks from the environment and from specifications --


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_environment_adds_sinks_to_every_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "BGWORKER_SINKS", f"jsonl:{tmp_path / 'a.jsonl'}, jsonl:{tmp_path / 'b.jsonl'}"
    )
    with Scheduler(1, sinks=[RecordingSink()]) as pool:
        task = pool.submit(lambda: current_task().output("hello"))
        assert len(pool.sinks) == 3
    for name in ("a.jsonl", "b.jsonl"):
        assert [
            line["type"] for line in lines_of(tmp_path / name) if line["task_id"] == task.id
        ] == [*START, "TaskOutput", "TaskCompleted"]


def test_a_wrong_sink_in_the_environment_is_refused_and_nothing_is_left_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BGWORKER_SINKS", "jsonl:")
    with pytest.raises(SinkError, match="BGWORKER_SINKS.*" + re.escape("'jsonl:'")):
        Scheduler(1)


def test_a_wrong_sink_is_refused_and_the_others_are_closed(recorder: RecordingSink) -> None:
    with pytest.raises(SinkError):
        Scheduler(1, sinks=[recorder, "nonsense:"])
    assert recorder.closed.wait(LONG)


def test_a_sink_is_told_apart_from_its_class_and_from_what_is_none() -> None:
    with Scheduler(1) as pool:
        for wrong in (RecordingSink, 5, object()):
            with pytest.raises(ConfigurationError, match="sink: expected an object with"):
                pool.register_sink(wrong)  # type: ignore[arg-type]
        assert (
            pool.register_sink(RecordingSink(), name="mine") == "mine"
            and pool.register_sink(RecordingSink()) == "recording"
        )
        with pytest.raises(KeyError):
            pool.unregister_sink("nobody")
        assert pool.unregister_sink("mine").state == "closed" and list(pool.sinks) == ["recording"]


def test_flush_delivers_all_that_was_said_before(recorder: RecordingSink) -> None:
    with Scheduler(1, sinks=[recorder]) as pool:
        task = pool.submit(lambda: [current_task().output(n) for n in range(1000)])
        task.result(LONG)
        assert pool.flush(LONG)
        assert len(recorder.of(task)) == 1004


def test_checkpoint_outside_costs_nothing_inside_stops(pool: Scheduler) -> None:
    checkpoint()
    assert pool.submit(checkpoint).result(LONG) is None


# -- tasks by id --


def test_a_task_is_found_by_its_id_while_it_waits_runs_or_is_held(pool: Scheduler) -> None:
    gate, entered = threading.Event(), threading.Event()
    with Scheduler(1) as narrow:
        running = narrow.submit(lambda: (entered.set(), gate.wait(LONG)))
        waiting = narrow.submit(lambda: "result").id  # nobody else holds it
        assert entered.wait(LONG)
        assert narrow.task(running.id) is running
        found = narrow.task(waiting)
        gate.set()
        assert found.result(LONG) == "result"
        assert narrow.task(waiting) is found
        with pytest.raises(KeyError):
            pool.task(waiting)  # another scheduler's


def test_a_task_that_has_ended_and_that_nobody_holds_is_found_by_get_alone() -> None:
    with Scheduler(1) as narrow:
        ended = narrow.submit(int).id
        narrow.submit(int).result(LONG)  # until then its worker may hold the first
        with pytest.raises(KeyError, match="has ended, and nobody holds it"):
            narrow.task(ended)
        assert narrow.get(ended).status is TaskStatus.COMPLETED
        with pytest.raises(KeyError):
            narrow.task("0" * 32)

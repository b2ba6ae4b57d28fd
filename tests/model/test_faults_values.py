"""Hostile objects in every place where a user can put one: every task ends, and nobody else's
events suffer."""

from __future__ import annotations

import asyncio
import faulthandler
import itertools
import json
import logging
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from bgworker import (
    JsonlSink,
    PermanentSinkError,
    RetryPolicy,
    Scheduler,
    SinkOptions,
    SqliteSink,
    StreamEvent,
    Task,
    TaskCancelled,
    WebhookSink,
    current_task,
)
from bgworker.model import wire
from bgworker.model.errors import BgworkerError
from bgworker.model.ids import new_id
from bgworker.model.records import OUTPUT, Batch, TaskState
from bgworker.testing import MemorySink
from bgworker.webhook import new_secret
from tests.support import ROOT

LONG = 30.0
"""Seconds that nothing here takes."""

RAISED = (
    RuntimeError,
    ValueError,
    RecursionError,
    MemoryError,
    StopIteration,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    TaskCancelled,
    asyncio.CancelledError,
)
ATTRIBUTES = (
    "__str__",
    "__repr__",
    "__format__",
    "__hash__",
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__len__",
    "__bool__",
    "__iter__",
    "__contains__",
    "__getitem__",
    "__float__",
    "__int__",
    "__index__",
    "__add__",
    "__sub__",
    "__rmul__",
    "__mul__",
    "__truediv__",
    "__rtruediv__",
    "__neg__",
    "__round__",
    "__getattribute__",
    "__getattr__",
    "__dir__",
    "__reduce_ex__",
    "__call__",
    "__await__",
    "keys",
    "items",
    "values",
    "get",
    "copy",
    "encode",
    "decode",
    "isascii",
    "replace",
    "startswith",
    "splitlines",
    "partition",
    "split",
    "strip",
    "lower",
    "join",
    "is_integer",
    "with_traceback",
    "add_note",
    "as_integer_ratio",
    "write",
    "close",
    "open",
    "flush",
)
PROPERTIES = (
    "__class__",
    "__traceback__",
    "__cause__",
    "__context__",
    "__suppress_context__",
    "__notes__",
    "args",
    "__name__",
    "__module__",
    "__code__",
    "__wrapped__",
    "__func__",
    "reason",
    "code",
    "exceptions",
    "message",
    "value",
    "name",
    "source",
    "retry_after",
    "concerns",
    "hold",
    "preferred_batch",
)
BASES: tuple[tuple[type, tuple[Any, ...]], ...] = (
    (object, ()),
    (str, ("text\0\ud800",)),
    (bytes, (b"\xff\0",)),
    (int, (7,)),
    (float, (7.5,)),
    (dict, ({1: "x"},)),
    (list, ([1],)),
    (tuple, ((1,),)),
    (set, ({1},)),
    (Mapping, ()),
    (Exception, ("text",)),
    (Exception, ()),
    (KeyError, ("k",)),
    (OSError, (2, "no")),
    (BaseException, ("base",)),
    (TaskCancelled, ("why",)),
    (SystemExit, (3,)),
)


def recurse(depth: int) -> Any:
    """Run into the limit. Not by ``*args`` and ``**kwargs``: 3.15.2 does not notice those calls,
    and hangs."""
    return recurse(depth + 1)


class Hostility:
    """Makes hostile objects of everything, from one seed.

    Args:
        call_back: what they may call: the user's way back into the library.
    """

    def __init__(self, seed: int, call_back: Callable[[], object]) -> None:
        self.random = random.Random(seed)
        self._call_back = call_back
        self._number = itertools.count().__next__

    def behaviour(self) -> Callable[..., Any]:
        """Return what one hostile method does, each time that it is called."""
        kind = self.random.choice(
            ("raise", "raise", "raise", "lie", "lie", "call back", "sleep", "recurse")
        )
        error = self.random.choice(RAISED)
        lie = self.random.choice(
            (
                None,
                "",
                "\0\udfff",
                10**30,
                -1,
                float("nan"),
                NotImplemented,
                True,
                [],
                b"\0",
                str,
                int,
                TaskCancelled,
                KeyboardInterrupt,
                object(),
                ["\ud800"],
                {},
            )
        )

        def behave(*args: Any, **kwargs: Any) -> Any:
            if kind == "raise":
                raise error("of hostile origin")
            if kind == "call back":
                self._call_back()
            elif kind == "sleep":
                time.sleep(0.001)
            elif kind == "recurse":
                return recurse(0)
            return lie

        return behave

    def of(self, base: type, arguments: tuple[Any, ...], *, always: tuple[str, ...] = ()) -> Any:
        """Return an instance of a hostile subclass of ``base``."""
        attributes: dict[str, Any] = {name: self.behaviour() for name in always}
        for name in self.random.sample(ATTRIBUTES, self.random.randint(1, 12)):
            attributes.setdefault(name, self.behaviour())
        for name in self.random.sample(PROPERTIES, self.random.randint(0, 6)):
            attributes[name] = property(self.behaviour())
        if base is Mapping:
            for name in ("__iter__", "__len__", "__getitem__"):
                attributes.setdefault(name, self.behaviour())
        name = self.random.choice(("Hostile", "str", "int", "Expl\ud800ive", "")) + str(
            self._number()
        )
        kind = _make(name, base, attributes)
        # its own ``__init__`` may not do
        made = object.__new__(kind) if base is Mapping else base.__new__(kind, *arguments)
        if base in (dict, list, set):
            base.__init__(made, *arguments)
        return made

    def thing(self) -> Any:
        """Return any hostile object, or one that is merely odd."""
        if self.random.random() < 0.35:
            return self.random.choice(ODD)()
        return self.of(*self.random.choice(BASES))

    def error(self) -> BaseException:
        """Return a hostile exception."""
        base, arguments = self.random.choice(
            [pair for pair in BASES if issubclass(pair[0], BaseException)]
        )
        error: BaseException = self.of(base, arguments)
        if self.random.random() < 0.3:
            cause = self.of(ValueError, ("cause",))
            BaseException.__cause__.__set__(error, cause)  # type: ignore[attr-defined]
        if self.random.random() < 0.3:
            try:
                BaseException.__setattr__(error, "__notes__", self.thing())
            except AttributeError:
                pass  # a property of its own
        return error


def _make(name: str, base: type, attributes: dict[str, Any]) -> Any:
    try:
        return type(base)(name, (base,), attributes)
    except UnicodeEncodeError:  # a class may not be named like this everywhere
        return type(base)("Hostile", (base,), attributes)


def _deep() -> Any:
    value: Any = []
    for _ in range(5000):
        value = [value]
    return value


def _cyclic() -> Any:
    value: dict[Any, Any] = {}
    value[1] = [value]
    return value


class Colour(str, Enum):
    RED = "r\ud800d"


def _function(**attributes: Any) -> Any:
    def function(*args: Any, **kwargs: Any) -> int:
        return 1

    for name, value in attributes.items():
        setattr(function, name, value)
    return function


ODD: tuple[Callable[[], Any], ...] = (
    lambda: "\ud800",
    lambda: "\0" * 10,
    lambda: "x" * 300_000,
    lambda: "\U0001f600" * 30_000,
    lambda: b"\xff" * 1000,
    lambda: 10**5000,
    lambda: float("nan"),
    lambda: float("-inf"),
    lambda: Decimal("sNaN"),
    lambda: Fraction(1, 3),
    lambda: 1e300,
    lambda: -1,
    lambda: 0,
    lambda: True,
    lambda: None,
    _deep,
    _cyclic,
    lambda: (each for each in "abc"),
    lambda: {float("nan"): 1, None: 2, (1, 2): 3, b"k": 4},
    lambda: Colour.RED,
    lambda: object,
    lambda: os,
    object,
    lambda: {"k": {1, 2}},
    lambda: 1j,
    lambda: memoryview(b"x"),
    lambda: range(3),
    lambda: NotImplemented,
)


class Round:
    """One scheduler with three sinks, some hostile tasks, some innocent ones, and calls with
    hostile arguments."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.hostility = Hostility(seed, self._call_back)
        self.random = self.hostility.random
        self.folder = folder
        self.memory = MemorySink()
        self.tasks: list[Task[Any]] = []
        self.innocents: list[Task[Any]] = []
        self.failed: dict[Task[Any], BaseException] = {}
        self.is_over = False
        self.pool = Scheduler(
            self.random.randint(1, 4),
            sinks=[f"jsonl:{folder}/events.jsonl", f"sqlite:{folder}/history.db"],
            record_arguments=True,
            record_source=self.random.random() < 0.5,
            record_result=True,
            max_stuck=None,
            max_payload=self.random.choice((64, 1000, 65536)),
            close_timeout=LONG,
        )
        self.pool.register_sink(self.memory, name="memory")

    def _call_back(self) -> None:
        """What hostile objects do with the library while it looks at them."""
        if not self.is_over:
            self.pool.sinks
            self.pool.health()
            current_task().output("from inside")
            current_task().cancel_requested

    # -- what hostile tasks do --

    def _speak(self, things: list[Any]) -> Any:
        context = current_task()
        for thing in things:
            for say in (context.output, context.error, context.warning, context.verbose):
                say(thing)
            context.progress(thing, 10, thing)
            context.progress(1, thing, thing)
        return things[-1]

    def _callable(self) -> Any:
        kind = self.random.randrange(4)
        if kind == 0:
            return self.hostility.of(object, (), always=("__call__",))
        attributes = {
            name: self.hostility.thing()
            for name in ("__wrapped__", "source", "__func__", "__module__")
            if self.random.random() < 0.4
        }
        function = _function(**attributes)
        if kind == 1:
            function.__name__ = function.__qualname__ = self.hostility.of(str, ("name\0\ud800",))
        return function

    def attack_submit(self) -> None:
        arguments = [self.hostility.thing() for _ in range(2)]
        self.tasks.append(
            self.pool.submit(self._callable(), *arguments, key=self.hostility.thing())
        )

    def attack_options(self) -> None:
        settings = {name: self.hostility.thing() for name in (
            "name", "timeout", "metadata", "capture_output", "record_source", "record_arguments",
            "record_result")
            if self.random.random() < 0.25}
        self.tasks.append(self.pool.options(**settings).submit(int))

    def attack_metadata(self) -> None:
        self.tasks.append(
            self.pool.options(
                metadata={"k": self.hostility.thing(), 1: [self.hostility.thing()]}
            ).submit(int)
        )

    def attack_streams(self) -> None:
        things = [self.hostility.thing() for _ in range(3)]
        captured = self.random.random() < 0.3
        self.tasks.append(self.pool.options(capture_output=captured).submit(self._speak, things))

    def attack_failure(self) -> None:
        error = self.hostility.error()

        def fail() -> None:
            if self.failed[task] is not error:
                raise AssertionError
            raise error

        gate = threading.Event()
        task = self.pool.submit(lambda: gate.wait(LONG) and fail())
        self.failed[task] = error
        self.tasks.append(task)
        gate.set()

    def attack_coroutine(self) -> None:
        error = self.hostility.error()

        async def fail() -> None:
            await asyncio.sleep(0)
            current_task().output(error)
            raise error

        if not issubclass(type(error), (SystemExit, KeyboardInterrupt)):
            self.tasks.append(self.pool.submit(fail))

    def attack_capture(self) -> None:
        thing = self.hostility.thing()
        log = logging.getLogger("hostile")

        def work() -> None:
            for act in (
                lambda: print("line", thing),
                lambda: log.warning("line %s", thing),
                lambda: log.warning(thing),
            ):
                try:
                    act()
                except BaseException:
                    pass  # its own: prints and logs raise as ever

        self.tasks.append(self.pool.options(capture_output=True).submit(work))

    def attack_cancel(self) -> None:
        gate, reason = threading.Event(), self.hostility.thing()
        task = self.pool.submit(gate.wait, LONG)
        self.tasks.append(task)
        try:
            task.cancel(reason)
        finally:
            gate.set()

    def attack_own_cancel(self) -> None:
        reason = self.hostility.thing()

        def stop() -> None:
            raise TaskCancelled(reason)

        self.tasks.append(self.pool.submit(stop))

    def attack_questions(self) -> None:
        thing = self.hostility.thing()
        task = self.random.choice(self.tasks or self.innocents)
        ask = self.random.choice(
            (
                lambda: self.pool.get(thing),
                lambda: self.pool.tasks(status=thing),
                lambda: task.streams(types=thing),
                lambda: task.streams(since=thing),
                lambda: task.streams(types=[thing]),
                lambda: self.pool.resize(thing),
                lambda: self.pool.subscribe(types=thing).close(),
                lambda: self.pool.subscribe(types=[thing]).close(),
                lambda: self.pool.subscribe(task=thing).close(),
                lambda: self.pool.subscribe(maxsize=thing).close(),
                lambda: self.pool.unregister_sink(thing),
                lambda: self.pool.register_sink(thing).upper(),
                lambda: self.pool.register_sink(MemorySink(), name=thing).upper(),
                lambda: self.pool.register_sink(MemorySink(), options=thing).upper(),
                lambda: self.pool.flush(thing),
            )
        )
        ask()

    def attack_settings(self) -> None:
        name = self.random.choice(
            (
                "queue_size",
                "queue_bytes",
                "batch_size",
                "linger",
                "overflow",
                "types",
                "retry",
                "park_bytes",
            )
        )
        SinkOptions(**{name: self.hostility.thing()})
        name = self.random.choice(("attempts", "base", "cap", "jitter"))
        RetryPolicy(**{name: self.hostility.thing()})

    def attack_scheduler(self) -> None:
        name = self.random.choice(
            (
                "max_workers",
                "name",
                "max_pending",
                "keep_finished",
                "keep_seconds",
                "close_timeout",
                "max_payload",
                "oversize",
                "progress_interval",
                "progress_step",
                "max_stuck",
                "sinks",
                "thread_name_prefix",
                "initializer",
                "initargs",
                "capture_output",
            )
        )
        Scheduler(**{name: self.hostility.thing()}).shutdown(wait=False)

    def attack_sink(self) -> None:
        """A sink that raises hostile exceptions, and is hostile itself."""
        error = self.hostility.error()
        writes = self.hostility.behaviour()

        def write(sink: Any, events: Any) -> Any:
            writes()
            raise error

        sink = type("OddSink", (), {"write": write, "close": lambda sink: None})()
        options = SinkOptions(retry=RetryPolicy(attempts=1, base=0.001, cap=0.001), queue_size=10)
        self.pool.register_sink(sink, name=f"odd-{len(self.pool.sinks)}", options=options)

    def attack_callbacks(self) -> None:
        callback = self.hostility.of(object, (), always=("__call__",))
        gate = threading.Event()
        # of a task that has ended it would run here, as a future's does
        task = self.pool.submit(gate.wait, LONG)
        task.add_done_callback(callback)
        self.tasks.append(task)
        gate.set()
        subscription = self.pool.subscribe(self.hostility.behaviour(), types=["TaskStarted"])
        self.pool.submit(int).wait(LONG)
        subscription.close()

    # -- the round --

    def innocent(self) -> None:
        def talk() -> None:
            for number in range(3):
                current_task().output(f"line {number}")

        self.innocents.append(self.pool.options(name="innocent").submit(talk))

    def play(self, steps: int) -> None:
        attacks = [getattr(self, name) for name in dir(self) if name.startswith("attack_")]
        self.innocent()
        for _ in range(steps):
            attack = self.random.choice(attacks)
            try:
                attack()
            except (BgworkerError, KeyError, TypeError, ValueError) as error:
                assert "of hostile origin" not in BaseException.__repr__(
                    error
                ), f"{attack.__name__} lets an exception out"
            except BaseException as error:
                raise AssertionError(f"{attack.__name__} raises {type(error).__name__}") from error
            self.innocent()
        for task in (*self.tasks, *self.innocents):
            assert task.wait(LONG), f"a task does not end: {task.name!r}"
        for name in [name for name in self.pool.sinks if name.startswith("odd")]:
            # else they are tried for all of the close timeout
            self.pool.unregister_sink(name, timeout=0.1)
        self.is_over = True
        self.pool.shutdown(timeout=LONG)
        self.check()

    def check(self) -> None:
        for task, error in self.failed.items():
            if not issubclass(type(error), TaskCancelled):
                assert task.exception(0) is error
        ids = {task.id for task in self.innocents}
        for name in ("jsonl", "sqlite", "memory"):
            health = self.pool.sinks[name]
            assert (
                health.emitted
                == health.delivered
                + health.coalesced
                + health.dropped
                + health.parked
                + health.pending
            )
            assert (health.dropped, health.parked, health.pending) == (0, 0, 0), f"{name}: {health}"
        lines = [
            wire.decode(line) for line in (self.folder / "events.jsonl").read_bytes().splitlines()
        ]
        for events in (lines, self.memory.events):
            self.check_events(events, ids)
        assert [
            wire.decode(wire.encode(event)) for event in self.memory.events
        ] == self.memory.events
        with sqlite3.connect(self.folder / "history.db") as connection:
            rows = connection.execute(
                "SELECT id, status, arg_json, metadata_json, last_seq FROM tasks"
            ).fetchall()
            spoken = connection.execute(
                "SELECT task_id, count(*) FROM task_streams GROUP BY 1"
            ).fetchall()
        connection.close()
        assert ids <= {row[0] for row in rows}
        for task_id, status, arguments, metadata, last_seq in rows:
            assert status in (
                "completed",
                "failed",
                "cancelled",
                "timed_out",
            ), f"{task_id} is {status}"
            assert all(
                text is None or isinstance(json.loads(text), dict) for text in (arguments, metadata)
            )
            assert status == "completed" and last_seq == 7 or task_id not in ids
        assert {task_id: count for task_id, count in spoken if task_id in ids} == dict.fromkeys(
            ids, 3
        )

    def check_events(self, events: list[Any], ids: set[str]) -> None:
        by_task: dict[str, list[Any]] = {}
        for event in events:
            by_task.setdefault(event.task_id, []).append(event)
        for task_id, told in by_task.items():
            assert [event.seq for event in told] == list(range(1, len(told) + 1))
            assert [event.type.is_terminal for event in told] == [False] * (len(told) - 1) + [
                True
            ], [f"{event.type} {getattr(event, 'task', '')}" for event in told]
        for task_id in ids:
            assert [
                event.payload for event in by_task[task_id] if isinstance(event, StreamEvent)
            ] == ["line 0", "line 1", "line 2"]
        for task in self.tasks:
            last = by_task[task.id][-1]
            assert last.task.status is task.status and task.done()


def run_hostile(seed: int, folder: str, *, rounds: int | None = None, seconds: float = 0.0) -> str:
    """Play rounds in a fresh process, whose log and output nobody reads; return what was done.

    An `AssertionError` tells the seed of the round that failed: ``run_hostile(that, folder,
    rounds=1)`` plays it again.
    """
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"import {__name__} as scenario; scenario.play_rounds({seed}, {folder!r}, {rounds}, "
        f"{seconds})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=seconds + 20 * LONG,
    )
    told = done.stderr.decode(errors="replace")
    assert done.returncode == 0, told[-6000:]
    return told.splitlines()[-1]


def play_rounds(seed: int, folder: str, rounds: int | None, seconds: float) -> None:
    """Play rounds, each with a seed of its own, and exit with 1 where one shows a fault.

    On a thread of its own: in the main thread a `KeyboardInterrupt` is somebody's Ctrl-C.
    """
    logging.getLogger().addHandler(logging.NullHandler())
    sys.stdout = open(os.devnull, "w", errors="replace")
    faulthandler.dump_traceback_later(seconds + 18 * LONG, exit=True)
    outcome: list[str] = []
    thread = threading.Thread(
        target=_play, args=(seed, Path(folder), rounds, time.monotonic() + seconds, outcome)
    )
    thread.start()
    thread.join()
    print(outcome[0], file=sys.stderr, flush=True)
    os._exit(0 if outcome[0].startswith("ok") else 1)


def _play(seed: int, folder: Path, rounds: int | None, until: float, outcome: list[str]) -> None:
    played = 0
    try:
        while played < rounds if rounds is not None else time.monotonic() < until:
            current = Round(seed + played, folder)
            try:
                current.play(40)
            finally:
                current.is_over = True
                current.pool.shutdown(wait=False)
            for path in folder.iterdir():
                path.unlink()
            played += 1
        outcome.append(f"ok: {played} rounds")
    except BaseException as error:
        outcome.append(f"{''.join(traceback.format_tb(error.__traceback__))}"
                       f"seed {seed + played}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("seed", [1000, 2000])
def test_hostile_objects_everywhere_end_no_worker_and_cost_nobody_an_event(
    seed: int, tmp_path: Path
) -> None:
    assert run_hostile(seed, str(tmp_path), rounds=4) == "ok: 4 rounds"


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: JsonlSink(folder / "events.jsonl"),
        lambda folder: SqliteSink(folder / "history.db"),
        lambda folder: WebhookSink("http://127.0.0.1:9/", secret=new_secret()),
    ],
    ids=["jsonl", "sqlite", "webhook"],
)
@pytest.mark.parametrize("data", [object(), (object(), "text", False, 0), 7, ("x",)], ids=range(4))
def test_what_cannot_be_encoded_is_refused_for_itself_whatever_the_encoder_raises(
        make: Callable[[Path], Any], data: Any, tmp_path: Path) -> None:
    sink = make(tmp_path)
    state = TaskState(new_id(1), "odd", new_id(0), 1)
    odd: Any = (state, 1, OUTPUT, 1, data)
    try:
        with pytest.raises(PermanentSinkError) as refusal:
            sink.write(Batch([odd]))
        assert (
            refusal.value.concerns == "event"
        ), "delivery halves the batch, and its neighbours go on"
    finally:
        sink.close()

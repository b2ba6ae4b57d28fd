"""The SQLite sink when all goes well: what it stores, that it stores it once, where, and what it
refuses.

Black box: a real Scheduler or plain batches go in, SQL on the file looks at what is there.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import datetime, timezone
from hashlib import sha256
from inspect import getsource
from pathlib import Path
from typing import Any, List, Tuple

import pytest
from hypothesis import given, settings, strategies as st
from tests.reading import check_whole, dicts, query, value_of

from bgworker import JsonlSink, Scheduler, __version__, current_task, open_sink, shell
from bgworker.history import schema
from bgworker.model.errors import (
    ConfigurationError,
    PermanentSinkError,
    SinkError,
    TemporarySinkError,
)
from bgworker.model.events import (
    Event,
    EventType,
    LifecycleEvent,
    LossEvent,
    StreamEvent,
    StreamType,
    TaskSnapshot,
    TaskStatus,
)
from bgworker.model.ids import new_id, new_run_id
from bgworker.model.records import (
    CANCELLED,
    COMPLETED,
    CREATED,
    ERROR,
    FAILED,
    LOST,
    OUTPUT,
    PROGRESS,
    SCHEDULED,
    STARTED,
    TIMED_OUT,
    VERBOSE,
    WARNING,
    Batch,
    TaskState,
)
from bgworker.history.sink import SqliteSink
from bgworker.model.wire import decode
from tests.support import environment, in_child, needs_fork

SOON = 30.0
Record = Tuple[Any, int, int, int, Any]
Make = Callable[..., SqliteSink]
Form = Callable[[List[Record]], Sequence[Event]]
in_both_forms = pytest.mark.parametrize(
    "form", [Batch, lambda records: list(Batch(records))], ids=["records", "DTOs"]
)
NOW_NS = 1_795_445_160_123_456_000
NOW = datetime(2026, 11, 23, 14, 46, 0, 123456, tzinfo=timezone.utc)
NOW_TEXT = "2026-11-23T14:46:00.123456Z"
TABLES = ("runs", "scripts", "tasks", "task_streams", "losses")
@pytest.fixture
def make(path: str) -> Iterator[Callable[..., SqliteSink]]:
    with ExitStack() as stack:
        def make(where: str | os.PathLike[str] = path, **config: Any) -> SqliteSink:
            sink = SqliteSink(where, **config)
            stack.callback(sink.close)
            return sink

        yield make


def contents(path: str) -> dict[str, list[Any]]:
    """All that a reader of the file can see, in an order of its own, but for the keys, which tell
    what came first."""
    found = {
        table: sorted(
            (list(row.items()) for row in dicts(path, f"SELECT * FROM {table}")), key=repr
        )
        for table in TABLES
    }
    found["tasks"] = sorted(
        ([column for column in row if column[0] != "key"] for row in found["tasks"]), key=repr
    )
    return found


def a_state(id: str = "a" * 32, run_id: str = "b" * 32, **fields: Any) -> TaskState:
    state = TaskState(id, "load", run_id, NOW_NS)
    for name, value in fields.items():
        setattr(state, name, value)
    return state


def a_life(state: TaskState, end: int = COMPLETED) -> list[Record]:
    """The records of a task from its creation to its end, with a row of every stream."""
    state.started_ns, state.completed_ns, state.duration = NOW_NS + 10**9, NOW_NS + 3 * 10**9, 2.0
    state.recorded_percent, state.recorded_message = 50.0, "half"
    if end == FAILED:
        state.failure_type, state.failure_message, state.invocation_info = (
            "ValueError",
            "bad",
            "Traceback ...",
        )
    data: list[tuple[int, Any]] = [
        (CREATED, None),
        (SCHEDULED, None),
        (STARTED, None),
        (OUTPUT, "hello\n"),
        (PROGRESS, (25.0, "quarter")),
        (ERROR, ('{"a":[1]}', "json", False, 0)),
        (PROGRESS, (50.0, "half")),
        (WARNING, ("cut", "text", True, 4711)),
        (VERBOSE, ""),
        (end, None),
    ]
    return [
        (state, seq, kind, NOW_NS + seq * 10**6, datum) for seq, (kind, datum) in enumerate(data, 1)
    ]


def store(path: str, *batches: Sequence[Event]) -> dict[str, list[Any]]:
    sink = SqliteSink(path)
    try:
        for batch in batches:
            sink.write(batch)
    finally:
        sink.close()
    check_whole(path)
    return contents(path)


# -- a real scheduler's record, column by column --


def talk(size: int) -> int:
    task = current_task()
    task.progress(1, 4, "one of four")
    task.output("plain")
    task.output({"rows": [size, None]})
    task.error("no good")
    task.warning("x" * 200)
    task.verbose("by the way")
    task.progress(2, 4, "two of four")
    return size


def fail(message: str) -> None:
    raise ValueError(message)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tasks with every way to end, recorded by a real Scheduler: the path, and what it knew of
    them."""
    path = str(tmp_path_factory.mktemp("recorded") / "history.db")
    release, tasks = threading.Event(), {}
    pool = Scheduler(1, sinks=[SqliteSink(path)], max_payload=100, progress_interval=0.0)
    try:
        special = pool.options(
            name="talk",
            timeout=3600.0,
            metadata={"ticket": 7},
            record_source=True,
            record_arguments=True,
        )
        tasks["completed"] = special.submit(talk, 3)
        tasks["failed"] = pool.options(name="fails").submit(fail, "bad row\nsecond line")
        tasks["timed_out"] = pool.options(name="slow", timeout=0.05).submit(
            lambda: current_task().sleep(SOON)
        )
        for task in tasks.values():
            assert task.wait(SOON)
        blocker = pool.options(name="blocker").submit(release.wait, SOON)
        tasks["cancelled"] = pool.options(name="queued").submit(len, "x")
        assert tasks["cancelled"].cancel("not tonight")
        release.set()
        assert blocker.wait(SOON) and pool.flush(SOON)
    finally:
        release.set()
        pool.shutdown()
    return {"path": path, **tasks}


def row_of(recorded: dict[str, Any], status: str) -> dict[str, Any]:
    (row,) = dicts(recorded["path"], f"SELECT * FROM tasks WHERE id = '{recorded[status].id}'")
    return row


def text_of(time: datetime | None) -> str | None:
    return None if time is None else time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@pytest.mark.parametrize("status", ["completed", "failed", "timed_out", "cancelled"])
def test_the_row_of_a_task_says_what_its_snapshot_says(
    recorded: dict[str, Any], status: str
) -> None:
    task = recorded[status].snapshot()
    row = row_of(recorded, status)
    metadata = json.dumps(dict(task.metadata), separators=(",", ":")) if task.metadata else None
    assert isinstance(row.pop("key"), int)
    assert row == {
        "id": task.task_id,
        "run_id": task.run_id,
        "name": task.name,
        "status": status,
        "created_utc": text_of(task.created_utc),
        "scheduled_utc": text_of(task.scheduled_utc),
        "started_utc": text_of(task.started_utc),
        "completed_utc": text_of(task.completed_utc),
        "duration_sec": task.duration,
        "timeout_sec": task.timeout,
        "last_progress_pct": task.last_progress_percent,
        "last_progress_msg": task.last_progress_message,
        "script_id": task.script_id,
        "script_hash": task.script_hash,
        "arg_json": task.arguments,
        "metadata_json": metadata,
        "failure_type": task.failure_type,
        "failure_message": task.failure_message,
        "invocation_info": task.invocation_info,
        "exit_code": None,
        "result_json": task.result,
        "rerun_of": None,
        "last_seq": task.last_seq,
    }


def test_the_columns_of_a_task_hold_what_was_asked_for(recorded: dict[str, Any]) -> None:
    row = row_of(recorded, "completed")
    assert (
        row["name"],
        row["timeout_sec"],
        row["last_progress_pct"],
        row["last_progress_msg"],
    ) == ("talk", 3600.0, 50.0, "two of four")
    assert json.loads(row["arg_json"]) == {"args": [3], "kwargs": {}}
    assert json.loads(row["metadata_json"]) == {"ticket": 7}
    assert row["script_id"].endswith(":talk")
    assert row["created_utc"] <= row["scheduled_utc"] <= row["started_utc"] <= row["completed_utc"]
    assert row["last_seq"] == 11, "three before the streams, seven streams, one end"
    failed = row_of(recorded, "failed")
    assert (failed["failure_type"], failed["failure_message"]) == (
        "ValueError",
        "bad row\nsecond line",
    )
    assert failed["invocation_info"].startswith("Traceback (most recent call last)")
    queued = row_of(recorded, "cancelled")
    assert (queued["started_utc"], queued["duration_sec"], queued["failure_message"]) == (
        None,
        None,
        "not tonight",
    )
    assert queued["completed_utc"] is not None


def test_every_stream_of_a_task_stands_in_the_view_in_order(recorded: dict[str, Any]) -> None:
    task = recorded["completed"]
    found = query(
        recorded["path"],
        "SELECT seq, stream_type, payload, format, truncated, percent, original_bytes "
        "FROM task_streams WHERE task_id = ? ORDER BY seq",
        task.id,
    )
    (cut,) = [row for row in found if row[1] == "warning"]
    assert cut[2].startswith("x") and len(cut[2].encode()) <= 100
    assert found == [
        (4, "progress", "one of four", "text", 0, 25.0, None),
        (5, "output", "plain", "text", 0, None, None),
        (6, "output", '{"rows":[3,null]}', "json", 0, None, None),
        (7, "error", "no good", "text", 0, None, None),
        (8, "warning", cut[2], "text", 1, None, 200),
        (9, "verbose", "by the way", "text", 0, None, None),
        (10, "progress", "two of four", "text", 0, 50.0, None),
    ]
    times = query(
        recorded["path"],
        "SELECT seq, created_utc FROM task_streams WHERE task_id = ? ORDER BY seq",
        task.id,
    )
    assert times == [(event.seq, text_of(event.created_utc)) for event in task.streams()]


def test_a_run_of_this_process_is_described_and_ends_with_the_sink(
    recorded: dict[str, Any],
) -> None:
    (run,) = dicts(recorded["path"], "SELECT * FROM runs")
    started, ended = run.pop("started_utc"), run.pop("ended_utc")
    assert run == {
        "run_id": recorded["completed"].snapshot().run_id,
        "host": platform.node(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "version": __version__,
    }
    first, last = query(recorded["path"], "SELECT min(created_utc), max(completed_utc) FROM tasks")[
        0
    ]
    assert started <= first and last <= ended


def test_the_text_of_a_script_is_kept_only_where_that_was_asked_for(
    recorded: dict[str, Any],
) -> None:
    scripts = {row["script_id"]: row for row in dicts(recorded["path"], "SELECT * FROM scripts")}
    (with_text,) = [row for row in scripts.values() if row["text"] is not None]
    assert with_text["script_id"].endswith(":talk") and with_text["text"] == getsource(talk)
    assert with_text["hash"] == sha256(getsource(talk).encode()).hexdigest()
    assert value_of(recorded["path"], "SELECT count(*) FROM tasks") == 5
    assert len(scripts) == 5
    check_whole(recorded["path"])


def test_a_script_is_stored_once_for_all_of_its_tasks_and_its_text_may_come_later(
    path: str,
) -> None:
    with Scheduler(1, sinks=[SqliteSink(path)]) as pool:
        for options in (pool.options(), pool.options(record_source=True), pool.options()):
            assert options.submit(talk, 1).wait(SOON) and pool.flush(SOON)
    joined = "SELECT text, count(*) FROM tasks JOIN scripts ON hash = script_hash GROUP BY hash"
    assert query(path, joined) == [(getsource(talk), 3)]
    assert value_of(path, "SELECT count(*) FROM scripts") == 1


# -- once, in any order, from records and DTOs --


def test_a_batch_that_comes_twice_adds_nothing(path: str, make: Make) -> None:
    loss = None, 0, LOST, NOW_NS, ("hook", "overflow", 3, {"TaskOutput": 2, "TaskError": 1})
    batch = Batch([*a_life(a_state()), loss])
    sink = make()
    sink.write(batch)
    before = contents(path)
    assert {table: len(rows) for table, rows in before.items()} == {
        "runs": 1, "scripts": 0, "tasks": 1, "task_streams": 6, "losses": 1}
    sink.write(batch)
    sink.write(list(batch))
    assert contents(path) == before


def test_losses_are_kept_apart_by_all_that_they_say(path: str) -> None:
    losses = [LossEvent(EventType.EVENTS_LOST, NOW, "hook", 3, "overflow", {"TaskOutput": 3}),
              LossEvent(EventType.EVENTS_LOST, NOW, "hook", 4, "overflow", {"TaskOutput": 4}),
              LossEvent(EventType.EVENTS_LOST, NOW, "park", 3, "overflow", {"TaskOutput": 3}),
              LossEvent(EventType.EVENTS_LOST, NOW, "hook", 3, "failed", {"TaskOutput": 3})]
    store(path, losses, losses)
    assert query(
        path, "SELECT sink, reason, count, by_type, created_utc FROM losses ORDER BY rowid"
    ) == [
        (
            loss.sink,
            loss.reason,
            loss.count,
            json.dumps({"TaskOutput": loss.count}, separators=(",", ":")),
            NOW_TEXT,
        )
        for loss in losses
    ]


@in_both_forms
@pytest.mark.parametrize("end", [COMPLETED, FAILED, CANCELLED, TIMED_OUT])
def test_a_start_that_is_replayed_does_not_undo_the_end(path: str, form: Form, end: int) -> None:
    life = a_life(a_state(), end)
    once = store(path, form(life))
    status = {
        COMPLETED: "completed",
        FAILED: "failed",
        CANCELLED: "cancelled",
        TIMED_OUT: "timed_out",
    }[end]
    assert value_of(path, "SELECT status FROM tasks") == status
    assert store(path, form(life[:3]), form(life[2:3]), form(life[4:5])) == once


@in_both_forms
def test_streams_that_come_before_their_task_is_known_are_kept_and_the_task_is_completed_later(
        path: str, form: Form) -> None:
    life = a_life(a_state(timeout=9.0, metadata_json='{"a":1}', arguments='{"args":[]}'))
    store(path, form(life[3:4]))
    assert query(path, "SELECT payload FROM task_streams") == [("hello\n",)]
    assert value_of(path, "SELECT status FROM tasks") == "running"
    once = store(str(Path(path).with_name("once.db")), form(life))
    assert store(path, form(life[5:6]), form(life)) == once


def test_a_task_of_which_only_streams_are_told_has_a_row_without_a_run(path: str) -> None:
    store(
        path,
        [
            StreamEvent(EventType.TASK_OUTPUT, "c" * 32, 7, NOW, StreamType.OUTPUT, "alone"),
            StreamEvent(
                EventType.TASK_PROGRESS,
                "c" * 32,
                8,
                NOW,
                StreamType.PROGRESS,
                "",
                percent=3.0,
                message="third",
            ),
        ],
    )
    (row,) = dicts(path, "SELECT * FROM tasks")
    assert {name: value for name, value in row.items() if value is not None} == {
        "key": 1,
        "id": "c" * 32,
        "name": "",
        "status": "running",
        "created_utc": NOW_TEXT,
        "last_progress_pct": 3.0,
        "last_progress_msg": "third",
        "last_seq": 0,
    }
    assert query(path, "SELECT payload FROM task_streams ORDER BY seq") == [("alone",), ("third",)]


@in_both_forms
def test_the_row_of_a_running_task_follows_its_progress(path: str, form: Form) -> None:
    life = a_life(a_state())
    seen = []
    for batch in (life[:3], life[4:5], life[6:7], life[4:5]):
        store(path, form(batch))
        seen += query(path, "SELECT status, last_progress_pct, last_progress_msg FROM tasks")
    half = "running", 50.0, "half"
    assert seen == [("running", None, None), ("running", 25.0, "quarter"), half, half]


def test_a_snapshot_that_was_judged_interrupted_is_stored_as_it_is(path: str) -> None:
    task = TaskSnapshot(
        "a" * 32, "load", TaskStatus.INTERRUPTED, "b" * 32, NOW, NOW, NOW, last_seq=3
    )
    store(path, [LifecycleEvent(EventType.TASK_STARTED, "a" * 32, 3, NOW, task)])
    assert query(path, "SELECT status, completed_utc FROM tasks") == [("interrupted", None)]


def test_an_end_without_its_time_gets_the_time_of_its_event(path: str) -> None:
    task = TaskSnapshot("a" * 32, "load", TaskStatus.COMPLETED, "b" * 32, NOW)
    store(path, [LifecycleEvent(EventType.TASK_COMPLETED, "a" * 32, 4, NOW, task)])
    assert query(path, "SELECT status, completed_utc FROM tasks") == [("completed", NOW_TEXT)]


@in_both_forms
def test_a_result_is_stored_with_the_end_and_not_before(path: str, form: Form) -> None:
    life = a_life(a_state(result='{"rows":7}'))
    seen = []
    for batch in (life[:3], life[3:-1], life[-1:], life[:3]):
        store(path, form(batch))
        seen += query(path, "SELECT status, result_json FROM tasks")
    end = "completed", '{"rows":7}'
    assert seen == [("running", None), ("running", None), end, end]


@in_both_forms
def test_a_task_names_the_one_that_it_runs_again(path: str, form: Form) -> None:
    for number, metadata in enumerate(
            ["", '{"rerun_of":"' + 32 * "c" + '","n":1}', '{"rerun_of":7}',
             '{"a":{"rerun_of":"b"}}', '{"truncated":99,"head":"\\"rerun_of\\":1"}']):
        state = a_state(f"{number:032x}", metadata_json=metadata)
        store(path, form(a_life(state)))
    assert query(path, "SELECT rerun_of FROM tasks ORDER BY id") == [
        (None,), (32 * "c",), (None,), (None,), (None,)]
    (plan,) = query(path, "EXPLAIN QUERY PLAN SELECT id FROM tasks t WHERE EXISTS "
                    "(SELECT 1 FROM tasks WHERE rerun_of = t.id)")[-1:]
    assert "COVERING INDEX tasks_rerun" in plan[3] or "INDEX tasks_rerun" in plan[3], plan


# -- requests to cancel --


def request(path: str, *task_ids: str) -> None:
    with closing(schema.connect_to_write(path)) as connection:
        connection.executemany("INSERT INTO zz_requests VALUES (?, 'user', '2026', NULL)",
                               [(task_id,) for task_id in task_ids])


def requests(path: str) -> list[str]:
    return [task_id for task_id, in query(path, "SELECT task_id FROM zz_requests ORDER BY 1")]


@in_both_forms
@pytest.mark.parametrize("end", [COMPLETED, FAILED, CANCELLED, TIMED_OUT])
def test_a_request_to_cancel_goes_with_the_end_of_its_task(
        path: str, form: Form, end: int) -> None:
    life, other = a_life(a_state("a" * 32), end), a_life(a_state("c" * 32))
    store(path, form(life[:3]), form(other[:3]))
    request(path, "a" * 32, "c" * 32)
    store(path, form(life[3:-1]))
    assert requests(path) == ["a" * 32, "c" * 32], "both run still"
    store(path, form(life[-1:]))
    assert requests(path) == ["c" * 32]


def test_without_a_request_the_rows_cost_no_statement_more(path: str) -> None:
    sink, seen = SqliteSink(path), []
    sink.open()
    try:
        with sink._database as connection:
            connection.set_trace_callback(seen.append)
        for number in (1, 2):
            sink.write(Batch(a_life(a_state(f"{number:032x}"))[:3]))
            if number == 1:
                request(path, f"{1:032x}")
        about = [statement.split()[0] for statement in seen if "zz_requests" in statement]
        assert about == ["SELECT", "SELECT", "DELETE"], "the question is one that was there"
    finally:
        sink.close()


_messages = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)
_speech = st.one_of(
    st.tuples(st.sampled_from([OUTPUT, ERROR, WARNING, VERBOSE]), _messages),
    st.tuples(
        st.sampled_from([OUTPUT, ERROR, WARNING, VERBOSE]),
        st.tuples(
            _messages, st.sampled_from(["text", "json"]), st.just(True), st.integers(1, 10**9)
        ),
    ),
    st.tuples(st.sampled_from([OUTPUT, ERROR]), st.just(('{"a":1}', "json", False, 0))),
    st.tuples(st.just(PROGRESS), st.tuples(st.none() | st.floats(0, 100), _messages)),
)


@st.composite
def _lives(draw: st.DrawFn, number: int, *, is_whole: bool) -> list[Record]:
    state = TaskState(
        f"{number:032x}", draw(_messages), f"{draw(st.integers(0, 1)):032x}", NOW_NS + number * 1000
    )
    state.timeout = draw(st.none() | st.floats(0.1, 100))
    state.arguments = draw(st.none() | st.just('{"args":[]}'))
    state.metadata_json = draw(st.sampled_from(["", '{"a":1}', '{"rerun_of":"b"}']))
    speech = draw(st.lists(_speech, max_size=5))
    end = draw(st.sampled_from([COMPLETED, FAILED, CANCELLED, TIMED_OUT]))
    has_begun = end != CANCELLED or bool(speech) or draw(st.booleans())
    state.started_ns = NOW_NS + 5_000_000 if has_begun else None
    state.completed_ns = NOW_NS + 9_000_000
    state.duration = 0.25 if has_begun else None
    if end == FAILED:
        state.failure_type, state.failure_message, state.invocation_info = (
            "ValueError",
            draw(_messages),
            "Traceback",
        )
    elif end == CANCELLED:
        state.failure_message = draw(st.none() | _messages)
    elif end == COMPLETED:
        state.result = draw(st.sampled_from([None, "null", "[7]"]))
    for kind, data in speech:
        if kind == PROGRESS:
            state.recorded_percent, state.recorded_message = data
    begin: list[tuple[int, Any]] = [(CREATED, None), (SCHEDULED, None), (STARTED, None)][
        : 3 if has_begun else 2
    ]
    kinds = [*begin, *speech, (end, None)]
    if not is_whole:
        kinds = kinds[:draw(st.integers(1, len(kinds)))]
    return [
        (state, seq, kind, NOW_NS + seq * 1000, data) for seq, (kind, data) in enumerate(kinds, 1)
    ]


@st.composite
def _merged(draw: st.DrawFn, *, is_whole: bool) -> list[Record]:
    """Some tasks' records, as a dispatcher would number and mix them."""
    lives = [draw(_lives(number, is_whole=is_whole)) for number in range(draw(st.integers(1, 3)))]
    order = draw(st.permutations([number for number, life in enumerate(lives) for _ in life]))
    queues = [iter(life) for life in lives]
    return [next(queues[number]) for number in order]


@st.composite
def _cut(draw: st.DrawFn, records: list[Record]) -> list[list[Record]]:
    cuts = sorted(draw(st.sets(st.integers(1, len(records)), max_size=4)) | {0, len(records)})
    return [records[begin:end] for begin, end in zip(cuts, cuts[1:])]


def _stored(*batches: Sequence[Event]) -> dict[str, list[Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return store(os.path.join(folder, "history.db"), *batches)


@settings(max_examples=20)
@given(_merged(is_whole=False).flatmap(_cut))
def test_dtos_give_the_rows_that_records_give(batches: list[list[Record]]) -> None:
    by_records = _stored(*map(Batch, batches))
    assert _stored(*[list(Batch(batch)) for batch in batches]) == by_records
    assert by_records["tasks"]


@settings(max_examples=20)
@given(_merged(is_whole=True).flatmap(lambda records: st.tuples(
    st.just(records), st.permutations(range(2 * len(records))),
    st.lists(st.booleans(), min_size=2 * len(records), max_size=2 * len(records)))))
def test_events_that_come_twice_and_in_any_order_give_the_rows_that_they_give_in_order(
        drawn: tuple[list[Record], list[int], list[bool]]) -> None:
    """As batches of one event: within a batch those of a task ascend. As DTOs, as records, and
    mixed in one file."""
    records, order, forms = drawn
    shuffled = [Batch([records[number % len(records)]]) for number in order]
    mixed = [list(batch) if is_dto else batch for batch, is_dto in zip(shuffled, forms)]
    expected = _stored(Batch(records))
    assert _stored(*shuffled) == expected
    assert _stored(*[list(batch) for batch in shuffled]) == expected
    assert _stored(*mixed) == expected


@settings(max_examples=15)
@given(_merged(is_whole=False).flatmap(_cut), st.data())
def test_what_is_delivered_again_later_changes_nothing(
    batches: list[list[Record]], data: st.DataObject
) -> None:
    again = [
        batches[number]
        for number in data.draw(st.lists(st.integers(0, len(batches) - 1), max_size=4))
    ]
    expected = _stored(*map(Batch, batches))
    assert _stored(*map(Batch, batches + again)) == expected
    assert _stored(*[list(Batch(batch)) for batch in batches + again]) == expected


# -- the common batch takes a shorter way to the same rows --

PLAIN = (CREATED, SCHEDULED, STARTED, COMPLETED, FAILED, CANCELLED, TIMED_OUT)


def silent_tasks() -> list[TaskState]:
    """Tasks without anything beside: of many names and two runs, begun and ended at all sorts of
    times."""
    times = [
        (NOW_NS, 1, 10**6 + 2),
        (NOW_NS + 999_999_000, 7_000, 123_456_789_012),
        (5, 10**9, 10**10),
        (NOW_NS, 0, 10**9),
        (NOW_NS - 10**18, 10**17, 86_400 * 10**9),
        (NOW_NS + 876_543_999, 10**8, 10**8),
    ]
    states = []
    for number in range(60):
        created, wait, run = times[number % len(times)]
        state = a_state(f"{number:032x}", run_id="bc"[number % 2] * 32)
        state.name = ("load", f'"{number % 11}\u20ac"')[number % 5 > 2]
        state.created_ns, state.completed_ns, state.duration = (
            created,
            created + wait + run,
            run / 1e9,
        )
        if wait:
            state.started_ns = created + wait
        else:
            state.duration = None  # cancelled before it ran
        states.append(state)
    return states


@pytest.mark.parametrize(
    "kinds", [[kind] for kind in PLAIN] + [[SCHEDULED, STARTED, COMPLETED]], ids=str
)
def test_tasks_that_say_nothing_have_the_rows_of_their_snapshots_whatever_their_names_and_times(
        path: str, kinds: list[int]) -> None:
    batches = [
        [(state, kind + 1, kind, state.created_ns, None) for state in silent_tasks()]
        for kind in kinds
    ]
    expected = store(
        str(Path(path).with_name("once.db")), *[list(Batch(batch)) for batch in batches]
    )
    assert store(path, *map(Batch, batches)) == expected
    assert len(expected["tasks"]) == 60
    together = [record for batch in batches for record in batch]
    assert store(str(Path(path).with_name("together.db")), Batch(together)) == expected


def said(state: TaskState, numbers: range, kind: int = OUTPUT) -> Batch:
    return Batch(
        [
            (state, seq, kind, NOW_NS + seq * 1000, f"{seq}: \u20ac\U0001f600'\"" * (seq % 3))
            for seq in numbers
        ]
    )


@pytest.mark.parametrize("count", [1, 40, 3000])
def test_what_one_task_says_is_stored_like_anything_else_and_once(
    path: str, make: Make, count: int
) -> None:
    sink, state = make(), a_state(run_id=new_run_id(NOW_NS))
    state.started_ns = NOW_NS
    speech = said(state, range(4, 4 + count), ERROR)
    expected = store(str(Path(path).with_name("once.db")), list(speech))["task_streams"]
    sink.write(speech)  # nothing is known of the task
    first = contents(path)
    assert first["task_streams"] == expected and len(first["tasks"]) == len(first["runs"]) == 1
    sink.write(speech)  # all is
    assert contents(path) == first
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM zz_stream_rows")
    connection.close()
    sink.write(speech)
    assert contents(path) == first


@pytest.mark.parametrize(("count", "statements"), [(1, 1), (100, 1), (3000, 2 + 3)], ids=str)
def test_what_a_known_task_says_is_one_statement_as_long_as_it_is_short(
    make: Make, count: int, statements: int
) -> None:
    sink, state, seen = make(), a_state(run_id=new_run_id(NOW_NS)), []
    state.started_ns = NOW_NS
    sink.write(said(state, range(4, 5)))
    with sink._database as connection:
        connection.set_trace_callback(lambda text: seen.append(text.split()[0]))
    sink.write(said(state, range(5, 5 + count)))
    assert len(seen) == statements and seen.count("INSERT") == statements - 2 * ("BEGIN" in seen)


@pytest.mark.parametrize("times", [(-1_500, 1_500), (-1_500, -500), (1_500, -500)], ids=str)
def test_what_is_said_about_1970_has_the_same_time_whichever_way_it_is_stored(
        path: str, make: Make, times: tuple[int, int]) -> None:
    sink, state = make(), a_state(run_id=new_run_id(NOW_NS))
    state.started_ns = NOW_NS
    sink.write(said(state, range(4, 5)))  # from here on the file knows the task
    records = [(state, seq, OUTPUT, ns, "x") for seq, ns in enumerate(times, 5)]
    sink.write(Batch(records))
    assert query(path, "SELECT created_us FROM zz_stream_rows WHERE seq > 4") == [
        (ns // 1000,) for ns in times
    ]


def test_who_talks_is_known_again_though_the_task_or_the_run_was_removed_or_closed_meanwhile(
        path: str, make: Make) -> None:
    sink, state = make(), a_state(run_id=new_run_id(NOW_NS))
    state.started_ns = NOW_NS
    expected = 0
    for number, damage in enumerate(
        (
            "SELECT 1",
            "DELETE FROM runs",
            "UPDATE runs SET ended_utc = 'then'",
            "UPDATE runs SET host = NULL",
            "DELETE FROM tasks",
            "SELECT 1",
        )
    ):
        with sqlite3.connect(path) as connection:
            if number:
                connection.execute(damage)
                if "tasks" in damage:
                    connection.execute("DELETE FROM zz_stream_rows")
                    expected = 0
        connection.close()
        sink.write(said(state, range(number * 2 + 4, number * 2 + 6)))
        expected += 2
        assert query(path, "SELECT host, pid, ended_utc FROM runs") == [
            (platform.node(), os.getpid(), None)
        ]
        assert query(path, "SELECT id, status, run_id FROM tasks") == [
            (state.id, "running", state.run_id)
        ]
        assert value_of(path, "SELECT count(*) FROM task_streams") == expected


def test_what_one_task_says_to_a_file_in_use_is_refused_for_now_as_a_whole(
        path: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "BUSY_SECONDS", 0.1)
    sink, state = make(), a_state(run_id=new_run_id(NOW_NS))
    state.started_ns = NOW_NS
    sink.write(said(state, range(4, 6)))
    stranger = sqlite3.connect(path, isolation_level=None)
    stranger.execute("BEGIN IMMEDIATE")
    for numbers in (range(6, 7), range(6, 3000)):
        with pytest.raises(TemporarySinkError, match="is locked"):
            sink.write(said(state, numbers))
    stranger.execute("ROLLBACK")
    stranger.close()
    assert value_of(path, "SELECT count(*) FROM task_streams") == 2
    sink.write(said(state, range(6, 3000)))
    assert value_of(path, "SELECT count(*) FROM task_streams") == 2996


# -- runs --


def test_of_a_run_that_was_replayed_nothing_is_claimed(path: str) -> None:
    store(path, list(Batch(a_life(a_state(run_id=new_id(NOW_NS))))))
    (run,) = dicts(path, "SELECT * FROM runs")
    assert {name for name, value in run.items() if value is not None} == {"run_id"}


def test_a_run_of_ours_has_no_end_until_the_sink_is_closed_and_none_again_once_it_is_written_to(
        path: str, make: Make) -> None:
    sink, batch = make(), Batch(a_life(a_state(run_id=new_run_id(NOW_NS))))
    ends = []
    for act in (lambda: sink.write(batch), sink.close, lambda: sink.write(batch), sink.close):
        act()
        ends.append(value_of(path, "SELECT ended_utc FROM runs") is not None)
    assert ends == [False, True, False, True]
    assert (
        value_of(path, "SELECT started_utc FROM runs") == "2026-11-23T14:46:00.123000Z"
    ), "the time in its id"


# -- the file --


def test_the_file_is_known_by_its_header_and_written_ahead(path: str, make: Make) -> None:
    make().open()
    names = "application_id", "user_version", "journal_mode", "auto_vacuum"
    assert [value_of(path, f"PRAGMA {name}") for name in names] == [
        schema.APPLICATION_ID,
        schema.VERSION,
        "wal",
        2,
    ]
    assert value_of(path, "SELECT count(*) FROM tasks") == 0


@pytest.mark.parametrize(("durability", "level"), [("process", 1), ("power", 2)])
def test_a_connection_that_is_to_survive_a_power_failure_syncs_each_commit(
    path: str, make: Make, monkeypatch: pytest.MonkeyPatch, durability: str, level: int
) -> None:
    opened: list[sqlite3.Connection] = []
    connect = schema.connect_to_write
    monkeypatch.setattr(
        schema,
        "connect_to_write",
        lambda *arguments: opened.append(connect(*arguments)) or opened[-1],
    )
    make(durability=durability).open()
    assert [connection.execute("PRAGMA synchronous").fetchone() for connection in opened] == [
        (level,)
    ]


def test_a_path_is_made_absolute_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    monkeypatch.chdir(tmp_path)
    sink = make(Path("here.db"))
    monkeypatch.chdir("/")
    sink.open()
    assert sink.path == str(tmp_path / "here.db") and os.path.exists(sink.path)
    assert repr(sink) == f"SqliteSink({sink.path!r})"


def test_closing_twice_or_unopened_is_harmless_and_makes_no_file(path: str, make: Make) -> None:
    sink = make()
    sink.close()
    sink.close()
    assert not os.path.exists(path)


def test_a_sink_that_was_closed_opens_again_when_written_to(path: str, make: Make) -> None:
    sink = make()
    sink.write(Batch(a_life(a_state("1" * 32))))
    sink.close()
    sink.close()
    assert not os.path.exists(f"{path}-wal"), "the last to close leaves one file"
    sink.write(Batch(a_life(a_state("2" * 32))))
    sink.flush()
    sink.close()
    assert query(path, "SELECT id FROM tasks ORDER BY id") == [("1" * 32,), ("2" * 32,)]
    check_whole(path)


def test_two_sinks_of_one_process_write_one_file_at_once(path: str, make: Make) -> None:
    sinks, broken, barrier = [make(), make()], [], threading.Barrier(2)

    def write(number: int) -> None:
        try:
            barrier.wait(SOON)
            for index in range(25):
                sinks[number].write(Batch(a_life(a_state(f"{number}{index:031}"))))
            sinks[number].close()
        except BaseException as error:
            broken.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert broken == []
    assert query(
        path, "SELECT (SELECT count(*) FROM tasks), (SELECT count(*) FROM zz_stream_rows)"
    ) == [(50, 300)]
    check_whole(path)


def test_a_file_that_is_deleted_meanwhile_is_made_anew(path: str, make: Make) -> None:
    sink = make()
    sink.write(Batch(a_life(a_state("1" * 32))))
    for name in (path, f"{path}-wal", f"{path}-shm"):
        os.remove(name)
    sink.write(Batch(a_life(a_state("2" * 32))))
    sink.close()
    assert query(path, "SELECT id FROM tasks") == [("2" * 32,)]
    check_whole(path)


@needs_fork
def test_a_forked_child_neither_disturbs_its_parents_file_nor_ends_its_runs(
    path: str, make: Make
) -> None:
    sink, run_id = make(), new_run_id(NOW_NS)
    sink.write(Batch(a_life(a_state("1" * 32, run_id))[:4]))
    pid = os.fork()
    if pid == 0:
        try:
            sink.write(Batch(a_life(a_state("2" * 32, "c" * 32))))
            sink.close()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert value_of(path, "SELECT ended_utc FROM runs WHERE run_id = ?", run_id) is None
    sink.write(Batch(a_life(a_state("3" * 32, run_id))))
    sink.close()
    assert query(path, "SELECT id, status FROM tasks ORDER BY id") == [
        ("1" * 32, "running"), ("2" * 32, "completed"), ("3" * 32, "completed")]
    assert value_of(path, "SELECT ended_utc FROM runs WHERE run_id = ?", run_id) is not None
    check_whole(path)


# -- what is refused --


@pytest.mark.parametrize(("options", "said"), [
    ({"max_age": 0}, "max_age: expected a number > 0 or None, got 0"),
    ({"max_age": -1.5}, r"max_age: expected a number > 0 or None, got -1\.5"),
    ({"max_age": "1d"}, "max_age: expected a number > 0 or None, got '1d'"),
    ({"max_age": float("nan")}, "max_age: expected a number > 0 or None, got nan"),
    ({"max_age": float("inf")}, r"max_age: expected a number > 0 or None, got inf; at most 9e\+09"),
    ({"max_tasks": -1}, "max_tasks: expected a whole number >= 0 or None, got -1"),
    ({"max_tasks": 1.5}, r"max_tasks: expected a whole number >= 0 or None, got 1\.5"),
    ({"max_tasks": True}, "max_tasks: expected a whole number >= 0 or None, got True"),
    ({"max_bytes": 0}, "max_bytes: expected a whole number >= 1 or None, got 0"),
    ({"durability": "paper"}, "durability: expected 'process' or 'power', got 'paper'"),
    ({"durability": None}, "durability: expected 'process' or 'power', got None"),
])
def test_an_option_that_cannot_be_used_is_refused_with_what_was_expected(
        path: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{said}$"):
        SqliteSink(path, **options)
    assert not os.path.exists(path)


def test_a_spec_names_the_sink_and_its_options(path: str) -> None:
    sink = open_sink(f"sqlite:{path}?max_tasks=2&max_age=3600.5&max_bytes=64M&durability=power")
    assert isinstance(sink, SqliteSink) and sink.path == path
    sink.write([event for number in range(5) for event in Batch(a_life(a_state(f"{number:032}")))])
    sink.close()
    assert value_of(path, "SELECT count(*) FROM tasks") <= 2, "the options count"


@pytest.mark.parametrize(
    ("query_text", "said"),
    [
        ("max_tasks=-1", "max_tasks: expected a whole number >= 0 or None, got -1"),
        ("max_tasks=many", "'max_tasks' has the value 'many'; expected a whole number"),
        ("max_age=soon", "'max_age' has the value 'soon'; expected a number"),
        (
            "max_bytes=1T",
            "'max_bytes' has the value '1T'; expected a whole number, with K, M or G behind it",
        ),
        (
            "max_rows=1",
            "there is no option 'max_rows'; expected one of durability, max_age, max_bytes, "
            "max_tasks",
        ),
        ("durability=paper", "durability: expected 'process' or 'power', got 'paper'"),
    ],
)
def test_a_spec_with_an_option_that_cannot_be_used_is_refused(
    path: str, query_text: str, said: str
) -> None:
    with pytest.raises(SinkError, match=said):
        open_sink(f"sqlite:{path}?{query_text}")
    assert not os.path.exists(path)


def _newer(path: str) -> None:
    schema.connect_to_write(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    connection.close()


def _foreign(path: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE tasks (id)")
    connection.close()


def _corrupt(path: str) -> None:
    schema.connect_to_write(path).close()
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"\xa5" * 2000)


def _text(path: str) -> None:
    Path(path).write_text("dear diary\n" * 100)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_newer, "upgrade bgworker"),
        (_foreign, "belongs to another program"),
        (_corrupt, "is damaged"),
        (_text, "is no SQLite file"),
    ],
)
def test_a_file_that_is_no_history_of_ours_is_refused_at_registration_and_left_as_it_is(
        path: str, spoil: Callable[[str], None], said: str) -> None:
    spoil(path)
    before = Path(path).read_bytes(), os.stat(path).st_mtime_ns
    with pytest.raises(PermanentSinkError, match=said) as caught:
        Scheduler(1, sinks=[SqliteSink(path)])
    assert path in str(caught.value)
    assert (Path(path).read_bytes(), os.stat(path).st_mtime_ns) == before


def test_a_directory_or_a_path_in_a_missing_one_is_refused_at_registration(tmp_path: Path) -> None:
    for where, said in (
        (tmp_path, "[Dd]irectory"),
        (tmp_path / "missing" / "h.db", "No such file or directory"),
    ):
        with pytest.raises(PermanentSinkError, match=said) as caught:
            Scheduler(1, sinks=[SqliteSink(where)])
        assert str(where) in str(caught.value)
    assert os.listdir(tmp_path) == []


@needs_fork
@pytest.mark.parametrize(
    ("file_mode", "folder_mode"), [(0o444, 0o777), (0o444, 0o555), (0o666, 0o555), (0o000, 0o777)]
)
def test_a_place_that_may_not_be_written_to_is_refused_at_registration(
    file_mode: int, folder_mode: int
) -> None:
    def register(path: str) -> None:
        Scheduler(1, sinks=[SqliteSink(path)]).shutdown()

    with tempfile.TemporaryDirectory() as folder:  # pytest's own lie where nobody else may go
        path = os.path.join(folder, "h.db")
        schema.connect_to_write(path).close()
        before = Path(path).read_bytes(), os.stat(path).st_mtime_ns
        os.chmod(path, file_mode)
        os.chmod(folder, folder_mode)
        try:
            refusal = in_child(lambda: register(path), as_nobody=True)
            assert refusal.startswith(f"PermanentSinkError: cannot open {path!r}: ")
            assert refusal.endswith("name a file, in a directory, that this process may write to")
        finally:
            os.chmod(folder, 0o777)
            os.chmod(path, 0o666)
        assert (Path(path).read_bytes(), os.stat(path).st_mtime_ns) == before
        for name in os.listdir(folder):
            os.chmod(os.path.join(folder, name), 0o666)
        accepted = in_child(lambda: register(path), as_nobody=True)
        assert accepted == "None", "else the test proves nothing"


def test_another_programs_lock_is_a_temporary_trouble_and_nothing_of_the_batch_is_stored(
        path: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "BUSY_SECONDS", 0.0)
    sink = make()
    sink.open()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(
        TemporarySinkError, match="is locked; another program holds it locked; end its transaction"
    ):
        sink.write(Batch(a_life(a_state())))
    other.execute("ROLLBACK")
    other.close()
    assert value_of(path, "SELECT count(*) FROM tasks") == 0
    sink.write(Batch(a_life(a_state())))
    assert value_of(path, "SELECT count(*) FROM tasks") == 1


def test_an_event_that_never_fits_is_refused_for_good_and_takes_nothing_in_with_it(
    path: str, make: Make
) -> None:
    sink, life = make(), a_life(a_state())
    with pytest.raises(PermanentSinkError, match="cannot store an event in"):
        sink.write(Batch([*life[:4], (life[0][0], 2**70, OUTPUT, NOW_NS, "too far")]))
    assert value_of(path, "SELECT count(*) FROM tasks") == 0
    sink.write(Batch(life))
    assert value_of(path, "SELECT count(*) FROM tasks") == 1


def test_nothing_that_was_written_is_lost_when_the_process_dies_without_closing(path: str) -> None:
    program = (
        "import os, sys\nfrom bgworker.model.records import *\nfrom bgworker.history.sink "
        "import SqliteSink\n"
        "sink = SqliteSink(sys.argv[1])\nstate = TaskState('a' * 32, 'load', 'b' * 32, 1)\n"
        "sink.write(Batch([(state, 1, CREATED, 1, None), (state, 2, OUTPUT, 2, 'there')]))\n"
        "os._exit(9)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, path], env=environment(), timeout=60, check=False
    )
    assert ended.returncode == 9
    assert query(path, "SELECT payload FROM task_streams") == [("there",)]
    check_whole(path)


@needs_fork
@pytest.mark.parametrize("capture", [False, True])
def test_the_row_of_a_command_has_its_exit_code(path: Path, tmp_path: Path,
                                                capture: bool) -> None:
    commands = {"exit 0": 0, "exit 3": 3, "kill -9 $$": -9, "./missing": 127, "sleep 60": None}
    with Scheduler(1, sinks=[SqliteSink(path), JsonlSink(tmp_path / "copy.jsonl")]) as pool:
        for command in commands:
            slow = pool.options(name=command, timeout=0.2 if command == "sleep 60" else None,
                                metadata={"n": 1} if capture else None).submit(shell(command))
            slow.wait(SOON)
        pool.submit(subprocess.check_call, ["sh", "-c", "exit 4"]).wait(SOON)
        pool.submit(int, "x").wait(SOON)
    expected = [*commands.values(), 4, None]
    assert [code for code, in query(path, "SELECT exit_code FROM tasks ORDER BY id")] == expected
    other = SqliteSink(tmp_path / "copy.db")
    other.write([decode(line) for line in (tmp_path / "copy.jsonl").read_text().splitlines()])
    other.close()
    assert [code for code, in query(tmp_path / "copy.db", "SELECT exit_code FROM tasks ORDER BY id")
            ] == expected

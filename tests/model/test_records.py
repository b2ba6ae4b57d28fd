"""Records: the cheap form of events, and the DTOs that are built of them when somebody looks."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given, strategies as st

from bgworker.model import wire
from bgworker.model.events import (
    EventType,
    LifecycleEvent,
    LossEvent,
    StreamEvent,
    StreamType,
    TaskStatus,
)
from bgworker.model.records import (
    COMPLETED,
    CREATED,
    ERROR,
    FAILED,
    LOST,
    OUTPUT,
    PROGRESS,
    SCHEDULED,
    STARTED,
    STREAMS,
    TYPES,
    Batch,
    TaskState,
    event,
    utc,
)

NS = 1_800_000_000_123_456_789


@pytest.fixture
def state() -> TaskState:
    state = TaskState("a" * 32, "load", "b" * 32, NS)
    state.started_ns, state.completed_ns, state.duration = NS + 1_000_000, NS + 2_000_000, 0.001
    state.status, state.failure_type, state.failure_message, state.invocation_info = (
        TaskStatus.FAILED,
        "E",
        "no",
        "Traceback",
    )
    state.recorded_percent, state.recorded_message, state.seq = 40.0, "so far", 7
    state.metadata_json, state.timeout = '{"a":[1]}', 5.0
    return state


def test_kinds_and_types_are_in_the_same_order() -> None:
    assert [
        TYPES[kind]
        for kind in (CREATED, SCHEDULED, STARTED, COMPLETED, FAILED, PROGRESS, OUTPUT, ERROR, LOST)
    ] == [
        "TaskCreated",
        "TaskScheduled",
        "TaskStarted",
        "TaskCompleted",
        "TaskFailed",
        "TaskProgress",
        "TaskOutput",
        "TaskError",
        "EventsLost",
    ]
    assert len(set(TYPES)) == len(TYPES) == len(EventType)
    assert [kind for kind, each in enumerate(TYPES) if each.is_stream] == sorted(STREAMS)
    assert [kind for kind, each in enumerate(TYPES) if each.is_terminal] == [3, 4, 5, 6]


@given(st.integers(0, 4_000_000_000 * 10 ** 9))
def test_nanoseconds_become_aware_times_cut_to_microseconds(ns: int) -> None:
    time = utc(ns)
    assert time.tzinfo is timezone.utc
    delta = time - datetime(1970, 1, 1, tzinfo=timezone.utc)
    assert (delta.days * 86400 + delta.seconds) * 10 ** 6 + delta.microseconds == ns // 1000


@pytest.mark.parametrize(
    ("kind", "status", "known"),
    [
        (CREATED, "created", set()),
        (SCHEDULED, "scheduled", {"scheduled_utc"}),
        (STARTED, "running", {"scheduled_utc", "started_utc"}),
        (
            FAILED,
            "failed",
            {
                "scheduled_utc",
                "started_utc",
                "completed_utc",
                "duration",
                "failure_type",
                "failure_message",
                "invocation_info",
                "last_progress_percent",
                "last_progress_message",
            },
        ),
    ],
)
def test_a_snapshot_as_of_an_event_leaves_out_what_only_later_ones_tell(
    state: TaskState, kind: int, status: str, known: set[str]
) -> None:
    snapshot = state.snapshot_at(kind, 3)
    later = {
        "scheduled_utc",
        "started_utc",
        "completed_utc",
        "duration",
        "failure_type",
        "failure_message",
        "invocation_info",
        "last_progress_percent",
        "last_progress_message",
    }
    assert (snapshot.status, snapshot.last_seq, snapshot.timeout, snapshot.metadata) == (
        status,
        3,
        5.0,
        {"a": [1]},
    )
    assert {name for name in later if getattr(snapshot, name) is not None} == known


def test_a_snapshot_of_now_tells_all_and_its_metadata_is_its_own(state: TaskState) -> None:
    first, second = state.snapshot_now(), state.snapshot_now()
    assert first == second and first.last_seq == 7 and first.last_progress_percent == 40.0
    first.metadata["a"].append(2)
    assert second.metadata == {"a": [1]} == state.snapshot_now().metadata
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.name = "other"  # type: ignore[misc]


def records_of(state: TaskState) -> list[Any]:
    return [
        (state, 1, CREATED, NS, None),
        (state, 4, OUTPUT, NS, "text"),
        (state, 5, ERROR, NS, ("[1]", "json", False, 0)),
        (state, 6, OUTPUT, NS, ("cut", "text", True, 99)),
        (state, 7, PROGRESS, NS, (12.5, "some")),
        (None, 0, LOST, NS, ("hook", "overflow", 3, {"TaskOutput": 3})),
    ]


def test_each_record_becomes_its_event(state: TaskState) -> None:
    created, text, value, cut, progress, loss = map(event, records_of(state))
    assert created == LifecycleEvent(
        EventType.TASK_CREATED, state.id, 1, utc(NS), state.snapshot_at(CREATED, 1)
    )
    assert text == StreamEvent(
        EventType.TASK_OUTPUT, state.id, 4, utc(NS), StreamType.OUTPUT, "text"
    )
    assert value == StreamEvent(
        EventType.TASK_ERROR, state.id, 5, utc(NS), StreamType.ERROR, "[1]", "json"
    )
    assert cut == StreamEvent(
        EventType.TASK_OUTPUT, state.id, 6, utc(NS), StreamType.OUTPUT, "cut", "text", True, 99
    )
    assert progress == StreamEvent(
        EventType.TASK_PROGRESS,
        state.id,
        7,
        utc(NS),
        StreamType.PROGRESS,
        percent=12.5,
        message="some",
    )
    assert loss == LossEvent(
        EventType.EVENTS_LOST, utc(NS), "hook", 3, "overflow", {"TaskOutput": 3}
    )


def test_a_batch_is_a_sequence_that_builds_its_events_once(state: TaskState) -> None:
    batch = Batch(records_of(state))
    assert len(batch) == 6 and repr(batch) == "<Batch of 6 events>" and batch._events is None
    assert list(batch) == [event(record) for record in records_of(state)]
    assert batch[1] is batch[1] is list(batch)[1] and batch[-1] is batch[5]
    assert batch.index(batch[2]) == 2 and batch[3] in batch
    assert isinstance(batch[1:3], Batch) and list(batch[1:3]) == [batch[1], batch[2]]
    with pytest.raises(IndexError):
        batch[6]


@pytest.mark.parametrize("ns", [-1, 0, -10**18])
def test_no_moment_is_taken_for_none(ns: int) -> None:
    state = TaskState("0" * 32, "job", "1" * 32, ns)
    state.started_ns = state.completed_ns = ns
    batch = Batch(
        [
            (state, seq, kind, ns, data)
            for seq, (kind, data) in enumerate(
                [
                    (CREATED, None),
                    (SCHEDULED, None),
                    (STARTED, None),
                    (OUTPUT, "hello"),
                    (COMPLETED, None),
                ],
                1,
            )
        ]
    )
    assert wire.encode_lines(batch) == b"".join(
        f"{wire.encode(event)}\n".encode() for event in batch
    )
    last = list(batch)[-1].task  # type: ignore[union-attr]
    assert last.started_utc == last.completed_utc == last.created_utc == utc(ns)

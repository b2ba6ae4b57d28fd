"""What waits for one sink: its bounds, and what goes first when it is full."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, strategies as st

from bgworker.delivery.backlog import (
    BATCH_TEXT,
    END_COST,
    RECORD_COST,
    Backlog,
    Chunk,
    weight,
)
from bgworker.delivery.intake import TUPLE_COST
from bgworker.delivery.options import SinkOptions
from bgworker.model.errors import ConfigurationError
from bgworker.model.records import COMPLETED, CREATED, OUTPUT, PROGRESS, STARTED, TaskState

if TYPE_CHECKING:
    from bgworker.model.records import Record

TASKS = [TaskState(f"{number:032}", "", "", 0) for number in range(4)]


def out(text: str, task: int = 0) -> Record:
    return TASKS[task], 1, OUTPUT, 0, text


def progress(message: str, task: int = 0) -> Record:
    return TASKS[task], 1, PROGRESS, 0, (None, message)


def life(kind: int, task: int = 0) -> Record:
    return TASKS[task], 1, kind, 0, None


def shown(records: list[Record]) -> list[Any]:
    """Return texts, messages and kinds of life-cycle events."""
    return [record[4][1] if record[2] == PROGRESS else record[2] if record[4] is None else record[4]
            for record in records]


def extended(backlog: Backlog, *records: Record) -> tuple[list[Any], list[Any]]:
    coalesced, dropped = backlog.extend(Chunk.of(records))
    return shown(coalesced), shown(dropped)


def test_records_come_out_in_order_in_batches() -> None:
    backlog = Backlog(10, 1 << 20)
    assert extended(backlog, life(CREATED), out("a"), out("b"), life(COMPLETED)) == ([], [])
    assert len(backlog) == 4
    assert shown(backlog.take(3)) == [CREATED, "a", "b"]
    assert shown(backlog.take(3)) == [COMPLETED]
    assert backlog.take(3) == [] and len(backlog) == 0 and backlog.oldest_ns is None


def test_a_full_queue_drops_the_oldest_stream_events_and_spares_the_life_cycle() -> None:
    backlog = Backlog(2, 1 << 20)
    gone = extended(backlog, life(CREATED), out("a"), life(STARTED), out("b"), out("c"), out("d"))
    assert gone == ([], ["a", "b"])
    assert shown(backlog.clear()) == [CREATED, STARTED, "c", "d"]


def test_a_full_queue_drops_the_newest_stream_events_if_told_so() -> None:
    backlog = Backlog(2, 1 << 20, keep_newest=False)
    gone = extended(backlog, life(CREATED), out("a"), out("b"), out("c"), life(COMPLETED), out("d"))
    assert gone == ([], ["d", "c"])
    assert shown(backlog.clear()) == [CREATED, "a", "b", COMPLETED]


def test_dropping_the_newest_takes_other_streams_before_a_tasks_latest_progress() -> None:
    backlog = Backlog(2, 1 << 20, keep_newest=False)
    assert extended(backlog, out("a"), progress("1"), out("b"), progress("2")) == (["1"], ["b"])
    assert shown(backlog.clear()) == ["a", "2"]


def test_newer_progress_takes_the_place_of_older_progress_of_its_task_only_in_a_full_queue() -> (
    None
):
    backlog = Backlog(4, 1 << 20)
    assert extended(
        backlog, progress("a1"), progress("b1", 1), progress("a2"), progress("b2", 1)
    ) == ([], [])
    coalesced, dropped = extended(backlog, progress("a3"))
    assert (sorted(coalesced), dropped) == (["a1", "a2", "b1"], [])
    assert shown(backlog.clear()) == ["b2", "a3"]


def test_the_bound_by_bytes_counts_payloads_with_four_bytes_for_a_character_beyond_ascii() -> None:
    assert weight(out("abc")) == RECORD_COST + 3
    assert weight(out("ab\xe9")) == RECORD_COST + 12
    assert (
        weight((TASKS[0], 1, OUTPUT, 0, ("[1]", "json", False, 0))) == RECORD_COST + TUPLE_COST + 3
    )
    assert weight(progress("abcd")) == RECORD_COST + TUPLE_COST + 4
    backlog = Backlog(1000, 3 * (RECORD_COST + 100))
    assert extended(backlog, *(out(f"{number}" * 100) for number in range(4))) == ([], ["0" * 100])
    assert extended(backlog, out("z" * (RECORD_COST + 200)))[1] == ["1" * 100, "2" * 100]
    assert backlog.fill == 1.0


def test_an_event_larger_than_the_whole_queue_is_dropped_and_the_queue_goes_on() -> None:
    backlog = Backlog(10, RECORD_COST + 10)
    assert extended(backlog, out("x" * 11)) == ([], ["x" * 11])
    assert extended(backlog, out("y")) == ([], [])
    assert shown(backlog.clear()) == ["y"]


def test_of_more_life_cycle_events_than_the_size_the_oldest_go_and_no_stream_event_does() -> None:
    backlog = Backlog(2, 1 << 20)
    gone = extended(
        backlog, life(CREATED), out("a"), life(STARTED), life(COMPLETED), life(CREATED, 1)
    )
    assert gone == ([], [CREATED, STARTED])
    assert shown(backlog.clear()) == ["a", COMPLETED, CREATED]


def test_life_cycle_events_count_with_their_tasks_texts_and_go_when_they_alone_take_too_much() -> (
    None
):
    ended = TaskState("9" * 32, "", "", 0)
    ended.arguments, ended.failure_message, ended.metadata_json, ended.invocation_info = (
        "a" * 100,
        "b" * 50,
        "\xe9" * 5,
        "d",
    )
    end = ended, 4, COMPLETED, 0, None
    assert weight(end) == END_COST + 100 + 50 + 20 + 1
    assert weight(life(CREATED)) == RECORD_COST
    backlog = Backlog(100, 3 * RECORD_COST + END_COST)
    assert extended(backlog, life(CREATED), out("a"), life(STARTED), end) == ([], ["a"])
    assert extended(backlog, life(STARTED, 1), life(STARTED, 2)) == ([], [CREATED, STARTED])
    assert shown(backlog.clear()) == [COMPLETED, STARTED, STARTED]


def test_what_was_taken_counts_until_more_is_taken_or_it_is_done_with() -> None:
    backlog = Backlog(100, 16 * RECORD_COST)
    assert extended(backlog, *[out("")] * 16) == ([], [])
    assert len(backlog.take(2)) == 2 and backlog.room == 0
    assert extended(backlog, out("")) == ([], [""])
    assert len(backlog.take(1)) == 1 and backlog.room == 2 * RECORD_COST
    backlog.forget_taken()
    assert backlog.room == 3 * RECORD_COST


@pytest.mark.parametrize(
    ("text", "most"),
    [("x" * 60, 1000), ("x" * 4096, 256), ("x" * 60_000, 17), ("\U0001f642" * 4096, 64)],
    ids=["60", "4k", "60k", "emoji"],
)
def test_no_more_text_is_taken_at_once_than_a_sink_writes_without_much_memory(
    text: str, most: int
) -> None:
    backlog = Backlog(10_000, 1 << 30)
    numbered = [(TASKS[0], number, OUTPUT, 0, text) for number in range(1, 1001)]
    backlog.extend(Chunk.of(numbered))
    assert len(text) * (4 - 3 * text.isascii()) * (most - 1) <= BATCH_TEXT
    batches = []
    while len(backlog):
        batches.append(backlog.take(1000))
    assert max(map(len, batches)) == most
    assert [record for batch in batches for record in batch] == numbered, "in order, each once"


def test_no_more_is_taken_at_once_than_an_eighth_of_the_queue_but_one_event_always() -> None:
    backlog = Backlog(100, 16 * RECORD_COST)
    extended(backlog, *[out("")] * 4, out("x" * 8 * RECORD_COST))
    assert [len(backlog.take(100)) for _ in range(4)] == [2, 2, 1, 0]


def test_life_cycle_events_that_were_passed_by_keep_their_order_when_too_much_was_taken() -> None:
    backlog = Backlog(4, 8 * 2 * RECORD_COST)
    lives = [(TASKS[0], number, STARTED, 0, None) for number in range(4)]
    extended(backlog, *lives, *[out("")] * 4, out("x"), out("y"))
    seen = [record[1] for _ in range(2) for record in backlog.take(3)]
    assert seen == [0, 1, 2, 3]


def test_the_oldest_record_tells_the_age_of_the_queue() -> None:
    backlog = Backlog(1, 1 << 20)
    backlog.extend(
        Chunk.of(
            [
                (TASKS[0], 1, CREATED, 5, None),
                (TASKS[0], 2, OUTPUT, 6, ""),
                (TASKS[0], 3, OUTPUT, 7, ""),
            ]
        )
    )
    assert backlog.oldest_ns == 5
    backlog.take(1)
    assert backlog.oldest_ns == 7


RECORDS = st.one_of(
    st.builds(out, st.sampled_from(["", "a", "\xe9" * 20, "x" * 300]), st.integers(0, 3)),
    st.builds(progress, st.sampled_from(["", "m", "\u2026"]), st.integers(0, 3)),
    st.builds(life, st.sampled_from([CREATED, STARTED, COMPLETED]), st.integers(0, 3)))


@given(st.booleans(), st.integers(1, 6), st.integers(1, 2000),
       st.lists(st.one_of(st.lists(RECORDS, max_size=8), st.integers(1, 5)), max_size=20))
def test_each_record_comes_out_once_and_the_bounds_hold_whatever_happens(
        keep_newest: bool, size: int, max_bytes: int, steps: list[Any]) -> None:
    backlog = Backlog(size, max_bytes, keep_newest)
    came: list[Record] = []
    went: list[Record] = []
    for step in steps:
        if isinstance(step, int):
            took = backlog.take(step)
            assert backlog._taken == sum(map(weight, took))
            went += took
        else:
            numbered = [
                (*record[:3], len(came) + count, record[4]) for count, record in enumerate(step)
            ]
            came += numbered
            coalesced, dropped = backlog.extend(Chunk.of(numbered))
            went += [*coalesced, *dropped]
        assert len(backlog) == len(_inside(backlog)) == len(came) - len(went)
        streams = [record for record in _inside(backlog) if record[2] >= PROGRESS]
        assert len(streams) <= size and len(backlog) - len(streams) <= size
        bytes = sum(map(weight, _inside(backlog)))
        assert (backlog._streams, backlog._bytes) == (len(streams), bytes)
        assert bytes == 0 or bytes + backlog._taken <= max_bytes
    left = backlog.clear()
    assert [record[3] for record in left] == sorted(record[3] for record in left), "out of order"
    assert sorted([*went, *left], key=lambda record: record[3]) == came


def _inside(backlog: Backlog) -> list[Record]:
    return [*backlog._spared, *chain.from_iterable(chunk.records for chunk in backlog._queue)]


# -- the options that say so --


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("queue_size", 0),
        ("queue_size", 1.5),
        ("queue_bytes", -1),
        ("batch_size", 0),
        ("linger", -1),
        ("linger", "1"),
        ("park_bytes", 0),
        ("overflow", "block"),
        ("types", "TaskOutput"),
        ("types", ["TaskOutputs"]),
        ("retry", 8),
        ("queue_size", True),
    ],
)
def test_a_wrong_option_is_refused_with_its_name_and_value(name: str, value: object) -> None:
    with pytest.raises(
        ConfigurationError,
        match=f"^{name}: .*{'TaskOutputs' if name == 'types' and value != 'TaskOutput' else ''}",
    ):
        SinkOptions(**{name: value})  # type: ignore[arg-type]


def test_event_types_may_be_given_by_their_wire_names() -> None:
    types = SinkOptions(types=["TaskFailed", "EventsLost"]).types
    assert types == {"TaskFailed", "EventsLost"}

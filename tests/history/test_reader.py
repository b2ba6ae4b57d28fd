"""What a `History` answers about files with known rows: which tasks and streams, what is
interrupted or refused."""

from __future__ import annotations

import contextlib
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from tests import mutations
import pytest
from tests.histories import RUN, Recorder, files_beside, text_of
from tests.history.plans import plans, scans

from bgworker.history import presence, schema
from bgworker.cli.reading import json_line
from bgworker.history.answers import TOO_LONG, Attempts, Durations, Failures, Losses
from bgworker.history.questions import MOST_ROWS
from bgworker.model.errors import (AmbiguousTask, ConfigurationError, HistoryError, TookTooLong,
                                   UnknownTask)
from bgworker.model.events import (
    EventType,
    LossEvent,
    StreamEvent,
    StreamType,
    TaskSnapshot,
    TaskStatus,
)
from bgworker.history.presencelock import PresenceLock
from bgworker.history.reader import History
from bgworker.model.ids import new_id
from bgworker.model.wire import encode
from tests.support import ROOT, in_child, needs_fork

WAIT = 30.0
def names(tasks: list[TaskSnapshot]) -> list[str]:
    return [task.name for task in tasks]


# ---------------------------------------------------------------- tasks


def test_tasks_come_newest_first_by_creation_not_by_insertion(
    record: Recorder, history: History
) -> None:
    for name, hours in (("second", 2), ("first", 3), ("third", 1)):
        record.task(name, created=record.ago(hours=hours))
    assert names(history.tasks()) == ["third", "second", "first"]


def test_a_limit_keeps_the_newest_and_none_keeps_all(record: Recorder, history: History) -> None:
    for number in range(60):
        record.task(str(number), created=record.ago(minutes=60 - number))
    assert names(history.tasks(limit=2)) == ["59", "58"]
    assert len(history.tasks()) == 50
    assert len(history.tasks(limit=None)) == 60
    assert history.tasks(limit=0) == []


def test_of_a_final_status_the_latest_ended_comes_first(record: Recorder, history: History) -> None:
    record.task("long", "failed", created=record.ago(hours=9), took=8.5 * 3600)
    record.task("short", "failed", created=record.ago(hours=3), took=1)
    record.task("other", "completed")
    assert names(history.tasks(status="failed")) == ["long", "short"]
    assert names(history.tasks(status=TaskStatus.FAILED, limit=1)) == ["long"]
    assert names(history.tasks()) == ["other", "short", "long"]


def test_since_keeps_what_has_not_ended_or_ended_later(record: Recorder, history: History) -> None:
    record.task("old", created=record.ago(days=3))
    record.task("old but long", created=record.ago(days=2), took=47 * 3600)
    record.task("old and running", "running", created=record.ago(days=4))
    record.task("new", created=record.ago(hours=2))
    record.task("new failure", "failed", created=record.ago(hours=3))
    assert names(history.tasks(since=timedelta(days=1))) == [
        "new",
        "new failure",
        "old but long",
        "old and running",
    ]
    assert names(history.tasks(since=record.ago(days=1), limit=3)) == [
        "new",
        "new failure",
        "old but long",
    ]
    assert names(history.tasks(since=timedelta(days=1), limit=1)) == ["new"]
    assert names(history.tasks(since=timedelta(days=1), status="completed")) == [
        "old but long",
        "new",
    ]
    assert names(history.tasks(since=timedelta(days=1), status="running")) == ["old and running"]
    assert names(history.tasks(since=timedelta(minutes=1))) == ["old and running"]
    assert len(history.tasks(since=timedelta.max)) == 5


def test_a_name_is_a_pattern_that_heeds_case(record: Recorder, history: History) -> None:
    for name in ("load users", "load orders", "Load items", "[odd]"):
        record.task(name, created=record.ago(minutes=5))
    assert sorted(names(history.tasks(name="load*"))) == ["load orders", "load users"]
    assert names(history.tasks(name="[Ll]oad i????")) == ["Load items"]
    assert names(history.tasks(name="[[]odd]")) == ["[odd]"]
    assert names(
        history.tasks(name="load orders", status="completed", since=timedelta(hours=1))
    ) == ["load orders"]
    assert history.tasks(name="%") == []
    assert history.tasks(name="' OR 1 --") == []


@pytest.mark.parametrize("wrong, message", [
    ({"status": "done"}, "status: expected one of created, .*got 'done'"),
    ({"limit": -1}, "limit: expected a whole number >= 0"),
    ({"limit": 1.5}, "limit: expected a whole number"),
    ({"since": datetime(2026, 1, 1)}, "since: expected an aware datetime"),
    ({"since": 60}, "since: expected an aware datetime or a timedelta, got 60"),
])
def test_a_filter_that_means_nothing_is_refused_with_what_was_expected(history: History, wrong: Any,
                                                                       message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        history.tasks(**wrong)


def test_every_field_of_a_task_is_read(record: Recorder, history: History) -> None:
    record.run()
    record.insert("scripts", hash="ab" * 32, script_id="mod:fn", text="def fn(): ...\n")
    created = datetime(2026, 11, 23, 14, 46, 0, 123456, timezone.utc)
    task_id = record.task(
        "all",
        "failed",
        created=created,
        took=2.5,
        run_id=RUN,
        metadata={"a": [1, None]},
        timeout_sec=60.0,
        last_progress_pct=40.0,
        last_progress_msg="2 of 5",
        script_id="mod:fn",
        script_hash="ab" * 32,
        arg_json='{"args":[1],"kwargs":{}}',
        failure_type="ValueError",
        failure_message="bad",
        invocation_info="Traceback ...",
        result_json="[7]",
        last_seq=9,
    )
    assert history.task(task_id) == TaskSnapshot(
        task_id,
        "all",
        TaskStatus.FAILED,
        RUN,
        created,
        created,
        created,
        created + timedelta(seconds=2.5),
        2.5,
        60.0,
        40.0,
        "2 of 5",
        "mod:fn",
        "ab" * 32,
        "def fn(): ...\n",
        '{"args":[1],"kwargs":{}}',
        "ValueError",
        "bad",
        "Traceback ...",
        "[7]",
        {"a": [1, None]},
        9,
    )
    assert history.tasks() == [history.task(task_id)]


def test_a_search_agrees_with_a_plain_filter_over_all_tasks(
    record: Recorder, history: History
) -> None:
    dice = random.Random(7)
    for number in range(200):
        status = dice.choice(
            ["created", "scheduled", "running", "completed", "failed", "cancelled", "timed_out"]
        )
        record.task(
            dice.choice("abc"),
            status,
            created=record.ago(seconds=dice.randrange(1, 200_000) + number / 1000),
            took=dice.choice([0.5, 1000.0, 90_000.0]),
        )
    everything = history.tasks(limit=None)
    assert len(everything) == 200
    assert [task.task_id for task in everything] == sorted(
        (task.task_id for task in everything), reverse=True
    )
    for _ in range(200):
        status, name = dice.choice([None, *TaskStatus]), dice.choice([None, "a", "[ab]"])
        since, limit = dice.choice(
            [None, *(record.ago(hours=hours) for hours in (1, 24, 40))]
        ), dice.choice([None, 1, 5, 30])
        expected = [
            task
            for task in everything
            if (status is None or task.status is status)
            and (name is None or task.name in name)
            and (since is None or task.completed_utc is None or task.completed_utc >= since)
        ]
        if status is not None and status.is_final:
            expected.sort(key=lambda task: (task.completed_utc or task.created_utc), reverse=True)
        assert history.tasks(status=status, name=name, since=since, limit=limit) == expected[:limit]


# ---------------------------------------------------------------- one task


def test_a_task_is_named_by_its_id_a_beginning_or_the_end_of_it_its_name_or_last(
    record: Recorder, history: History
) -> None:
    old = record.task("nightly", created=record.ago(days=2))
    new = record.task("nightly", created=record.ago(days=1))
    last = record.task("other", created=record.ago(hours=1))
    assert history.task(old).task_id == old
    assert history.task(old[:11]).task_id == old
    assert history.task(old[:11].upper()).task_id == old
    assert history.task(old[-8:]).task_id == history.task(old[-9:].upper()).task_id == old
    with pytest.raises(UnknownTask):
        history.task(old[-7:])
    with pytest.raises(UnknownTask):
        history.task(f"{int(old[-8:], 16) ^ 0x80000000:08x}")
    assert history.task("nightly").task_id == new
    assert history.task("last").task_id == last


def test_what_is_exact_goes_before_what_is_abbreviated(record: Recorder, history: History) -> None:
    older = record.task("x", created=record.ago(days=2))
    by_name = record.task(older[:8], created=record.ago(days=1))
    named_last = record.task("last", created=record.ago(hours=2))
    record.task("newest")
    assert history.task(older[:8]).task_id == by_name
    assert history.task("last").task_id == named_last


def test_an_ambiguous_beginning_is_refused_with_the_candidates(
    record: Recorder, history: History
) -> None:
    ids = [record.task(f"n{number}", id=f"abc{number:029x}") for number in range(12)]
    told = "^more than 10 tasks have ids that begin or end with 'abc'; give more digits$"
    with pytest.raises(AmbiguousTask, match=told) as caught:
        history.task("abc")
    assert caught.value.candidates == tuple(
        f"{ids[number]} n{number} (completed)" for number in range(11, 1, -1)
    )
    for number in range(2):
        record.task(id=f"fff{number:029x}")
    with pytest.raises(AmbiguousTask, match="^2 tasks have ids") as caught:
        history.streams("fff")
    assert len(caught.value.candidates) == 2


@pytest.mark.parametrize("name", ["", "nope", "0" * 33, "\udc80", "'", "ab%", "é" * 10_000])
def test_a_task_that_is_not_there_is_an_unknown_task_and_a_key_error(
    record: Recorder, history: History, name: str
) -> None:
    record.task()
    for ask in (history.task, history.streams, lambda name: next(history.follow(name))):
        with pytest.raises(UnknownTask, match="^there is no task .*number of a command") as caught:
            ask(name)
        assert isinstance(caught.value, KeyError) and len(str(caught.value)) < 500


def test_last_of_no_tasks_is_an_unknown_task(history: History) -> None:
    with pytest.raises(UnknownTask, match="^there is no task in this history yet; "):
        history.task("last")


def test_so_much_of_an_id_is_shown_as_tells_it_from_those_beside_it(
    record: Recorder, history: History
) -> None:
    # ids of earlier versions end with digits of the process
    first, second, third = [record.task(id=f"01a2b3c4d5e67{number:011x}deadbeef")
                            for number in range(3)]
    alone = record.task()
    assert history.id_length([alone]) == history.id_length([]) == 8
    assert history.id_length([second]) == history.id_length([first, third]) == 16
    assert history.task(second[-16:]).task_id == second
    with pytest.raises(AmbiguousTask, match="^3 tasks have ids that begin or end with 'deadbeef'"):
        history.task(second[-8:])
    record.task(id="f" + third[1:])
    assert history.id_length([third]) == 64, "more than ours have: all"


def test_what_begins_with_the_end_of_another_is_not_taken_for_it(
    record: Recorder, history: History
) -> None:
    record.task(id="01a2b3c4" + 24 * "1")
    record.task(id="02" + 22 * "2" + "01a2b3c4")
    with pytest.raises(AmbiguousTask, match="^2 tasks have ids that begin or end with"):
        history.task("01a2b3c4")
    assert history.task("01a2b3c41").task_id == "01a2b3c4" + 24 * "1"


# ---------------------------------------------------------------- streams

def test_streams_are_read_as_the_events_that_they_were(record: Recorder, history: History) -> None:
    task_id = record.task()
    record.said(task_id, "hello")
    record.said(task_id, '{"a": 1}', "error", is_json=True)
    record.said(task_id, "cut", "warning", original_bytes=100_000)
    record.said(task_id, "half", "progress", percent=50.0)
    record.said(task_id, "detail", "verbose", seq=20)
    at = record.now
    assert history.streams(task_id) == [
        StreamEvent(EventType.TASK_OUTPUT, task_id, 4, at, StreamType.OUTPUT, "hello"),
        StreamEvent(EventType.TASK_ERROR, task_id, 5, at, StreamType.ERROR, '{"a": 1}', "json"),
        StreamEvent(
            EventType.TASK_WARNING, task_id, 6, at, StreamType.WARNING, "cut", "text", True, 100_000
        ),
        StreamEvent(
            EventType.TASK_PROGRESS,
            task_id,
            7,
            at,
            StreamType.PROGRESS,
            percent=50.0,
            message="half",
        ),
        StreamEvent(EventType.TASK_VERBOSE, task_id, 20, at, StreamType.VERBOSE, "detail"),
    ]


def test_streams_can_be_asked_for_in_parts(record: Recorder, history: History) -> None:
    other, task_id = record.task("a"), record.task("b")
    record.said(other, "not this one")
    for number in range(10):
        record.said(task_id, str(number), "error" if number % 2 else "output")

    def said(**how: Any) -> str:
        return "".join(event.payload for event in history.streams("b", **how))

    assert said() == "0123456789"
    assert said(since=8) == "56789"
    assert said(types=["error"]) == "13579"
    assert said(types=[StreamType.OUTPUT, "error"], limit=3) == "012"
    assert said(limit=3, newest=True) == "789"
    assert said(since=9, limit=3, newest=True, types={"output"}) == "68"
    assert said(limit=0) == said(types=[]) == ""
    with pytest.raises(ConfigurationError, match="types: expected one of output, .*, got 'stdout'"):
        said(types=["stdout"])
    with pytest.raises(ConfigurationError, match="limit: "):
        said(limit=-1)


# ---------------------------------------------------------------- follow


def test_pages_end_where_the_key_of_the_task_is_that_of_another(record: Recorder,
                                                                history: History) -> None:
    task_id = record.task("first")
    record.many_said(task_id, 1500)
    pages, events = history.pages("first"), history.events()
    assert len(next(pages)) == len([*islice(events, MOST_ROWS)]) == MOST_ROWS
    record.connection.execute("DELETE FROM zz_stream_rows")
    record.connection.execute("DELETE FROM tasks")
    record.many_said(record.task("second"), 1500)
    assert list(pages) == []
    assert [event.task_id for event in events] == [task_id]


def test_following_ends_with_the_task_and_misses_nothing_that_came_before(
    record: Recorder, history: History
) -> None:
    task_id = record.task("job", "running")
    record.said(task_id, "before")
    script = iter(
        [
            lambda: record.said(task_id, "one"),
            lambda: None,
            lambda: record.said(task_id, "two", "error"),
            lambda: (record.said(task_id, "three"), record.end(task_id)),
        ]
    )
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        next(script)()

    assert [event.payload for event in history.follow("job", wait=wait, interval=7.0)] == [
        "before",
        "one",
        "two",
        "three",
    ]
    assert waited == [7.0] * 4


def test_following_can_begin_later_and_keep_to_some_streams(
    record: Recorder, history: History
) -> None:
    task_id = record.task("job", "running")
    for number in range(4):
        record.said(task_id, str(number), "error" if number % 2 else "output")

    def wait(seconds: float) -> None:
        record.said(task_id, "4")
        record.said(task_id, "5", "error")
        record.end(task_id, "failed")

    assert [
        event.payload for event in history.follow(task_id, since=5, types=["error"], wait=wait)
    ] == ["3", "5"]


def test_a_task_that_has_ended_is_followed_without_waiting(
    record: Recorder, history: History
) -> None:
    task_id = record.task("job")
    record.many_said(task_id, 2500)

    def wait(seconds: float) -> None:
        pytest.fail("there is nothing to wait for")

    assert [event.seq for event in history.follow(task_id, wait=wait)] == list(range(4, 2504))


def test_following_a_task_that_is_removed_ends(record: Recorder, history: History) -> None:
    task_id = record.task("job", "running")

    def wait(seconds: float) -> None:
        record.connection.execute("DELETE FROM tasks")

    assert list(history.follow(task_id, wait=wait)) == []


def test_what_is_committed_between_two_looks_of_one_round_is_not_missed(
    record: Recorder, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = record.task("job", "running")
    version, calls = history.version, []

    def interrupted_version() -> Any:
        found = version()
        calls.append(found)
        if len(calls) == 1:
            record.said(task_id, "between")  # after the version was noted, before the rows are read
        if len(calls) == 3:
            record.said(task_id, "late")
            record.end(task_id)
        assert len(calls) < 10
        return found

    monkeypatch.setattr(history, "version", interrupted_version)
    assert [event.payload for event in history.follow(task_id, wait=lambda seconds: None)] == [
        "between",
        "late",
    ]


def test_a_follower_that_stands_still_holds_up_neither_the_writer_nor_the_emptying_of_the_log(
    record: Recorder, history: History
) -> None:
    task_id = record.task("job", "running")
    record.many_said(task_id, 3000)
    following = history.follow(task_id)
    exporting = history.events()
    next(following)
    next(exporting)
    record.connection.execute("PRAGMA busy_timeout = 0")
    record.said(task_id, "more")
    assert record.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
    following.close()
    exporting.close()


def test_a_reader_inside_a_transaction_would_keep_the_log_from_being_emptied(
    record: Recorder, path: str
) -> None:
    """The twin of the test before: its measure notices."""
    record.task("job")
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM tasks").fetchone()
    record.task("job")
    record.connection.execute("PRAGMA busy_timeout = 0")
    assert record.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 1
    reader.close()


# ---------------------------------------------------------------- sums

def test_stats_count_and_group(record: Recorder, history: History) -> None:
    for number in range(1, 101):
        slowest = record.task("many", created=record.ago(hours=2), took=float(number))
    record.task(
        "one",
        "failed",
        created=record.ago(hours=5),
        took=3.0,
        failure_type="OSError",
        failure_message="old",
    )
    latest = record.task(
        "one",
        "failed",
        created=record.ago(hours=1),
        took=4.0,
        failure_type="OSError",
        failure_message="new",
    )
    record.task("two", "failed", created=record.ago(hours=3), took=None, failure_type="mod.Odd")
    record.task("waits", "scheduled")
    record.task("never ran", "cancelled", took=None)
    for count, hours in ((5, 3), (7, 1)):
        record.lost(count, at=record.ago(hours=hours))
    record.lost(1, reason="oversize")
    stats = history.stats()
    assert (
        stats.counts
        == {"completed": 100, "failed": 3, "scheduled": 1, "cancelled": 1}
        == history.counts()
    )
    assert list(stats.counts) == sorted(stats.counts, key=list(TaskStatus).index)
    assert stats.failures == (
        Failures("OSError", 2, record.ago(hours=1) + timedelta(seconds=4), latest, "new",
                 latest_name="one"),
        Failures("mod.Odd", 1, record.ago(hours=3), stats.failures[1].latest_task_id, None,
                 latest_name="two"))
    assert stats.durations == (
        Durations("many", 100, 50.0, 95.0, 100.0, 5050.0, slowest),
        Durations("one", 2, 3.0, 4.0, 4.0, 7.0, latest),
    )
    assert stats.losses == (Losses("hook", "overflow", 12, record.ago(hours=1)),
                            Losses("hook", "oversize", 1, record.now)) == history.loss_counts()
    assert [each.count for each in history.loss_counts(since=record.ago(hours=2))] == [7, 1]


def test_stats_of_a_time_leave_out_what_ended_before(record: Recorder, history: History) -> None:
    record.task("old", created=record.ago(days=3))
    record.task("old", "running", created=record.ago(days=3))
    new = record.task("new", "failed", created=record.ago(hours=1), took=7.0, failure_type="E")
    record.lost(3, at=record.ago(days=2))
    stats = history.stats(since=timedelta(days=1))
    assert stats.counts == {"running": 1, "failed": 1}
    assert [each.count for each in stats.failures] == [1]
    assert stats.durations == (Durations("new", 1, 7.0, 7.0, 7.0, 7.0, new),)
    assert stats.losses == ()


def test_stats_of_a_run_tell_of_its_tasks_alone(record: Recorder, history: History) -> None:
    run = record.run(new_id(5), ended=record.now)
    record.task("load", took=2.0)
    record.task("load", "failed", run_id=run, took=3.0, failure_type="E")
    record.task("load", "running", run_id=run)
    stats = history.stats(run=run[:20])
    assert history.stats(run=run[-8:]) == stats
    assert stats.counts == {"failed": 1, "interrupted": 1} == history.counts(run=run)
    assert [each.count for each in stats.failures] == [1]
    assert [(each.count, each.total) for each in stats.durations] == [(1, 3.0)]


@pytest.mark.parametrize("wrong", ["ff", "", "000000", 5])
def test_a_run_that_cannot_be_told_is_refused(record: Recorder, history: History,
                                              wrong: Any) -> None:
    for time in (5, 6):
        record.run(new_id(time), ended=record.now)
    with pytest.raises(ConfigurationError, match="run: expected the id of a run"):
        history.counts(run=wrong)


def test_percentiles_are_the_nearest_rank_whichever_way_they_are_found(
    record: Recorder, history: History
) -> None:
    dice = random.Random(3)
    for name in range(1, 30):
        for _ in range(name):
            record.task(f"n{name}", created=record.ago(hours=1), took=round(dice.uniform(0, 50), 3))
    by_index, by_sorting = (
        history.stats().durations,
        history.stats(since=timedelta(days=1)).durations,
    )
    assert by_index == by_sorting and len(by_index) == 29
    for each in by_index:
        seconds = sorted(task.duration or 0.0 for task in history.tasks(name=each.name, limit=None))
        assert len(seconds) == each.count
        for share, found in ((0.50, each.p50), (0.95, each.p95), (1.0, each.max)):
            assert found == next(
                value
                for value in seconds
                if sum(other <= value for other in seconds) >= share * len(seconds)
            )


def test_losses_and_runs_are_listed(record: Recorder, history: History) -> None:
    record.lost(2, at=record.ago(hours=1))
    record.lost(1, at=record.ago(hours=2))
    first = record.run(new_id(1), ended=record.now)
    second = record.run(new_id(2), host="elsewhere.example")
    assert [(loss.count, loss.by_type) for loss in history.losses()] == [
        (1, {"TaskOutput": 1}),
        (2, {"TaskOutput": 2}),
    ]
    assert history.losses()[0] == LossEvent(
        EventType.EVENTS_LOST, record.ago(hours=2), "hook", 1, "overflow", {"TaskOutput": 1}
    )
    assert [(run.run_id, run.host, run.is_alive) for run in history.runs()] == [
        (second, "elsewhere.example", None), (first, None, False)]
    assert (history.runs()[0].pid, history.runs()[0].python, history.runs()[0].started_utc) == (
        4711,
        "3.11.7",
        record.now,
    )


def test_attempts_are_told_by_source_and_metadata(record: Recorder, history: History) -> None:
    record.insert("scripts", hash="a")
    record.insert("scripts", hash="b")
    ids = [
        record.task(status=status, script_hash=script, metadata=metadata, rerun_of=None)
        for status, script, metadata in (
            ("completed", "a", {"cwd": "/x", "n": 1}),
            ("completed", "a", {"cwd": "/x"}),
            ("failed", "a", {"cwd": "/x"}),
            ("completed", "a", {"cwd": "/y"}),
            ("completed", "b", {"cwd": "/x"}),
            ("completed", "a", None),
            ("cancelled", "a", {"cwd": "/x"}),
            ("running", "a", {"cwd": "/x"}),
            ("timed_out", "a", {"cwd": "/y"}),
            ("interrupted", "b", {"cwd": "/x"}),
        )
    ]
    assert history.attempts(["a", "b", "c"], {"cwd": "/x"}) == {
        "a": Attempts(2, (ids[6], ids[2])), "b": Attempts(1, (ids[9],)), "c": Attempts(0, ())}
    record.task("again", "failed", rerun_of=ids[6])
    assert history.attempts(["a"], {"cwd": "/x"}) == {"a": Attempts(2, (ids[2],))}


def test_the_usual_duration_of_a_source_is_the_median_of_its_last_nine_that_completed(
        record: Recorder, history: History) -> None:
    for script in "abc":
        record.insert("scripts", hash=script)
    for took in (500.0, 500.0, 500.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0):
        record.task(took=took, script_hash="a")
    record.task("running", "running", script_hash="a")
    assert history.usual_seconds(["a", "b", "x"]) == {"a": 5.0}
    for status, took in (("failed", 0.1), ("timed_out", 60.0), ("failed", 0.2),
                         ("cancelled", 99.0), ("interrupted", 99.0)):
        record.task(status=status, took=took, script_hash="b")
    record.task(took=None, script_hash="c")
    assert history.usual_seconds("abc") == {"a": 5.0, "b": 0.2}
    record.task(took=7.0, script_hash="b")
    assert history.usual_seconds(["b"]) == {"b": 7.0}, "those that failed tell no more"


def test_the_usual_duration_of_a_source_is_asked_of_an_index_in_the_order_of_time(
        record: Recorder, history: History) -> None:
    record.insert("scripts", hash="a")
    record.task(script_hash="a")
    found = plans(history, lambda: history.usual_seconds(["a"]))
    assert any("tasks_script" in plan for plan in found)
    assert scans(found) == [] and not any("B-TREE" in plan for plan in found)


# ---------------------------------------------------------------- interrupted

PRESENT = """
import sys; sys.path.insert(0, {root!r})
from bgworker.history import presence, schema
from bgworker.history.presencelock import PresenceLock
PresenceLock.share(schema.lock_path({path!r})).hold(presence.byte_of({run!r}))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(path: str) -> Iterator[subprocess.Popen[str]]:
    """A process that records the run, as far as its lock tells."""
    code = PRESENT.format(root=str(ROOT), path=path, run=RUN)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()
        assert process.wait(WAIT) is not None


@pytest.fixture
def running(record: Recorder) -> list[str]:
    """Tasks of a run of this machine: one of each status that is not final, and one that has
    ended."""
    record.run(RUN, host=schema.this_host())
    return [
        record.task(status, status, run_id=RUN)
        for status in ("created", "scheduled", "running", "completed")
    ]


def test_tasks_are_interrupted_once_the_process_that_ran_them_is_killed(
        history: History, running: list[str], holder: subprocess.Popen[str]) -> None:
    assert [history.task(task_id).status for task_id in running] == [
        "created",
        "scheduled",
        "running",
        "completed",
    ]
    assert history.runs()[0].is_alive is True
    assert history.tasks(status="interrupted") == []
    holder.kill()
    assert holder.wait(WAIT) is not None
    assert [history.task(task_id).status for task_id in running] == ["interrupted"] * 3 + [
        "completed"
    ]
    assert history.task("running").completed_utc is None
    assert history.runs()[0].is_alive is False
    assert sorted(names(history.tasks(status="interrupted"))) == ["created", "running", "scheduled"]
    assert len(history.tasks(status="interrupted", limit=2)) == 2
    assert history.tasks(status="running") == history.tasks(status="created") == []
    assert history.stats().counts == {"interrupted": 3, "completed": 1}
    assert history.stats(since=timedelta(minutes=1)).counts == {}


def test_a_limit_counts_only_tasks_that_are_shown(
    record: Recorder, history: History, running: list[str]
) -> None:
    record.connection.execute("UPDATE runs SET ended_utc = ?", (text_of(record.now),))
    record.run(other := new_id(1))
    record.task("alive", "running", run_id=other, created=record.ago(days=1))
    assert names(history.tasks(status="running", limit=1)) == ["alive"]


def test_following_ends_when_the_process_dies(
    history: History, record: Recorder, running: list[str], holder: subprocess.Popen[str]
) -> None:
    record.said(running[2], "said")

    def wait(seconds: float) -> None:
        assert holder.poll() is None, "it had ended already"
        holder.kill()
        assert holder.wait(WAIT) is not None

    assert [event.payload for event in history.follow("running", wait=wait)] == ["said"]


def test_a_run_whose_record_was_closed_is_over_though_its_process_lives(
    history: History, record: Recorder, running: list[str], holder: subprocess.Popen[str]
) -> None:
    record.connection.execute("UPDATE runs SET ended_utc = ?", (text_of(record.now),))
    assert history.task("running").status == "interrupted"


@pytest.mark.parametrize("host", [None, "another.example"])
def test_a_run_of_another_machine_or_a_copied_one_is_never_judged(
    record: Recorder, history: History, host: str | None
) -> None:
    record.run(RUN, host=host)
    record.task("job", "running", run_id=RUN, created=record.ago(days=3000))
    assert history.task("job").status == "running"
    assert history.runs()[0].is_alive is None


def test_a_task_without_a_run_is_never_judged(record: Recorder, history: History) -> None:
    record.task("job", "running")
    assert (history.task("job").status, history.task("job").run_id) == ("running", "")


def test_a_run_of_this_very_process_is_alive(
    record: Recorder, history: History, running: list[str], path: str
) -> None:
    lock, offset = PresenceLock.share(schema.lock_path(path)), presence.byte_of(RUN)
    assert offset is not None
    try:
        lock.hold(offset)
        with History(path) as fresh:
            assert fresh.task("running").status == "running"
        lock.release(offset)
        assert history.task("running").status == "interrupted"
    finally:
        lock.leave()


@needs_fork
def test_a_run_whose_lock_file_was_deleted_is_not_taken_for_dead(
        history: History, running: list[str], holder: subprocess.Popen[str], path: str) -> None:
    os.unlink(schema.lock_path(path))
    assert history.task("running").status == "running"
    lock = PresenceLock.share(schema.lock_path(path))
    with lock:  # makes it anew, while the holder has not written yet
        pass
    lock.leave()
    assert history.task("running").status == "running"
    holder.kill()
    assert holder.wait(WAIT) is not None
    assert history.task("running").status == "running", "nobody can tell any more"


def test_what_ended_between_the_look_at_the_process_and_the_look_at_the_row_is_not_interrupted(
    record: Recorder, history: History, running: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends right after it was found alive: its last rows count, and it is judged at the
    next question."""
    def ends(run_id: str, lock: PresenceLock) -> bool:
        record.end(running[2])
        return True

    monkeypatch.setattr("bgworker.history.reader.is_alive", ends)
    assert history.task("running").status == "completed"


def test_interrupted_tasks_count_since_their_last_sign_of_life(
    record: Recorder, history: History
) -> None:
    for name, created, ended in (("a", 5, 4), ("b", 5, 1)):
        run = record.run(new_id(created * 10 + ended), ended=record.ago(hours=ended))
        record.task(name, "running", run_id=run, created=record.ago(hours=created))
    assert (
        names(history.tasks(since=timedelta(hours=2)))
        == ["b"]
        == names(history.tasks(since=timedelta(hours=2), status="interrupted"))
    )
    assert history.stats(since=timedelta(hours=2)).counts == {"interrupted": 1}
    assert len(history.tasks(status="interrupted")) == 2
    record.said(history.task("a").task_id, "I am alive")  # now
    assert names(history.tasks(since=timedelta(hours=2), status="interrupted")) == ["b", "a"]
    assert history.stats(since=timedelta(hours=2)).counts == {"interrupted": 2}
    assert history.stats(since=timedelta(minutes=1)).counts == {"interrupted": 1}


# ---------------------------------------------------------------- the file

def test_nothing_that_is_asked_changes_the_file_or_its_log(record: Recorder, path: str) -> None:
    task_id = record.task("job")
    # more than SQLite lets a log grow before it would check-point by itself
    record.many_said(task_id, 5000)
    before = files_beside(path)
    assert len(before) == 2
    with History(path) as history:
        history.tasks(), history.streams("job"), history.stats(), history.runs(), history.losses()
        list(history.follow("job"))
        list(history.events())
    assert files_beside(path) == before


def test_a_history_is_read_after_its_writer_has_closed_it_or_was_killed(
    path: str, tmp_path: Path
) -> None:
    code = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\nfrom tests.histories import Recorder\n"
        "record = Recorder(sys.argv[1]); record.task('job')\nif sys.argv[2] == 'kill': "
        "os._exit(9)\nrecord.close()"
    )
    for how in ("kill", "close"):
        file = str(tmp_path / how)
        subprocess.run([sys.executable, "-c", code, file, how], timeout=WAIT, check=how == "close")
        assert os.path.exists(file + "-wal") == (how == "kill")
        with History(file) as history:
            assert names(history.tasks()) == ["job"]


@needs_fork
def test_a_forked_child_may_go_on_asking_and_so_may_its_parent(
    record: Recorder, history: History
) -> None:
    record.task("before")
    following = history.follow(record.task("job", "running"))
    record.said(history.task("job").task_id, "one")
    assert next(following).payload == "one"
    record.close()  # a bare connection must not live through a fork; that of a History does not

    def ask() -> list[str]:
        writer = Recorder(record.path)  # a child that writes is one more process that writes
        writer.task("by the child")
        writer.close()
        return names(history.tasks())

    assert in_child(ask) == "['by the child', 'job', 'before']"
    record.connection = schema.connect_to_write(record.path)
    record.said(history.task("job").task_id, "two")
    assert next(following).payload == "two"
    assert len(history.tasks()) == 3


@pytest.fixture
def locked_folder(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nobody but root can create anything, and the way to it."""
    for folder in (tmp_path, *tmp_path.parents):
        if os.stat(folder).st_uid == os.geteuid() and folder.name.startswith(
            ("pytest-", tmp_path.name)
        ):
            folder.chmod(0o755)
    folder = tmp_path / "locked"
    folder.mkdir()
    yield folder
    folder.chmod(0o755)


@needs_fork
def test_a_closed_history_is_read_in_a_directory_that_cannot_be_written_to(
    locked_folder: Path,
) -> None:
    path = str(locked_folder / "history.db")
    record = Recorder(path)
    record.task("job")
    record.close()
    locked_folder.chmod(0o555)

    def ask() -> list[str]:
        with pytest.raises(OSError):
            open(locked_folder / "new", "w")
        with History(path) as history:
            return names(history.tasks())

    assert in_child(ask, as_nobody=True) == "['job']"


@needs_fork
def test_there_a_writer_that_comes_later_is_noticed(locked_folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs two users")
    path = str(locked_folder / "history.db")
    Recorder(path).close()
    locked_folder.chmod(0o555)  # which does not hold root

    def ask() -> str:
        with History(path) as history:
            before = names(history.tasks())
            version = history.version()
            os.seteuid(0)
            record = Recorder(path)
            record.task("first")
            os.seteuid(65534)
            while_written = names(history.tasks()), history.version() != version
            os.seteuid(0)
            record.close()
            os.seteuid(65534)
            return f"{before} {while_written} {names(history.tasks())}"

    assert in_child(ask, as_nobody=True) == "[] (['first'], True) ['first']"


@needs_fork
def test_a_log_that_cannot_be_read_there_is_told_of_and_not_passed_over(
    locked_folder: Path,
) -> None:
    path = str(locked_folder / "history.db")
    record = Recorder(path)
    record.task("job")
    log = Path(path + "-wal").read_bytes()
    record.close()
    Path(path + "-wal").write_bytes(log)
    locked_folder.chmod(0o555)
    assert "copy both to a directory that you may write to" in in_child(
        lambda: History(path), as_nobody=True
    )


@pytest.mark.parametrize("content, message", [
    (None, "there is no history at"), (b"", "is empty"), (b"x" * 5000, "it is no SQLite file"),
])
def test_a_file_that_is_no_history_is_refused_and_not_touched(
    path: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        Path(path).write_bytes(content)
    with pytest.raises(HistoryError, match=message):
        History(path)
    assert (Path(path).read_bytes() if content is not None else None) == content
    assert not os.path.exists(path + ".lock")


def test_a_damaged_file_is_told_of_whenever_it_is_noticed(record: Recorder, path: str) -> None:
    for number in range(300):
        record.task(f"task {number}", created=record.ago(minutes=number))
    record.close()
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.seek(size // 4 // 4096 * 4096)
        file.write(os.urandom(size // 2 // 4096 * 4096))
    with pytest.raises(HistoryError, match="is damaged.*recover"):
        with History(path) as history:
            history.tasks(limit=None)
    Recorder(path + ".new").close()


def ask_everything(history: History) -> dict[str, Any]:
    """Ask what there is to be asked, and encode all of it as the command line does."""
    found: dict[str, Any] = {"tasks": history.tasks(limit=None), "runs": history.runs(),
                             "losses": history.losses(), "stats": history.stats(),
                             "recent": history.stats(since=timedelta(days=365)),
                             "counts": history.counts(), "events": list(history.events()),
                             "run counts": history.run_counts()}
    pages = {
        "page": history.page(),
        "named": history.page(name="j*", until=timedelta(0)),
        "found": history.page(text="a"),
        "recent": history.page(since=timedelta(days=365)),
        **{
            status: history.page(status=status, run=run.run_id, text="said")
            for status in ("failed", "interrupted")
            for run in found["runs"]
            if re.fullmatch("[0-9a-f]+", run.run_id)
        },
    }
    found["pages"] = pages
    found["charts"] = [ask(**how) for how in ({}, {"since": timedelta(days=365)}) for ask in (
        history.failure_groups, history.throughput, history.timeline)]
    history.timeline(until=timedelta(0)), history.throughput(until=timedelta(0))
    for task in found["tasks"]:
        if {"\ufffd", "\0"} & {*task.task_id}:
            continue  # it was no text; nobody can spell it
        found["streams"] = history.streams(task.task_id)
        assert history.streams(task.task_id, newest=True) == found["streams"]
        assert [event for page in history.pages(task.task_id) for event in page] == found["streams"]
        found["lines"] = history.lines(task.task_id), history.lines(task.task_id, after=0)
        assert list(found["lines"][1].lines) == found["streams"][:500]
        history.id_length([task.task_id])
        found["past"] = history.past(task.task_id)
    keys = history.task_keys(limit=None)
    for literal in (None, "a"):
        found[f"searched for {literal}"] = list(history.search(keys, re.compile("a"),
                                                               literal=literal))
    assert found["searched for a"] == found["searched for None"]
    for status in TaskStatus:
        history.tasks(status=status, since=timedelta(days=365))
    history.attempts(["a"], {"n": 1})
    found["usual"] = history.usual_seconds(["a"])
    for event in found["events"]:
        encode(event)
    json_line(found)
    return found


ANY = [value for value in mutations.VALUES if "000000" not in value]


SOME = ANY[::4]


def world(record: Recorder, number: int) -> str:
    """Record a run, its script, a task of it that failed, what that said and a loss; return the
    task's id."""
    run_id = record.run(new_id(number), host=schema.this_host())
    record.insert("scripts", hash=run_id, script_id="m:f", text="x")
    task_id = record.task("job", "failed", run_id=run_id, script_hash=run_id)
    record.said(task_id, "said")
    record.lost(number)
    return task_id


def put(record: Recorder, value: str, table: str, column: str, row: int) -> None:
    """Put a value into a column of a row, if the file lets us."""
    key = "task" if table == "zz_stream_rows" else "rowid"
    with contextlib.suppress(sqlite3.IntegrityError):
        record.connection.execute(
            f"UPDATE OR IGNORE {table} SET {column} = {value} WHERE {key} = {row}")


@pytest.mark.parametrize("value", SOME)
@pytest.mark.parametrize("table", mutations.COLUMNS)
def test_a_value_of_any_type_in_any_column_is_read_as_what_belongs_there(
        record: Recorder, history: History, table: str, value: str) -> None:
    for column in mutations.COLUMNS[table]:
        for each in mutations.COLUMNS:
            record.connection.execute(f"DELETE FROM {each}")
        world(record, 1)
        put(record, value, table, column, 1)
        found = ask_everything(history)
        assert len(found["tasks"]) == 1 or column in ("id", "status"), column


@pytest.mark.slow
@pytest.mark.parametrize("value", [value for value in ANY if value not in SOME])
@pytest.mark.parametrize("table", mutations.COLUMNS)
def test_the_other_values_are_read_so_too_each_column_having_one_in_a_row_of_its_own(
        record: Recorder, history: History, table: str, value: str) -> None:
    columns = mutations.COLUMNS[table]
    tasks = {column: world(record, number) for number, column in enumerate(columns, 1)}
    for number, column in enumerate(columns, 1):
        put(record, value, table, column, number)
    found = ask_everything(history)
    if table == "tasks":  # the id is another one then, and of what has no status nothing is read
        del tasks["id"], tasks["status"]
    assert {*tasks.values()} <= {task.task_id for task in found["tasks"]}


@pytest.mark.parametrize(("sql", "read"), [
    ("UPDATE tasks SET started_utc = '2026-01-01T00:00:00'", "2026-01-01 00:00:00+00:00"),
    ("UPDATE tasks SET started_utc = '0001-01-01T00:00:00+01:00'", "None"),
    ("UPDATE tasks SET started_utc = x'41'", "None")])
def test_a_time_is_one_in_utc_or_none(record: Recorder, history: History, sql: str,
                                      read: str) -> None:
    record.task("job")
    record.connection.execute(sql)
    assert str(history.task("job").started_utc) == read


def test_what_stands_for_values_that_are_none_says_so(record: Recorder, history: History) -> None:
    task_id = record.task("job", metadata={"n": 1})
    record.said(task_id, "x")
    record.said(task_id, "[1", is_json=True)
    record.connection.execute("UPDATE tasks SET name = x'00ff', metadata_json = '[1]', "
                              "duration_sec = 9e999")
    record.connection.execute("UPDATE zz_stream_rows SET payload = cast(x'61c3' AS TEXT) "
                              "WHERE payload = 'x'")
    task, (first, second) = history.task(task_id), history.streams(task_id)
    assert (task.name, task.metadata, task.duration) == ("<2 bytes>", {"damaged": "[1]"}, None)
    assert (first.payload, second.payload, second.format) == ("a\ufffd", "[1", "text")


def test_rows_of_which_nothing_can_be_made_are_left_out_and_counted(record: Recorder,
                                                                    history: History) -> None:
    kept = record.task("kept")
    record.task("odd", "completed")
    record.said(kept, "kept")
    record.said(kept, "odd")
    record.said(kept, "odd", seq=9)
    assert history.left_out == 0
    record.connection.execute("UPDATE tasks SET status = 'odd' WHERE name = 'odd'")
    record.connection.execute("UPDATE zz_stream_rows SET stream = 99 WHERE seq = 5")
    record.connection.execute("UPDATE zz_stream_rows SET seq = 9.5 WHERE seq = 9")
    assert names(history.tasks()) == ["kept"] and history.left_out == 1
    assert [event.payload for event in history.streams(kept)] == ["kept"] and history.left_out == 3


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no limit for texts can be set there")
def test_a_text_that_is_too_long_is_told_of_and_not_read(record: Recorder,
                                                         history: History) -> None:
    long = schema.MOST_TEXT + 1
    task_id = record.task("job", failure_message="m" * long, arg_json="a" * (long // 2))
    for payload in ("first", "x" * long, "y" * (long - 2), "last"):
        record.said(task_id, payload)
    said = ["first", TOO_LONG, "y" * (long - 2), "last"]
    assert [event.payload for event in history.streams(task_id)] == said
    assert [event.payload for event in history.streams(task_id, newest=True, limit=3)] == said[1:]
    assert [event.payload for event in history.follow(task_id)] == said
    task = history.task("job")
    assert (task.failure_message, task.arguments, task.name) == (TOO_LONG, "a" * (long // 2), "job")
    (brief,) = history.tasks_of(history.task_keys(), is_brief=True)
    assert (brief.failure_message, brief.status) == (TOO_LONG, "completed")
    assert len(brief.arguments or "") <= 1000


def test_a_question_that_takes_longer_than_its_patience_is_given_up(record: Recorder,
                                                                    path: str) -> None:
    task = record.task("talks")
    record.many_said(task, 60_000)
    with History(path, patience=1e-6) as history:
        assert history.counts() == {"completed": 1}  # too short to be noticed
        with pytest.raises(TookTooLong, match="took longer than 1e-06 s; ask for"):
            history.lines(task, types=["error"])
    with History(path, patience=60) as history:
        assert history.lines(task, types=["error"]).lines == ()
    with pytest.raises(ConfigurationError, match="patience: expected a number > 0"):
        History(path, patience=0)


def test_a_file_that_a_stranger_has_locked_is_not_read_under_its_hands(record: Recorder,
                                                                       path: str) -> None:
    record.task("first")
    record.close()
    stranger = sqlite3.connect(path, isolation_level=None)
    for statement in ("PRAGMA locking_mode = EXCLUSIVE", "PRAGMA journal_mode = DELETE",
                      "BEGIN EXCLUSIVE", "UPDATE tasks SET name = 'half done'"):
        stranger.execute(statement)
    with pytest.raises(HistoryError, match="cannot be read: database is locked"):
        with History(path, patience=0.05) as history:
            history.tasks()
    stranger.execute("ROLLBACK")
    stranger.close()
    with History(path, patience=0.05) as history:
        assert names(history.tasks()) == ["first"]


def test_a_closed_history_says_so_and_may_be_closed_again(record: Recorder, path: str) -> None:
    history = History(path)
    history.close()
    history.close()
    for ask in (history.tasks, history.version, history.stats):
        with pytest.raises(HistoryError, match="is closed; open another"):
            ask()


def test_a_file_that_is_deleted_is_told_of_and_one_made_anew_is_read(
    record: Recorder, history: History, path: str
) -> None:
    record.task("old")
    version = history.version()
    record.close()
    for suffix in ("", "-wal", "-shm"):
        if os.path.exists(path + suffix):
            os.unlink(path + suffix)
    with pytest.raises(HistoryError, match="there is no history at"):
        history.tasks()
    second = Recorder(path)
    second.task("new")
    assert names(history.tasks()) == ["new"]
    assert history.version() != version
    second.close()


def test_any_thread_may_ask_while_another_writes(record: Recorder, history: History) -> None:
    task_id = record.task("job", "running")
    done, seen, errors = threading.Event(), [0] * 4, []

    def ask(number: int) -> None:
        try:
            while not done.is_set() or not seen[number]:
                events = history.streams("job")
                assert [event.seq for event in events] == list(range(4, 4 + len(events)))
                assert len(events) >= seen[number]
                seen[number] = len(events)
                assert history.counts() == {"running": 1}
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for number in range(300):
        record.said(task_id, str(number))
    done.set()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert not errors and min(seen) > 0

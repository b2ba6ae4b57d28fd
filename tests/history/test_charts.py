"""What a history shows as groups and drawings: failures that are alike, throughput, the
timeline."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from tests.histories import Recorder
from tests.history.plans import plans, scans

from bgworker.history import charts, schema
from bgworker.history.charts import Bar, Kind, pattern_of
from bgworker.history.reader import History
from bgworker.history.schema import COMMAND_FAILED
from bgworker.model.errors import ConfigurationError
from bgworker.model.events import TaskStatus

RUN = "a" * 32
NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)


@pytest.fixture
def record(path: str) -> Iterator[Recorder]:
    recorder = Recorder(path, now=NOON)
    yield recorder
    recorder.close()


# ---------------------------------------------------------------- failures

@pytest.mark.parametrize(("message", "pattern"), [
    ("bad row 17", "bad row #"), ("took 1.5 s, not 2", "took # s, not #"),
    ("at 12:30:59.1, 10,000 rows", "at #, # rows"), ("<A object at 0x7f1Ac0>", "<A object at #>"),
    ("id 0193af01-1111-7abc-8def-0123456789ab!", "id #!"), ("sha deadbeef01", "sha #"),
    ("/tmp/run17/part-3.csv", "/tmp/run#/part-#.csv"), ("a\n  b\t3", "a b #"),
    ("deadbeef is a word, cafe too", "deadbeef is a word, cafe too"), (None, ""),
    ("x" * 300, "x" * 200), ("utf8 and ipv4", "utf# and ipv#"),
])
def test_a_pattern_is_the_message_without_numbers(message: str | None, pattern: str) -> None:
    assert pattern_of(message) == pattern


def fingerprint_of(failure_type: str | None, message: str | None, *command: Any) -> str:
    return Kind.of(failure_type, message, *command or ("load", None)).fingerprint


def test_a_fingerprint_tells_types_patterns_programs_and_exit_codes_apart() -> None:
    one = fingerprint_of("OSError", "no 1")
    assert one == fingerprint_of("OSError", "no 22") and len(one) == 16
    assert len({one, fingerprint_of("IOError", "no 1"), fingerprint_of("OSError", "not 1"),
                fingerprint_of(None, None), fingerprint_of("OSErrorno", "1")}) == 5
    command = fingerprint_of("E", "gzip a", "gzip", 1)
    assert command == fingerprint_of("E", "gzip b", "gzip", 1)
    assert len({command, fingerprint_of("E", "gzip a", "gzip", 2), fingerprint_of("E", "gzip"),
                fingerprint_of("E", "gzip a", "grep", 1)}) == 4


def failed(record: Recorder, name: str, message: str, hours: float, **columns: Any) -> str:
    return record.task(name, "failed", created=record.ago(hours=hours), took=60.0,
                       failure_type="OSError", failure_message=message, **columns)


def test_failures_that_are_alike_form_a_group(record: Recorder, history: History) -> None:
    record.run(RUN, ended=record.now)
    failed(record, "load", "no 1 left", 5)
    failed(record, "sync", "no 22 left", 4)
    latest = failed(record, "load", "no 3 left", 1, run_id=RUN)
    other = failed(record, "load", "gone", 2)
    record.task("load", created=record.ago(hours=3), took=60.0)
    record.task("sync", created=record.ago(hours=6), took=60.0)
    found = history.failure_groups()
    assert (found.searched, found.is_all, found.more) == (4, True, 0)
    alike, alone = found.groups
    minute = timedelta(minutes=1)
    assert alike == charts.FailureGroup(
        fingerprint_of("OSError", "no 9 left"), "OSError", "no # left", 3, ("load", "sync"),
        record.ago(hours=5) + minute, record.ago(hours=1) + minute, record.ago(hours=3) + minute,
        latest, "no 3 left")
    assert (alone.count, alone.latest_task_id, alone.pattern) == (1, other, "gone")
    assert [task.task_id for task in history.page(fingerprint=alone.fingerprint).tasks] == [other]
    assert len(history.page(fingerprint=alike.fingerprint).tasks) == 3
    assert history.page(fingerprint=alike.fingerprint, text="22").tasks[0].name == "sync"
    assert history.page(fingerprint=alike.fingerprint, status="completed").tasks == ()
    assert [group.count for group in history.failure_groups(run=RUN).groups] == [1]
    assert [group.count for group in history.failure_groups(
        since=record.ago(hours=4)).groups] == [2, 1]
    one = history.failure_groups(limit=1)
    assert (len(one.groups), one.more) == (1, 1)


def test_what_timed_out_is_a_failure_like_others(record: Recorder, history: History) -> None:
    ids = [record.task(name, "timed_out", created=record.ago(hours=hours), took=1.0,
                       failure_type="TaskTimedOut",
                       failure_message=f"ran longer than its timeout of {hours} s")
           for name, hours in (("load", 3), ("sync", 1))]
    failed(record, "load", "no 1 left", 2)
    late, other = history.failure_groups().groups
    assert (late.count, late.names, late.latest_task_id) == (2, ("sync", "load"), ids[1])
    assert (other.failure_type, other.count) == ("OSError", 1)

    def found(**filters: Any) -> list[str]:
        page = history.page(fingerprint=late.fingerprint, **filters)
        return [task.task_id for task in page.tasks]

    assert found() == found(status="timed_out") == ids[::-1]
    assert found(status="failed") == []
    assert found(since=record.ago(hours=2)) == ids[1:]


def test_commands_that_ended_alike_are_one_group_whatever_their_text(
    record: Recorder, history: History
) -> None:
    def command(text: str, end: str, program: str = "gzip") -> str:
        return record.task(text, "failed", script_id=program, created=record.ago(hours=1),
                           failure_type=COMMAND_FAILED, failure_message=f"Command '{text}' {end}.")

    ids = [command(f"gzip -t {name}.gz", "returned non-zero exit status 1") for name in "abc"]
    others = [command("gzip x", "returned non-zero exit status 2"),
              command("gzip -t a.gz", "died with <Signals.SIGKILL: 9>"),
              command("grep -q x", "returned non-zero exit status 1", "grep"),
              command("gzip", "was odd")]
    groups = {group.count: group for group in history.failure_groups().groups}
    assert sorted(groups) == [1, 3] and len(history.failure_groups().groups) == 5
    found = history.page(fingerprint=groups[3].fingerprint).tasks
    assert sorted(task.task_id for task in found) == sorted(ids)
    assert (groups[3].pattern, groups[3].exit_code) == ("gzip", 1)
    assert [(each.count, each.program, each.exit_code) for each in history.stats().failures] == [
        (3, "gzip", 1), (1, None, None), (1, "grep", 1), (1, "gzip", -9), (1, "gzip", 2)]
    assert history.stats().failures[4].latest_task_id == others[0]


def test_groups_of_more_failures_than_are_read_say_so(
        record: Recorder, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    for hours in range(5):
        failed(record, "load", "no", hours, run_id=None)
    monkeypatch.setattr(charts, "MOST_FAILURES", 3)
    found = history.failure_groups()
    assert (found.groups[0].count, found.searched, found.is_all) == (3, 3, False)
    assert found.groups[0].first_utc == record.ago(hours=2) + timedelta(minutes=1)


def test_a_pass_is_found_among_the_last_completed_or_by_its_name(
        record: Recorder, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    failed(record, "rare", "no", 1)
    failed(record, "never", "not", 1)
    record.task("rare", created=record.ago(hours=90), took=0.0)
    for minutes in range(20):
        record.task("often", created=record.ago(minutes=minutes))
    monkeypatch.setattr(charts, "MOST_PASSED", 10)
    passed = {group.names: group.last_passed_utc for group in history.failure_groups().groups}
    assert passed == {("rare",): record.ago(hours=90), ("never",): None}


# ---------------------------------------------------------------- throughput

def test_what_ended_is_counted_by_the_minute(record: Recorder, history: History) -> None:
    record.run(RUN, ended=record.now)
    for seconds in (0, 1, 59, 60, 185):
        record.task(created=NOON + timedelta(seconds=seconds), took=0.0, run_id=RUN)
    record.task("x", "failed", created=NOON + timedelta(seconds=61), took=0.0)
    record.task("x", "running", created=NOON)
    found = history.throughput()
    assert found.width == 60 and found.is_all
    assert [(bucket.start_utc - NOON) // timedelta(minutes=1) for bucket in found.buckets] == [
        0, 1, 2, 3]
    assert [dict(bucket.counts) for bucket in found.buckets] == [
        {"completed": 3}, {"completed": 1, "failed": 1}, {}, {"completed": 1}]
    of_run = history.throughput(run=RUN)
    assert [sum(bucket.counts.values()) for bucket in of_run.buckets] == [3, 1, 0, 1]
    some = history.throughput(since=NOON + timedelta(seconds=1), until=NOON + timedelta(seconds=61))
    assert [dict(bucket.counts) for bucket in some.buckets] == [{"completed": 2}, {"completed": 1}]
    late = history.throughput(run=RUN, since=NOON + timedelta(seconds=60), buckets=2)
    assert [sum(bucket.counts.values()) for bucket in late.buckets] == [1, 1]
    assert history.throughput(since=NOON + timedelta(days=1)).buckets == ()


@pytest.mark.parametrize("span", [1, 60, 3600, 86_400, 400 * 86_400, 20_000 * 86_400])
@pytest.mark.parametrize("most", [1, 2, 7, 120])
def test_there_are_never_more_buckets_than_were_asked_for_and_none_is_lost(
        record: Recorder, history: History, span: int, most: int) -> None:
    dice = random.Random(span)
    ends = [0, span, *[dice.randint(0, span) for _ in range(20)]]
    for end in ends:
        record.task(created=NOON - timedelta(seconds=span) + timedelta(seconds=end), took=0.0)
    found = history.throughput(buckets=most)
    assert 1 <= len(found.buckets) <= most
    assert sum(sum(bucket.counts.values()) for bucket in found.buckets) == len(ends)
    steps = {later.start_utc - bucket.start_utc
             for bucket, later in zip(found.buckets, found.buckets[1:])}
    assert steps <= {timedelta(seconds=found.width)}
    assert most == 1 or found.width == 60 or found.width * most <= 6 * span


# ---------------------------------------------------------------- the timeline

def spans(bars: tuple[Bar, ...]) -> list[tuple[str, int, float, float]]:
    return [(bar.name, bar.lane, (bar.start_utc - NOON).total_seconds(),
             (bar.end_utc - NOON).total_seconds()) for bar in bars]


def ran(record: Recorder, name: str, start: float, end: float, status: str = "completed",
        **columns: Any) -> str:
    return record.task(name, status, created=NOON + timedelta(seconds=start), took=end - start,
                       **columns)


def test_tasks_have_bars_on_lanes_of_their_own(record: Recorder, history: History) -> None:
    record.run(RUN, ended=record.now)
    ran(record, "a", 0, 10)
    ran(record, "b", 2, 4, "failed", run_id=RUN)
    ran(record, "c", 4, 12)
    ran(record, "d", 11, 12)
    record.task("waits", "scheduled", created=NOON)
    record.task("never", "cancelled", created=NOON, took=0.0, started_utc=None)
    found = history.timeline()
    assert spans(found.bars) == [("a", 0, 0, 10), ("b", 1, 2, 4), ("c", 1, 4, 12), ("d", 0, 11, 12)]
    assert found.bars[1].status is TaskStatus.FAILED and found.lanes == 2
    assert (found.start_utc, found.end_utc) == (NOON, NOON + timedelta(seconds=12))
    assert (found.left_out, found.left_out_seconds, found.is_all) == (0, 0.0, True)
    assert spans(history.timeline(run=RUN).bars) == [("b", 0, 2, 4)]
    assert history.timeline(since=timedelta(0)).bars == ()


def test_the_longest_bars_are_kept_and_the_rest_is_summed_up(record: Recorder,
                                                             history: History) -> None:
    for number in range(10):
        ran(record, f"{number}", number, number + 1 + number)
    found = history.timeline(bars=3)
    assert [bar.name for bar in found.bars] == ["7", "8", "9"]
    assert found.left_out == 7 and found.left_out_seconds == pytest.approx(28)
    few = history.timeline(lanes=2)
    assert few.lanes == 2 and few.left_out == 10 - len(few.bars) > 0
    drawn = sum((bar.end_utc - bar.start_utc).total_seconds() for bar in few.bars)
    assert few.left_out_seconds == pytest.approx(55 - drawn)


def test_what_lies_between_two_times_is_cut_out(record: Recorder, history: History) -> None:
    for name, start, end in (("before", 0, 4), ("into", 3, 6), ("over", 2, 20), ("in", 6, 7),
                             ("out of", 8, 30), ("after", 11, 12)):
        ran(record, name, start, end)
    found = history.timeline(since=NOON + timedelta(seconds=5), until=NOON + timedelta(seconds=10))
    assert spans(found.bars) == [("into", 0, 5, 6), ("over", 1, 5, 10), ("in", 0, 6, 7),
                                 ("out of", 0, 8, 10)]
    assert found.start_utc == NOON + timedelta(seconds=5)
    assert found.end_utc == NOON + timedelta(seconds=10)


def test_a_task_that_runs_reaches_to_now_and_an_interrupted_one_to_its_last_sign(
        record: Recorder, history: History) -> None:
    run = record.run(RUN, host=schema.this_host(), ended=NOON + timedelta(seconds=50))
    record.task("runs", "running", created=NOON)
    record.task("was interrupted", "running", created=NOON, run_id=run)
    before = datetime.now(timezone.utc)
    found = {bar.name: bar for bar in history.timeline().bars}
    assert found["runs"].status is TaskStatus.RUNNING
    assert before - timedelta(seconds=1) < found["runs"].end_utc <= datetime.now(timezone.utc)
    assert found["was interrupted"].status is TaskStatus.INTERRUPTED
    assert found["was interrupted"].end_utc == NOON + timedelta(seconds=50)


@pytest.mark.parametrize("seed", range(5))
def test_loads_and_lanes_agree_with_counting(record: Recorder, history: History,
                                             seed: int) -> None:
    dice = random.Random(seed)
    times = [(start := dice.randint(0, 500), start + dice.randint(0, 60)) for _ in range(80)]
    for number, (start, end) in enumerate(times):
        ran(record, f"{number}", start, end)
    found = history.timeline(loads=30, lanes=100)
    assert len(found.bars) == 80 and 1 < len(found.loads) <= 30
    begin = min(start for start, _ in times)
    finish = max(end for _, end in times)
    for load in found.loads:
        low = max(begin, (load.start_utc - NOON).total_seconds())
        high = min(finish, (load.start_utc - NOON).total_seconds() + found.width)
        ticks = [sum(start <= low + step / 2 < end for start, end in times)
                 for step in range(int((high - low) * 2))]
        assert load.most == max([*ticks, 0]) or high <= low
        busy = sum(max(0, min(end, high) - max(start, low)) for start, end in times)
        assert load.mean == pytest.approx(busy / (high - low) if high > low else 0, abs=0.01)
    for bar in found.bars:
        for other in found.bars:
            if bar is not other and bar.lane == other.lane:
                assert bar.end_utc <= other.start_utc or other.end_utc <= bar.start_utc
    assert found.lanes == 1 + max(bar.lane for bar in found.bars)


def test_a_timeline_of_more_tasks_than_are_read_says_so(record: Recorder,
                                                        history: History) -> None:
    record.run(RUN, ended=record.now)
    for number in range(6):
        ran(record, f"{number}", number, number + 1, run_id=RUN)
    for found in (history.timeline(most=4), history.timeline(most=4, run=RUN)):
        assert [bar.name for bar in found.bars] == ["2", "3", "4", "5"]
        assert found.searched == 4 and not found.is_all


@pytest.mark.parametrize(("ask", "message"), [
    (lambda history: history.timeline(bars=0), "bars: expected a whole number >= 1"),
    (lambda history: history.timeline(lanes=5000), "lanes: expected at most 1,000"),
    (lambda history: history.throughput(buckets=0), "buckets: expected a whole number >= 1"),
    (lambda history: history.failure_groups(limit=0), "limit: expected a whole number >= 1"),
    (lambda history: history.timeline(until=5), "since: expected an aware datetime"),
])
def test_a_drawing_that_means_nothing_is_refused(history: History, ask: Any,
                                                 message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ask(history)


def test_no_drawing_reads_a_table_that_an_index_answers_for(record: Recorder,
                                                            history: History) -> None:
    record.run(RUN, ended=record.now)
    failed(record, "x", "no 1", 1, run_id=RUN)
    ran(record, "y", 0, 1)
    for how in ({}, {"run": RUN}, {"since": timedelta(days=9999)}):
        for ask in (history.failure_groups, history.throughput, history.timeline, history.counts):
            found = plans(history, lambda: ask(**how))  # noqa: B023
            assert found and scans(found) == [], (how, ask)
    assert scans(plans(history, lambda: history.timeline(until=timedelta(0)))) == []

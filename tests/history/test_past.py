"""How tasks of the same name, or the same command, ended before."""

from __future__ import annotations

import pytest
from tests.histories import Recorder

from bgworker.history import past as module
from bgworker.history.past import Other, Past
from bgworker.history.reader import History
from bgworker.model.enums import TaskStatus
from bgworker.model.errors import UnknownTask


@pytest.fixture(params=[False, True], ids=["few", "many"])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there are so many of a name that the others are looked through for them."""
    if request.param:
        monkeypatch.setattr(module, "MOST", 5)
    return bool(request.param)


def test_what_a_task_is_like_is_told_by_those_before_and_after_it(
    record: Recorder, history: History, many: bool
) -> None:
    oldest = record.task("load", created=record.ago(hours=9), took=90.0)
    last = record.task("load", created=record.ago(hours=7), took=3.0)
    record.task("load", "failed", created=record.ago(hours=6))
    record.task("load", "timed_out", created=record.ago(hours=5))
    record.task("load", "running", created=record.ago(hours=5))
    record.task("other", created=record.ago(hours=4))
    this = record.task("load", "failed", created=record.ago(hours=3))
    record.task("load", created=record.ago(hours=2))
    newest = record.task("load", "cancelled", created=record.ago(hours=1), took=0.0)
    assert history.past(this) == Past(
        earlier=4, completed=2, median=46.5,
        latest=(TaskStatus.TIMED_OUT, TaskStatus.FAILED, TaskStatus.COMPLETED,
                TaskStatus.COMPLETED),
        last_completed=Other(last, TaskStatus.COMPLETED, history.task(last).created_utc,
                             history.task(last).completed_utc),
        later=Other(newest, TaskStatus.CANCELLED, history.task(newest).created_utc,
                    history.task(newest).completed_utc),
        rerun=None)
    assert history.past(oldest).earlier == 0 and history.past(newest).later is None
    assert history.past("other") == Past(0, 0, None, (), None, None, None)
    with pytest.raises(UnknownTask):
        history.past("nobody")


def test_a_command_is_known_by_its_text_and_a_function_by_its_name(
    record: Recorder, history: History, many: bool
) -> None:
    for number in range(7):
        record.insert("scripts", hash=f"h{number}")
    for hours, name, script, hash_ in (
            (9, "nightly-1", "gzip", "h1"), (8, "nightly-2", "gzip", "h2"),
            (7, "nightly-2", "gzip", "h3"), (6, "load", "m:load", "h4"),
            (5, "renamed", "m:load", "h4")):
        record.task(name, created=record.ago(hours=hours), script_id=script, script_hash=hash_)
    command = record.task("nightly-2", "failed", script_id="gzip", script_hash="h1")
    assert history.past(command).earlier == 3, "two have its name, one its text"
    function = record.task("load", script_id="m:load", script_hash="h4")
    assert history.past(function).earlier == 1, "not what has another name"


def test_a_task_is_superseded_by_the_last_that_ran_it_again(
    record: Recorder, history: History
) -> None:
    first = record.task("a", "failed", created=record.ago(hours=5))
    assert history.past(first).rerun is None
    second = record.task("a", "failed", created=record.ago(hours=4), rerun_of=first)
    third = record.task("a", created=record.ago(hours=3), rerun_of=second)
    for task in (first, second):
        rerun = history.past(task).rerun
        assert rerun is not None and (rerun.task_id, rerun.status) == (third, "completed")
    assert history.past(third).rerun is None
    record.connection.execute("UPDATE tasks SET rerun_of = ? WHERE id = ?", (third, first))
    assert history.past(third).rerun is None, "a circle is none of ours, and ends"


def test_no_more_than_a_bound_is_read(record: Recorder, history: History,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 5)
    for hours in range(9, 0, -1):
        this = record.task("load", created=record.ago(hours=hours), took=float(hours))
    found = history.past(this)
    assert (found.earlier, found.median) == (5, 4.0), "the latest"

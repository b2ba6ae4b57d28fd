"""What the record of a task holds when it is asked for more: its result, and what the environment
switches on for a script that nobody changes."""

from __future__ import annotations

import inspect
import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from bgworker import (ConfigurationError, History, Scheduler, TaskCancelled, TaskTimedOut,
                      current_task, shell)
from bgworker.model.wire import decode
from bgworker.webhook.cloudevents import encode_batch
from tests.support import SOON, Gate, RecordingSink, environment

Make = Any


@pytest.fixture
def recorder() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def pool(recorder: RecordingSink) -> Iterator[Scheduler]:
    with Scheduler(2, sinks=[recorder], record_result=True, max_payload=1000) as made:
        yield made


def result_of(pool: Scheduler, value: object) -> str | None:
    task = pool.submit(lambda: value)
    task.result(SOON)
    return task.snapshot().result


# ---------------------------------------------------------------- the result

def test_a_result_is_recorded_as_json_in_the_snapshot_and_with_the_end_alone(
        pool: Scheduler, recorder: RecordingSink) -> None:
    task = pool.submit(lambda: {"rows": [1, None], "to": {3}})
    task.result(SOON)
    assert task.snapshot().result == pool.get(task.id).result == '{"rows":[1,null],"to":[3]}'
    assert pool.flush(SOON)
    *before, end = recorder.of(task)
    assert end.task.result == '{"rows":[1,null],"to":[3]}'
    assert [event.task.result for event in before] == [None, None, None]


@pytest.mark.parametrize("value, text", [
    (None, "null"), (0, "0"), (True, "true"), ("\u00e9\0\ud800", '"\\u00e9\\ufffd\\ufffd"'),
    (float("nan"), "null"), (b"ab", '"ab"'), ((1, 2), "[1,2]"), (Path("/x"), '"/x"')])
def test_any_result_is_json(pool: Scheduler, value: object, text: str) -> None:
    assert result_of(pool, value) == text


def test_the_result_of_a_coroutine_is_what_it_returns(pool: Scheduler) -> None:
    async def work() -> list[int]:
        return [7]

    task = pool.submit(work)
    assert task.result(SOON) == [7] and task.snapshot().result == "[7]"


def test_the_result_of_a_command_is_its_exit_code(pool: Scheduler) -> None:
    done = pool.submit(shell([sys.executable, "-c", ""]))
    failed = pool.submit(shell([sys.executable, "-c", "exit(3)"]))
    assert done.result(SOON) == 0 and failed.wait(SOON)
    assert (done.snapshot().result, failed.snapshot().result) == ("0", None)


def test_nothing_is_recorded_unless_it_was_asked_for() -> None:
    with Scheduler(1) as plain:
        off = plain.submit(lambda: 7)
        on = plain.options(record_result=True).submit(lambda: 7)
        assert (off.result(SOON), on.result(SOON)) == (7, 7)
        assert (off.snapshot().result, on.snapshot().result) == (None, "7")
    with Scheduler(1, record_result=True) as pool:
        off = pool.options(record_result=False).submit(lambda: 7)
        assert off.result(SOON) == 7 and off.snapshot().result is None


def test_who_changes_the_result_does_not_change_the_record(pool: Scheduler) -> None:
    for _ in range(200):
        task = pool.submit(lambda: [1])
        task.add_done_callback(lambda done: done.result().append(2))
        task.result(SOON).append(3)
        assert task.snapshot().result == "[1]"


@pytest.mark.parametrize("size", [900, 998, 999, 10_000, 500_000])
def test_a_result_that_is_too_large_gives_way_to_an_object_with_its_beginning(
        pool: Scheduler, size: int) -> None:
    value = '"' * (size // 2) + "x" * (size % 2)
    text = result_of(pool, value)
    assert text is not None and len(text) <= 1000
    whole = json.dumps(value)
    if len(whole) <= 1000:
        assert text == whole
    else:
        found = json.loads(text)
        assert list(found) == ["truncated", "head"] and found["truncated"] == len(whole)
        assert found["head"] and whole.startswith(found["head"])


class Odd:
    """Its text is made by code of its own."""

    def __init__(self, code: Any) -> None:
        self.code = code

    def __str__(self) -> str:
        return str(self.code())


def raises(kind: type[BaseException]) -> Any:
    def fail() -> None:
        raise kind("no")
    return fail


@pytest.mark.parametrize("kind", [
    ValueError, KeyboardInterrupt, SystemExit, TaskCancelled, RecursionError])
def test_a_result_whose_code_raises_is_recorded_as_unprintable_and_given_as_it_is(
        pool: Scheduler, kind: type[BaseException]) -> None:
    odd = Odd(raises(kind))
    task = pool.submit(lambda: odd)
    assert task.result(SOON) is odd and task.status == "completed"
    assert task.snapshot().result == '"<unprintable Odd object>"'


def test_the_code_of_a_result_runs_as_the_task_within_its_timeout(pool: Scheduler) -> None:
    setting: ContextVar[str] = ContextVar("setting", default="unset")

    def work() -> Odd:
        setting.set("set")
        return Odd(lambda: f"{setting.get()} {threading.current_thread().name}")

    task = pool.submit(work)
    task.result(SOON)
    assert json.loads(task.snapshot().result or "") == f"set {pool._name}_0"
    gate = Gate()
    late = pool.options(timeout=0.05).submit(lambda: Odd(gate))
    with pytest.raises(TaskTimedOut):
        late.result(SOON)
    gate.open()
    assert pool.submit(lambda: 7).result(SOON) == 7
    assert (late.status, late.snapshot().result) == ("timed_out", None)


def test_a_task_that_fails_or_is_cancelled_has_no_result(pool: Scheduler) -> None:
    def stop() -> None:
        raise TaskCancelled("enough")

    for work in (stop, raises(ValueError)):
        task = pool.submit(work)
        assert task.wait(SOON) and task.snapshot().result is None


def test_the_record_holds_no_result_alive(pool: Scheduler) -> None:
    import weakref

    class Live:
        pass

    found = []

    def work() -> Live:
        live = Live()
        found.append(weakref.ref(live))
        return live

    task = pool.submit(work)
    task.wait(SOON)
    assert pool.flush(SOON)
    task_id = task.id
    del task
    import gc
    gc.collect()
    assert found[0]() is None and "Live" in (pool.get(task_id).result or "")


def test_every_sink_has_the_result(tmp_path: Path, recorder: RecordingSink) -> None:
    lines, history = tmp_path / "a.jsonl", tmp_path / "h.db"
    with Scheduler(1, sinks=[recorder, f"jsonl:{lines}", f"sqlite:{history}"],
                   record_result=True) as pool:
        task = pool.options(name="load").submit(lambda: {"\u00e9": 7})
        task.wait(SOON)
    text = '{"\\u00e9":7}'
    *_, end = [decode(line) for line in lines.read_bytes().splitlines()]
    assert end.task.result == text  # type: ignore[union-attr]
    assert end == recorder.of(task)[-1]
    with History(history) as read:
        assert read.task("load").result == text
        *_, again = read.events()
        assert again.task.result == text  # type: ignore[union-attr]
    with closing(sqlite3.connect(history)) as connection:
        assert connection.execute("SELECT result_json FROM tasks").fetchall() == [(text,)]
    [posted] = json.loads(encode_batch([end], {})[0])
    assert posted["data"]["task"]["result"] == text


# ---------------------------------------------------------------- the environment

def talk(value: int) -> int:
    print("said", value)
    return value


SCRIPT = """
import sys
from bgworker import Scheduler
from tests.running.test_options import talk
with Scheduler(1, sinks=["sqlite:" + sys.argv[1]]) as pool:
    pool.submit(talk, 5).result(30)
"""


@pytest.mark.parametrize("words", [
    "", "output", "arguments", "source", "result", " output, arguments ,", ",",
    "output,arguments,source,result"])
def test_the_environment_switches_on_what_a_script_does_not_ask_for(
        tmp_path: Path, words: str) -> None:
    path = tmp_path / "h.db"
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)],
                          env=environment(BGWORKER_CAPTURE=words), capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "said 5\n", "")
    with History(path) as history:
        task = history.task("last")
        said = [event.payload for event in history.streams("last")]
    assert ("output" in words) == (said == ["said 5"])
    assert ("arguments" in words) == (task.arguments == '{"args":[5],"kwargs":{}}')
    assert ("source" in words) == ((task.script_text or "").startswith("def talk("))
    assert ("result" in words) == (task.result == "5")
    if not words.strip(","):
        assert (said, task.arguments, task.script_text, task.result) == ([], None, None, None)


def test_an_explicit_setting_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BGWORKER_CAPTURE", "arguments,result")
    with Scheduler(1, record_arguments=False) as pool:
        task = pool.submit(talk, 5)
        off = pool.options(record_result=False).submit(talk, 5)
        assert task.result(SOON) == off.result(SOON) == 5
        assert (task.snapshot().arguments, task.snapshot().result) == (None, "5")
        assert off.snapshot().result is None
    monkeypatch.delenv("BGWORKER_CAPTURE")
    with Scheduler(1) as pool:
        task = pool.submit(talk, 5)
        assert task.result(SOON) == 5 and task.snapshot().result is None


@pytest.mark.parametrize("words, wrong", [
    ("outptu", "'outptu'"), ("output arguments", "'output arguments'"),
    ("output,Result", "'Result'"), ("output,1", "'1'")])
def test_a_word_of_the_environment_that_means_nothing_is_refused_and_nothing_is_left_running(
        monkeypatch: pytest.MonkeyPatch, words: str, wrong: str) -> None:
    monkeypatch.setenv("BGWORKER_CAPTURE", words)
    before = threading.active_count()
    with pytest.raises(ConfigurationError, match="variable BGWORKER_CAPTURE: expected some of "
                       f"output, arguments, source, result, .*, got {wrong}; correct or unset it"):
        Scheduler(1, sinks=["jsonl:/nonexistent/never/opened"])
    assert threading.active_count() == before


def test_what_the_environment_may_switch_on_reads_as_off_in_the_help() -> None:
    settings = inspect.signature(Scheduler).parameters
    for name in ("capture_output", "record_source", "record_arguments", "record_result"):
        assert repr(settings[name].default) == "False" and not settings[name].default
    with Scheduler(1, capture_output=settings["capture_output"].default) as pool:
        assert pool.submit(lambda: current_task()._captures_output).result(SOON) is False

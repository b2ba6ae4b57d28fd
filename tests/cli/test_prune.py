"""``bgworker prune``: what goes, that no more goes, and that nobody else notices."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from tests.histories import Recorder, rows_of, run_cli

from bgworker import History, Scheduler, SqliteSink, current_task
from bgworker.cli import main
from bgworker.history.presencelock import PresenceLock
from bgworker.model.ids import new_id
from bgworker.history.presence import byte_of
from bgworker.history.schema import lock_path, this_host


@pytest.fixture
def ages(record: Recorder) -> Recorder:
    """Tasks that ended one to ten days ago, with two rows each, and one that runs since long
    ago."""
    for days in range(10, 0, -1):
        run = record.run(new_id(days))
        record.insert("scripts", hash=f"script {days}")
        task_id = record.task(
            f"{days} days", created=record.ago(days=days), run_id=run, script_hash=f"script {days}"
        )
        record.said(task_id, "one")
        record.said(task_id, "two")
    record.run("f" * 32)
    record.task("runs", "running", created=record.ago(days=99), run_id="f" * 32)
    return record


def left() -> list[str]:
    with History("bgworker.db") as history:
        return [task.name for task in history.tasks(limit=None)]


def said(capfd: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["prune", *words]) == code
    out, err = capfd.readouterr()
    assert (err == "") == (code == 0)
    return out + err


def is_sound() -> bool:
    dangling = rows_of("bgworker.db", "PRAGMA foreign_key_check")
    return rows_of("bgworker.db", "PRAGMA integrity_check") == [("ok",)] and not dangling


def test_what_ended_longer_ago_goes_with_all_that_belongs_to_it(
    ages: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    ages.run(copied := new_id(99))
    ages.connection.execute("UPDATE tasks SET run_id = ? WHERE name = 'runs'", (copied,))
    # it may be alive
    ages.connection.execute(
        "UPDATE runs SET host = 'elsewhere.example' WHERE run_id = ?", (copied,)
    )
    assert said(capfd, "--older-than", "84h").startswith(
        "removed 7 tasks with 14 stream rows; the file had "
    )
    assert left() == ["1 days", "2 days", "3 days", "runs"]
    assert len(rows_of("bgworker.db", "SELECT * FROM zz_stream_rows")) == 6
    hashes = rows_of("bgworker.db", "SELECT hash FROM scripts ORDER BY hash")
    assert hashes == [("script 1",), ("script 2",), ("script 3",)]
    assert is_sound()


def test_all_but_so_many_go_and_what_runs_stays(
    ages: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    ages.connection.execute(
        "UPDATE runs SET host = 'elsewhere.example' WHERE run_id = ?", ("f" * 32,)
    )
    said(capfd, "--keep", "4")
    assert left() == ["1 days", "2 days", "3 days", "runs"]
    said(capfd, "--keep", "0")
    assert left() == ["runs"]
    assert is_sound()


def test_both_bounds_hold_together(ages: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    ages.connection.execute("UPDATE runs SET host = 'elsewhere.example'")
    said(capfd, "--keep", "9", "--older-than", "5d12h")
    assert left() == ["1 days", "2 days", "3 days", "4 days", "5 days", "runs"]
    said(capfd, "--keep", "3", "--older-than", "90d")
    assert left() == ["1 days", "2 days", "runs"]


def test_a_task_whose_process_is_dead_goes_and_one_whose_process_lives_stays(
    record: Recorder,
) -> None:
    for name in ("dead", "alive"):
        record.task(
            name,
            "running",
            created=record.ago(days=9),
            run_id=record.run(new_id(len(name)), host=this_host()),
        )
    lock = PresenceLock.share(lock_path("bgworker.db"))
    for run_id, in rows_of("bgworker.db", "SELECT run_id FROM runs"):
        lock.hold(byte_of(run_id) or 0)
    lock.release(
        byte_of(rows_of("bgworker.db", "SELECT run_id FROM tasks WHERE name = 'dead'")[0][0]) or 0
    )
    try:
        assert main(["prune", "--older-than", "1d"]) == 0
    finally:
        lock.leave()
    assert left() == ["alive"]


@pytest.mark.skipif(os.name == "nt", reason="Windows deletes no file that is open")
def test_nothing_of_a_live_process_goes_when_its_lock_file_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    release, said_it = threading.Event(), threading.Event()

    def talk() -> None:
        current_task().output("hello")
        said_it.set()
        release.wait(60)

    with Scheduler(1, sinks=[SqliteSink("bgworker.db")]) as pool:
        task = pool.submit(talk)
        assert said_it.wait(60) and pool.flush(60)
        try:
            os.unlink("bgworker.db.lock")
            done = run_cli("prune", "--keep", "0", "--json", cwd=tmp_path)
            assert done.returncode == 0 and json.loads(done.stdout)["tasks"] == 0, done.stderr
        finally:
            release.set()
        task.result(60)
    assert len(rows_of("bgworker.db", "SELECT * FROM zz_stream_rows")) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--older-than", "84h"],
        ["--keep", "4"],
        ["--keep", "9", "--older-than", "12h"],
        ["--keep", "99"],
    ],
)
def test_a_dry_run_tells_what_would_go_and_changes_nothing(
    ages: Recorder, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    ages.connection.execute("UPDATE runs SET host = 'elsewhere.example'")
    before = left(), rows_of("bgworker.db", "SELECT * FROM zz_stream_rows")
    trial = json.loads(said(capfd, *words, "--dry-run", "--json"))
    assert (left(), rows_of("bgworker.db", "SELECT * FROM zz_stream_rows")) == before
    assert trial["bytes_after"] is None
    real = json.loads(said(capfd, *words, "--json"))
    assert (real["tasks"], real["stream_rows"]) == (trial["tasks"], trial["stream_rows"])
    assert (len(before[0]) - len(left()), real["tasks"] * 2) == (real["tasks"], real["stream_rows"])


def test_the_json_and_the_words_are_of_known_shape(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said(capfd, "--keep", "5", "--dry-run") == "would remove 0 tasks with 0 stream rows\n"
    answer = json.loads(said(capfd, "--keep", "5", "--json"))
    assert list(answer) == ["v", "dry_run", "tasks", "stream_rows", "bytes_before", "bytes_after"]
    assert (answer["v"], answer["dry_run"], answer["tasks"], answer["stream_rows"]) == (
        1,
        False,
        0,
        0,
    )


def test_the_file_gives_its_room_back(record: Recorder, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        record.many_said(record.task(f"{number}"), 30_000)
    record.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    record.close()
    before = os.path.getsize("bgworker.db")
    answer = json.loads(said(capfd, "--keep", "1", "--json"))
    assert (answer["tasks"], answer["stream_rows"]) == (2, 60_000)
    assert (
        answer["bytes_before"] == before
        and answer["bytes_after"] == os.path.getsize("bgworker.db") < before * 0.4
    )
    assert rows_of("bgworker.db", "PRAGMA freelist_count") == [(0,)]
    assert is_sound()


def test_old_losses_go_by_their_age(record: Recorder) -> None:
    record.lost(1, at=record.ago(days=9))
    record.lost(2)
    assert main(["prune", "--older-than", "1d"]) == 0
    assert rows_of("bgworker.db", "SELECT count FROM losses") == [(2,)]


def test_a_scheduler_that_writes_meanwhile_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bgworker.db"
    record = Recorder(path)
    for number in range(100):
        record.many_said(record.task(f"old {number}", created=record.ago(days=2)), 500)
    record.close()

    def talk(number: int) -> None:
        for row in range(200):
            current_task().output(f"{number}/{row}")

    with Scheduler(2, sinks=[SqliteSink(path)]) as pool:
        tasks = [pool.submit(talk, number) for number in range(20)]
        done = run_cli("prune", "--older-than", "1d", "--json", cwd=tmp_path)
        tasks += [pool.submit(talk, number) for number in range(20, 40)]
        assert done.returncode == 0, done.stderr
        for task in tasks:
            task.result(30)
    [health] = pool.sinks.values()
    assert health.delivered == health.emitted and not health.retries
    assert json.loads(done.stdout)["stream_rows"] == 50_000
    with History(path) as history:
        assert len(history.tasks(limit=None)) == 40
        for number, task in enumerate(tasks):
            assert [event.payload for event in history.streams(task.id)] == [
                f"{number}/{row}" for row in range(200)
            ]


@pytest.mark.parametrize("words, message", [
    ([], "expected --older-than DUR or --keep N"), (["--keep", "-1"], "--keep"),
    (["--older-than", "old"], "expected a duration such as"),
    (["--dry-run"], "expected --older-than DUR or --keep N")])
def test_a_wrong_command_line_removes_nothing(
    ages: Recorder, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    text = said(capfd, *words, code=2)
    assert message in text and text.count("\n") == 1
    assert len(left()) == 11


def test_a_file_that_cannot_be_written_to_is_code_1(ages: Recorder, tmp_path: Path,
                                                    capfd: pytest.CaptureFixture[str]) -> None:
    ages.close()
    os.mkdir("bgworker.db.lock")  # as good as any reason that holds for root, too
    text = said(capfd, "--keep", "1", code=1)
    assert (
        text.startswith("bgworker prune: error: cannot prune 'bgworker.db': ")
        and text.count("\n") == 1
    )
    os.rmdir("bgworker.db.lock")
    assert len(left()) == 11

"""``bgworker export``, and the way back by ``replay``: nothing is different but who ran it."""

from __future__ import annotations

import json
import os
import stat
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Recorder, make_nightly, rows_of, run_cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bgworker import History
from bgworker.history import schema
from bgworker.cli import main
from bgworker.model.events import LifecycleEvent, StreamEvent, StreamType, TaskStatus
from bgworker.model.ids import new_id
from bgworker.model.wire import decode


def contents(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return all that a reader sees but for runs, and the rows of the tables behind it."""
    with History(path) as history:
        seen: dict[str, Any] = {"tasks": history.tasks(limit=None), "losses": history.losses()}
        seen["streams"] = {task.task_id: history.streams(task.task_id) for task in seen["tasks"]}
    seen["rows"] = rows_of(path, "SELECT * FROM task_streams ORDER BY task_id, seq")
    seen["scripts"] = rows_of(path, "SELECT * FROM scripts ORDER BY hash")
    seen["order"] = rows_of(path, "SELECT id FROM tasks ORDER BY key")
    seen["run ids"] = rows_of(
        path, "SELECT DISTINCT run_id FROM tasks JOIN runs USING (run_id) ORDER BY run_id"
    )
    return seen


def there_and_back(source: str | os.PathLike[str], folder: Path) -> Path:
    lines, copy = folder / "history.jsonl", folder / "copy.db"
    for path in (copy, Path(f"{copy}-wal"), Path(f"{copy}-shm")):
        path.unlink(missing_ok=True)
    assert main(["export", "--db", str(source), "--jsonl", str(lines)]) == 0
    assert main(["replay", str(lines), "--to", f"sqlite:{copy}"]) == 0
    return copy


def test_a_real_history_comes_back_equal(tmp_path: Path) -> None:
    source, copy = tmp_path / "nightly.db", tmp_path / "copy.db"
    make_nightly(source)
    exported = run_cli("export", "--db", source, "--jsonl", cwd=tmp_path)
    (tmp_path / "history.jsonl").write_text(exported.stdout)
    # a process that ran none of it
    done = run_cli("replay", "history.jsonl", "--to", f"sqlite:{copy}", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == f"{len(exported.stdout.splitlines())} delivered, 0 refused, 0 skipped\n"
    assert contents(copy) == contents(source)
    assert len(contents(copy)["tasks"]) == 5
    assert rows_of(copy, "SELECT DISTINCT host, pid FROM runs") == [(None, None)]
    assert rows_of(source, "SELECT host, pid FROM runs") == [(schema.this_host(), os.getpid())]


def test_a_second_replay_changes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "nightly.db"
    make_nightly(source)
    copy = there_and_back(source, tmp_path)
    before = contents(copy)
    assert main(["replay", str(tmp_path / "history.jsonl"), "--to", f"sqlite:{copy}"]) == 0
    assert contents(copy) == before


def test_the_comparison_notices_what_is_missing_or_different(tmp_path: Path) -> None:
    source = tmp_path / "nightly.db"
    make_nightly(source)
    copy = there_and_back(source, tmp_path)
    expected = contents(source)
    for sql in (
        "UPDATE tasks SET last_seq = last_seq + 1 WHERE key = 1",
        "DELETE FROM zz_stream_rows WHERE seq = 5",
        "UPDATE scripts SET text = NULL",
    ):
        record = Recorder(copy)
        record.connection.execute("BEGIN")
        record.connection.execute(sql)
        record.connection.execute("COMMIT")
        record.close()
        assert contents(copy) != expected
        copy = there_and_back(source, tmp_path)


TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=20)
MAYBE_TEXT = st.none() | TEXT
SECONDS = st.none() | st.floats(0, 1e6)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-10**9, 10**9) | TEXT,
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5)
TIMES = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1)).map(
    lambda time: time.replace(tzinfo=timezone.utc)
)
STREAMS = st.tuples(
    st.sampled_from(sorted(StreamType)),
    TEXT,
    st.booleans(),
    st.none() | st.integers(1, 10**6),
    st.none() | st.floats(0, 100),
)
TASKS = st.fixed_dictionaries(
    {
        "name": TEXT,
        "status": st.sampled_from([*map(str, TaskStatus)]),
        "created": TIMES,
        "took": SECONDS,
        "metadata": st.dictionaries(TEXT, JSON, max_size=3),
        "timeout_sec": SECONDS,
        "last_progress_pct": st.none() | st.floats(0, 100),
        "last_progress_msg": MAYBE_TEXT,
        "script": st.none() | st.integers(0, 3),
        "arg_json": st.none() | JSON.map(json.dumps),
        "failure_type": MAYBE_TEXT,
        "failure_message": MAYBE_TEXT,
        "invocation_info": MAYBE_TEXT,
        "streams": st.lists(STREAMS, max_size=6),
        "run": st.integers(0, 2),
    }
)
LOSSES = st.lists(
    st.tuples(st.integers(1, 10**6), TEXT, TEXT, TIMES), max_size=3, unique_by=lambda loss: loss[3]
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tasks=st.lists(TASKS, max_size=5, unique_by=lambda task: task["created"]), losses=LOSSES)
def test_any_history_comes_back_equal(
    tmp_path: Path, tasks: list[dict[str, Any]], losses: list[Any]
) -> None:
    source = tmp_path / "source.db"
    for path in tmp_path.glob("source.db*"):
        path.unlink()
    record = Recorder(source)
    runs = [
        record.run(new_id(number), ended=record.now if number == 2 else None) for number in range(3)
    ]
    for number in sorted({task["script"] for task in tasks} - {None}):
        record.insert("scripts", hash=str(number) * 64, script_id=f"mod:f{number}",
                      text="def f(): ...\n" if number % 2 else None)
    for task in tasks:
        streams, script, run = task["streams"], task["script"], runs[task["run"]]
        fields = {
            key: value for key, value in task.items() if key not in ("streams", "script", "run")
        }
        if script is not None:
            fields.update(script_hash=str(script) * 64, script_id=f"mod:f{script}")
        if fields["last_progress_pct"] is not None:
            fields["last_progress_msg"] = fields["last_progress_msg"] or ""
        for stream, payload, _, _, percent in streams:
            if stream == "progress":
                # as whoever records does
                fields.update(last_progress_pct=percent, last_progress_msg=payload)
        task_id = record.task(**fields, run_id=run, last_seq=4 + len(streams))
        for stream, payload, is_json, original, percent in streams:
            is_progress = stream == "progress"
            is_json = is_json and not is_progress
            record.said(
                task_id,
                json.dumps(payload) if is_json else payload,
                str(stream),
                is_json=is_json,
                original_bytes=None if is_progress else original,
                percent=percent if is_progress else None,
            )
    for count, sink, reason, at in losses:
        record.lost(count, sink=sink, reason=reason, at=at)
    record.close()
    assert contents(there_and_back(source, tmp_path)) == contents(source)


def test_the_lines_are_wire_lines_with_the_end_of_a_task_last(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        record.many_said(record.task(name, last_seq=1504), 1500)
    record.lost(3)
    assert main(["export", "--jsonl"]) == 0
    out, err = capfd.readouterr()
    events: list[Any] = [decode(line) for line in out.splitlines()]
    assert err == "" and len(events) == 2 * 1501 + 1
    for start in (0, 1501):
        assert [event.seq for event in events[start : start + 1501]] == list(range(4, 1505))[
            :1500
        ] + [1504]
        assert [isinstance(event, LifecycleEvent) for event in events[start : start + 1501]] == [
            False
        ] * 1500 + [True]
    assert events[-1].type == "EventsLost"


def test_an_interrupted_task_stays_so_in_the_copy(record: Recorder, tmp_path: Path) -> None:
    record.task("job", "running", run_id=record.run(ended=record.now))
    with History(there_and_back("bgworker.db", tmp_path)) as history:
        assert [task.status for task in history.tasks()] == ["interrupted"]
        assert history.tasks() == history.tasks(status="interrupted")


def test_a_file_is_replaced_whole_or_not_at_all(record: Recorder, tmp_path: Path,
                                                capfd: pytest.CaptureFixture[str]) -> None:
    record.task("job")
    (tmp_path / "out.jsonl").write_text("old")
    assert main(["export", "--jsonl", "out.jsonl"]) == 0
    assert capfd.readouterr() == ("", "bgworker export: 1 events written to out.jsonl\n")
    before = (tmp_path / "out.jsonl").read_text()
    assert decode(before).type == "TaskCompleted"  # type: ignore[union-attr]
    record.many_said(record.task("chatty"), 20_000)
    record.close()
    with open("bgworker.db", "r+b") as file:
        file.seek(os.path.getsize("bgworker.db") // 2)
        file.write(b"\xa5" * 40_000)
    assert main(["export", "--jsonl", "out.jsonl"]) == 2
    assert "is damaged" in capfd.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == before and not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(os.name == "nt", reason="links and permissions of POSIX")
def test_only_the_file_that_was_named_is_replaced(record: Recorder, tmp_path: Path) -> None:
    record.task("job")
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    for name in ("real.tmp", "link.tmp"):
        (tmp_path / name).write_text("mine")
    before = sorted(os.listdir(tmp_path))
    assert main(["export", "--jsonl", "link"]) == 0
    assert (tmp_path / "link").is_symlink() and decode((tmp_path / "real").read_text())
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    assert [(tmp_path / name).read_text() for name in ("real.tmp", "link.tmp")] == ["mine", "mine"]
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / "plain").touch()
    assert main(["export", "--jsonl", "new"]) == 0
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(os.name == "nt", reason="links and FIFOs of POSIX")
def test_a_device_or_fifo_is_written_to_and_stays_one(record: Recorder, tmp_path: Path) -> None:
    record.task("job")
    os.mkfifo("fifo")
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert main(["export", "--jsonl", "fifo"]) == 0
    event = decode(os.read(reader, 1 << 16).decode())
    assert event is not None and event.type == "TaskCompleted"
    os.close(reader)
    assert stat.S_ISFIFO(os.stat("fifo").st_mode)


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_the_history_itself_is_never_replaced(record: Recorder, tmp_path: Path,
                                              capfd: pytest.CaptureFixture[str]) -> None:
    record.task("job")
    os.symlink("bgworker.db", "soft")
    os.link("bgworker.db", "hard")
    before = sorted(os.listdir(tmp_path))
    for name in ("bgworker.db", "soft", "hard"):
        assert main(["export", "--jsonl", name]) == 2
        assert capfd.readouterr() == (
            "",
            f"bgworker export: error: argument --jsonl: '{name}' is the history itself; name "
            "another file\n",
        )
    assert sorted(os.listdir(tmp_path)) == before
    with History("bgworker.db") as history:
        assert [task.name for task in history.tasks()] == ["job"]


@pytest.mark.parametrize("words, message", [
    ([], "--jsonl"), (["--jsonl", "missing/x"], "cannot write 'missing/x': No such file"),
    (["--jsonl", "."], "cannot write '.': "),
    (["--jsonl", "a\0b"], "expected the path of a file")])
def test_a_wrong_command_line_is_code_2(
    record: Recorder, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    record.task("job")
    assert main(["export", *words]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_a_full_disk_is_told_of(record: Recorder, tmp_path: Path) -> None:
    record.task("job")
    with open("/dev/full", "w") as full:
        done = run_cli("export", "--jsonl", cwd=tmp_path, stdout=full)
    assert done.returncode == 1
    assert (
        done.stderr == "bgworker export: error: cannot write the output: No space left on device\n"
    )


def test_a_run_is_exported_alone_without_losses(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        run = record.run(new_id(number), ended=record.now)
        record.said(record.task(f"job {number}", run_id=run), f"line {number}")
    record.lost(2)
    assert main(["export", "--run", "last~1", "--jsonl"]) == 0
    said, ended = map(decode, capfd.readouterr().out.splitlines())
    assert isinstance(said, StreamEvent) and said.payload == "line 1"
    assert isinstance(ended, LifecycleEvent) and ended.task.name == "job 1"
    assert main(["export", "--run", "last", "--jsonl", "run.jsonl"]) == 0
    assert "2 events written" in capfd.readouterr().err

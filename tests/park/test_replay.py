"""Replay: what was parked arrives after all, once, and nothing leaves the file before it has
arrived."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bgworker import PermanentSinkError, Scheduler, SinkError, TemporarySinkError, current_task
from bgworker.park.replay import MOST_BYTES, replay
from bgworker.model.events import Event, StreamEvent
from bgworker.model.wire import decode
from tests.support import ROOT


class Store:
    """Keeps events by (task_id, seq), as a database would; ``refuses`` and ``fails`` tell what it
    does not take."""

    def __init__(self, refuses: str = "", fails_after: int | None = None) -> None:
        self.rows: dict[tuple[str, int], Event] = {}
        self.writes = 0
        self.is_closed = False
        self._refuses = refuses
        self._fails_after = fails_after

    def write(self, events: Sequence[Event]) -> None:
        self.writes += 1
        if self._fails_after is not None and self.writes > self._fails_after:
            raise TemporarySinkError("away")
        if self._refuses and any(getattr(each, "payload", "") == self._refuses for each in events):
            raise PermanentSinkError(f"no {self._refuses}")
        for each in events:
            assert not isinstance(each, type(None))
            self.rows[each.task_id, each.seq] = each  # type: ignore[union-attr]

    def close(self) -> None:
        self.is_closed = True

    def payloads(self) -> list[str]:
        return [each.payload for each in self.rows.values() if isinstance(each, StreamEvent)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_park_file_holds_the_events_with_what_kept_them_out(parked: Path) -> None:
    for line in lines(parked):
        assert list(line) == ["v", "sink", "error", "attempts", "parked_at", "event"]
        assert (line["v"], line["sink"]) == (1, "dead")
        assert "nobody there" in line["error"] and line["attempts"] >= 1
        decode(json.dumps(line["event"]))
    assert [line["event"]["seq"] for line in lines(parked)] == list(range(1, 25))


def test_replay_delivers_everything_and_a_second_one_changes_nothing(parked: Path) -> None:
    store = Store()
    report = replay(parked, store, batch_size=5)
    assert (report.delivered, report.refused, report.skipped) == (24, 0, 0)
    assert store.payloads() == [f"line {number}" for number in range(20)] and store.is_closed
    assert not parked.exists()
    before = dict(store.rows)
    with pytest.raises(FileNotFoundError):
        replay(parked, store)
    assert store.rows == before
    assert not [name for name in os.listdir(parked.parent) if not name.endswith(".lock")]


def test_a_sink_that_fails_half_way_leaves_the_rest_in_the_file_for_the_next_replay(
    parked: Path,
) -> None:
    store = Store(fails_after=2)
    with pytest.raises(SinkError, match="away"):
        replay(parked, store, batch_size=5)
    assert len(store.rows) == 10 and [line["event"]["seq"] for line in lines(parked)] == list(
        range(11, 25)
    )
    rest = Store()
    assert (
        replay(parked, rest, batch_size=5).delivered == 14
    ), "what was delivered is not delivered again"
    assert not parked.exists()
    assert sorted(seq for _, seq in {**store.rows, **rest.rows}) == list(range(1, 25))


def test_events_that_the_sink_refuses_stay_in_the_file_and_their_neighbours_arrive(
    parked: Path,
) -> None:
    report = replay(parked, Store(refuses="line 7"))
    assert (report.delivered, report.refused) == (23, 1)
    assert report.problems == ("refused: no line 7",)
    assert [line["event"]["payload"] for line in lines(parked)] == ["line 7"]
    assert replay(parked, Store()).delivered == 1
    assert not parked.exists()


@pytest.mark.parametrize("concerns", ["batch", "sink"])
def test_a_sink_that_refuses_whatever_comes_ends_the_replay_and_leaves_everything_in_the_file(
    parked: Path, concerns: Any
) -> None:
    class Refusing(Store):
        def write(self, events: Sequence[Event]) -> None:
            self.writes += 1
            raise PermanentSinkError("no such place", concerns=concerns)

    store, before = Refusing(), parked.read_bytes()
    with pytest.raises(SinkError, match="no such place"):
        replay(parked, store)
    assert (store.writes, store.is_closed, parked.read_bytes()) == (1, True, before)
    assert replay(parked, Store()).delivered == 24


def test_a_line_that_cannot_be_read_is_skipped_told_and_kept(parked: Path) -> None:
    with parked.open("ab") as file:
        file.write(b'{"v":1,"sink":"x","event":{"v":99,"type":"TaskOutput"}}\nnot json\n')
    report = replay(parked, Store())
    assert (report.delivered, report.skipped) == (24, 2)
    assert "version" in report.problems[0] and "99" in report.problems[0]
    assert len(parked.read_bytes().splitlines()) == 2


def test_an_async_sink_is_awaited_on_one_loop(parked: Path) -> None:
    import asyncio

    class Async(Store):
        async def write(self, events: Sequence[Event]) -> None:  # type: ignore[override]
            self.loops = {*getattr(self, "loops", ()), id(asyncio.get_running_loop())}
            await asyncio.sleep(0)
            super().write(events)

    store = Async()
    assert replay(parked, store, batch_size=5).delivered == 24
    assert len(store.rows) == 24 and len(store.loops) == 1


def test_a_torn_last_line_is_no_error_and_stays_for_its_writer(parked: Path) -> None:
    whole = parked.read_bytes()
    parked.write_bytes(whole + whole[:40])
    report = replay(parked, Store())
    assert (report.delivered, report.skipped) == (24, 0)
    assert parked.read_bytes() == whole[:40]


def test_what_is_parked_during_a_replay_stays_for_the_next(parked: Path) -> None:
    line = parked.read_bytes().splitlines(keepends=True)[0]

    class Parks(Store):
        def close(self) -> None:
            with parked.open("ab") as file:
                file.write(line)

    assert replay(parked, Parks()).delivered == 24
    assert parked.read_bytes() == line


def test_no_note_beside_the_file_is_believed(parked: Path) -> None:
    status = parked.stat()
    Path(f"{parked}.replay").write_text(
        json.dumps({"identity": [status.st_dev, status.st_ino], "done": status.st_size, "kept": []})
    )
    assert replay(parked, Store()).delivered == 24


def test_a_sink_that_cannot_be_closed_has_nothing_removed(parked: Path) -> None:
    class Unclosable(Store):
        def close(self) -> None:
            raise SinkError("what it had in hand is gone")

    with pytest.raises(SinkError, match="in hand"):
        replay(parked, Unclosable())
    assert len(lines(parked)) == 24


@pytest.mark.parametrize(
    "content",
    [
        b"a settings file\nof two lines\n",
        b'{"settings": true}\n{"more": 1}\n',
        b"\x7fELF\0\n\xff\n",
        b'{"event": "login", "user": "me"}\n{"event": {"name": "x"}}\n',
        b"\n\n",
        b"[1]\n",
    ],
    ids=repr,
)
def test_a_file_that_is_no_park_file_is_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    before = path.stat()
    report = replay(path, Store())
    assert (report.delivered, report.skipped) == (0, len(content.splitlines()))
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["file"]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_of_a_mixed_file_only_what_a_park_wrote_is_removed(parked: Path, tmp_path: Path) -> None:
    (wire,) = [
        json.dumps(line["event"]) + "\n" for line in lines(parked) if line["event"]["seq"] == 3
    ]
    first, *others = parked.read_text().splitlines(keepends=True)
    parked.write_text("".join(["rubbish\n", first, wire, *others, "{}\n"]))
    assert replay(parked, Store(), batch_size=4).delivered == 25
    assert parked.read_text() == f"rubbish\n{wire}{{}}\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps neither")
def test_what_is_left_keeps_the_mode_and_the_owner_of_the_file(parked: Path) -> None:
    with parked.open("ab") as file:
        file.write(b"rubbish\n")
    parked.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(parked, 65534, 65534)
    before = parked.stat()
    replay(parked, Store())
    after = parked.stat()
    assert parked.read_bytes() == b"rubbish\n"
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )


def test_a_line_that_is_too_long_is_skipped_kept_and_never_in_memory(parked: Path) -> None:
    import tracemalloc

    with parked.open("ab") as file:
        for _ in range(20):
            file.write(b"x" * MOST_BYTES)
        file.write(b"\n{}\n")
    size = parked.stat().st_size
    tracemalloc.start()
    try:
        report = replay(parked, Store())
        assert tracemalloc.get_traced_memory()[1] < 5 * MOST_BYTES
    finally:
        tracemalloc.stop()
    assert (report.delivered, report.skipped) == (
        24,
        2,
    ) and f"has more than {MOST_BYTES} bytes" in report.problems[0]
    assert 20 * MOST_BYTES < parked.stat().st_size < size


@pytest.mark.skipif(
    not os.path.exists("/proc/self/io"), reason="needs the kernel's account of writes"
)
def test_lines_that_cannot_be_read_are_written_once_not_once_a_batch(parked: Path) -> None:
    def written() -> int:
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])

    with parked.open("ab") as file:
        file.write(b"bad\n[]\n" * 25_000)
    before = written()
    assert replay(parked, Store()).skipped == 50_000
    assert written() - before < 2 * parked.stat().st_size


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a FIFO")
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(FileExistsError, match="where there should be a regular file"):
            replay(path, Store())


def test_a_file_that_was_replaced_meanwhile_is_left_alone(parked: Path) -> None:
    class Replaces(Store):
        def close(self) -> None:
            os.replace(other, parked)

    other = parked.with_name("other")
    other.write_bytes(parked.read_bytes()[:500])
    assert replay(parked, Replaces()).delivered == 24
    assert parked.stat().st_size == 500


def test_a_file_of_plain_wire_lines_is_read_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Scheduler(1, sinks=[f"jsonl:{path}"]) as pool:
        pool.submit(lambda: current_task().output("hello")).result(10)
    before = path.read_bytes()
    store = Store()
    assert replay(path, store).delivered == 5
    assert store.payloads() == ["hello"] and path.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_replay_loses_nothing(parked: Path, tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, signal, sys
        from bgworker.park.replay import MOST_BYTES, replay
        class Store:
            def write(self, events):
                with open(sys.argv[2], "a") as file:
                    file.writelines(f"{event.seq}\\n" for event in events)
                self.left = getattr(self, "left", int(sys.argv[3])) - 1
                if not self.left:
                    os.kill(os.getpid(), signal.SIGKILL)
            def close(self): pass
        replay(sys.argv[1], Store(), batch_size=3)
    """)
    got = tmp_path / "got"
    for kill_at in (1, 2, 3):
        done = subprocess.run(
            [sys.executable, "-c", script, str(parked), str(got), str(kill_at)],
            timeout=60,
            cwd=ROOT,
        )
        assert done.returncode == -signal.SIGKILL
        assert len(lines(parked)) == 24
    done = subprocess.run([sys.executable, "-c", script, str(parked), str(got), "0"], timeout=60,
                          cwd=ROOT)
    assert done.returncode == 0 and not parked.exists()
    seqs = [int(line) for line in got.read_text().split()]
    assert sorted(set(seqs)) == list(range(1, 25))
    assert (
        len(seqs) == 24 + (1 + 2 + 3) * 3
    ), "what a killed replay had delivered was delivered again"

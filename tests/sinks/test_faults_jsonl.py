"""The JSONL sink when things break: killed processes, full disks, torn lines, many writers at once.

Each fault has a twin: the same harness over a sink that lacks the very part under test must
complain.
"""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from bgworker.model import wire
from bgworker.model.errors import TemporarySinkError, WireError
from bgworker.model.events import Event, EventType, StreamEvent, StreamType
from bgworker.sinks import linefile, lockfile, opening

from bgworker.sinks.lockfile import LockFile
from bgworker.sinks.jsonl import JsonlSink
from tests.support import ROOT, SOON, exit_code, forked, needs_fork

NOW = datetime(2026, 11, 23, 14, 46, tzinfo=timezone.utc)
def events(*numbers: int) -> Sequence[Event]:
    return [
        StreamEvent(EventType.TASK_OUTPUT, f"{0:032}", n, NOW, StreamType.OUTPUT, "x" * 20)
        for n in numbers
    ]


SIZE = len(wire.encode_lines(events(100)))


def numbers_in(path: str | Path) -> list[int]:
    """Return the numbers of the events in a file, all lines of which must parse."""
    data = Path(path).read_bytes()
    if str(path).endswith(".gz"):
        data = gzip.decompress(data)
    assert data == b"" or data.endswith(b"\n"), f"torn: {data[-40:]!r}"
    try:
        return [wire.decode(line).seq for line in data.decode().splitlines()]  # type: ignore
    except WireError as error:
        raise AssertionError(str(error)) from error


def numbers_in_all(path: str) -> list[int]:
    """Return the numbers in the rotated files, oldest first, and in the file itself."""
    top = os.path.dirname(path)
    found = {int(match[1]): name for name in os.listdir(top)
             if (match := re.fullmatch(r"f\.jsonl\.(\d+)(\.gz)?", name))}
    names = [found[number] for number in sorted(found, reverse=True)]
    return [number for name in [*names, "f.jsonl"] if os.path.exists(os.path.join(top, name))
            for number in numbers_in(os.path.join(top, name))]


class CarelessFile(linefile.LineFile):
    """The twin that neither takes back nor mends."""

    def _take_back(self, start: int, written: int) -> None:
        self._end = -1

    def _mend(self, size: int) -> int:
        return size


def sink_over(file: linefile.LineFile) -> JsonlSink:
    """Return a sink that appends to another kind of file."""
    sink = JsonlSink(file.path)
    sink._file = file
    return sink


def careless(path: Any, **config: Any) -> JsonlSink:
    return sink_over(CarelessFile(path, **config))


def careless_rotate(path: str, backups: int, *, compress: bool) -> None:
    """The twin that copies and truncates instead of renaming, which doubles lines when killed
    between."""
    for number in range(backups, 1, -1):
        if os.path.exists(f"{path}.{number - 1}"):
            os.replace(f"{path}.{number - 1}", f"{path}.{number}")
    Path(f"{path}.1").write_bytes(Path(path).read_bytes())
    os.unlink(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "f.jsonl")


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def spawn(script: str, *arguments: object) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *map(str, arguments)],
                cwd=ROOT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        return started[-1]

    yield spawn
    for process in started:
        process.kill()
        process.communicate(timeout=60)


# -- kill -9 before every system call that changes a file --

def die_at(point: int) -> None:
    """Have this process killed in place of its ``point``-th call into the system from now on."""
    calls = itertools.count(1)

    def armed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapper

    for name in (
        "open",
        "write",
        "rename",
        "replace",
        "unlink",
        "ftruncate",
        "fsync",
        "utime",
        "close",
    ):
        setattr(os, name, armed(getattr(os, name)))


def chop(write: Callable[..., int]) -> Callable[..., int]:
    """Make every write a short one, of at most a line and a half."""
    return lambda fd, data: write(fd, bytes(data[:SIZE * 3 // 2]))


def write_until_killed(sink: JsonlSink, point: int) -> None:
    acknowledged = os.open(f"{os.path.dirname(sink.path)}/acknowledged", os.O_WRONLY | os.O_CREAT)
    acknowledge = os.write
    os.write = chop(os.write)
    die_at(point)
    sink.open()
    for number in range(100, 112, 3):
        sink.write(events(number, number + 1, number + 2))
        acknowledge(acknowledged, b"%d " % (number + 2))


SETTINGS: dict[str, dict[str, Any]] = {
    "no rotation": {},
    "rotation": {"max_bytes": 4 * SIZE, "backups": 9},
    "rotation with the oldest removed": {"max_bytes": 4 * SIZE, "backups": 2},
    "rotation without backups": {"max_bytes": 4 * SIZE, "backups": 0},
    "compression": {"max_bytes": 4 * SIZE, "backups": 9, "compress": True},
    "compression with the oldest removed, safe from power failures":
        {"max_bytes": 4 * SIZE, "backups": 2, "compress": True, "durability": "power"},
}

def check_after_kill(sink: JsonlSink, keeps_all: bool) -> None:
    """Go on with the file as the next process would; nothing acknowledged may be missing, nothing
    doubled or torn."""
    here = os.path.dirname(sink.path)
    acknowledged = [int(word) for word in Path(here, "acknowledged").read_text().split()]
    sink.write(events(901, 902))
    sink.write(events(903, 904))
    sink.close()
    found = numbers_in_all(sink.path)
    assert found[-2:] == [903, 904]
    before = [number for number in found if number < 900]
    if before:
        assert before == list(
            range(before[0], before[-1] + 1)
        ), "a line is doubled, missing or out of order"
    if keeps_all:
        last = max(acknowledged, default=99)
        assert found[-4:] == [901, 902, 903, 904]
        assert (
            before[:1] in ([], [100]) and max(before, default=99) >= last
        ), "an acknowledged line is missing"
    names = os.listdir(here)
    assert not [
        name for name in names if name.endswith(".tmp") or f"{name}.gz" in names
    ], "half-done work is left"


def kill_everywhere(top: Path, make: Callable[..., JsonlSink], **config: Any) -> int:
    """Run the sink once for each place where it can be killed, up to the run that no kill ends;
    check each."""
    for point in itertools.count(1):
        (top / str(point)).mkdir()
        sink = make(top / str(point) / "f.jsonl", **config)
        status = exit_code(forked(lambda: write_until_killed(sink, point)))
        assert status in (0, -signal.SIGKILL)
        check_after_kill(sink, config.get("backups", 9) == 9)
        if status == 0:
            return point
    raise AssertionError


@needs_fork
@pytest.mark.parametrize("name", list(SETTINGS))
def test_wherever_the_process_is_killed_no_line_is_lost_doubled_or_torn(
    tmp_path: Path, name: str
) -> None:
    assert kill_everywhere(tmp_path, JsonlSink, **SETTINGS[name]) > 15


@needs_fork
def test_the_kill_harness_notices_a_sink_that_does_not_repair(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="is not JSON"):
        kill_everywhere(tmp_path, careless)


@needs_fork
def test_the_kill_harness_notices_a_rotation_that_is_not_atomic(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linefile, "rotate", careless_rotate)
    with pytest.raises(AssertionError, match="doubled"):
        kill_everywhere(tmp_path, JsonlSink, **SETTINGS["rotation"])


# -- a write that fails --

def write_past_a_limit(sink: JsonlSink) -> list[list[Any]]:
    """Write twice against a limit that cuts the second of three lines, then without; return the
    errors and sizes."""
    import resource

    def run() -> None:
        caught = []
        sink.write(events(101, 102))
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
        for _ in range(2):
            try:
                sink.write(events(103, 104, 105))
            except TemporarySinkError as error:
                assert isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EFBIG
                caught.append([str(error), os.path.getsize(sink.path)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sink.write(events(103, 104, 105))
        Path(f"{sink.path}.caught").write_text(json.dumps(caught))

    assert exit_code(forked(run)) == 0
    return json.loads(Path(f"{sink.path}.caught").read_text())  # type: ignore[no-any-return]


LIMIT = 3 * SIZE + SIZE // 2


@needs_fork
def test_a_batch_that_hits_the_file_size_limit_is_taken_back_and_written_once_by_the_retry(
    path: str,
) -> None:
    message = (
        f"cannot append to {path!r}: File too large; "
        "raise the limit for file sizes, or set max_bytes below it"
    )
    assert write_past_a_limit(JsonlSink(path)) == [[message, 2 * SIZE]] * 2
    assert numbers_in(path) == [101, 102, 103, 104, 105]
    assert not os.path.exists(f"{path}.torn")


@needs_fork
def test_the_limit_harness_notices_a_sink_that_leaves_what_it_wrote(path: str) -> None:
    assert [size for _, size in write_past_a_limit(careless(path))] == [LIMIT, LIMIT]
    with pytest.raises(AssertionError, match="is not JSON"):
        numbers_in(path)


class FailingFile(linefile.LineFile):
    """As on a disk that fails for a while altogether."""

    def _take_back(self, start: int, written: int) -> None:
        self._end = -1


@needs_fork
def test_what_could_not_be_taken_back_is_mended_before_the_next_write(path: str) -> None:
    assert [size for _, size in write_past_a_limit(sink_over(FailingFile(path)))] == [LIMIT, LIMIT]
    assert numbers_in(path) == [
        101,
        102,
        103,
        103,
        104,
        105,
    ], "the line that was whole stays, and came again"
    assert len(Path(f"{path}.torn").read_bytes().splitlines()) == 2


@needs_fork
def test_a_failed_write_leaves_alone_what_a_stranger_has_appended_behind_it(
        path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = JsonlSink(path)
    sink.write(events(101))
    stranger, write = wire.encode_lines(events(999)), os.write

    def write_with_company(fd: int, data: Any) -> int:
        monkeypatch.setattr(os, "write", write)
        write(fd, data)
        with open(path, "ab") as other:
            other.write(stranger)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", write_with_company)
    with pytest.raises(TemporarySinkError, match="Input/output error"):
        sink.write(events(102))
    sink.write(events(102))
    sink.close()
    assert numbers_in(path) == [101, 102, 999, 102]


@needs_fork
def test_a_batch_that_could_not_be_synced_is_taken_back(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = JsonlSink(path, durability="power")
    sink.write(events(101))

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(linefile, "sync", refuse)
        with pytest.raises(TemporarySinkError, match="Input/output error"):
            sink.write(events(102))
    assert numbers_in(path) == [101]
    sink.write(events(102))
    sink.close()
    assert numbers_in(path) == [101, 102]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_device_is_a_temporary_error_naming_it() -> None:
    sink = JsonlSink("/dev/full")
    sink.open()
    with pytest.raises(
        TemporarySinkError, match="append to '/dev/full': No space left on device; make room"
    ) as caught:
        sink.write(events(1))
    assert (
        isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    )
    sink.close()
    # the twin: the same harness with a device that takes it
    JsonlSink("/dev/null").write(events(1))


@needs_fork
@pytest.mark.parametrize("deletes_lock", [True, False])
def test_while_the_directory_is_gone_the_error_is_temporary(
    tmp_path: Path, deletes_lock: bool
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    sink = JsonlSink(home / "f.jsonl")
    sink.write(events(1))
    home.rename(away)
    if deletes_lock:
        (away / "f.jsonl.lock").unlink()
    for _ in range(2):
        with pytest.raises(TemporarySinkError, match="No such file.*; create its directory again"):
            sink.write(events(2))
    home.mkdir()
    sink.write(events(2))
    sink.close()
    assert (numbers_in(away / "f.jsonl"), numbers_in(home / "f.jsonl")) == ([1], [2])


@needs_fork
def test_a_failed_compression_is_raised_once_and_made_up_for_later(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = JsonlSink(path, max_bytes=SIZE, compress=True)
    sink.write(events(101))

    def refuse(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(opening, "sync", refuse)
        with pytest.raises(TemporarySinkError, match="No space left"):
            sink.write(events(102))
        sink.write(events(102))
    assert sorted(os.listdir(os.path.dirname(path))) == ["f.jsonl", "f.jsonl.1", "f.jsonl.lock"]
    sink.write(events(103))
    sink.close()
    assert sorted(os.listdir(os.path.dirname(path))) == [
        "f.jsonl",
        "f.jsonl.1.gz",
        "f.jsonl.2.gz",
        "f.jsonl.lock",
    ]
    assert numbers_in_all(path) == [101, 102, 103]


# -- torn lines --


def tear_and_go_on(sink: JsonlSink, cut: int, old: bytes = b"") -> None:
    data = wire.encode_lines(events(101, 102, 103))[:cut]
    Path(sink.path).write_bytes(data)
    torn = Path(f"{sink.path}.torn")
    torn.write_bytes(old)
    whole = data[:data.rfind(b"\n") + 1]
    sink.open()
    assert Path(sink.path).read_bytes() == whole
    assert torn.read_bytes() == old + (data[len(whole):] + b"\n" if len(data) > len(whole) else b"")
    sink.write(events(104))
    sink.close()
    assert numbers_in(sink.path) == [101, 102, 103][:cut // SIZE] + [104]


@given(cut=st.integers(0, 3 * SIZE), old=st.sampled_from([b"", b"{older\n"]))
def test_a_torn_last_line_is_set_aside_wherever_it_was_torn(
        tmp_path_factory: pytest.TempPathFactory, cut: int, old: bytes) -> None:
    tear_and_go_on(JsonlSink(tmp_path_factory.getbasetemp() / "torn.jsonl"), cut, old)


def test_the_torn_line_harness_notices_a_sink_that_does_not_repair(path: str) -> None:
    with pytest.raises(AssertionError):
        tear_and_go_on(careless(path), SIZE + 5)


@pytest.mark.parametrize(
    ("torn", "whole"),
    [
        (b"{" + b"x" * 300_000, ()),
        (b"{" + b"x" * 300_000, (101,)),
        (b"{", ()),
        (b"\0" * 70_000, ()),
        (b"\0" * 70_000, (101,)),
        (b"\r", ()),
        (b"\r", (101,)),
        (b"\xff", (101,)),
        (b"SQLite format 3\0", (101,)),
    ],
)
def test_a_torn_line_may_be_long_and_hold_anything(
    path: str, torn: bytes, whole: tuple[int, ...]
) -> None:
    Path(path).write_bytes(wire.encode_lines(events(*whole)) + torn)
    sink = JsonlSink(path)
    sink.write(events(102))
    sink.close()
    assert numbers_in(path) == [*whole, 102]
    assert Path(f"{path}.torn").read_bytes() == torn + b"\n"


@needs_fork
def test_what_another_process_tore_while_the_file_was_open_is_set_aside_too(path: str) -> None:
    for make in (JsonlSink, careless):
        Path(path).unlink(missing_ok=True)
        sink = make(path)
        sink.write(events(101))
        with open(path, "ab") as other:
            other.write(b'{"v":1,"ty')
        sink.write(events(102))
        sink.close()
        if make is JsonlSink:
            assert numbers_in(path) == [101, 102]
        else:
            with pytest.raises(AssertionError):
                numbers_in(path)


# -- what a killed rotation left --


def test_what_a_killed_compression_left_is_tidied_up_by_the_next_open(path: str) -> None:
    lines = wire.encode_lines(events(101))
    Path(f"{path}.2").write_bytes(lines)
    Path(f"{path}.2.gz").write_bytes(gzip.compress(lines))
    Path(f"{path}.gz.tmp").write_bytes(b"half")
    sink = JsonlSink(path)
    sink.open()
    sink.close()
    assert sorted(os.listdir(os.path.dirname(path))) == ["f.jsonl", "f.jsonl.2.gz", "f.jsonl.lock"]


# -- several processes --

def run_crowd(path: str) -> None:
    """Let four processes write in short pieces and rotate at once; all lines must be there, each
    process's in order."""
    gate, opener = os.pipe()

    def run(first: int) -> None:
        os.close(opener)
        os.write = chop(os.write)
        sink = JsonlSink(path, max_bytes=40 * SIZE, backups=1000)
        sink.open()
        os.read(gate, 1)
        for number in range(first, first + 200, 5):
            sink.write(events(*range(number, number + 5)))

    crowd = [forked(lambda: run(1000 * n)) for n in range(1, 5)]
    os.close(gate)
    os.close(opener)
    assert [exit_code(pid) for pid in crowd] == [0] * 4
    found = numbers_in_all(path)
    assert len(found) == 800
    for n in range(1, 5):
        assert [number for number in found if number // 1000 == n] == list(
            range(1000 * n, 1000 * n + 200)
        )


@needs_fork
def test_four_processes_append_and_rotate_at_once_and_nothing_is_lost(path: str) -> None:
    run_crowd(path)
    assert os.path.exists(f"{path}.19") and not os.path.exists(f"{path}.torn")


@needs_fork
def test_the_crowd_harness_notices_a_missing_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LockFile, "__enter__", lambda self: None)
    monkeypatch.setattr(LockFile, "__exit__", lambda self, *args: None)
    with pytest.raises(AssertionError):
        for attempt in range(20):  # chance decides, though the first nearly always does
            (tmp_path / str(attempt)).mkdir()
            run_crowd(str(tmp_path / str(attempt) / "f.jsonl"))


HOLDER = """
import fcntl, os, sys
from bgworker.sinks.lockfile import LockFile
if sys.argv[2] == "LockFile":
    LockFile.share(sys.argv[1]).__enter__()
else:
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
if os.fork() == 0:
    print("held", flush=True)
    sys.stdin.readline()
    os._exit(0)
os.wait()
"""


def try_lock(lock: str, kind: str) -> bool:
    """Ask without waiting, in a process of its own; True when the lock was free."""
    call = "lockf" if kind == "LockFile" else "flock"
    script = (
        f"import fcntl, sys; fcntl.{call}(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    )
    return (
        subprocess.run(
            [sys.executable, "-c", script, lock], stderr=subprocess.DEVNULL, timeout=60
        ).returncode
        == 0
    )


@needs_fork
@pytest.mark.parametrize(("kind", "freed"), [("LockFile", True), ("flock", False)])
def test_the_lock_is_freed_by_kill_though_a_forked_child_lives_on(
        path: str, kind: str, freed: bool, spawn: Callable[..., subprocess.Popen[str]]) -> None:
    holder = spawn(HOLDER, path, kind)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert not try_lock(path, kind)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(60)
    assert try_lock(path, kind) is freed


@needs_fork
def test_two_processes_that_share_two_files_in_either_order_are_not_taken_for_a_deadlock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = LockFile.share(str(tmp_path / "one")), LockFile.share(str(tmp_path / "two"))
    gate, opener = os.pipe()
    asked, asks = os.pipe()

    def wait(seconds: float) -> None:
        os.write(asks, b"!")
        time.sleep(seconds)

    def hold_two_while_a_thread_waits_for_one() -> None:
        def wait_for_one() -> None:
            waits.set()
            with one:
                return

        waits, thread = threading.Event(), threading.Thread(target=wait_for_one)
        with two:
            thread.start()
            assert waits.wait(10)
            os.write(opener, b"!")
            # the other process waits, too: whoever takes the threads of a process for one sees a
            # circle now
            assert select.select([asked], [], [], SOON)[0], "nobody waits for the second file"
        thread.join(30)
        assert not thread.is_alive()

    with one:
        pid = forked(hold_two_while_a_thread_waits_for_one)
        os.read(gate, 1)
        monkeypatch.setattr(lockfile, "sleep", wait)
        with two:
            pass
    assert exit_code(pid) == 0
    for lock in (one, two):
        lock.leave()
    for fd in (gate, opener, asked, asks):
        os.close(fd)


@needs_fork
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_lock_that_somebody_never_gives_back_is_an_error_that_names_it_and_not_a_hang(
    path: str, spawn: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch,
    is_frozen: bool,
) -> None:
    if is_frozen:  # by a tool that replaces the clock wherever a module holds it
        for name, value in list(vars(lockfile).items()):
            if value is time.monotonic:
                monkeypatch.setattr(lockfile, name, lambda: 1000.0)
    Path(f"{path}.lock").touch()
    holder = spawn(
        "import fcntl, sys; file = open(sys.argv[1], 'rb'); fcntl.lockf(file, fcntl.LOCK_SH)\n"
        # to read it is enough
        "print('held', flush=True); sys.stdin.readline()",
        f"{path}.lock",
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    monkeypatch.setattr(lockfile, "PATIENCE", 0.2)
    sink = JsonlSink(path)
    for attempt in (sink.open, lambda: sink.write(events(1))):
        with pytest.raises(
            TemporarySinkError,
            match=r"kept it locked for 0.2 s \('.*f.jsonl.lock'\); find the process",
        ):
            attempt()
    holder.kill()
    holder.wait(60)
    sink.write(events(1))
    sink.close()
    assert numbers_in(path) == [1]


@needs_fork
@pytest.mark.parametrize("opens_lock_file", [False, True])
def test_a_forked_child_opens_and_closes_its_sinks_without_freeing_the_parents_lock(
        path: str, opens_lock_file: bool) -> None:
    sink = JsonlSink(path)
    sink.write(events(101))
    lock = LockFile.share(f"{path}.lock")
    try:
        with lock:
            pid = os.fork()
            if pid == 0:
                sink.close()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            if opens_lock_file:  # the twin: in this process itself it does free it
                os.close(os.open(f"{path}.lock", os.O_RDWR))
            assert try_lock(f"{path}.lock", "LockFile") is opens_lock_file
    finally:
        lock.leave()
        sink.close()


@needs_fork
@pytest.mark.parametrize("opens_again", [True, False])
def test_parent_and_forked_child_both_write_on(path: str, opens_again: bool) -> None:
    sink = JsonlSink(path, max_bytes=3 * SIZE, backups=20)
    sink.write(events(101))
    lock = LockFile.share(f"{path}.lock")
    with lock:  # the child inherits a mutex that nobody there will ever release
        pid = os.fork()
        if pid == 0:
            if opens_again:
                sink.open()
            for number in range(201, 211):
                sink.write(events(number))
            os._exit(0)
    for number in range(102, 111):
        sink.write(events(number))
    assert os.waitpid(pid, 0)[1] == 0
    lock.leave()
    sink.close()
    found = numbers_in_all(path)
    assert [number for number in found if number < 200] == list(range(101, 111))
    assert [number for number in found if number > 200] == list(range(201, 211))

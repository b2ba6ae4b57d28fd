"""The JSONL sink when all goes well: what it writes, where, and what it refuses."""

from __future__ import annotations

import gzip
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Recorder

from bgworker import History
from bgworker.model import wire
from bgworker.model.errors import ConfigurationError, PermanentSinkError, TemporarySinkError
from bgworker.model.events import Event, EventType, StreamEvent, StreamType
from bgworker.model.records import OUTPUT, Batch, TaskState
from bgworker.sinks import linefile
from bgworker.sinks.lockfile import rotate
from bgworker.sinks.jsonl import JsonlSink
from tests.support import ROOT

NOW = datetime(2026, 11, 23, 14, 46, tzinfo=timezone.utc)
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither")


def events(*numbers: int) -> Sequence[Event]:
    return [
        StreamEvent(EventType.TASK_OUTPUT, f"{0:032}", n, NOW, StreamType.OUTPUT, "x" * 20)
        for n in numbers
    ]


SIZE = len(wire.encode_lines(events(1)))


def numbers_in(path: str | Path) -> list[int]:
    """Return the numbers of the events in a file, all lines of which must parse."""
    data = Path(path).read_bytes()
    if str(path).endswith(".gz"):
        data = gzip.decompress(data)
    assert data == b"" or data.endswith(b"\n")
    return [wire.decode(line).seq for line in data.decode().splitlines()]  # type: ignore


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "debug.jsonl")


@pytest.fixture
def make(path: str) -> Iterator[Any]:
    made = []

    def make(where: str | os.PathLike[str] = path, **config: Any) -> JsonlSink:
        made.append(JsonlSink(where, **config))
        return made[-1]

    yield make
    for sink in made:
        sink.close()


# -- writing --


def test_each_event_becomes_one_wire_line_in_order(make: Any, path: str) -> None:
    sink = make()
    sink.open()
    sink.write(events(1, 2))
    sink.write(events(3))
    sink.close()
    assert Path(path).read_bytes() == wire.encode_lines(events(1, 2, 3))


def test_a_batch_of_records_is_written_as_its_events_are(make: Any, path: str) -> None:
    batch = Batch(
        [(TaskState("a" * 32, "load", "b" * 32, 0), n, OUTPUT, 10**18, "hello\n") for n in (1, 2)]
    )
    make().write(batch)
    assert [wire.decode(line) for line in Path(path).read_text().splitlines()] == list(batch)


def test_write_opens_the_file_by_itself_also_after_close(make: Any, path: str) -> None:
    sink = make()
    sink.write(events(1))
    sink.close()
    sink.close()
    sink.write(events(2))
    assert numbers_in(path) == [1, 2]


def test_what_was_written_is_readable_at_once_and_flush_adds_nothing(make: Any, path: str) -> None:
    sink = make()
    sink.write(events(1))
    assert numbers_in(path) == [1]
    sink.flush()
    assert numbers_in(path) == [1]


def test_a_file_that_exists_is_appended_to(make: Any, path: str) -> None:
    Path(path).write_bytes(wire.encode_lines(events(1)))
    make().write(events(2))
    assert numbers_in(path) == [1, 2]


def test_nothing_is_touched_before_open_and_the_path_outlives_a_change_of_directory(
        make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sink = make(Path("debug.jsonl"))
    assert os.listdir(tmp_path) == []
    monkeypatch.chdir("/")
    sink.write(events(1))
    assert sorted(os.listdir(tmp_path)) == ["debug.jsonl", "debug.jsonl.lock"]
    assert repr(sink) == f"JsonlSink({str(tmp_path / 'debug.jsonl')!r})"


def test_the_descriptor_is_not_inherited_by_programs(make: Any) -> None:
    sink = make()
    sink.write(events(1))
    if sink._file._fd >= 0:
        assert not os.get_inheritable(sink._file._fd)


def test_no_descriptor_is_left_open_after_close_or_a_failed_open(
    make: Any, tmp_path: Path, path: str
) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    before = os.listdir("/proc/self/fd")
    sink = make(max_bytes=1, durability="power", compress=True)
    for number in range(5):
        sink.write(events(number))
    sink.close()
    for bad in (tmp_path, tmp_path / "none" / "x"):
        with pytest.raises(PermanentSinkError):
            make(bad).open()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("durability", ["process", "power"])
def test_both_durabilities_write_and_rotate_the_same(make: Any, path: str, durability: str) -> None:
    sink = make(durability=durability, max_bytes=SIZE, backups=2)
    for number in range(4):
        sink.write(events(number))
    assert [numbers_in(name) for name in (f"{path}.2", f"{path}.1", path)] == [[1], [2], [3]]


def test_an_event_without_wire_form_is_refused_for_good(make: Any) -> None:
    naive = StreamEvent(EventType.TASK_OUTPUT, "0" * 32, 1, datetime(2026, 1, 1), StreamType.OUTPUT)
    with pytest.raises(PermanentSinkError, match="cannot encode an event for .*time zone"):
        make().write([naive])


# -- arguments and paths that cannot be used --


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": ""}, "path: expected the path of a file, got ''"),
        ({"path": 3}, "path: expected the path of a file, got 3"),
        ({"path": None}, "path: expected the path of a file, got None"),
        ({"path": "a\0b"}, "path: expected the path of a file, got 'a.x00b'"),
        (
            {"path": "-"},
            "path: '-' names no file here; name one, or write ./- for a file of that name",
        ),
        ({"path": ":memory:"}, "path: ':memory:' names no file here"),
        (
            {"mode": 600},
            "mode: expected None, or permissions from 0o600 to 0o777 such as 0o640, got 0o1130",
        ),
        ({"mode": 0o44}, "mode: expected None, .*got 0o44"),
        ({"mode": "600"}, "mode: expected None, .*got '600'"),
        ({"mode": True}, "mode: expected None, .*got True"),
        ({"max_bytes": 0}, "max_bytes: expected a whole number >= 1 or None, got 0"),
        ({"max_bytes": True}, "max_bytes: .*got True"),
        ({"max_bytes": "10M"}, "max_bytes: .*got '10M'"),
        ({"backups": -1}, "backups: expected a whole number >= 0, got -1"),
        ({"backups": None}, "backups: .*got None"),
        ({"compress": "gzip"}, "compress: expected True or False, got 'gzip'"),
        ({"durability": "disk"}, "durability: expected 'process' or 'power', got 'disk'"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        JsonlSink(**{"path": "x.jsonl", **config})


@pytest.mark.parametrize(
    ("prepare", "where", "message"),
    [
        (lambda top: None, "", "is a directory; name a file"),
        (
            lambda top: None,
            "none/debug.jsonl",
            r"No such file or directory.*; create its directory first",
        ),
        (
            lambda top: (top / "file").touch(),
            "file/debug.jsonl",
            "one of its directories is a file",
        ),
        (lambda top: (top / "a").symlink_to("a"), "a", "symbolic links lead in a circle"),
        (lambda top: None, "x" * 300, "name a shorter path"),
        (
            lambda top: None,
            "x" * 253,
            "name a shorter path",
        ),  # too long for the lock file beside it
    ],
)
@posix
def test_a_path_that_cannot_be_used_is_refused_for_good_and_leaves_no_trace(
        make: Any, tmp_path: Path, prepare: Any, where: str, message: str) -> None:
    prepare(tmp_path)
    before = sorted(os.listdir(tmp_path))
    sink = make(tmp_path / where)
    for attempt in (sink.open, lambda: sink.write(events(1))):
        with pytest.raises(PermanentSinkError, match=message) as caught:
            attempt()
        assert isinstance(caught.value.__cause__, OSError)
        assert str(tmp_path / where) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


@posix
@pytest.mark.parametrize("what", ["file", "directory"])
def test_without_permission_it_is_refused_for_good_and_leaves_no_trace(what: str) -> None:
    script = (
        "import os, sys\nfrom bgworker.sinks.jsonl import JsonlSink, PermanentSinkError\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "try: JsonlSink(sys.argv[1]).open()\nexcept PermanentSinkError as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as top:
        target = Path(top, "debug.jsonl")
        if what == "file":
            target.touch(0o444)
        os.chmod(top, 0o777 if what == "file" else 0o555)
        done = subprocess.run(
            [sys.executable, "-c", script, str(target)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
        )
        assert os.listdir(top) == (["debug.jsonl"] if what == "file" else [])
        os.chmod(top, 0o700)
    assert re.search(
        "Permission denied.*; name a file, in a directory, that this process may", done.stdout
    ), done


# -- files of somebody else --


FOREIGN = [
    b"SQLite format 3\0" + b"\0" * 5000,
    b"hello",
    b"hello\n{}\n",
    b"\n\n# a comment\n{}\n",
    b"[1]\n",
    b"\xff",
    b"\x1f\x8b\x08",
    b"\0" * 32768 + b"\1CD001" + b"\0" * 9,
    b'{"a":1}',
    b'{"a":1}\n',
    b' \n{"a":1}\r\n',
    b'{\n  "a": 1\n}',
    b'{\n  "a": 1\n}\n',
    b'{"a":1}{"b":2}',
    b'{"a":1}\nhello\n',
    b"{}",
    b'{"v": 1}',
    b'{"a":1}\n{"b":',
    b"{'a': 1}\n{'b': 2}\n",
    b'{"a":' + b'"x"' * 400_000 + b"}",
    b"\0" * 2_000_000,
]


@pytest.mark.parametrize("content", FOREIGN, ids=[repr(content[-16:]) for content in FOREIGN])
def test_a_file_of_anything_but_lines_of_objects_is_refused_for_good_and_untouched(
        make: Any, tmp_path: Path, path: str, content: bytes) -> None:
    Path(path).write_bytes(content)
    sink = make()
    for attempt in (sink.open, lambda: sink.write(events(1)), lambda: sink.write(events(1))):
        with pytest.raises(PermanentSinkError) as caught:
            attempt()
        assert str(caught.value) == (
            f"cannot open {path!r}: it holds something else than lines of JSON objects, and "
            "was left as it is; "
            "name another file, or move this one away"
        )
    assert Path(path).read_bytes() == content and os.listdir(tmp_path) == ["debug.jsonl"]
    os.rename(path, f"{path}.away")
    sink.write(events(1))
    assert numbers_in(path) == [1]


def test_a_history_is_refused_and_stays_readable(make: Any, tmp_path: Path) -> None:
    history = tmp_path / "history.db"
    recorder = Recorder(history)
    recorder.task("job")
    recorder.close()
    before = history.read_bytes()
    with pytest.raises(PermanentSinkError, match="something else than lines of JSON"):
        make(history).write(events(1))
    assert history.read_bytes() == before and os.listdir(tmp_path) == ["history.db"]
    with History(history) as opened:
        assert [task.name for task in opened.tasks()] == ["job"]


@pytest.mark.parametrize(
    "begin", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"\n" * 70_000, b'{"others": true}\n']
)
def test_a_file_that_begins_blank_or_with_objects_of_others_is_appended_to(
    make: Any, path: str, begin: bytes
) -> None:
    whole = begin + wire.encode_lines(events(1))
    Path(path).write_bytes(whole)
    make().write(events(2))
    assert Path(path).read_bytes() == whole + wire.encode_lines(events(2))


@posix
def test_lines_of_others_without_a_last_line_end_stay_whole(make: Any, path: str) -> None:
    Path(path).write_bytes(b'{"a":1}\n{"b":2}\n{"c":3}')
    make().write(events(1))
    assert Path(path).read_bytes() == b'{"a":1}\n{"b":2}\n{"c":3}\n' + wire.encode_lines(events(1))
    assert not os.path.exists(f"{path}.torn")


@posix
def test_a_last_line_that_no_sink_writes_is_refused_and_not_copied(
    make: Any, path: str, tmp_path: Path
) -> None:
    Path(path).write_bytes(wire.encode_lines(events(1)))
    os.truncate(path, 20 << 30)
    with pytest.raises(
        PermanentSinkError,
        match="its last line has more than 67108864 bytes, which no sink writes; name another",
    ):
        make().open()
    assert os.path.getsize(path) == 20 << 30 and not os.path.exists(f"{path}.torn")


@posix
def test_a_strange_file_that_takes_the_place_of_ours_is_left_alone_until_it_is_gone(
    make: Any, path: str
) -> None:
    sink = make()
    sink.write(events(1))
    Path(f"{path}.strange").write_bytes(b"hello")
    os.replace(f"{path}.strange", path)
    for _ in range(3):  # it may be ours again later
        with pytest.raises(TemporarySinkError, match="something else than lines"):
            sink.write(events(2))
    assert Path(path).read_bytes() == b"hello"
    os.unlink(path)
    sink.write(events(2))
    assert numbers_in(path) == [2]


# -- what is no regular file --


@posix
def test_a_fifo_is_written_to_without_lock_or_repair(make: Any, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    sink = make(fifo)
    with pytest.raises(TemporarySinkError, match="nothing reads from it"):
        sink.open()
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    sink.write(events(1))
    assert os.read(reader, 9999) == wire.encode_lines(events(1))
    os.close(reader)
    with pytest.raises(TemporarySinkError, match="its reader is gone"):
        sink.write(events(2))
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    sink.write(events(2))
    assert os.read(reader, 9999) == wire.encode_lines(events(2))
    os.close(reader)
    assert os.listdir(tmp_path) == ["fifo"]


@posix
def test_what_is_no_regular_file_cannot_be_rotated(make: Any) -> None:
    make("/dev/null").write(events(1))
    with pytest.raises(PermanentSinkError, match="cannot open '/dev/null'.*max_bytes"):
        make("/dev/null", max_bytes=10).open()
    assert not os.path.exists("/dev/null.lock")


@posix
def test_the_error_output_of_a_process_is_a_sink() -> None:
    script = (
        "import sys; from bgworker.model import wire; from bgworker.sinks import open_sink\n"
        "open_sink('jsonl:/dev/stderr').write([wire.decode(line) for line in "
        "sys.stdin.read().splitlines()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        cwd=ROOT,
        input=wire.encode_lines(events(1, 2)),
        timeout=60,
    )
    assert done.stderr == wire.encode_lines(events(1, 2))


@posix
def test_lines_go_among_the_text_of_a_redirected_stderr(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("no JSON, and no line end")
    program = (
        "import sys\nfrom bgworker import open_sink\nfrom bgworker.model import wire\n"
        "print(file=sys.stderr)\n"
        "open_sink('jsonl:/dev/stderr').write([wire.decode(line) for line in "
        "sys.stdin.read().splitlines()])"
    )
    with log.open("ab") as stderr:
        subprocess.run(
            [sys.executable, "-c", program],
            input=wire.encode_lines(events(1)),
            stderr=stderr,
            timeout=60,
            check=True,
        )
    first, line = log.read_text().splitlines()
    assert first == "no JSON, and no line end" and [wire.decode(line)] == events(1)
    assert os.listdir(tmp_path) == ["log.txt"]


# -- rotation --


def test_a_file_is_rotated_before_it_would_exceed_max_bytes_and_the_oldest_goes(
    make: Any, path: str
) -> None:
    sink = make(max_bytes=2 * SIZE, backups=2)
    for number in range(8):
        sink.write(events(number))
    assert [numbers_in(name) for name in (f"{path}.2", f"{path}.1", path)] == [
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    assert not os.path.exists(f"{path}.3")


def test_a_batch_is_written_whole_however_large(make: Any, path: str) -> None:
    sink = make(max_bytes=SIZE)
    sink.write(events(1, 2, 3))
    sink.write(events(4, 5))
    assert (numbers_in(f"{path}.1"), numbers_in(path)) == ([1, 2, 3], [4, 5])


def test_a_file_that_is_over_the_limit_when_opened_is_rotated_by_the_first_write(
    make: Any, path: str
) -> None:
    make().write(events(1, 2, 3))
    make(max_bytes=SIZE).write(events(4))
    assert (numbers_in(f"{path}.1"), numbers_in(path)) == ([1, 2, 3], [4])


def test_without_backups_the_full_file_is_removed(make: Any, path: str, tmp_path: Path) -> None:
    sink = make(max_bytes=2 * SIZE, backups=0)
    for number in range(5):
        sink.write(events(number))
    assert numbers_in(path) == [4]
    assert sorted(os.listdir(tmp_path)) == ["debug.jsonl", "debug.jsonl.lock"]


def test_rotated_files_are_compressed_and_move_up_with_plain_ones(
    make: Any, path: str, tmp_path: Path
) -> None:
    plain = make(max_bytes=SIZE, backups=3)
    for number in range(3):
        plain.write(events(number))
    os.utime(f"{path}.1", (1_000_000_000, 1_000_000_000))
    squeezing = make(max_bytes=SIZE, backups=3, compress=True)
    squeezing.write(events(3))
    assert [numbers_in(f"{path}.{n}.gz") for n in (3, 2, 1)] == [[0], [1], [2]]
    assert os.stat(f"{path}.2.gz").st_mtime == 1_000_000_000
    make(max_bytes=SIZE, backups=3).write(events(4))
    names = [f"{path}.3.gz", f"{path}.2.gz", f"{path}.1", path]
    assert [numbers_in(name) for name in names] == [[1], [2], [3], [4]]
    assert len(os.listdir(tmp_path)) == 5


def test_rotation_moves_no_further_than_the_first_free_number(tmp_path: Path) -> None:
    names = {"f": b"0", "f.1.gz": b"1", "f.3": b"3"}
    for name, content in names.items():
        (tmp_path / name).write_bytes(content)
    rotate(str(tmp_path / "f"), 5, compress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "f.1": b"0",
        "f.2.gz": b"1",
        "f.3": b"3",
    }


@posix
def test_new_files_are_no_more_open_than_the_one_they_replace(make: Any, path: str) -> None:
    Path(path).write_bytes(b'{"torn')
    os.chmod(path, 0o600)
    sink = make(max_bytes=SIZE, compress=True)
    sink.write(events(1))
    sink.write(events(2))
    for name in (path, f"{path}.1.gz", f"{path}.torn"):
        assert stat.S_IMODE(os.stat(name).st_mode) == 0o600


@posix
def test_behind_a_symbolic_link_all_happens_where_it_leads(make: Any, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.jsonl"
    link.symlink_to("there/real.jsonl")
    sink, other = make(link, max_bytes=SIZE), make(
        tmp_path / "there" / "real.jsonl", max_bytes=SIZE
    )
    sink.write(events(1))
    other.write(events(2))
    sink.write(events(3))
    assert sorted(os.listdir(tmp_path)) == ["link.jsonl", "there"]
    assert sorted(os.listdir(tmp_path / "there")) == [
        "real.jsonl",
        "real.jsonl.1",
        "real.jsonl.2",
        "real.jsonl.lock",
    ]
    assert numbers_in(link) == [3]


def test_where_a_file_that_is_read_cannot_be_renamed_it_grows_until_it_can(
        make: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(
            13,
            "The process cannot access the file because it is being used by another process",
            path,
        )

    monkeypatch.setattr(linefile, "_IS_WINDOWS", True)
    sink = make(max_bytes=SIZE)
    sink.write(events(1))
    with monkeypatch.context() as patch:
        patch.setattr(linefile, "rotate", refuse)
        sink.write(events(2))
    assert numbers_in(path) == [1, 2]
    sink.write(events(3))
    assert (numbers_in(f"{path}.1"), numbers_in(path)) == ([1, 2], [3])


# -- others who use the path --


@pytest.mark.parametrize("max_bytes", [None, 10 * SIZE])
def test_several_sinks_of_one_process_share_a_path_from_several_threads(
        make: Any, path: str, max_bytes: int | None) -> None:
    barrier = threading.Barrier(4)

    def run(first: int) -> None:
        sink = make(max_bytes=max_bytes, backups=1000)
        barrier.wait(10)
        for number in range(first, first + 200, 2):
            sink.write(events(number, number + 1))

    threads = [threading.Thread(target=run, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    rotated = [name for n in range(1000, 0, -1) if os.path.exists(name := f"{path}.{n}")]
    found = [number for name in [*rotated, path] for number in numbers_in(name)]
    for n in range(4):
        assert [number for number in found if number // 1000 == n] == list(
            range(1000 * n, 1000 * n + 200)
        )
    assert len(found) == 800 and bool(rotated) == bool(max_bytes)


@posix
def test_a_file_renamed_by_logrotate_is_left_and_a_new_one_begun(make: Any, path: str) -> None:
    sink = make()
    sink.write(events(1))
    os.rename(path, f"{path}.old")
    sink.write(events(2))
    Path(path).rename(f"{path}.older")
    Path(path).write_bytes(wire.encode_lines(events(7)))
    sink.write(events(3))
    assert [numbers_in(name) for name in (f"{path}.old", f"{path}.older", path)] == [
        [1],
        [2],
        [7, 3],
    ]


@posix
def test_a_deleted_file_is_made_anew_and_a_truncated_one_gone_on_with(make: Any, path: str) -> None:
    sink = make()
    sink.write(events(1))
    os.unlink(path)
    sink.write(events(2))
    assert numbers_in(path) == [2]
    os.truncate(path, 0)
    sink.write(events(3))
    assert numbers_in(path) == [3]


@posix
def test_a_deleted_lock_file_is_made_anew(make: Any, path: str) -> None:
    sink = make()
    sink.write(events(1))
    os.unlink(f"{path}.lock")
    sink.write(events(2))
    assert numbers_in(path) == [1, 2] and os.path.exists(f"{path}.lock")

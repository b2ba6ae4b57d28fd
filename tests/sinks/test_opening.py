"""Opening, creating and replacing files: whose they are, what they may be, and what becomes of what
lies in the way."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from bgworker import (
    ConfigurationError,
    Event,
    EventType,
    JsonlSink,
    PermanentSinkError,
    Scheduler,
    SinkError,
    SinkOptions,
    SqliteSink,
    StreamEvent,
    StreamType,
    open_sink,
)
from bgworker.model import wire
from bgworker.park import replay
from bgworker.testing import FlakySink
from tests.support import environment

NOW = datetime(2026, 11, 23, 14, 46, tzinfo=timezone.utc)
OTHER = 65534
posix = pytest.mark.skipif(
    os.name == "nt", reason="Windows has neither links for everybody nor permissions like these"
)
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to act as two users"
)

Place = Callable[[Path, Path], object]

IN_THE_WAY: dict[str, Place] = {
    "link": lambda path, victim: path.symlink_to(victim),
    "dangling link": lambda path, victim: path.symlink_to(victim.with_name("made")),
    "FIFO": lambda path, victim: os.mkfifo(path),
    "directory": lambda path, victim: path.mkdir(),
}


def said(*numbers: int) -> list[Event]:
    return [
        StreamEvent(EventType.TASK_OUTPUT, f"{0:032}", n, NOW, StreamType.OUTPUT, "x" * 20)
        for n in numbers
    ]


SIZE = len(wire.encode_lines(said(1)))


@contextmanager
def acting_as(user: int) -> Iterator[None]:
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder that everybody can write to, below one that everybody can reach."""
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        folder = Path(top, "shared")
        folder.mkdir()
        folder.chmod(0o1777)
        yield folder


def mode_of(path: str | Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


# -- beside our files --


@posix
@pytest.mark.parametrize("kind", IN_THE_WAY)
@pytest.mark.parametrize("ending", [".lock", ".torn"])
def test_what_is_no_regular_file_is_refused_beside_ours_and_named(
    tmp_path: Path, kind: str, ending: str
) -> None:
    path, victim = tmp_path / "f.jsonl", tmp_path / "victim"
    victim.write_bytes(b"keep me")
    path.write_bytes(wire.encode_lines(said(1)) + b'{"v":1,"ty')
    IN_THE_WAY[kind](Path(f"{path}{ending}"), victim)
    sink, before = JsonlSink(path), path.read_bytes()
    word = "symbolic link" if "link" in kind else kind
    with pytest.raises(
        PermanentSinkError,
        match=rf"it is a {word}, where there should be a regular file; .*f.jsonl{ending}'\)",
    ):
        sink.open()
    assert (victim.read_bytes(), path.read_bytes()) == (
        b"keep me",
        before,
    ) and not victim.with_name("made").exists()
    os.rmdir(f"{path}{ending}") if kind == "directory" else os.unlink(f"{path}{ending}")
    sink.write(said(2))
    sink.close()
    assert path.read_bytes() == wire.encode_lines(said(1, 2))


@posix
@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO"])
def test_what_lies_where_a_backup_is_compressed_or_was_is_removed_or_left_and_never_followed(
    tmp_path: Path, kind: str
) -> None:
    path, victim = tmp_path / "f.jsonl", tmp_path / "victim"
    victim.write_bytes(b"keep me")
    for ending in (".gz.tmp", ".2", ".3.gz"):
        IN_THE_WAY[kind](Path(f"{path}{ending}"), victim)
    sink = JsonlSink(path, max_bytes=SIZE, backups=4, compress=True)
    for number in range(4):
        sink.write(said(number))
    sink.close()
    assert victim.read_bytes() == b"keep me" and not victim.with_name("made").exists()
    assert path.read_bytes() == wire.encode_lines(said(3)) and not os.path.lexists(f"{path}.gz.tmp")


@posix
def test_a_torn_line_is_not_appended_to_a_second_name_of_another_file(tmp_path: Path) -> None:
    path, victim = tmp_path / "f.jsonl", tmp_path / "victim"
    victim.write_bytes(b"keep me")
    path.write_bytes(b'{"v":1,"ty')
    os.link(victim, f"{path}.torn")
    with pytest.raises(
        PermanentSinkError, match="has another name too .a hard link.; move it away"
    ):
        JsonlSink(path).open()
    assert (victim.read_bytes(), path.read_bytes()) == (b"keep me", b'{"v":1,"ty')


@posix
def test_what_lies_where_a_replay_writes_is_not_followed(tmp_path: Path) -> None:
    path, victim = tmp_path / "park", tmp_path / "victim"
    victim.write_bytes(b"keep me")
    for ending in (".replay.tmp", ".tmp", ".replay", ".replay.lock"):
        Path(f"{path}{ending}").symlink_to(victim)
    event = wire.encode(said(1)[0])
    path.write_text(
        f'{{"v":1,"sink":"it","error":"","attempts":1,"parked_at":"","event":{event}}}\nrubbish\n'
    )
    assert replay(path, FlakySink()).delivered == 1
    assert (victim.read_bytes(), path.read_bytes()) == (b"keep me", b"rubbish\n")


@posix
@as_root
def test_our_backup_is_not_removed_for_what_another_user_calls_its_compressed_form(
    shared: Path,
) -> None:
    path = shared / "f.jsonl"
    for name in ("f.jsonl", "f.jsonl.1"):
        (shared / name).write_bytes(wire.encode_lines(said(1)))
    with acting_as(OTHER):
        (shared / "f.jsonl.1.gz").write_bytes(b"")
    sink = JsonlSink(path)
    sink.write(said(2))
    sink.close()
    assert (shared / "f.jsonl.1").read_bytes() == wire.encode_lines(said(1))


# -- in a folder that everybody can write to --


@posix
@as_root
@pytest.mark.parametrize("beside", ["", ".lock", ".torn"])
def test_a_file_that_another_user_has_put_there_is_refused_and_left_as_it_is(
    shared: Path, beside: str
) -> None:
    path = shared / "f.jsonl"
    if beside:
        path.write_bytes(b'{"v":1,"ty')
    with acting_as(OTHER):
        Path(f"{path}{beside}").touch(0o666)
    with pytest.raises(
        PermanentSinkError,
        match=f"it is a file of another user .uid {OTHER}.; name a path in a directory that only",
    ):
        JsonlSink(path).open()
    assert Path(f"{path}{beside}").read_bytes() == b""
    if not beside:
        with pytest.raises(PermanentSinkError, match="a file of another user"):
            SqliteSink(path).open()


@posix
@as_root
@pytest.mark.parametrize("make", [JsonlSink, SqliteSink, lambda path: replay(path, FlakySink())])
def test_a_link_of_another_user_is_not_followed_and_one_of_ours_is(shared: Path, make: Any) -> None:
    with tempfile.TemporaryDirectory() as top:
        victim = Path(top, "victim")
        victim.touch()
        with acting_as(OTHER):
            (shared / "theirs").symlink_to(victim)
        (shared / "ours").symlink_to(victim)
        with pytest.raises(
            (FileExistsError, PermanentSinkError),
            match=f"a symbolic link of another user .uid {OTHER}.",
        ):
            make(shared / "theirs").open()
        assert victim.stat().st_size == 0 and os.listdir(top) == ["victim"]
        sink = make(shared / "ours")
        if make is JsonlSink or make is SqliteSink:
            sink.write(said(1))
            sink.close()
            assert victim.stat().st_size > 0


@posix
@as_root
def test_a_user_follows_the_links_of_the_owner_of_the_folder_and_root_does_not() -> None:
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        folder, there = Path(top, "folder"), Path(top, "there")
        for each in (folder, there):
            each.mkdir()
            each.chmod(0o777 if each is there else 0o755)
        os.chown(folder, OTHER, -1)
        with acting_as(OTHER):
            (folder / "log").symlink_to(there / "log")
        with pytest.raises(PermanentSinkError, match="a symbolic link of another user"):
            JsonlSink(folder / "log").open()
        with acting_as(1):
            sink = JsonlSink(folder / "log")
            sink.write(said(1))
            sink.close()
        assert (there / "log").read_bytes() == wire.encode_lines(said(1))


@posix
def test_a_second_name_of_a_file_is_refused_where_everybody_could_have_given_it(
    shared: Path,
) -> None:
    with tempfile.TemporaryDirectory(dir=shared.parent) as top:
        victim = Path(top, "victim")
        victim.touch()
        os.link(victim, shared / "f.jsonl")
        with pytest.raises(
            PermanentSinkError, match="has another name too .a hard link., and everybody can write"
        ):
            JsonlSink(shared / "f.jsonl").open()
        assert victim.read_bytes() == b""


@posix
def test_a_file_of_ours_is_used_there(shared: Path) -> None:
    for sink in (JsonlSink(shared / "f.jsonl"), SqliteSink(shared / "h.db")):
        for _ in range(2):
            sink.write(said(1))
            sink.close()


# -- permissions and owners --


@posix
@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_a_mode_holds_for_all_that_is_created_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "f.jsonl"
    sinks = [
        JsonlSink(path, max_bytes=SIZE, compress=True, mode=mode),
        open_sink(f"sqlite:{tmp_path}/h.db?mode={mode:o}"),
    ]
    for number in range(3):
        for sink in sinks:
            sink.write(said(number))
    assert {name: mode_of(tmp_path / name) for name in os.listdir(tmp_path)} == dict.fromkeys(
        [
            "f.jsonl",
            "f.jsonl.1.gz",
            "f.jsonl.2.gz",
            "f.jsonl.lock",
            "h.db",
            "h.db-wal",
            "h.db-shm",
            "h.db.lock",
        ],
        mode,
    )
    for sink in sinks:
        sink.close()
    path.write_bytes(b'{"v":1,"ty')
    JsonlSink(path).open()
    assert mode_of(f"{path}.torn") == mode, "it is that of the file"


@posix
def test_the_park_file_has_a_mode_too_and_without_one_the_umask_decides(tmp_path: Path) -> None:
    with Scheduler(1) as pool:
        for name, options in (("a", {"park_mode": 0o600}), ("b", {})):
            pool.register_sink(
                FlakySink(), name=name, options=SinkOptions(park=tmp_path / name, **options)
            )
    mask = os.umask(0)
    os.umask(mask)
    assert (mode_of(tmp_path / "a"), mode_of(tmp_path / "b")) == (0o600, 0o666 & ~mask)
    with pytest.raises(
        ConfigurationError, match="park_mode: expected None, or permissions .*, got 0o1130"
    ):
        SinkOptions(park_mode=600)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rw", "expected permissions as octal digits, such as 640"),
        ("800", "octal digits"),
        ("0", "mode: expected None, or permissions from 0o600"),
        ("1777", "got 0o1777"),
    ],
)
def test_a_mode_in_a_spec_is_octal(text: str, said: str) -> None:
    with pytest.raises(SinkError, match=said):
        open_sink(f"jsonl:x.jsonl?mode={text}")


@posix
@as_root
def test_rotation_keeps_the_owner_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(wire.encode_lines(said(1)))
    path.chmod(0o640)
    os.chown(path, OTHER, OTHER)
    sink = JsonlSink(path, max_bytes=SIZE, compress=True)
    sink.write(said(2))
    sink.close()
    for name in (path, f"{path}.1.gz"):
        status = os.stat(name)
        assert (status.st_uid, status.st_gid, mode_of(name)) == (OTHER, OTHER, 0o640)


@posix
@as_root
def test_a_file_of_another_user_is_not_replaced_by_one_that_could_not_keep_its_owner(
    shared: Path,
) -> None:
    shared.chmod(0o770)
    os.chown(shared, OTHER, -1)
    path, event = shared / "park", wire.encode(said(1)[0])
    path.write_text(
        f'{{"v":1,"sink":"it","error":"","attempts":1,"parked_at":"","event":{event}}}\nrubbish\n'
    )
    path.chmod(0o666)
    before = path.read_bytes()
    with (
        acting_as(OTHER),
        pytest.raises(
            PermissionError, match="belongs to another user .uid 0., and only that user and root"
        ),
    ):
        replay(path, FlakySink())
    assert (path.read_bytes(), path.stat().st_uid) == (before, 0)


# -- paths --


@posix
def test_a_message_shows_a_path_on_one_line_with_single_backslashes(tmp_path: Path) -> None:
    path = tmp_path / "a\\b\n.jsonl"
    path.write_text("no lines")
    with pytest.raises(PermanentSinkError) as caught:
        JsonlSink(path).open()
    assert "/a\\b\\n.jsonl': it holds" in str(caught.value)


@posix
def test_a_relative_path_in_a_directory_that_is_gone_is_an_error_of_one_line(
    tmp_path: Path,
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    program = (
        "import os, sys\nfrom bgworker import ConfigurationError, JsonlSink, SqliteSink\n"
        "os.rmdir(os.getcwd())\n"
        "for make in (JsonlSink, SqliteSink):\n    try: make('x')\n    except "
        "ConfigurationError as error: print(error)\n"
        "    make('/tmp/x')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=gone,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert (done.stderr, done.stdout.count("\n")) == ("", 2)
    assert (
        done.stdout.count(
            "path: 'x' starts from the current directory, which is gone; change to another, or give"
        )
        == 2
    )

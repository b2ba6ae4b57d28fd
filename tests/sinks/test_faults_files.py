"""Files in the hands of others: a folder that another user can write to, and files of ours that
were changed.

*Links.* The other user plants links, pipes, devices, folders and forged files at every name that is
or was ours. A child process then uses every sink and verb there. No file outside of the folder may
change, nothing of them may be copied into it, no event that was parked may be gone, and nothing may
hang or end in a traceback.

*Mutations.* Park files and JSONL files are changed at random and then replayed, appended to, and
taken through a history and its export. What cannot be read stays as it is, and nothing takes long
or much memory.

`tools/stress.py links mutated` does both for longer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gzip
import io
import json
import logging
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from bgworker import (
    BgworkerError,
    Event,
    EventType,
    JsonlSink,
    LossEvent,
    PermanentSinkError,
    RetryPolicy,
    Scheduler,
    SinkError,
    SinkOptions,
    SqliteSink,
    StreamEvent,
    StreamType,
    TemporarySinkError,
    current_task,
)
from bgworker.cli import main
from bgworker.model import wire
from bgworker.park import replay
from bgworker.testing import MemorySink
from tests.support import ROOT, environment

NOW = datetime(2026, 11, 23, 14, 46, tzinfo=timezone.utc)
OTHER = 65534
SECRET, PARKED = "TOP-SECRET-TEXT", "PARKED-TEXT"
MOST_MEMORY = 200  # MiB
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
posix = pytest.mark.skipif(
    os.name == "nt", reason="Windows has neither links nor FIFOs for everybody"
)

FILES = ("events.jsonl", "park.jsonl", "out.jsonl", "run.jsonl", "exported.jsonl", "history.db")
ENDINGS = (
    ".lock",
    ".torn",
    ".tmp",
    ".replay",
    ".replay.tmp",
    ".replay.lock",
    ".gz.tmp",
    ".1",
    ".2",
    ".1.gz",
    ".2.gz",
    "-wal",
    "-shm",
    "-journal",
)


def said(*numbers: int, text: str = "x" * 20) -> list[Event]:
    return [
        StreamEvent(EventType.TASK_OUTPUT, f"{0:032}", n, NOW, StreamType.OUTPUT, text)
        for n in numbers
    ]


def wrapped(event: Event) -> bytes:
    return (
        b'{"v":1,"sink":"dead","error":"OSError: '
        b'away","attempts":8,"parked_at":"2026-11-23T14:46:00.000000Z","event":'
        + wire.encode(event).encode()
        + b"}\n"
    )


def in_child(
    scenario: str, *arguments: Any, seconds: float = 100
) -> subprocess.CompletedProcess[str]:
    """Run one of this module's scenarios in a fresh process, which is ended with a traceback if it
    hangs."""
    script = (f"import faulthandler; faulthandler.dump_traceback_later({seconds!r}, exit=True)\n"
              f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
              f"import {__name__} as scenarios; scenarios.{scenario}(*{arguments!r})")
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )


def check_memory() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        return
    # not ru_maxrss, which a process begins with as its parent's: that of a long run of tests is
    # large
    used = int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    assert used < MOST_MEMORY, f"{used:.0f} MiB"


# -- what the other user does --


def victims(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    lines = wire.encode_lines(said(1, 2))
    for name, content in {
        "notes.txt": b"keep me\n",
        "secret": SECRET.encode() * 9,
        "empty": b"",
        "log.jsonl": lines,
        "settings.json": b'{"a":1}',
        "secret.jsonl": wire.encode_lines(said(1, text=SECRET)),
        "park.jsonl": wrapped(said(3)[0]),
    }.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    sink = SqliteSink(folder / "history.db")
    sink.write(said(1))
    sink.close()


def pictures(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return all that may not change of the files in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        found[path.name] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            path.read_bytes(),
        )
    return found


def plant(path: str, targets: list[str], chance: random.Random, is_free: bool) -> str:
    """Put something at a path that nobody expects there, as another user unless ``is_free``; return
    what."""
    kind = chance.choice([*KINDS, *(FREE_KINDS if is_free else {})])
    if not is_free and IS_ROOT:
        os.seteuid(OTHER)
    try:
        {**KINDS, **FREE_KINDS}[kind](path, targets, chance)
    finally:
        if IS_ROOT:
            os.seteuid(0)
    return kind


Plant = Callable[[str, "list[str]", random.Random], object]

KINDS: dict[str, Plant] = {
    "symlink": lambda path, targets, chance: os.symlink(chance.choice(targets), path),
    "dangling": lambda path, targets, chance: os.symlink(
        os.path.join(os.path.dirname(targets[0]), "made"), path
    ),
    "loop": lambda path, targets, chance: os.symlink(os.path.basename(path), path),
    "fifo": lambda path, targets, chance: os.mkfifo(path, 0o666),
    "folder": lambda path, targets, chance: os.mkdir(path),
    "folder link": lambda path, targets, chance: os.symlink(os.path.dirname(targets[0]), path),
    "socket": lambda path, targets, chance: bound(path),
    "file": lambda path, targets, chance: make_file(
        path, chance.choice([b"", b"rubbish", b"{}\n", b"\n1\n"])
    ),
    "sparse": lambda path, targets, chance: make_file(path, b"", 20 << 30),
}

FREE_KINDS: dict[str, Plant] = {
    "hard link": lambda path, targets, chance: os.link(chance.choice(targets), path),
    **(
        {
            "null": lambda path, targets, chance: os.mknod(
                path, stat.S_IFCHR | 0o666, os.makedev(1, 3)
            ),
            "zero": lambda path, targets, chance: os.mknod(
                path, stat.S_IFCHR | 0o666, os.makedev(1, 5)
            ),
        }
        if IS_ROOT
        else {}
    ),
}
"""What a system may keep other users from doing."""


def bound(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


def make_file(path: str, content: bytes, size: int = 0) -> None:
    with open(path, "wb") as file:
        file.write(content)
        if size:
            file.truncate(size)
    os.chmod(path, 0o666)


def prepare(folder: Path) -> None:
    """Leave what an earlier run of ours would: torn lines, backups, a park file, a history."""
    torn = b'{"v":1,"type":"TaskOu'
    (folder / "events.jsonl").write_bytes(wire.encode_lines(said(1)) + torn)
    (folder / "run.jsonl").write_bytes(wire.encode_lines(said(1)) + torn)
    (folder / "park.jsonl").write_bytes(
        b"".join(wrapped(each) for each in said(1, 2, 3, text=PARKED))
    )
    sink = SqliteSink(folder / "history.db")
    sink.write(said(1))
    sink.close()
    for name in os.listdir(folder):
        if name.endswith(".lock"):
            (folder / name).unlink()


def attack(folder: Path, targets: list[str], chance: random.Random) -> dict[str, str]:
    planted = {}
    density = chance.choice([0.05, 0.2, 0.5])
    for name in FILES:
        for ending in ENDINGS:
            if chance.random() < density:
                planted[name + ending] = plant(
                    str(folder / (name + ending)), targets, chance, chance.random() < 0.5
                )
        if chance.random() < 0.1:
            with contextlib.suppress(FileNotFoundError):
                (folder / name).unlink()
            planted[name] = plant(str(folder / name), targets, chance, False)
    if chance.random() < 0.5 and "park.jsonl.replay" not in planted and "park.jsonl" not in planted:
        status = (folder / "park.jsonl").stat()
        make_file(
            str(folder / "park.jsonl.replay"),
            json.dumps(
                {"identity": [status.st_dev, status.st_ino], "done": status.st_size, "kept": []}
            ).encode(),
        )
        planted["park.jsonl.replay"] = "forged note"
    return planted


# -- what we do there --


def use_everything(folder: str, times: int = 1) -> None:
    """Use every sink and verb in a folder, whatever they say; print what they say."""
    logging.getLogger("bgworker").disabled = True
    os.chdir(folder)
    os.umask(0o022)

    class Dead:
        def write(self, events: object) -> None:
            raise TemporarySinkError("nobody there")

        def close(self) -> None:
            pass

    def jsonl() -> None:
        sink = JsonlSink("events.jsonl", max_bytes=300, backups=2, compress=True)
        for number in range(2, 8):
            sink.write(said(number))
        sink.close()

    def sqlite() -> None:
        sink = SqliteSink("history.db")
        sink.write(said(2))
        sink.close()

    def parking() -> None:
        retry = RetryPolicy(attempts=1, base=0.001, cap=0.001)
        with Scheduler(1, close_timeout=0.3) as pool:
            pool.register_sink(Dead(), options=SinkOptions(park="park.jsonl", retry=retry))
            pool.submit(lambda: current_task().output(PARKED)).result(30)

    def replaying() -> object:
        return replay("park.jsonl", JsonlSink("out.jsonl"))

    def attempt(name: str, action: Callable[[], object]) -> None:
        began = time.monotonic()
        try:
            said = action()
        except (BgworkerError, OSError) as error:
            said = f"{type(error).__name__}: {error}"
        print(f"{name}: {said} ({time.monotonic() - began:.1f} s)", flush=True)

    def verb(*words: str) -> None:
        errors, output = io.StringIO(), io.StringIO()
        def act() -> object:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
                code = main(list(words))
            return f"{code} {errors.getvalue().strip()}"
        attempt(" ".join(words), act)
        assert "Traceback" not in errors.getvalue()

    for _ in range(times):
        attempt("jsonl", jsonl)
        attempt("park", parking)
        attempt("replay", replaying)
        attempt("sqlite", sqlite)
        verb("replay", "park.jsonl", "--to", "jsonl:out.jsonl?max_bytes=200&compress=yes")
        for words in (
            ["tasks"],
            ["show", "last"],
            ["tail", "last"],
            ["stats"],
            ["prune", "--keep", "1"],
            ["export", "--jsonl", "exported.jsonl"],
        ):
            verb(*words, "--db", "history.db")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bgworker",
            "run",
            "--jsonl",
            "run.jsonl",
            "--db",
            "history.db",
            "--",
            "echo",
            "hi",
        ],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(),
    )
    print("run", done.returncode, done.stderr.strip(), flush=True)
    assert "Traceback" not in done.stderr, done.stderr
    check_memory()


@contextlib.contextmanager
def harassed(folder: Path, targets: list[str], seed: int) -> Iterator[None]:
    """Have another user put something else at our names all the time."""
    names = [
        name + ending
        for name in FILES
        for ending in ENDINGS
        if name != "history.db" or ending == ".lock"
    ]
    if IS_ROOT:  # else the links are ours, and followed as they should be
        names += [name for name in FILES if name != "history.db"]
    pid = os.fork()
    if pid == 0:
        try:
            if IS_ROOT:
                os.setgid(OTHER)
                os.setuid(OTHER)
            chance = random.Random(seed)
            while True:
                path = str(folder / chance.choice(names))
                with contextlib.suppress(OSError):
                    (
                        os.rmdir(path)
                        if os.path.isdir(path) and not os.path.islink(path)
                        else os.unlink(path)
                    )
                with contextlib.suppress(OSError):
                    KINDS[chance.choice(["symlink", "dangling", "loop", "fifo", "folder", "file"])](
                        path, targets, chance
                    )
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def run_links(seed: int, *, moving: bool = False) -> None:
    """Use everything in a folder that somebody has prepared, or goes on changing; check what became
    of others' files."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        folder, outside = Path(top, "shared"), Path(top, "private")
        folder.mkdir()
        victims(outside)
        prepare(folder)
        folder.chmod(0o777 if moving else chance.choice([0o777, 0o1777]))
        before = pictures(outside)
        if moving:
            planted = {"park.jsonl": "changes all the time"}
            with harassed(folder, targets_in(outside), seed):
                done = in_child("use_everything", str(folder), 10)
        else:
            planted = attack(folder, targets_in(outside), chance)
            done = in_child("use_everything", str(folder))
        told = f"seed {seed}, planted {planted}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        after = pictures(outside)
        assert after.keys() == before.keys(), f"{sorted(after.keys() ^ before.keys())}: {told}"
        for name in before:
            assert after[name] == before[name], f"{name} is not what it was: {told}"
        assert done.returncode == 0, told
        contents = [
            gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
            for data in contents_of(folder)
        ]
        assert not any(
            SECRET.encode() in content for content in contents
        ), f"something secret was copied: {told}"
        if "park.jsonl" not in planted:
            for event in said(1, 2, 3, text=PARKED):
                assert any(
                    wire.encode(event).encode() in content for content in contents
                ), f"a parked event is gone: {told}"


def targets_in(outside: Path) -> list[str]:
    return [str(path) for path in sorted(outside.iterdir()) if path.is_file()]


def contents_of(folder: Path) -> list[bytes]:
    """Return what is in the files that are nobody else's, but for the huge ones."""
    found = []
    for path in folder.rglob("*"):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size < 1 << 20:
            found.append(path.read_bytes())
    return found


@posix
@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_others_put_beside_our_files_is_followed_waited_for_or_believed(
    seed: int,
) -> None:
    run_links(seed)


@posix
@pytest.mark.slow
def test_nothing_is_followed_while_others_change_what_lies_there() -> None:
    run_links(1, moving=True)


@posix
def test_the_harness_notices_who_follows_a_link(tmp_path: Path) -> None:
    victims(tmp_path / "outside")
    before = pictures(tmp_path / "outside")
    os.symlink(tmp_path / "outside" / "notes.txt", tmp_path / "f.torn")
    with open(tmp_path / "f.torn", "ab") as file:
        file.write(b"torn")
    assert pictures(tmp_path / "outside") != before


# -- files that were changed --

HUGE = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"9" * 10_000,
    b"9e999",
    b"-0",
    b"1e-400",
    b"NaN",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b'""',
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"\r\n",
    b"\n\n",
    b'"\\ud800"',
    b"\\u0000",
    b"x" * 3_000_000,
    b"[]," * 1_000_000,
    b'"0001-01-01T00:00:00Z"',
    b'"9999-12-31T23:59:60Z"',
    b'"event":',
    b'"type":',
    b'"v":2,',
    b"\xe2\x80\xae",
]


def specimens() -> list[bytes]:
    """Return what our own files look like: a park file and one of wire lines, with every type of
    event."""
    sink = MemorySink()

    def talk() -> None:
        task = current_task()
        task.output("text")
        task.output({"json": [1, None, "x"]})
        task.error("é\n")
        task.progress(1, 3, "one")

    with Scheduler(1, sinks=[sink], record_source=True) as pool:
        pool.options(name="talk", metadata={"a": 1}).submit(talk).result(60)
        wait(
            [
                pool.submit(int, "x"),
                pool.options(timeout=0.01).submit(lambda: current_task().sleep(60)),
            ],
            60,
        )
    loss = LossEvent(EventType.EVENTS_LOST, NOW, "hook", 120, "overflow", {"TaskOutput": 120})
    events = [*sink.events, loss]
    return [
        b"".join(map(wrapped, events)),
        wire.encode_lines(events),
        b"".join(map(wrapped, events[:3])) + wire.encode_lines(events),
    ]


def changed(data: bytes, chance: random.Random) -> bytes:
    """Return a file with a few changes: bits, bytes, pieces, lines, and values of its JSON."""
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        at, end = sorted(chance.choices(range(len(data) + 1), k=2))
        lines = data.splitlines(keepends=True) or [b""]
        number = chance.randrange(len(lines))
        kind = chance.randrange(8)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1:]
        elif kind == 1:
            data = data[:at] + chance.choice(HUGE) + data[at:]
        elif kind == 2:
            data = data[:at] + data[min(end, at + chance.choice([1, 10, 1000])):]
        elif kind == 3:
            data = data[:at] + data[at:end] * 2 + data[end:]
        elif kind == 4:
            data = b"".join(lines[:number] + lines[number + 1:])
        elif kind == 5:
            data = b"".join(
                lines[:number]
                + [lines[number][: chance.randrange(len(lines[number]) + 1)]]
                + lines[number + 1 :]
            )
        else:
            with contextlib.suppress(ValueError, RecursionError):
                lines[number] = (
                    json.dumps(other_value(json.loads(lines[number]), chance)).encode() + b"\n"
                )
                data = b"".join(lines)
    return data


def other_value(value: Any, chance: random.Random) -> Any:
    """Return a JSON value with another one somewhere in it."""
    if chance.random() < 0.7 and isinstance(value, dict) and value:
        key = chance.choice(list(value))
        return {**value, key: other_value(value[key], chance)} if chance.random() < 0.9 else {
            each: value[each] for each in value if each != key}
    return chance.choice(
        [
            None,
            True,
            -1,
            0,
            1.5,
            2**63,
            10**400,
            "",
            "x",
            "\0",
            "\ud800",
            [],
            {},
            [[]],
            {"": {}},
            "0" * 32,
            "z" * 32,
            "1" * 70_000,
            "0001-01-01T00:00:00Z",
            "9999-12-31T23:59:59.999999Z",
            "2026-13-01",
            [value, value],
        ]
    )


class Picky:
    """A sink that takes most of what it gets, and remembers that."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.taken = 0

    def write(self, events: Sequence[Event]) -> None:
        draw = self._chance.random()
        if draw < 0.05:
            raise PermanentSinkError("not these")
        if draw < 0.06:
            raise TemporarySinkError("not now")
        self.taken += len(events)

    def close(self) -> None:
        pass


def mutate(folder: str, seconds: float, seed: int) -> None:
    """Change files and use them, for so many seconds; print how often."""
    os.chdir(folder)
    logging.getLogger("bgworker").disabled = True
    originals = specimens()
    rounds = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        chance = random.Random(seed + rounds)
        data = changed(chance.choice(originals), chance)
        rounds += 1
        faulthandler.dump_traceback_later(60, exit=True)
        try:
            check_replay(data, chance)
            check_reopened(data)
            check_copied(data)
            check_memory()
        except BaseException:
            Path("failing").write_bytes(data)
            print(f"seed {seed + rounds - 1}")
            raise
        for name in os.listdir():
            os.unlink(name)
    faulthandler.cancel_dump_traceback_later()
    print(rounds, "files")


def check_replay(data: bytes, chance: random.Random) -> None:
    """What a replay leaves is what was there but for whole lines, as many as the sink took."""
    path, sink = Path("park"), Picky(chance)
    path.write_bytes(data)
    inode = path.stat().st_ino
    with contextlib.suppress(SinkError):
        replay(path, sink, batch_size=chance.choice([1, 3, 500]))
    left, before = path.read_bytes().split(b"\n") if path.exists() else [b""], data.split(b"\n")
    remaining = iter(before)
    assert all(
        line in remaining for line in left
    ), "a line that stayed is another, or in another place"
    assert len(before) - len(left) <= sink.taken
    assert (
        left != before or path.stat().st_ino == inode
    ), "nothing was removed, and yet the file was written anew"


def check_reopened(data: bytes) -> None:
    """A file is refused as it is, or keeps all its lines; a torn one is beside it."""
    path = Path("lines.jsonl")
    path.write_bytes(data)
    sink = JsonlSink(path)
    try:
        sink.write(said(1))
    except PermanentSinkError:
        assert path.read_bytes() == data and not Path("lines.jsonl.torn").exists()
        return
    finally:
        sink.close()
    after, whole = path.read_bytes(), data[:data.rfind(b"\n") + 1]
    torn = Path("lines.jsonl.torn").read_bytes() if Path("lines.jsonl.torn").exists() else b""
    new = wire.encode_lines(said(1))
    assert (
        after == whole + new
        and torn in (b"", data[len(whole) :] + b"\n")
        or after == data + b"\n" + new
    )


def check_copied(data: bytes) -> None:
    """What a history has taken comes back from its export."""
    Path("copied").write_bytes(data)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        codes = [
            main(["replay", "copied", "--to", "sqlite:copy.db"]),
            main(["export", "--db", "copy.db", "--jsonl", "again.jsonl"]),
        ]
    assert codes[0] in (0, 1) and codes[1] == 0 and "Traceback" not in errors.getvalue(), (
        codes,
        errors.getvalue(),
    )
    with open("again.jsonl", encoding="utf-8") as lines:
        for line in lines:
            wire.decode(line)


def run_mutations(seconds: float, seed: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        done = in_child("mutate", folder, seconds, seed, seconds=seconds + 300)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout.strip()


@posix
def test_changed_files_are_replayed_reopened_and_copied_without_harm() -> None:
    assert int(run_mutations(3.0, 17).split()[0]) > 0

"""The lock of a history: bytes that tell other processes that something is alive. (What its
lock excludes: test_faults_jsonl.)"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bgworker.history import presencelock
from bgworker.sinks import lockfile
from tests.asking import AskingLock
from tests.support import ROOT, needs_fork

FAR = 1 + 0xFFF_FFFF_FFFF_FFFF
OTHER = """
import sys
from tests.asking import AskingLock
lock = AskingLock.share(sys.argv[1])
while line := sys.stdin.readline():
    verb, _, offset = line.strip().partition(" ")
    if verb == "lock":
        with lock:
            print("locked", flush=True)
            sys.stdin.readline()
        print("free", flush=True)
    else:
        print(getattr(lock, verb)(int(offset)), flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "f.lock")


@pytest.fixture
def lock(path: str) -> Iterator[AskingLock]:
    lock = AskingLock.share(path)
    yield lock
    lock.leave()


Ask = Callable[[str], str]


@pytest.fixture
def other(path: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses the lock file as it is told, line by line."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, path],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    yield process
    process.kill()
    process.communicate(timeout=60)


def ask(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("offset", [1, 2**31, FAR])
def test_a_byte_that_is_held_is_seen_by_its_own_process_and_by_others_until_it_is_released(
        lock: AskingLock, other: subprocess.Popen[str], offset: int) -> None:
    lock.hold(offset)
    assert (lock.is_held(offset), ask(other, f"is_held {offset}")) == (True, "True")
    assert (lock.is_held(offset + 1), ask(other, f"is_held {offset + 1}")) == (False, "False")
    assert ask(other, f"is_held {offset}") == "True", "asking has not changed the answer"
    lock.release(offset)
    assert (lock.is_held(offset), ask(other, f"is_held {offset}")) == (False, "False")


def test_a_byte_that_another_process_holds_is_free_at_once_when_it_is_killed(
        lock: AskingLock, other: subprocess.Popen[str]) -> None:
    ask(other, "hold 7")
    assert lock.is_held(7)
    other.kill()
    other.wait(60)
    assert not lock.is_held(7)


def test_a_byte_held_twice_stays_held_until_it_is_released_twice(
    lock: AskingLock, other: subprocess.Popen[str]
) -> None:
    lock.hold(7)
    lock.hold(7)
    lock.release(7)
    assert ask(other, "is_held 7") == "True"
    lock.release(7)
    lock.release(7)
    assert ask(other, "is_held 7") == "False"


def test_holding_a_byte_and_holding_the_lock_do_not_get_into_each_others_way(
        lock: AskingLock, other: subprocess.Popen[str]) -> None:
    ask(other, "hold 7")
    lock.hold(8)
    with lock:
        assert ask(other, "is_held 8") == "True"
    assert ask(other, "lock") == "locked"
    assert lock.is_held(7)
    assert ask(other, "") == "free"


def test_asking_creates_no_lock_file(lock: AskingLock, path: str) -> None:
    assert not lock.is_held(7)
    assert not os.path.exists(path)


@needs_fork
def test_a_process_that_asked_first_can_still_lock_and_hold(
    lock: AskingLock, other: subprocess.Popen[str]
) -> None:
    ask(other, "hold 7")
    assert lock.is_held(7)
    lock.hold(8)
    assert ask(other, "is_held 8") == "True"


@needs_fork
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write to everything"
)
def test_who_may_only_read_the_lock_file_may_ask(
    lock: AskingLock, path: str, other: subprocess.Popen[str]
) -> None:
    ask(other, "hold 7")
    os.chmod(path, 0o444)
    assert lock.is_held(7) and not lock.is_held(8)


@needs_fork
def test_who_asked_through_a_descriptor_that_only_reads_can_still_lock_later(
    lock: AskingLock, path: str, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(other, "hold 7")
    real_open = os.open

    def refuse_writing(name: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", name)
        return real_open(name, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse_writing)
        assert lock.is_held(7) and not lock.is_held(8)
    lock.hold(8)
    assert ask(other, "is_held 8") == "True"


@needs_fork
def test_what_was_held_on_a_deleted_file_counts_again_from_the_next_use_of_the_lock(
        lock: AskingLock, path: str, other: subprocess.Popen[str]) -> None:
    lock.hold(7)
    os.unlink(path)
    assert ask(other, "is_held 7") == "False"
    with lock:
        pass
    assert ask(other, "is_held 7") == "True"
    os.unlink(path)
    lock.hold(8)
    assert (ask(other, "is_held 7"), ask(other, "is_held 8")) == ("True", "True")


@needs_fork
def test_a_byte_counts_as_abandoned_only_on_the_file_on_which_it_was_held(
        lock: AskingLock, path: str, other: subprocess.Popen[str]) -> None:
    assert not lock.is_abandoned(7), "there is no file"
    ask(other, "hold 7")
    assert not lock.is_abandoned(7) and not lock.is_abandoned(8)
    os.unlink(path)
    assert not lock.is_abandoned(7)
    lock.hold(8)
    assert not lock.is_abandoned(7), "the new file does not know of it"
    ask(other, "hold 9")
    other.kill()
    other.wait(60)
    assert lock.is_abandoned(7) and lock.is_abandoned(9) and not lock.is_abandoned(8)


def test_nothing_is_held_once_the_last_user_has_left(
    path: str, other: subprocess.Popen[str]
) -> None:
    lock, again = AskingLock.share(path), AskingLock.share(path)
    lock.hold(7)
    lock.leave()
    assert ask(other, "is_held 7") == "True"
    again.leave()
    assert ask(other, "is_held 7") == "False"


@needs_fork
def test_a_forked_child_holds_nothing_and_takes_nothing_from_its_parent(
        lock: AskingLock, path: str, other: subprocess.Popen[str]) -> None:
    lock.hold(7)
    pid = os.fork()
    if pid == 0:
        try:
            assert lock.is_held(7), "the parent holds it"
            lock.hold(8)
            assert lock.is_held(8)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (ask(other, "is_held 7"), ask(other, "is_held 8")) == ("True", "False")


@needs_fork
def test_the_harness_would_notice_a_byte_that_is_held_in_name_only(
        lock: AskingLock, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with lock:
        pass
    monkeypatch.setattr(lockfile, "_try_lock", lambda fd, offset=0: True)
    lock.hold(7)
    assert ask(other, "is_held 7") == "False"


def test_threads_that_hold_lock_and_ask_at_once_do_not_disturb_each_other(lock: AskingLock) -> None:
    broken: list[str] = []

    def use(number: int) -> None:
        for _ in range(200):
            lock.hold(number)
            with lock:
                pass
            if not lock.is_held(number):
                broken.append(f"{number} is not held")
            lock.release(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not broken


# -- the file itself --


@needs_fork
def test_the_file_notes_who_died_and_who_has_not_recorded_its_end_and_does_not_grow_with_the_others(
        lock: AskingLock, path: str, other: subprocess.Popen[str]) -> None:
    for number in range(1, 300):
        lock.hold(number)
        lock.release(number, forget=True)
    ask(other, "hold 7")
    lock.hold(8)
    lock.release(8)
    assert os.path.getsize(path) < 20
    other.kill()
    other.wait(60)
    assert [lock.is_abandoned(number) for number in (6, 7, 8)] == [False, True, True]


def test_a_file_full_of_notes_forgets_the_dead_and_keeps_the_living(
    lock: AskingLock, path: str, monkeypatch: pytest.MonkeyPatch, other: subprocess.Popen[str]
) -> None:
    monkeypatch.setattr(presencelock, "_NOTE_BYTES", 200)
    lock.hold(9999)
    ask(other, "hold 8888")
    for number in range(1, 300):
        lock.hold(number)
        lock.release(number)
    assert os.path.getsize(path) < 220
    assert lock.is_abandoned(299) and not lock.is_abandoned(1)
    other.kill()
    other.wait(60)
    assert lock.is_abandoned(8888) and not lock.is_abandoned(9999)


@pytest.mark.parametrize("content", [b"somebody's text", b"\0" * 9, b"\n7\n{}"], ids=repr)
def test_a_file_that_holds_something_else_is_locked_and_not_written_to(
        lock: AskingLock, path: str, other: subprocess.Popen[str], content: bytes) -> None:
    Path(path).write_bytes(content)
    ask(other, "hold 7")
    assert lock.is_held(7) and not lock.is_abandoned(7)
    with lock:
        assert Path(path).read_bytes() == content or os.name == "nt"
    other.kill()
    other.wait(60)
    assert not lock.is_abandoned(7), "nothing can be told of it"
    assert Path(path).read_bytes() == content


@needs_fork
def test_a_huge_file_is_not_read(lock: AskingLock, path: str) -> None:
    import tracemalloc

    with open(path, "wb") as file:
        file.truncate(20 << 30)
    tracemalloc.start()
    try:
        lock.hold(7)
        assert not lock.is_abandoned(8)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@needs_fork
def test_a_hard_link_to_another_file_is_not_written_to(
    lock: AskingLock, path: str, tmp_path: Path
) -> None:
    (tmp_path / "victim").touch()
    os.link(tmp_path / "victim", path)
    lock.hold(7)
    lock.release(7)
    with lock:
        pass
    assert (tmp_path / "victim").read_bytes() == b""

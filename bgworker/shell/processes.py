"""Which processes a command has, and signals to them. Any thread; nothing here waits.

A command's leader makes a session of its own. Its processes are all in that session, in whatever
group (`timeout`, `make` and shells with job control make groups), and its strays: what descends
from these in sessions of their own (`setsid`, `script`). A daemon, which made itself a session and
whose parent has ended, is neither, and lives on.

No signal reaches a stranger: the leader's number names nobody else until the leader is reaped, a
descendant can only be in a session that the command made, and a process that was seen before is
known again by the time when it started.

Linux tells all of it in /proc. Elsewhere `ps` is asked when there is something to end; without
either, the leader's group alone is signalled.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from itertools import islice
from math import inf

from ..model.clock import monotonic
from ..model.forks import in_child
from ..model.text import sanitise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Process:
    """A process, as it was when it was looked at."""

    __slots__ = ("pid", "parent", "group", "session", "started", "runs")

    def __init__(
        self, pid: int, parent: int, group: int, session: int, started: str, runs: bool
    ) -> None:
        self.pid = pid
        self.parent = parent
        self.group = group
        self.session = session
        self.started = started
        """In some unit; empty where that is not told."""
        self.runs = runs
        """False for a zombie."""


class Family:
    """The processes of one command.

    Args:
        leader: the process that made the session, which must not be reaped while this is used.
    """

    def __init__(self, leader: int) -> None:
        self._leader = leader
        # as last seen; when their parents end, nothing else tells whose they are
        self._strays: list[Process] = []

    def is_alive(self) -> bool:
        """Tell whether any but the leader, which has exited, still runs; False where that cannot be
        known."""
        return self.is_session_alive() or any(map(_still_runs, self._strays))

    def is_session_alive(self) -> bool:
        """As `is_alive`, without the strays."""
        if sys.platform == "linux":
            try:
                return _session_runs(self._leader)
            except OSError:
                return True  # no descriptor is left to look with
        if sys.platform != "darwin":
            return False
        try:
            os.killpg(self._leader, 0)  # zombies do not count there
            return True
        except PermissionError:
            # only zombies are left; or processes of another user, which `sudo` started
            return any(
                each.group == self._leader and each.runs for each in _all_processes().values()
            )
        except OSError:
            return False

    def signal(self, number: int, *, strays: bool) -> None:
        """Send a signal to all of the session and, with ``strays``, to the strays. Processes of
        another user do not get it."""
        # first: when a parent has ended, nothing tells whose its children were
        members = self._members()
        # the whole group at once, whatever it forks meanwhile
        _send(os.killpg, self._leader, number)
        self._strays = [each for each in members if each.session != self._leader]
        for each in members:
            if (
                each.group != self._leader
                and (strays or each.session == self._leader)
                and _still_runs(each)
            ):
                _send(os.kill, each.pid, number)

    def kill_group(self) -> None:
        """Kill all of the leader's group. Costs next to nothing."""
        _send(os.killpg, self._leader, signal.SIGKILL)

    def described(self) -> str:
        """Return the numbers and names of the leader and what descends from it, as far as the
        system tells that without a look at all processes."""
        names = dict(islice(_descendants(self._leader), MOST_DESCRIBED))
        return ", ".join([f"{pid} ({name})" if name else str(pid) for pid, name in names.items()])

    def _members(self) -> list[Process]:
        try:
            processes = _all_processes()
        except OSError:
            # no descriptor is left to look with; the next signal reaches the rest
            return self._strays
        known = [each for each in self._strays
                 if each.pid in processes and processes[each.pid].started == each.started]
        pids = {self._leader, *(each.pid for each in known)}
        sessions = {self._leader, *(each.session for each in known)}
        count = 0
        while count < len(pids):
            count = len(pids)
            for each in processes.values():
                if each.parent in pids or each.session in sessions:
                    pids.add(each.pid)
                    sessions.add(each.session)
        return [each for each in processes.values() if each.pid in pids and each.runs]


MOST_DESCRIBED = 20
"""Processes of a command that are named."""


def _descendants(pid: int) -> Iterator[tuple[int, str]]:
    """Yield numbers and names of a process and of what descends from it, depth first; a number
    alone where there is no /proc."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            name = sanitise(file.read(64).decode(errors="replace").strip())
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        name, threads = "", []
    yield pid, name
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                children = file.read().split()
        except OSError:  # it has ended, or this kernel does not tell
            continue
        for child in children:
            yield from _descendants(int(child))


def signal_all(number: int) -> None:
    """Send a signal to the processes of all commands of this process, strays too."""
    me = os.getpid()
    for each in list(_all_processes().values()):
        if each.parent == me and each.pid == each.session:
            Family(each.pid).signal(number, strays=True)


def _send(how: Callable[[int, int], None], to: int, number: int) -> None:
    try:
        how(to, number)
    except OSError:
        pass  # nobody is left there, or nobody of ours


def _still_runs(process: Process) -> bool:
    if not process.started:
        return True  # all that `ps` tells is that it did when it was asked
    try:
        now = _process(process.pid)
    except OSError:
        return True  # as above
    return now is not None and now.runs and now.started == process.started


def _session_runs(leader: int) -> bool:
    # killpg(leader, 0) counts zombies: the leader, and orphans in a container whose first process
    # reaps nobody.
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        try:
            is_candidate = (
                name.isdecimal() and int(name) != leader and os.getsid(int(name)) == leader
            )
        except OSError:
            continue  # it has ended meanwhile
        if is_candidate and (process := _process(int(name))) is not None and process.runs:
            return True
    return False


# ---------------------------------------------------------------- all processes

_lock = threading.RLock()  # guards the two below; re-entrant because a signal handler may look, too
_seen: dict[int, Process] = {}
_seen_from = -inf


def _all_processes() -> dict[int, Process]:
    """Return all processes of the system that can be seen, by number, as of now or a moment later.

    Threads that ask while another one looks share the next look: a Ctrl-C ends hundreds of commands
    at once.
    """
    global _seen, _seen_from
    asked_at = monotonic()
    with _lock:
        if _seen_from < asked_at:
            begun = monotonic()
            listed = _listed_in_proc() if os.path.isdir("/proc/self") else _listed_by_ps()
            _seen, _seen_from = {each.pid: each for each in listed}, begun
        return _seen


def _listed_in_proc() -> Iterator[Process]:
    for name in filter(str.isdecimal, os.listdir("/proc")):
        if (process := _process(int(name))) is not None:
            yield process


def _process(pid: int) -> Process | None:
    """Read one process from Linux's /proc; None when there is none. Source: proc(5),
    /proc/pid/stat."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent, group, session, started = *fields[:4], fields[19]
    return Process(
        pid, int(parent), int(group), int(session), started.decode(), state not in (b"Z", b"X")
    )


def _listed_by_ps() -> Iterator[Process]:
    try:
        listing = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,pgid=,stat="],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    except OSError:
        return
    for line in listing.splitlines():
        pid, parent, group, state = line.split(None, 3)
        try:
            session = os.getsid(int(pid))
        except OSError:
            continue  # it has ended meanwhile
        yield Process(int(pid), int(parent), int(group), session, "", not state.startswith("Z"))


@in_child
def _renew_lock() -> None:
    """In a forked child: the lock may be held by a thread that is not here."""
    global _lock
    _lock = threading.RLock()

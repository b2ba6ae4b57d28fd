"""Ids sort by creation time and are never given twice, by whatever thread and process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid

import pytest
from hypothesis import given, strategies as st

from bgworker.model.ids import SHORT, is_own_run, new_id, new_run_id

NOW = 1_800_000_000_000_000_000


@given(st.integers(0, 2 ** 48 * 1_000_000 - 1))
def test_an_id_is_32_lower_case_hex_digits_and_a_uuid_of_version_7(ns: int) -> None:
    made = new_id(ns)
    assert len(made) == 32 and made == made.lower() and int(made, 16) >= 0
    as_uuid = uuid.UUID(made)
    assert (as_uuid.version, as_uuid.variant) == (7, uuid.RFC_4122)
    assert int(made[:12], 16) == ns // 1_000_000


@given(st.lists(st.integers(NOW, NOW + 10 ** 10), min_size=2, max_size=20))
def test_ids_sort_as_their_times_do_down_to_a_quarter_of_a_microsecond(times: list[int]) -> None:
    times.sort()
    ids = [new_id(each) for each in times]
    for (first, before), (second, after) in zip(zip(times, ids), zip(times[1:], ids[1:])):
        assert before < after or second - first < 245


def test_ids_of_the_same_moment_differ_and_ascend() -> None:
    ids = [new_id(NOW) for _ in range(1000)]
    assert ids == sorted(set(ids))


def test_ids_of_many_threads_differ() -> None:
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append([new_id(NOW) for _ in range(5000)]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len({each for ids in found for each in ids}) == 20_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_continue_its_parents_ids() -> None:
    program = (
        "import os, sys\nfrom bgworker.model.ids import new_id\nnew_id(5)\nread, write = "
        "os.pipe()\n"
        "if os.fork() == 0:\n    os.write(write, new_id(5).encode()); os._exit(0)\n"
        "os.wait()\nchild = os.read(read, 100).decode()\nprint(child, new_id(5))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    child, parent = done.stdout.split()
    assert child[:16] == parent[:16]
    assert child[16:24] != parent[16:24] and child[24:] != parent[24:]


def test_the_last_digits_tell_ids_of_one_moment_and_of_many_processes_apart() -> None:
    program = "from bgworker.model.ids import new_id\nprint(*[new_id(5)[-8:] for _ in range(20)])"
    found = [new_id(NOW)[-SHORT:] for _ in range(20)]
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                              timeout=60, check=True)
        found += done.stdout.split()
    assert len(set(found)) == 80


def test_a_process_knows_its_own_runs_from_others() -> None:
    run_id = new_run_id(NOW)
    assert is_own_run(run_id) and not is_own_run(new_id(NOW))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_owns_the_runs_its_schedulers_go_on_under_and_not_those_of_its_parent() -> (
    None
):
    program = (
        "import os\nfrom bgworker import Scheduler\nfrom bgworker.model.ids import is_own_run\n"
        "pool = Scheduler()\nbefore = pool.run_id\nassert is_own_run(before)\n"
        "if os.fork() == 0:\n    os._exit(2 * is_own_run(before) + (not is_own_run(pool.run_id)))\n"
        "assert os.wait()[1] == 0 and is_own_run(before)\npool.shutdown()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ns", [-1, -1_000_001, -10 ** 18, 0])
def test_a_clock_before_1970_makes_whole_ids(ns: int) -> None:
    for _ in range(2):
        assert len(new_id(ns)) == 32 and int(new_id(ns)[:12], 16) == 0

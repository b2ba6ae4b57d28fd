#!/usr/bin/env python3
"""Run the checks of delivery and of the history for longer than the tests do, on random histories
from a seed that is printed.

    python3 tools/stress.py                              all of them
    python3 tools/stress.py machine --examples 20000     one of them
    python3 tools/stress.py machine --seed 17            the same history again

Needs what the tests need: an environment with `.[dev]` installed. `tools/check.py` makes one in
`.venv`.

Exit code: 0 all passed, 1 a check failed, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def machine(examples: int, seed: int) -> None:
    """Sinks come, go, fail, hang, refuse and recover while tasks talk; EXAMPLES random
    histories."""
    import hypothesis

    from bgworker.delivery import dispatcher
    from tests.delivery import test_properties_delivery as properties

    dispatcher.GATHER = 0.001  # as the test does: the gathering adds nothing but time
    logging.getLogger("bgworker").disabled = True
    properties.run_machine(
        examples,
        30,
        hypothesis.seed(seed)(properties.DeliveryMachine),
        database=None,
        print_blob=True,
    )


def signals(examples: int, seed: int) -> None:
    """Ten seconds of signals whose handler emits."""
    from tests.delivery import test_faults_delivery as faults

    print("     ", faults.in_child("signal_storm", 10.0).strip())


def finalisers(examples: int, seed: int) -> None:
    """Ten seconds of garbage collection at every allocation, with finalisers that emit."""
    from tests.delivery import test_faults_delivery as faults

    print("     ", faults.in_child("collector_storm", 10.0).strip())


def forks(examples: int, seed: int) -> None:
    """Two hundred forks in the middle of bursts."""
    from tests.delivery import test_faults_delivery as faults

    with tempfile.TemporaryDirectory() as folder:
        faults.in_child("forks", 200, folder, seconds=600)


def stalled(examples: int, seed: int) -> None:
    """Five million events into a sink that hangs."""
    from tests.delivery import test_faults_delivery as faults
    from bgworker import SinkOptions

    print(
        "      grew by",
        faults.in_child(
            "stalled", 5_000_000, SinkOptions().queue_bytes, "x", 100, seconds=1200
        ).strip(),
    )


def kills(examples: int, seed: int) -> None:
    """A thousand kills of a process that writes one SQLite history."""
    from tests.history import test_faults_sqlite as faults

    with tempfile.TemporaryDirectory() as folder:
        reached = faults.run_kills(f"{folder}/history.db", 1000, seed)
    print("     ", ", ".join(f"{name}: {count}" for name, count in reached.items()))


def processes(examples: int, seed: int) -> None:
    """Thirty seconds of four processes that write one SQLite history, and a reader."""
    from tests.history import test_faults_sqlite as faults
    from bgworker.history.sink import SqliteSink

    with tempfile.TemporaryDirectory() as folder:
        print("     ", faults.run_crowd(f"{folder}/history.db", SqliteSink, 30.0), "rows")


def hostile(examples: int, seed: int) -> None:
    """SECONDS of hostile objects in every place where a user can put one."""
    from tests.model import test_faults_values as faults

    with tempfile.TemporaryDirectory() as folder:
        print("     ", faults.run_hostile(seed, folder, seconds=duration))


def links(examples: int, seed: int) -> None:
    """A hundred folders in which another user has set links, FIFOs and devices; then one that
    changes all the time."""
    from tests.sinks import test_faults_files as faults

    for number in range(100):
        faults.run_links(seed + number)
    faults.run_links(seed, moving=True)
    print("     ", "as two users" if faults.IS_ROOT else "as one user: only root can play two")


def mutated(examples: int, seed: int) -> None:
    """Five minutes of park files and JSONL files that were changed, through replay, a sink, a
    history and its export."""
    from tests.sinks import test_faults_files as faults

    print("     ", faults.run_mutations(300.0, seed))


def histories(examples: int, seed: int) -> None:
    """SECONDS of histories that were changed at random, in bytes and by SQL, through every verb."""
    from tests import mutations

    print("     ", mutations.run_for(duration, seed))


def control(examples: int, seed: int) -> None:
    """Random control of pools for SECONDS, a third of the time with SIGINT in a child process."""
    from tests.running import test_properties_control as properties

    rounds, ends = properties.run_for(duration * 2 / 3, seed)
    print(
        f"      {rounds} pools:",
        ", ".join(f"{count} {status}" for status, count in sorted(ends.items())),
        flush=True,
    )
    until, children, tasks = time.monotonic() + duration / 3, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < until:
            tasks += properties.interrupt_one(seed + children, Path(folder))
            children += 1
    print(f"      {children} children interrupted, {tasks} tasks recorded")


def resume(examples: int, seed: int) -> None:
    """SECONDS of five hundred resumable tasks each, whose processes are killed twenty times while
    two resume at once."""
    from tests.remote import crashing

    chance, until = random.Random(seed), time.monotonic() + duration
    rounds = begun = broken = 0
    while time.monotonic() < until:
        with tempfile.TemporaryDirectory() as folder:
            more, cut = crashing.run_kills(Path(folder), 500, 20, lambda: chance.uniform(0, 0.3))
        rounds, begun, broken = rounds + 1, begun + more, broken + cut
    print(f"      {rounds} times 500 tasks: {begun} begun, of which kills interrupted {broken}")


def remote(examples: int, seed: int) -> None:
    """Fifty kills of workers, fifty cuts of their connections, twenty kills of their program, and
    SECONDS of random control, on executors of each kind that has processes."""
    from tests.remote import breaking, engines

    names = [name for name in (*engines.PROCESS_POOLS, engines.LOKY) if not engines.missing(name)]
    for number, name in enumerate(names):
        for run, times in ((breaking.run_kills, 50), (breaking.run_cuts, 50),
                           (breaking.run_orphans, 20)):
            share = times // len(names) + (number < times % len(names))
            print(f"      {name}: {run(share, name, seed + number)}", flush=True)
        told = breaking.run_control(duration / len(names), name, seed + number)
        print(f"      {name}: {told}", flush=True)


CHECKS: dict[str, Callable[[int, int], None]] = {
    check.__name__: check
    for check in (
        machine,
        signals,
        finalisers,
        forks,
        stalled,
        kills,
        processes,
        hostile,
        links,
        control,
        mutated,
        histories,
        resume,
        remote,
    )
}

duration = 300.0  # seconds; set by --seconds


def main(argv: list[str]) -> int:
    global duration
    parser = argparse.ArgumentParser(
        description="Run the checks of delivery and of the history for longer than the tests do.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:<12}{check.__doc__}" for name, check in CHECKS.items()),
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKS)}; all without any"
    )
    parser.add_argument("--seed", type=int, help="of the random histories (default: a new one)")
    parser.add_argument(
        "--examples",
        type=int,
        default=2_000,
        help="histories of the state machine (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=duration,
        help="of the checks that go on for a time (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in CHECKS]
    if unknown or options.examples < 1:
        parser.error(f"expected some of {', '.join(CHECKS)}, got {unknown[0]!r}" if unknown
                     else f"--examples: expected at least 1, got {options.examples}")
    duration = options.seconds
    seed = random.SystemRandom().randrange(2 ** 32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    return (
        0 if all([passes(name, options.examples, seed) for name in options.names or CHECKS]) else 1
    )


def passes(name: str, examples: int, seed: int) -> bool:
    begun = time.monotonic()
    try:
        CHECKS[name](examples, seed)
        outcome = "ok"
    except Exception:
        traceback.print_exc()
        outcome = "FAIL"
    print(f"{outcome:<5} {name:<12} {time.monotonic() - begun:6.1f} s", flush=True)
    return outcome == "ok"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

#!/usr/bin/env python3
"""Measure bgworker beside its limits and beside the standard library, on this machine, as ratios.

    python3 tools/bench.py                      all benches but the next, as a Markdown table
    python3 tools/bench.py stores               of servers: needs PostgreSQL, psycopg, pymongo,
                                                secantusdb and nx-27017
    python3 tools/bench.py emit tasks           only these
    python3 tools/bench.py --json --rounds 9    the same as JSON, from more rounds

Absolute figures drift with the machine and its other work, so nothing is judged by them: in each
round all variants of a bench are measured one after the other, in an order that changes, and
compared with one another. A row shows the median, the least and the greatest ratio of all rounds.
Each bench has an interpreter of its own, the one that runs this tool, and the bgworker of this
checkout, installed or not. A bench that shows less than all events delivered says so under the
table.

Exit code: 0 measured (whatever came out), 1 a bench failed, 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import atexit
import concurrent.futures
import functools
import gc
import itertools
import json
import logging
import logging.handlers
import os
import platform
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, field
from datetime import datetime, timezone
from json.encoder import encode_basestring_ascii
from pathlib import Path
from time import gmtime, perf_counter, perf_counter_ns, sleep, strftime, time_ns
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PAYLOAD = "x" * 60
PAUSE = 0.03
"""Seconds between two slices of emits, not measured: with it the delivery of one slice runs beside
the next."""


# --- the frame ---


@dataclass(frozen=True)
class Row:
    """What one row of the table compares: the figures of two variants, as a ratio or a difference,
    or whether a check held."""

    what: str
    """With ``{0}`` and ``{1}`` where the two figures go."""
    over: tuple[str, str] | str
    """The variants whose figures are divided, or the name of a check."""
    wanted: str = ""
    """Such as "<= 1.5"; empty when nothing is demanded of the ratio."""
    figure: str = "{:,.0f} ns"
    """How a figure is written."""
    is_difference: bool = False
    """Whether the figures are subtracted instead: what one costs *more*, in their unit."""


@dataclass
class Round:
    """What variants say beside their figure."""

    figures: dict[str, float] = field(default_factory=dict)
    """Further ones, of the same measurement, by a name of their own."""
    checks: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Variant = Callable[[Round], float]


@dataclass(frozen=True)
class Bench:
    rows: Sequence[Row]
    variants: Callable[[], Mapping[str, Variant]]
    is_fresh: bool


BENCHES: dict[str, Bench] = {}
ONLY_NAMED = ("stores",)
"""Benches that run only when they are asked for: they need more than Python."""


def bench(rows: Sequence[Row], *, is_fresh: bool = False) -> Callable[[Any], Any]:
    """Make a function a bench, which goes by the function's name (without a last underscore).

    The function returns its variants by name; each call of a variant measures one figure. The table
    shows the ``rows``.

    Args:
        is_fresh: each round has an interpreter of its own, in which the variants run in the order
            of the mapping.
    """
    def register(
        function: Callable[[], Mapping[str, Variant]],
    ) -> Callable[[], Mapping[str, Variant]]:
        BENCHES[function.__name__.rstrip("_")] = Bench(rows, function, is_fresh)
        return function

    return register


def run_bench(name: str, rounds: int) -> dict[str, Any]:
    """Measure in this process; return figures by variant and checks by name, one of each per round,
    and the notes."""
    found = BENCHES[name]
    variants = found.variants()
    figures: dict[str, list[float]] = {variant: [] for variant in variants}
    checks: dict[str, list[bool]] = {}
    notes: list[str] = []
    for number in range(0 if found.is_fresh else -1, rounds):
        # the first of several rounds warms up, and is forgotten
        said = Round()
        order = list(variants) if found.is_fresh or number % 2 else list(reversed(variants))
        for variant in order:
            gc.collect()
            figure = variants[variant](said)
            if number >= 0:
                figures[variant].append(figure)
        if number >= 0:
            notes += said.notes
            for further, figure in said.figures.items():
                figures.setdefault(further, []).append(figure)
            for check, held in said.checks.items():
                checks.setdefault(check, []).append(held)
    return {"figures": figures, "checks": checks, "notes": notes}


def run_in_child(name: str, rounds: int) -> dict[str, Any]:
    """Measure in a fresh interpreter, or in one per round."""
    shares = [1] * rounds if BENCHES[name].is_fresh else [rounds]
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "BGWORKER_"))
    }
    merged: dict[str, Any] = {"figures": {}, "checks": {}, "notes": []}
    for share in shares:
        done = subprocess.run(
            [sys.executable, __file__, "--child", name, "--rounds", str(share)],
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        part = json.loads(done.stdout)
        for kind in ("figures", "checks"):
            for key, values in part[kind].items():
                merged[kind].setdefault(key, []).extend(values)
        merged["notes"] += part["notes"]
    return merged


def rows_of(name: str, measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Return what the table and the JSON say of one bench."""
    for row in BENCHES[name].rows:
        if isinstance(row.over, str):
            held = measured["checks"].get(row.over, [])
            yield {
                "name": name,
                "what": row.what,
                "is_difference": False,
                "median": None,
                "least": None,
                "greatest": None,
                "figures": None,
                "held": sum(held),
                "of": len(held),
                "wanted": "always",
                "met": bool(held) and all(held),
            }
            continue
        ours, other = (measured["figures"][variant] for variant in row.over)
        ratios = [a - b if row.is_difference else a / b for a, b in zip(ours, other)]
        median = statistics.median(ratios)
        middle = [statistics.median(ours), statistics.median(other)]
        what = row.what.format(*map(row.figure.format, middle))
        yield {
            "name": name,
            "what": what,
            "is_difference": row.is_difference,
            "median": median,
            "least": min(ratios),
            "greatest": max(ratios),
            "figures": middle,
            "held": None,
            "of": len(ratios),
            "wanted": row.wanted or None,
            "met": is_met(median, row.wanted) if row.wanted else None,
        }


def is_met(ratio: float, wanted: str) -> bool:
    operator, bound = wanted.split()
    return ratio <= float(bound) if operator == "<=" else ratio >= float(bound)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| name | what | median | spread | wanted | met? |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["median"] is None:
            ratio, spread = f"{row['held']} of {row['of']}", ""
        else:
            ratio, spread = f"{row['median']:.3g}", f"{row['least']:.3g} .. {row['greatest']:.3g}"
        met = {True: "yes", False: "**no**", None: ""}[row["met"]]
        lines.append(
            f"| {row['name']} | {row['what']} | {ratio} | {spread} | {row['wanted'] or ''} | "
            f"{met} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Measure bgworker beside its limits and beside the standard library."
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"benches to run, of: {', '.join(BENCHES)} (default: all "
        f"but {', '.join(ONLY_NAMED)}, which needs PostgreSQL and psycopg)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="rounds to measure (default: 5)"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in BENCHES]
    if unknown:
        parser.error(f"no such bench: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.child:
        print(json.dumps(run_bench(options.names[0], options.rounds)))
        return 0

    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    failed: list[str] = []
    for name in options.names or [name for name in BENCHES if name not in ONLY_NAMED]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            measured = run_in_child(name, options.rounds)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name}: its interpreter ended with exit code {error.returncode}")
            continue
        rows += rows_of(name, measured)
        notes += [f"{name}: {note}" for note in measured["notes"]]
    if options.json:
        print(
            json.dumps(
                {
                    "python": platform.python_version(),
                    "rounds": options.rounds,
                    "rows": rows,
                    "notes": notes,
                    "failed": failed,
                },
                indent=2,
            )
        )
    else:
        print(f"Python {platform.python_version()}, {options.rounds} rounds\n\n{table(rows)}")
        for line in dict.fromkeys(notes + failed):
            print(f"\n{line}")
    return 1 if failed else 0


# --- what the benches share ---


class NullSink:
    """Takes everything and does nothing, but count."""

    preferred_batch = 5000

    def __init__(self) -> None:
        self.count = 0

    def write(self, events: Sequence[Any]) -> None:
        self.count += len(events)

    def close(self) -> None:
        pass


@contextmanager
def scratch_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="bgworker-bench-") as folder:
        yield os.path.join(folder, "bench.jsonl")


def note_losses(said: Round, scheduler: Any) -> None:
    """Tell if a sink did not get all events: then the figure is that of less work."""
    for name, health in scheduler.sinks.items():
        if health.delivered != health.emitted:
            said.notes.append(
                f"sink {name!r} got {health.delivered:,} of {health.emitted:,} events: "
                f"{dict(health.dropped_by_reason)}, {health.pending:,} pending"
            )


def in_slices(emit: Callable[[Any], object], slices: int, size: int, pause: float = PAUSE) -> float:
    """Call ``emit`` with a fresh text of 60 characters, slices * size times; return nanoseconds per
    call."""
    total = 0
    for _ in range(slices):
        texts = fresh_texts(size)
        begun = perf_counter_ns()
        for text in texts:
            emit(text)
        total += perf_counter_ns() - begun
        sleep(pause)
    return total / (slices * size)


def fresh_texts(count: int) -> list[str]:
    return [f"{number:060}" for number in range(count)]


def paced(emit: Callable[[Any], object], count: int, pace_ns: int) -> list[int]:
    """Call ``emit`` every ``pace_ns``, waiting busily in between; return the nanoseconds that each
    call took, sorted."""
    took = []
    due = perf_counter_ns()
    for _ in range(count):
        due += pace_ns
        while (begun := perf_counter_ns()) < due:
            pass
        emit(PAYLOAD)
        took.append(perf_counter_ns() - begun)
        if begun - due > 50 * pace_ns:
            due = begun  # after a long pause go on at the pace, without catching up in a burst
    took.sort()
    return took


def percentile(ordered: Sequence[int], percent: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def emit_patiently(texts: Sequence[str]) -> None:
    """Emit texts no faster than the sinks keep up, as the reader of a pipe does, so that all of
    them arrive."""
    from bgworker import current_task

    task = current_task()
    waiting = iter(texts)
    while chunk := list(itertools.islice(waiting, task._wait_for_room(60))):
        for text in chunk:
            task.output(text)


def check_delivered(scheduler: Any, sink: str, count: int) -> None:
    delivered = scheduler.sinks[sink].delivered
    if delivered != count:
        raise RuntimeError(
            f"sink {sink!r} got {delivered} of {count} events: {scheduler.sinks[sink]}"
        )


def task_output() -> Callable[[Any], None]:
    from bgworker import current_task

    return current_task().output


@contextmanager
def queue_logger(handler: logging.Handler) -> Iterator[logging.Logger]:
    """A logger that hands its records to a thread, as the standard library's cookbook has it."""
    records: queue.SimpleQueue[Any] = queue.SimpleQueue()
    logger = logging.getLogger("bench")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.handlers.QueueHandler(records)]  # type: ignore[arg-type]
    listener = logging.handlers.QueueListener(records, handler)  # type: ignore[arg-type]
    listener.start()
    try:
        yield logger
    finally:
        listener.stop()


class NullHandler(logging.Handler):
    def handle(self, record: logging.LogRecord) -> bool:
        return True


def bare_put() -> Callable[[Any], None]:
    """What is least: the same fields, with the time, into a queue."""
    put = queue.SimpleQueue[Any]().put
    state = object()
    return lambda text: put((state, 8, time_ns(), text))


# --- the benches ---

IMPORTS = 15
"""Interpreters started per variant and round."""


@bench(
    [
        Row(
            "import bgworker {0} over import concurrent.futures.thread, dataclasses, json {1}",
            ("bgworker", "standard"),
            "<= 1.3",
            "{:.1f} ms",
        )
    ]
)
def import_() -> Mapping[str, Variant]:
    """Start of an interpreter that imports, less that of a bare one right after it, with warm
    bytecode."""
    def milliseconds(statement: str) -> float:
        begun = perf_counter()
        subprocess.run(
            [
                sys.executable,
                "-I",
                "-c",
                f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}",
            ],
            check=True,
        )
        return (perf_counter() - begun) * 1000

    def over_bare(statement: str) -> Variant:
        milliseconds(statement)  # writes the bytecode
        return lambda said: statistics.median(
            milliseconds(statement) - milliseconds("pass") for _ in range(IMPORTS)
        )

    return {"bgworker": over_bare("import bgworker"),
            "standard": over_bare("import concurrent.futures.thread, dataclasses, json")}


CHATTY = ["seq", "2000000"]


@bench(
    [
        Row(
            "bgworker run --no-db of two million lines {0} over GNU parallel, or cat where "
            "that is not installed, {1}",
            ("run", "plain"),
            "<= 12.5",
            "{:.2f} s",
        ),
        Row(
            "peak memory of that run {0} over that of one that says a line {1}",
            ("run MiB", "one line MiB"),
            "",
            "{:.0f} MiB",
        ),
    ]
)
def run() -> Mapping[str, Variant]:
    """A chatty command on the command line, its output read by nobody in particular."""
    def child(*words: str) -> tuple[float, float]:
        """Return seconds and the peak of resident MiB."""
        begun = perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, words
        return perf_counter() - begun, usage.ru_maxrss / 1024

    def ours(said: Round) -> float:
        command = [sys.executable, "-m", "bgworker", "run", "--no-db", "--"]
        seconds, said.figures["run MiB"] = child(*command, *CHATTY)
        _, said.figures["one line MiB"] = child(*command, "echo")
        return seconds

    def plain(said: Round) -> float:
        if shutil.which("parallel"):
            return child("parallel", ":::", " ".join(CHATTY))[0]
        return child("sh", "-c", f"{' '.join(CHATTY)} | cat")[0]

    return {"plain": plain, "run": ours}


@bench([Row("output() {0} over SimpleQueue.put of a tuple {1}", ("one", "bare"), "<= 2"),
        Row("output() {0} over logging's QueueHandler {1}", ("one", "logging"), "<= 0.0667"),
        Row("output() with three sinks {0} over one {1}", ("three", "one"), "<= 1.5")])
def emit() -> Mapping[str, Variant]:
    """What an emit costs the task's thread while delivery runs beside it."""
    from bgworker import Scheduler

    def ours(sinks: int) -> Variant:
        def figure(said: Round) -> float:
            with Scheduler(1, sinks=[NullSink() for _ in range(sinks)]) as scheduler:
                figure = scheduler.submit(lambda: in_slices(task_output(), 10, 20_000)).result()
                scheduler.flush(30)
                note_losses(said, scheduler)
            return figure

        return figure

    def logs(said: Round) -> float:
        with queue_logger(NullHandler()) as logger:
            return in_slices(logger.info, 10, 3_000)

    return {
        "bare": lambda said: in_slices(bare_put(), 10, 20_000),
        "one": ours(1),
        "three": ours(3),
        "logging": logs,
    }


@bench(
    [
        Row(
            "p99.9 of output() every 20 us: microseconds that a JSONL sink {0} has over a "
            "no-op sink {1}",
            ("jsonl", "null"),
            "<= 3",
            "{:.2f} us",
            is_difference=True,
        ),
        Row(
            "p99.9 with a JSONL sink {0} over SimpleQueue.put, nobody reading {1}",
            ("jsonl", "bare"),
            "",
            "{:.2f} us",
        ),
        Row(
            "... over logging's QueueHandler, a file handler behind it {1}",
            ("jsonl", "logging"),
            "",
            "{:.2f} us",
        ),
    ]
)
def tail() -> Mapping[str, Variant]:
    """How long the slowest emits take, at a pace."""
    from bgworker import Scheduler

    def slowest(emit: Callable[[Any], object]) -> float:
        return percentile(paced(emit, 50_000, 20_000), 99.9) / 1000

    def with_sink(sink: Any, said: Round) -> float:
        with Scheduler(1, sinks=[sink]) as scheduler:
            figure = scheduler.submit(lambda: slowest(task_output())).result()
            scheduler.flush(30)
            note_losses(said, scheduler)
        return figure

    def jsonl(said: Round) -> float:
        with scratch_file() as path:
            return with_sink(f"jsonl:{path}", said)

    def logs(said: Round) -> float:
        with scratch_file() as path:
            handler = logging.FileHandler(path)
            with queue_logger(handler) as logger:
                figure = slowest(logger.info)
            handler.close()
        return figure

    return {"null": lambda said: with_sink(NullSink(), said), "jsonl": jsonl, "logging": logs,
            "bare": lambda said: slowest(bare_put())}


TASKS = 20_000


def nothing() -> None:
    """What the tasks do."""


def take_results(submit: Callable[[Callable[[], None]], Any], count: int) -> None:
    for future in [submit(nothing) for _ in range(count)]:
        future.result()


def wait_for_all(submit: Callable[[Callable[[], None]], Any], count: int) -> None:
    concurrent.futures.wait([submit(nothing) for _ in range(count)])


def take_as_completed(submit: Callable[[Callable[[], None]], Any], count: int) -> None:
    for future in concurrent.futures.as_completed([submit(nothing) for _ in range(count)]):
        future.result()


def be_called_back(submit: Callable[[Callable[[], None]], Any], count: int) -> None:
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(count):
        submit(nothing).add_done_callback(results.put)
    for _ in range(count):
        results.get()


def take_one_at_a_time(submit: Callable[[Callable[[], None]], Any], count: int) -> None:
    for _ in range(count):
        submit(nothing).result()


def map_all(executor: Any, count: int) -> None:
    for _ in executor.map(lambda _: None, range(count)):
        pass


WAYS: dict[str, tuple[Callable[[Any, int], None], int]] = {
    "a loop of result()": (lambda executor, count: take_results(executor.submit, count), TASKS),
    "map": (map_all, TASKS),
    "wait": (lambda executor, count: wait_for_all(executor.submit, count), TASKS),
    "as_completed": (lambda executor, count: take_as_completed(executor.submit, count), TASKS),
    "add_done_callback": (lambda executor, count: be_called_back(executor.submit, count), TASKS),
    "one at a time": (
        lambda executor, count: take_one_at_a_time(executor.submit, count),
        TASKS // 4,
    ),
}
"""How results are collected, and for how many tasks."""

RECORDERS = {
    "no sink": (),
    "JSONL": ("jsonl",),
    "SQLite": ("sqlite",),
    "JSONL and SQLite": ("jsonl", "sqlite"),
}


def task_rows() -> Iterator[Row]:
    for way in WAYS:
        for recorder in RECORDERS:
            least = 0.7 if recorder != "no sink" else 0.8 if way == "one at a time" else 1
            yield Row(
                f"tasks, {way}, {recorder} {{0}} over ThreadPoolExecutor {{1}}",
                (f"{way}, {recorder}", way),
                f">= {least}",
                "{:,.0f}/s",
            )
    for recorder in ("JSONL", "SQLite"):
        yield Row(
            f"tasks, a loop of result(), until {recorder} has all of it {{0}} over "
            f"ThreadPoolExecutor {{1}}",
            (f"{recorder}, delivered", "a loop of result()"),
            ">= 0.7",
            "{:,.0f}/s",
        )
    yield Row(
        "tasks, a loop of result(), no sink {0} over four threads and a SimpleQueue, nothing "
        "to wait for {1}",
        ("a loop of result(), no sink", "bare"),
        "",
        "{:,.0f}/s",
    )


@bench(list(task_rows()))
def tasks() -> Mapping[str, Variant]:
    """No-op tasks on 4 threads, their results collected in the usual ways, with and without a
    record of them."""
    from bgworker import Scheduler

    def rate_of(executor: Any, way: str) -> float:
        collect, count = WAYS[way]
        begun = perf_counter()
        collect(executor, count)
        return count / (perf_counter() - begun)

    def standard(way: str, said: Round) -> float:
        with ThreadPoolExecutor(4) as executor:
            return rate_of(executor, way)

    def recorded(way: str, recorder: str, said: Round) -> float:
        with scratch_file() as path:
            schemes = RECORDERS[recorder]
            scheduler = Scheduler(4, sinks=[f"{scheme}:{path}.{scheme}" for scheme in schemes])
            begun = perf_counter()
            with scheduler:
                rate = rate_of(scheduler, way)
            if way == "a loop of result()":
                said.figures[f"{recorder}, delivered"] = WAYS[way][1] / (perf_counter() - begun)
        for scheme in schemes:
            check_delivered(scheduler, scheme, 4 * WAYS[way][1])
        return rate

    def bare(said: Round) -> float:
        calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

        def work() -> None:
            while (call := calls.get()) is not None:
                call()

        threads = [threading.Thread(target=work) for _ in range(4)]
        begun = perf_counter()
        for thread in threads:
            thread.start()
        for _ in range(TASKS):
            calls.put(nothing)
        for _ in threads:
            calls.put(None)
        for thread in threads:
            thread.join()
        return TASKS / (perf_counter() - begun)

    variants: dict[str, Variant] = {}
    for way in WAYS:
        variants[way] = functools.partial(standard, way)
        for recorder in RECORDERS:
            variants[f"{way}, {recorder}"] = functools.partial(recorded, way, recorder)
    return {**variants, "bare": bare}


@bench(
    [
        Row(
            "10,000 tasks with timeout=60 {0} over without {1}",
            ("with", "without"),
            "<= 1.2",
            "{:.0f} ms",
        )
    ]
)
def deadlines() -> Mapping[str, Variant]:
    """What a timeout that never passes costs. The standard library has none to compare with."""
    from bgworker import Scheduler

    def milliseconds(timeout: float | None) -> float:
        with Scheduler(4) as scheduler:
            submit = scheduler.options(timeout=timeout).submit
            begun = perf_counter()
            for task in [submit(nothing) for _ in range(10_000)]:
                task.result()
            return (perf_counter() - begun) * 1000

    return {"with": lambda said: milliseconds(60), "without": lambda said: milliseconds(None)}


LINES = 200_000


@bench(
    [
        Row(
            "events from emit to closed file {0} over ready-made lines, 1,000 per os.write {1}",
            ("ours", "template"),
            ">= 0.35",
            "{:,.0f}/s",
        ),
        Row(
            "events from emit to closed file {0} over json.dumps and a buffered write {1}",
            ("ours", "dumps"),
            ">= 2",
            "{:,.0f}/s",
        ),
    ]
)
def jsonl() -> Mapping[str, Variant]:
    """200,000 output events of 60 characters into a file. The others do it on one thread, with
    nothing in between."""
    from bgworker import Scheduler

    def ours(said: Round) -> float:
        texts = fresh_texts(LINES)
        with scratch_file() as path:
            with Scheduler(1, sinks=[f"jsonl:{path}"]) as scheduler:
                begun = perf_counter()
                task = scheduler.submit(emit_patiently, texts)
            took = perf_counter() - begun
        task.result()  # a figure of a task that failed would be none
        # its output, and the four events of its life
        check_delivered(scheduler, "jsonl", LINES + 4)
        return LINES / took

    def template(said: Round) -> float:
        task_id, texts = "0" * 32, fresh_texts(LINES)
        with scratch_file() as path:
            begun = perf_counter()
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for start in range(0, LINES, 1000):
                lines = []
                for seq in range(start, start + 1000):
                    micros = time_ns() // 1000
                    if not seq % 1000:
                        second = strftime("%Y-%m-%dT%H:%M:%S", gmtime(micros // 1_000_000))
                    lines.append(
                        f'{{"v":1,"type":"TaskOutput","task_id":"{task_id}","seq":{seq},'
                        f'"time":"{second}.{micros % 1_000_000:06}Z","stream":"output",'
                        f'"payload":{encode_basestring_ascii(texts[seq])}}}\n'
                    )
                os.write(file, "".join(lines).encode())
            os.close(file)
            return LINES / (perf_counter() - begun)

    def dumps(said: Round) -> float:
        task_id, texts = "0" * 32, fresh_texts(LINES)
        with scratch_file() as path:
            begun = perf_counter()
            with open(path, "w", encoding="utf-8") as file:
                for seq, text in enumerate(texts):
                    seconds, nanos = divmod(time_ns(), 1_000_000_000)
                    if not seq % 1000:
                        second = strftime("%Y-%m-%dT%H:%M:%S", gmtime(seconds))
                    file.write(
                        json.dumps(
                            {
                                "v": 1,
                                "type": "TaskOutput",
                                "task_id": task_id,
                                "seq": seq,
                                "time": f"{second}.{nanos // 1000:06}Z",
                                "stream": "output",
                                "payload": text,
                            }
                        )
                        + "\n"
                    )
            return LINES / (perf_counter() - begun)

    return {"ours": ours, "template": template, "dumps": dumps}


class RaisingSink(NullSink):
    def write(self, events: Sequence[Any]) -> None:
        raise OSError("this sink is dead")


class HangingSink(NullSink):
    """Its first write lasts until ``release`` is set."""

    def __init__(self, release: threading.Event) -> None:
        super().__init__()
        self.release = release

    def write(self, events: Sequence[Any]) -> None:
        self.release.wait()


class CrawlingSink(HangingSink):
    """Takes one event a second."""

    def write(self, events: Sequence[Any]) -> None:
        self.release.wait(len(events))


@bench(
    [
        Row(
            "p99 of output() beside three dead sinks {0} over the healthy one alone {1}",
            ("dead", "alone"),
            "<= 2",
            "{:.2f} us",
        ),
        Row(
            "p99 of output() beside three dead sinks {0} over logging's QueueHandler {1}",
            ("dead", "logging"),
            "",
            "{:.2f} us",
        ),
        Row("the healthy sink got everything", "healthy"),
    ]
)
def isolation() -> Mapping[str, Variant]:
    """One sink raises, one hangs, one takes an event a second: neither the task nor a healthy sink
    may notice."""
    from bgworker import Scheduler

    log = logging.getLogger("bgworker")  # it would tell of the dead sinks
    log.propagate = False
    log.addHandler(logging.NullHandler())
    count = 50_000

    def measure(emit: Callable[[Any], object]) -> float:
        return percentile(paced(emit, count, 20_000), 99) / 1000

    def alone(said: Round) -> float:
        with Scheduler(1, sinks=[NullSink()]) as scheduler:
            return scheduler.submit(lambda: measure(task_output())).result()

    def dead(said: Round) -> float:
        release, healthy = threading.Event(), NullSink()
        sinks = [RaisingSink(), healthy, HangingSink(release), CrawlingSink(release)]
        scheduler = Scheduler(1, sinks=sinks, close_timeout=0.5)
        try:
            figure = scheduler.submit(lambda: measure(task_output())).result()
            scheduler.flush(0.5)
            # created, scheduled, started, completed
            said.checks["healthy"] = healthy.count == count + 4
            if not said.checks["healthy"]:
                said.notes.append(f"the healthy sink got {healthy.count:,} of {count + 4:,} events")
        finally:
            release.set()
            scheduler.shutdown()
        return figure

    def logs(said: Round) -> float:
        with queue_logger(NullHandler()) as logger:
            return measure(logger.info)

    return {"alone": alone, "dead": dead, "logging": logs}


# --- beside tasks that compute ---


def compute(steps: int) -> int:
    """Work that holds the interpreter: nothing but bytecode."""
    x = 1
    for _ in range(steps):
        x = (x * 1103515245 + 12345) & 0x7FFFFFFF
    return x


def steps_of(seconds: float) -> int:
    """Return how many steps of `compute` take so long on this machine, alone."""
    taken = []
    for _ in range(5):
        begun = perf_counter()
        compute(200_000)
        taken.append(perf_counter() - begun)
    return max(1, int(200_000 * seconds / min(taken)))


RECEIVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
sys.path.insert(0, sys.argv[1])
from bgworker.webhook import verify

class Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/verify":
            verify(sys.argv[2], self.headers, body)
            json.loads(body)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@contextmanager
def receiver_process(secret: str) -> Iterator[str]:
    """A receiver of the standard library in a process of its own; yields its address. Paths:
    /verify and /read."""
    process = subprocess.Popen(
        [sys.executable, "-c", RECEIVER, str(ROOT), secret], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


TALKERS = 4
SAID = 10_000
"""Events of each task that talks."""


@bench(
    [
        Row(
            "4 busy tasks that say something every 15 us, JSONL, SQLite and webhook behind "
            "them {0}, over the same saying nothing "
            "{1}",
            ("ours", "silent"),
            "<= 1.25",
            "{:.0f} ms",
        ),
        Row(
            "... the obvious design behind them {0} over saying nothing {1}",
            ("obvious", "silent"),
            "",
            "{:.0f} ms",
        ),
        Row(
            "events until all is in the three sinks {0} over the obvious design {1}",
            ("our rate", "obvious rate"),
            ">= 4",
            "{:,.0f}/s",
        ),
    ]
)
def pipeline() -> Mapping[str, Variant]:
    """Everything at once, beside the design that one writes first: a frozen dataclass an event, a
    `queue.Queue` a sink, `json.dumps` a line, `executemany` a batch, `urlopen` a batch."""
    from bgworker import Scheduler, current_task
    from bgworker.webhook.signing import new_secret

    steps = steps_of(15e-6)
    secret = new_secret()

    def talk(emit: Callable[[str], object]) -> None:
        for text in fresh_texts(SAID):
            compute(steps)
            emit(text)

    def tasks_in(scheduler: Any, emit_of: Callable[[], Callable[[str], object]]) -> float:
        begun = perf_counter()
        for task in [scheduler.submit(lambda: talk(emit_of())) for _ in range(TALKERS)]:
            task.result()
        return (perf_counter() - begun) * 1000

    def silent(said: Round) -> float:
        with Scheduler(TALKERS) as scheduler:
            return tasks_in(scheduler, lambda: lambda text: None)

    def ours(said: Round) -> float:
        with (
            receiver_process(secret) as url,
            tempfile.TemporaryDirectory(prefix="bgworker-bench-") as folder,
        ):
            scheduler = Scheduler(
                TALKERS,
                sinks=[f"jsonl:{folder}/events.jsonl", f"sqlite:{folder}/history.db"],
                close_timeout=60,
            )
            scheduler.register_sink(f"webhook:{url}/read", secret=secret)
            begun = perf_counter()
            took = tasks_in(scheduler, task_output)
            scheduler.shutdown()
            said.figures["our rate"] = TALKERS * SAID / (perf_counter() - begun)
        note_losses(said, scheduler)
        return took

    def obvious(said: Round) -> float:
        with (
            receiver_process(secret) as url,
            tempfile.TemporaryDirectory(prefix="bgworker-bench-") as folder,
            Scheduler(TALKERS) as scheduler,
        ):
            recorder = Obvious(folder, f"{url}/read")
            begun = perf_counter()
            took = tasks_in(scheduler, lambda: recorder.emit_of(current_task().id))
            recorder.close()
            said.figures["obvious rate"] = TALKERS * SAID / (perf_counter() - begun)
        return took

    return {"silent": silent, "ours": ours, "obvious": obvious}


@dataclass(frozen=True)
class Said:
    """An event of the obvious design."""

    task_id: str
    seq: int
    time: str
    stream: str
    payload: str


class Obvious:
    """What one writes first. Nothing in it is slow on purpose."""

    def __init__(self, folder: str, url: str) -> None:
        self._folder, self._url = folder, url
        self._queues: list[queue.Queue[Said | None]] = []
        self._threads: list[threading.Thread] = []
        for consume in (self._to_jsonl, self._to_sqlite, self._to_webhook):
            events: queue.Queue[Said | None] = queue.Queue()
            self._queues.append(events)
            self._threads.append(threading.Thread(target=consume, args=(events,)))
            self._threads[-1].start()

    def emit_of(self, task_id: str) -> Callable[[str], None]:
        numbers = itertools.count(1)

        def emit(text: str) -> None:
            event = Said(
                task_id, next(numbers), datetime.now(timezone.utc).isoformat(), "output", text
            )
            for events in self._queues:
                events.put(event)

        return emit

    def close(self) -> None:
        for events in self._queues:
            events.put(None)
        for thread in self._threads:
            thread.join()

    def _batches(self, events: queue.Queue[Said | None], most: int) -> Iterator[list[Said]]:
        while (first := events.get()) is not None:
            batch = [first]
            while len(batch) < most and not events.empty():
                following = events.get()
                if following is None:
                    yield batch
                    return
                batch.append(following)
            yield batch

    def _to_jsonl(self, events: queue.Queue[Said | None]) -> None:
        with open(f"{self._folder}/obvious.jsonl", "w", encoding="utf-8") as file:
            while (event := events.get()) is not None:
                file.write(json.dumps(asdict(event)) + "\n")

    def _to_sqlite(self, events: queue.Queue[Said | None]) -> None:
        import sqlite3

        with closing(sqlite3.connect(f"{self._folder}/obvious.db")) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute(
                "CREATE TABLE events (task_id TEXT, seq INTEGER, time TEXT, stream TEXT, "
                "payload TEXT)"
            )
            database.execute("CREATE INDEX events_by_task ON events (task_id, seq)")
            for batch in self._batches(events, 1000):
                with database:
                    database.executemany(
                        "INSERT INTO events VALUES (?, ?, ?, ?, ?)", map(astuple, batch)
                    )

    def _to_webhook(self, events: queue.Queue[Said | None]) -> None:
        from urllib.request import Request, urlopen

        for batch in self._batches(events, 500):
            body = json.dumps([asdict(event) for event in batch]).encode()
            urlopen(Request(self._url, body, {"content-type": "application/json"})).close()


@bench(
    [
        Row(
            "a busy task that says 1,000 things a second, JSONL and SQLite behind it {0}, over "
            "the same saying nothing {1}",
            ("talking", "silent"),
            "<= 1.03",
            "{:.0f} ms",
        )
    ]
)
def overhead() -> Mapping[str, Variant]:
    """Seconds of computing, half of them talking, side by side: a machine's drift is as much as
    what is measured. The events of a second's last twentieth are delivered after it."""
    from bgworker import Scheduler

    steps = steps_of(1e-3)
    texts = fresh_texts(1000)

    def milliseconds(emit: Callable[[str], object]) -> float:
        begun = perf_counter()
        for text in texts:
            compute(steps)
            emit(text)
        return (perf_counter() - begun) * 1000

    def second(is_talking: bool) -> float:
        return milliseconds(task_output() if is_talking else lambda text: None)

    def talking(said: Round) -> float:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        with tempfile.TemporaryDirectory(prefix="bgworker-bench-") as folder:
            with Scheduler(
                1, sinks=[f"jsonl:{folder}/events.jsonl", f"sqlite:{folder}/history.db"]
            ) as scheduler:
                for is_talking in [False, True, True, False, False, True, True, False]:
                    seconds[is_talking].append(scheduler.submit(second, is_talking).result())
                    scheduler.flush()  # what was said in this second is no burden to the next
        note_losses(said, scheduler)
        said.figures["silent"] = statistics.median(seconds[False])
        return statistics.median(seconds[True])

    return {"talking": talking}


WATCHED = 5.0


@bench(
    [
        Row(
            "wake-ups a second that a Scheduler with three sinks and nothing to do {0} has "
            "over no Scheduler {1}",
            ("idle", "nothing"),
            "<= 2",
            "{:.1f}",
            is_difference=True,
        )
    ]
)
def idle() -> Mapping[str, Variant]:
    """Context switches of the whole process while it waits, five seconds long."""
    import resource

    from bgworker import Scheduler

    def switches() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF)
        sleep(WATCHED)
        after = resource.getrusage(resource.RUSAGE_SELF)
        return (after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw) / WATCHED

    def idle(said: Round) -> float:
        with (
            tempfile.TemporaryDirectory(prefix="bgworker-bench-") as folder,
            Scheduler(
                4, sinks=[f"jsonl:{folder}/events.jsonl", f"sqlite:{folder}/history.db", NullSink()]
            ) as scheduler,
        ):
            for task in [scheduler.submit(nothing) for _ in range(100)]:
                task.result()
            scheduler.flush()
            return switches()

    return {"idle": idle, "nothing": lambda said: switches()}


ALLOWED = 30
"""MiB beside the queues: the intake, what the dispatcher and the sinks have in hands, the tails,
the allocator's fragments."""


@dataclass(frozen=True)
class Flood:
    """Events said as fast as it goes, and who does not, or hardly, keep up with them."""

    what: str
    say: str = "output"
    text: str = "x"
    size: int = 60
    """Characters of each text."""
    tasks: int = 4
    sinks: tuple[str, ...] = ("stalled",)
    queue_mib: int = 16
    events: int = 400_000

    def grown(self, said: Round) -> float:
        """Return by how many MiB an interpreter of its own grows at most; what it freed before
        would count for nothing."""
        script = (
            "import json, sys; sys.path.insert(0, sys.argv[1]); "
            "import bench; bench.Flood(*json.loads(sys.argv[2])).run()"
        )
        fields = [
            self.what,
            self.say,
            self.text,
            self.size,
            self.tasks,
            self.sinks,
            self.queue_mib,
            self.events,
        ]
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                script,
                os.path.dirname(os.path.abspath(__file__)),
                json.dumps(fields),
            ],
            stdout=subprocess.PIPE,
            check=True,
        )
        result = json.loads(done.stdout)
        said.checks["exact"] = said.checks.get("exact", True) and result["exact"]
        return float(result["grown"])

    def bound(self, said: Round) -> float:
        return len(self.sinks) * self.queue_mib + ALLOWED

    def run(self) -> None:
        """Flood, and print how it went."""
        from bgworker import Scheduler, SinkOptions

        release = threading.Event()
        # the bytes are what bounds
        options = SinkOptions(queue_bytes=self.queue_mib * 2 ** 20, queue_size=10_000_000)
        scheduler = Scheduler(4, close_timeout=0.5, progress_interval=0)
        with tempfile.TemporaryDirectory(prefix="bgworker-bench-") as folder:
            for sink in self.sinks:
                scheduler.register_sink(
                    HangingSink(release) if sink == "stalled" else f"{sink}:{folder}/{sink}",
                    options=options,
                )
            scheduler.submit(nothing).result()
            scheduler.flush(0.2)
            gc.collect()
            before = resident_mib()
            sizes = [before]
            is_over = threading.Event()
            watch = threading.Thread(
                target=lambda: [
                    sizes.append(resident_mib()) for _ in iter(lambda: is_over.wait(0.002), True)
                ]
            )
            watch.start()
            for task in [
                scheduler.submit(self.say_all, self.events // self.tasks) for _ in range(self.tasks)
            ]:
                task.result()
            scheduler.flush(1)
            is_over.set()
            watch.join()
            release.set()
            scheduler.shutdown()
        emitted = self.events // self.tasks * self.tasks + (self.tasks + 1) * 4
        is_exact = all(
            health.emitted
            == emitted
            == health.delivered + health.coalesced + health.dropped + health.parked + health.pending
            for health in scheduler.sinks.values()
        )
        print(json.dumps({"grown": max(sizes) - before, "exact": is_exact}))

    def say_all(self, count: int) -> None:
        from bgworker import current_task

        task = current_task()
        rest = self.text * (self.size - 8)
        for number in range(count):
            text = f"{number:08}{rest}"
            if self.say == "progress":
                task.progress(number, None, text)
            else:
                task.output(text)


FLOODS = {
    "10": Flood("lines of 10 bytes into a stalled sink", size=10),
    "60": Flood("... of 60 bytes"),
    "1k": Flood("... of 1 kB", size=1000),
    "4k": Flood("... of 4 kB", size=4000, events=100_000),
    "emoji": Flood("... of 4,090 emoji", text="\U0001f642", size=4090, events=30_000),
    "60k": Flood("... of 60 kB", size=60_000, events=10_000),
    "progress": Flood("progress messages of 10 kB", say="progress", size=10_000, events=40_000),
    "tasks": Flood("10,000 tasks of 40 lines", tasks=10_000),
    "tasks, 4k": Flood("... of 4 kB", tasks=10_000, size=4000, events=100_000),
    "jsonl": Flood(
        "lines of 1 kB into a JSONL sink that does not keep up", size=1000, sinks=("jsonl",)
    ),
    "sqlite": Flood("... a SQLite sink, of 60 kB", size=60_000, sinks=("sqlite",), events=10_000),
    "three": Flood(
        "... a stalled sink, a JSONL and a SQLite sink, of 1 kB",
        size=1000,
        sinks=("stalled", "jsonl", "sqlite"),
    ),
}


@bench(
    [
        *[
            Row(
                f"{flood.what}: {{0}} over the queue_bytes of the sinks + 30 MiB {{1}}",
                (name, f"{name}, bound"),
                "<= 1",
                "{:.0f} MiB",
            )
            for name, flood in FLOODS.items()
        ],
        Row(
            "the account is exact: emitted = delivered + coalesced + dropped + parked + pending",
            "exact",
        ),
    ],
    is_fresh=True,
)
def memory() -> Mapping[str, Variant]:
    """Tasks that emit as fast as they can; the peak, seen every 2 ms."""
    return {name: variant for key, flood in FLOODS.items()
            for name, variant in ((key, flood.grown), (f"{key}, bound", flood.bound))}


def resident_mib() -> float:
    """Resident memory of this process; where only its peak is known, the peak."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
    except FileNotFoundError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2 ** (20 if sys.platform == "darwin" else 10)


BATCH, BATCHES = 500, 100


@bench(
    [
        Row(
            "events delivered in batches of 500 {0} over a bare urlopen with the same bytes "
            "ready {1}; the receiver verifies "
            "and parses",
            ("verified", "bare, verified"),
            ">= 0.6",
            "{:,.0f}/s",
        ),
        Row(
            "... {0} over {1}; the receiver only reads",
            ("read", "bare, read"),
            ">= 0.6",
            "{:,.0f}/s",
        ),
    ]
)
def webhook() -> Mapping[str, Variant]:
    """50,000 output events of 60 characters that wait in a queue, from the first request to the
    answer of the last."""
    import urllib.request

    from bgworker import Scheduler, SinkOptions, WebhookSink, current_task
    from bgworker.model.records import OUTPUT, Batch, TaskState
    from bgworker.webhook.cloudevents import CONTENT_TYPE, encode_batch
    from bgworker.webhook.signing import Keys, new_secret

    secret = new_secret()

    class Gated(WebhookSink):
        """Sends nothing before the gate is open."""

        def __init__(self, url: str, gate: threading.Event) -> None:
            super().__init__(url, secret=secret)
            self.gate = gate

        def write(self, events: Sequence[Any]) -> None:
            self.gate.wait()
            super().write(events)

    def emit_all() -> None:
        for text in fresh_texts(BATCH * BATCHES):
            current_task().output(text)

    def ours(path: str) -> Variant:
        def figure(said: Round) -> float:
            gate = threading.Event()
            with receiver_process(secret) as address, Scheduler(1) as scheduler:
                scheduler.register_sink(
                    Gated(address + path, gate), options=SinkOptions(batch_size=BATCH)
                )
                try:
                    task = scheduler.submit(emit_all)
                    task.result()
                    scheduler.get(task.id)  # lets the dispatcher catch up
                finally:
                    begun = perf_counter()
                    gate.set()
                scheduler.flush()
                took = perf_counter() - begun
                note_losses(said, scheduler)
            return BATCH * BATCHES / took

        return figure

    def bare(path: str) -> Variant:
        state = TaskState("0" * 32, "bench", "1" * 32, time_ns())
        body, message_id = encode_batch(Batch([(state, seq, OUTPUT, time_ns(), text)
                                               for seq, text in enumerate(fresh_texts(BATCH))]), {})

        def figure(said: Round) -> float:
            now = time_ns() // 1_000_000_000
            headers = {
                "content-type": CONTENT_TYPE,
                "webhook-id": message_id,
                "webhook-timestamp": str(now),
                "webhook-signature": " ".join(Keys(secret).signatures(message_id, now, body)),
            }
            with receiver_process(secret) as address:
                begun = perf_counter()
                for _ in range(BATCHES):
                    request = urllib.request.Request(address + path, body, headers)
                    with urllib.request.urlopen(request, timeout=15) as answer:
                        answer.read()
                return BATCH * BATCHES / (perf_counter() - begun)

        return figure

    return {"verified": ours("/verify"), "bare, verified": bare("/verify"),
            "read": ours("/read"), "bare, read": bare("/read")}


HISTORY_TASKS, HISTORY_ROWS = 100_000, 10
"""Tasks of the history, and stream rows of each."""


@bench(
    [
        Row(
            "the newest 50 of 100,000 tasks {0} over {1}", ("newest", "answer"), "<= 1", "{:.2f} ms"
        ),
        Row(
            "the streams of one of them, of 1,000,000 rows, {0} over {1}",
            ("streams", "answer"),
            "<= 1",
            "{:.2f} ms",
        ),
        Row(
            "50 failures of the last day {0} over {1}", ("failures", "answer"), "<= 1", "{:.2f} ms"
        ),
        Row("stats {0} over {1}", ("stats", "sum"), "<= 1", "{:.0f} ms"),
        Row("... over the bare GROUP BY of its counts {1}", ("stats", "counts"), "", "{:.0f} ms"),
    ]
)
def history() -> Mapping[str, Variant]:
    """Questions to a history file of 100,000 tasks and 1,000,000 stream rows, from its DTOs down to
    the disk's cache."""
    import atexit
    import sqlite3
    from datetime import timedelta

    from bgworker import History

    folder = tempfile.TemporaryDirectory(prefix="bgworker-bench-")
    path = os.path.join(folder.name, "history.db")
    fill_history(path)
    opened = History(path)
    bare = sqlite3.connect(path)
    some_task = opened.tasks(limit=1000)[-1].task_id

    def close() -> None:
        opened.close()
        bare.close()
        folder.cleanup()

    atexit.register(close)

    def milliseconds(ask: Callable[[], Any], expected: int) -> Variant:
        def figure(said: Round) -> float:
            took = []
            for _ in range(20):
                begun = perf_counter()
                answer = ask()
                took.append((perf_counter() - begun) * 1000)
            if len(answer) != expected:
                raise RuntimeError(f"{len(answer)} answers, not {expected}")
            return statistics.median(took)

        return figure

    return {
        "newest": milliseconds(opened.tasks, 50),
        "streams": milliseconds(lambda: opened.streams(some_task), HISTORY_ROWS),
        "failures": milliseconds(
            lambda: opened.tasks(status="failed", since=timedelta(days=1)), 50
        ),
        "stats": milliseconds(lambda: opened.stats().durations, 50),
        "counts": milliseconds(
            lambda: bare.execute("SELECT status, count(*) FROM tasks GROUP BY status").fetchall(), 4
        ),
        "answer": lambda said: 2.0,
        "sum": lambda said: 100.0,
    }


def fill_history(path: str) -> None:
    """Write a history of three days by hand: a run of a thousand tasks each, of 50 names, 7 % of
    them failed."""
    from bgworker.history import schema
    from bgworker.model.ids import new_id

    connection = schema.connect_to_write(path)
    begun, length = time_ns() - 3 * 86_400 * 10 ** 9, 3 * 86_400 * 10 ** 9
    statuses = ["completed"] * 90 + ["failed"] * 7 + ["timed_out"] * 2 + ["cancelled"]

    def text(ns: int) -> str:
        return strftime("%Y-%m-%dT%H:%M:%S", gmtime(ns // 10**9)) + f".{ns // 1000 % 1_000_000:06}Z"

    tasks = []
    for number in range(HISTORY_TASKS):
        created, status = begun + length * number // HISTORY_TASKS, statuses[number * 37 % 100]
        took = number * 7919 % 100_003 * 10 ** 6
        failure = ("ValueError", f"bad row {number}", "Traceback (most recent call last):\n" * 20)
        tasks.append(
            (
                number + 1,
                new_id(created),
                f"{number // 1000:032x}",
                f"job {number % 50}",
                status,
                text(created),
                text(created),
                text(created + 1000),
                text(created + 1000 + took),
                took / 10**9,
                100.0,
                f"{number} rows",
                "0" * 64,
                '{"cwd":"/srv"}',
                *(failure if status == "failed" else (None,) * 3),
                HISTORY_ROWS + 4,
            )
        )
    with schema.transaction(connection):
        connection.execute("INSERT INTO scripts VALUES (?, 'jobs:run', NULL)", ("0" * 64,))
        connection.executemany(
            "INSERT INTO runs (run_id, ended_utc) VALUES (?, ?)",
            ((f"{number:032x}", text(time_ns())) for number in range(HISTORY_TASKS // 1000)),
        )
        connection.executemany(
            "INSERT INTO tasks (key, id, run_id, name, status, created_utc, scheduled_utc, "
            "started_utc, "
            "completed_utc, duration_sec, last_progress_pct, last_progress_msg, script_hash, "
            "metadata_json, "
            "failure_type, failure_message, invocation_info, last_seq) VALUES "
            f"({', '.join('?' * 18)})",
            tasks,
        )
        connection.executemany(
            "INSERT INTO zz_stream_rows (task, seq, stream, created_us, payload) VALUES (?, ?, "
            "?, ?, ?)",
            (
                (key, seq, seq % 2, begun // 1000, PAYLOAD)
                for key in range(1, HISTORY_TASKS + 1)
                for seq in range(4, 4 + HISTORY_ROWS)
            ),
        )
    connection.close()


WEB_PAGES = {
    "first": "/",
    "failed": "/?status=failed",
    "named": "/?name=*no+such+name",
    "said": "/?text=no+such+text",
    "recent": "/?since=1d&text=rows",
    "failures": "/failures",
    "timeline": "/timeline",
}


@bench(
    [
        Row(
            "the first page of 100,000 tasks {0} over {1}", ("first", "100 ms"), "<= 1", "{:.1f} ms"
        ),
        Row("... over the bare query of its 50 rows {1}", ("first", "bare"), "", "{:.2f} ms"),
        Row("those that failed {0} over {1}", ("failed", "100 ms"), "<= 1", "{:.1f} ms"),
        Row(
            "a name that none has, up to the bound, {0} over {1}",
            ("named", "100 ms"),
            "<= 1",
            "{:.1f} ms",
        ),
        Row(
            "a text that none of 1,000,000 rows has, up to the bound, {0} over {1}",
            ("said", "100 ms"),
            "<= 1",
            "{:.1f} ms",
        ),
        Row("a text in the tasks of a day {0} over {1}", ("recent", "100 ms"), "<= 1", "{:.1f} ms"),
        Row("a task with the end of its log {0} over {1}", ("task", "50 ms"), "<= 1", "{:.1f} ms"),
        Row(
            "failures that are alike {0} over the bare GROUP BY of their types {1}",
            ("failures", "bare failures"),
            "",
            "{:.0f} ms",
        ),
        Row(
            "the timeline {0} over the bare SELECT of what it reads {1}",
            ("timeline", "bare timeline"),
            "",
            "{:.0f} ms",
        ),
        Row(
            "a line from its emission to a browser's connection {0} over {1}",
            ("live", "500 ms"),
            "<= 1",
            "{:.0f} ms",
        ),
    ]
)
def web() -> Mapping[str, Variant]:
    """Pages of a history of 100,000 tasks and 1,000,000 stream rows, from request to last byte; and
    how soon a line arrives that a task says."""
    import atexit
    import sqlite3

    from bgworker import History
    from bgworker.web.server import Server

    folder = tempfile.TemporaryDirectory(prefix="bgworker-bench-")
    path = os.path.join(folder.name, "history.db")
    fill_history(path)
    bare = sqlite3.connect(path)
    with History(path) as history:
        some_task = history.tasks(limit=1000)[-1].task_id
    server = Server(path)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        bare.close()
        folder.cleanup()

    atexit.register(close)

    def milliseconds(ask: Callable[[], Any]) -> Variant:
        def figure(said: Round) -> float:
            took = []
            for _ in range(10):
                begun = perf_counter()
                ask()
                took.append((perf_counter() - begun) * 1000)
            return statistics.median(took)

        return figure

    def page(address: str) -> Variant:
        return milliseconds(lambda: fetch(server, address).read())

    def query(sql: str) -> Variant:
        return milliseconds(lambda: bare.execute(sql).fetchall())

    return {
        **{name: page(address) for name, address in WEB_PAGES.items()},
        "task": page(f"/task/{some_task}"),
        "bare": query("SELECT id, status, name, last_progress_msg, started_utc, duration_sec "
                      "FROM tasks ORDER BY id DESC LIMIT 50"),
        "bare failures": query("SELECT failure_type, count(*) FROM tasks WHERE status = 'failed' "
                               "GROUP BY failure_type"),
        "bare timeline": query("SELECT key, started_utc, completed_utc FROM tasks "
                               "ORDER BY id DESC LIMIT 10000"),
        "live": live_line,
        "50 ms": lambda said: 50.0, "100 ms": lambda said: 100.0, "500 ms": lambda said: 500.0,
    }


def fetch(server: Any, address: str) -> Any:
    """Ask for a page as a browser does that has the token; return the answer."""
    from http.client import HTTPConnection

    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", address,
                       headers={"Cookie": f"bgworker-{server.port}={server.token}"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{address} answers {answer.status}")
    return answer


def live_line(said: Round) -> float:
    """Return the median of the milliseconds from a line's emission to its arrival at a follower."""
    from bgworker import Scheduler, current_task
    from bgworker.web.server import Server

    begin = threading.Event()

    def talk() -> None:
        begin.wait(60)
        for number in range(15):
            sleep(0.07 + 0.02 * number)  # at any time between two looks
            current_task().output(f"at {time_ns()}.")

    with scratch_file() as path, Scheduler(1, sinks=[f"sqlite:{path}"]) as pool:
        task = pool.submit(talk)
        pool.flush(60)
        with Server(path) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            answer = fetch(server, f"/task/{task.id}/live")
            begin.set()
            late = []
            for line in answer:
                if b"at " in line:
                    emitted = int(line.partition(b"at ")[2].partition(b".")[0])
                    late.append((time_ns() - emitted) / 10**6)
                if line.startswith(b"event: end"):
                    break
            server.shutdown()
        task.result(60)
    return statistics.median(late)


ROWS = 200_000
MOST_BYTES = 110
"""What a row of a stream with 60 characters may take in the file, indexes and all."""


@bench(
    [
        Row(
            "events from emit to closed history {0} over ready-made rows, executemany, 1,000 a "
            "transaction {1}",
            ("ours", "bare"),
            ">= 0.8",
            "{:,.0f}/s",
        ),
        Row(
            "bytes of a history per such event {0} over {1} allowed",
            ("bytes", "allowed"),
            "<= 1",
            "{:,.1f}",
        ),
    ]
)
def sqlite() -> Mapping[str, Variant]:
    """200,000 output events of 60 characters into a history. The other does it on one thread, into
    the same tables."""
    from bgworker import Scheduler

    sizes: list[float] = []

    def ours(said: Round) -> float:
        texts = fresh_texts(ROWS)
        with scratch_file() as path:
            with Scheduler(1, sinks=[f"sqlite:{path}"]) as scheduler:
                begun = perf_counter()
                task = scheduler.submit(emit_patiently, texts)
            took = perf_counter() - begun
            sizes.append(os.path.getsize(path) / ROWS)
        task.result()  # a figure of a task that failed would be none
        check_delivered(scheduler, "sqlite", ROWS + 4)
        return ROWS / took

    def bare(said: Round) -> float:
        with scratch_file() as path:
            return insert_bare(path, ROWS)

    return {"bare": bare, "ours": ours, "bytes": lambda said: sizes[-1] if sizes else 0.0,
            "allowed": lambda said: MOST_BYTES}


def insert_bare(path: str, count: int) -> float:
    """Insert ready-made rows as most programs would; return rows per second until the file is
    closed."""
    from bgworker.history import schema

    rows = [(1, seq, 0, time_ns() // 1000, text) for seq, text in enumerate(fresh_texts(count))]
    connection = schema.connect_to_write(path)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(
        "INSERT INTO tasks (id, name, status, created_utc, last_seq) VALUES ('t', 't', "
        "'running', '', 1)"
    )
    begun = perf_counter()
    for start in range(0, count, 1000):
        with schema.transaction(connection):
            connection.executemany(
                "INSERT INTO zz_stream_rows (task, seq, stream, created_us, payload) VALUES "
                "(?, ?, ?, ?, ?)",
                rows[start : start + 1000],
            )
    connection.close()
    return count / (perf_counter() - begun)


FASTEST = """INSERT INTO bench.zz_stream_rows (task, seq, stream, created_us, payload)
SELECT * FROM unnest(%s::bigint[], %s::integer[], %s::smallint[], %s::bigint[], %s::text[])
ON CONFLICT DO NOTHING"""
ONE_ROW = """INSERT INTO bench.zz_stream_rows (task, seq, stream, created_us, payload)
VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"""


def store_rows(server: str, name: str, fastest: str, one: str) -> list[Row]:
    return [
        Row(
            f"events from emit to a closed history in {name} {{0}} over ready-made {fastest} {{1}}",
            (f"{server}_ours", f"{server}_bare"),
            ">= 0.6",
            "{:,.0f}/s",
        ),
        Row(
            f"and {{0}} over {one} {{1}}",
            (f"{server}_ours", f"{server}_one_by_one"),
            ">= 10",
            "{:,.0f}/s",
        ),
    ]


@bench(
    [
        *store_rows(
            "postgres",
            "PostgreSQL",
            "rows by the driver's fastest INSERT that may be repeated",
            "one row an INSERT, each a transaction",
        ),
        *(
            row
            for name in ("SecantusDB", "nx-27017")
            for row in store_rows(
                name, name, "documents by unordered insert_many", "one document an insert_one"
            )
        ),
    ]
)
def stores() -> Mapping[str, Variant]:
    """100,000 output events of 60 characters into a cluster of PostgreSQL that the bench starts,
    through psycopg, and 10,000 into each server that speaks MongoDB's protocol, through pymongo:
    those take 250 microseconds a document. The others do it on one thread, into the same table or
    collection, as many rows a statement as the sink's batches have, or one. Of several INSERTs
    (lists of values, JSON, COPY into a table beside) that with arrays as text was the fastest."""
    from tests.stores.servers import Nx27017, SecantusDb

    return {
        **on_postgres(100_000),
        **on_mongo("SecantusDB", SecantusDb(), 10_000),
        **on_mongo("nx-27017", Nx27017(), 10_000),
    }


def served(server: Any) -> Any:
    atexit.register(server.remove)
    server.start()
    return server


def to_store(sink: Any, count: int) -> float:
    """Return how many events a second come from a task into a history that is closed then."""
    from bgworker import Scheduler

    texts = fresh_texts(count)
    with Scheduler(1, close_timeout=60) as scheduler:
        scheduler.register_sink(sink, name="store")
        begun = perf_counter()
        task = scheduler.submit(emit_patiently, texts)
    took = perf_counter() - begun
    task.result()
    check_delivered(scheduler, "store", count + 4)
    return count / took


def on_postgres(count: int) -> Mapping[str, Variant]:
    from tests.stores.servers import Postgres

    from bgworker.stores import PostgresSink

    server = served(Postgres())
    sink = PostgresSink(server.connect, schema="bench")
    sink.open()
    sink.close()

    def emptied() -> None:
        server.ask("TRUNCATE bench.tasks, bench.zz_stream_rows")
        server.ask("CHECKPOINT")

    def rows(count: int) -> list[tuple[Any, ...]]:
        emptied()
        return [(1, seq, 0, time_ns() // 1000, text) for seq, text in enumerate(fresh_texts(count))]

    def ours(said: Round) -> float:
        emptied()
        return to_store(sink, count)

    def bare(said: Round) -> float:
        ready = rows(count)
        begun = perf_counter()
        with server.connect() as connection:
            for start in range(0, count, sink.preferred_batch):
                *numbers, texts = zip(*ready[start:start + sink.preferred_batch])
                connection.execute(FASTEST, [
                    *("{" + ",".join(map(str, each)) + "}" for each in numbers),
                    '{"' + '","'.join(texts) + '"}'])
                connection.commit()
        return count / (perf_counter() - begun)

    def one_by_one(said: Round) -> float:
        ready = rows(count // 100)
        with server.connect(autocommit=True) as connection:
            begun = perf_counter()
            for row in ready:
                connection.execute(ONE_ROW, row)
            return len(ready) / (perf_counter() - begun)

    return {"postgres_bare": bare, "postgres_ours": ours, "postgres_one_by_one": one_by_one}


def on_mongo(name: str, server: Any, count: int) -> Mapping[str, Variant]:
    from bgworker.model.wire import ns_text
    from bgworker.stores import MongoSink

    database = served(server).client(serverSelectionTimeoutMS=5000)["bench"]
    sink = MongoSink(database)
    sink.open()
    said_by = "0" * 32

    def emptied() -> None:
        for collection in (database.tasks, database.task_streams):
            collection.delete_many({})

    def documents(count: int) -> list[dict[str, Any]]:
        emptied()
        return [
            {
                "_id": f"{said_by}:{seq}",
                "task_id": said_by,
                "seq": seq,
                "stream_type": "output",
                "payload": text,
                "created_utc": ns_text(time_ns()),
            }
            for seq, text in enumerate(fresh_texts(count))
        ]

    def ours(said: Round) -> float:
        emptied()
        return to_store(sink, count)

    def bare(said: Round) -> float:
        ready = documents(count)
        begun = perf_counter()
        for start in range(0, count, sink.preferred_batch):
            database.task_streams.insert_many(
                ready[start:start + sink.preferred_batch], ordered=False)
        return count / (perf_counter() - begun)

    def one_by_one(said: Round) -> float:
        ready = documents(count // 20)
        begun = perf_counter()
        for each in ready:
            database.task_streams.insert_one(each)
        return len(ready) / (perf_counter() - begun)

    return {f"{name}_bare": bare, f"{name}_ours": ours, f"{name}_one_by_one": one_by_one}


class GatedSink:
    """Holds events back until ``gate`` is set, then hands them to another sink."""

    def __init__(self, sink: Any) -> None:
        self.gate = threading.Event()
        self.preferred_batch = sink.preferred_batch
        self.write = lambda events: (self.gate.wait(), sink.write(events))[1]
        self.close = sink.close


BACKLOG = 90_000
"""Less than a queue holds, so that nobody waits for room in it."""
FEW_ROWS = 4_000
"""Rows of the bare executemany beside a CPU-bound thread, which takes 2 seconds for so many."""


@bench(
    [
        Row(
            "events from emit to history beside a CPU-bound task {0} over a bare executemany "
            "beside it {1}",
            ("ours", "bare"),
            ">= 20",
            "{:,.0f}/s",
        ),
        Row(
            "turns of a CPU-bound task while a backlog goes into a history {0} over turns of "
            "one alone {1}",
            ("turns", "alone"),
            ">= 0.9",
            "{:,.0f}/s",
        ),
    ]
)
def busy() -> Mapping[str, Variant]:
    """What becomes of a history's rate beside a task that computes, and of the task's."""
    from bgworker import Scheduler, SqliteSink

    def compute(is_over: Callable[[], bool]) -> float:
        """Return turns per second."""
        turns, begun = 0, perf_counter()
        while not is_over():
            for _ in range(1000):
                turns += 1
        return turns / (perf_counter() - begun)

    def ours(said: Round) -> float:
        texts, over = fresh_texts(ROWS), threading.Event()
        with scratch_file() as path:
            with Scheduler(2, sinks=[f"sqlite:{path}"]) as scheduler:
                scheduler.submit(compute, over.is_set)
                begun = perf_counter()
                scheduler.submit(emit_patiently, texts).result()
                scheduler.flush(120)
                took = perf_counter() - begun
                over.set()
        check_delivered(scheduler, "sqlite", ROWS + 8)
        return ROWS / took

    def bare(said: Round) -> float:
        over = threading.Event()
        thread = threading.Thread(target=compute, args=(over.is_set,))
        thread.start()
        try:
            with scratch_file() as path:
                return insert_bare(path, FEW_ROWS)
        finally:
            over.set()
            thread.join()

    def turns(said: Round) -> float:
        over = threading.Event()
        with scratch_file() as path:
            sink = GatedSink(SqliteSink(path))
            with Scheduler(2) as scheduler:
                scheduler.register_sink(sink, name="history")
                scheduler.submit(lambda: in_slices(task_output(), 9, BACKLOG // 9)).result()
                scheduler.flush(0.3)
                computing = scheduler.submit(compute, over.is_set)
                sink.gate.set()
                scheduler.flush(120)
                over.set()
            check_delivered(scheduler, "history", BACKLOG + 8)
            return computing.result()

    def alone(said: Round) -> float:
        over = threading.Event()
        with Scheduler(2) as scheduler:
            computing = scheduler.submit(compute, over.is_set)
            sleep(0.5)
            over.set()
            return computing.result()

    return {"ours": ours, "bare": bare, "turns": turns, "alone": alone}


# --- on the processes of an executor ---


def talk_in_slices(slices: int, size: int, pause: float) -> float:
    """Return the nanoseconds that an `output` of the task takes that runs this."""
    from bgworker import current_task

    return in_slices(current_task().output, slices, size, pause)


def say_when(count: int) -> None:
    from bgworker import current_task

    for number in range(count):
        sleep(0.03 + 0.007 * number)  # at any time between two looks
        current_task().output(str(time_ns()))


PARTS = 8
"""Into how many tasks the computing is split."""
IN_FLIGHT = 2_000


@bench(
    [
        Row(
            "cost of an output() in a worker process {0} over one on a thread {1}, both to a JSONL "
            "file",
            ("there", "here"),
            "<= 3",
        ),
        Row("of 40,000 of them at once: {0} over {1}", ("burst there", "burst here"), "<= 3"),
        Row(
            "an event of a worker process is with a subscriber after {0} over {1} allowed",
            ("late", "500 ms"),
            "<= 1",
            "{:,.0f} ms",
        ),
        Row(
            "computing on two threads {0} over two processes {1}, with progress",
            ("threads", "processes"),
            ">= 1.7",
            "{:,.2f} s",
        ),
        Row(
            "an empty task through a ProcessPoolExecutor: as a task {0} over without us {1}",
            ("round trip", "bare round trip"),
            figure="{:,.0f} µs",
        ),
        Row(
            f"of {IN_FLIGHT:,} of them in flight: {{0}} over {{1}}",
            ("in flight", "bare in flight"),
            figure="{:,.0f} µs",
        ),
    ]
)
def remote() -> Mapping[str, Variant]:
    """What it costs that bodies run in processes of a ProcessPoolExecutor, and what it gives."""
    from multiprocessing import get_context

    from bgworker import Scheduler

    engine = concurrent.futures.ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    atexit.register(engine.shutdown)
    take_results(engine.submit, 10)
    there: dict[str, Any] = {"executor": engine}
    here: dict[str, Any] = {"max_workers": 2}

    def output(settings: dict[str, Any], *sizes: float) -> Variant:
        def measure(said: Round) -> float:
            with scratch_file() as path, Scheduler(**settings, sinks=[f"jsonl:{path}"]) as pool:
                pool.submit(nothing).result()
                sleep(0.2)  # it is connected
                figure = pool.submit(talk_in_slices, *sizes).result()
                pool.flush(60)
                note_losses(said, pool)
                return figure

        return measure

    def late(said: Round) -> float:
        ages: list[float] = []
        with Scheduler(executor=engine) as pool:
            with pool.subscribe(
                lambda event: ages.append((time_ns() - int(event.payload)) / 1e6),
                types=["TaskOutput"],
            ):
                pool.submit(say_when, 20).result()
                pool.flush(60)
        return max(ages)

    steps = steps_of(1.0)

    def computing(settings: dict[str, Any]) -> Variant:
        def measure(said: Round) -> float:
            with Scheduler(**settings) as pool:
                take_results(pool.submit, 2)
                begun = perf_counter()
                list(pool.map(compute_with_progress, [steps // PARTS] * PARTS))
                return perf_counter() - begun

        return measure

    def empty(submit_of: Callable[[], Any], take: Any, count: int) -> Variant:
        def measure(said: Round) -> float:
            with submit_of() as pool:
                take(pool.submit, 10)
                begun = perf_counter()
                take(pool.submit, count)
                return (perf_counter() - begun) / count * 1e6

        return measure

    def ours() -> Any:
        return Scheduler(executor=engine)

    def bare() -> Any:
        return nullcontext(engine)

    return {
        "there": output(there, 20, 2_000, PAUSE), "here": output(here, 20, 2_000, PAUSE),
        "burst there": output(there, 1, 40_000, 0), "burst here": output(here, 1, 40_000, 0),
        "late": late, "500 ms": lambda said: 500.0,
        "threads": computing(here), "processes": computing(there),
        "round trip": empty(ours, take_one_at_a_time, 200),
        "bare round trip": empty(bare, take_one_at_a_time, 200),
        "in flight": empty(ours, take_results, IN_FLIGHT),
        "bare in flight": empty(bare, take_results, IN_FLIGHT),
    }


def compute_with_progress(steps: int) -> None:
    from bgworker import current_task

    for percent in range(100):
        compute(steps // 100)
        current_task().progress(percent + 1)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

"""Files that somebody has damaged, or made to do harm, and what every verb must make of them.

A `Kind` of file says how a sound one is made, what may be done to it, and which verbs read it.
`attack` does it to one copy, lets each verb at it in a process of its own, and returns what must
never be: a traceback, a hang, an end by a signal, more memory than a verb may take, or a Ctrl-C
that is not obeyed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.histories import Recorder

import bgworker.cli
import bgworker.history.retention  # so that no child has to

MOST_MEMORY = 200 * 2**20
OWN_MEMORY = 40 * 2**20
"""What the command line takes before it has read anything; its forked child begins with that and
with all that the tests before have left, which does not count."""
PATIENCE = 15.0
"""Seconds of the processor that a verb may take over a small file before it counts as hanging; of
the clock eight times as many, for others may work here, too."""
OBEDIENCE = 5.0
"""Seconds that a verb may take to end after Ctrl-C: one on an idle machine, more where others work
too."""

Mutation = Callable[[str, random.Random], str]


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    make: Callable[[str], None]
    """Makes a sound one at a path."""
    mutations: Sequence[Mutation]
    """Each changes the file, and says in a few words how."""
    verbs: Sequence[Sequence[str]]
    """Command lines; PATH stands for the file, OTHER for a path that is free. What follows for ever
    comes with ``-f`` or as ``watch``, and gets a Ctrl-C."""


# ---------------------------------------------------------------- what is done to any file

def flip_bits(path: str, chance: random.Random) -> str:
    """Turn a few bits anywhere."""
    size, count = os.path.getsize(path), chance.randint(1, 40)
    with open(path, "r+b") as file:
        for _ in range(count if size else 0):
            file.seek(at := chance.randrange(size))
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    return f"{count} bits"


def scramble(path: str, chance: random.Random) -> str:
    """Write noise over one stretch."""
    size, length = os.path.getsize(path), chance.choice((1, 2, 8, 100, 4096))
    with open(path, "r+b") as file:
        file.seek(at := chance.randrange(max(1, size)))
        file.write(chance.randbytes(length))
    return f"{length} bytes at {at}"


def cut(path: str, chance: random.Random) -> str:
    """Cut the end off."""
    os.truncate(path, left := chance.randrange(os.path.getsize(path) + 1))
    return f"cut to {left} bytes"


def swap_pages(path: str, chance: random.Random) -> str:
    """Copy one page of a database over another."""
    data = bytearray(Path(path).read_bytes())
    pages = len(data) // 4096
    if pages > 1:
        one, two = chance.randrange(pages) * 4096, chance.randrange(1, pages) * 4096
        data[two:two + 4096] = data[one:one + 4096]
        Path(path).write_bytes(data)
    return "a page over another"


# ---------------------------------------------------------------- what is done to a history by SQL

VALUES = (
    "NULL",
    "''",
    "'x'",
    "x'00ff'",
    "x''",
    "9e999",
    "-9e999",
    "1.5",
    "-1",
    "0",
    "9223372036854775807",
    "-9223372036854775808",
    "1e300",
    "'2026-01-01T00:00:00'",
    "'0001-01-01T00:00:00.000000Z'",
    "'2026-01-01'",
    "'9999-12-31T23:59:59.999999Z'",
    "'0001-01-01T00:00:00+23:59'",
    "'9999-12-31T23:59:59-23:59'",
    "'[1]'",
    "'7'",
    "'\"x\"'",
    "'null'",
    "'{'",
    "'{\"a\": 9e999}'",
    "'{\"a\": NaN}'",
    "replace(hex(zeroblob(50000)), '00', '[')",
    "'{\"a\":' || replace(hex(zeroblob(50000)), '0', '[')",
    "cast(x'c328ff' as text)",
    "cast(x'eda080' as text)",
    "cast(x'610062' as text)",
    "char(27) || '[2J' || char(8238)",
    "replace(hex(zeroblob(500000)), '00', 'x')",
    "printf('%.*c', 20000000, 'x')",
    "replace(hex(zeroblob(4000000)), '0', '[],')",
    "hex(zeroblob(2000))",
    "'completed'",
    "'running'",
    "'odd'",
    "'00'",
    "printf('%.*c', 5000, '9')",
    "zeroblob(3000000)",
    "char(128512, 10, 13, 0, 133)",
    "'\\ud800'",
)

COLUMNS = {
    "tasks": (
        "key",
        "id",
        "run_id",
        "name",
        "status",
        "created_utc",
        "scheduled_utc",
        "started_utc",
        "completed_utc",
        "duration_sec",
        "timeout_sec",
        "last_progress_pct",
        "last_progress_msg",
        "script_id",
        "script_hash",
        "arg_json",
        "metadata_json",
        "failure_type",
        "failure_message",
        "invocation_info",
        "exit_code",
        "last_seq",
    ),
    "runs": ("run_id", "host", "pid", "started_utc", "ended_utc", "python", "version"),
    "scripts": ("hash", "script_id", "text"),
    "zz_stream_rows": (
        "task",
        "seq",
        "stream",
        "created_us",
        "payload",
        "percent",
        "original_bytes",
        "is_json",
    ),
    "losses": ("sink", "reason", "count", "by_type", "created_utc"),
}

LOOPS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"

TRICKS = (
    *(
        f"{table}: a view without end"
        for table in ("tasks", "runs", "zz_stream_rows", "losses", "scripts")
    ),
    *(
        f"{table}: a huge view"
        for table in ("tasks", "runs", "zz_stream_rows", "losses", "scripts")
    ),
    *(f"{table}: generated columns" for table in ("tasks", "runs")),
    "a trigger without end",
    "a trigger on all",
    "a partial index",
    "an index of an expression",
    "no index",
    "other collations",
    "a full text table",
    "a check without end",
    "a million runs",
    "many losses",
    "many types of failures",
    "statistics",
)


@contextlib.contextmanager
def opened(path: str):  # type: ignore[no-untyped-def]
    connection = sqlite3.connect(path, isolation_level=None)
    until = time.monotonic() + 5.0  # what one mutation has put there may have no end for the next
    connection.set_progress_handler(lambda: time.monotonic() > until, 100_000)
    try:
        yield connection
    finally:
        connection.close()


def wrong_values(path: str, chance: random.Random) -> str:
    """Put values of any type into any columns, without the constraints that would refuse them."""
    told = []
    with opened(path) as connection:
        if chance.random() < 0.5:
            _forget_constraints(connection, chance)
        for _ in range(chance.choice((1, 1, 2, 5, 20))):
            table = chance.choice(list(COLUMNS))
            column, value = chance.choice(COLUMNS[table]), chance.choice(VALUES)
            where = chance.choice(("1", "rowid % 2", "rowid = (SELECT max(rowid) FROM {table})"))
            if table == "zz_stream_rows":  # which has no rowid, and thousands of rows
                where = chance.choice(("1", "seq % 2"))
                if "00000" in value:
                    where = "seq = 4 AND task < 3" if "000000" in value else "seq = 4"
            elif "000000" in value:  # a large one: once is enough
                where = "rowid = (SELECT max(rowid) FROM {table})"
            where = where.format(table=table)
            with contextlib.suppress(sqlite3.Error):
                connection.execute(f"UPDATE OR IGNORE {table} SET {column} = {value} WHERE {where}")
            told.append(f"{table}.{column} = {value} where {where}")
    return "; ".join(told)


def _forget_constraints(connection: sqlite3.Connection, chance: random.Random) -> None:
    """Let the tables take NULL and any type where they do not, and say afterwards that they never
    did."""
    was = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND sql IS NOT NULL"
    ).fetchall()
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute(
        "UPDATE sqlite_master SET sql = replace(replace(sql, ' NOT NULL', ''), ' TEXT', ' BLOB') "
        "WHERE type = 'table' AND name IN ('tasks', 'losses', 'scripts', 'runs')"
    )
    connection.execute("PRAGMA schema_version = 7")
    with contextlib.suppress(sqlite3.Error):
        for table in ("tasks", "losses", "runs"):
            for column in COLUMNS[table]:
                if column != "key" and chance.randrange(3) == 0:
                    connection.execute(
                        f"UPDATE OR IGNORE {table} SET {column} = x'00ff41' WHERE rowid = 1"
                    )
    connection.executemany(
        "UPDATE sqlite_master SET sql = ? WHERE name = ?", [(sql, name) for name, sql in was]
    )
    connection.execute("PRAGMA schema_version = 8")
    connection.execute("PRAGMA writable_schema = OFF")


def trick(path: str, chance: random.Random) -> str:
    """Replace or add what is no plain table of ours."""
    what = chance.choice(TRICKS)
    with opened(path) as connection, contextlib.suppress(sqlite3.Error):
        play(connection, what)
    return what


def play(connection: sqlite3.Connection, what: str) -> None:
    run = connection.execute
    run("PRAGMA foreign_keys = OFF")
    run("PRAGMA legacy_alter_table = ON")
    table, _, rest = what.partition(": ")
    columns = COLUMNS.get(table, ())
    if rest in ("a view without end", "a huge view"):
        huge = rest == "a huge view"
        value = "printf('%.*c', 900000000, 'x')" if huge else "i"
        values = ", ".join(f"{value} AS {column}" for column in columns)
        run(f"ALTER TABLE {table} RENAME TO old_{table}")
        run(
            f"CREATE VIEW {table} AS {'' if huge else LOOPS} SELECT "
            f"{values}{'' if huge else ' FROM n'}"
        )
    elif rest == "generated columns":
        run(f"ALTER TABLE {table} RENAME TO old_{table}")
        kept = ", ".join(
            f"{column} AS (printf('%.*c', 900000000, 'x'))" if column.endswith("_utc") else column
            for column in columns
        )
        run(f"CREATE TABLE {table} ({kept})")
    elif what == "a trigger without end":
        run(
            "CREATE TRIGGER evil AFTER DELETE ON tasks BEGIN "
            f"{'INSERT INTO losses SELECT i, i, i, i, i FROM (' + LOOPS + ' SELECT i FROM n)'}; END"
        )
    elif what == "a trigger on all":
        for name in COLUMNS:
            for event in ("INSERT", "UPDATE", "DELETE"):
                run(
                    f"CREATE TRIGGER {name}_{event} BEFORE {event} ON {name} BEGIN SELECT "
                    f"max(i) FROM ({LOOPS} SELECT i FROM n); END"
                )
    elif what == "a partial index":
        run(
            "CREATE INDEX evil ON tasks(status) WHERE length(printf('%.*c', 900, 'x')) > "
            "length(name)"
        )
    elif what == "an index of an expression":
        run("CREATE INDEX evil ON tasks(printf('%.*c', 1000, name))")
    elif what == "no index":
        for name in ("tasks_status", "tasks_name", "tasks_run", "tasks_script"):
            run(f"DROP INDEX {name}")
    elif what == "other collations":
        run("PRAGMA writable_schema = ON")
        run(
            "UPDATE sqlite_master SET sql = replace(sql, 'TEXT', 'TEXT COLLATE strange') WHERE "
            "name = 'tasks'"
        )
    elif what == "a full text table":
        run("ALTER TABLE losses RENAME TO old_losses")
        run("CREATE VIRTUAL TABLE losses USING fts5(sink, reason, count, by_type, created_utc)")
    elif what == "a check without end":
        run("PRAGMA writable_schema = ON")
        run(f"UPDATE sqlite_master SET sql = substr(sql, 1, length(sql) - 1) || "
            f"', CHECK (length(printf(''%.*c'', 900000000, ''x'')) > 1))' WHERE name = 'tasks'")
    elif what == "a million runs":
        run(f"INSERT OR IGNORE INTO runs (run_id, host) {LOOPS} "
            "SELECT printf('%032x', i), (SELECT max(host) FROM runs) FROM n LIMIT 100000")
    elif what == "many losses":
        run(f"INSERT OR IGNORE INTO losses {LOOPS} "
            "SELECT i, i, 9223372036854775807, '{}', '2026' FROM n LIMIT 50000")
    elif what == "many types of failures":
        run(
            "INSERT INTO tasks (id, name, status, created_utc, completed_utc, duration_sec, "
            f"failure_type, last_seq) {LOOPS} SELECT "
            "printf('%032x', i), printf('%.*c', 3000, i), 'failed', "
            "'2026-01-01T00:00:00.000000Z', '2026-01-01T00:00:00.000000Z', "
            "1.0, printf('%d%.*c', i, 3000, 'x'), 1 FROM n LIMIT 4000"
        )
    elif what == "statistics":
        run("ANALYZE")
        run("UPDATE sqlite_stat1 SET stat = '9223372036854775807 0 0 0 -1 x'")


def sound_history(path: str) -> None:
    """Make a history with something of everything, which a process left that was killed."""
    from bgworker.history import schema

    record = Recorder(path)
    dead = record.run("0" * 31 + "1", host=schema.this_host())
    ended = record.run("0" * 31 + "2", host=schema.this_host(), ended=record.now)
    record.insert("scripts", hash="a" * 64, script_id="mod:f", text="def f(): ...")
    for number in range(60):
        status = (
            "completed",
            "failed",
            "cancelled",
            "timed_out",
            "running",
            "scheduled",
            "created",
            "interrupted",
        )[number % 8]
        task_id = record.task(
            f"load {number % 7}",
            status,
            created=record.ago(minutes=number + 1),
            took=number / 10,
            run_id=(dead, ended, None)[number % 3],
            script_hash="a" * 64,
            metadata={"n": number},
            failure_type="ValueError" if status == "failed" else None,
            failure_message="bad",
            last_progress_pct=50.0,
            last_progress_msg="half",
            arg_json="[1]",
            invocation_info="Traceback\n  x",
        )
        for stream in ("output", "error", "warning", "verbose", "progress"):
            record.said(
                task_id, f"line of {stream}", stream, percent=10.0 if stream == "progress" else None
            )
        record.said(task_id, '{"a": [1]}', is_json=True)
        record.said(task_id, "cut", original_bytes=99)
        if number % 10 == 0:
            record.many_said(record.task(f"chatty {number}", created=record.ago(days=number)), 300)
    for number in range(5):
        record.lost(number + 1, sink=f"sink {number}")
    record.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    record.close()
    last = "printf"  # a name for the newest, so that verbs find one whatever happens to the ids
    with opened(path) as connection:
        connection.execute(
            "UPDATE tasks SET name = ? WHERE id = (SELECT max(id) FROM tasks)", (last,)
        )


HISTORY = Kind(
    sound_history,
    (wrong_values, wrong_values, wrong_values, trick, flip_bits, scramble, cut, swap_pages),
    [
        ["tasks", "--limit", "0"],
        ["tasks", "--json"],
        *(["tasks", "--status", status] for status in ("running", "interrupted", "failed")),
        ["tasks", "--since", "30m", "--name", "*a*"],
        ["show", "last"],
        ["show", "--json", "chatty 10"],
        ["show", "0"],
        ["tail", "last"],
        ["tail", "--json", "load 1"],
        ["tail", "-n", "3", "--stream", "progress", "chatty 0"],
        ["tail", "-f", "printf"],
        ["stats"],
        ["stats", "--json", "--since", "1h"],
        ["watch"],
        ["watch", "--json"],
        ["export", "--jsonl"],
        ["export", "--jsonl", "OTHER"],
        ["prune", "--keep", "20", "--dry-run"],
        ["prune", "--older-than", "20m", "--dry-run"],
        ["prune", "--keep", "30"],
        ["prune", "--older-than", "10m"],
        ["prune", "--keep", "0"],
    ],
)

KINDS: dict[str, Kind] = {"history": HISTORY}


# ---------------------------------------------------------------- the attack

@dataclass(frozen=True)
class Outcome:
    """How one command line ended."""

    words: tuple[str, ...]
    code: int
    """Of the exit; minus the signal that ended it."""
    seconds: float
    peak: int
    """Bytes of memory."""
    err: str
    obedient: float | None
    """Seconds from a Ctrl-C to the end; None if there was none."""

    @property
    def fault(self) -> str:
        """What must not be; empty for a good end."""
        if "Traceback" in self.err or "Error:" in self.err:
            return "traceback"
        if self.code < 0 or self.code not in (0, 1, 2, 130, 141):
            return f"code {self.code}"
        if self.obedient is not None and self.obedient > OBEDIENCE:
            return f"Ctrl-C was obeyed after {self.obedient:.1f} s"
        if self.obedient is not None and not self.is_endless:
            return "hang"
        if self.peak > MOST_MEMORY:
            return f"{self.peak >> 20} MiB"
        return ""

    @property
    def is_endless(self) -> bool:
        return self.words[0] == "watch" or "-f" in self.words


def run(words: Sequence[str], folder: str) -> Outcome:
    """Run a command line in a forked child, whose memory and time are measured."""
    sys.stdout.flush()
    out, err = os.path.join(folder, "out"), os.path.join(folder, "err")
    begun = time.monotonic()
    inherited = _memory()  # a run of many tests has made it large
    pid = os.fork()
    if not pid:
        _be(words, out, err)
    endless = words[0] == "watch" or "-f" in words
    interrupted = None
    deadline = begun + (0.7 if endless else 8 * PATIENCE)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
        if time.monotonic() > deadline or interrupted is None and _processor_time(pid) > PATIENCE:
            if interrupted is not None:
                os.kill(pid, signal.SIGKILL)
                deadline += 3600
            else:
                os.kill(pid, signal.SIGINT)
                interrupted = time.monotonic()
                deadline = interrupted + 3 * OBEDIENCE
    ended = time.monotonic()
    return Outcome(
        tuple(words),
        os.waitstatus_to_exitcode(status),
        ended - begun,
        max(0, usage.ru_maxrss * 1024 - inherited) + OWN_MEMORY,
        Path(err).read_text(errors="replace"),
        None if interrupted is None else ended - interrupted,
    )


def _memory() -> int:
    """Return the bytes of memory that this process has now, 0 where that cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _processor_time(pid: int) -> float:
    """Return the seconds of the processor that a child has taken, 0 where that cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _be(words: Sequence[str], out: str, err: str) -> None:
    """Be the command line, in the child."""
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, name in ((0, os.devnull), (1, out), (2, err)):
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(fd, number)
            os.close(fd)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        code = bgworker.cli.main(list(words))
        sys.stdout.flush()
    except KeyboardInterrupt:  # it had ended when that came
        code = 130
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def attack(
    kind: Kind, folder: str, seed: int, sound: str, verbs: int = 6
) -> tuple[str, list[Outcome]]:
    """Mutate a copy of a sound file, and let some of its verbs at it; return what was done, and how
    the verbs ended."""
    chance = random.Random(seed)
    path, other = os.path.join(folder, "h.db"), os.path.join(folder, "other")
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))
    shutil.copy(sound, path)
    told = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        mutation = chance.choice(kind.mutations)
        try:
            told.append(f"{mutation.__name__}: {mutation(path, chance)}")
        except sqlite3.Error as error:
            told.append(f"{mutation.__name__}: {error}")
    words = chance.sample(list(kind.verbs), min(verbs, len(kind.verbs)))
    words.sort(key=lambda each: each[0] == "prune")
    return " | ".join(told), [
        run(
            [
                *(path if word == "PATH" else other if word == "OTHER" else word for word in each),
                *(() if "PATH" in each else ("--db", path)),
            ],
            folder,
        )
        for each in words
    ]


def run_for(seconds: float, seed: int, kind: Kind = HISTORY, verbs: int = 6) -> str:
    """Attack for a time, at least once; return how much was done.

    Raises:
        AssertionError: something came of it that must not be; it tells the seed of that file.
    """
    files = lines = 0
    peak = 0
    with tempfile.TemporaryDirectory() as folder:
        sound, work = os.path.join(folder, "sound"), os.path.join(folder, "work")
        kind.make(sound)
        os.mkdir(work)
        until = time.monotonic() + seconds
        while not files or time.monotonic() < until:
            told, outcomes = attack(kind, work, seed + files, sound, verbs)
            for outcome in outcomes:
                assert not outcome.fault, (
                    f"seed {seed + files}: {outcome.fault} of {outcome.words} after {told[:500]}: "
                    f"{outcome.err[-2000:]}")
            files, lines = files + 1, lines + len(outcomes)
            peak = max(peak, *(outcome.peak for outcome in outcomes))
    return f"{files} files, {lines} command lines, at most {peak >> 20} MiB"

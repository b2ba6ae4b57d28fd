"""The tables of a history in PostgreSQL: what makes them, and the statements that write and read
them.

They have the names and the columns of a history file. Where a text there is a time, it is a
``timestamptz`` here; where it is JSON, ``json``, which keeps it as it is (``jsonb`` would change
the order of keys, and numbers). ``runs.last_seen`` is new.

In each text ``{s}`` stands for the schema.
"""

from __future__ import annotations

from ..history.answers import OPEN, SEEN, TASK_COLUMNS
from ..history.taskrows import COLUMNS, CONSTANT, PROGRESS, RUN_COLUMNS, VARYING
from ..model.records import STREAM_CODES, STREAMS

_TYPES = {"utc": "timestamptz", "sec": "float8", "pct": "float8", "json": "json", "seq": "bigint",
          "code": "bigint", "pid": "bigint", "count": "bigint", "by_type": "jsonb"}


def _type(column: str) -> str:
    return _TYPES.get(column) or _TYPES.get(column.rpartition("_")[2]) or "text"


_STREAM_NAMES = " ".join(
    f"WHEN {STREAM_CODES[kind]} THEN '{stream.value}'" for kind, stream in STREAMS.items())
_OPEN = ", ".join(f"'{status.value}'" for status in OPEN)
_ENDED = "coalesce(completed_utc, created_utc)"
"""When a task ended; of one whose end nobody knows, when it began."""

STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE {s}.runs (
  run_id text COLLATE "C" PRIMARY KEY,
  host text, pid bigint, started_utc timestamptz, ended_utc timestamptz, last_seen timestamptz,
  python text, version text)""",
        """COMMENT ON COLUMN {s}.runs.last_seen IS
'when the run last wrote to this history, by the clock of this server'""",
        """CREATE TABLE {s}.scripts (
  hash text COLLATE "C" PRIMARY KEY, script_id text, text text)""",
        """CREATE TABLE {s}.tasks (
  key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  id text COLLATE "C" NOT NULL UNIQUE,
  run_id text COLLATE "C" REFERENCES {s}.runs,
  name text NOT NULL,
  status text NOT NULL,
  created_utc timestamptz NOT NULL,
  scheduled_utc timestamptz, started_utc timestamptz, completed_utc timestamptz,
  duration_sec float8, timeout_sec float8, last_progress_pct float8, last_progress_msg text,
  script_id text,
  script_hash text COLLATE "C" REFERENCES {s}.scripts,
  arg_json json, metadata_json json, result_json json,
  rerun_of text,
  failure_type text, failure_message text, invocation_info text, exit_code bigint,
  last_seq bigint NOT NULL)""",
        # no foreign key: its check costs each row half as much again. Writers lock the tasks
        """CREATE TABLE {s}.zz_stream_rows (
  task bigint NOT NULL,
  created_us bigint NOT NULL,
  seq integer NOT NULL,
  stream smallint NOT NULL,
  is_json smallint,
  payload text NOT NULL,
  percent float8,
  original_bytes bigint,
  PRIMARY KEY (task, seq))""",
        f"""CREATE VIEW {{s}}.task_streams AS
SELECT tasks.id AS task_id, seq, CASE stream {_STREAM_NAMES} END AS stream_type, payload,
  CASE WHEN is_json = 1 THEN 'json' ELSE 'text' END AS format,
  original_bytes IS NOT NULL AS truncated,
  timestamptz 'epoch' + created_us * interval '1 microsecond' AS created_utc,
  percent, original_bytes
FROM {{s}}.zz_stream_rows JOIN {{s}}.tasks ON tasks.key = task""",
        """CREATE TABLE {s}.losses (
  key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  sink text NOT NULL, reason text NOT NULL, count bigint NOT NULL, by_type jsonb NOT NULL,
  created_utc timestamptz NOT NULL,
  UNIQUE (created_utc, sink, reason, count, by_type))""",
        "CREATE INDEX tasks_status ON {s}.tasks (status, created_utc)",
        f"CREATE INDEX tasks_ended ON {{s}}.tasks (({_ENDED}))",
        # a hash, as a name may be longer than a tree takes
        "CREATE INDEX tasks_name ON {s}.tasks USING hash (name)",
        "CREATE INDEX tasks_run ON {s}.tasks (run_id)",
        "CREATE INDEX tasks_script ON {s}.tasks (script_hash)",
        "CREATE INDEX tasks_rerun ON {s}.tasks (rerun_of) WHERE rerun_of IS NOT NULL",
    ),
)
"""What leads a schema from version 0, 1, ... to the next; the last one is written and read. A
released step never changes."""

# ---------------------------------------------------------------- the version

# by the catalogue itself: what looks a name up may know it from before the lock
FIND_SCHEMA = """SELECT count(*), count(relname) FROM pg_namespace
LEFT JOIN pg_class ON relnamespace = pg_namespace.oid AND relname = 'schema_version'
WHERE nspname = %s"""
FIND_VERSION = "SELECT max(version) FROM {s}.schema_version"
LOCK = "SELECT pg_advisory_xact_lock(%s, %s)"
LOCK_VERSIONS = "LOCK TABLE {s}.schema_version"
"""Waits for the transactions that have read the version, and keeps others from reading it."""
MAKE_SCHEMA = "CREATE SCHEMA {s}"
MAKE_VERSIONS = """CREATE TABLE {s}.schema_version (
  version integer PRIMARY KEY, since timestamptz NOT NULL DEFAULT now())"""
NOTE_VERSION = "INSERT INTO {s}.schema_version (version) VALUES (%s)"

# ---------------------------------------------------------------- writing
# Each statement takes one text of JSON, a list of objects, or texts that are arrays.


def _from_json(columns: tuple[str, ...], alias: str = "r") -> str:
    types = ", ".join(
        f"{column} {'text' if _type(column) == 'json' else _type(column)}" for column in columns)
    return f"json_to_recordset(%s::json) AS {alias}({types})"


def _selected(columns: tuple[str, ...]) -> str:
    # a JSON text that came as a string of JSON
    return ", ".join(
        f"{column}::json" if _type(column) == "json" else column for column in columns)


def _set_if(condition: str, column: str) -> str:
    return f"{column} = CASE WHEN {condition} THEN excluded.{column} ELSE tasks.{column} END"


_ADVANCED = ", ".join([
    *[f"{column} = excluded.{column}" for column in VARYING],
    *[_set_if("excluded.last_progress_msg IS NOT NULL", column) for column in PROGRESS],
    *[_set_if("tasks.run_id IS NULL", column) for column in CONSTANT if column != "id"],
])

# The first statement of each batch. It locks the versions before all else, as who changes them
# does.
SEE_RUNS = f"""WITH version AS ({FIND_VERSION}), seen AS (
  INSERT INTO {{s}}.runs ({', '.join(RUN_COLUMNS)}, last_seen)
SELECT {', '.join(RUN_COLUMNS)}, CASE WHEN host IS NOT NULL THEN clock_timestamp() END
FROM {_from_json(RUN_COLUMNS)} ORDER BY run_id
ON CONFLICT (run_id) DO UPDATE SET ended_utc = NULL, last_seen = excluded.last_seen,
  {', '.join(f'{column} = excluded.{column}' for column in RUN_COLUMNS if column != 'run_id')}
WHERE excluded.host IS NOT NULL) SELECT * FROM version"""
END_RUNS = f"""WITH version AS ({FIND_VERSION}), ended AS (
  UPDATE {{s}}.runs SET ended_utc = now(), last_seen = now() WHERE run_id = ANY(%s::text[]))
SELECT * FROM version"""
# Only what is missing: a script that is there would be locked for all that run it.
INSERT_SCRIPTS = """INSERT INTO {s}.scripts (hash, script_id, text) SELECT hash, script_id, text
FROM json_to_recordset(%s::json) AS r(hash text, script_id text, text text)
WHERE NOT EXISTS (SELECT 1 FROM {s}.scripts k WHERE k.hash = r.hash
  AND (k.text IS NOT NULL OR r.text IS NULL)) ORDER BY hash
ON CONFLICT (hash) DO UPDATE SET text = excluded.text
WHERE scripts.text IS NULL AND excluded.text IS NOT NULL"""
# The tasks that a batch changes, in the order of their ids: two that bring the same ones, which
# several statements change, do not lock each other out.
LOCK_TASKS = """SELECT FROM {s}.tasks
WHERE id IN (SELECT id FROM json_to_recordset(%s::json) AS r(id text)) ORDER BY id
FOR NO KEY UPDATE"""
INSERT_TASKS = f"""INSERT INTO {{s}}.tasks AS tasks ({', '.join(COLUMNS)})
SELECT {_selected(COLUMNS)} FROM {_from_json(COLUMNS)} ORDER BY id
ON CONFLICT (id) DO UPDATE SET {_ADVANCED} WHERE excluded.last_seq >= tasks.last_seq"""
INSERT_PLACEHOLDERS = """INSERT INTO {s}.tasks (id, name, status, created_utc, last_seq)
SELECT id, '', 'running', created_utc, 0
FROM json_to_recordset(%s::json) AS r(id text, created_utc timestamptz) ORDER BY id
ON CONFLICT DO NOTHING"""
ADVANCE_PROGRESS = """UPDATE {s}.tasks SET last_progress_pct = percent,
  last_progress_msg = message, last_seq = CASE last_seq WHEN 0 THEN 0 ELSE seq END
FROM json_to_recordset(%s::json) AS r(percent float8, message text, seq bigint, task text)
WHERE id = task AND last_seq <= seq"""
# nobody can prune them before we have committed
FIND_KEYS = "SELECT id, key FROM {s}.tasks WHERE id = ANY(%s::text[]) FOR KEY SHARE"
INSERT_STREAMS = """INSERT INTO {s}.zz_stream_rows (task, seq, stream, created_us, payload)
SELECT * FROM unnest(%s::bigint[], %s::integer[], %s::smallint[], %s::bigint[], %s::text[])
ON CONFLICT DO NOTHING"""
INSERT_WIDE_STREAMS = """INSERT INTO {s}.zz_stream_rows
(task, seq, stream, created_us, payload, percent, original_bytes, is_json)
SELECT * FROM unnest(%s::bigint[], %s::integer[], %s::smallint[], %s::bigint[], %s::text[],
  %s::float8[], %s::bigint[], %s::smallint[])
ON CONFLICT DO NOTHING"""
INSERT_LOSSES = """INSERT INTO {s}.losses (created_utc, sink, reason, count, by_type)
SELECT created_utc, sink, reason, count, by_type::jsonb FROM json_to_recordset(%s::json)
AS r(created_utc timestamptz, sink text, reason text, count bigint, by_type text)
ON CONFLICT DO NOTHING"""

# ---------------------------------------------------------------- retention

TRY_LOCK = f"SELECT ({FIND_VERSION}), pg_try_advisory_xact_lock(%s, %s)"
COUNT_TASKS = "SELECT count(*) FROM {s}.tasks"
SINCE = "SELECT clock_timestamp() - %s * interval '1 second'"
FIND_OVER = f"""SELECT key FROM {{s}}.tasks t LEFT JOIN {{s}}.runs r USING (run_id)
WHERE {_ENDED} < %s AND (t.status NOT IN ({_OPEN}) OR r.ended_utc IS NOT NULL
  OR r.run_id IS NULL OR coalesce(r.last_seen, '-infinity') < %s)
ORDER BY {_ENDED} LIMIT %s FOR UPDATE OF t SKIP LOCKED"""
"""The tasks that ended first: before a time, or with a run that was last seen before another."""
DELETE_STREAMS = """DELETE FROM {s}.zz_stream_rows WHERE ctid = ANY(ARRAY(
  SELECT ctid FROM {s}.zz_stream_rows WHERE task = ANY(%s::bigint[]) LIMIT %s))"""
DELETE_TASKS = "DELETE FROM {s}.tasks WHERE key = ANY(%s::bigint[]) RETURNING run_id, script_hash"
# A run that was seen today is about to bring further tasks; so is who has a row locked.
LOCK_RUNS = """SELECT run_id FROM {s}.runs WHERE run_id = ANY(%s::text[])
AND (ended_utc IS NOT NULL OR last_seen IS NULL OR last_seen < now() - interval '1 day')
FOR UPDATE SKIP LOCKED"""
DELETE_RUNS = """DELETE FROM {s}.runs WHERE run_id = ANY(%s::text[])
AND NOT EXISTS (SELECT 1 FROM {s}.tasks WHERE tasks.run_id = runs.run_id)"""
LOCK_SCRIPTS = "SELECT hash FROM {s}.scripts WHERE hash = ANY(%s::text[]) FOR UPDATE SKIP LOCKED"
DELETE_SCRIPTS = """DELETE FROM {s}.scripts WHERE hash = ANY(%s::text[])
AND NOT EXISTS (SELECT 1 FROM {s}.tasks WHERE script_hash = hash)"""
DELETE_LOSSES = "DELETE FROM {s}.losses WHERE created_utc < %s"

# ---------------------------------------------------------------- reading


def _text(column: str) -> str:
    if column == SEEN:
        return (f"CASE WHEN t.status IN ({_OPEN}) AND r.ended_utc IS NOT NULL "
                "THEN 'interrupted' ELSE t.status END")
    if column.endswith("_utc"):
        return f"""to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
    return f"{column}::text" if column.endswith("_json") else column


SELECT_TASKS = f"""SELECT {', '.join(map(_text, TASK_COLUMNS))}
FROM {{s}}.tasks t LEFT JOIN {{s}}.scripts s ON s.hash = t.script_hash
LEFT JOIN {{s}}.runs r ON r.run_id = t.run_id
WHERE t.id > %s ORDER BY t.id LIMIT %s"""
SELECT_STREAMS = """SELECT seq, stream, created_us, payload, percent, original_bytes, is_json
FROM {s}.zz_stream_rows WHERE task = %s AND seq > %s ORDER BY seq LIMIT %s"""
SELECT_LOSSES = f"""SELECT key, {_text('created_utc')}, sink, count, reason, by_type::text
FROM {{s}}.losses WHERE key > %s ORDER BY key LIMIT %s"""

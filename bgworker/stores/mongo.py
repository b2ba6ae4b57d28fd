"""Events as a history in MongoDB, which any number of processes and machines write to at once. Runs
on the sink's thread.

What `write` has returned from was acknowledged by the server, as the write concern of the database
asks for. There are no transactions: tasks go in before what they said, and a batch of which a part
is there is brought again as a whole.

Collections ``runs``, ``scripts``, ``tasks``, ``task_streams`` and ``losses``. Their fields are the
columns of a history file; what is NULL there is missing here. Times are texts, as there: a date of
MongoDB has no microseconds. Only ``runs.last_seen`` is a date, by the server's clock.
"""

from __future__ import annotations

import re
import sys
from datetime import datetime, timedelta, timezone
from os import urandom
from time import sleep, time_ns

from ..history.answers import OPEN, SEEN, TASK_COLUMNS
from ..history.batch import LOSS_COLUMNS, wide_values
from ..history.taskrows import COLUMNS, PROGRESS, RUN_COLUMNS, VARYING
from ..model.clock import monotonic
from ..model.errors import ConfigurationError, PermanentSinkError, SinkError
from ..model.records import STREAM_CODES, STREAMS
from ..model.text import describe, fit, fit_json, name_of, show
from ..model.wire import ns_text
from .store import READ_ROWS, READ_TASKS, Store, kinds_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeVar

    from ..history.batch import SortedBatch
    from ..history.taskrows import TaskRows

    T = TypeVar("T")

COLLECTIONS = ("runs", "scripts", "tasks", "task_streams", "losses")
INDEXES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "tasks": (("status", "created_utc"), ("completed_utc",), ("run_id",), ("script_hash",)),
    "task_streams": (("task_id", "seq"),),
}


def _make_indexes(database: Any) -> None:
    for collection, indexes in INDEXES.items():
        for fields in indexes:
            database[collection].create_index([(field, 1) for field in fields])


STEPS: tuple[Callable[[Any], None], ...] = (_make_indexes,)
"""What leads a database from version 0, 1, ... to the next; the last one is written and read. A
released step never changes. It must bear three things:

- it was cut off in the middle, and is done again from its beginning;
- it is done by two at once: its lock is not renewed, so `LEASE` seconds later another begins it;
- sinks of an older bgworker write while it runs, and after it until they look at the version, which
  takes `VERSION_INTERVAL` seconds and a batch: documents of the older form remain for ever."""
VERSION_INTERVAL = 1.0
"""Seconds after which the version is looked at again, beside each time after a failure."""
LEASE = 30.0
"""Seconds after which a sink that leads the database to another version is taken to be gone."""

MOST_BYTES = 15 * 2**20
"""Of what one event says: a document has at most 16 MiB."""
MOST_KNOWN = 100_000
"""Ids of tasks that are remembered as being in the history."""
MOST_TASKS = 100
"""Tasks that are pruned together."""
MOST_OPEN = 1000
"""Tasks without an end that are looked at, those first that began first."""
MOST_SAID = 100
"""Characters of a driver's text that are shown."""

_DUPLICATE = 11000
_REFUSED = {2, 9, 14, 52, 57, 121, 10334, 17280, 17419, 17420}
"""Codes that blame a document: a wrong value, too large, against the rules of a validator."""
_REFUSED_KINDS = {"InvalidDocument", "DocumentTooLarge", "BSONError"}
_HELD = {
    13: "give the user the role readWrite on that database",
    18: "correct the user or the password of the client",
    14031: "make room on the server's disk, or raise the quota",
}
"""Code -> what mends it. Nothing is taken before, so the events are held."""

_UNHEARD = {64, 100}
"""Codes of a write that too few members of the replica set have acknowledged: some are away."""

_STREAM_NAMES = {kind: stream.value for kind, stream in STREAMS.items()}
_CODES = {name: STREAM_CODES[kind] for kind, name in _STREAM_NAMES.items()}
_OPEN = [status.value for status in OPEN]
_FINAL = ["completed", "failed", "cancelled", "timed_out", "interrupted"]
_HAS_ENDED = {"ended_utc": {"$gt": ""}}  # of a run
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class MongoSink(Store):
    """Records tasks and what they say in a MongoDB database.

    Delivery is at least once, the documents are exactly once: one of ``task_streams`` is known by
    its ``_id``, "<task id>:<seq>", and one of ``tasks`` never goes back to an earlier event. The
    collections and their indexes are made, and brought to the newest version, by the first sink
    that connects. Sinks of an older bgworker that are connected then notice within a second or with
    their next batch, and take nothing any more.

    ``runs.last_seen`` is set with each batch, whatever is in it, by the server's clock; see the
    package for what that proves.

    A server that cannot be reached costs no event but for those that do not fit into the sink's
    queue. How long an attempt may take is for the client to say (``timeoutMS``, or
    ``serverSelectionTimeoutMS`` and ``socketTimeoutMS``); by default it waits for 30 s.

    Tested on SecantusDB and nx-27017, which speak MongoDB's protocol; not on ``mongod`` itself.

    Args:
        database: a ``pymongo`` database, such as ``MongoClient(url)["jobs"]``. Its client is not
            closed. Its write concern says what counts as stored: unless that waits for the journal
            (``journal=True``) or a majority, a server that is killed may lose what it acknowledged.
        max_age: seconds that a task stays after its end; None is for ever.
        max_tasks: most tasks that are kept, counting those that have not ended; None is no bound.
            Both remove only tasks that have ended, those first that ended first; with ``max_age``
            also those whose run has not been seen for as long. Every sink with bounds prunes, while
            it is written to.

    Raises:
        ConfigurationError: an argument cannot be used.
    """

    preferred_batch = 4096

    def __init__(
        self, database: Any, *, max_age: float | None = None, max_tasks: int | None = None
    ) -> None:
        # It is loaded, or there were no database: nothing of it is imported here.
        driver = sys.modules.get(type(database).__module__.partition(".")[0])
        self._update_one: Any = getattr(driver, "UpdateOne", None)
        if self._update_one is None or "Database" not in kinds_of(database):
            raise ConfigurationError("database: expected one of pymongo (not of its async API), "
                                     f"such as MongoClient(url)['jobs'], got {show(database)}")
        super().__init__(f"the MongoDB database {database.name!r}", "database", max_age, max_tasks)
        self._database = database
        self._next_check = 0.0  # of the version, on the clock of `monotonic`
        self._is_ours = False
        """The database had a version of ours. If it is dropped, we may write before we notice."""
        self._is_in_doubt = False
        """What the last attempt has stored is not known."""
        self._known: set[str] = set()  # ids of tasks that are there

    def __repr__(self) -> str:
        return f"MongoSink({self._database.name!r})"

    def open(self) -> None:
        """Make the indexes if need be; again after a fork.

        Raises:
            PermanentSinkError: the history has a newer version, or a collection with the name of
                one of its own is somebody else's.
            TemporarySinkError: it may work later.
        """
        self._next_check = 0.0
        self._do("open", lambda at: None)

    def _do(self, what: str, act: Callable[..., T], *arguments: Any) -> T:
        try:
            if monotonic() >= self._next_check:
                self._prepare()
            done = act(self._database, *arguments)
        except Exception as error:
            self._next_check, self._is_in_doubt = 0.0, True
            self._known.clear()
            raise self._explained(what, error) from error
        self._failures = 0
        return done

    def _prepare(self) -> None:
        """Bring the database to the newest version, one sink at a time, unless it has it."""
        versions = self._database["schema_version"]
        if self._found(versions) < len(STEPS):
            me = urandom(8).hex()
            self._lock(versions, me)
            try:
                for number in range(self._found(versions) + 1, len(STEPS) + 1):
                    STEPS[number - 1](self._database)
                    versions.insert_one({"_id": number, "since": ns_text(time_ns())})
            finally:
                versions.update_one({"_id": 0, "holder": me}, {"$set": {"holder": None}})
        self._is_ours = True
        self._next_check = monotonic() + VERSION_INTERVAL

    def _found(self, versions: Any) -> int:
        """Return the version of the history; 0 for none."""
        # Before the version, which is noted before there is any document.
        filled = [] if self._is_ours else [
            name for name in COLLECTIONS
            if self._database[name].find_one({}, {"_id": 1}) is not None]
        found = 0
        for each in versions.find():
            if not isinstance(each["_id"], int) or each.keys().isdisjoint(("since", "holder")):
                raise self._foreign(f"schema_version: a document with the _id {show(each['_id'])}")
            found = max(found, each["_id"])
        if filled and not found:
            raise self._foreign(f"{filled[0]}, without a version in schema_version")
        self._check_version(found, len(STEPS))
        return found

    def _lock(self, versions: Any, me: str) -> None:
        """Wait until nobody else leads the database to another version. The lock is the document
        with ``_id`` 0; one whose holder stays the same for too long is taken over."""
        holder, since = None, monotonic()
        while True:
            is_stale = monotonic() - since > LEASE
            try:
                versions.update_one({"_id": 0, "holder": holder if is_stale else None},
                                    {"$set": {"holder": me}}, upsert=True)
                return
            except Exception as error:
                if getattr(error, "code", None) != _DUPLICATE:
                    raise
            found = versions.find_one({"_id": 0})
            if found is not None and found["holder"] != holder:
                holder, since = found["holder"], monotonic()
            sleep(0.02)

    def _end(self, at: Any, runs: list[str]) -> None:
        at.runs.update_many({"_id": {"$in": runs}}, {
            "$set": {"ended_utc": ns_text(time_ns())}, "$currentDate": {"last_seen": True}})

    def _disconnect(self) -> None:
        self._next_check = 0.0  # the client is the caller's

    # -- documents --

    def _store(self, at: Any, batch: SortedBatch) -> None:
        self._store_tasks(batch.tasks)
        if batch.speakers:
            self._store_tasks(batch.unknown(self._known))
        update = self._update_one
        self._update("tasks", [
            # the last_seq of a placeholder stays 0: any snapshot completes it
            update({"_id": id_, "last_seq": condition}, _changes(
                {"last_progress_pct": percent, "last_progress_msg": message, **seen}))
            for percent, message, seq, id_ in batch.tasks.progress
            for condition, seen in ((0, {}), ({"$gt": 0, "$lte": seq}, {"last_seq": seq}))])
        self._insert("task_streams", _stream_documents(batch))
        self._insert("losses", [
            {"_id": "|".join(map(str, row)), **dict(zip(LOSS_COLUMNS, row))}
            for row in batch.losses])
        self._is_in_doubt = False

    def _store_tasks(self, tasks: TaskRows) -> None:
        update = self._update_one
        self._update("runs", [
            *(update({"_id": row[0]}, {
                "$set": dict(zip(RUN_COLUMNS[1:], row[1:])), "$unset": {"ended_utc": ""},
                "$currentDate": {"last_seen": True}}, upsert=True) for row in tasks.own_runs),
            *(update({"_id": run_id}, {"$setOnInsert": {"host": None}}, upsert=True)
              for run_id in tasks.other_runs)])
        self._update("scripts", [
            update({"_id": hash_}, {"$setOnInsert": {"script_id": script_id},
                                    **({} if text is None else {"$set": {"text": text}})},
                   upsert=True) for hash_, (script_id, text) in tasks.scripts.items()])
        rows = [dict(zip(COLUMNS, row)) for row in tasks.rows()]
        # An upsert fails as a duplicate where the task is further on, and where another process has
        # just inserted it: what fails again is the former.
        ops = [update({"_id": row["id"], "last_seq": {"$lte": row["last_seq"]}},
                      _changes({name: row[name] for name in COLUMNS if name != "id"}), upsert=True)
               for row in rows]
        self._update("tasks", [ops[index] for index in self._update("tasks", ops)])
        self._update("tasks", [
            update({"_id": id_}, {"$setOnInsert": {
                "name": "", "status": "running", "created_utc": created, "last_seq": 0}},
                upsert=True) for id_, created in tasks.placeholders])
        if len(self._known) > MOST_KNOWN:
            self._known.clear()
        self._known.update(row["id"] for row in rows)
        self._known.update(id_ for id_, _ in tasks.placeholders)

    def _update(self, collection: str, ops: list[Any]) -> list[int]:
        """Do the updates, and return the numbers of those that failed as duplicates."""
        if not ops:
            return []
        return self._many(lambda: self._database[collection].bulk_write(ops, ordered=False))

    def _insert(self, collection: str, documents: list[dict[str, Any]]) -> None:
        """Insert the documents that are not there. A duplicate costs a server many times what a
        document does, so after an attempt that failed it is asked for them first."""
        if documents and self._is_in_doubt and collection == "task_streams":
            seqs = [each["seq"] for each in documents]
            there = {each["_id"] for each in self._database[collection].find(
                {"task_id": {"$in": list({each["task_id"] for each in documents})},
                 "seq": {"$gte": min(seqs), "$lte": max(seqs)}}, {"_id": 1})}
            documents = [each for each in documents if each["_id"] not in there]
        if documents:
            self._many(lambda: self._database[collection].insert_many(documents, ordered=False))

    def _many(self, act: Callable[[], object]) -> list[int]:
        """Write many documents; return the numbers of those that are there already."""
        try:
            act()
        except Exception as error:
            failed = _write_errors(error)
            if not failed or any(each.get("code") != _DUPLICATE for each in failed):
                raise
            return [each["index"] for each in failed]
        return []

    def _explained(self, what: str, error: Exception) -> SinkError:
        """Return what an error means for the sink's events."""
        if isinstance(error, SinkError):
            return error
        codes, kinds = _codes(error), kinds_of(error)
        text = _short(error)
        if codes and codes <= _REFUSED or kinds & _REFUSED_KINDS or isinstance(
                error, (TypeError, ValueError, OverflowError)):
            return PermanentSinkError(f"MongoDB cannot store an event: {text}")
        if "ServerSelectionTimeoutError" in kinds:
            text = f"no server answers ({text}); check the client's address, and that it runs"
        remedies = [remedy for code, remedy in _HELD.items() if code in codes]
        return self._failed(what, text, remedy="; ".join(remedies),
                            is_away="ConnectionFailure" in kinds or bool(codes & _UNHEARD))

    # -- pruning --

    def _prune_some(self, at: Any) -> bool:
        gone: list[str] = []
        if self._max_tasks is not None:
            # First those that would go, then how many are too many: another sink that removes some
            # between the two leaves fewer to us.
            oldest = self._ended(at, None, MOST_TASKS)
            gone = oldest[:max(0, at.tasks.count_documents({}) - self._max_tasks)]
        if self._max_age is not None and not gone:
            then = datetime.now(timezone.utc) - timedelta(seconds=min(self._max_age, 1e10))
            gone = self._ended(at, then, MOST_TASKS)
            if not gone:
                at.losses.delete_many({"created_utc": {"$lt": _text(then)}})
        if not gone:
            return False
        chosen = {"_id": {"$in": gone}}
        tasks = list(at.tasks.find(chosen, {"run_id": 1, "script_hash": 1}))
        at.task_streams.delete_many({"task_id": {"$in": gone}})
        at.tasks.delete_many(chosen)
        self._known.difference_update(gone)
        day = datetime.now(timezone.utc) - timedelta(days=1)
        for collection, field, more in (("scripts", "script_hash", {}), ("runs", "run_id", {
                "$or": [_HAS_ENDED, {"last_seen": None},
                        {"last_seen": {"$lt": day}}]})):
            for name in {task[field] for task in tasks if field in task}:
                if at.tasks.find_one({field: name}, {"_id": 1}) is None:
                    at[collection].delete_one({"_id": name, **more})
        return True

    def _ended(self, at: Any, before: datetime | None, most: int) -> list[str]:
        """Return the ids of the tasks that ended first, before a time; with one also of tasks whose
        run was not seen since."""
        early = {} if before is None else {"$lt": _text(before)}
        found = [(each["completed_utc"], each["_id"]) for each in at.tasks.find(
            {"completed_utc": {"$gt": "", **early}, "status": {"$in": _FINAL}},
            {"completed_utc": 1}).sort("completed_utc", 1).limit(most)]
        unended = list(at.tasks.find(
            {"completed_utc": None, "status": {"$in": [*_OPEN, "interrupted"]},
             "created_utc": {"$gt": "", **early}},
            {"created_utc": 1, "run_id": 1, "status": 1}).sort("created_utc", 1).limit(MOST_OPEN))
        over: list[dict[str, Any]] = [_HAS_ENDED]
        over += [] if before is None else [{"last_seen": None}, {"last_seen": {"$lt": before}}]
        ids = list({each["run_id"] for each in unended if "run_id" in each})
        runs = {each["_id"] for each in at.runs.find(
            {"_id": {"$in": ids}, "$or": over}, {"_id": 1})}
        found += [(each["created_utc"], each["_id"]) for each in unended
                  if each["status"] == "interrupted" or each.get("run_id") in {None, *runs}]
        return [id_ for _, id_ in sorted(found)[:most]]

    # -- reading --

    def _reader(self) -> MongoSink:
        return MongoSink(self._database)

    def _tasks_after(self, at: Any, last_id: str) -> list[Any]:
        tasks = _page(at.tasks, {"_id": {"$gt": last_id}}, "_id", READ_TASKS)
        ended = {each["_id"] for each in at.runs.find(
            {"_id": {"$in": list({task.get("run_id") for task in tasks})}, **_HAS_ENDED})}
        scripts = {each["_id"]: each.get("text") for each in at.scripts.find(
            {"_id": {"$in": list({task.get("script_hash") for task in tasks})}})}
        return [_task_row(task, ended, scripts) for task in tasks]

    def _streams_after(self, at: Any, task: Any, seq: int) -> list[Any]:
        which = {"task_id": task[1], "seq": {"$gt": seq}}
        return list(map(_stream_row, _page(at.task_streams, which, "seq", READ_ROWS)))

    def _losses_after(self, at: Any, key: Any) -> list[Any]:
        return [(each["_id"], each["created_utc"], each["sink"], each["count"], each["reason"],
                 each["by_type"])
                for each in _page(at.losses, {"_id": {"$gt": key or ""}}, "_id", READ_ROWS)]


def _page(collection: Any, which: Mapping[str, Any], order: str, most: int) -> list[Any]:
    return list(collection.find(which).sort(order, 1).limit(most))


def _stream_documents(batch: SortedBatch) -> list[dict[str, Any]]:
    documents = []
    for state, seq, kind, ns, data in batch.streams:
        task_id = state.id
        document = {"_id": f"{task_id}:{seq}", "task_id": task_id, "seq": seq,
                    "stream_type": _STREAM_NAMES[kind], "payload": data,
                    "created_utc": ns_text(ns)}
        if data.__class__ is not str or len(data) > MOST_BYTES // 4:
            _widen(document, kind, data)
        documents.append(document)
    return documents


def _widen(document: dict[str, Any], kind: int, data: Any) -> None:
    """Give a document what a stream record tells beside a plain text, cut to what fits."""
    payload, percent, original_bytes, is_json = (
        (data, None, None, None) if data.__class__ is str else wide_values(kind, data))
    if len(payload) > MOST_BYTES // 4:
        payload, cut_bytes = (fit_json if is_json else fit)(payload, MOST_BYTES)
        original_bytes = original_bytes or cut_bytes or None
    document["payload"] = payload
    for name, value in (("percent", percent), ("original_bytes", original_bytes),
                        ("truncated", original_bytes is not None or None),
                        ("format", "json" if is_json else None)):
        if value is not None:
            document[name] = value


def _task_row(document: dict[str, Any], ended: set[str], scripts: Mapping[str, Any]) -> Any:
    """Return a task as a row of `TASK_COLUMNS`."""
    values = {f"t.{name}": value for name, value in document.items()}
    status = document.get("status")
    is_over = status in _OPEN and document.get("run_id") in ended
    values.update({"t.key": 0, "t.id": document["_id"], SEEN: "interrupted" if is_over else status,
                   "s.text": scripts.get(document.get("script_hash", ""))})
    return tuple([values.get(column) for column in TASK_COLUMNS])


def _stream_row(document: dict[str, Any]) -> Any:
    created = datetime.fromisoformat(document["created_utc"].replace("Z", "+00:00"))
    return (document["seq"], _CODES.get(document["stream_type"]),
            (created - _EPOCH) // timedelta(microseconds=1), document["payload"],
            document.get("percent"), document.get("original_bytes"),
            1 if document.get("format") == "json" else None)


def _short(error: Exception) -> str:
    """Return what a driver says of an error without the state of the client, of which it gives
    hundreds of characters, some of them twice."""
    failed = _failures(error)
    text = f"{name_of(type(error))}: {failed[0].get('errmsg')}" if failed else describe(error)
    text = re.sub(r" \(configured timeouts:.*?\)|, Timeout: .*|, full error: .*", "", text)
    return text if len(text) <= MOST_SAID else text[:MOST_SAID - 1] + "\u2026"


def _changes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the update that gives a task the values of a row, by the rules of `taskrows`."""
    changes = {"$set": {name: value for name, value in values.items() if value is not None}}
    told = values.get("last_progress_msg") is not None
    gone = {name: "" for name, value in values.items()
            if value is None and (name in VARYING or told and name in PROGRESS)}
    return {**changes, "$unset": gone} if gone else changes


def _text(time: datetime) -> str:
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _write_errors(error: Exception) -> list[Any]:
    """Return what a driver says of each document that failed; it goes on behind the first that
    is a duplicate."""
    details = getattr(error, "details", None)
    found = details.get("writeErrors") if isinstance(details, dict) else None
    is_all = isinstance(details, dict) and not details.get("writeConcernErrors")
    return found if isinstance(found, list) and is_all else []


def _codes(error: Exception) -> set[Any]:
    """Return the codes of all that went wrong, duplicates apart."""
    return {each.get("code") for each in _failures(error)} or {getattr(error, "code", None)}


def _failures(error: Exception) -> list[Any]:
    """Return what a driver says of each write that went wrong, duplicates apart."""
    details = getattr(error, "details", None)
    if not isinstance(details, dict):
        return []
    return [each for name in ("writeErrors", "writeConcernErrors")
            for each in details.get(name) or () if each.get("code") != _DUPLICATE]

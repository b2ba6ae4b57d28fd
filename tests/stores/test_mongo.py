"""What is MongoDB's own in a history there: documents, errors, duplicates. A server from the
package index that speaks its protocol, started for these tests; mongod itself is not tested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.stores.events import NOW, RUN, ended, said
from tests.stores.load import EAGER, Load
from tests.stores.servers import Proxy, free_port
from tests.stores.stages import MongoStage

from bgworker import (
    ConfigurationError,
    EventType,
    PermanentSinkError,
    Scheduler,
    StreamEvent,
    StreamType,
    TemporarySinkError,
)
from bgworker.model.ids import new_id
from bgworker.stores import MongoSink, mongo
from bgworker.stores.store import PATIENCE


@pytest.fixture
def stage(on_mongo: MongoStage) -> MongoStage:
    return on_mongo


@pytest.fixture(params=["on_mongo", "on_nx"])
def either(request: pytest.FixtureRequest) -> MongoStage:
    """On each of the servers."""
    found: MongoStage = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def sink(stage: MongoStage) -> Iterator[MongoSink]:
    made = stage.sink()
    yield made
    made.close()


def test_people_find_the_fields_of_a_file(stage: MongoStage, sink: MongoSink) -> None:
    task_id = new_id(1)
    sink.write([said(task_id, 4, '{"a": 1}', format="json"),
                said(task_id, 5, "cut", truncated=True, original_bytes=99),
                StreamEvent(EventType.TASK_PROGRESS, task_id, 6, NOW, StreamType.PROGRESS,
                            percent=40.0, message="2 of 5"),
                ended(task_id, 7, metadata={"who": ["me"]}, duration=1.5, script_hash="h",
                      script_id="m:f", script_text="def f(): ...")])
    common = {"task_id": task_id, "created_utc": "2026-11-23T14:46:00.123456Z"}
    assert list(stage.db.task_streams.find().sort("seq", 1)) == [
        {"_id": f"{task_id}:4", "seq": 4, "stream_type": "output", "payload": '{"a": 1}',
         "format": "json", **common},
        {"_id": f"{task_id}:5", "seq": 5, "stream_type": "output", "payload": "cut",
         "truncated": True, "original_bytes": 99, **common},
        {"_id": f"{task_id}:6", "seq": 6, "stream_type": "progress", "payload": "2 of 5",
         "percent": 40.0, **common}]
    assert list(stage.db.tasks.find()) == [{
        "_id": task_id, "run_id": RUN, "name": "job", "status": "completed", "last_seq": 7,
        "created_utc": common["created_utc"], "completed_utc": common["created_utc"],
        "duration_sec": 1.5, "metadata_json": '{"who":["me"]}', "script_id": "m:f",
        "script_hash": "h"}]
    assert list(stage.db.scripts.find()) == [
        {"_id": "h", "script_id": "m:f", "text": "def f(): ..."}]


def test_it_makes_the_indexes_by_task_time_and_status(stage: MongoStage, sink: MongoSink) -> None:
    sink.open()
    for collection, indexes in mongo.INDEXES.items():
        made = {tuple(name for name, _ in each["key"])
                for each in stage.db[collection].index_information().values()}
        assert {*indexes, ("_id",)} == made


def test_what_a_document_cannot_hold_is_cut_and_says_so(
        stage: MongoStage, sink: MongoSink) -> None:
    task_id = new_id(1)
    sink.write([said(task_id, 1, "\u00e9" * 9_000_000),
                said(task_id, 2, f'"{"x" * 17_000_000}"', format="json")])
    text, json = [event for event in sink.events() if isinstance(event, StreamEvent)]
    assert text.payload == "\u00e9" * (mongo.MOST_BYTES // 2)
    assert (text.truncated, text.original_bytes) == (True, 18_000_000)
    assert (json.truncated, json.original_bytes) == (True, 17_000_002)
    assert json.payload.startswith('{"truncated":17000002,"head":"') and json.payload[-2:] == '"}'


def test_a_value_that_no_document_can_hold_is_refused_alone(sink: MongoSink) -> None:
    task_id = new_id(1)
    for poison in (said(task_id, 2, "surrogate \ud800"), said(task_id, 2**64),
                   ended(task_id, 2, failure_message="x" * 17_000_000)):
        with pytest.raises(PermanentSinkError, match="MongoDB cannot store an event") as caught:
            sink.write([said(task_id, 1), poison])
        assert caught.value.concerns == "event"
    sink.write([said(task_id, 1)])
    assert [event.seq for event in sink.events()] == [1, 0]  # and a placeholder of its task


def test_after_a_failure_it_asks_what_is_there_before_it_inserts_again(
        stage: MongoStage, sink: MongoSink, monkeypatch: pytest.MonkeyPatch) -> None:
    inserted: list[int] = []
    task_id = new_id(1)
    lines = [said(task_id, seq) for seq in range(1, 101)]
    sink.write(lines[:60])
    sink._is_in_doubt = True
    real = sink._many

    def many(act: Any) -> list[int]:
        before = stage.db.task_streams.count_documents({})
        failed = real(act)
        inserted.append(stage.db.task_streams.count_documents({}) - before)
        assert failed == []  # no duplicate was sent
        return failed

    monkeypatch.setattr(sink, "_many", many)
    sink.write(lines)
    assert sum(inserted) == 40 and stage.lines() == [(100, 1)]


def test_errors_that_somebody_must_mend_are_held_and_say_what(
        stage: MongoStage, sink: MongoSink) -> None:
    sink.write([said(new_id(1), 1)])
    for code, remedy in ((13, "readWrite"), (18, "password"), (14031, "make room on the server")):
        stage.fail("insert", code, 1)
        with pytest.raises(TemporarySinkError, match=remedy) as caught:
            sink.write([said(new_id(1), 2)])
        assert caught.value.hold
    sink.write([said(new_id(1), 2)])


@pytest.mark.parametrize("code, is_held", [(64, True), (100, True), (50, False)])
def test_a_write_that_too_few_members_acknowledged_is_not_given_up(
        sink: MongoSink, code: int, is_held: bool) -> None:
    from pymongo.errors import BulkWriteError
    error = BulkWriteError({"writeErrors": [], "nInserted": 3,
                            "writeConcernErrors": [{"code": code, "errmsg": "too few"}]})
    made = [sink._explained("write to", error) for _ in range(PATIENCE + 2)]
    assert all(isinstance(each, TemporarySinkError) for each in made)
    assert [made[0].hold, made[-1].hold] == [False, is_held]  # type: ignore[attr-defined]


def test_a_server_that_does_not_answer_is_named_in_one_line() -> None:
    pymongo = pytest.importorskip("pymongo")
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(9)]
    for hosts, more in ((addresses[:1], {}), (addresses, {"replicaSet": "rs"})):
        with pymongo.MongoClient(hosts, serverSelectionTimeoutMS=20, **more) as client:
            with pytest.raises(TemporarySinkError) as caught:
                MongoSink(client["jobs"]).open()
        text = str(caught.value)
        assert text.startswith("cannot open the MongoDB database 'jobs': no server answers (Server")
        assert text.endswith("check the client's address, and that it runs")
        assert "127.0.0.1:" in text and text.count("Connection refused") <= 2 and len(text) <= 220


@pytest.mark.parametrize("code", [14031, 112])
def test_a_server_that_refuses_for_a_while_costs_nothing(
        stage: MongoStage, load: Load, network: Proxy, code: int) -> None:
    load.goes_on()
    stage.fail("insert", code, EAGER.attempts - 2)
    load.fails(EAGER.attempts - 2)
    load.goes_on()
    load.check()


def test_a_document_that_the_server_refuses_costs_no_other(stage: MongoStage, load: Load) -> None:
    load.goes_on()
    stage.fail("insert", 121, 1)  # against the rules of a validator
    load.fails(1)
    load.goes_on()
    load.check()


@pytest.mark.parametrize("collection, document", [
    ("schema_version", {"_id": "3.1"}),
    ("schema_version", {"version": 3}),
    ("schema_version", {"_id": 1, "version": 3}),
    *[(name, {"_id": 1, "mine": True}) for name in mongo.COLLECTIONS]])
def test_a_database_with_collections_of_somebody_else_is_refused_and_left_alone(
        either: MongoStage, collection: str, document: dict[str, Any]) -> None:
    document = dict(document)
    either.db[collection].insert_one(document)
    refused = f"none of bgworker's.*{collection}.*name another database"
    with Scheduler(1) as pool, pytest.raises(PermanentSinkError, match=refused):
        pool.register_sink(either.sink())
    sink = either.sink()
    with pytest.raises(PermanentSinkError, match=refused) as caught:
        sink.write([said(new_id(1), 1)])
    assert caught.value.concerns == "sink"
    with pytest.raises(PermanentSinkError, match=refused):
        list(sink.events())
    assert list(either.db[collection].find()) == [document]
    assert either.db.list_collection_names() == [collection]


def test_a_database_that_is_dropped_meanwhile_is_made_anew(either: MongoStage) -> None:
    sink = either.sink()
    sink.write([said(new_id(1), 1)])
    either.db.client.drop_database(either.name)
    sink._next_check = 1e18  # it writes before it looks at the version again
    sink.write([said(new_id(2), 1)])
    assert (either.versions(), len(either.tasks())) == ([], 1)
    sink.open()
    assert either.versions() == [1] and len(list(either.sink().events())) == 2
    sink.close()


@pytest.mark.parametrize("wrong", [None, "jobs", 3])
def test_what_is_no_database_is_named(wrong: object) -> None:
    with pytest.raises(ConfigurationError, match="database: expected one of pymongo.*got"):
        MongoSink(wrong)


def test_neither_a_client_nor_a_collection_nor_an_async_database_is_one(stage: MongoStage) -> None:
    import pymongo

    for wrong in (stage.db.client, stage.db.tasks, pymongo.AsyncMongoClient()["jobs"]):
        with pytest.raises(ConfigurationError, match="not of its async API"):
            MongoSink(wrong)

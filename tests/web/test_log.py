"""The live log: what a task says arrives while it says it."""

from __future__ import annotations

import dataclasses
import re
import socket
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Recorder
from tests.support import until
from tests.web.browsing import EVIL, Parsed, ask, connect, head_of

from bgworker.model.events import EventType, StreamEvent, StreamType
from bgworker.web import log
from bgworker.web import server as serving
from bgworker.web.log import LONGEST, line_of, lines_of
from bgworker.web.connections import MOST_LIVE
from bgworker.web.server import Server


class Follower:
    """One who follows a log; parses it as the standard says."""

    def __init__(self, server: Server, task: str, query: str = "", **headers: str) -> None:
        self.connection = connect(server)
        self.connection.sendall(head_of(server, f"/task/{task}/live{query}", **headers))
        self.file = self.connection.makefile("r", encoding="utf-8", newline="\n")
        while line := self.file.readline().strip():
            assert not line.startswith("HTTP") or " 200 " in line

    def event(self) -> tuple[str, str, str]:
        """Return type, id and data of the next event; of none at the end of the stream."""
        kind, number, data = "message", "", []
        for line in self.file:
            if line == "\n":
                return kind, number, "\n".join(data)
            name, _, value = line.rstrip("\n").partition(": ")
            kind = value if name == "event" else kind
            number = value if name == "id" else number
            data += [value] if name == "data" else []
        return "", "", ""

    def text(self) -> str:
        kind, _, data = self.event()
        assert kind == "message"
        return Parsed(data).text

    def close(self) -> None:
        self.file.close()
        self.connection.close()


def nobody_is_served() -> bool:
    return "bgworker-serve" not in [each.name for each in threading.enumerate()]


def event(payload: str = "", **fields: Any) -> StreamEvent:
    return dataclasses.replace(StreamEvent(
        EventType.TASK_OUTPUT, "1", 4, datetime(2026, 11, 24, 12, 0, 0, 7500, tzinfo=timezone.utc),
        StreamType.OUTPUT, payload), **fields)


def test_what_a_task_says_arrives_until_it_has_ended(record: Recorder, server: Server) -> None:
    task = record.task("talks", "running")
    record.said(task, "one")
    follower = Follower(server, task)
    assert "one" in follower.text()
    said_at = time.monotonic()
    seq = record.said(task, "two\nlines", "error")
    kind, number, data = follower.event()
    assert time.monotonic() - said_at < 5.0
    assert (kind, number) == ("message", str(seq))
    assert Parsed(data).shape[0] == "li class" and "two\nlines" in Parsed(data).text
    record.said(task, "three")
    record.end(task)
    assert "three" in follower.text()
    assert follower.event()[0] == "end"
    assert follower.event() == ("", "", ""), "the server hangs up"
    follower.close()


def test_a_follower_goes_on_from_where_it_was(record: Recorder, server: Server) -> None:
    task = record.task("talks")
    first, second = record.said(task, "one"), record.said(task, "two")
    for query, headers in ((f"?after={first}", {}), ("", {"Last_Event_ID": str(first)}),
                           ("?after=0", {"Last_Event_ID": str(first)})):
        follower = Follower(server, task, query, **headers)
        text = follower.text()
        assert "two" in text and "one" not in text
        assert follower.event()[0] == "end"
        follower.close()
    follower = Follower(server, task, f"?after={second}")
    assert follower.event()[0] == "end"
    follower.close()


def test_only_the_stream_that_is_asked_for_arrives(record: Recorder, server: Server) -> None:
    task = record.task("talks")
    for stream in ("output", "error", "warning", "progress"):
        record.said(task, f"said as {stream}", stream)
    follower = Follower(server, task, "?stream=error")
    assert "said as error" in (text := follower.text()) and "output" not in text
    assert follower.event()[0] == "end"
    follower.close()


def test_markup_in_a_live_line_is_text_and_ends_no_event(record: Recorder, server: Server) -> None:
    task = record.task("talks")
    record.said(task, f"\r\n\ndata: x\n\nevent: end\n\n{EVIL}\u2028")
    follower = Follower(server, task)
    kind, _, data = follower.event()
    assert kind == "message" and "<script" not in data and "event: end" in Parsed(data).text
    assert Parsed(data).shape == Parsed(line_of(event("tame"))).shape
    assert follower.event()[0] == "end"
    follower.close()


@pytest.mark.parametrize("count, first", [(1000, 4), (3000, 2504)])
def test_of_what_comes_faster_than_anybody_reads_the_newest_is_sent(
    record: Recorder, server: Server, count: int, first: int
) -> None:
    task = record.task("talks")
    record.many_said(task, count)
    follower = Follower(server, task)
    kind, number, data = follower.event()
    lines = re.findall(r"<span>line (\d+)</span>", data)
    assert lines == [str(each) for each in range(first, count + 4)]
    assert (kind, number) == ("message", str(count + 3))
    assert ("came too fast to be shown" in data) is (first > 4)
    assert follower.event()[0] == "end"
    follower.close()


def test_a_quiet_log_has_a_heartbeat(
    record: Recorder, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_HEARTBEAT", 0.3)
    follower = Follower(server, record.task("thinks", "running"))
    assert follower.file.readline() == ":\n"
    follower.close()


def test_who_has_gone_is_followed_by_nobody(record: Recorder, server: Server) -> None:
    task = record.task("thinks", "running")
    follower = Follower(server, task)
    assert not nobody_is_served()
    follower.close()
    until(nobody_is_served)


def test_too_many_followers_are_told_and_the_pages_go_on(record: Recorder, server: Server) -> None:
    task = record.task("thinks", "running")
    followers = [Follower(server, task) for _ in range(MOST_LIVE)]
    assert ask(server, f"/task/{task}/live").status == 503
    assert ask(server, f"/task/{task}").status == 200
    idle = [connect(server) for _ in range(100)]  # of these the oldest go, not who follows
    assert ask(server, "/").status == 200
    record.said(task, "still here")
    assert all("still here" in each.text() for each in followers)
    for each in followers:
        each.close()
    for connection in idle:
        connection.close()


def test_a_follower_that_reads_nothing_is_hung_up_on(
    record: Recorder, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(log, "INTERVAL", 0.01)
    task = record.task("talks", "running")

    def is_hung_up() -> bool:
        for _ in range(25):  # until there is more than the buffers of a connection take
            record.said(task, "x" * LONGEST)
        return nobody_is_served()

    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head_of(server, f"/task/{task}/live"))
        until(lambda: not nobody_is_served())
        until(is_hung_up)


def test_a_history_that_goes_away_ends_the_stream(record: Recorder, server: Server) -> None:
    follower = Follower(server, record.task("thinks", "running"))
    record.close()
    for name in ("", "-wal", "-shm"):
        Path(record.path + name).unlink(missing_ok=True)
    assert follower.event()[0] == "end", "the page asks again, and is told"
    follower.close()


@pytest.mark.parametrize("fields, text", [
    ({"payload": "x" * (LONGEST + 5)}, f"[cut here: {LONGEST + 5:,} characters"),
    ({"payload": "x", "truncated": True, "original_bytes": 10_000_000},
     "[cut when it was recorded: 10,000,000 bytes]"),
    ({"stream_type": StreamType.PROGRESS, "percent": 41.7, "message": "row 5"}, "42% row 5"),
    ({"stream_type": StreamType.PROGRESS, "percent": None, "message": "row 5"}, "row 5"),
    ({"payload": "\x1b[31mred\x1b[0m\x07"}, "red\\x07")])
def test_a_line_says_what_it_is(fields: dict[str, Any], text: str) -> None:
    parsed = Parsed(line_of(event(**fields)))
    assert text in parsed.text and "12:00:00.007" in parsed.text
    assert len(parsed.text) < LONGEST + 200


def test_of_many_long_lines_the_last_keep_their_text() -> None:
    lines = lines_of([event(f"{number} " + "x" * 50_000) for number in range(200)])
    assert sum(map(len, lines)) < 700_000
    assert len(lines[-1]) > 20_000 and len(lines[0]) < 1000 and "[cut here" in lines[0]

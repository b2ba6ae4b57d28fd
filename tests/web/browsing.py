"""A site for tests, asked by raw HTTP; and what a page is made of."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import Any, NamedTuple

from tests.histories import Recorder, text_of
from tests.support import SOON

from bgworker.web.server import Server

EVIL = ("\"><script>alert(1)</script><img src=x onerror='alert(2)'>${x}&lt;\0\u202e"
        "\x1b[31m\x1b]0;x\x07")
"""Markup for text and for attributes, a place of a template, an entity, and what steers a terminal
or reorders a line."""


def fields_with(text: str) -> dict[str, Any]:
    return {"last_progress_msg": text, "script_id": text, "failure_type": text,
            "failure_message": text, "invocation_info": text, "arg_json": text,
            "run_id": text.replace("\0", ""),
            "script_hash": text, "metadata_json": f'{{"{text}": "{text}"}}'}


def fill_with(record: Recorder, text: str) -> str:
    """Record the same with one text in each place where a task, a run or a sink can put one."""
    record.insert("runs", run_id=text.replace("\0", ""), host=text, pid=1, python=text,
                  version=text, started_utc=text_of(record.now), ended_utc=text_of(record.now))
    record.insert("scripts", hash=text, script_id=text, text=text)
    for status in ("failed", "running", "cancelled", "timed_out", "completed"):
        task = record.task(text, status, created=record.ago(seconds=100), **fields_with(text))
        for stream in ("output", "error", "warning", "verbose", "progress"):
            record.said(task, text, stream, percent=50.0 if stream == "progress" else None)
    record.lost(3, sink=text, reason=text)
    return task


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


@contextmanager
def site(path: object, **how: Any) -> Iterator[Server]:
    """Serve a history until the end of the block, and leave no thread."""
    with Server(str(path), **how) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(SOON)
    assert not thread.is_alive()


def connect(server: Server) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=SOON)


def head_of(server: Server, path: str, *, method: str = "GET", **headers: str | None) -> bytes:
    """Return a request as a browser that has the cookie makes it, but for what ``headers`` say."""
    given = {"Host": f"127.0.0.1:{server.port}",
             "Cookie": f"bgworker-{server.port}={server.token}",
             **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"{method} {path} HTTP/1.1",
             *(f"{name}: {value}" for name, value in given.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def ask(server: Server, path: str, **how: Any) -> Answer:
    return answer_to(server, head_of(server, path, **how))


def answer_to(server: Server, request: bytes) -> Answer:
    with connect(server) as connection:
        connection.sendall(request)
        return read_answer(connection)


def read_answer(connection: socket.socket) -> Answer:
    pieces = []
    while piece := connection.recv(65_536):
        pieces.append(piece)
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return Answer(int(first.split()[1]), headers, body.decode())


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shape: list[str] = []
        """Each tag with the names of its attributes: what no value may change."""
        self.pieces: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.shape.append(" ".join([tag, *(name for name, _ in attrs)]))

    def handle_endtag(self, tag: str) -> None:
        self.shape.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def words(self) -> str:
        """The text, with one space between any two words."""
        return " ".join(" ".join(self.pieces).split())

    def links(self) -> list[str]:
        """Where its links lead, but for the one that asks for the same page again."""
        return [str(attributes["href"]) for tag, attributes in self.tags
                if tag == "a" and attributes.get("id") != "again"]

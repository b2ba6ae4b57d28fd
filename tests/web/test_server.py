"""Who may ask the site, and what asking may cost."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from tests.histories import Recorder
from tests.support import SOON, until
from tests.web.browsing import answer_to, ask, connect, head_of, read_answer, site

from bgworker.web import server as serving
from bgworker.web.connections import IS_KNOWN, MOST_CLIENTS
from bgworker.web.server import POLICY, Server, is_loopback

DARING = ["/", "/failures", "/timeline", "/runs", "/task/last", "/task/last/live", "/nowhere"]


@pytest.fixture(autouse=True)
def users(record: Recorder) -> str:
    """A task whose name nobody may learn who must not know it."""
    return record.task("load users", "failed", failure_type="ValueError", failure_message="bad")


# ---------------------------------------------------------------- who may ask

def test_the_printed_address_leads_in_and_the_token_goes_into_a_cookie(server: Server) -> None:
    assert re.fullmatch(rf"http://127\.0\.0\.1:{server.port}/\?token=[\w-]{{32}}", server.url)
    entry = ask(server, server.url.partition(str(server.port))[2], Cookie=None)
    assert entry.status == 200
    cookie = entry.headers["Set-Cookie"]
    assert cookie == f"bgworker-{server.port}={server.token}; Path=/; HttpOnly; SameSite=Strict"
    # a redirect would belong to the site that had the link, and the cookie not be sent
    assert 'http-equiv="refresh" content="0; url=/"' in entry.body
    assert server.token not in entry.body and "users" not in entry.body
    assert ask(server, "/", Cookie=f"other=1; {cookie.partition(';')[0]}").status == 200


def test_two_servers_have_two_tokens_and_two_cookies(record: Recorder, server: Server) -> None:
    with site(record.path) as other:
        assert other.token != server.token
        assert ask(other, "/", Cookie=f"bgworker-{server.port}={server.token}").status == 403


@pytest.mark.parametrize("cookie", [None, "", "bgworker-PORT=", "bgworker-PORT=wrong",
                                    "bgworker-PORT=é", "bgworker=TOKEN", "bgworker-1=TOKEN"])
def test_without_the_token_nothing_is_told(server: Server, cookie: str | None) -> None:
    given = cookie and cookie.replace("PORT", str(server.port)).replace("TOKEN", server.token)
    for path in DARING:
        answer = ask(server, path, Cookie=given)
        assert answer.status == 403
        assert "users" not in answer.body and "bgworker.db" not in answer.body
        assert server.token not in answer.body and "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("token", ["", "wrong", "é", "TOKEN"])
def test_a_wrong_token_in_an_address_is_refused_and_a_right_one_elsewhere_is_none(
    server: Server, token: str
) -> None:
    path = f"/failures?token={server.token}" if token == "TOKEN" else f"/?token={token}"
    answer = ask(server, path.replace("é", "%C3%A9"), Cookie=None)
    assert answer.status == 403 and "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("host", [
    None, "", "evil.example", "evil.example:PORT", "127.0.0.1", "127.0.0.1:1", "localhost",
    "127.0.0.1:PORT.evil.example", "127.0.0.1.evil.example:PORT", "user@127.0.0.1:PORT",
    "127.0.0.1:PORT, evil.example", "0.0.0.0:PORT", "127.1:PORT", "2130706433:PORT"])
def test_a_name_that_is_not_ours_is_refused_even_with_the_token(
    server: Server, host: str | None
) -> None:
    given = host and host.replace("PORT", str(server.port))
    for path in ("/", f"/?token={server.token}", "/style.css"):
        answer = ask(server, path, Host=given)
        assert answer.status == 403, "a name of somebody else's that leads here is DNS rebinding"
        assert "users" not in answer.body and "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("host", ["127.0.0.1:PORT", "localhost:PORT", "LOCALHOST:PORT",
                                  "[::1]:PORT"])
def test_each_of_our_own_names_is_good(server: Server, host: str) -> None:
    assert ask(server, "/", Host=host.replace("PORT", str(server.port))).status == 200


def test_two_hosts_are_none(server: Server) -> None:
    request = head_of(server, "/").replace(b"Host:", b"Host: evil.example\r\nHost:", 1)
    assert answer_to(server, request).status in (400, 403)


@pytest.mark.parametrize("headers", [
    {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}])
def test_another_sites_request_is_refused_though_it_has_the_cookie(
    server: Server, headers: dict[str, str]
) -> None:
    for path in (*DARING, "/script.js"):
        answer = ask(server, path, **headers)
        assert answer.status == 403 and "users" not in answer.body


@pytest.mark.parametrize("headers", [
    {"Sec_Fetch_Site": "none"}, {"Sec_Fetch_Site": "same-origin"},
    {"Sec_Fetch_Site": "same-origin", "Origin": "http://127.0.0.1:PORT"}])
def test_our_own_pages_and_bookmarks_may_ask(server: Server, headers: dict[str, str]) -> None:
    given = {name: value.replace("PORT", str(server.port)) for name, value in headers.items()}
    assert ask(server, "/", **given).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE",
                                    "CONNECT", "PROPFIND", "get", "G<b>T"])
def test_only_get_and_head_are_answered(server: Server, method: str) -> None:
    answer = ask(server, "/", method=method)
    assert answer.status == 405 and answer.headers["Allow"] == "GET, HEAD"
    assert "users" not in answer.body and "<b>" not in answer.body


@pytest.mark.parametrize("path", ["/", "/task/last", "/style.css", "/nowhere", "/task/last/live"])
def test_a_head_has_the_headers_of_a_get_and_nothing_else(server: Server, path: str) -> None:
    answer = ask(server, path, method="HEAD")
    assert answer.body == "" and answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.status == (404 if path == "/nowhere" else 200)


@pytest.mark.parametrize("path", [*DARING, "/style.css", "/script.js", "/?token=wrong",
                                  "/?since=never"])
def test_every_answer_has_the_policy_and_opens_nothing_to_other_sites(
    server: Server, path: str
) -> None:
    for cookie in (None, f"bgworker-{server.port}={server.token}"):
        answer = ask(server, path, Cookie=cookie)
        assert answer.headers["Content-Security-Policy"] == POLICY == (
            "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
            "img-src 'self' data:")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Content-Type"].endswith("; charset=utf-8")
        assert not any(name.startswith("Access-Control") for name in answer.headers)
        assert "Python" not in answer.headers["Server"]


@pytest.mark.parametrize("path", [
    "/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/style.css/../server.py", "//etc/passwd",
    "/web/server.py", "/templates.html", "/./server.py", "/style.css%00.html", "/\\..\\server.py",
    "http://evil.example/etc/passwd", "http://[", "//[", "*", "style.css",
    "/task/../../style.css", "/task/%2e%2e%2fserver.py"])
def test_no_path_leads_to_a_file(server: Server, path: str) -> None:
    answer = ask(server, path)
    assert answer.status in (400, 404)
    assert "root:" not in answer.body and "import " not in answer.body


def test_the_token_is_in_no_log_and_on_no_stream(
    server: Server, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for path in (f"/?token={server.token}", "/?token=wrong", "/", f"/nowhere?token={server.token}"):
        ask(server, path)
    answer_to(server, f"GARBAGE {server.token}\r\n\r\n".encode())
    assert server.token not in "".join(capfd.readouterr()) + caplog.text


# ---------------------------------------------------------------- strange requests

@pytest.mark.parametrize("request_", [
    b"\r\n\r\n", b"GARBAGE\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/x\r\n\r\n", b"\0\0\0\0\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    b"GET / HTTP/1.1\r\n no colon\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 500 + b"\r\n",
    b"<script>alert(1)</script> / HTTP/1.1\r\n\r\n"])
def test_garbage_gets_an_answer_or_none_and_harms_nobody(
    server: Server, request_: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with connect(server) as connection:
        connection.sendall(request_)
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece
    assert b"<script>alert" not in answer and b"users" not in answer
    assert ask(server, "/").status == 200
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_head_that_is_too_long_is_cut_off(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 1000.0)
    with connect(server) as connection, pytest.raises(OSError):
        for _ in range(2000):
            connection.sendall(b"x: " + b"y" * 4000 + b"\r\n")
    assert ask(server, "/").status == 200


@pytest.mark.parametrize("query", ["status=nonsense", "since=never", "until=never", "run=zz",
                                   "before=%00", "after=x", "fingerprint=%22%3E%3Cb%3E"])
def test_a_query_that_means_nothing_is_explained(server: Server, query: str) -> None:
    answer = ask(server, f"/?{query}")
    assert answer.status in (200, 400) and "<b>" not in answer.body.partition("<main")[0]
    assert "Traceback" not in answer.body


# ---------------------------------------------------------------- what it may cost

def test_half_requests_and_clients_that_read_nothing_keep_nobody_out(
    server: Server, record: Recorder
) -> None:
    """500 connections: half of them never end their request, half never read the answer."""
    for number in range(300):
        record.said(record.task(f"task {number}"), "x" * 1000)
    resource = pytest.importorskip("resource", reason="needs POSIX")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crowd = []
    try:
        for number in range(500):
            connection = connect(server)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            whole = head_of(server, "/")
            connection.sendall(whole if number % 2 else whole[:30])
            crowd.append(connection)
            if number % 50 == 0:
                begun = time.monotonic()
                assert ask(server, "/task/last").status == 200
                assert time.monotonic() - begun < SOON / 3
        visits = [each for each in threading.enumerate() if each.name == "bgworker-serve"]
        assert len(visits) <= MOST_CLIENTS
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 60_000, f"{grown} KiB"
    finally:
        for connection in crowd:
            connection.close()
    assert ask(server, "/").status == 200


def test_who_has_the_token_is_not_sent_away_for_those_who_have_not(server: Server) -> None:
    """The answer to a slow question comes, though a crowd has arrived after who asked it."""
    for _ in range(serving.MOST_QUESTIONS):
        assert server.questions.acquire(timeout=SOON)
    with connect(server) as asking:
        asking.sendall(head_of(server, "/"))
        until(lambda: [client.rank for client in server._clients.values()] == [IS_KNOWN])
        crowd = []
        for _ in range(3 * MOST_CLIENTS):
            connection = connect(server)
            connection.sendall(b"GET")
            crowd.append(connection)
        for _ in range(serving.MOST_QUESTIONS):
            server.questions.release()
        assert read_answer(asking).status == 200
    for connection in crowd:
        connection.close()


def test_who_is_slow_is_sent_away(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.2)
    with connect(server) as connection:
        connection.sendall(head_of(server, "/")[:20])

        def is_hung_up() -> bool:
            try:
                connection.sendall(b"x")  # each byte comes in time, all of them do not
            except OSError:
                return True
            return False

        until(is_hung_up)


def test_who_asks_while_too_many_questions_are_answered_is_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "QUEUE_SECONDS", 0.05)
    for _ in range(serving.MOST_QUESTIONS):
        assert server.questions.acquire(timeout=SOON)
    answer = ask(server, "/")
    assert answer.status == 503 and "too many questions" in answer.body
    for _ in range(serving.MOST_QUESTIONS):
        server.questions.release()
    assert ask(server, "/").status == 200


def test_the_end_of_the_server_hangs_up_on_everybody(record: Recorder) -> None:
    running = record.task("talks", "running")
    with site(record.path) as server:
        follower, idle = connect(server), connect(server)
        follower.sendall(head_of(server, f"/task/{running}/live"))
        assert b"200" in follower.recv(100)
    for connection in (follower, idle):
        with connection:
            while connection.recv(65_536):
                pass


# ---------------------------------------------------------------- where it listens


@pytest.mark.parametrize(
    "host, is_ours",
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("example.com", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_loopback_is_known_by_its_address(host: str, is_ours: bool) -> None:
    assert is_loopback(host) is is_ours


def test_a_server_for_others_answers_to_the_address_at_which_it_was_reached(
    record: Recorder
) -> None:
    with site(record.path, host="0.0.0.0") as server:
        assert f"http://{socket.gethostname()}:{server.port}/" in server.url
        for host, status in ((f"127.0.0.1:{server.port}", 200), (f"localhost:{server.port}", 200),
                             (f"192.0.2.1:{server.port}", 403), (f"evil.test:{server.port}", 403)):
            assert ask(server, "/", Host=host).status == status


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"),
                    reason="needs IPv6")
def test_it_listens_on_ipv6(record: Recorder) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    with site(record.path, host="::1") as server:
        assert server.url.startswith(f"http://[::1]:{server.port}/?token=")
        assert ask(server, "/", Host=f"[::1]:{server.port}").status == 200


# ---------------------------------------------------------------- a history that goes away

def test_a_history_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "later.db"
    with site(path) as server:
        answer = ask(server, "/")
        assert answer.status == 503 and "there is no history at" in answer.body
        assert 'data-refresh="3"' in answer.body, "a script asks again"
        recorder = Recorder(path)
        recorder.task("at last")
        assert "at last" in ask(server, "/").body
        recorder.close()


@pytest.mark.parametrize("path", ["/", "/failures", "/timeline", "/runs", "/task/last"])
def test_a_history_that_is_deleted_replaced_or_damaged_makes_a_page_that_says_so(
    record: Recorder, server: Server, path: str
) -> None:
    record.close()
    file = Path(record.path)
    good = file.read_bytes()
    assert ask(server, path).status == 200
    for content, complaint in ((None, "there is no history"), (b"x" * 8192, "is not a history"),
                               (good[:4096] + b"\xff" * (len(good) - 4096), "is damaged"),
                               (b"", "is empty")):
        for name in (record.path, f"{record.path}-wal", f"{record.path}-shm"):
            if os.path.exists(name):
                os.unlink(name)
        if content is not None:
            file.write_bytes(content)
        answer = ask(server, path)
        assert answer.status == 503 and complaint in answer.body, answer.body
        main = answer.body.partition("<main")[2]
        assert file.name in main and str(file.parent) not in main
    file.write_bytes(good)
    assert ask(server, path).status == 200


def test_a_history_that_somebody_holds_locked_makes_a_page_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PATIENCE", 0.1)
    path = tmp_path / "history.db"
    Recorder(path).close()
    with site(path) as server:
        locker = sqlite3.connect(path, isolation_level=None)
        locker.execute("PRAGMA locking_mode = EXCLUSIVE")
        locker.execute("BEGIN IMMEDIATE")
        locker.execute("INSERT INTO losses VALUES ('x', 'x', 1, '{}', '2026')")
        locker.execute("COMMIT")
        answer = ask(server, "/")
        assert answer.status == 503 and "is locked" in answer.body
        locker.close()
        assert ask(server, "/").status == 200


def test_two_answers_are_read_at_once(server: Server) -> None:
    first, second = connect(server), connect(server)
    with first, second:
        for connection in (first, second):
            connection.sendall(head_of(server, "/"))
        assert [read_answer(each).status for each in (second, first)] == [200, 200]

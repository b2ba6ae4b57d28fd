"""The site over HTTP: read only, for one person at one browser, and safe beside hostile neighbours.

Who may ask. Only this machine can connect, unless another address is bound. A request must name us
by an address that is ours, with the port (else a name of somebody else's that leads here would do:
DNS rebinding); must come from a page of ours or from nowhere; and must carry the token, which came
with the printed address and lives on in a cookie that no other site's request carries. GET and HEAD
alone are answered. No answer may be read by, framed in or run by another site.

What it may cost. Connections are bounded (see `connections`). The head of a request has `MOST_HEAD`
bytes and `HEAD_SECONDS`, an answer `ANSWER_SECONDS` to be taken. At most `MOST_QUESTIONS` requests
ask the history at a time, and no question takes longer than `PATIENCE`. Each request opens the
file for itself: one that is deleted, replaced, damaged or locked meanwhile makes a page that says
so, and the next request finds what is there by then.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import socket
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from urllib.parse import parse_qsl, unquote

from ..history.reader import History
from ..model.clock import monotonic
from ..model.errors import ConfigurationError, HistoryError, UnknownTask
from ..words import now
from . import log, pages, sections
from .connections import IS_KNOWN, IS_LIVE, BoundedServer
from .markup import Markup, asset, fill
from .pages import PAGES, Page
from .view import Address, middle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

MOST_QUESTIONS = 4
MOST_HEAD = 65_536  # all programs that serve on this machine share its cookies
HEAD_SECONDS, ANSWER_SECONDS, QUEUE_SECONDS = 5.0, 10.0, 5.0
PATIENCE = 5.0
"""Seconds that a question may take, or wait for a file that somebody holds locked."""

POLICY = ("default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
          "img-src 'self' data:")
_HEADERS = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
    ("Connection", "close"),
)
_ASSETS = {"/style.css": "text/css", "/script.js": "text/javascript"}
"""Files that anybody may have: they hold no data, and a refusal is to look well, too."""

_HTML = "text/html"


class Refused(Exception):
    """A request is not answered; the text says why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Server(BoundedServer):
    """Serves the pages of one history, until `server_close`.

    Args:
        path: of the history, which need not be there yet.
        host: to bind, a name or an address; more than this machine can connect where it is no
            loopback address.
        port: to bind; 0 takes any that is free.

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(self, path: str | os.PathLike[str], *, host: str = "127.0.0.1",
                 port: int = 0) -> None:
        self.path = os.path.abspath(path)
        self.token = secrets.token_urlsafe(24)
        self.questions = threading.BoundedSemaphore(MOST_QUESTIONS)
        super().__init__(host, port, _Visit)
        self.host, self.port = host, int(self.server_address[1])

    @property
    def url(self) -> str:
        """The address to open, with the token in it."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{_bracketed(host)}:{self.port}/?token={self.token}"

    def hosts(self, own: str) -> set[str]:
        """Return what a request may call us, in small letters.

        Args:
            own: the address at which it came in.
        """
        names = {self.host, own}
        if is_loopback(own):
            names |= {"localhost", "127.0.0.1", "::1"}
        elif not is_loopback(self.host):
            names.add(socket.gethostname())
        found = {f"{_bracketed(name)}:{self.port}".lower() for name in names}
        return found | {_bracketed(name).lower() for name in names if self.port == 80}


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can connect to an address."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


# ---------------------------------------------------------------- one request

class _Visit(BaseHTTPRequestHandler):
    """One connection with one request."""

    server: Server
    default_request_version = "HTTP/1.0"  # 0.9 has no headers, and so no policy

    def handle(self) -> None:
        """Read the head of a request, bounded in bytes and time, and answer it."""
        head = self._read_head()
        if head:
            self.rfile.close()
            self.rfile = BytesIO(head)
            self.connection.settimeout(ANSWER_SECONDS)
            self.handle_one_request()

    def _read_head(self) -> bytes:
        deadline = monotonic() + HEAD_SECONDS
        head = b""
        while b"\r\n\r\n" not in head and b"\n\n" not in head:
            left = deadline - monotonic()
            if left <= 0 or len(head) > MOST_HEAD:
                return b""
            self.connection.settimeout(left)
            piece = self.connection.recv(4096)
            if not piece:
                return b""
            head += piece
        return head

    def do_GET(self) -> None:
        """Answer; `BaseHTTPRequestHandler` calls this."""
        try:
            self._answer()
        except Refused as refusal:
            self.send_error(refusal.status, str(refusal))

    do_HEAD = do_GET

    def _answer(self) -> None:
        quoted, _, query = self.path.partition("?")
        here = Address(unquote(quoted), dict(parse_qsl(query, errors="replace")))
        path = here.path
        self._check_host()
        if path == "/" and self._knows(here.get("token")):
            cookie = f"{self._cookie}={self.server.token}; Path=/; HttpOnly; SameSite=Strict"
            self._reply(200, fill("entry"), _HTML, cookie)
            return
        self._check_origin()
        if path in _ASSETS:
            self._reply(200, asset(path[1:]), _ASSETS[path])
            return
        self._check_token()
        if path.startswith("/task/") and path.endswith("/live"):
            self._follow(path[len("/task/"):-len("/live")], here)
        else:
            page, time = self._page(here), now()
            fresh = fill("fresh", exact=time.isoformat(), clock=f"{time:%H:%M:%S} UTC",
                         here=here.changed())
            self._reply(page.status, _whole(page, self.server.path, path, fresh), _HTML)

    # -- who may ask --

    def _check_host(self) -> None:
        hosts = self.headers.get_all("Host", [])
        own = self.connection.getsockname()[0]
        if len(hosts) != 1 or hosts[0].strip().lower() not in self.server.hosts(own):
            raise Refused(403, "This is not the address of this server. Open the one that "
                          "bgworker serve has printed.")

    def _check_origin(self) -> None:
        """Refuse what another site's page has asked for, even one on another port of ours."""
        site = self.headers.get("Sec-Fetch-Site", "none")
        origin = self.headers.get("Origin")
        if site not in ("none", "same-origin") or (
                origin is not None and origin != f"http://{self.headers['Host']}"):
            raise Refused(403, "This was asked for by another site. Open the address that bgworker "
                          "serve has printed.")

    def _check_token(self) -> None:
        for pair in self.headers.get("Cookie", "").split(";"):
            name, _, value = pair.strip().partition("=")
            if name == self._cookie and self._knows(value):
                self.server.promote(self.connection, IS_KNOWN)
                return
        raise Refused(403, "The token is missing or not the right one. Open the address that "
                      "bgworker serve has printed; it has the token in it.")

    def _knows(self, token: str | None) -> bool:
        return hmac.compare_digest((token or "").encode(), self.server.token.encode())

    @property
    def _cookie(self) -> str:
        return f"bgworker-{self.server.port}"  # all servers of a machine share its cookies

    # -- answers --

    def _page(self, here: Address) -> Page:
        """Return a page, or the one that says why it cannot be had."""
        try:
            with self._asking() as history:
                page = pages.page_of(here, history)
        except UnknownTask as error:
            return _trouble("No such task", error, 404)
        except ConfigurationError as error:
            return _trouble("Not understood", error, 400)
        except HistoryError as error:
            return _trouble("The history cannot be read now", error, 503, 3, self.server.path)
        return page or _trouble("No such page", here.path, 404)

    @contextmanager
    def _asking(self) -> Iterator[History]:
        """Open the history, once it is this request's turn; who goes meanwhile gives up his."""
        deadline = monotonic() + QUEUE_SECONDS
        while not self.server.questions.acquire(timeout=0.02):
            self._pause(0.001)
            if monotonic() > deadline:
                raise HistoryError("too many questions are being answered; try again")
        try:
            with History(self.server.path, patience=PATIENCE) as history:
                yield history
        finally:
            self.server.questions.release()

    def _follow(self, task_id: str, here: Address) -> None:
        """Send what a task says until it has ended, or the client goes."""
        if last := self.headers.get("Last-Event-ID"):  # it comes again, and goes on from there
            here = Address(here.path, {**here.query, "after": last})
        if not self.server.promote(self.connection, IS_LIVE):
            raise Refused(503, "Too many logs are being followed; close a page.")
        try:
            after = here.number("after") or 0
            history = History(self.server.path, patience=PATIENCE)
        except ConfigurationError as error:
            raise Refused(400, str(error)) from error
        except HistoryError as error:
            raise Refused(503, str(error)) from error
        with history:
            self._send_head(200, "text/event-stream")
            if self.command != "HEAD":
                log.follow(history, task_id, after, here.get("stream"), self._send, self._pause)

    def _pause(self, seconds: float) -> None:
        """Wait, and raise when the client has gone."""
        self.connection.settimeout(seconds)
        with suppress(TimeoutError):
            self.connection.recv(1)
            raise ConnectionAbortedError
        self.connection.settimeout(ANSWER_SECONDS)

    def _send(self, text: str) -> None:
        self.connection.sendall(text.encode())

    def _reply(self, status: int, text: str, kind: str, cookie: str | None = None) -> None:
        body = text.encode()
        self._send_head(status, kind, len(body), cookie)
        if self.command != "HEAD":
            self.connection.sendall(body)

    def _send_head(self, status: int, kind: str, size: int | None = None,
                   cookie: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if size is not None:
            self.send_header("Content-Length", str(size))
        if cookie is not None:
            self.send_header("Set-Cookie", cookie)
        if status == 405:
            self.send_header("Allow", "GET, HEAD")
        for name, value in _HEADERS:
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None,
                   explain: str | None = None) -> None:
        """Refuse a request; `BaseHTTPRequestHandler` calls this, too."""
        status, text = (405, "Only GET and HEAD are answered here.") if code == 501 else (
            code, message or "This request cannot be answered.")
        self._reply(status, _whole(_trouble("Refused", text, status), None, "", None), _HTML)

    def version_string(self) -> str:
        """Return what the header Server says."""
        return "bgworker"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the first address has the token in it."""


def _trouble(title: str, what: object, status: int, refresh: int | None = None,
             path: str | None = None) -> Page:
    remedy = "This page tries again by itself, or when you reload it." if refresh else ""
    return Page(title, sections.trouble(title, str(what), remedy, path), refresh, status)


def _whole(page: Page, file: str | None, path: str, fresh: Markup | None) -> Markup:
    """Return a whole page of the site. Who is refused learns nothing of the history."""
    links = [] if file is None else [
        fill("nav", href=href, text=name, current="page" if href == path else "false")
        for href, (name, _) in PAGES.items()]
    return fill("page", head=fill("site-head"), title=page.title, nav=links, path=file,
                file=middle(file), fresh=fresh, refresh=page.refresh, body=page.body)

"""One HTTP POST on `urllib.request`, bounded in time and in size whatever the receiver does. The
sink's thread.

A timeout of a socket bounds each read, so that a receiver which sends a byte now and then holds its
sender for ever. Here one deadline covers an attempt: connecting, sending, and the answer up to the
end of its headers. Not under it are name resolution, which nothing bounds, and the steps that have
a timeout of their own: connecting to each address of a host name, what a proxy says when it opens a
tunnel, and the handshake of TLS. (A timer that shuts the socket would need a thread, and at the end
of a program Python 3.12 starts none.)

Redirects are not followed, cookies not kept, and the answer's body is not looked at.

This module imports `urllib.request`, `http.client` and `ssl`, so it is imported when a webhook is
first made.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  # `socket` would load it with the first host name
import http.client
import re
import socket
import ssl
import urllib.error
import urllib.request
from contextlib import suppress

from ..model.clock import monotonic
from ..model.errors import TemporarySinkError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_now = monotonic
"""The clock of all deadlines; tests put another here."""

MOST_READ = 65_536
"""Bytes of the answer's body that are read, and thrown away, before the connection is closed ..."""
MOST_WAITED = 1.0
"""... and seconds that they are waited for: closing on a receiver that still writes would make it
see an error."""


_PROXY = re.compile(
    r"(https?://)?([^/\s]*@)?([\w-]{1,63}(\.[\w-]{1,63})*\.?|\[[0-9a-f:.]+\])(:[0-9]{1,5})?(/\S*)?",
    re.I,
)
"""A proxy that speaks HTTP, as the environment names it. `urllib.request` would take any other for
one of those."""


class Poster:
    """Posts to one URL.

    Args:
        url: as a `urllib.request.Request` takes it.
        shown: what errors show of it.
        timeout: seconds that an attempt may take.
        use_proxies: go through the proxies that the environment names, as `urllib.request` does;
            False goes straight.
    """

    def __init__(self, url: str, shown: str, timeout: float, use_proxies: bool) -> None:
        self._url = url
        self._shown = shown
        self._timeout = timeout
        self._proxies = urllib.request.getproxies() if use_proxies else {}
        # bare: no handler for redirects, errors, files or FTP
        self._opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler(self._proxies), _Http(), _Https()):
            self._opener.add_handler(handler)

    def post(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str]]:
        """Send one request; return the status of the answer and its headers.

        Raises:
            TemporarySinkError: there is no answer, or none in HTTP, or the environment's proxy is
                malformed. It neither shows nor chains that setting, nor what the receiver has sent,
                which may be what it was sent.
        """
        request = urllib.request.Request(self._url, body, dict(headers), method="POST")
        proxy = (
            ""
            if urllib.request.proxy_bypass(request.host)
            else self._proxies.get(request.type, "").strip()
        )
        way = (
            f"cannot reach {self._shown}{' through the proxy in the environment' if proxy else ''}"
        )
        malformed = (
            f"cannot reach {self._shown}: the proxy in the environment is malformed; "
            "set it as http://HOST:PORT"
        )
        if proxy and not _PROXY.fullmatch(proxy):
            raise TemporarySinkError(malformed)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return response.status, response.headers
        except OSError as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            told = self._told(reason)
            trouble = (
                f"cannot reach {self._shown}: {told}"
                if told.startswith("Tunnel")
                else f"{way}: {told}"
            )
        except http.client.HTTPException as error:
            what = f"{self._shown} does not answer" if not proxy else f"{way}: no answer"
            trouble = f"{what} in HTTP ({type(error).__name__})"
        except ValueError:  # its words show what the environment holds, which may be a password
            trouble = malformed
        raise TemporarySinkError(trouble)

    def _told(self, reason: object) -> str:
        if isinstance(reason, TimeoutError):
            return f"no answer within {self._timeout:g} s"
        if isinstance(reason, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not trusted ({reason.verify_message}); mend the certificate, "
                "or name the one of its authority in SSL_CERT_FILE"
            )
        if isinstance(reason, http.client.RemoteDisconnected):
            return "it closed the connection without an answer"
        if isinstance(reason, OSError) and reason.strerror:
            return reason.strerror
        # "Tunnel connection failed: 407", and then the proxy's own words
        return " ".join(str(reason).split()[:4])


class _Bounded:
    """Mixed into a socket: nothing waits beyond a deadline, however little comes at a time."""

    until = 0.0
    """On the clock `_now`."""
    has_ended = False
    """True once the other side was seen to send no more."""

    def sendall(self: Any, data: Any, flags: int = 0) -> None:
        left = memoryview(data)
        try:
            while left:
                self.settimeout(self._left())
                left = left[self.send(left, flags):]
        except (BrokenPipeError, ConnectionResetError):
            # it may have answered before it has read all, as to a body that is too large: then that
            # counts
            pass

    def recv_into(self: Any, *arguments: Any) -> int:
        self.settimeout(self._left())
        received: int = super().recv_into(*arguments)  # type: ignore[misc]
        self.has_ended = received == 0
        return received

    def _left(self) -> float:
        left = self.until - _now()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


class _Socket(_Bounded, socket.socket):
    pass


class _TlsSocket(_Bounded, ssl.SSLSocket):
    pass


def _connected(address: Any, timeout: Any, source: Any) -> _Socket:
    sock = _Socket(fileno=socket.create_connection(address, timeout, source).detach())
    sock.until = _now() + timeout  # for what a proxy says when it opens a tunnel
    return sock


class _Timed:
    """Mixed into a connection of `http.client`: all that happens on its socket ends by one
    deadline, the reading of the answer's body included."""

    sock: Any
    timeout: Any

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._create_connection = _connected  # what `http.client` calls to connect

    def connect(self) -> None:
        until = _now() + self.timeout
        super().connect()  # type: ignore[misc]
        self.sock.until = until

    def getresponse(self) -> http.client.HTTPResponse:
        sock = self.sock  # forgotten while the answer is read, if it says that the connection ends
        response: http.client.HTTPResponse = super().getresponse()  # type: ignore[misc]
        if sock.has_ended:
            # http.client takes the end of the connection for the end of the headers
            response.close()
            raise http.client.IncompleteRead(b"")
        sock.until = min(sock.until, _now() + MOST_WAITED)
        # The verdict is in already: what goes wrong from here on changes nothing. ValueError: a
        # chunk of no size.
        with suppress(OSError, http.client.HTTPException, ValueError):
            response.read(MOST_READ)
        return response


class _HttpConnection(_Timed, http.client.HTTPConnection):
    pass


class _HttpsConnection(_Timed, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpConnection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self) -> None:
        # whatever a program has made urllib's own default
        self._verifying = ssl.create_default_context()
        self._verifying.sslsocket_class = _TlsSocket
        super().__init__(context=self._verifying)  # which would make one more without it

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpsConnection, req, context=self._verifying)

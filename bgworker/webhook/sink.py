"""Events to a URL: signed, in a standard envelope, and patient with the receiver.

Guarantees. The same batch has the same id and the same bytes on every attempt. No error, log line
or ``repr`` shows a secret, a header, or more of the URL than its scheme, host and port. All but the
constructor runs on the sink's thread.

`cloudevents` makes the body, `signing` the signature, `posting` one attempt; this module says what
the answer means to delivery. The receiver's side is `signing.verify`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping

from .. import __version__
from ..model import checks
from ..model.errors import ConfigurationError, PermanentSinkError, TemporarySinkError, WireError
from ..sinks.specs import SECRET_VARIABLE
from .cloudevents import CONTENT_TYPE, KnownRuns, encode_batch
from .signing import Keys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..model.errors import SinkError
    from ..model.events import Event
    from .posting import Poster

OWN_HEADERS = (
    "webhook-id",
    "webhook-timestamp",
    "webhook-signature",
    "content-type",
    "content-length",
    "transfer-encoding",
    "connection",
    "host",
    "expect",
)
"""The sink sets these itself; ``headers`` cannot change them."""

HELD = {
    401: "give it the secret or the credentials that it expects",
    403: "have it allow this sender",
    407: "give the proxy in the environment the credentials that it expects",
}
"""Statuses that say nothing about the events, and that a person has to mend -> how."""

ABOUT_EVENTS = (400, 409, 413, 422)
"""Statuses that one event may cause. Any other of 3xx and 4xx refuses the request, whatever is in
it."""


class WebhookSink:
    """Posts each batch as one request to a URL. Delivery is at least once, in order.

    The body is a CloudEvents 1.0 JSON batch (see `cloudevents`), the signature is of
    Standard Webhooks: the receiver checks it with `verify`, or with the library of its language.
    ``webhook-id`` is made of the events: the same batch has the same id and body on every attempt,
    and a receiver that has dealt with an id may answer 2xx and do nothing. Events may come again in
    other batches, after a restart or a replay; they have the same ids then.

    What the receiver answers decides what becomes of the batch:

    - 2xx: delivered; what follows the headers does not matter.
    - 408, 429, 5xx, or no answer in HTTP: tried again, after ``Retry-After`` if there is one
      (seconds or a date, at most the ``cap`` of the `RetryPolicy`). Network errors, timeouts and
      certificates that are not trusted count as no answer.
    - 401, 403, 407: held, and tried again once in the ``cap``, until somebody has mended it.
    - 410: the sink is closed; this and all that comes is parked, or dropped and counted.
    - 400, 409, 413, 422: halved until the offending events stand alone; those are parked, or
      dropped and counted.
    - Any other 3xx or 4xx: parked, or dropped and counted, as a whole; no redirect is followed.

    To change the secret, sign with both, ``secret=[new, old]``, give the receiver the new one, and
    then leave the old one out: no request fails in between.

    No error, log line or ``repr`` shows a secret, a header, or more of the URL than its scheme,
    host and port.

    Args:
        url: ``https://...``, or ``http://`` to this machine (localhost, 127.0.0.0/8, ::1). ASCII,
            without user name and password: put those into ``headers``.
        secret: ``whsec_`` secrets that sign, each: one, several with spaces between, or a
            collection; during a rotation the new and the old one. None reads the environment
            variable ``BGWORKER_WEBHOOK_SECRET``.
        timeout: seconds that one attempt may take, from the connection to the end of the answer's
            headers.
        allow_http: permits plain ``http://`` to any host. Everybody on the way can read the events
            then.
        headers: further headers of each request, such as ``{"Authorization": "Bearer ..."}``.
        use_proxies: go through the proxies that the environment names (``https_proxy``,
            ``no_proxy``, ...), as `urllib.request` does. Plain ``http://`` to this machine never
            does, unless ``allow_http``.

    Certificates are verified against the system's authorities; the environment variables
    ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` name others.

    Raises:
        ConfigurationError: an argument, or the environment's secret, cannot be used. It shows
            nothing that is secret.
    """

    preferred_batch = 500

    _now = staticmethod(time.time)  # tests put another clock here

    def __init__(
        self,
        url: str,
        *,
        secret: str | Iterable[str] | None = None,
        timeout: float = 15.0,
        allow_http: bool = False,
        headers: Mapping[str, str] | None = None,
        use_proxies: bool = True,
    ) -> None:
        for name, value in (("allow_http", allow_http), ("use_proxies", use_proxies)):
            if not isinstance(value, bool):
                raise ConfigurationError(f"{name}: expected True or False, got {value!r}")
        self._timeout = checks.number("timeout", timeout, above=0)
        self._shown, is_local = _checked_url(url, allow_http)
        self._url = url
        self._use_proxies = use_proxies and (allow_http or not is_local)
        self._keys = _keys_from_environment() if secret is None else Keys(secret)
        self._headers = {"user-agent": f"bgworker/{__version__}", "content-type": CONTENT_TYPE,
                         **_checked_headers({} if headers is None else headers)}
        self._runs = KnownRuns()
        self._poster: Poster | None = None
        try:
            # Here, not on the sink's thread: a fork in the middle of an import leaves the child
            # with half a module, for ever.
            from .posting import Poster
        except ImportError as error:  # a Python that was built without OpenSSL
            raise ConfigurationError(f"this Python cannot post to {self._shown}: {error}; "
                                     "use one with the ssl module") from error
        self._new_poster = Poster

    def __repr__(self) -> str:
        return f"WebhookSink({self._shown!r})"

    def open(self) -> None:
        """Get ready; nothing is sent. Reads the environment's proxies and the system's certificate
        authorities."""
        self._poster = self._new_poster(self._url, self._shown, self._timeout, self._use_proxies)

    def write(self, events: Sequence[Event]) -> None:
        """Post the events, as one request.

        Raises:
            TemporarySinkError: they may be taken later.
            PermanentSinkError: they will not be, or an event has no wire form.
        """
        try:
            body, text = encode_batch(events, self._runs.known)
        except WireError as error:
            raise PermanentSinkError(
                f"cannot encode an event for {self._shown}: {error}"
            ) from error
        self._post(f"msg_{text}", body)
        self._runs.learn(events)

    def close(self) -> None:
        """Let go of what `open` has made; a later ``write`` opens it again. No connection outlives
        a ``write``."""
        self._poster = None

    def _post(self, message_id: str, body: bytes) -> None:
        if self._poster is None:
            self.open()
        timestamp = int(self._now())
        headers = {
            **self._headers,
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": " ".join(self._keys.signatures(message_id, timestamp, body)),
        }
        status, answered = self._poster.post(body, headers)  # type: ignore[union-attr]
        if not 200 <= status < 300:
            raise self._error(status, _seconds(answered.get("retry-after", ""), self._now()))

    def _error(self, status: int, retry_after: float | None) -> SinkError:
        from http import HTTPStatus  # not what the receiver calls it: its text is not ours to show

        known = {each.value: f"{each.value} {each.phrase}" for each in HTTPStatus}
        what = f"{self._shown} answered {known.get(status, status)}"
        if status in HELD:
            return TemporarySinkError(f"{what}; {HELD[status]}", hold=True, retry_after=retry_after)
        if status == 410:
            return PermanentSinkError(f"{what}: it wants no events any more", concerns="sink")
        if 300 <= status < 400:
            return PermanentSinkError(
                f"{what}: redirects are not followed; give the URL that it leads to",
                concerns="batch",
            )
        if 400 <= status < 500 and status not in (408, 429):
            return PermanentSinkError(what, concerns="event" if status in ABOUT_EVENTS else "batch")
        return TemporarySinkError(what, retry_after=retry_after)


def _seconds(retry_after: str, now: float) -> float | None:
    """Return the seconds that a ``Retry-After`` asks for; None if it asks for nothing that could be
    waited for.

    Source: RFC 9110, section 10.2.3.
    """
    if re.fullmatch("[0-9]+", retry_after):
        seconds = float(retry_after)  # infinite, perhaps: delivery knows a bound
    else:
        from datetime import timezone
        from email.utils import parsedate_to_datetime

        try:
            date = parsedate_to_datetime(retry_after)
            # asctime: no zone
            seconds = (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if seconds > 0 else None


def _keys_from_environment() -> Keys:
    secrets = os.environ.get(SECRET_VARIABLE, "")
    if not secrets.strip():
        raise ConfigurationError(
            "secret: expected the one that the receiver verifies with, got none; give it as "
            f"secret=, or in the environment variable {SECRET_VARIABLE}. "
            "bgworker.webhook.new_secret() makes one"
        )
    return Keys(secrets, SECRET_VARIABLE)


def _checked_url(url: str, allow_http: bool) -> tuple[str, bool]:
    """Return what may be shown of the URL, and whether it is plain HTTP to this machine. No error
    shows more."""
    from urllib.parse import urlsplit

    if not isinstance(url, str):
        raise ConfigurationError(
            f"url: expected text such as https://example.com/hook, got {type(url).__name__}"
        )
    if not re.fullmatch(r"[!-\[\]-~]+", url):
        # ASCII but for the backslash, which some readers take for a slash
        raise ConfigurationError(
            "url: it is empty, or holds white space, a control character, a backslash or what is "
            "not ASCII; percent-encode those, and write such a host name as xn--..."
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ConfigurationError(
            "url: its host or its port is malformed; expected https://HOST:PORT/PATH"
        ) from None
    if parts.scheme not in ("https", "http"):
        raise ConfigurationError(
            "url: it begins with neither https:// nor http://; expected https://HOST/PATH"
        )
    if "@" in parts.netloc:
        raise ConfigurationError(
            "url: it holds a user name or a password, which end up in logs; leave them out, and "
            "give headers={'Authorization': ...}"
        )
    # of the whole authority: most versions of Python take what stands in brackets for the host,
    # whatever follows them
    if not re.fullmatch(
        r"([\w-]{1,63}(\.[\w-]{1,63})*\.?|\[[0-9a-f:.]*:[0-9a-f:.]*\])(:[0-9]*)?",
        parts.netloc.lower(),
        re.ASCII,
    ):
        raise ConfigurationError(
            "url: it has no host, or one that cannot be; expected https://HOST/PATH"
        )
    if parts.fragment:
        raise ConfigurationError(
            "url: it ends in a fragment (#...), which is never sent; leave it out"
        )
    shown_host = f"[{host}]" if ":" in host else host
    shown = f"{parts.scheme}://{shown_host}{'' if port is None else f':{port}'}"
    is_local = parts.scheme == "http" and _is_this_machine(host)
    if parts.scheme == "http" and not is_local and not allow_http:
        raise ConfigurationError(
            f"url: {shown} would send the events for everybody to read; use https://, or "
            "allow_http=True on a network that you trust"
        )
    return shown, is_local


def _is_this_machine(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return them with lower-case names. No error shows a value, nor a name that may be one in the
    wrong place."""
    checked: dict[str, str] = {}
    if not isinstance(headers, Mapping):
        raise ConfigurationError(
            f"headers: expected a mapping of names to values, got {type(headers).__name__}"
        )
    for name, value in headers.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
            raise ConfigurationError(
                "headers: a name is no header name; expected letters, digits and hyphens"
            )
        if name.lower() in OWN_HEADERS:
            raise ConfigurationError(f"headers: {name} is the sink's own; leave it out")
        if name.lower() in checked:
            raise ConfigurationError(f"headers: {name} is given twice; leave one out")
        if not isinstance(value, str) or not re.fullmatch(r"[!-~]([\t -~]*[!-~])?", value):
            raise ConfigurationError(
                f"headers: the value of {name} is empty or no text, or holds a line end or what "
                "is not printable ASCII; expected one line of it"
            )
        checked[name.lower()] = value
    return checked

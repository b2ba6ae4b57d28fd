"""Standard Webhooks signatures: secrets, the sender's side and the receiver's. Any thread; no I/O.

A signature covers the message id, the time of the attempt and the exact bytes of the body, so that
none of the three can be changed, and an old request cannot be sent again unnoticed. What is shown
of a secret is that there is one.

Source: Standard Webhooks 1.0.0, "Verifying webhook authenticity",
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
import time
from collections.abc import Iterable, Mapping

from ..model.checks import number
from ..model.errors import BgworkerError, ConfigurationError

__all__ = ["Keys", "VerificationError", "new_secret", "verify"]

PREFIX = "whsec_"
LEAST_BYTES, MOST_BYTES = 24, 64
"""How long the key behind a secret may be."""

TOLERANCE = 300.0
"""Seconds that a request may be old, or that the sender's clock may be ahead: what the reference
libraries allow."""

_EXPECTED = (f"{PREFIX} and then base64 of {LEAST_BYTES} to {MOST_BYTES} random bytes; "
             "bgworker.webhook.new_secret() makes one")

_now = time.time
"""The clock of `verify`; tests put another here."""


class VerificationError(BgworkerError, ValueError):
    """A request is not what a holder of the secret sent just now; its body is not to be trusted."""


def new_secret() -> str:
    """Return a new secret, of 32 random bytes, for the sender's and the receiver's settings."""
    return PREFIX + base64.b64encode(os.urandom(32)).decode()


class Keys:
    """The keys of one or more secrets. Immutable; does not show them.

    Args:
        secrets: ``whsec_`` secrets: one, several with white space between, or a collection.
        name: of the setting, for errors.

    Raises:
        ConfigurationError: there is none, or one is malformed. The message tells which by its
            place, never by its text.
    """

    __slots__ = ("_keys",)

    def __init__(self, secrets: str | Iterable[str], name: str = "secret") -> None:
        if isinstance(secrets, (bytes, bytearray)) or not isinstance(secrets, Iterable):
            raise ConfigurationError(
                f"{name}: expected text, or a collection of texts, got {type(secrets).__name__}"
            )
        given = secrets.split() if isinstance(secrets, str) else list(secrets)
        if not given:
            raise ConfigurationError(
                f"{name}: expected at least one secret, got none; a secret is {_EXPECTED}"
            )
        self._keys = tuple(
            _key(each, name if len(given) == 1 else f"{name} {place} of {len(given)}")
            for place, each in enumerate(given, 1)
        )

    def __repr__(self) -> str:
        return f"<Keys: {len(self._keys)}>"

    def __reduce__(self) -> str:
        raise TypeError("keys are not pickled: a secret is not to leave its process")

    def signatures(self, message_id: str, timestamp: int, body: bytes) -> list[str]:
        """Return one ``v1`` signature per key."""
        head = f"{message_id}.{timestamp}.".encode()
        found = []
        for key in self._keys:
            mac = hmac.new(key, head, "sha256")
            mac.update(body)
            found.append(f"v1,{base64.b64encode(mac.digest()).decode()}")
        return found


def _key(secret: object, name: str) -> bytes:
    if not isinstance(secret, str):
        raise ConfigurationError(
            f"{name}: expected text, got {type(secret).__name__}; a secret is {_EXPECTED}"
        )
    if not secret.startswith(PREFIX):
        raise ConfigurationError(f"{name}: it does not begin with {PREFIX}; expected {_EXPECTED}")
    text = secret[len(PREFIX):]
    try:
        # some write it without padding
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        raise ConfigurationError(
            f"{name}: what follows {PREFIX} is not base64 (the alphabet with + and /); "
            f"expected {_EXPECTED}"
        ) from None
    if not LEAST_BYTES <= len(key) <= MOST_BYTES:
        raise ConfigurationError(f"{name}: it holds {len(key)} bytes; expected {_EXPECTED}")
    return key


def verify(
    secrets: str | Iterable[str],
    headers: Mapping[str, str],
    body: bytes,
    tolerance: float = TOLERANCE,
) -> str:
    """Return the message id of a genuine request; raise for any other. For the receiving side.

    The same id may come again, with the same events: use it to know a message that was dealt with
    already. Keep the ids for as long as ``tolerance`` at least, and no request that somebody has
    recorded can do anything.

    Args:
        secrets: the ``whsec_`` secret shared with the sender; during a rotation the old and the new
            one.
        headers: of the request, in any case: a mapping, or the ``headers`` of `http.server`.
        body: the exact bytes of the request. Parse them afterwards: JSON that was parsed and
            written again is others.
        tolerance: seconds between the sender's clock and this one, either way.

    Raises:
        VerificationError: a header is missing or malformed, the request is too old or from the
            future, or no signature was made with one of the secrets. Comparisons take the same time
            wherever texts differ.
        ConfigurationError: a secret is malformed, ``tolerance`` is no number >= 0, or ``body`` is
            not bytes.
    """
    keys = Keys(secrets, "secrets")
    number("tolerance", tolerance, least=0)
    if not isinstance(body, (bytes, bytearray, memoryview)):
        raise ConfigurationError(
            f"body: expected the bytes of the request as they came, got {type(body).__name__}"
        )
    given = {name.lower(): value for name, value in headers.items()}
    message_id, timestamp, signed = (
        _header(given, f"webhook-{name}") for name in ("id", "timestamp", "signature")
    )
    if not message_id.isascii():
        raise VerificationError("webhook-id: expected ASCII text, got other characters")
    if not re.fullmatch("[0-9]{1,15}", timestamp):
        raise VerificationError("webhook-timestamp: expected whole seconds since 1970")
    age = _now() - int(timestamp)
    if abs(age) > tolerance:
        raise VerificationError(
            f"webhook-timestamp: the request was signed {abs(age):.0f} s "
            f"{'ago' if age > 0 else 'ahead'}, more than {tolerance:g} s; if it is genuine, one of "
            "the two clocks is wrong"
        )
    expected = [each.encode() for each in keys.signatures(message_id, int(timestamp), bytes(body))]
    found = [each.encode("utf-8", "replace") for each in signed.split(" ")]
    if not any([hmac.compare_digest(ours, theirs) for ours in expected for theirs in found]):
        raise VerificationError(
            "webhook-signature: none was made with a secret that is known here; compare the "
            "secrets, and verify the body's bytes before anything parses or re-encodes them"
        )
    return message_id


def _header(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if not value:
        raise VerificationError(f"{name}: the request has no such header")
    return value

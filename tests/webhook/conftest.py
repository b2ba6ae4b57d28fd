"""What the tests of the webhook share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust nobody unless a test names somebody: to load the certificates that a machine trusts
    takes 40 ms, for each of hundreds of sinks."""
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)

"""The signed webhook: the sink that sends it, and ``verify`` for its receiver."""

from __future__ import annotations

from .signing import VerificationError, new_secret, verify
from .sink import WebhookSink

__all__ = ["VerificationError", "WebhookSink", "new_secret", "verify"]

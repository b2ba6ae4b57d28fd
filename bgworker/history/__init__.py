"""The SQLite history: the sink that writes it, and ``History``, which reads it."""

from __future__ import annotations

from .reader import History
from .sink import SqliteSink

__all__ = ["History", "SqliteSink"]

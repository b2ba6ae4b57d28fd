"""Histories that a team shares, on a server: in PostgreSQL, and in MongoDB.

Neither sink imports a driver: the caller hands over what connects.
"""

from __future__ import annotations

from .mongo import MongoSink
from .postgres import PostgresSink

__all__ = ["MongoSink", "PostgresSink"]

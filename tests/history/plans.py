"""How SQLite answers what is asked of a history."""

from __future__ import annotations

import re
from collections.abc import Callable

from bgworker.history.reader import History


def plans(history: History, ask: Callable[[], object]) -> list[str]:
    """Return how SQLite answers what is asked of a history, a line for each look at a table."""
    statements: list[str] = []
    with history._connected() as connection:
        connection.set_trace_callback(statements.append)
    ask()
    with history._connected() as connection:
        connection.set_trace_callback(None)
        return [plan for statement in statements if statement.lstrip().startswith("SELECT")
                for *_, plan in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]


def scans(found: list[str]) -> list[str]:
    """Return those that read a whole table, or sort more than a bounded number of rows by it."""
    return [plan for plan in found if plan.startswith("SCAN") and not plan.startswith("SCAN json_")
            and "SUBQUERY" not in plan and not re.match(r"SCAN (\(subquery|CONSTANT)", plan)]

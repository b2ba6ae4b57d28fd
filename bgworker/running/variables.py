"""The context variables that a task sees: those of its submitter at submit, then those that the
initializer set."""

from __future__ import annotations

import sys
from contextvars import Context, copy_context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextvars import ContextVar
    from typing import Any

_decimal_variable: ContextVar[Any] | None = None


def captured() -> Context:
    """Return a copy of the context in which its decimal context is a copy as well.

    That one is an object that changes: shared, the precision that a task sets would be its
    submitter's too.
    """
    variables = copy_context()
    if variables and "decimal" in sys.modules:
        _detach_decimal(variables)
    return variables


def _detach_decimal(variables: Context) -> None:
    global _decimal_variable
    if _decimal_variable is None:
        getcontext = getattr(sys.modules["decimal"], "getcontext", None)
        if getcontext is None:
            return  # it is just being imported, on another thread
        empty = Context()
        empty.run(getcontext)
        _decimal_variable = next(iter(empty))
    found = variables.get(_decimal_variable)
    if found is not None:
        variables.run(_decimal_variable.set, found.copy())

"""Checks of settings: one wording for every refused value."""

from __future__ import annotations

from .errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enum import Enum
    from typing import Any, TypeVar

    E = TypeVar("E", bound=Enum)


def number(name: str, value: Any, *, above: float | None = None, least: float | None = None, optional: bool = False,
           whole: bool = False) -> Any:
    """Return ``value`` if it is a finite number in range, else raise a `ConfigurationError` that tells what was expected.

    Args:
        above: the value must be greater than this.
        least: the value must be at least this.
        optional: None is fine too.
        whole: only an `int`. A `bool` is never a number.
    """
    if optional and value is None:
        return value
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if right_type and value - value == 0 and (above is None or value > above) and (least is None or value >= least):
        return value
    kind = "a whole number" if whole else "a number"
    bound = f" > {above:g}" if above is not None else f" >= {least:g}" if least is not None else ""
    raise ConfigurationError(f"{name}: expected {kind}{bound}{' or None' if optional else ''}, got {value!r}")


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    """Return ``value`` if it is one of ``allowed``, else raise a `ConfigurationError` that lists them."""
    if value in allowed:
        return value
    raise ConfigurationError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")


def member(name: str, kind: type[E], value: Any) -> E:
    """Return the member of an enum that ``value`` is or spells, else raise a `ConfigurationError` that lists them."""
    try:
        return kind(value)
    except ValueError as error:
        expected = ", ".join(str(each) for each in kind)
        raise ConfigurationError(f"{name}: expected one of {expected}, got {value!r}") from error

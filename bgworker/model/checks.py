"""Checks of settings: one wording for every refused value. What they return is of an exact built-in
type.
"""

from __future__ import annotations

from operator import index

from .errors import ConfigurationError
from .text import ask, fit, listed, show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from enum import Enum
    from typing import Any, TypeVar

    E = TypeVar("E", bound=Enum)

MOST = 9e9
"""Greatest number that need not be whole: 285 years of seconds, which every wait of the interpreter
bears.
"""

MOST_LISTED = 1000
"""Values in a collection; what gives more may give for ever."""

MOST_NAMED = 1024
"""Bytes of a name; what is longer is cut."""


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    optional: bool = False,
    whole: bool = False,
) -> Any:
    """Return ``value`` as an `int` or `float` if it is a finite number in range, else raise a
    `ConfigurationError` that tells what was expected.

    Args:
        above: the value must be greater than this.
        least: the value must be at least this.
        optional: None is fine too.
        whole: only an integer. A `bool` is never a number.
    """
    if optional and value is None:
        return value
    exact = _exact(value)
    if exact is not None and (type(exact) is int if whole else -MOST <= exact <= MOST) and (
            above is None or exact > above) and (least is None or exact >= least):
        return exact
    kind = "a whole number" if whole else "a number"
    bound = f" > {above:g}" if above is not None else f" >= {least:g}" if least is not None else ""
    raise ConfigurationError(
        f"{name}: expected {kind}{bound}{' or None' if optional else ''}, got {show(value)}"
        + (f"; at most {MOST:g}" if not whole and exact is not None and exact > MOST else "")
    )


def _exact(value: Any) -> int | float | None:
    kind = type(value)
    if kind is int or kind is float:
        return value  # type: ignore[no-any-return]
    if issubclass(kind, float):
        return float.__float__(value)
    return None if kind is bool else ask(index, value)


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    """Return the one of ``allowed`` that ``value`` is, else raise a `ConfigurationError` that lists
    them.
    """
    if issubclass(type(value), str) and (exact := str.__str__(value)) in allowed:
        return exact
    raise ConfigurationError(
        f"{name}: expected {' or '.join(map(repr, allowed))}, got {show(value)}"
    )


def member(name: str, kind: type[E], value: Any) -> E:
    """Return the member of a `str` enum that ``value`` is or spells, else raise a
    `ConfigurationError` that lists them.
    """
    members = kind._value2member_map_
    if issubclass(type(value), str) and (found := members.get(str.__str__(value))) is not None:
        return found  # type: ignore[return-value]
    raise ConfigurationError(
        f"{name}: expected one of {', '.join(map(str, kind))}, got {show(value)}"
    )


def members(name: str, kind: type[E], values: Any) -> frozenset[E]:
    """Return the members of a `str` enum that a collection holds; a string is none."""
    found = None if issubclass(type(values), (str, bytes)) else listed(values, MOST_LISTED)
    if found is None:
        raise ConfigurationError(
            f"{name}: expected a collection of {kind.__name__}, got {show(values)}"
        )
    return frozenset([member(name, kind, value) for value in found])


def named(name: str, value: Any) -> str:
    """Return a `str` as a clean name, else raise a `ConfigurationError`."""
    if not issubclass(type(value), str):
        raise ConfigurationError(f"{name}: expected a str or None, got {show(value)}")
    return fit(value, MOST_NAMED)[0]


def key(value: Any) -> str:
    """Return a `str` as an exact one, for a dict to be asked for it, else raise a `KeyError`: no
    key of ours is another.
    """
    if not issubclass(type(value), str):
        raise KeyError(show(value))
    return str.__str__(value)


def flag(name: str, value: Any) -> bool:
    """Return a value's truth, else raise a `ConfigurationError`."""
    truth = value if type(value) is bool else ask(bool, value)
    if truth is None:
        raise ConfigurationError(f"{name}: expected True or False, got {show(value)}")
    return truth


def settle(options: object, **fields: Any) -> None:
    """Give the fields of a frozen dataclass the values that its checks returned; for
    ``__post_init__``.
    """
    for name, value in fields.items():
        object.__setattr__(options, name, value)

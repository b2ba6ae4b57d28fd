"""The one door through which a value gets into a page.

All markup stands in ``templates.html``, as parts that have names. `fill` puts values into a part;
what is not `Markup`, which nothing but this module makes, becomes text that can do no harm: no
markup, no control character, nothing that reorders a line. Pure functions; any thread.
"""

from __future__ import annotations

import re
from functools import lru_cache
from html import escape
from importlib.resources import files
from string import Template

from ..words import escaped_lines, said

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_PART = re.compile(r"^<!-- part: ([a-z-]+) -->\n", re.MULTILINE)


class Markup(str):
    """Text that a page takes as it is. To change it in any way makes plain text of it."""

    __slots__ = ()


def fill(part: str, /, **values: object) -> Markup:
    """Return a part of ``templates.html`` with a value in each of its places.

    Args:
        values: `Markup`, or a list or tuple of values, which stand one after the other; anything
            else is shown as text; None is nothing.

    Raises:
        KeyError: there is no such part, or it has a place for which there is no value.
    """
    return Markup(_parts()[part].substitute({name: _inside(values[name]) for name in values}))


def _inside(value: object) -> str:
    if type(value) is Markup:
        return value
    if isinstance(value, (list, tuple)):
        return "".join([_inside(each) for each in value])
    if value is None:
        return ""
    text = str(value)
    if not (text.isascii() and text.isprintable()):  # which most are, and harmless
        text = "\n".join(escaped_lines(text, said))
    return escape(text)


def asset(name: str) -> Markup:
    """Return a file of this package, which is as trustworthy as its code."""
    return Markup(files(__package__).joinpath(name).read_text(encoding="utf-8"))


@lru_cache(1)
def _parts() -> Mapping[str, Template]:
    _, *found = _PART.split(asset("templates.html"))
    return {name: Template(text.rstrip("\n")) for name, text in zip(found[::2], found[1::2])}

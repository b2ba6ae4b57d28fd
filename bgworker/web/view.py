"""How values look in a page: addresses, times, names, links and tables, as seen at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

from ..model.errors import ConfigurationError
from ..words import ago, now, said, stamp, took, word_for
from .markup import Markup, fill

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from ..model.events import TaskStatus

SHORT, LONG = 88, 200
"""Characters of a name, and of a message, that a table shows."""


# ---------------------------------------------------------------- addresses

def address(path: str, **query: object) -> str:
    """Return a path of the site with those values of a query that say something."""
    given = {name: str(value) for name, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(given)}" if given else path


def task_path(task_id: str) -> str:
    """Return the path of a task's page."""
    return f"/task/{quote(task_id, safe='')}"


@dataclass(frozen=True)
class Address:
    """What a page was asked by; anybody can write it."""

    path: str
    query: Mapping[str, str]

    def get(self, name: str) -> str | None:
        """Return a value; None for an empty one, too."""
        return self.query.get(name) or None

    def given(self, *names: str) -> dict[str, str]:
        """Return those values that are there."""
        return {name: value for name in names if (value := self.get(name))}

    def number(self, name: str) -> int | None:
        """Return a value as a number. Raises `ConfigurationError`."""
        text = self.get(name)
        if text is None or text.isascii() and text.isdigit() and len(text) < 19:
            return None if text is None else int(text)
        raise ConfigurationError(f"{name}: expected a whole number >= 0, got {text[:80]!r}")

    def changed(self, **values: object) -> str:
        """Return the address with some values that are different, or None: not there."""
        return address(self.path, **{**self.query, **values})


# ---------------------------------------------------------------- texts

def middle(text: str | None, most: int = SHORT) -> str:
    """Return a text on one line, cut in the middle: names differ at both ends."""
    line = said(" ".join((text or "")[:8 * most].split()) + (text or "")[8 * most:][-4 * most:])
    head = (most - 1) * 2 // 3
    return line if len(line) <= most else f"{line[:head]}…{line[head + 1 - most:]}"


def start(text: str | None, most: int = LONG) -> str:
    """Return the beginning of a text, on one line."""
    line = said(" ".join((text or "")[:2 * most].split()))
    return line if len(line) <= most else f"{line[:most - 1]}…"


def length(seconds: float | None) -> str:
    """Return how long something took; nothing for what has not ended."""
    return "" if seconds is None else took(seconds)


def badge(status: TaskStatus) -> Markup:
    """Return a status, as a colour and a word."""
    return fill("status", status=status.value, word=word_for(status))


def link(text: object, href: str, title: str | None = None) -> Markup:
    """Return a text that leads somewhere."""
    return fill("link", text=text, href=href, title=title)


@dataclass(frozen=True)
class View:
    """Draws values as seen at one moment, with links to the site's pages or without."""

    has_links: bool
    now: datetime = field(default_factory=now)

    def link(self, text: object, href: str, title: str | None = None) -> Markup:
        """Return a text that leads somewhere, unless links lead nowhere."""
        return link(text, href, title) if self.has_links else fill("text", text=text, title=title)

    def task(self, task_id: str, name: str | None) -> Markup:
        """Return a name that leads to its task."""
        shown = middle(name) or "(no name)"
        return self.link(shown, task_path(task_id), start(name, 400) if shown != name else None)

    def time(self, time: datetime | None, part: str = "time") -> Markup | None:
        """Return how long ago something was, with the exact time behind it; nothing for none.

        Args:
            part: "exact" shows both.
        """
        if time is None:
            return None
        return fill(part, exact=time.isoformat(), stamp=stamp(time), text=ago(time, self.now))


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[object]],
          kind: str = "") -> Markup:
    """Return a table, without those columns in which nothing stands.

    Args:
        columns: heading and kind (``num`` is right-aligned) of each.
        rows: the cells of each; a first one beyond the columns is the row's id.
    """
    cells = [row[-len(columns):] for row in rows]
    shown = [at for at in range(len(columns)) if any(row[at] for row in cells)]
    return fill(
        "table", kind=kind,
        headings=[fill("column", text=columns[at][0], kind=columns[at][1]) for at in shown],
        rows=[fill("row", id=row[0] if len(row) > len(columns) else None, cells=[
            fill("cell", value=row[at - len(columns)], label=columns[at][0], kind=columns[at][1])
            for at in shown]) for row in rows])

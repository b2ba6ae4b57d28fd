"""The pages of the site: each asks a history a few bounded questions, and draws the answers.

All that a page depends on is its address. Whoever asks again gets what is true by then.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..history.answers import time_of
from ..model.errors import ConfigurationError
from ..model.events import TaskStatus
from ..words import duration, stamp
from . import sections
from .markup import Markup, fill
from .task import task_page
from .view import Address, View

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..history.reader import History


@dataclass(frozen=True)
class Page:
    """What stands between the head and the end of a page."""

    title: str
    body: object
    refresh: int | None = 3
    """Seconds until a script asks again; None for what does not change."""
    status: int = 200


ROWS = 50

_TIMES = {"": "any time", "15m": "15 minutes", "1h": "1 hour", "6h": "6 hours", "1d": "1 day",
          "7d": "7 days", "30d": "30 days"}


def page_of(here: Address, history: History) -> Page | None:
    """Return the page that an address names; None if there is none.

    Raises:
        UnknownTask, ConfigurationError, HistoryError: as the history does.
    """
    view = View(has_links=True)
    if here.path in PAGES:
        return PAGES[here.path][1](here, history, view)
    if here.path.startswith("/task/"):
        title, body, is_final = task_page(here, history, view)
        return Page(title, body, None if is_final else 2)
    return None


# ---------------------------------------------------------------- the list

def tasks(here: Address, history: History, view: View) -> Page:
    """Return the tasks that match a filter, the newest first; without one, what runs before all."""
    wanted: dict[str, Any] = here.given("status", "text", "run", "fingerprint", "before", "after")
    wanted.update(_span(here))
    if name := here.get("name"):
        wanted["name"] = name if set(name) & set("*?[") else f"*{name}*"
    found = history.page(**wanted, limit=ROWS)
    counts = history.counts(run=here.get("run"), since=wanted.get("since"))
    shown: list[object] = [
        sections.counts(counts, here.get("status") or "",
                        lambda status: here.changed(status=status, before=None, after=None)),
        _filter(here, fill("search", text=here.get("text"), name=name)), _constraints(here)]
    running = () if wanted else history.page(status=TaskStatus.RUNNING, limit=ROWS).tasks
    if found.tasks:
        rest = [task for task in found.tasks if task not in running]
        shown.append(sections.tasks([*running, *rest], found.matches, view))
    else:
        shown.append(sections.no_tasks(is_filtered=bool(wanted)))
    if found.is_cut:
        shown.append(sections.note(f"Searched {found.searched:,} tasks, back to "
                                   f"{stamp(found.searched_until_utc)}; there may be more."))
    shown.append(sections.pager(
        ("Newer", found.newer and here.changed(before=None, after=found.newer)),
        ("Older", found.older and here.changed(after=None, before=found.older))))
    return Page("Tasks", shown)


def _filter(here: Address, search: Markup | None = None) -> Markup:
    """Return the form of a filter; the list's also has what to search for."""
    since = here.get("since") or ""
    moment = time_of(since)
    times = {since: since if moment is None else stamp(moment), **_TIMES}
    kept = here.given("status", "run", "until", "fingerprint")
    return fill(
        "filter", action=here.path, search=search,
        times=[fill("chosen" if value == since else "option", value=value, text=text)
               for value, text in times.items()],
        hidden=[fill("hidden", name=name, value=value) for name, value in kept.items()])


def _constraints(here: Address) -> Markup | None:
    """Return what else the page is narrowed to, each with a link that lifts it."""
    given = here.given("run", "until", "fingerprint")
    if not given:
        return None
    return fill("constraints", said=[
        fill("constraint", name=name, value=value[:32], href=here.changed(**{name: None}))
        for name, value in given.items()])


def _span(here: Address) -> dict[str, Any]:
    """Return the span of time that an address asks for."""
    found: dict[str, Any] = {}
    if since := here.get("since"):
        found["since"] = time_of(since) or duration(since)
    if until := here.get("until"):
        found["until"] = time_of(until)
        if found["until"] is None:
            raise ConfigurationError("until: expected a time such as 2026-11-24T12:00:00Z, got "
                                     f"{until[:80]!r}")
    return found


# ---------------------------------------------------------------- the others

def failures(here: Address, history: History, view: View) -> Page:
    """Return failures that are alike as a row each."""
    found = history.failure_groups(run=here.get("run"), since=_span(here).get("since"))
    return Page("Failures", [_filter(here), _constraints(here), sections.failures(found, view)], 5)


def timeline(here: Address, history: History, view: View) -> Page:
    """Return what ran when, and how long each name takes."""
    run, span = here.get("run"), _span(here)
    stats = history.stats(run=run, since=span.get("since"))
    charts = sections.charts(history.timeline(run=run, **span),
                             history.throughput(run=run, **span), view)
    names = sections.names(stats.durations, view)
    return Page("Timeline", [_filter(here), _constraints(here), charts,
                             sections.section("Slowest names", names)], 5)


def runs(here: Address, history: History, view: View) -> Page:
    """Return the processes that wrote to the history, and what their sinks lost."""
    found = history.run_counts(before=here.get("before"), limit=ROWS)
    older = here.changed(before=found[-1].run.run_id) if len(found) == ROWS else None
    losses = sections.losses(history.loss_counts(), view)
    return Page("Runs", [sections.runs(found, view), sections.pager(("Older", older)),
                         sections.section("Record", losses)], 5)


PAGES = {"/": ("Tasks", tasks), "/failures": ("Failures", failures),
         "/timeline": ("Timeline", timeline), "/runs": ("Runs", runs)}
"""Path -> what the navigation calls the page, and what makes it."""

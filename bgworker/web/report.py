"""A history as one HTML file that can be sent: no script, nothing that it loads, below 2 MiB."""

from __future__ import annotations

import os

from ..history.questions import moment
from ..words import stamp
from . import sections
from .markup import asset, fill
from .view import View, middle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from ..history.reader import History

MOST_BARS = 2000
_KINDS, _NAMES, _RUNS = 50, 40, 30


def report(history: History, *, since: datetime | timedelta | None = None,
           run: str | None = None) -> str:
    """Return what a history has to tell, as a page of its own; any thread.

    Args:
        since: only what has not ended, or ended after this time (aware) or less than this long ago.
        run: only tasks of this run, as for `History.tasks`.

    Raises:
        HistoryError: the history cannot be read.
        ConfigurationError: there is no such run, or more than one.
    """
    view = View(has_links=False)
    run = run and history.run_id(run)
    stats = history.stats(since=since, run=run)
    scope = [f"history {middle(os.path.basename(history.path))}", f"made {stamp(view.now)}"]
    if run:
        scope.append(f"run {middle(run, 32)}")
    if since is not None:
        scope.append(f"since {stamp(moment(since))}")
    lost = sum(each.count for each in stats.losses)
    body: list[object] = [sections.title("Report", ", ".join(scope))]
    if stats.counts:
        runs = history.run_counts(run=run, limit=_RUNS)
        groups = history.failure_groups(since=since, run=run, limit=_KINDS)
        timeline = history.timeline(since=since, run=run, bars=MOST_BARS)
        throughput = history.throughput(since=since, run=run)
        body += [
            sections.counts(stats.counts),
            sections.section("Failures", sections.failures(groups, view)),
            sections.charts(timeline, throughput, view),
            sections.section("Slowest names", sections.names(stats.durations, view, _NAMES)),
            sections.section("Runs", sections.runs(runs, view)),
        ]
    else:
        body.append(sections.no_tasks(is_filtered=bool(run or since is not None)))
    body.append(sections.section(
        "Record", sections.losses(stats.losses, view),
        f"{lost:,} events were lost" if lost else ""))
    return whole(history.path, body)


def whole(path: str, body: object) -> str:
    """Return a body as a file of its own, which does not tell where the history lies."""
    name = middle(os.path.basename(path))
    return fill("page", title=f"{name}: report", nav=None, fresh=None, path=None, file=name,
                head=fill("report-head", style=asset("style.css")), refresh=None, body=body)


def failed(path: str, error: Exception) -> str:
    """Return a page that says why there is no report."""
    return whole(path, sections.trouble("No report", str(error), path=path))



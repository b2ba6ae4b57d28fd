"""What a report and the site's pages are made of: counts, failures, charts, names, runs, losses.

Each function draws what a `History` has answered. Where there is nothing to draw, it says so, and
what to do.
"""

from __future__ import annotations

import os

from ..model.events import TaskStatus
from ..model.ids import short
from ..sinks import opening
from ..words import STATUSES, duration_of, exit_of, message_of, took, word_for
from . import drawings
from .markup import Markup, fill
from .view import address, badge, length, link, middle, start, table, task_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from ..history.answers import Durations, Losses, Run
    from ..history.charts import FailureGroup, FailureGroups, Throughput, Timeline
    from ..history.pages import Match, RunCounts
    from ..model.events import TaskSnapshot
    from .view import View

MOST_ROWS = 100


def title(text: str, note: str = "") -> Markup:
    """Return the heading of a page."""
    return fill("title", text=text, note=note)


def section(title: str, body: object, note: str = "") -> Markup:
    """Return a part of a page with a heading."""
    return fill("section", title=title, note=note, body=body)


def trouble(what: str, text: str, remedy: object = "", path: str | None = None) -> Markup:
    """Return what stands where a page cannot be had.

    Args:
        path: of the history, of which the text is to tell the name alone: pages are sent.
    """
    for place in {os.path.abspath(path), os.path.realpath(path)} if path else ():
        folder = opening.shown(os.path.join(os.path.dirname(place), ""))[1:-1]
        text = text.replace(folder, "") if len(folder) > 1 else text
    return fill("trouble", title=what, text=text, remedy=remedy)


def empty(what: str, remedy: object = "") -> Markup:
    """Return what stands where nothing is."""
    return fill("empty", what=what, remedy=remedy)


def note(text: str) -> Markup:
    """Return what is to be known about what stands before."""
    return fill("note", text=text)


def pager(*links: tuple[str, str | None]) -> Markup:
    """Return links to what comes before and after, as far as it is there."""
    return fill("pager", links=[link(text, href) for text, href in links if href])


def code(text: str) -> Markup:
    """Return what somebody may type."""
    return fill("code", text=text)


def no_tasks(is_filtered: bool = False) -> Markup:
    """Return what stands where no task is."""
    if is_filtered:
        return empty("No such tasks.", "Others are there: widen the time, or clear the filter.")
    return empty("No tasks yet.", [
        "Run something into this history: ", code("bgworker run -- COMMAND"), ", or in a program ",
        code('Scheduler(sinks=["sqlite:PATH"])'), "."])


# ---------------------------------------------------------------- tasks

_TASKS = (("Status", "state"), ("Name", "name"), ("Message", "message"), ("Progress", "done"),
          ("Started", "when"), ("Duration", "num took"))


def tasks(found: Sequence[TaskSnapshot], matches: Mapping[str, Match], view: View) -> Markup:
    """Return a table of tasks; of a search with the line in which each has the text."""
    return table(_TASKS, [(
        f"t{task.task_id}", badge(task.status), view.task(task.task_id, task.name),
        _message(task, matches), progress(task), view.time(task.started_utc),
        length(duration_of(task, view.now))) for task in found], "tasks")


def _message(task: TaskSnapshot, matches: Mapping[str, Match]) -> object:
    match = matches.get(task.task_id)
    if match is None or match.seq is None:
        return start(message_of(task))
    return [link("output", address(task_path(task.task_id), before=match.seq + 1)), ": ",
            start(match.line)]


def progress(task: TaskSnapshot) -> Markup | None:
    """Return how far a task is; of one that has completed nothing, for that says enough."""
    percent = task.last_progress_percent
    if percent is None or task.status is TaskStatus.COMPLETED:
        return None
    return fill("progress", percent=f"{percent:.0f}", message=start(task.last_progress_message))


def counts(found: Mapping[TaskStatus, int], chosen: str = "",
           href: Callable[[str], str] | None = None) -> Markup:
    """Return how many tasks there are of each status.

    Args:
        chosen: the status that is looked at, "" for all.
        href: where a status leads; None is nowhere.
    """
    pairs = [("", "all", sum(found.values())),
             *((status.value, word_for(status), found.get(status, 0)) for status in STATUSES)]
    return fill("counts", counts=[
        fill("count-link" if href else "count", status=status, word=word, count=f"{count:,}",
             current=str(status == chosen).lower(), href=href and href(status))
        for status, word, count in pairs if count or status in ("", chosen)])


# ---------------------------------------------------------------- failures

_FAILURES = (("Times", "num"), ("Failure", "message"), ("Tasks", "name"), ("First", "when"),
             ("Last", "when"), ("Last passed", "when"))


def failures(found: FailureGroups, view: View) -> list[Markup]:
    """Return failures that are alike as a row each."""
    if not found.groups:
        return [empty("Nothing failed.", "Failures that are alike stand here in one row.")]
    shown = [table(_FAILURES, [(
        view.link(f"{group.count:,}", address("/", fingerprint=group.fingerprint)),
        fill("two", first=start(_what(group), 120),
             second=start(group.latest_message or group.pattern)),
        _names(group, view), view.time(group.first_utc), view.time(group.last_utc),
        view.time(group.last_passed_utc) or "never") for group in found.groups], "failures")]
    if not found.is_all:
        shown.append(note(f"Of the latest {found.searched:,} failed tasks; there are older ones."))
    if found.more:
        shown.append(note(f"{found.more:,} more kinds are not shown."))
    return shown


def _what(group: FailureGroup) -> str:
    if group.exit_code is not None:
        return exit_of(group.exit_code, group.pattern)
    return group.failure_type or "no type"


def _names(group: FailureGroup, view: View) -> list[object]:
    latest, *others = group.names or ("",)
    more = f" and {len(others)} more" if others else ""
    return [view.task(group.latest_task_id, latest), more]


# ---------------------------------------------------------------- charts

def charts(timeline: Timeline, throughput: Throughput, view: View) -> list[Markup]:
    """Return throughput, load and timeline above one another, over the same span."""
    axis = drawings.Axis.of(_times(timeline, throughput))
    if axis is None:
        return [empty("Nothing ran.", "What runs, and how much at once, is drawn here.")]
    shown = []
    if throughput.buckets:
        shown.append(drawings.throughput(throughput, axis, view))
    if timeline.loads:
        shown += [drawings.load(timeline, axis), drawings.timeline(timeline, axis, view)]
    if not timeline.is_all:
        shown.append(note(f"Of the latest {timeline.searched:,} tasks; older ones are not drawn."))
    return shown


def _times(timeline: Timeline, throughput: Throughput) -> list[datetime | None]:
    """Return the times that an axis has to hold. A bucket in which the timeline begins adds none:
    a minute in which a run of seconds began would leave the run a corner of the drawing."""
    first, last = timeline.start_utc, timeline.end_utc
    outside = [bucket.start_utc for bucket in throughput.buckets
               if first is None or last is None or bucket.start_utc > last
               or drawings.after(bucket.start_utc, throughput.width) <= first]
    return [first, last, *outside]


_NAMES = (("Name", "name"), ("Tasks", "num"), ("Median", "num"), ("95th percentile", "num"),
          ("Longest", "num"), ("All together", "num"))


def names(found: Sequence[Durations], view: View, most: int = MOST_ROWS) -> Markup:
    """Return how long the tasks of each name ran, the longest first."""
    if not found:
        return empty("No task has ended.", "How long each name takes stands here.")
    slowest = sorted(found, key=lambda each: each.max, reverse=True)[:most]
    return table(_NAMES, [(
        view.task(each.slowest_task_id, each.name), f"{each.count:,}", took(each.p50),
        took(each.p95), took(each.max), took(each.total)) for each in slowest], "names")


# ---------------------------------------------------------------- runs and losses

_RUNS = (("Run", "id"), ("Started", "when"), ("Ended", "when"), ("Process", "soft"),
         ("Tasks", "num"), ("Left", "num"), ("By status", "name"))


def runs(found: Sequence[RunCounts], view: View) -> Markup:
    """Return each process that wrote to the history, how its tasks ended, and how many are left to
    do."""
    if not found:
        return empty("No runs.", "Each Scheduler that writes to this history is a row here.")
    return table(_RUNS, [(
        view.link(short(each.run.run_id), address("/", run=each.run.run_id)),
        view.time(each.run.started_utc), _end(each.run, view), process(each.run),
        f"{sum(each.counts.values()):,}", f"{each.left:,}", _statuses(each.counts))
        for each in found], "runs")


def _end(run: Run, view: View) -> object:
    if run.ended_utc is not None:
        return view.time(run.ended_utc)
    return {True: "still runs", False: "died", None: "not known"}[run.is_alive]


def process(run: Run) -> str:
    """Return where a run was recorded."""
    if run.host is None:
        return "copied from another history"
    return f"{run.pid} on {middle(run.host, 40)}, Python {start(run.python or '-', 20)}"


def _statuses(found: Mapping[TaskStatus, int]) -> Markup:
    words = ", ".join(f"{found[status]:,} {word_for(status)}" for status in STATUSES
                      if found.get(status))
    return fill("shares", share=drawings.share(found), words=words)


_LOSSES = (("Sink", "name"), ("Reason", "name"), ("Events", "num"), ("Last", "when"))


def losses(found: Sequence[Losses], view: View) -> Markup:
    """Return what sinks lost, or that the record is complete."""
    if not found:
        return empty("Complete.", "No sink has lost an event.")
    return table(_LOSSES, [(middle(each.sink), start(each.reason, 120), f"{each.count:,}",
                            view.time(each.latest_utc)) for each in found[:MOST_ROWS]])



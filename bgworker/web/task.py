"""The page of one task: how it ended, why, and what it said.

Arguments, result and source may be secret: they are sent to nobody who has not asked for them.
"""

from __future__ import annotations

import json

from ..model.events import StreamType, TaskStatus
from ..model.ids import short
from ..words import duration_of, is_command, place_of, resumable_as, why
from . import sections
from .log import lines_of
from .markup import Markup, fill
from .view import Address, View, address, badge, length, link, middle, start, task_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..history.reader import History
    from ..model.events import TaskSnapshot

LINES = 200
MOST_OF_AN_ID = 64
LONGEST = 50_000
"""Characters of a traceback, of arguments, a result or a source that are shown."""


def task_page(here: Address, history: History, view: View) -> tuple[str, Markup, bool]:
    """Return title and body of a task's page, and whether nothing more will change on it."""
    task = history.task(here.path[len("/task/"):])
    here = Address(task_path(task.task_id), here.query)
    body = fill("task", name=start(task.name, 400) or "(no name)", status=badge(task.status),
                facts=[*_facts(task, history, view), *_hidden(task, here)],
                failure=_failure(task), log=_log(task, here, history))
    return middle(task.name) or short(task.task_id), body, task.status.is_final


def _facts(task: TaskSnapshot, history: History, view: View) -> list[Markup]:
    run = history.run(task.run_id)
    percent = task.last_progress_percent
    earlier = task.metadata.get("rerun_of")  # a program can write anything there
    later = history.later_of(task.task_id)
    pairs: dict[str, object] = {
        "Started": view.time(task.started_utc, "exact"),
        "Ended": view.time(task.completed_utc, "exact"),
        "Duration": length(duration_of(task, view.now)),
        "Timeout": length(task.timeout),
        "Created": view.time(task.created_utc, "exact"),
        "Progress": ("" if percent is None else f"{percent:.0f}% ")
        + start(task.last_progress_message),
        "Runs again": isinstance(earlier, str) and 0 < len(earlier) <= MOST_OF_AN_ID and link(
            short(earlier), task_path(earlier), "the task that this one ran again"),
        "Was run again as": later and [
            link(short(later.task_id), task_path(later.task_id), "the last that ran it again"),
            " ", badge(later.status)],
        "Resumable": start(resumable_as(task), 120),
        "Run": task.run_id and link(short(task.run_id), address("/", run=task.run_id)),
        "Process": run and sections.process(run),
        "Script": start(task.script_id, 120),
        "Id": fill("code", text=task.task_id[:MOST_OF_AN_ID]),
        "Metadata": task.metadata and start(
            json.dumps(dict(task.metadata), ensure_ascii=False), 2000)}
    return [fill("fact", name=name, value=value, kind=name.lower().replace(" ", "-"))
            for name, value in pairs.items() if value]


def _hidden(task: TaskSnapshot, here: Address) -> list[Markup]:
    """Return what may be secret, if it was asked for, else how to ask."""
    shown = []
    for name, text in (("arguments", task.arguments), ("result", task.result),
                       ("source", task.script_text)):
        if text is not None and here.get("show") == name:
            shown.append(fill("shown", name=name.capitalize(), text=_bounded(text)))
        elif text is not None:
            shown.append(fill("hidden-fact", name=name.capitalize(), size=f"{len(text):,}",
                              href=here.changed(show=name)))
    return shown


def _failure(task: TaskSnapshot) -> Markup | None:
    message = task.failure_message or ""
    if not (task.failure_type or message):
        return None
    title = {TaskStatus.FAILED: "Why it failed", TaskStatus.CANCELLED: "Why it was cancelled"}
    trace = place_of(task) or (message if "\n" in message and not is_command(task) else None)
    return fill("failure", status=task.status.value, title=title.get(task.status, "How it ended"),
                message=why(task), trace=trace and fill("pre", text=_bounded(trace)))


def _bounded(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}\n[cut: {len(text):,} characters]"


def _log(task: TaskSnapshot, here: Address, history: History) -> Markup:
    """Return a page of what the task said, its last lines unless others were asked for."""
    stream, before, after = here.get("stream"), here.number("before"), here.number("after")
    found = history.lines(task.task_id, before=before, after=after, limit=LINES,
                          types=None if stream is None else [stream])
    is_at_end = before is None and not found.is_more
    is_live = is_at_end and not task.status.is_final
    nothing = fill("nothing", text="Nothing yet." if is_live else "Nothing.")
    streams = [("all", None), *((each.value, each.value) for each in StreamType)]
    older = newer = None
    if found.older is not None:
        older = sections.pager(("From the beginning", here.changed(before=None, after=0)),
                               ("Older", here.changed(before=found.older, after=None)))
    if not is_at_end:
        newer = sections.pager(("Newer", here.changed(before=None, after=found.newer)),
                               ("The end", here.changed(before=None, after=None)))
    return fill(
        "log", note="live" if is_live else None, lines=lines_of(found.lines) or nothing,
        live=address(f"{here.path}/live", stream=stream, after=found.newer) if is_live else None,
        end="yes" if before is after is None else None,
        streams=[fill("nav", text=text, current=str(value == stream).lower(),
                      href=here.changed(stream=value, before=None, after=None))
                 for text, value in streams],
        older=older, newer=newer)

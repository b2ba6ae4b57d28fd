"""What ran when, and how much of it: drawings in SVG, which a page stretches to its own width.

A drawing is 1,000 units wide. Those of one axis stand one above the other, in line.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from ..model.events import TaskStatus
from ..words import STATUSES, stamp, took, word_for
from .markup import Markup, fill
from .view import address, middle, task_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..history.charts import Bar, Throughput, Timeline
    from .view import View

WIDTH = 1000
NARROWEST = 1.2
"""Units of what takes no time; it is to be seen and hit, too."""

LANE, GAP = 12, 3
"""Height of a lane of the timeline, and what is free of it."""
_CHART = 72
"""Height of a drawing of numbers over time, of which the top has the greatest one."""
_HIGHEST = 58
_LABELS = 18  # height of the line below a drawing

_MOST_TICKS = 6
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200,
          86_400, 172_800, 604_800, 1_209_600, 2_592_000, 7_776_000, 31_536_000)
"""Seconds between two marks of time that people count by."""

_STACKED = (TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.INTERRUPTED, TaskStatus.CANCELLED,
            TaskStatus.COMPLETED)
"""How those that ended in a stretch of time stand on one another, from the bottom."""


@dataclass(frozen=True)
class Axis:
    """The span of time that drawings share."""

    start: datetime
    end: datetime

    @classmethod
    def of(cls, times: Sequence[datetime | None]) -> Axis | None:
        """Return the one from the first to the last of some times, at least a second long; None
        without any."""
        known = [time for time in times if time is not None]
        return cls(min(known), max(*known, after(min(known), 1.0))) if known else None

    def place(self, start: datetime, end: datetime) -> tuple[float, float]:
        """Return where a stretch of time begins, and how wide it is."""
        unit = (self.end - self.start).total_seconds() / WIDTH
        left, right = (min(max((time - self.start).total_seconds() / unit, 0.0), WIDTH)
                       for time in (start, end))
        width = max(right - left, NARROWEST)
        return min(left, WIDTH - width), width

    def ticks(self, height: int) -> Iterator[Markup]:
        """Yield lines at round times, with a label below each."""
        length = (self.end - self.start).total_seconds()
        step = next((each for each in _STEPS if length / each <= _MOST_TICKS),
                    int(length / _MOST_TICKS))
        first = -int(-self.start.timestamp() // step) * step
        for seconds in range(first, int(self.end.timestamp()) + 1, step):
            time = datetime.fromtimestamp(seconds, timezone.utc)
            x, _ = self.place(time, time)
            form = "%d %b" if seconds % 86_400 == 0 else "%H:%M:%S" if step < 60 else "%H:%M"
            yield fill("tick", x=_short(x / 10), bottom=height, y=height + 13,
                       text=f"{time:{form}}",
                       kind="first" if x < 40 else "last" if x > 960 else "tick")


def after(time: datetime, seconds: float) -> datetime:
    """Return a later time, or the last one that there is."""
    try:
        return time + timedelta(seconds=seconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=timezone.utc)


# ---------------------------------------------------------------- the drawings

def timeline(found: Timeline, axis: Axis, view: View) -> Markup:
    """Draw each task as a bar on a lane; the longest ones, where there are too many."""
    note = f"{len(found.bars):,} tasks"
    if found.left_out:
        note += (f", the longest; {found.left_out:,} others are not drawn, which took "
                 f"{took(found.left_out_seconds)} together")
    return _plot("Timeline", note, axis, found.lanes * LANE + GAP,
                 [_bar(bar, axis, view) for bar in found.bars])


def _bar(bar: Bar, axis: Axis, view: View) -> Markup:
    x, width = axis.place(bar.start_utc, bar.end_utc)
    seconds = (bar.end_utc - bar.start_utc).total_seconds()
    title = (f"{middle(bar.name, 48)}: {word_for(bar.status)}, {took(seconds)}, "
             f"{stamp(bar.start_utc)}")
    return _rect(bar.status, x, bar.lane * LANE + GAP, width, LANE - GAP, title,
                 task_path(bar.task_id) if view.has_links else None)


def load(found: Timeline, axis: Axis) -> Markup:
    """Draw how many tasks ran at once: the most, and the mean, in each stretch of time."""
    peak = max(1, *(each.most for each in found.loads))
    most, mean = f"M0 {_CHART}", f"M0 {_CHART}"  # stairs, a step for each stretch
    for each in found.loads:
        x, width = axis.place(each.start_utc, after(each.start_utc, found.width))
        most += _step(x, width, each.most / peak)
        mean += _step(x, width, each.mean / peak)
    return _plot("Tasks at once", f"{peak:,} at most; the mean in a stronger colour", axis, _CHART,
                 [fill("area", kind="most", path=f"{most}V{_CHART}Z"),
                  fill("area", kind="mean", path=f"{mean}V{_CHART}Z")], f"{peak:,}")


def _step(x: float, width: float, part: float) -> str:
    return f"H{_short(x)}V{_short(_CHART - part * _HIGHEST)}H{_short(x + width)}"


def throughput(found: Throughput, axis: Axis, view: View) -> Markup:
    """Draw how many tasks ended in each stretch of time, failures at the bottom."""
    peak = max(1, *(sum(bucket.counts.values()) for bucket in found.buckets))
    shapes = []
    for bucket in found.buckets:
        end = after(bucket.start_utc, found.width)
        x, width = axis.place(bucket.start_utc, end)
        span = {"since": bucket.start_utc.isoformat(), "until": end.isoformat()}
        y = float(_CHART)
        for status in _STACKED:
            if count := bucket.counts.get(status, 0):
                height = count / peak * _HIGHEST
                y -= height
                title = f"{count:,} {word_for(status)}, {stamp(bucket.start_utc)}"
                href = address("/", status=status.value, **span) if view.has_links else None
                shapes.append(_rect(status, x, y, max(width - 1, NARROWEST), height, title, href))
    note = f"tasks that ended, by {_unit(found.width)}"
    return _plot("Throughput", note if found.is_all else f"{note}, the latest", axis, _CHART,
                 shapes, f"{peak:,}")


def _unit(seconds: float) -> str:
    """Return "minute", "15 minutes", "2 hours" or "3 days": a length that is meant to be round."""
    for size, word in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return word if seconds == size else f"{seconds / size:.3g} {word}s"
    return took(seconds)


def share(counts: Mapping[TaskStatus, int]) -> Markup:
    """Draw how the tasks of a run are divided among the statuses."""
    total, x, shapes = sum(counts.values()) or 1, 0.0, []
    for status in STATUSES:
        if count := counts.get(status, 0):
            width = count / total * WIDTH
            shapes.append(_rect(status, x, 0, width, 6, f"{count:,} {word_for(status)}"))
            x += width
    return fill("share", shapes=shapes, label="share of each status")


def _plot(title: str, note: str, axis: Axis, height: int, shapes: Sequence[Markup],
          level: str = "") -> Markup:
    return fill("plot", title=title, note=note, inner=height, height=height + _LABELS,
                shapes=shapes, ticks=list(axis.ticks(height)),
                level=level and fill("level", text=level))


def _rect(status: TaskStatus, x: float, y: float, width: float, height: float, title: str,
          href: str | None = None) -> Markup:
    return fill("bar" if href is None else "bar-link", status=status.value, title=title, href=href,
                x=_short(x), y=_short(y), width=_short(width), height=_short(height))


def _short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")

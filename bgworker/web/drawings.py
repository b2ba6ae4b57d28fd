"""What ran when, and how much of it: drawings in SVG, which a page stretches to its own width.

A drawing is 1,000 units wide. Those that share a span stand one above the other, in line.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from ..model.events import TaskStatus
from ..words import STATUSES, stamp, took, word_for
from .markup import Markup, fill
from .view import address, middle, task_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Tuple

    from ..history.charts import Bar, Throughput, Timeline
    from .view import View

    Span = Tuple[datetime, datetime]

WIDTH = 1000
LANE, GAP = 12, 3
"""Height of a lane of the timeline, and what is free of it."""
_CHART = 72
"""Height of a drawing of numbers over time."""
_TICKS = 6
_LABELS = 18  # height of the line below a drawing
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200,
          86_400, 172_800, 604_800, 1_209_600, 2_592_000, 7_776_000, 31_536_000)
"""Seconds between two marks of time that people count by."""


def timeline(found: Timeline, span: Span, view: View) -> Markup:
    """Draw each task as a bar on a lane; the longest ones, where there are too many."""
    shapes = [_bar(bar, span, view) for bar in found.bars]
    note = f"{len(found.bars):,} tasks"
    if found.left_out:
        note += (f", the longest; {found.left_out:,} others are not drawn, which took "
                 f"{took(found.left_out_seconds)} together")
    return _plot("Timeline", note, found.lanes * LANE + GAP, shapes, span)


def _bar(bar: Bar, span: Span, view: View) -> Markup:
    x, width = _place(bar.start_utc, bar.end_utc, span)
    seconds = (bar.end_utc - bar.start_utc).total_seconds()
    title = (f"{middle(bar.name, 48)}: {word_for(bar.status)}, {took(seconds)}, "
             f"{stamp(bar.start_utc)}")
    return _rect(bar.status.value, x, bar.lane * LANE + GAP, width, LANE - GAP, title,
                 task_path(bar.task_id) if view.has_links else None)


def load(found: Timeline, span: Span) -> Markup:
    """Draw how many tasks ran at once: the most, and the mean, in each stretch of time."""
    peak = max(1, *(each.most for each in found.loads))
    shapes = [
        _area(kind, [(*_place(each.start_utc, _after(each.start_utc, found.width), span),
                      value / peak)
                     for each, value in values])
        for kind, values in (("most", [(each, float(each.most)) for each in found.loads]),
                             ("mean", [(each, each.mean) for each in found.loads]))]
    note = f"{peak:,} at most; the mean in a stronger colour"
    return _plot("Tasks at once", note, _CHART, shapes, span, f"{peak:,}")


def throughput(found: Throughput, span: Span, view: View) -> Markup:
    """Draw how many tasks ended in each stretch of time, failures at the bottom."""
    peak = max(1, *(sum(bucket.counts.values()) for bucket in found.buckets))
    shapes = []
    for bucket in found.buckets:
        end = _after(bucket.start_utc, found.width)
        x, wide = _place(bucket.start_utc, end, span)
        path = address("/", since=bucket.start_utc.isoformat(), until=end.isoformat())
        bottom = float(_CHART)
        for status in _STACKED:
            if count := bucket.counts.get(status, 0):
                high = count / peak * (_CHART - 14)
                bottom -= high
                title = f"{count:,} {word_for(status)}, {stamp(bucket.start_utc)}"
                shapes.append(_rect(status.value, x, bottom, max(wide - 1, 1), high, title,
                                    path if view.has_links else None))
    return _plot("Throughput", f"tasks that ended, by {_unit(found.width)}", _CHART, shapes, span,
                 f"{peak:,}")


def _unit(seconds: float) -> str:
    """Return "minute", "15 minutes", "2 hours" or "3 days": a length that is meant to be round."""
    for size, word in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return word if seconds == size else f"{seconds / size:.3g} {word}s"
    return took(seconds)


_STACKED = (TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.INTERRUPTED, TaskStatus.CANCELLED,
            TaskStatus.COMPLETED)


def share(counts: Mapping[TaskStatus, int]) -> Markup:
    """Draw how the tasks of a run are divided among the statuses."""
    total, x, shapes = sum(counts.values()) or 1, 0.0, []
    for status in STATUSES:
        if count := counts.get(status, 0):
            width = count / total * WIDTH
            shapes.append(_rect(status.value, x, 0, width, 6, f"{count:,} {word_for(status)}"))
            x += width
    return fill("share", shapes=shapes, label="share of each status")


# ---------------------------------------------------------------- the frame

def span_of(times: Sequence[datetime | None]) -> Span | None:
    """Return the first and the last of some times, at least a second apart; None without any."""
    known = [time for time in times if time is not None]
    if not known:
        return None
    return min(known), max(max(known), _after(min(known), 1.0))


def _after(time: datetime, seconds: float) -> datetime:
    """Return a later time, or the last one that there is."""
    try:
        return time + timedelta(seconds=seconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=timezone.utc)


def _plot(title: str, note: str, inner: int, shapes: Sequence[Markup], span: Span,
          level: str = "") -> Markup:
    return fill("plot", title=title, note=note, inner=inner, height=inner + _LABELS, top=0,
                shapes=shapes, grid=list(_ticks(span, inner)),
                labels=fill("level", text=level) if level else "")


def _ticks(span: Span, inner: int) -> Iterator[Markup]:
    """Yield marks at round times, with a label below each."""
    length = (span[1] - span[0]).total_seconds()
    step = next((each for each in _STEPS if length / each <= _TICKS), _STEPS[-1])
    form = "%H:%M:%S" if step < 60 else "%H:%M"
    first = -(-span[0].timestamp() // step)
    for seconds in range(int(first * step), int(span[1].timestamp()) + 1, step):
        time = datetime.fromtimestamp(seconds, timezone.utc)
        x, _ = _place(time, time, span)
        kind = "first" if x < 40 else "last" if x > 960 else "tick"
        text = f"{time:%d %b}" if seconds % 86_400 == 0 else f"{time:{form}}"
        yield fill("tick", x=_short(x / 10), bottom=inner, y=inner + 13, kind=kind, text=text)


def _place(start: datetime, end: datetime, span: Span) -> tuple[float, float]:
    """Return where a stretch of time begins, and how wide it is; never too narrow to be seen."""
    length = (span[1] - span[0]).total_seconds()
    x, right = (min(max((time - span[0]).total_seconds() / length, 0.0), 1.0) * WIDTH
                for time in (start, end))
    width = max(right - x, 1.2)
    return min(x, WIDTH - width), width


def _rect(status: str, x: float, y: float, width: float, height: float, title: str,
          href: str | None = None) -> Markup:
    numbers = {"x": _short(x), "y": _short(y), "width": _short(width), "height": _short(height)}
    if href is None:
        return fill("bar", status=status, title=title, **numbers)
    return fill("bar-link", status=status, title=title, href=href, **numbers)


def _area(kind: str, steps: Sequence[tuple[float, float, float]]) -> Markup:
    """Draw stairs, each step given by its place, width and part of the height."""
    path = f"M{_short(steps[0][0])} {_CHART}"
    for x, width, part in steps:
        y = _CHART - part * (_CHART - 14)
        path += f"L{_short(x)} {_short(y)}H{_short(x + width)}"
    return fill("area", kind=kind, path=f"{path}V{_CHART}Z")


def _short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")

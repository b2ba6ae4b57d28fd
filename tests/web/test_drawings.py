"""The drawings: what stands where, and what it says."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

import pytest

from bgworker.history.charts import Bar, Bucket, Load, Throughput, Timeline
from bgworker.model.events import TaskStatus
from bgworker.web import drawings, sections
from bgworker.web.drawings import WIDTH, Axis
from bgworker.web.view import View
from tests.web.browsing import Parsed

NOON = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
SITE, REPORT = View(has_links=True, now=NOON), View(has_links=False, now=NOON)


def later(**length: float) -> datetime:
    return NOON + timedelta(**length)


def attributes(markup: str, tag: str) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in found.items()}
            for each, found in Parsed(markup).tags if each == tag]


def timeline(*bars: Bar, loads: tuple[Load, ...] = (), left_out: int = 0) -> Timeline:
    return Timeline(NOON, later(hours=1), bars, 2, left_out, 75.0 * left_out, 600.0, loads,
                    len(bars), True)


def test_a_place_on_the_axis_is_a_part_of_its_span() -> None:
    axis = Axis(NOON, later(hours=1))
    assert axis.place(NOON, later(minutes=30)) == (0.0, 500.0)
    assert axis.place(later(minutes=15), later(minutes=30)) == (250.0, 250.0)


@pytest.mark.parametrize("start, end", [
    (NOON, NOON), (later(hours=1), later(hours=1)), (later(hours=-5), later(hours=-4)),
    (later(hours=4), later(hours=5)), (later(hours=-1), later(hours=2)), (later(hours=1), NOON)])
def test_what_is_short_or_outside_can_be_seen_and_stays_inside(
    start: datetime, end: datetime
) -> None:
    x, width = Axis(NOON, later(hours=1)).place(start, end)
    assert x >= 0 and width >= 1 and x + width <= WIDTH


@pytest.mark.parametrize("times, seconds", [
    ([NOON, None, later(seconds=90)], 90.0), ([NOON], 1.0), ([NOON, NOON], 1.0),
    ([datetime.max.replace(tzinfo=timezone.utc), NOON], None)])
def test_an_axis_reaches_from_the_first_to_the_last_time(
    times: list[datetime | None], seconds: float | None
) -> None:
    axis = Axis.of(times)
    assert axis is not None
    assert seconds is None or (axis.end - axis.start).total_seconds() == seconds
    assert Axis.of([None]) is None and Axis.of([]) is None


@pytest.mark.parametrize("length, labels", [
    ({"seconds": 4}, ["12:00:00", "12:00:01", "12:00:02", "12:00:03", "12:00:04"]),
    ({"minutes": 50}, ["12:00", "12:10", "12:20", "12:30", "12:40", "12:50"]),
    ({"hours": 30}, ["12:00", "18:00", "25 Nov", "06:00", "12:00", "18:00"]),
    ({"days": 4}, ["25 Nov", "26 Nov", "27 Nov", "28 Nov"])])
def test_ticks_stand_at_round_times(length: dict[str, float], labels: list[str]) -> None:
    marks = "".join(Axis(NOON, later(**length)).ticks(72))
    assert re.findall(r">([^<>]+)</text>", marks) == labels
    for each in attributes(marks, "line"):
        assert each["x1"] == each["x2"] and 0 <= float(each["x1"].rstrip("%")) <= 100


@pytest.mark.parametrize("seconds", [1, 59, 3600, 86_400 * 40, 86_400 * 365 * 200,
                                     86_400 * 365 * 7900])
def test_there_are_never_more_ticks_than_have_room(seconds: float) -> None:
    assert len(list(Axis(NOON, later(seconds=seconds)).ticks(72))) <= 7


def test_a_task_is_a_bar_on_its_lane_and_leads_to_its_page() -> None:
    bar = Bar("01ab", "load <users>", TaskStatus.FAILED, 1, later(minutes=15), later(minutes=30))
    drawn = drawings.timeline(timeline(bar), Axis(NOON, later(hours=1)), SITE)
    [rect] = attributes(drawn, "rect")
    assert rect == {"class": "failed", "x": "250", "y": "15", "width": "250", "height": "9"}
    assert attributes(drawn, "a")[0]["href"] == "/task/01ab"
    assert "load <users>: failed, 15m00s, 2026-11-24 12:15:00 UTC" in Parsed(drawn).text
    assert "a href" not in drawings.timeline(timeline(bar), Axis(NOON, later(hours=1)), REPORT)


def test_what_is_not_drawn_is_counted() -> None:
    drawn = drawings.timeline(timeline(left_out=1200), Axis(NOON, later(hours=1)), REPORT)
    assert "1,200 others are not drawn, which took 1d01h together" in Parsed(drawn).text


def test_the_load_is_stairs_of_the_most_and_the_mean() -> None:
    loads = (Load(NOON, 4, 1.0), Load(later(minutes=10), 2, 2.0))
    drawn = drawings.load(timeline(loads=loads), Axis(NOON, later(minutes=20)))
    most, mean = (each["d"] for each in attributes(drawn, "path"))
    assert most == "M0 72H0V14H500H500V43H1000V72Z"
    assert mean == "M0 72H0V57.5H500H500V43H1000V72Z"
    assert "4 at most" in Parsed(drawn).text


def test_throughput_stacks_what_ended_and_leads_to_it() -> None:
    counts = {TaskStatus.COMPLETED: 6, TaskStatus.FAILED: 2}
    found = Throughput(60.0, (Bucket(NOON, counts), Bucket(later(minutes=1), {})), True)
    drawn = drawings.throughput(found, Axis(NOON, later(minutes=2)), SITE)
    failed, completed = attributes(drawn, "rect")
    assert (failed["class"], failed["y"], failed["height"]) == ("failed", "57.5", "14.5")
    assert (completed["class"], completed["y"], completed["height"]) == ("completed", "14", "43.5")
    href = attributes(drawn, "a")[0]["href"]
    assert "since=2026-11-24T12%3A00%3A00" in href and "until=2026-11-24T12%3A01%3A00" in href
    assert "status=failed" in href
    assert "by minute" in Parsed(drawn).text and "6 completed, 2026-11-24 12:00:00 UTC" in drawn


def test_a_run_of_seconds_fills_its_drawings_though_a_bucket_began_before() -> None:
    start, end = later(seconds=50), later(seconds=54)
    ran = Timeline(start, end, (), 1, 0, 0.0, 1.0, (Load(start, 2, 2.0),), 1, True)
    ended = {TaskStatus.COMPLETED: 1}

    def drawn(*starts: datetime) -> list[dict[str, str]]:
        buckets = tuple(Bucket(each, ended) for each in starts)
        charts = sections.charts(ran, Throughput(60.0, buckets, True), SITE)
        return attributes(charts[0], "rect") + attributes(charts[1], "path")[:1]

    bucket, load = drawn(NOON)
    assert (bucket["x"], bucket["width"]) == ("0", "999")
    assert load["d"].startswith("M0 72H0V14H250")
    earlier, _, load = drawn(later(minutes=-1), NOON)  # what ended then is drawn, too
    assert earlier["x"] == "0" and float(earlier["width"]) > 500
    assert not load["d"].startswith("M0 72H0V")


@pytest.mark.parametrize("width, word", [
    (60.0, "by minute"), (900.0, "by 15 minutes"), (3600.0, "by hour"), (7200.0, "by 2 hours"),
    (86_400.0, "by day"), (604_800.0, "by 7 days")])
def test_the_width_of_a_bucket_is_said_in_round_words(width: float, word: str) -> None:
    found = Throughput(width, (Bucket(NOON, {TaskStatus.COMPLETED: 1}),), True)
    assert word in Parsed(drawings.throughput(found, Axis(NOON, later(days=1)), SITE)).text


def test_the_share_of_each_status_is_its_part_of_the_width() -> None:
    drawn = drawings.share({TaskStatus.COMPLETED: 3, TaskStatus.FAILED: 1})
    assert [(each["class"], each["width"]) for each in attributes(drawn, "rect")] == [
        ("completed", "750"), ("failed", "250")]
    assert attributes(drawings.share({}), "rect") == []

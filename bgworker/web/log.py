"""What a task says, as lines of a page, and live as server-sent events.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from contextlib import suppress

from ..model.clock import monotonic
from ..model.errors import BgworkerError
from ..model.events import StreamType
from ..words import stamp
from .markup import Markup, fill

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..history.reader import History
    from ..model.events import StreamEvent

LONGEST = 20_000
"""Characters of a line that are shown."""
MOST = 400_000
"""Characters of the lines of one page together; what comes on top of it is cut to a few."""
INTERVAL = 0.2
"""Seconds between two looks for new lines."""
_HEARTBEAT = 15.0  # seconds after which a client hears that we are there, and we whether it is
_JUDGED = 2.0  # seconds after which a task is looked at though nobody has written: it may be dead
_MOST_BEHIND, _NEWEST = 1000, 500
"""Lines that may be new at a look; where more are, only so many of the newest are sent."""


def lines_of(events: Sequence[StreamEvent]) -> list[Markup]:
    """Return lines as a page shows them, bounded all together; the last ones keep most."""
    room, lines = MOST, []
    for event in reversed(events):
        lines.append(line_of(event, LONGEST if room > 0 else 200))
        room -= min(len(event.payload), LONGEST)
    return lines[::-1]


def line_of(event: StreamEvent, most: int = LONGEST) -> Markup:
    """Return what a task said at once."""
    text = event.payload
    if event.stream_type is StreamType.PROGRESS:
        percent = "" if event.percent is None else f"{event.percent:.0f}% "
        text = percent + event.message
    if len(text) > most:
        text = f"{text[:most]}\n[cut here: {len(text):,} characters; bgworker tail prints all]"
    if event.truncated:
        text += f"\n[cut when it was recorded: {event.original_bytes:,} bytes]"
    time = event.created_utc
    return fill("line", stream=event.stream_type.value, exact=time.isoformat(), stamp=stamp(time),
                clock=f"{time:%H:%M:%S}.{time.microsecond // 1000:03}", text=text)


def follow(history: History, task_id: str, after: int, stream: str | None,
           send: Callable[[str], None], pause: Callable[[float], None]) -> None:
    """Send what a task says from a place on, until it has ended. What comes faster than anybody
    reads is passed over, up to the newest lines, and said to be.

    Args:
        send: is given text of the event stream.
        pause: waits so many seconds, and raises to have this end.
    """
    types = None if stream is None else [stream]
    seen, looked_at, sent_at = None, 0.0, monotonic()
    # where the task or the history goes away, the page tells, which is asked for next
    with suppress(BgworkerError):
        while True:
            version = history.version()  # asked before the look, so that no change is missed
            if version != seen or monotonic() - looked_at > _JUDGED:
                seen, looked_at = version, monotonic()
                is_over = history.task(task_id).status.is_final
                found = history.lines(task_id, after=after, types=types, limit=_MOST_BEHIND)
                lines = lines_of(found.lines)
                if found.is_more:
                    found = history.lines(task_id, types=types, limit=_NEWEST)
                    lines = [fill("passed"), *lines_of(found.lines)]
                if lines:
                    after, sent_at = found.newer, monotonic()
                    send(_message(lines, after))
                if is_over:
                    break
            if monotonic() - sent_at > _HEARTBEAT:
                sent_at = monotonic()
                send(":\n\n")
            pause(INTERVAL)
    send("event: end\ndata:\n\n")


def _message(lines: Sequence[Markup], last: int) -> str:
    """Return an event of the stream that holds lines; its id is where a client goes on from."""
    data = "".join(f"data: {each}\n" for each in "".join(lines).split("\n"))
    return f"id: {last}\n{data}\n"

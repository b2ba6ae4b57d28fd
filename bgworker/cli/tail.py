"""``bgworker tail``: what a task said, and with ``-f`` what it says."""

from __future__ import annotations

from ..model.events import StreamType
from ..model.wire import encode
from ..words import ending, escaped_lines, said
from .options import NO_SUCH_TASK, add_db, add_json, add_task, exit_codes, whole
from .reading import Output, harmless_json, opened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator
    from typing import Any

    from ..history.reader import History
    from ..model.events import StreamEvent

HELP = "print what a task said, or says"

DESCRIPTION = """\
Print what a task said, in order: its output as it is, lines of its other
streams with their names in front. Control characters are shown, not obeyed;
--json has every event exactly. Without TASK, of the last one.
"""

EPILOG = exit_codes(NO_SUCH_TASK) + """
examples:
  bgworker tail -f
  bgworker tail -n 100 --stream error nightly
"""

_COLOURS = {
    StreamType.ERROR: "31",
    StreamType.WARNING: "33",
    StreamType.VERBOSE: "2",
    StreamType.PROGRESS: "36",
}


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_task(parser)
    add_db(parser)
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on until the task has ended"
    )
    parser.add_argument(
        "-n",
        "--lines",
        metavar="N",
        type=whole(),
        help="begin with the last N events (default: all)",
    )
    parser.add_argument(
        "--stream",
        metavar="S",
        choices=[str(stream) for stream in StreamType],
        action="append",
        help=f"only this stream: {', '.join(StreamType)}; may be given several times",
    )
    add_json(parser, "print an event a line as JSON, in the wire format")


def act(options: Namespace) -> int:
    """Print the streams page by page, and if asked for follow them."""
    output = Output()
    with opened(options) as history:
        task_id = history.task(options.task, run=options.run).task_id
        seq = 0
        if options.lines is not None:
            # following goes on from here, also when none of these is to be printed
            seq = max(
                (event.seq for event in history.streams(task_id, limit=1, newest=True)), default=0
            )
        for events in history.pages(task_id, newest=options.lines, types=options.stream):
            output.lines(_lines(events, options, output))
            seq = events[-1].seq if events else seq
        if options.follow:
            for event in history.follow(task_id, since=seq, types=options.stream):
                output.lines(_lines([event], options, output))
            task = history.task(task_id)
            if not options.json:
                options.parser.tell(ending(task))
    return 0


def _lines(events: list[StreamEvent], options: Namespace, output: Output) -> Iterator[str]:
    has_colour = output.surface().has_colour
    for event in events:
        if options.json:
            yield harmless_json(encode(event))
        elif event.stream_type is StreamType.OUTPUT or options.stream and len(options.stream) == 1:
            yield from payload_lines(event)
        else:
            label = f"[{event.stream_type}]"
            if has_colour:
                label = f"\x1b[{_COLOURS[event.stream_type]}m{label}\x1b[0m"
            yield from (f"{label} {line}" for line in payload_lines(event))


def payload_lines(event: StreamEvent) -> Iterator[str]:
    """Yield what an event says as lines that can do no harm."""
    if event.stream_type is StreamType.PROGRESS:
        percent = "" if event.percent is None else f"{event.percent:.0f}%"
        yield said(f"{percent} {event.message}".strip())
        return
    yield from escaped_lines(event.payload, said)
    if event.truncated:
        yield f"[cut: {event.original_bytes:,} bytes]"

"""``bgworker grep``: which tasks said something, and the lines in which they did."""

from __future__ import annotations

import re
import warnings
from itertools import groupby

from ..model.events import StreamType, TaskStatus
from ..model.text import sanitise
from ..words import ago, escaped, escaped_lines, now, said, uncoloured, word_for
from .options import add_db, add_json, add_run, add_since, whole
from .reading import JSON_VERSION, Output, json_line, opened
from .tables import MOST_OF_A_NAME
from .tasks import a_status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Iterator
    from datetime import datetime
    from typing import Any, Tuple

    from ..history.reader import History
    from ..history.searching import Found
    from ..model.events import TaskSnapshot
    from .text import Surface

    Line = Tuple[str, "int | None", "datetime | None", str]
    """Stream, number and time of the event, and the line."""

HELP = "search what tasks said, and why they failed"

DESCRIPTION = """\
Print the lines that match a regular expression (as Python has them): of what
tasks said in any of their streams, and of failures with their tracebacks. The
newest tasks come first. On a terminal the lines of a task stand under its name;
elsewhere each begins with the task's id and the stream, as in grep:

  9fe26ca5:error:cannot open stock.csv

The id names the task for the other verbs.
"""

EPILOG = """\
exit codes:
  0 a line was found; 1 none was; 2 the command line is wrong, or there is no
  history that can be read; 141 nobody reads our output any more (as in
  ... | head)

examples:
  bgworker grep 'cannot open .*csv'
  bgworker grep -i -F 'out of memory (' --stream error --since 1d
  bgworker grep -l timeout --status failed --run last
"""

FAILURE = "failure"
"""What ``--stream`` calls the failures."""

_SPECIAL = frozenset(r".^$*+?{}[]\|()")
_FOUND = "\x1b[1;31m{}\x1b[0m"
_MOST_OF_A_LINE = 500  # columns that are shown on a terminal, around what was found


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    parser.add_argument("pattern", metavar="PATTERN", nargs="?",
                        help="what to look for; behind -- it may begin with a dash")
    parser.add_argument("-F", "--fixed-strings", action="store_true",
                        help="take PATTERN as it is, not as a regular expression")
    parser.add_argument("-E", "--extended-regexp", dest="fixed_strings", action="store_false",
                        help="take PATTERN as a regular expression (the default)")
    parser.add_argument("-i", "--ignore-case", action="store_true",
                        help="take capital and small letters for the same")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-c", "--count", action="store_true",
                      help="print how many lines of each task match, instead of the lines")
    what.add_argument("-l", "--files-with-matches", dest="ids", action="store_true",
                      help="print only the ids of the tasks")
    what.add_argument("-q", "--quiet", action="store_true",
                      help="print nothing: the exit code tells")
    parser.add_argument("-m", "--max-count", metavar="N", type=whole(1),
                        help="at most N lines of each task")
    parser.add_argument("--limit", metavar="N", type=whole(), default=0,
                        help="end after N lines, or tasks with -c or -l (default: 0, which is all)")
    add_db(parser)
    parser.add_argument(
        "--stream", metavar="S", action="append",
        choices=[*map(str, StreamType), FAILURE],
        help=f"only this stream: {', '.join(StreamType)}, {FAILURE}; may be given several times")
    parser.add_argument("--status", choices=[str(status) for status in TaskStatus], metavar="S",
                        type=a_status, help="only tasks of this status")
    parser.add_argument("--name", metavar="GLOB",
                        help="only tasks whose name matches; *, ? and [...] are wild")
    add_since(parser)
    add_run(parser)
    add_json(parser, "print a line of JSON for each line, or task, that is found")


def act(options: Namespace) -> int:
    """Print what is found, as it is found."""
    pattern, literal = _pattern_of(options)
    output = Output()
    with opened(options) as history:
        keys = history.task_keys(status=options.status, name=options.name, since=options.since,
                                 run=options.run, limit=None)
        streams = options.stream
        found = history.search(
            keys, pattern, literal=literal, failures=not streams or FAILURE in streams,
            types=None if not streams else [each for each in streams if each != FAILURE])
        count = 0
        for task, lines in _by_task(found, pattern, options):
            if options.quiet:
                return 0
            left = options.limit - count if options.limit else None
            count += _print(history, task, lines, left, pattern, options, output)
            if options.limit and count >= options.limit:
                break
    return 0 if count else 1


def _pattern_of(options: Namespace) -> tuple[re.Pattern[str], str | None]:
    """Return the pattern, and the text that it is if it is no more than that."""
    words = [*([] if options.pattern is None else [options.pattern]), *options.behind_dashes]
    if len(words) != 1:
        options.parser.error("expected one PATTERN, got "
                             f"{'none' if not words else ' '.join(words)}; quote what has blanks")
    text = sanitise(words[0])  # as texts are in the file
    is_fixed = options.fixed_strings or not _SPECIAL & set(text)
    flags = re.MULTILINE | (re.IGNORECASE if options.ignore_case else 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that of [[, which may get a meaning
            pattern = re.compile(re.escape(text) if is_fixed else text, flags)
    except (re.error, OverflowError, RecursionError) as error:
        options.parser.error(f"argument PATTERN: expected a regular expression, got {text[:80]!r}: "
                             f"{error}; with -F it is taken as it is")
    return pattern, text if is_fixed and not options.ignore_case else None


# ---------------------------------------------------------------- lines

def _by_task(found: Iterable[Found], pattern: re.Pattern[str],
             options: Namespace) -> Iterator[tuple[TaskSnapshot, Iterator[Line]]]:
    """Yield each task that has a line, with those of its lines that are wanted."""
    for _, parts in groupby(found, key=lambda each: each.task.task_id):
        lines = ((part.task, line) for part in parts for line in _matching(part, pattern))
        first = next(lines, None)
        if first is not None:
            task, line = first
            yield task, _some(line, (line for _, line in lines), options.max_count)


def _some(first: Line, others: Iterator[Line], most: int | None) -> Iterator[Line]:
    yield first
    for number, line in enumerate(others, 2):
        if most is not None and number > most:
            return
        yield line


def _matching(found: Found, pattern: re.Pattern[str]) -> Iterator[Line]:
    for event in found.events:
        text = event.message if event.stream_type is StreamType.PROGRESS else event.payload
        for line in uncoloured(text).split("\n"):
            if pattern.search(line):
                yield event.stream_type.value, event.seq, event.created_utc, line
    for line in uncoloured(found.failure).split("\n"):
        if found.failure and pattern.search(line):
            yield FAILURE, None, found.task.completed_utc, line


# ---------------------------------------------------------------- the output

def _print(history: History, task: TaskSnapshot, lines: Iterator[Line], most: int | None,
           pattern: re.Pattern[str], options: Namespace, output: Output) -> int:
    """Print what is found of one task, and return how much that was."""
    told = {"v": JSON_VERSION, "task_id": task.task_id, "name": task.name, "status": task.status}
    if options.count:
        count = sum(1 for _ in lines)
        output.lines([json_line({**told, "count": count}) if options.json
                      else f"{_short(history, task)}:{count}"])
        return 1
    if options.ids:
        output.lines([json_line(told) if options.json else _short(history, task)])
        return 1
    printed = 0

    def counted() -> Iterator[Line]:
        nonlocal printed
        for line in lines:
            if printed == most:
                return
            printed += 1
            yield line

    if options.json:
        output.lines(json_line({**told, "stream": stream, "seq": seq, "time": time, "line": line})
                     for stream, seq, time, line in counted())
    elif output.is_terminal:
        output.lines(_for_people(_short(history, task), task, counted(), pattern, output.surface()))
    else:
        name = _short(history, task)
        output.lines(f"{name}:{stream}:{piece}" for stream, _, _, line in counted()
                     for piece in escaped_lines(line, said))
    return printed


def _short(history: History, task: TaskSnapshot) -> str:
    return escaped(task.task_id[-history.id_length([task.task_id]):])


def _for_people(name: str, task: TaskSnapshot, lines: Iterable[Line], pattern: re.Pattern[str],
                surface: Surface) -> Iterator[str]:
    heading = surface.cell(task.name, MOST_OF_A_NAME)
    status = surface.painted(word_for(task.status), task.status)
    when = task.completed_utc or task.started_utc or task.created_utc
    yield f"{name} {heading} ({status}, {ago(when, now())})"
    for stream, _, _, line in lines:
        yield f"  {stream}: {_marked(line, pattern, surface)}"
    yield ""


def _marked(line: str, pattern: re.Pattern[str], surface: Surface) -> str:
    """Return a line with what was found in colour; of a long one what is around the first of it."""
    first = pattern.search(line)
    begin = 0
    if first is not None and first.start() > _MOST_OF_A_LINE // 2:
        begin = first.start() - _MOST_OF_A_LINE // 4
    end = begin + _MOST_OF_A_LINE
    parts, at = ["…" if begin else ""], begin
    for found in pattern.finditer(line, begin, end) if surface.has_colour else ():
        if found.start() < found.end():
            parts += [said(line[at:found.start()]), _FOUND.format(said(found[0]))]
            at = found.end()
    parts += [said(line[at:end]), "…" if end < len(line) else ""]
    return "".join(parts)

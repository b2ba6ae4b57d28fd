"""The options that several verbs have, and what their values may be. A wrong value ends the program
with one line that names it."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentTypeError
from contextlib import suppress
from textwrap import fill

from ..model.errors import ConfigurationError
from ..words import duration, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable
    from datetime import timedelta
    from typing import Any

DEFAULT_DB = "bgworker.db"

A_RUN = ("its id, the beginning of one or its last 8 digits, last, or last~1, last~2 ... for those "
         "before it")
"""What names a run."""

A_TASK = ("a task's id, the beginning of one or its last 8 digits, a name (the newest task that "
          "has it), the number of a command in the newest run, such as 12 or '[12]', or last")
"""What names a task."""

NO_SUCH_TASK = "there is no such task, or several may be meant"
NO_OUTPUT = "the output cannot be written"


def exit_codes(one: str) -> str:
    """Return the section of a help that tells of exit codes, of which only the 1 differs from verb
    to verb."""
    codes = (
        f"0 done; 1 {one}; 2 the command line is wrong, or there is no history that can be read; "
        "141 nobody reads our output any more (as in ... | head)"
    )
    return f"exit codes:\n{fill(codes, 78, initial_indent='  ', subsequent_indent='  ')}\n"


def program() -> str:
    """Return what was typed to start this program, to be typed again."""
    if os.path.basename(sys.argv[0]) != "__main__.py":
        return "bgworker"
    package = __package__.rpartition(".")[0]
    return f"{os.path.basename(sys.executable)} -m {package}"


def typed(options: Namespace, words: str) -> str:
    """Return what to type for another verb to read the same history.

    Args:
        words: the verb, and what names a task.
    """
    is_default = options.db == options.parser.get_default("db")
    verb, _, rest = words.partition(" ")
    where = "" if is_default else f" --db {shlex.quote(options.db)}"
    return f"{program()} {verb}{where} {rest}".rstrip()


# ---------------------------------------------------------------- options

def add_db(parser: Any, what: str = "the history") -> None:
    """Add ``--db``."""
    default = os.environ.get("BGWORKER_DB") or DEFAULT_DB
    here = escaped(default).replace("%", "%%")
    parser.add_argument("--db", metavar="PATH", type=a_path, default=default,
                        help=f"{what} (default: $BGWORKER_DB or {DEFAULT_DB}, here {here})")


def add_json(parser: Any, what: str = "print JSON, for programs") -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help=what)


def add_since(parser: Any) -> None:
    """Add ``--since``."""
    parser.add_argument(
        "--since",
        metavar="DUR",
        type=a_duration,
        help="only tasks that have not ended, or ended less than 90s, 15m, 2h, 7d ... ago",
    )


def add_run(parser: Any, what: str = "only tasks of this run") -> None:
    """Add ``--run``."""
    parser.add_argument("--run", metavar="RUN", help=f"{what}: {A_RUN}")


def add_task(parser: Any) -> None:
    """Add the argument that names a task, the last one if it is left out, and ``--run``."""
    parser.add_argument("task", metavar="TASK", nargs="?", default="last",
                        help=f"{A_TASK} (the default)")
    add_run(parser, "the run that TASK is of, by number too")


# ---------------------------------------------------------------- values

def a_duration(text: str) -> timedelta:
    """Read an option's value with `duration`."""
    try:
        return duration(text)
    except ConfigurationError as error:
        raise ArgumentTypeError(str(error)) from error


def seconds(remedy: str) -> Callable[[str], float]:
    """Return what reads an option's value as seconds, or as a duration, above 0."""
    def read(text: str) -> float:
        found = 0.0
        with suppress(ConfigurationError):
            found = duration(text if text[-1:].isalpha() else f"{text}s").total_seconds()
        if not found:
            raise ArgumentTypeError("expected seconds > 0, or a duration such as 90s or 1h30m, got "
                                    f"{text[:80]!r}; {remedy}")
        return found
    return read


def whole(least: int = 0, remedy: str = "") -> Callable[[str], int]:
    """Return what reads an option's value as a whole number."""
    def read(text: str) -> int:
        if text.isascii() and text.isdigit() and len(text) < 19 and int(text) >= least:
            return int(text)
        raise ArgumentTypeError(
            f"expected a whole number >= {least}, got {text[:80]!r}{remedy}")
    return read


def a_path(text: str) -> str:
    """Read an option's value as the path of a file."""
    if not text or "\0" in text:
        raise ArgumentTypeError(f"expected the path of a file, got {text!r}")
    return text

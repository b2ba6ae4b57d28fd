"""The command line: a module per verb. Nothing else imports this.

A verb's module describes it with ``HELP``, ``DESCRIPTION``, ``EPILOG`` and ``add_arguments``; its
``act`` does the work and returns the exit code. Errors of the output are told here.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress

from .. import __version__
from ..model.errors import MissingPart
from ..words import escaped
from . import (cancel, diff, export, grep, prune, replay, report, rerun, run, runs, serve, show,
               stats, tail, tasks, watch, why)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

VERBS = (run, rerun, tasks, runs, diff, show, why, tail, grep, stats, watch, cancel, report,
         serve, prune, replay, export)
"""In the order of the help."""

EPILOG = """\
examples:
  bgworker run -j 4 --timeout 60 -f commands.txt
  bgworker tasks --status failed
  bgworker tail -f last

Each verb tells more: bgworker run --help
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which guesses no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def tell(self, message: str) -> None:
        """Write a line to stderr."""
        print(f"{self.prog}: {escaped(' '.join(message.split()))}", file=sys.stderr)

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong with the command line, and exit with code 2."""
        self.fail(message, 2)

    def fail(self, message: str, code: int = 1) -> NoReturn:
        """Tell what went wrong, and exit."""
        self.tell(f"error: {message}")
        self.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; 2 where it cannot be understood.

    Args:
        argv: the words behind the program's name; None takes those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _occupy_standard_streams()
    parser = make_parser()
    try:
        try:
            options = _parsed(parser, words)
            parser = options.parser
            code: int = options.act(options)
        except SystemExit as stop:  # argparse ends --help, --version and errors so
            code = int(stop.code or 0)
        sys.stdout.flush()
        return code
    except OSError as error:
        with suppress(OSError):  # the interpreter would try once more to write it, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            return 141
        reason = error.strerror or error
        trouble, code = f"{parser.prog}: error: cannot write the output: {reason}", 1
    except ModuleNotFoundError as error:
        trouble, code = _lacking(error.name or ""), 2
        if not trouble:
            raise
    except KeyboardInterrupt:  # before the verb has handlers of its own
        return 130
    print(trouble, file=sys.stderr)
    return code


def _parsed(parser: Parser, words: list[str]) -> argparse.Namespace:
    """Return what the words ask for; exit where they cannot be understood."""
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2)
    # What follows the first -- is a command, to be left alone; argparse treats it differently
    # from version to version.
    at = words.index("--") if "--" in words else len(words)
    options, strange = parser.parse_known_args(
        words[:at], argparse.Namespace(behind_dashes=words[at + 1 :], parser=parser)
    )
    used: Parser = options.parser
    if strange:
        used.error(f"unrecognized arguments: {' '.join(strange)}; see {used.prog} --help")
    if used is parser:
        used.error(f"expected a verb; see {used.prog} --help")
    return options


def _lacking(module: str) -> str:
    """Return the error that tells of a module which a verb needs and which is not there; nothing if
    that is a defect."""
    package, _, part = module.rpartition(".")
    if package == __package__.rpartition(".")[0]:  # a vendored copy was made without the part
        trouble = str(MissingPart(part))
    elif module in ("sqlite3", "_sqlite3"):
        trouble = (
            f"this Python has no {module} module, which a history needs; install it, or use "
            "another Python"
        )
    else:
        return ""
    is_for_history = part in ("history", "sqlite3", "_sqlite3")
    hint = " (run works without a history: --no-db)" if is_for_history else ""
    return f"bgworker: error: {trouble}{hint}"


def _occupy_standard_streams() -> None:
    """Open the null device where we were started without stdin, stdout or stderr. Else the next
    file that is opened, a history perhaps, would get the stream's number, and our output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(
                sys,
                name,
                open(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8", closefd=False),
            )


def make_parser() -> Parser:
    """Return the parser of the whole command line. Each verb sets ``act`` and ``parser`` in the
    options."""
    parser = Parser(
        prog="bgworker",
        epilog=EPILOG,
        description="Run shell commands in parallel, keep a faithful record of what they did, and "
        "read it.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=Parser)
    for verb in VERBS:
        used = verbs.add_parser(
            verb.__name__.rpartition(".")[2],
            help=verb.HELP,
            description=verb.DESCRIPTION,
            epilog=verb.EPILOG,
        )
        verb.add_arguments(used)
        used.set_defaults(act=verb.act, parser=used)
    return parser

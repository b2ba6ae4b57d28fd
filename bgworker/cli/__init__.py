"""The command line: one module per verb, each with ``add_parser`` to describe itself. Nothing else
imports this."""

from __future__ import annotations

import argparse
import os
import sys

from .. import __version__
from ..model.errors import MissingPart
from . import export, prune, replay, run, show, stats, tail, tasks, watch
from .text import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

VERBS = (run, tasks, show, tail, stats, watch, prune, replay, export)
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

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong on stderr and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {escaped(' '.join(message.split()))}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; 2 for what was not understood.

    Args:
        argv: the words behind the program's name; None takes those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _occupy_standard_streams()
    try:
        parser = make_parser()
        if not words:
            parser.print_help(sys.stderr)
            return 2
        # What follows the first -- is a command, to be left alone; argparse treats it differently
        # from version to version.
        at = words.index("--") if "--" in words else len(words)
        options, strange = parser.parse_known_args(
            words[:at], argparse.Namespace(behind_dashes=words[at + 1 :])
        )
        used: Parser = getattr(options, "parser", parser)
        if strange:
            used.error(f"unrecognized arguments: {' '.join(strange)}; see {used.prog} --help")
        if not hasattr(options, "act"):
            used.error(f"expected a verb; see {used.prog} --help")
        code: int = options.act(options)
        return code
    except SystemExit as stop:  # argparse ends --help, --version and errors so
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        return code if _flushed() else 141
    except ModuleNotFoundError as error:
        trouble = _lacking(error.name or "")
        if not trouble:
            raise
        print(f"bgworker: error: {trouble}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the verb has handlers of its own
        return 130


def _lacking(module: str) -> str:
    """Return what to say of a module that a verb needs and that is not there; nothing if that is a
    defect."""
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
    return trouble + (" (run works without a history: --no-db)" if is_for_history else "")


def _occupy_standard_streams() -> None:
    """Open the null device where we were started without stdin, stdout or stderr: else the next
    file that is opened, a history perhaps, would get that number, and what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(
                sys,
                name,
                open(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8", closefd=False),
            )


def _flushed() -> bool:
    """Write what argparse has printed; False when nobody reads it."""
    try:
        sys.stdout.flush()
    except OSError:
        # the interpreter would try again, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return False
    return True


def make_parser() -> Parser:
    """Return the parser of the whole command line. Each verb sets ``act`` and ``parser`` in the
    options."""
    parser = Parser(
        prog="bgworker",
        epilog=EPILOG,
        description="Run shell commands in parallel, keep a faithful record of what they did, and read it.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=Parser)
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser

"""The commands and sinks that the options of ``bgworker run`` name, checked before anything is
started."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass

from ..model.errors import BgworkerError, ConfigurationError
from ..sinks import open_sink, sinks_from_environ
from ..sinks.opening import shown
from ..words import escaped
from .text import Surface

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable
    from typing import Any

    from ..shell.command import ShellCommand
    from ..sinks.base import Sink

NAME_LENGTH = 200
"""Characters of a command that name its task and stand in its outcome line."""


@dataclass(frozen=True)
class Command:
    """A command that was checked and can be run."""

    name: str
    """Of the task."""
    text: str
    """What to call it in a line of our own: harmless, and not long."""
    metadata: dict[str, Any]
    """Recorded with the task: the directory, and the exact words."""
    call: ShellCommand


def commands_of(options: Namespace) -> list[Command]:
    """Return the commands that the options name.

    Raises:
        ConfigurationError: there are none, or not all of them can be run.
    """
    words: list[str] = options.command
    if options.behind_dashes:
        words = [*words, "--", *options.behind_dashes] if words else options.behind_dashes
    if options.file is not None and words:
        raise ConfigurationError(
            f"expected either a command or -f FILE, got both -f {options.file} and "
            f"{shlex.join(words)}; leave one out"
        )
    if options.file is not None:
        calls = [_checked(line, where) for line, where in _lines(options.file)]
    elif words:
        calls = [_checked(words, "COMMAND")]
    else:
        raise ConfigurationError(
            "expected a command behind --, or -f FILE; see bgworker run --help"
        )
    here = place()
    commands = []
    for number, call in enumerate(calls, 1):
        text = call.source.script_text
        name = text[:NAME_LENGTH]
        if options.name is not None:
            name = f"{options.name}-{number}" if calls[1:] else options.name
        shown = Surface().cut(escaped(text[:2 * NAME_LENGTH]), NAME_LENGTH)
        commands.append(Command(name, shown, {**here, **_recorded(call)}, call))
    return commands


def _recorded(call: ShellCommand) -> dict[str, Any]:
    if isinstance(call.argv, str):
        return {"command": exactly(call.argv)}
    return {
        "command": exactly(shlex.join(call.argv)),
        "argv": [exactly(word) for word in call.argv],
    }


def exactly(text: str) -> str | dict[str, str]:
    """Return what can be recorded of a text that the system knows as bytes, such that the bytes can
    be had back.

    That is the text whose UTF-8 they are; where they are none, an object with their Latin-1 text.
    """
    data = os.fsencode(text)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"latin-1": data.decode("latin-1")}


def _lines(file: str) -> list[tuple[str, str]]:
    """Return the commands in the file, each with where it stands."""
    name = "stdin" if file == "-" else file
    try:
        data = _read(file)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigurationError(
            f"argument -f: cannot read {name!r}: {getattr(error, 'strerror', None) or error}; "
            "expected a file with one command a line"
        ) from error
    if data.startswith(b"\xef\xbb\xbf"):  # a mark of UTF-8, which editors on Windows write
        data = data[3:]
    lines = []
    for number, line in enumerate(data.split(b"\n"), 1):
        line = line.strip(b" \t\r")
        if line and not line.startswith(b"#"):
            # whose bytes come out as they went in
            lines.append((os.fsdecode(line), f"line {number} of {name!r}"))
    if not lines:
        raise ConfigurationError(
            f"argument -f: there is no command in {name!r}; expected one a line"
        )
    return lines


def _read(file: str) -> bytes:
    if file != "-":
        with open(file, "rb") as opened:
            return opened.read()
    if sys.stdin is None:
        raise OSError("it is closed")
    return sys.stdin.buffer.read()


def _checked(command: str | list[str], where: str) -> ShellCommand:
    from ..shell.command import shell  # a vendored copy may lack it
    try:
        return shell(command)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def place() -> dict[str, Any]:
    """Return the part of the metadata that all commands share: the directory."""
    try:
        return {"cwd": exactly(os.getcwd())}
    except OSError:  # it was removed
        return {}


def left_of(commands: list[Command], options: Namespace) -> list[Command]:
    """Return the commands that have not completed before, according to the history that the options
    name.

    A command is known by its text and the directory that it is run in. It has completed as often as
    it was recorded to: of two equal lines, of which one failed, one is left.

    Raises:
        BgworkerError: the history cannot be read.
    """
    if options.db is None:
        raise ConfigurationError(
            "argument --resume: expected a history to look into; leave out --no-db"
        )
    if not os.path.exists(options.db) or not os.path.getsize(options.db):
        return commands  # nothing is recorded yet; an empty file is filled as a missing one is made
    from ..history.reader import History
    hashes = [command.call.source.script_hash for command in commands]
    with History(options.db) as history:
        completed = history.completed(set(hashes), place())
    left = []
    for command, script_hash in zip(commands, hashes):
        completed[script_hash] -= 1
        if completed[script_hash] < 0:
            left.append(command)
    return left


def sinks_of(options: Namespace) -> list[Sink]:
    """Return the sinks that the options name, files last: they have been looked at, and nothing of
    them exists yet.

    Raises:
        BgworkerError: a specification is wrong, or a file cannot be written to.
    """
    given: list[tuple[str, Sink]] = []

    def add(source: str, make: Callable[[str], Sink], what: str) -> None:
        try:
            given.append((source, make(what)))
        except BgworkerError as error:
            raise ConfigurationError(f"{source}: {error}") from error

    if options.db is not None:
        from ..history.sink import SqliteSink
        add("argument --db", SqliteSink, options.db)
    if options.jsonl is not None:
        from ..sinks.jsonl import JsonlSink
        add("argument --jsonl", JsonlSink, options.jsonl)
    for spec in options.sink:
        add("argument --sink", open_sink, spec)
    ours = [sink for _, sink in given]
    for spec in sinks_from_environ():
        if spec.startswith(("jsonl:", "sqlite:")):
            # only to be looked at: the Scheduler opens them, and calls a factory only once
            add("BGWORKER_SINKS", open_sink, spec)
    files = [(source, path) for source, sink in given if (path := _path_of(sink))]
    for source, path in files:
        if trouble := _trouble_with(path):
            instead = "; or record nothing, with --no-db" if source == "argument --db" else ""
            raise ConfigurationError(f"{source}: cannot write to {shown(path)}: {trouble}{instead}")
    _refuse_shared(files)
    return sorted(ours, key=lambda sink: _path_of(sink) != "")


def _refuse_shared(files: list[tuple[str, str]]) -> None:
    """Refuse two sinks with one file: a history would be overwritten with lines, or each line come
    twice."""
    found: dict[str | tuple[int, int], str] = {}
    for source, path in files:
        key: str | tuple[int, int] = os.path.realpath(path)
        with suppress(OSError):  # nothing is there, or a circle of links, of which its sink tells
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                continue  # a device or a FIFO takes lines from anybody
            key = status.st_dev, status.st_ino
        if key in found:
            raise ConfigurationError(
                f"{source}: {shown(path)} is the file of {found[key]} already; name another"
            )
        found[key] = source


def _path_of(sink: Sink) -> str:
    path = getattr(sink, "path", "")
    return path if isinstance(path, str) else ""


def _trouble_with(path: str) -> str:
    """Return why a file can be neither written nor created, and what to do; nothing if it can."""
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path):
        return "it is a directory; name a file"
    if not os.path.isdir(folder):
        return f"there is no directory {folder!r}; create it first"
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        return "permission denied; name a file, in a directory, that you may write to"
    return ""

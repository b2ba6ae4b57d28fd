"""The commands that the options of ``bgworker run`` name: which they are, what is recorded of them,
and which of them are left to be run."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, replace
from itertools import chain, islice

from ..model.errors import ConfigurationError
from .inputs import Lines, combinations
from .template import Template

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Tuple, Union

    from ..shell.command import ShellCommand
    from .inputs import Source

    Text = Tuple[Union[str, "list[str]"], str, str]
    Texts = Callable[[], Iterator[Text]]

NAME_LENGTH = 200
"""Characters of a command that name its task."""

SEPARATOR = ":::"
"""What stands before arguments, unless another word was chosen."""


@dataclass(frozen=True)
class Command:
    """A command that can be run."""

    name: str
    """Of the task."""
    metadata: dict[str, Any]
    """Recorded with the task: the directory, and the exact words."""
    call: ShellCommand | Unusable
    tag: str = ""
    """The arguments that it was made for; empty where it was not made for any."""
    timeout: float | None = None
    """Seconds that each attempt may take where the options say nothing."""


class Unusable:
    """Stands in for what came out of a pipe and is no command: its task fails, and says why.

    What is written in a file is refused before anything runs.
    """

    on_start: Callable[[], object] | None = None
    limit: Callable[[], float | None] | None = None

    def __init__(self, shown: ShellCommand, error: ConfigurationError) -> None:
        self.source = shown.source
        self._error = error

    def __call__(self) -> int:
        raise self._error


class Commands:
    """The commands of a run. Each is made when it is asked for.

    Args:
        texts: yields what is to be run, a line for the shell or words, each with where it stands,
            and the arguments that it was made for.
        lists: where it reads from.
        name: of the one task, or the beginning of the names of many; None names them after their
            commands.

    Raises:
        ConfigurationError: not all of them can be run, or there are none.
    """

    def __init__(self, texts: Texts, lists: Sequence[Lines] = (), name: str | None = None) -> None:
        self._texts = texts
        self._lists = lists
        self._name = name
        self._place = place()
        self.total: int | None = None
        """How many there are; None as long as a pipe may bring more."""
        if not any(each.is_pipe for each in lists):
            self.total = 0
            for text, where, _ in texts():
                if _is_odd(text):
                    _checked(text, where)
                self.total += 1
        self.is_single = self.total == 1
        """True if there is one, and that was known from the beginning."""
        self.skipped = 0
        """How many there were besides, which completed before."""

    @property
    def error(self) -> str:
        """Why there may be fewer than were written."""
        return "; ".join(each.error for each in self._lists if each.error)

    def each(self, is_wanted: Callable[[], bool]) -> Iterator[Command]:
        """Make the commands, one after the other. Those of a pipe come once.

        Args:
            is_wanted: asked while nothing comes out of a pipe, whether somebody still wants more.
        """
        for each in self._lists:
            each.is_wanted = is_wanted
        count = 0
        for count, (text, where, tag) in enumerate(self._texts(), 1):
            call: ShellCommand | Unusable
            try:
                call = _checked(text, where)
            except ConfigurationError as error:
                words = [text] if isinstance(text, str) else text
                call = Unusable(_checked([ascii(word) for word in words], where), error)
            name = call.source.script_text[:NAME_LENGTH]
            if self._name is not None:
                name = self._name if self.is_single else f"{self._name}-{count}"
            yield Command(name, {**self._place, **_recorded(call)}, call, tag)
        self.total = count

    def is_empty(self) -> bool:
        """Tell whether there is none. Waits for the first one that a pipe brings."""
        if self.total is None:
            texts = self._texts()
            first = list(islice(texts, 1))
            self.total = None if first else 0
            self._texts = lambda: chain(first, texts)
        return self.total == 0

    def read_all(self) -> None:
        """Read to the end of every pipe: from now on ``total`` is known."""
        if self.total is None:
            texts = list(self._texts())
            self._texts = lambda: iter(texts)
            self.total = len(texts)


class Prepared(Commands):
    """Commands that were made before.

    Args:
        skipped: how many there were besides, which completed before.
    """

    def __init__(self, commands: Sequence[Command], skipped: int = 0) -> None:
        self._lists = ()
        self._commands = commands
        self.total = len(commands)
        self.is_single = self.total == 1
        self.skipped = skipped

    def each(self, is_wanted: Callable[[], bool]) -> Iterator[Command]:
        return iter(self._commands)


def commands_of(options: Namespace) -> Commands:
    """Return the commands that the options name.

    Raises:
        ConfigurationError: there are none, or not all of them can be run.
    """
    words: list[str] = options.command
    if options.behind_dashes:
        words = [*words, "--", *options.behind_dashes] if words else options.behind_dashes
    given = words
    words, sources = _divided(given, options)
    lists = [source for source in sources if isinstance(source, Lines)]
    if options.file is not None:
        if words or sources:
            raise ConfigurationError(
                f"expected either a command or -f FILE, got both -f {options.file} and "
                f"{shlex.join(given or ['-a', *options.arguments])}; leave one out, or use -a FILE "
                "to give each of its lines to the command as an argument"
            )
        lists = [_lines(options, "-f", options.file, "command")]
        commands = Commands(lambda: _lines_of_shell(lists[0]), lists, options.name)
        if commands.is_empty():
            raise ConfigurationError(f"argument -f: there is no command in {lists[0].name!r}; "
                                     f"expected one a line")
        return commands
    if options.replace is not None and not (words and sources):
        raise ConfigurationError(
            f"argument -I: expected a command and arguments to put in the place of "
            f"{options.replace!r}; write them behind {options.arg_sep}, or name a file with -a"
        )
    if words and sources:
        template = Template(words, len(sources), options.replace)
        return Commands(lambda: _filled(template, sources), lists, options.name)
    if lists:
        raise ConfigurationError(
            f"argument -a: expected a command to give each line of {lists[0].name!r} to; write it "
            "behind --, or use -f if each line is a command"
        )
    if sources:
        return Commands(lambda: _words_of_shell(sources), (), options.name)
    if words:
        return Commands(lambda: iter([(words, "COMMAND", "")]), (), options.name)
    raise ConfigurationError("expected a command behind --, or -f FILE; see bgworker run --help")


def _divided(words: list[str], options: Namespace) -> tuple[list[str], list[Source]]:
    """Return the words of the command, and where its arguments come from."""
    command: list[str] = []
    sources: list[Source] = [_lines(options, "-a", path, "argument") for path in options.arguments]
    separator = options.arg_sep
    group, is_files = command, False
    for word in words:
        if word == separator:
            group, is_files = [], False
            sources.append(group)
        elif separator == SEPARATOR and word == "::::":
            is_files = True
        elif separator == SEPARATOR and word in (":::+", "::::+"):
            raise ConfigurationError(
                f"{word}: expected {SEPARATOR} or ::::, which combine all arguments with one "
                "another; to have it as a plain word, choose another separator with --arg-sep"
            )
        elif is_files:
            sources.append(_lines(options, "::::", word, "argument"))
        else:
            group.append(word)
    if sum(isinstance(source, Lines) and source.is_stdin for source in sources) > 1:
        raise ConfigurationError("expected to read stdin once, got - twice; name a file")
    return command, sources


def _lines(options: Namespace, option: str, path: str, what: str) -> Lines:
    return Lines(option, path, b"\0" if options.null else b"\n", what)


# ---------------------------------------------------------------- what each command is made of

def _lines_of_shell(lines: Lines) -> Iterator[Text]:
    """Yield the lines of a file of commands, but for blank ones and comments."""
    for number, line in enumerate(lines.each(), 1):
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]  # a mark of UTF-8, which editors on Windows write
        line = line.strip(b" \t\r")
        if line and not line.startswith(b"#"):
            # whose bytes come out as they went in
            yield os.fsdecode(line), f"line {number} of {lines.name!r}", ""


def _words_of_shell(sources: Sequence[Source]) -> Iterator[Text]:
    """Yield the arguments themselves as lines for the shell: there is no command to give them
    to."""
    for number, arguments in enumerate(combinations(sources), 1):
        yield " ".join(arguments), f"command {number}", ""


def _filled(template: Template, sources: Sequence[Source]) -> Iterator[Text]:
    for number, arguments in enumerate(combinations(sources), 1):
        yield template.filled(arguments, number), f"argument {number}", " ".join(arguments)


def _is_odd(command: str | list[str]) -> bool:
    """Tell whether it may be no command. To make each of a million takes half a minute."""
    words = [command] if isinstance(command, str) else command
    return not words[0].strip() or any("\0" in word for word in words)


def _checked(command: str | list[str], where: str) -> ShellCommand:
    from ..shell.command import shell  # a vendored copy may lack it
    try:
        return shell(command)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from error


# ---------------------------------------------------------------- what is recorded of a command

def _recorded(call: ShellCommand | Unusable) -> dict[str, Any]:
    if isinstance(call, Unusable):
        return {}
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


def original(recorded: object) -> str | None:
    """Return the text of which `exactly` made this; None if it did not."""
    coding = "utf-8"
    if isinstance(recorded, dict):
        recorded, coding = recorded.get("latin-1"), "latin-1"
    try:
        return os.fsdecode(recorded.encode(coding)) if isinstance(recorded, str) else None
    except UnicodeEncodeError:
        return None


def place() -> dict[str, Any]:
    """Return the part of the metadata that all commands share: the directory."""
    try:
        return {"cwd": exactly(os.getcwd())}
    except OSError:  # it was removed
        return {}


def has_records(db: str | None) -> bool:
    """Tell whether there is a history; an empty file is filled as a missing one is made."""
    return db is not None and os.path.exists(db) and os.path.getsize(db) > 0


def left_of(commands: Commands, options: Namespace) -> Commands:
    """Return the commands that have not completed before, according to the history that the options
    name.

    A command is known by its text and the directory that it is run in. It has completed as often as
    it was recorded to: of two equal lines, of which one failed, one is left. What is left names the
    task that it runs again, if there is one.

    Raises:
        BgworkerError: the history cannot be read.
    """
    if options.db is None:
        raise ConfigurationError(
            "argument --resume: expected a history to look into; leave out --no-db"
        )
    if not has_records(options.db):
        return commands
    from ..history.reader import History
    everything = list(commands.each(lambda: True))
    hashes = [command.call.source.script_hash for command in everything]
    with History(options.db) as history:
        attempts = history.attempts(set(hashes), place())
    completed = {each: found.completed for each, found in attempts.items()}
    again = {each: iter(found.left) for each, found in attempts.items()}
    left = []
    for command, script_hash in zip(everything, hashes):
        completed[script_hash] -= 1
        if completed[script_hash] < 0:
            rerun_of = next(again[script_hash], None)
            if rerun_of is not None:
                command = replace(command, metadata={**command.metadata, "rerun_of": rerun_of})
            left.append(command)
    return Prepared(left, len(everything) - len(left))

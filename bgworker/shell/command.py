"""A callable that runs a child process as a task: its lines become the task's streams, and nothing
of it stays behind.

`shell` checks a command on the caller's thread, so that one that cannot run is refused where it was
written.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from ..model.errors import ConfigurationError
from ..model.records import Source
from ..model.text import sanitise
from ..running.task import current_task
from ..sinks.specs import SECRET_VARIABLE
from .child import Child


def shell(
    argv_or_command: str | Sequence[str | os.PathLike[str]],
    *,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
) -> ShellCommand:
    """Make a callable that runs a command as a task: ``scheduler.submit(shell("make -j4"))``.

    Args:
        argv_or_command: a string is run by the shell (``/bin/sh -c``, ``ComSpec`` on Windows); a
            sequence, program first, is run directly and needs no quoting.
        cwd: an existing directory to run in; None is the process's own when the task runs.
        env: replaces the environment, as in `subprocess`; None inherits that of the moment when the
            task runs, without ``BGWORKER_WEBHOOK_SECRET``: what a command prints is recorded. Name
            it here for a command that needs it.
    Raises:
        ConfigurationError: for a command, directory or environment that cannot be run.
    """
    return ShellCommand(_checked_argv(argv_or_command), _checked_cwd(cwd), _checked_env(env))


class ShellCommand:
    """A command, ready to run any number of times, on any thread. Made by `shell`."""

    __slots__ = ("__name__", "__qualname__", "argv", "cwd", "env", "on_start", "limit")

    def __init__(self, argv: str | list[str], cwd: str | None, env: dict[str, str] | None) -> None:
        self.argv = argv
        """A string for the shell, or the program and its arguments."""
        self.cwd = cwd
        self.env = env
        self.on_start: Callable[[], object] | None = None
        """Called, on the task's thread, when its process was started."""
        self.limit: Callable[[], float | None] | None = None
        """Tells for how many seconds its process may run, for a task that `keeps_time`. Asked, on
        the task's thread, when the process was started, and every second until it is known."""
        self.__name__ = self.__qualname__ = _readable(_program_name(argv))

    def __call__(self) -> int:
        """Run the command to its end; each line of it goes to the current task's output or error
        stream at once.

        Lines end at a newline, and of a line that was overwritten by carriage returns the last
        state counts. A record holds text, so binary output is not kept byte for byte: NULs and
        bytes that are not UTF-8 become U+FFFD. Lines over 64 KiB (or ``max_payload``) come in
        pieces. The command is read no faster than the healthy sinks keep up: it waits in its
        writes, and none of its lines is lost. Where the system has no room for one more process, it
        waits until another command ends; the task's timeout does not wait with it.

        Returns: 0.
        Raises:
            subprocess.CalledProcessError: it exited with another code, or by a signal (a negative
            code).
            ChildProcessError: how it ended is not known, because something else in this process
                took its exit status.
            FileNotFoundError, PermissionError: the program or the directory is missing, or may not
                be used.
            OSError: it cannot be started for another reason.
            TaskTimedOut: it ran longer than its ``limit``, and was ended as on a cancel.
            TaskCancelled: the task was asked to stop. Its session, and what it started in others,
                got SIGTERM, and after `child.KILL_AFTER` seconds SIGKILL; a daemon, which has left
                both, lives on.
        """
        env = _inherited() if self.env is None else self.env
        return Child(self.argv, self.cwd, env, current_task(), self.on_start, self.limit).run()

    @property
    def source(self) -> _CommandSource:
        """The command's text, as the task's source."""
        return _CommandSource(self.__name__, self.argv)

    def __repr__(self) -> str:
        # env may hold secrets
        return f"shell({self.argv!r}{'' if self.cwd is None else f', cwd={self.cwd!r}'})"


class _CommandSource(Source):
    """Outlives the command in the records of its tasks, hence without the environment."""

    __slots__ = ("_name", "_argv")

    def __init__(self, name: str, argv: str | list[str]) -> None:
        super().__init__()
        self._name = sanitise(name)
        self._argv = argv

    @property
    def script_id(self) -> str:
        return self._name

    @property
    def script_hash(self) -> str:
        import hashlib
        return hashlib.sha256(os.fsencode(self._line)).hexdigest()

    @property
    def script_text(self) -> str:
        return _readable(self._line)

    @property
    def _line(self) -> str:
        import shlex
        return self._argv if isinstance(self._argv, str) else shlex.join(self._argv)


_PROGRAM = re.compile(
    r"""\s*(?:\w+=\S*\s+)*  # VAR=value in front of it
        (?:"(?P<double>[^"]+)" | '(?P<single>[^']+)' | (?P<bare>[^\s;&|<>(){}"'`$#]+))""",
    re.VERBOSE,
)


def _program_name(argv: str | list[str]) -> str:
    """Return what a person would call the command; "sh" where that is a matter of the shell's."""
    if isinstance(argv, list):
        return os.path.basename(argv[0].rstrip("/")) or argv[0]
    found = _PROGRAM.match(argv)
    program = found["double"] or found["single"] or found["bare"] if found else ""
    return os.path.basename(program) or "sh"


def _checked_argv(given: object) -> str | list[str]:
    if not isinstance(given, (str, Sequence)) or isinstance(given, (bytes, bytearray, memoryview)):
        raise ConfigurationError(
            f"expected a command line (str) or a sequence of arguments, got {given!r}; "
            "write shell('make test') or shell(['make', 'test'])"
        )
    words = [given] if isinstance(given, str) else list(given)
    words = [os.fspath(word) if isinstance(word, os.PathLike) else word for word in words]
    for word in words:
        if not isinstance(word, str):
            raise ConfigurationError(
                f"expected arguments of type str or os.PathLike, got {word!r}; use str() on it"
            )
        if "\0" in word:
            raise ConfigurationError(
                f"expected no NUL character in a command, got {word!r}; write such data to a file"
            )
        if not _is_encodable(word):
            raise ConfigurationError(
                f"expected characters that the system's encoding, {sys.getfilesystemencoding()}, "
                f"has, got {word!r}; run Python in its UTF-8 mode (PYTHONUTF8=1)"
            )
    if not words or not words[0].strip():
        raise ConfigurationError(
            f"expected a command, got {given!r}; name the program to run first"
        )
    return words[0] if isinstance(given, str) else words


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _readable(text: str) -> str:
    """Return text for people of the bytes that the system knows; they write UTF-8 whatever the
    locale."""
    return os.fsencode(text).decode("utf-8", "replace")


def _checked_cwd(cwd: object) -> str | None:
    if cwd is None:
        return None
    if not isinstance(cwd, (str, os.PathLike)) or not os.path.isdir(cwd):
        # False for a path with NUL, too
        raise ConfigurationError(
            f"expected cwd to be an existing directory, got {cwd!r}; create it, or pass None"
        )
    return os.path.abspath(os.fsdecode(cwd))


def _inherited() -> dict[str, str] | None:
    """Return the environment for a command that was given none; None is this process's own, with no
    secret in it."""
    if SECRET_VARIABLE not in os.environ:
        return None
    return {name: value for name, value in os.environ.items() if name != SECRET_VARIABLE}


def _checked_env(env: object) -> dict[str, str] | None:
    if env is None:
        return None
    if not isinstance(env, Mapping) or not all(
        isinstance(text, str) for pair in env.items() for text in pair
    ):
        # values may be secret
        raise ConfigurationError(f"expected env to map str to str, got a {type(env).__name__}; "
                                 "pass a dict such as {**os.environ, 'LANG': 'C'}")
    for name in env:
        if (
            not name
            or "=" in name
            or "\0" in name + env[name]
            or not _is_encodable(name + env[name])
        ):
            raise ConfigurationError(
                f"expected env[{name!r}] to have a name without '=', no NUL, and only characters "
                f"of the system's encoding, {sys.getfilesystemencoding()}; correct it"
            )
    return dict(env)

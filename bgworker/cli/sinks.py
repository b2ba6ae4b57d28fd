"""The sinks that the options of ``bgworker run`` name, checked before anything is started."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from ..model.errors import BgworkerError, ConfigurationError
from ..sinks import open_sink, sinks_from_environ
from ..sinks.opening import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    from ..sinks.base import Sink


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

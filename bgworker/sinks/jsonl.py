"""Events as lines of JSON in a file, for debugging, ``tail -f`` and ``grep``. Runs on the sink's
thread.

The file always parses, however many sinks, threads and processes append to it: see `linefile`.
"""

from __future__ import annotations

import os

from ..model import checks
from ..model.errors import ConfigurationError, PermanentSinkError, TemporarySinkError, WireError
from ..model.wire import encode_lines
from .linefile import LineFile
from .opening import CURABLE, HOPELESS, checked_mode, shown, trouble

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from ..model.events import Event


class JsonlSink:
    """Appends events to a file, one line of JSON (wire format, version 1) per event, UTF-8.

    Delivery is at least once: a batch whose write failed comes again. What was written of it before
    is cut off first, so lines are doubled only if somebody who takes no lock has appended
    meanwhile.

    A file that is renamed or deleted meanwhile (logrotate) is noticed and created anew. A character
    device or a FIFO (``/dev/stderr``) is written to as well, without lock, repair and rotation.
    Beside the file appear ``PATH.lock``, which may be deleted at any time, and where need be
    ``PATH.torn`` and the rotated ``PATH.1`` and so on.

    Args:
        path: made absolute at once. Its directory must exist when the sink is opened. If it is a
            symbolic link, all happens where that leads.
        max_bytes: a file that would exceed this many bytes is rotated before the write; None never
            rotates. A batch is written whole, so one larger than this makes a file that is larger.
        backups: how many rotated files are kept; ``PATH.1`` is the newest. With 0 the full file is
            removed.
        compress: gzip the rotated files, to ``PATH.1.gz`` and so on. Others that write to the path
            wait meanwhile.
        durability: "process": what was written survives the death of the process. "power": it
            survives a power failure too, at the price of an fsync per batch.
        mode: permissions of a file that is created, such as ``0o600`` for what others may not read;
            None leaves them to the umask. Rotated and further files have the mode of the file, and
            as far as possible its owner.

    Raises:
        ConfigurationError: an argument cannot be used.
    """

    preferred_batch = 8192
    """What the dispatcher hands over at once: so many events of tasks without output are from half
    as many records."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        backups: int = 5,
        compress: bool = False,
        durability: Literal["process", "power"] = "process",
        mode: int | None = None,
    ) -> None:
        checks.number("max_bytes", max_bytes, least=1, whole=True, optional=True)
        checks.number("backups", backups, least=0, whole=True)
        checks.choice("durability", durability, ("process", "power"))
        if not isinstance(compress, bool):
            raise ConfigurationError(f"compress: expected True or False, got {compress!r}")
        self._file = LineFile(path, max_bytes=max_bytes, backups=backups, compress=compress,
                              is_power_safe=durability == "power", mode=checked_mode(mode))
        self.path = self._file.path

    def __repr__(self) -> str:
        return f"JsonlSink({self.path!r})"

    def open(self) -> None:
        """Open or create the file and move a torn last line to ``PATH.torn``; again after a fork.

        Raises:
            PermanentSinkError: the path cannot be used, or the file there does not hold lines of
                JSON objects; nothing was created or changed.
            TemporarySinkError: it may work later.
        """
        try:
            self._file.open()
        except OSError as error:
            if error.errno in HOPELESS:
                raise PermanentSinkError(trouble("open", self.path, error, HOPELESS)) from error
            raise TemporarySinkError(trouble("open", self.path, error, CURABLE)) from error

    def write(self, events: Sequence[Event]) -> None:
        """Append the events, as one write; open the file first if need be.

        Raises:
            TemporarySinkError: the system refused (disk full, directory gone); what was written is
                cut off again.
            PermanentSinkError: the path cannot be used, or an event has no wire form.
        """
        try:
            data = encode_lines(events)
        except WireError as error:
            raise PermanentSinkError(
                f"cannot encode an event for {shown(self.path)}: {error}"
            ) from error
        if not self._file.is_open:
            self.open()
        try:
            self._file.append(data)
        except OSError as error:
            raise TemporarySinkError(trouble("append to", self.path, error, CURABLE)) from error

    def flush(self) -> None:
        """Do nothing: after ``write`` the lines are with the kernel, or on the disk, as
        ``durability`` says."""

    def close(self) -> None:
        """Close the file; harmless if it is closed, and in a forked child. A later ``write`` opens
        it again."""
        self._file.close()

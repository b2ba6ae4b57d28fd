"""The park file: events that a sink did not take, kept on disk until somebody replays them.

Each line is a wire object wrapped as
``{"v":1,"sink":…,"error":…,"attempts":…,"parked_at":…,"event":{…}}``. Lines are on the disk (fsync)
before they count as parked. A courier of its own writes the file, so neither a task nor the
dispatcher nor a courier that hangs in its sink waits for the disk. `park.replay` delivers the
events later.
"""

from __future__ import annotations

import json
from time import time_ns

from ..model.errors import PermanentSinkError
from ..model.records import Batch, utc
from ..model.text import describe
from ..model.wire import VERSION, encode_lines
from ..sinks.linefile import LineFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from typing import Any


class ParkFile:
    """The sink that writes one sink's lines into a park file. What it does not take is lost: it
    asks for no retry.

    Args:
        path: of the file; several sinks and processes may share it.
        max_bytes: most bytes of the file.
        sink: name of the sink, for the record.
        mode: of the file, if it is created; None leaves it to the umask.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int, sink: str,
                 mode: int | None = None) -> None:
        self._file = LineFile(path, is_power_safe=True, mode=mode)
        self._max_bytes = max_bytes
        self._sink = sink

    def open(self) -> None:
        """Make sure that the file can be written to; raises `OSError`."""
        self._file.open()

    def write(self, events: Any) -> None:
        """Append the records of a `Batch`, which have a sixth field: what kept them from their
        sink, and after how many attempts.

        Raises:
            PermanentSinkError: the file does not take them, or one of them has no wire form.
        """
        try:
            lines = list(self._lines(events))
        except Exception as error:
            raise PermanentSinkError(f"it has no line of JSON: {describe(error)}") from error
        try:
            room = self._max_bytes - self._file.size()
            if sum(map(len, lines)) <= room:
                self._file.append(b"".join(lines))
                return
        except OSError as error:
            raise PermanentSinkError(f"the park file does not take them: {describe(error)}",
                                     concerns="batch") from error
        raise PermanentSinkError(
            f"the park file has reached its bound of {self._max_bytes} bytes (park_bytes); "
            f"replay {self._file.path}", concerns="event" if len(lines[0]) <= room else "batch")

    def _lines(self, events: Any) -> Iterator[bytes]:
        parked_at = utc(time_ns()).isoformat(timespec="microseconds").replace("+00:00", "Z")
        encoded = encode_lines(Batch([record[:5] for record in events.records])).splitlines()
        told: object = None
        head = b""
        for record, line in zip(events.records, encoded):
            why = record[5]
            if why is not told:
                told, (error, attempts) = why, why
                head = json.dumps({"v": VERSION, "sink": self._sink, "error": error,
                                   "attempts": attempts, "parked_at": parked_at},
                                  separators=(",", ":"))[:-1].encode()
            yield b'%b,"event":%b}\n' % (head, line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

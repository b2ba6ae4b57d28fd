"""The park file: events that a sink did not take, kept on disk until somebody replays them.

Each line is a wire object wrapped as
``{"v":1,"sink":…,"error":…,"attempts":…,"parked_at":…,"event":{…}}``. Lines are on the disk (fsync)
before they count as parked. A `Park` writes from a thread of its own, so neither a task nor the
dispatcher nor a courier that hangs in its sink waits for the disk. `park.replay` delivers them
later.
"""

from __future__ import annotations

import json
import os
import threading
from queue import SimpleQueue
from time import time_ns

from ..delivery.backlog import weight
from ..model.clock import monotonic
from ..model.errors import BgworkerError
from ..model.records import Batch, utc
from ..model.threads import own_thread
from ..model.wire import VERSION, encode_lines
from ..sinks.linefile import LineFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Tuple

    from ..model.records import Record

    Waiting = Tuple[Sequence[Record], str, int, int]


class ParkFull(BgworkerError):
    """The park file, or the queue before it, has reached its bound."""


class Park:
    """One sink's way into its park file.

    Args:
        path: of the file; several sinks and processes may share it.
        max_bytes: most bytes of the file.
        most_waiting: most records that wait for the disk ...
        most_waiting_bytes: ... and most bytes of memory that they take, as estimated.
        sink: name of the sink, for the record.
        done: called on the park's thread with the records and None, or with the error that kept
            them out.
        mode: of the file, if it is created; None leaves it to the umask.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int,
        most_waiting: int,
        most_waiting_bytes: int,
        sink: str,
        done: Callable[[Sequence[Record], BaseException | None], object],
        mode: int | None = None,
    ) -> None:
        self._file = LineFile(path, is_power_safe=True, mode=mode)
        self._max_bytes = max_bytes
        self._most_waiting = most_waiting
        self._most_waiting_bytes = most_waiting_bytes
        self._sink = sink
        self._done = done
        self._waiting: SimpleQueue[Waiting | None] = SimpleQueue()  # None: there is no more
        self._lock = threading.Lock()  # guards all below
        self._count = 0
        self._bytes = 0
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Make sure that the file can be written to; raises `OSError`."""
        self._file.open()

    def put(self, records: Sequence[Record], error: str, attempts: int) -> int:
        """Queue records for the file; return how many, from the first on, found room. Any thread;
        never waits for the disk."""
        with self._lock:
            fitting = bytes_ = 0
            for record in records[:max(0, self._most_waiting - self._count)]:
                bytes_ += (size := weight(record))
                if self._bytes + bytes_ > self._most_waiting_bytes and (self._count or fitting):
                    bytes_ -= size
                    break
                fitting += 1
            if not fitting or not self._has_thread():
                return 0
            self._count += fitting
            self._bytes += bytes_
        self._waiting.put((records[:fitting], error, attempts, bytes_))
        return fitting

    def _has_thread(self) -> bool:
        """Start the thread if need be, under the lock; False when the system gives none (3.12 at
        interpreter exit)."""
        if self._thread is None:
            thread = own_thread(f"{self._sink}-park", self._run)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        return True

    def close(self, deadline: float) -> bool:
        """Write what waits and close the file; False when that took longer than until ``deadline``
        (monotonic). The last call."""
        with self._lock:
            thread = self._thread
        if thread is None:
            self._file.close()
            return True
        self._waiting.put(None)
        thread.join(max(0.0, deadline - monotonic()))
        return not thread.is_alive()

    def _run(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            records, error, attempts, bytes_ = waiting
            try:
                self._write(records, error, attempts)
            except Exception as failure:  # the thread's boundary: reported to the account
                self._done(records, failure)
            with self._lock:
                self._count -= len(records)
                self._bytes -= bytes_
        self._file.close()

    def _write(self, records: Sequence[Record], error: str, attempts: int) -> None:
        head = (
            json.dumps(
                {
                    "v": VERSION,
                    "sink": self._sink,
                    "error": error,
                    "attempts": attempts,
                    "parked_at": utc(time_ns())
                    .isoformat(timespec="microseconds")
                    .replace("+00:00", "Z"),
                },
                separators=(",", ":"),
            )[:-1].encode()
            + b',"event":'
        )
        try:
            lines = [
                head + line + b"}\n" for line in encode_lines(Batch(tuple(records))).splitlines()
            ]
        except Exception as failure:  # one of them has no wire form: that costs no other its place
            middle = len(records) // 2
            if not middle:
                self._done(records, failure)
                return
            self._write(records[:middle], error, attempts)
            self._write(records[middle:], error, attempts)
            return
        room = self._max_bytes - self._file.size()
        fitting = 0
        for line in lines:
            room -= len(line)
            if room < 0:
                break
            fitting += 1
        if fitting:
            self._file.append(b"".join(lines[:fitting]))
            self._done(records[:fitting], None)
        if fitting < len(lines):
            self._done(
                records[fitting:],
                ParkFull(
                    f"{os.fspath(self._file.path)} has reached its bound of "
                    f"{self._max_bytes} bytes (park_bytes); replay it"
                ),
            )

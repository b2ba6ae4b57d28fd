"""From bytes to lines to streams: where lines are cut, and when they are let through."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from bgworker.shell.pipes import Gate, Lines, PolledPump

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes that can be waited for")


def test_a_line_without_end_keeps_memory_flat() -> None:
    lines = Lines(lambda lines: None)
    for _ in range(100):
        lines.feed(b"x" * 65536)
        assert len(lines._rest) <= 65536


def test_however_the_bytes_are_cut_the_lines_are_the_same() -> None:
    data = "one\r\n\n10%\r20%\rd\xe9j\xe0 vu \U0001f600\r\nlast\r".encode() + b"\xe2\x82\n\xff"
    for size in range(1, len(data) + 1):
        seen: list[str] = []
        lines = Lines(seen.extend)
        for start in range(0, len(data), size):
            lines.feed(data[start:start + size])
        lines.finish()
        assert seen == ["one", "", "d\xe9j\xe0 vu \U0001f600", "\ufffd", "\ufffd"], size


@pytest.mark.parametrize("most", [1, 10, 1000, 65536])
@pytest.mark.parametrize(
    "data", [b"\0" * 70_000, b"\x80\0" * 40_000, b"ab\0\xc3\xa9" * 30_000 + b"\n" + b"\0" * 5]
)
def test_pieces_are_measured_as_they_will_be_recorded(data: bytes, most: int) -> None:
    """What is read grows: a NUL and a byte that is not UTF-8 become three bytes each."""
    seen: list[str] = []
    lines = Lines(seen.extend, most)
    for start in range(0, len(data), 65536):
        lines.feed(data[start:start + 65536])
    lines.finish()
    assert "".join(seen) == data.decode(errors="replace").replace("\0", "\ufffd").replace("\n", "")
    assert max(len(piece.encode()) for piece in seen) <= max(4, most)


@posix
def test_a_late_ring_writes_to_no_descriptor() -> None:
    pump = PolledPump()
    pump.close()
    read_end, write_end = os.pipe()  # gets the numbers that the pump had
    try:
        pump.ring()
        os.set_blocking(read_end, False)
        with pytest.raises(BlockingIOError):
            os.read(read_end, 1)
    finally:
        os.close(read_end)
        os.close(write_end)


@posix
def test_a_drain_takes_what_is_in_the_pipe_and_does_not_wait_for_more() -> None:
    seen: list[str] = []
    lines = Lines(seen.extend)
    with subprocess.Popen(
        ["sh", "-c", "echo one; echo two; echo ready >&2; exec sleep 1000"],
        bufsize=0,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as proc:
        try:
            assert proc.stderr is not None and proc.stderr.read(6) == b"ready\n"
            pump = PolledPump()
            pump.attach(proc, lines, lines)
            pump.drain()
            pump.close()
        finally:
            proc.kill()
    assert seen == ["one", "two"]


class Waiting:
    """A context with room for three lines at a time, and after each three a wait."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.said: list[str] = []

    def _wait_for_room(self, size: int) -> int:
        self.said.append("wait")
        time.sleep(self.seconds)
        return 3


def test_the_gate_waits_before_each_few_lines() -> None:
    context = Waiting()
    gate = Gate(context)  # type: ignore[arg-type]
    gate.emit(context.said.extend, list("abcdefg"))
    gate.emit(context.said.extend, ["h"])
    assert "".join(context.said) == "waitabcwaitdefwaitgwaith"


def test_the_clock_of_the_gate_stops_while_it_waits() -> None:
    context = Waiting(seconds=0.1)
    gate = Gate(context)  # type: ignore[arg-type]
    begun, begun_there = time.monotonic(), gate.now()
    gate.emit(context.said.extend, list("abcdef"))
    waited = time.monotonic() - begun - (gate.now() - begun_there)
    assert 0.2 <= waited


def test_a_gate_that_discards_neither_waits_nor_emits() -> None:
    context = Waiting()
    gate = Gate(context)  # type: ignore[arg-type]
    gate.discards = True
    gate.emit(context.said.extend, list("abc"))
    assert context.said == []

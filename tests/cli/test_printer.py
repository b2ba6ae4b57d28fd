"""What ``bgworker run`` makes of records: the lines that it shows, and how little it does for
each."""

from __future__ import annotations

import os
from typing import Any

import pytest

from bgworker.cli import main, printer


@pytest.mark.skipif(os.name == "nt", reason="seq is a POSIX command")
def test_a_chatty_command_costs_no_event_for_each_line(monkeypatch: pytest.MonkeyPatch,
                                                       capfd: pytest.CaptureFixture[str]) -> None:
    built: list[Any] = []

    def counting(record: Any) -> Any:
        built.append(event(record))
        return built[-1]

    event = printer.event
    monkeypatch.setattr(printer, "event", counting)
    assert main(["run", "--no-db", "--", "seq", "200000"]) == 0
    assert capfd.readouterr().out == "".join(f"{n}\n" for n in range(1, 200_001))
    assert 4 < len(built) < 4000

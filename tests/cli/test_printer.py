"""What ``bgworker run`` makes of records: the lines that it shows, and how little it does for
each."""

from __future__ import annotations

import os
from typing import Any

import pytest

from bgworker.cli import main
from bgworker.cli.screen import Screen


@pytest.mark.skipif(os.name == "nt", reason="seq is a POSIX command")
def test_a_chatty_command_is_shown_many_lines_at_a_time(monkeypatch: pytest.MonkeyPatch,
                                                       capfd: pytest.CaptureFixture[str]) -> None:
    shown: list[Any] = []

    def counting(self: Screen, lines: Any) -> None:
        shown.extend(lines)
        show(self, lines)

    show = Screen.show
    monkeypatch.setattr(Screen, "show", counting)
    assert main(["run", "--no-db", "--", "seq", "200000"]) == 0
    assert capfd.readouterr().out == "".join(f"{n}\n" for n in range(1, 200_001))
    assert 4 < len(shown) < 4000

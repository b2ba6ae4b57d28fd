"""What `shell` makes of a command: what it refuses, and what the command is called. Runs
nothing."""

from __future__ import annotations

import hashlib
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from bgworker import Scheduler, shell
from bgworker.model.errors import ConfigurationError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the commands are POSIX commands")

# What is refused


@pytest.mark.parametrize(
    "command",
    [
        "",
        "  \n",
        [],
        [""],
        ["echo", 1],
        ["echo", b"x"],
        b"echo",
        None,
        7,
        Path("x"),
        "a\0b",
        ["a", "b\0"],
        (word for word in ["echo"]),
    ],
)
def test_what_is_no_command_is_refused(command: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected .*; "):
        shell(command)


@pytest.mark.parametrize("command", ["echo \ud800", ["echo", "\udbff"]])
def test_what_no_encoding_has_is_refused(command: Any) -> None:
    with pytest.raises(
        ConfigurationError,
        match="expected characters that the system's encoding.* has, got .*PYTHONUTF8",
    ):
        shell(command)


@pytest.mark.parametrize("cwd", ["/no/such/place", "", "a\0b", __file__, 3, b"/"])
def test_what_is_no_directory_is_refused(cwd: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected cwd .*; "):
        shell("true", cwd=cwd)


@pytest.mark.parametrize(
    "env",
    [
        ["A=secret"],
        {"A": 1, "B": "secret"},
        {1: "secret"},
        {"A=B": "secret"},
        {"": "secret"},
        {"A": "secret\0"},
        "A=secret",
    ],
)
def test_what_is_no_environment_is_refused_and_its_values_are_not_told(env: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected env.*; ") as caught:
        shell("true", env=env)
    assert "secret" not in str(caught.value)


# What it is called


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["/usr/bin/rsync", "-a"], "rsync"),
        ("/usr/bin/rsync -a", "rsync"),
        ("CC=gcc  X= ./configure --now", "configure"),
        ("'/opt/my tools/run' x", "run"),
        ('"/opt/my tools/run" x', "run"),
        ("make;ls", "make"),
        ("(cd x; ls)", "sh"),
        ("$EDITOR x", "sh"),
        ("ls/", "sh"),
        (["dir/"], "dir"),
    ],
)
def test_a_command_is_called_by_its_program(command: str | list[str], name: str) -> None:
    made = shell(command)
    assert (made.__name__, made.__qualname__, made.source.script_id) == (name, name, name)


def test_the_source_of_a_command_is_its_text() -> None:
    texts = (
        ("echo 'a b' | wc", "echo 'a b' | wc"),
        (["echo", "a b"], "echo 'a b'"),
        (["x\udc80"], "'x\ufffd'"),
        (["\xe9"], "'\xe9'"),
    )
    for command, text in texts:
        source = shell(command).source
        assert source.script_text == text
        bytes_ = (command if isinstance(command, str) else shlex.join(command)).encode(
            errors="surrogateescape"
        )
        assert source.script_hash == hashlib.sha256(bytes_).hexdigest()


def test_repr_shows_the_command_but_not_the_environment() -> None:
    assert repr(shell("make test", env={"TOKEN": "secret"})) == "shell('make test')"
    assert repr(shell(["make", Path("x")], cwd="/")) == "shell(['make', 'x'], cwd='/')"


def test_odd_bytes_in_a_command_reach_the_record_as_clean_text(tmp_path: Path) -> None:
    with Scheduler(
        1,
        record_source=True,
        sinks=[f"jsonl:{tmp_path}/events.jsonl", f"sqlite:{tmp_path}/history.db"],
    ) as pool:
        task = pool.submit(shell(["true", "\udc80"]))
        task.result(30)
    assert task.snapshot().script_text == "true '\ufffd'"
    assert [pool.sinks[name].dropped for name in ("jsonl", "sqlite")] == [0, 0]

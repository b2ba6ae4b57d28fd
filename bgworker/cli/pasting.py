"""Recorded commands as text that can be pasted into a shell, and runs there what ran. Pure
functions.
"""

from __future__ import annotations

import re
import shlex

from ..words import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

KEYS = ("cwd", "command", "argv")
"""What the metadata of a command has of it."""


def pasteable(metadata: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the command and its directory, as text for bash, ksh or zsh; None for what is not
    recorded.

    Only what a terminal would not show as it is, or would obey, is spelled in another way than it
    was typed.
    """
    command, argv = _bytes_of(metadata.get("command")), metadata.get("argv")
    text = None
    if isinstance(argv, list) and argv and None not in (words := [*map(_bytes_of, argv)]):
        text = " ".join([_quoted(word) for word in words if word is not None])
    elif argv is None and command is not None:
        line = command.decode("utf-8", "surrogateescape")
        text = line if _is_showable(line) else f"sh -c {_quoted(command)}"
    folder = _bytes_of(metadata.get("cwd"))
    return text, None if folder is None else _quoted(folder)


def _bytes_of(recorded: object) -> bytes | None:
    """Return the bytes of a recorded word; None for anything else."""
    if isinstance(recorded, dict):
        recorded, code = recorded.get("latin-1"), "latin-1"
    else:
        code = "utf-8"
    return recorded.encode(code, "replace") if isinstance(recorded, str) else None


def _quoted(word: bytes) -> str:
    text = word.decode("utf-8", "surrogateescape")
    if _is_showable(text):
        return shlex.quote(text)
    return f"$'{re.sub('.', _spelled, text, flags=re.DOTALL)}'"


def _spelled(found: re.Match[str]) -> str:
    character = found[0]
    if character in "\\'":
        return f"\\{character}"
    if _is_showable(character):
        return character
    # Source: POSIX.1-2024, XCU 2.2.4, Dollar-Single-Quotes
    return "".join([f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape")])


def _is_showable(text: str) -> bool:
    return escaped(text) == text

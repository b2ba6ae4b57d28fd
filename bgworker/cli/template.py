"""The words of a command in which arguments take the place of replacement strings, as in GNU
parallel, but without a shell: what one word becomes stays one word. Pure functions.
"""

from __future__ import annotations

import re

from ..model.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_REPLACED = re.compile(r"\{(?:#|(-?[0-9]{1,9})?(//|/\.|/|\.)?)\}")
_EXTENSION = re.compile(r"\.[^/.]*\Z")

_NUMBER = "#"


def _folder(path: str) -> str:
    """Return the directory of a path, as dirname(1) does."""
    parts = path.rstrip("/").rpartition("/")
    return parts[0].rstrip("/") or ("/" if path.startswith("/") else ".")


def _file(path: str) -> str:
    return path.rpartition("/")[2]


_FORMS: dict[str, Callable[[str], str]] = {
    "": lambda argument: argument,
    ".": lambda path: _EXTENSION.sub("", path),
    "/": _file,
    "//": _folder,
    "/.": lambda path: _EXTENSION.sub("", _file(path)),
}
"""What is left of an argument, by what stands in the braces."""


class _Place:
    """A replacement string in a word.

    Args:
        which: the source whose argument goes here, from 0; None for those of all sources.
        form: a key of `_FORMS`, or `_NUMBER` for the number of the command.
    """

    def __init__(self, which: int | None, form: str) -> None:
        self._which = which
        self._form = form

    def texts(self, arguments: Sequence[str], number: int) -> list[str]:
        """Return what goes here."""
        if self._form == _NUMBER:
            return [str(number)]
        chosen = arguments if self._which is None else [arguments[self._which]]
        return [_FORMS[self._form](argument) for argument in chosen]


class Template:
    """A command whose replacement strings are filled in.

    Args:
        words: the program and its arguments. Without any replacement string in them the arguments
            are appended.
        sources: how many arguments each command gets, one of each source.
        own: the only replacement string there is, instead of ``{}`` and its like.

    Raises:
        ConfigurationError: a replacement string asks for an argument that there is not.
    """

    def __init__(self, words: Sequence[str], sources: int, own: str | None = None) -> None:
        self._words = [
            _parts(word, sources) if own is None else _parts_by(word, own) for word in words
        ]
        if not any(isinstance(part, _Place) for parts in self._words for part in parts):
            self._words.append([_Place(None, "")])

    def filled(self, arguments: Sequence[str], number: int) -> list[str]:
        """Return the words of one command.

        A replacement string that is a whole word, and stands for the arguments of several sources,
        becomes as many words; inside a word they are joined by blanks.

        Args:
            arguments: one of each source.
            number: of the command among all, from 1.
        """
        filled: list[str] = []
        for parts in self._words:
            if len(parts) == 1 and isinstance(parts[0], _Place):
                filled += parts[0].texts(arguments, number)
            else:
                filled.append("".join([
                    part if isinstance(part, str) else " ".join(part.texts(arguments, number))
                    for part in parts
                ]))
        return filled


def _parts(word: str, sources: int) -> list[str | _Place]:
    """Return the texts and the replacement strings of which a word is made."""
    parts: list[str | _Place] = []
    end = 0
    for found in _REPLACED.finditer(word):
        parts += [word[end:found.start()], _place(found, sources)]
        end = found.end()
    parts.append(word[end:])
    return [part for part in parts if part != ""] or [""]


def _place(found: re.Match[str], sources: int) -> _Place:
    if found[0] == "{#}":
        return _Place(None, _NUMBER)
    which = None
    if found[1] is not None:
        number = int(found[1])
        if not 1 <= abs(number) <= sources:
            there = "there is one source" if sources == 1 else f"there are {sources} sources"
            raise ConfigurationError(
                f"COMMAND: expected {{1}} to {{{sources}}}, for {there} of arguments, got "
                f"{found[0][:80]}; to use it as a plain text, choose a replacement string of your "
                "own with -I"
            )
        which = number - 1 if number > 0 else number
    return _Place(which, found[2] or "")


def _parts_by(word: str, own: str) -> list[str | _Place]:
    texts = word.split(own)
    parts: list[str | _Place] = [texts[0]]
    for text in texts[1:]:
        parts += [_Place(None, ""), text]
    return [part for part in parts if part != ""] or [""]

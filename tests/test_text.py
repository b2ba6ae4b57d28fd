"""Untrusted values made fit for every sink. More of it, with random values, is in the tests of the wire format."""

from __future__ import annotations

import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, strategies as st

from bgworker.model.text import describe, fit, json_text, sanitise, text_of


class Explosive:
    def __str__(self) -> str:
        raise ValueError("boom")


class NamelessMeta(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise ValueError("nameless")


class Nameless(metaclass=NamelessMeta):
    def __str__(self) -> str:
        raise ValueError("boom")


class Hostile(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise RuntimeError("no")

    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(("text", "clean"), [
    ("", ""), ("plain", "plain"), ("é€😀", "é€😀"), ("\0", "�"), ("a\0\0b", "a��b"), ("\ud83d", "�"), ("\udc00\ud800", "��"),
    ("\x1b[31m\r\n\t\x7f", "\x1b[31m\r\n\t\x7f")])
def test_nul_and_surrogates_are_replaced_and_all_else_is_kept(text: str, clean: str) -> None:
    assert sanitise(text) == clean


@given(st.text(st.characters()), st.integers(0, 40))
def test_what_fits_is_kept_and_what_does_not_is_cut_to_the_longest_whole_characters(text: str, most: int) -> None:
    clean = sanitise(text)
    left, original = fit(text, most)
    assert clean.startswith(left) and len(left.encode()) <= most
    if original:
        assert original == len(clean.encode()) > most
        assert len(clean[:len(left) + 1].encode()) > most, "one more character would have fitted"
    else:
        assert left == clean


def test_nothing_fits_into_less_than_nothing() -> None:
    assert fit("abc", -5) == ("", 3) and fit("", -5) == ("", 0)


@pytest.mark.parametrize(("value", "text"), [
    (b"caf\xc3\xa9 \xff", "café �"), (bytearray(b"x"), "x"), (12, "12"), (Explosive(), "<unprintable Explosive object>"),
    (Nameless(), "<unprintable object>")])
def test_there_is_a_text_of_everything(value: object, text: str) -> None:
    assert text_of(value) == text and type(text_of(value)) is str


@pytest.mark.parametrize(("value", "meaning"), [
    ({"a": (1, 2.5, None, True)}, {"a": [1, 2.5, None, True]}), (math.nan, None), ([math.inf, -math.inf], [None, None]),
    ({math.nan: 1}, {"null": 1}), ({True: 1, 2: 3, None: 4}, {"true": 1, "2": 3, "null": 4}), ({1: "x", "1": "y"}, {"1": "y"}),
    ({b"k": b"v"}, {"k": "v"}), (OrderedDict(a=1), {"a": 1}), (MappingProxyType({"a": 1}), {"a": 1}), ({1}, [1]),
    ([frozenset()], [[]]), ("a\0\ud800", "a��"), ("😀", "😀"), (["\\u0000"], ["\\u0000"]),
    (Explosive(), "<unprintable Explosive object>"), ([Nameless()], ["<unprintable object>"])])
def test_json_text_tells_what_json_can_tell(value: object, meaning: object) -> None:
    text = json_text(value)
    assert json.loads(text) == meaning and text.isascii() and "\n" not in text and json_text(json.loads(text)) == text


def test_a_mapping_whose_own_code_raises_becomes_some_json() -> None:
    json.loads(json_text([Hostile(a=1), math.nan]))


def test_integers_that_cannot_be_read_back_are_hexadecimal_strings() -> None:
    digits = getattr(sys, "get_int_max_str_digits", lambda: 0)()
    number = 10 ** 5000
    meaning = json.loads(json_text([number]))
    assert meaning == ([hex(number)] if digits else [number])


def test_depth_and_cycles_end() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "unprintable" in json_text(deep)
    ring: dict[str, Any] = {}
    ring["self"] = [ring]
    assert json.loads(json_text(ring)) == {"self": ["<unprintable dict object>"]}
    shared = [1]
    assert json.loads(json_text([shared, shared])) == [[1], [1]], "twice is no cycle"
    while deep:
        deep = deep[0]


def raising(error: BaseException) -> Callable[..., Any]:
    def method(*_: object) -> Any:
        raise error

    return method


class LyingText(str):
    def split(self, *_: object) -> Any:  # type: ignore[override]
        raise SystemExit

    __getitem__ = __len__ = __format__ = split  # type: ignore[assignment]


class LyingClass(type):
    __name__ = property(raising(SystemExit()))  # type: ignore[assignment]


@pytest.mark.parametrize(("text", "shown"), [
    ("a\n b\0", "Odd: a b\ufffd"), ("", "Odd"), ("\ud800", "Odd: \ufffd"), (LyingText("lies"), "Odd: lies"),
    ("x" * 10**6, f"Odd: {'x' * 994}\u2026"), (" " * 10**6 + "x", "Odd")],
    ids=["lines", "none", "surrogate", "lying", "long", "blank"])  # pytest would make some of the texts
def test_an_exception_is_described_in_one_line_of_clean_bounded_text(text: str, shown: str) -> None:
    odd = LyingClass("Odd", (Exception,), {"__str__": lambda self: text})
    assert describe(odd()) == shown


@pytest.mark.parametrize("error", [ValueError(), SystemExit(), KeyboardInterrupt(), GeneratorExit()])
def test_an_exception_that_cannot_say_what_it_is_is_described_all_the_same(error: BaseException) -> None:
    odd = type("Odd", (Exception,), {"__str__": raising(error), "__class__": property(raising(error)),
                                     "__repr__": raising(error)})
    assert describe(odd()) == "Odd: (its text cannot be had)"

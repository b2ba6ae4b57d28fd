"""Untrusted values made fit for every sink. More of it, with random values, is in the tests of the
wire format."""

from __future__ import annotations

import json
import math
import signal
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from itertools import repeat
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, strategies as st

from bgworker import ConfigurationError, EventType, Scheduler, TaskCancelled
from bgworker.model import text as texts
from bgworker.model.checks import members
from bgworker.model.text import (
    ask,
    clean,
    describe,
    fit,
    fit_json,
    json_text,
    number_of,
    sanitise,
    show,
    text_of,
)

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


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("", ""),
        ("plain", "plain"),
        ("é€😀", "é€😀"),
        ("\0", "�"),
        ("a\0\0b", "a��b"),
        ("\ud83d", "�"),
        ("\udc00\ud800", "��"),
        ("\x1b[31m\r\n\t\x7f", "\x1b[31m\r\n\t\x7f"),
    ],
)
def test_nul_and_surrogates_are_replaced_and_all_else_is_kept(text: str, clean: str) -> None:
    assert sanitise(text) == clean


@given(st.text(st.characters()), st.integers(0, 40))
def test_what_fits_is_kept_and_what_does_not_is_cut_to_the_longest_whole_characters(
    text: str, most: int
) -> None:
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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"caf\xc3\xa9 \xff", "café �"),
        (bytearray(b"x"), "x"),
        (12, "12"),
        (Explosive(), "<unprintable Explosive object>"),
        (Nameless(), "<unprintable object>"),
    ],
)
def test_there_is_a_text_of_everything(value: object, text: str) -> None:
    assert text_of(value) == text and type(text_of(value)) is str


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ({"a": (1, 2.5, None, True)}, {"a": [1, 2.5, None, True]}),
        (math.nan, None),
        ([math.inf, -math.inf], [None, None]),
        ({math.nan: 1}, {"null": 1}),
        ({True: 1, 2: 3, None: 4}, {"true": 1, "2": 3, "null": 4}),
        ({1: "x", "1": "y"}, {"1": "y"}),
        ({b"k": b"v"}, {"k": "v"}),
        (OrderedDict(a=1), {"a": 1}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        ({1}, [1]),
        ([frozenset()], [[]]),
        ("a\0\ud800", "a��"),
        ("😀", "😀"),
        (["\\u0000"], ["\\u0000"]),
        (Explosive(), "<unprintable Explosive object>"),
        ([Nameless()], ["<unprintable object>"]),
    ],
)
def test_json_text_tells_what_json_can_tell(value: object, meaning: object) -> None:
    text = json_text(value)
    assert (
        json.loads(text) == meaning
        and text.isascii()
        and "\n" not in text
        and json_text(json.loads(text)) == text
    )


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n b\0", "Odd: a b\ufffd"),
        ("", "Odd"),
        ("\ud800", "Odd: \ufffd"),
        (LyingText("lies"), "Odd: lies"),
        ("x" * 10**6, f"Odd: {'x' * 994}\u2026"),
        (" " * 10**6 + "x", "Odd"),
    ],
    # pytest would make some of the texts
    ids=["lines", "none", "surrogate", "lying", "long", "blank"],
)
def test_an_exception_is_described_in_one_line_of_clean_bounded_text(text: str, shown: str) -> None:
    odd = LyingClass("Odd", (Exception,), {"__str__": lambda self: text})
    assert describe(odd()) == shown


def aside(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on a thread that no signal interrupts."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *args).result(30)


@pytest.mark.parametrize(
    "error",
    [ValueError(), SystemExit(), KeyboardInterrupt(), GeneratorExit(), TaskCancelled()],
    ids=repr,
)
def test_an_exception_that_cannot_say_what_it_is_is_described_all_the_same(
    error: BaseException,
) -> None:
    odd = type(
        "Odd",
        (Exception,),
        {
            "__str__": raising(error),
            "__class__": property(raising(error)),
            "__repr__": raising(error),
        },
    )
    assert aside(describe, odd()) == "Odd: (its text cannot be had)"


def test_ctrl_c_in_the_main_thread_is_not_taken_for_the_values_own_exception() -> None:
    class Slow:
        def __str__(self) -> str:
            signal.raise_signal(signal.SIGINT)
            return "slow"

        __repr__ = __str__

    for door in (text_of, json_text, show, lambda value: fit_json(json_text({1: value}), 64)):
        with pytest.raises(KeyboardInterrupt):
            door(Slow())
    assert aside(ask, raising(KeyboardInterrupt())) is None


# -- what lies --


def lying(kind: type, *names: str, value: Any = None) -> Any:
    """Return a subclass whose methods raise, or return ``value``."""
    method = raising(GeneratorExit()) if value is None else lambda *_: value
    return type(f"Lying{kind.__name__}", (kind,), dict.fromkeys(names, method))


LYING_STR = lying(str, "__str__", "__len__", "__contains__", "__getitem__", "__mul__", "encode",
                  "isascii", "replace", "__iter__", "__format__", "__repr__")
LYING_INT = lying(
    int, "__str__", "__repr__", "__int__", "__index__", "__float__", "__lt__", "__bool__"
)
LYING_FLOAT = lying(float, "__str__", "__repr__", "__float__", "__lt__", "__sub__", "is_integer")
LYING_BYTES = lying(bytes, "__str__", "decode", "__len__", "__iter__", "__getitem__", "__buffer__")


class Word(str, Enum):
    ODD = "o\0dd"


class Level(IntEnum):
    HIGH = 3


def test_text_of_a_subclass_that_lies_is_the_text_that_it_holds() -> None:
    for door in (
        sanitise,
        lambda text: fit(text, 100)[0],
        lambda text: fit(text, 3)[0] + "id \ufffd\ufffd",
    ):
        text = aside(door, LYING_STR("solid \0\ud800"))
        assert type(text) is str and text == "solid \ufffd\ufffd"
    assert clean(LYING_BYTES(b"caf\xc3\xa9\0"), 100) == "caf\u00e9\ufffd"


@pytest.mark.parametrize(
    ("kind", "held", "meaning"),
    [
        (LYING_STR, "\ud800", "\ufffd"),
        (LYING_INT, 7, 7),
        (LYING_FLOAT, 7.5, 7.5),
        (LYING_FLOAT, "nan", None),
        (Word, "o\0dd", "o\ufffddd"),
        (Level, 3, 3),
        (LYING_BYTES, b"x", "x"),
    ],
)
def test_json_text_of_a_subclass_tells_the_value_that_it_holds(
    kind: Any, held: object, meaning: object
) -> None:
    value = kind(held)
    for given_, expected in (
        (value, meaning),
        ([value, math.nan], [meaning, None]),
        ({"k": value}, {"k": meaning}),
    ):
        text = aside(json_text, given_)
        assert json.loads(text) == expected and type(json.loads(text)) is type(expected)
    if not isinstance(value, bytes):
        assert list(json.loads(aside(json_text, {value: 1, "nan": math.nan}))) == [
            meaning if isinstance(meaning, str) else json.dumps(meaning), "nan"]


class LiarsOfClass:
    __class__ = property(raising(GeneratorExit()))  # type: ignore[assignment]


class PretendedStr:
    __class__ = str  # type: ignore[assignment]


@pytest.mark.parametrize(
    "kind",
    [
        LiarsOfClass,
        PretendedStr,
        lying(dict, "items", "__iter__", "__str__"),
        lying(list, "__iter__", "__len__"),
        lying(object, "__str__", "__repr__"),
        lying(object, "__hash__", "__eq__", "__getattribute__"),
        lying(object, "__str__", value=7),
        lying(Exception, "__str__", "__repr__"),
    ],
)
def test_every_door_answers_whatever_a_value_does(kind: Any) -> None:
    value = kind()
    for door, kind in (
        (text_of, str),
        (json_text, str),
        (show, str),
        (lambda it: clean(it, 64), str),
        (number_of, type(None)),
        (lambda it: json_text([it, {1: it}, math.nan]), str),
    ):
        answer = aside(door, value)
        assert type(answer) is kind
        if kind is str:
            answer.encode()


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (2.5, 2.5),
        (True, 1.0),
        (Decimal("0.5"), 0.5),
        (Fraction(1, 4), 0.25),
        (Level.HIGH, 3.0),
        ("3", None),
        (b"3", None),
        (None, None),
        (1j, None),
        (Decimal("sNaN"), None),
        ([1], None),
        pytest.param(10**400, None, id="huge"),
        pytest.param(lying(object, "__float__")(), None, id="raises"),
        pytest.param(lying(object, "__float__", value="3")(), None, id="lies"),
    ],
)
def test_a_number_of_any_type_is_a_float(value: object, number: float | None) -> None:
    found = aside(number_of, value)
    assert found == number and type(found) in (float, type(None))


# -- what is large --


@given(
    st.recursive(
        st.none() | st.text(st.characters()) | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.integers(64, 300),
)
def test_json_that_is_too_large_gives_way_to_json_that_says_so(value: object, most: int) -> None:
    text = json_text(value)
    fitted, original = fit_json(text, most)
    if len(text) <= most:
        assert (fitted, original) == (text, 0)
    else:
        told = json.loads(fitted)
        assert original == told["truncated"] == len(text) and len(fitted) <= most
        assert list(told) == ["truncated", "head"] and text.startswith(told["head"])
        assert json_text(told) == fitted and len(told["head"]) >= (most - 50) // 2


def test_json_is_nested_no_deeper_than_every_reader_bears() -> None:
    def nested(depth: int, kind: Callable[[Any], Any]) -> Any:
        value: Any = "["
        for _ in range(depth):
            value = kind(value)
        return value

    for kind, levels in (
        (lambda inner: [inner], 1),
        (lambda inner: {"{": inner}, 1),
        (lambda inner: [{"k": inner}], 2),
        (lambda inner: {"k": [inner]}, 2),
    ):
        fine, deep = nested(100 // levels, kind), nested(100 // levels + 1, kind)
        assert json.loads(json_text(fine)) == fine
        assert "unprintable" in json_text(deep) and json_text(
            json.loads(json_text(deep))
        ) == json_text(deep)
    flat = [[], {}] * 500
    assert json.loads(json_text(flat)) == flat


@pytest.mark.parametrize(
    "text", ["x" * 10**7, "x" * 10**7 + "\0", "\u00e9" * 10**7, "\ud800" * 10**7], ids="abcd"
)
def test_cutting_a_long_text_copies_no_more_than_is_left(text: str) -> None:
    tracemalloc.start()
    try:
        cut, original = fit(text, 1000)
        assert tracemalloc.get_traced_memory()[1] < 2 ** 20
    finally:
        tracemalloc.stop()
    assert len(cut.encode()) in range(998, 1001) and original == len(sanitise(text).encode())


@pytest.mark.parametrize(
    "value", ["x" * 10**6, [1] * 10**6, {1: "x" * 10**6}, b"x" * 10**6], ids="abcd"
)
def test_what_a_message_shows_is_short(value: object) -> None:
    assert len(show(value)) <= 203


FOR_EVER = 5_000_000
"""As good as: whoever takes all of it would take what has no end."""


class Endless(dict):  # type: ignore[type-arg]
    """Gives for ever, as a mapping and as a sequence."""

    def __iter__(self) -> Any:
        return repeat(0, FOR_EVER)

    def __getitem__(self, key: object) -> int:
        return 0

    def items(self) -> Any:
        return repeat(("k", 0), FOR_EVER)


class EndlessMapping(Mapping):  # type: ignore[type-arg]
    def __getitem__(self, key: object) -> int:
        return 0

    def __iter__(self) -> Any:
        return repeat(0, FOR_EVER)

    def __len__(self) -> int:
        return 1


def test_what_gives_for_ever_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unprintable" in json_text(EndlessMapping())
    monkeypatch.setattr(texts, "_MOST_ITEMS", 10_000)  # the same in less time
    for value in (
        EndlessMapping(),
        [EndlessMapping(), math.nan],
        type("EndlessSet", (set,), {"__iter__": Endless.__iter__})([1]),
        Endless(a=1),
        {"k": [Endless(a=1)]},
        type("EndlessList", (list,), {"__iter__": Endless.__iter__})([1]),
        type("EndlessTuple", (tuple,), {"__iter__": Endless.__iter__})([1]),
    ):
        assert "unprintable" in json_text(value)
    for doubled in (lambda inner: [inner, inner], lambda inner: {"a": inner, 1: (inner, math.nan)}):
        value = doubled(0)
        for _ in range(60):
            value = doubled(value)
        assert "unprintable" in json_text(value)
    for check in (
        lambda: members("types", EventType, EndlessMapping()),
        lambda: Scheduler(sinks=Endless()),
    ):
        with pytest.raises(ConfigurationError, match="expected a "):
            check()

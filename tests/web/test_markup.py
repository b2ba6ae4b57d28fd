"""The door from values to markup."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgworker.web import markup
from bgworker.web.markup import Markup, fill
from bgworker.web.view import View, middle, start, table
from tests.web.browsing import EVIL, Parsed

WEB = Path(markup.__file__).parent


def test_a_value_is_text_wherever_it_stands() -> None:
    made = fill("link", href=EVIL, title=EVIL, text=EVIL)
    parsed = Parsed(made)
    assert parsed.shape == ["a href title", "/a"]
    assert "<script>alert(1)</script>" in parsed.text and "${x}&lt;" in parsed.text
    assert "<script>" in str(parsed.tags[0][1]["href"])


@given(st.text(st.characters(codec="utf-8"), max_size=60), st.text(max_size=60))
def test_no_text_changes_the_shape_of_a_part(text: str, other: str) -> None:
    assert Parsed(fill("link", href=text, title=other, text=text)).shape == ["a href title", "/a"]


def test_what_steers_or_reorders_is_shown_and_what_colours_goes() -> None:
    made = fill("code", text="a\0b\u202ec\x1b[31md\x1b]0;x\x07\r\ud800\n\te")
    assert made == "<code>a\\x00b\\u202ecd\\x1b]0;x\\x07\\r\\ud800\n        e</code>"


def test_markup_passes_once_and_what_is_cut_from_it_is_text_again() -> None:
    inner = fill("code", text="<")
    assert fill("code", text=[inner, None, "<", 3]) == "<code><code>&lt;</code>&lt;3</code>"
    for piece in (inner[:6], inner + "", "".join([inner]), inner.upper()):
        assert type(piece) is str and "<code>&lt;" in fill("code", text=piece)


def test_a_place_without_a_value_and_a_part_that_is_not_there_are_errors() -> None:
    with pytest.raises(KeyError):
        fill("link", text="x")
    with pytest.raises(KeyError):
        fill("no such part")


def test_nothing_but_the_door_makes_markup_and_no_part_has_a_script_or_a_style() -> None:
    for path in WEB.glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert path.name == "markup.py" or "Markup(" not in line, (path.name, line)
            assert not ("<" in line and "/>" in line or "</" in line), (path.name, line)
    templates = (WEB / "templates.html").read_text(encoding="utf-8")
    parsed = Parsed(templates)
    assert [attributes for tag, attributes in parsed.tags if tag == "script"] == [
        {"src": "/script.js", "defer": None}]
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag


@pytest.mark.parametrize("text, shown", [
    ("load", "load"), ("", ""), (None, ""), ("a\n b", "a b"), ("x" * 88, "x" * 88),
    ("a" * 100 + "z" * 100, "a" * 58 + "…" + "z" * 29), ("\x1b[31mred\x1b[0m", "red")])
def test_a_long_name_is_cut_in_the_middle(text: str | None, shown: str) -> None:
    assert middle(text) == shown


@given(st.text(max_size=300), st.integers(8, 60))
def test_what_is_cut_is_never_longer_than_it_may_be(text: str, most: int) -> None:
    assert len(middle(text, most)) <= most
    assert len(start(text, most)) <= most


def test_both_ends_of_a_very_long_name_are_seen_and_no_more_of_it_is_looked_at() -> None:
    name = "first " + "x" * 10_000_000 + " last"
    assert middle(name).startswith("first x") and middle(name).endswith("x last")


def test_links_lead_nowhere_in_a_report() -> None:
    assert Parsed(View(has_links=False).task("01", EVIL)).shape == ["span title", "/span"]
    [link] = Parsed(View(has_links=True).task("a/b?c", "load")).links()
    assert link == "/task/a%2Fb%3Fc"


def test_a_table_names_each_cell_for_narrow_screens() -> None:
    parsed = Parsed(table([("Name", "name"), ("Count", "num")], [("t1", "load", 3), ("x", 4)]))
    cells = [attributes for tag, attributes in parsed.tags if tag == "td"]
    assert cells == 2 * [{"class": "name", "data-label": "Name"},
                         {"class": "num", "data-label": "Count"}]
    assert Parsed(table([("Name", "name"), ("Count", "num")], [("", 3), (None, 4)])).words == (
        "Count 3 4"), "a column without any text is left out"
    assert [attributes["id"] for tag, attributes in parsed.tags if tag == "tr" and attributes] == [
        "t1", ""]

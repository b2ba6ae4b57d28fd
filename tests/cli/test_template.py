"""The replacement strings of ``bgworker run``: as in GNU parallel, whose manual is the reference,
but for the shell that is not there."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from bgworker.cli.template import Template
from bgworker.model.errors import ConfigurationError


def filled(words: list[str], *arguments: str, number: int = 1, own: str | None = None) -> list[str]:
    return Template(words, len(arguments), own).filled(arguments, number)


FORMS = [
    ("{}", "d/a.tar.gz", "d/a.tar.gz"),
    ("{.}", "d/a.tar.gz", "d/a.tar"),
    ("{.}", "sub.dir/foo", "sub.dir/foo"),
    ("{.}", ".bashrc", ""),
    ("{.}", "a.", "a"),
    ("{.}", "d/.x", "d/"),
    ("{.}", "a.b\n", "a"),
    ("{/}", "d/a.tar.gz", "a.tar.gz"),
    ("{/}", "plain", "plain"),
    ("{/}", "a/b/", ""),
    ("{//}", "d/e/a.tar.gz", "d/e"),
    ("{//}", "plain", "."),
    ("{//}", "/plain", "/"),
    ("{//}", "a/b/", "a"),
    ("{//}", "/", "/"),
    ("{/.}", "d.x/a.tar.gz", "a.tar"),
    ("{/.}", "d.x/a", "a"),
    ("{1}", "d/a", "d/a"),
    ("{-1/}", "d/a", "a"),
    ("{1.}", "d/a.b", "d/a"),
    ("{1//}", "d/a.b", "d"),
    ("{1/.}", "d/a.b", "a"),
]


@pytest.mark.parametrize("form, argument, word", FORMS)
def test_a_replacement_string_gives_the_part_of_the_argument(
    form: str, argument: str, word: str
) -> None:
    assert filled(["x", form], argument) == ["x", word]


@pytest.mark.skipif(shutil.which("parallel") is None, reason="GNU parallel is not installed")
def test_gnu_parallel_gives_the_same_parts() -> None:
    forms = ["{}", "{.}", "{/}", "{//}", "{/.}", "{1}", "{-1/}"]
    arguments = ["d/a.tar.gz", "sub.dir/foo", ".bashrc", "a.", "plain", "a/b/", "/plain", "d.x/y",
                 "two words", "it's", 'a"b', "$HOME", "*", "d/.x", "é.ü"]
    done = subprocess.run(
        ["parallel", "--plain", "-k", "-j1", "printf", "%s\\\\n", *forms, ":::", *arguments],
        capture_output=True, text=True, timeout=60, check=True,
    )
    template = Template(forms, 1)
    ours = [word for argument in arguments for word in template.filled([argument], 1)]
    assert done.stdout.split("\n")[:-1] == ours


def test_a_word_stays_one_word_whatever_the_argument_is() -> None:
    for odd in ("a b", "'", '"', "$(rm x)", "a;b", "\n", "", "-x", "{}", "{1}", "caf\udce9"):
        assert filled(["x", "{}", "<{}>"], odd) == ["x", odd, f"<{odd}>"]


def test_without_a_replacement_string_the_arguments_are_appended() -> None:
    assert filled(["gzip", "-t"], "a b") == ["gzip", "-t", "a b"]
    assert filled(["x"], "a", "b") == ["x", "a", "b"]
    assert filled(["x", "{#}"], "a", number=7) == ["x", "7"], "the number is one, too"


def test_several_sources_fill_by_number_or_all_together() -> None:
    assert filled(["x", "{2}-{1.}", "{}", "y={}"], "a.b", "c d") == [
        "x", "c d-a", "a.b", "c d", "y=a.b c d"]
    assert filled(["{-1}", "{-2}"], "a", "b") == ["b", "a"]


@pytest.mark.parametrize("word", ["{2}", "{0}", "{-2}", "[0-9]{3}", "{9/.}"])
def test_a_number_that_no_source_has_is_refused_with_the_way_out(word: str) -> None:
    with pytest.raises(ConfigurationError, match=r"expected \{1\} to \{1\}.* -I$"):
        Template(["x", word], 1)
    assert filled(["x", word, "@"], "a", own="@") == ["x", word, "a"]


@pytest.mark.parametrize("word", ["{a}", "{ }", "{..}", "{///}", "{1", "1}", "{=1=}", "{%}", "${x}",
                                  "{12345678901}"])
def test_other_braces_are_plain_text(word: str) -> None:
    assert filled(["x", word, "{}"], "a") == ["x", word, "a"]


def test_an_own_string_is_the_only_one() -> None:
    assert filled(["x", "{}", ",,/,,", "{#}"], "a b", own=",,") == ["x", "{}", "a b/a b", "{#}"]
    assert filled(["x", "{}"], "a", own=",,") == ["x", "{}", "a"]

"""What holds for every verb that reads a history: harmless output, quiet ends, plain errors,
help."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Recorder, run_cli

from bgworker.history import schema
from bgworker.cli import VERBS, main
from bgworker.cli.reading import harmless_json, json_line
from bgworker.words import escaped
from tests.support import environment


READING: dict[str, list[str]] = {
    "tasks": ["tasks"],
    "runs": ["runs"],
    "show": ["show", "last"],
    "why": ["why", "last"],
    "tail": ["tail", "last"],
    "tail -f": ["tail", "-f", "last"],
    "grep": ["grep", "."],
    "stats": ["stats"],
    "prune": ["prune", "--keep", "1000", "--dry-run"],
    "export": ["export", "--jsonl"],
}
"""Every verb that reads a history and ends by itself, by what it is called here."""

CONTROLS = "".join(map(chr, [*range(1, 32), *range(127, 160)]))
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
EVIL = (
    "\x1b]0;title\x07\x1b[2J\x1b]8;;http://evil\x1b\\link\x9b31m"
    f"{CONTROLS}{BIDI}\u2028\ufeff\U000e0041"
)


def shown(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    out, err = capfd.readouterr()
    return out + err


def dangerous(text: str) -> str:
    """Return the characters in a text that could steer a terminal or reorder a line."""
    return "".join(
        each for each in text if each != "\n" and (each in CONTROLS + BIDI or escaped(each) != each)
    )


# ---------------------------------------------------------------- harm

@pytest.fixture
def evil(record: Recorder) -> Recorder:
    """A history in which everything that a task, a sink or a machine may have named is as bad as it
    can be."""
    record.run("f" * 32, host=EVIL)
    record.insert("scripts", hash=EVIL, script_id=EVIL, text=EVIL)
    task_id = record.task(
        EVIL,
        "failed",
        run_id="f" * 32,
        metadata={EVIL: EVIL},
        failure_type=EVIL,
        failure_message=EVIL,
        invocation_info=f"{EVIL}\n{EVIL}",
        last_progress_pct=5.0,
        last_progress_msg=EVIL,
        script_id=EVIL,
        script_hash=EVIL,
        arg_json=json.dumps([EVIL], ensure_ascii=False),
        last_seq=20,
    )
    for stream in ("output", "error", "warning", "verbose", "progress"):
        record.said(task_id, EVIL, stream)
    record.said(task_id, json.dumps([EVIL], ensure_ascii=False), is_json=True)
    record.lost(3, sink=EVIL, reason=EVIL)
    return record


@pytest.mark.parametrize("words", [words for name, words in READING.items() if name != "export"],
                         ids=[name for name in READING if name != "export"])
def test_nothing_that_could_steer_a_terminal_or_reorder_a_line_is_sent(
        evil: Recorder, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    for more in ([], ["--json"]):
        text = shown(capfd, *words, *more)
        assert text
        assert dangerous(text) == ""
        if words[0] not in ("stats", "prune"):
            assert "title" in text, "it is shown, not left out"


def test_an_export_to_a_terminal_is_harmless_too_and_says_the_same(evil: Recorder) -> None:
    if os.name == "nt":
        pytest.skip("needs a pseudo-terminal")
    from tests.terminal import on_terminal

    evil.said(evil.task("second"), json.dumps(["é\x7f\u202e"], ensure_ascii=False), is_json=True)
    code, sent = on_terminal("export", "--jsonl", cwd=Path(evil.path).resolve().parent)
    assert code == 0 and dangerous(sent.replace("\r\n", "\n")) == ""
    plain = run_cli("export", "--jsonl", cwd=Path(evil.path).resolve().parent).stdout
    assert [json.loads(line) for line in sent.splitlines()] == [
        json.loads(line) for line in plain.split("\n")[:-1]
    ]
    assert "\u202e" in plain, "the exact text goes to files and pipes"


def test_the_search_for_dangerous_characters_finds_each_of_them() -> None:
    for each in CONTROLS.replace("\n", "") + BIDI:
        assert dangerous(f"a{each}b") == each
    assert dangerous("plain é 日本 👩\u200d🚀\n") == ""


@pytest.mark.parametrize("words", READING.values(), ids=READING)
def test_names_and_messages_without_end_do_no_harm(
    record: Recorder, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    huge = "n" * 1_000_000
    task_id = record.task(
        huge,
        "failed",
        failure_type=huge,
        failure_message=huge,
        last_progress_msg=huge,
        last_progress_pct=1.0,
    )
    record.said(task_id, "said")
    record.lost(1, sink=huge, reason=huge)
    text = shown(capfd, *words)
    if words[0] in ("tasks", "stats"):
        assert max(map(len, text.splitlines())) < 2000
    assert main(["show", huge[:200]]) == 1
    assert len(capfd.readouterr().err) < 300


def test_an_id_from_elsewhere_may_be_anything(
    record: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    record.said(record.task("job", id="\x1b[2J\u202e"), "said")
    for words in READING.values():
        assert dangerous(shown(capfd, *words)) == ""


def test_harmless_json_says_the_same() -> None:
    for value in ([EVIL], {EVIL: "é日👍"}, "\ud800 \x7f"):
        for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
            safe = harmless_json(text)
            assert safe.isascii() and safe.isprintable()
            assert json.loads(safe) == json.loads(text)
    assert dangerous(json_line({"x": EVIL})) == ""


# ---------------------------------------------------------------- ends


@pytest.fixture(scope="module")
def long_history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a history with more than a pipe takes at once, in each of its tables."""
    folder = tmp_path_factory.mktemp("long")
    record = Recorder(folder / "bgworker.db")
    record.many_said(record.task("x"), 20_000)
    for number in range(2000):
        record.task(f"name {number} {'x' * 60}", id=f"{number:032x}", failure_message="m" * 200)
        record.run(f"{number:032x}", host="h" * 100)
    record.close()
    return folder


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("words", [each for name, each in READING.items() if name != "prune"],
                         ids=[name for name in READING if name != "prune"])
def test_a_reader_that_has_gone_ends_it_without_a_word(
    long_history: Path, words: list[str]
) -> None:
    more = {"tasks": ["--limit", "0"], "runs": ["--limit", "0"], "show": ["-n", "20000"],
            "why": ["-n", "20000"], "stats": ["--json"]}.get(words[0], [])
    words = [{"last": "x"}.get(word, word) for word in words]
    with subprocess.Popen(
        [sys.executable, "-m", "bgworker", *words, *more],
        cwd=long_history,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        if words[0] != "stats":  # what it says is one line, which a pipe takes at once
            assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141


def test_a_closed_stdout_is_no_error(record: Recorder, tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("needs a shell")
    record.task("job")
    done = subprocess.run(
        f"{sys.executable} -m bgworker tasks >&-",
        shell=True,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env=environment(),
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")


# ---------------------------------------------------------------- errors

def foreign(path: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (a)")
    connection.close()


def newer(path: str) -> None:
    connection = schema.connect_to_write(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


ODD = "hx.db" if os.name == "nt" else "h\x1bx.db"
UNUSABLE: dict[str, Any] = {
    "there is no history at": None,
    "is empty": lambda path: Path(path).touch(),
    "it is no SQLite file": lambda path: Path(path).write_bytes(b"x" * 5000),
    "belongs to another program": foreign,
    "upgrade bgworker": newer,
    "": lambda path: Path(path).mkdir(),
}


@pytest.mark.parametrize("message", UNUSABLE)
@pytest.mark.parametrize("verb", [*READING, "watch", "diff", "rerun --failed"])
def test_a_file_that_is_no_history_is_one_line_and_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    verb: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if UNUSABLE[message] is not None:
        UNUSABLE[message](ODD)
    assert main([*READING.get(verb, verb.split()), "--db", ODD]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"bgworker {verb.split()[0]}: error: argument --db: ") and message in err
    assert err.count("\n") == 1 and "Traceback" not in err and "\x1b" not in err
    assert not os.path.exists(f"{ODD}.lock")


def test_the_environment_names_the_history(record: Recorder, tmp_path: Path) -> None:
    record.task("here")
    other = Recorder(tmp_path / "other.db")
    other.task("there")
    other.close()
    assert "here" in run_cli("tasks", cwd=tmp_path).stdout
    assert "there" in run_cli("tasks", cwd=tmp_path, env={"BGWORKER_DB": "other.db"}).stdout
    assert (
        "here"
        in run_cli(
            "tasks", "--db", "bgworker.db", cwd=tmp_path, env={"BGWORKER_DB": "other.db"}
        ).stdout
    )


# ---------------------------------------------------------------- help

def verb_names() -> list[str]:
    return [verb.__name__.rpartition(".")[2] for verb in VERBS]


def test_every_verb_has_help_with_an_example_of_itself(capfd: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("BGWORKER_DB", "100%(x)s.db")  # a per cent sign means something to argparse
    assert verb_names() == [
        "run",
        "rerun",
        "tasks",
        "runs",
        "diff",
        "show",
        "why",
        "tail",
        "grep",
        "stats",
        "watch",
        "cancel",
        "report",
        "serve",
        "prune",
        "replay",
        "export",
    ]
    for name in verb_names():
        assert main([name, "--help"]) == 0
        text = capfd.readouterr().out
        assert re.search(rf"^examples?:\n  (.* \| )?bgworker {name}( |$)", text, re.MULTILINE), name
        assert re.search(r"^exit codes:\n  ", text, re.MULTILINE), name
        assert max(map(len, text.splitlines())) <= 80, name


def test_no_verb_loads_sqlite_before_it_needs_it() -> None:
    code = "import sys, bgworker.cli; assert 'sqlite3' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        timeout=60,
        check=True,
    )

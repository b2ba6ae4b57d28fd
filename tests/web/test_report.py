"""The report: one file, good and small whatever the history holds."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from tests.histories import Recorder, make_nightly, run_cli, text_of
from tests.support import ROOT, environment
from tests.web.browsing import EVIL, Parsed, fill_with

from bgworker import History
from bgworker.model.ids import new_id
from bgworker.web.report import report

MOST = 2 * 2**20
NOW = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)


def report_of(record: Recorder, **how: Any) -> Parsed:
    with History(record.path) as history:
        text = report(history, **how)
    assert len(text.encode()) < MOST
    return checked(text)


def checked(text: str) -> Parsed:
    """Check that a page runs nothing and loads nothing."""
    parsed = Parsed(text)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "base", "form", "a"}
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") or name in ("src", "href", "style")
                       for name in attributes)
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style and "@import" not in style
    assert parsed.tags[2] == ("meta", {"charset": "utf-8"}), "a mail's attachment has no header"
    assert ("meta", {"http-equiv": "Content-Security-Policy",
                     "content": "default-src 'none'; style-src 'unsafe-inline'"}) in parsed.tags
    assert not {"\0", "\u202e", "\x1b", "\x07"} & set(text)
    return parsed


def test_it_tells_what_ran_what_failed_and_what_was_lost(tmp_path: Path) -> None:
    make_nightly(tmp_path / "nightly.db")
    with History(tmp_path / "nightly.db") as history:
        text = report(history)
    parsed = checked(text)
    assert str(tmp_path) not in text
    for said in ("5 all", "2 completed", "1 failed", "1 timed out", "1 cancelled",
                 "ValueError", "row 2 is bad", "load orders", "Complete."):
        assert said in parsed.words, said
    bars = [attributes for tag, attributes in parsed.tags if tag == "rect"]
    assert len(bars) >= 5
    for hidden in ("loaded row", "def load(", "ticket", "one row was odd"):
        assert hidden not in parsed.text, "what tasks said, took and were is not to be mailed"


def test_losses_are_counted_by_sink_and_reason(record: Recorder) -> None:
    record.task()
    record.lost(120, sink="hook", reason="overflow")
    record.lost(3, sink="hook", reason="overflow", at=record.ago(minutes=5))
    words = report_of(record).words
    assert "123 events were lost" in words and "hook overflow 123 now" in words


def test_an_empty_history_says_what_to_do(record: Recorder) -> None:
    words = report_of(record).words
    assert "No tasks yet." in words and "bgworker run" in words and "Complete." in words


def test_a_span_or_run_without_tasks_says_so_and_is_named(record: Recorder) -> None:
    run = record.run("0" * 31 + "1")
    record.task("old", created=record.ago(days=3), run_id=run)
    assert "No such tasks." in report_of(record, since=timedelta(days=1)).words
    assert "since 20" in report_of(record, since=timedelta(days=1)).words
    for number in range(40):  # more than a report has of all runs
        record.run(f"{number + 16:032x}")
    record.task("new", "failed", failure_type="E")
    words = report_of(record, run=run).words
    assert f"{run[-8:]} now" in words
    for word in (run[-8:], "last~40"):
        assert f"{run[-8:]} now" in report_of(record, run=word).words
    assert f"run {run}" in words and "1 all" in words and "Nothing failed." in words


def test_hostile_names_are_text_and_the_shape_stays(tmp_path: Path) -> None:
    shapes = []
    for name, text in (("tame", "tame"), ("evil", EVIL)):
        recorder = Recorder(tmp_path / f"{name}.db", NOW)
        fill_with(recorder, text)
        shapes.append(report_of(recorder).shape)
        recorder.close()
    assert shapes[0] == shapes[1]


def many(record: Recorder, count: int, name: str, **columns: object) -> None:
    """Record tasks of different names in one transaction, one of ten failed."""
    record.connection.execute("BEGIN")
    for number in range(count):
        created = record.now - timedelta(seconds=2 * (count - number))
        record.task(f"{number:06}{name}{number:06}", "completed" if number % 10 else "failed",
                    created=created, took=float(number % 97), **columns)
    record.connection.execute("COMMIT")


@pytest.mark.parametrize("name", ['"' * 300, "\u202e" * 300, "\U0001f600" * 300, "'&<>" * 75])
def test_it_stays_below_two_megabytes_whatever_names_and_messages_are(
    record: Recorder, name: str
) -> None:
    many(record, 2500, name, failure_type=name, failure_message=name)
    many(record, 20, name * 300, failure_type=name * 300, failure_message=name * 300)
    for number in range(150):
        run = new_id(number)
        record.insert("runs", run_id=run, host=name, pid=1, python=name, version=name,
                      started_utc=text_of(record.now))
        record.lost(1, sink=f"{name}{number}", reason=name)
    bars = [tag for tag, attributes in report_of(record).tags if tag == "rect"]
    assert len(bars) > 1900


@pytest.mark.slow
def test_a_hundred_thousand_tasks_make_a_good_report(record: Recorder) -> None:
    many(record, 100_000, "load")
    words = report_of(record).words
    assert "100,000 all" in words and "others are not drawn" in words


def test_times_that_no_calendar_has_do_no_harm(record: Recorder) -> None:
    for time in ("9999-12-31T23:59:59.999999Z", "0001-01-01T00:00:00Z", "nonsense", "1e9",
                 "2026-11-24T00:00:00+23:59"):
        record.task(time, created_utc=time, started_utc=time, completed_utc=time,
                    duration_sec=1e300)
    report_of(record)
    record.task(created_utc="x", started_utc=None, completed_utc=None, duration_sec=-5.0)
    report_of(record)


# ---------------------------------------------------------------- the verb

def test_the_verb_writes_a_file_and_says_where(tmp_path: Path, record: Recorder) -> None:
    record.task("load users")
    done = run_cli("report", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("1") or "kB written to" in done.stderr
    assert str(tmp_path / "bgworker-report.html") in done.stderr
    page = (tmp_path / "bgworker-report.html").read_text(encoding="utf-8")
    assert "load users" in checked(page).text
    done = run_cli("report", "-o", "-", "--since", "1d", cwd=tmp_path)
    assert "load users" in checked(done.stdout).text and done.stderr == ""


@pytest.mark.parametrize("content, complaint", [
    (None, "there is no history at"), ("x" * 5000, "is not a history"), ("", "is empty")])
def test_where_no_history_can_be_read_the_page_says_why_and_the_code_is_two(
    tmp_path: Path, content: str | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / "bgworker.db").write_text(content)
    done = run_cli("report", cwd=tmp_path)
    assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr
    page = (tmp_path / "bgworker-report.html").read_text(encoding="utf-8")
    assert complaint in checked(page).text
    assert str(tmp_path) in done.stderr, "we are told where"
    assert "'bgworker.db'" in checked(page).text and str(tmp_path) not in page


@pytest.mark.parametrize("words, complaint", [
    (["--run", "zz"], "argument --run: "), (["--since", "soon"], "expected a duration"),
    (["-o", "bgworker.db"], "is the history itself"), (["-o", "no/such/folder"], "cannot write"),
    (["-o", ""], "expected the path of a file")])
def test_what_cannot_be_done_is_said_in_one_line(
    tmp_path: Path, record: Recorder, words: list[str], complaint: str
) -> None:
    before = Path(record.path).read_bytes()
    done = run_cli("report", *words, cwd=tmp_path)
    assert done.returncode == 2 and complaint in done.stderr
    assert done.stderr.count("kB written") == 0 and done.stderr.count("\n") == 1
    assert Path(record.path).read_bytes() == before


def test_a_report_is_written_from_a_zip(tmp_path: Path, record: Recorder) -> None:
    record.task("load users")
    archive = tmp_path / "copy.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        for path in (ROOT / "bgworker").rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                writer.write(path, f"_bg/{path.relative_to(ROOT / 'bgworker')}")
    done = subprocess.run([sys.executable, "-W", "error", "-m", "_bg", "report", "-o", "-"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env=environment(PYTHONPATH=str(archive)))
    assert done.returncode == 0, done.stderr
    assert "load users" in checked(done.stdout).text


def test_what_was_made_is_dated(record: Recorder) -> None:
    record.task()
    day = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    assert f"made {day}" in report_of(record).words

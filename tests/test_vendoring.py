"""A copy of the package works under another name, beside the original, as a folder and as a zip
file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import ROOT

BOTH = """
import sys
sys.path[:0] = sys.argv[1:]
import _bg, bgworker

assert _bg.__file__.startswith(sys.argv[1]), _bg.__file__
for name in ("Scheduler", "Task", "TaskStatus", "TaskCancelled", "current_task"):
    assert getattr(_bg, name) is not getattr(bgworker, name), name

def task_of(package):
    package.current_task().output("hello")
    return package.current_task().id

with _bg.Scheduler(2) as ours, bgworker.Scheduler(2) as theirs:
    for _ in range(20):
        first, second = ours.submit(task_of, _bg), theirs.submit(task_of, bgworker)
        assert first.result(timeout=30) == first.id and second.result(timeout=30) == second.id
    stranger = theirs.submit(task_of, _bg)
    assert stranger.result(timeout=30) != stranger.id, "one copy sees the other's current task"
    assert type(first) is _bg.Task and type(second) is bgworker.Task
print("both ran")
"""


CORE_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import _bg
from _bg import *

def refused(part, ask):
    try:
        ask()
    except (ImportError, SinkError) as error:
        text = str(error)
        assert f"made without its part {part!r}" in text and "--without" in text, text
    else:
        sys.exit(f"nobody said that {part} is missing")

def talk():
    current_task().output("hello")

with Scheduler(2, sinks=["jsonl:" + sys.argv[2]]) as pool:
    pool.submit(talk).result(timeout=30)
    refused("history", lambda: pool.register_sink("sqlite:x.db"))
    refused("history", lambda: pool.listen("x.db"))
    refused("remote", lambda: pool.resume("x.db"))
    refused("webhook", lambda: pool.register_sink("webhook:https://example.com/"))
    refused("park", lambda: pool.register_sink("jsonl:x", options=SinkOptions(park="parked")))
for name, part in (
    ("History", "history"),
    ("SqliteSink", "history"),
    ("WebhookSink", "webhook"),
    ("shell", "shell"),
    ("resumable", "remote"),
    ("Resumed", "remote"),
):
    refused(part, lambda: getattr(_bg, name))
    assert name not in globals() and name not in dir(_bg), name
refused("history", lambda: exec("from _bg import History"))
print(open(sys.argv[2]).read().count("hello"), "line")
"""


def vendor(*arguments: str | Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(root / "tools" / "vendor.py"), *map(str, arguments)],
                          capture_output=True, text=True, timeout=180)


def vendored(*arguments: str | Path) -> str:
    done = vendor(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.count("\n") == 1
    return done.stdout


@pytest.fixture(scope="session")
def made_without(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder with a copy, ``_bg``, that was made without a part, or whole without any.
    Not to be written to, except for the bytecode of what is imported from there."""
    made: dict[str, Path] = {}

    def without(part: str) -> Path:
        if part not in made:
            folder = made[part] = tmp_path_factory.mktemp(f"without-{part}")
            vendored(folder, "--name", "_bg", "--without", part)
        return made[part]

    return without


@pytest.fixture
def good(made_without: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder of the test's own with a whole copy, ``_bg``."""
    return Path(shutil.copytree(made_without(""), tmp_path / "project"))


def run_both(entry: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-W", "error", "-c", BOTH, str(entry), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "both ran"), done.stderr


def files_under(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sources(folder: Path = ROOT / "bgworker") -> dict[str, bytes]:
    """Return the files under a folder without the bytecode."""
    return {name: data for name, data in files_under(folder).items() if "__pycache__" not in name}


def test_a_vendored_folder_runs_tasks_beside_the_original(tmp_path: Path) -> None:
    assert "vendored bgworker" in vendored(tmp_path, "--name", "_bg")
    run_both(tmp_path)


def test_vendoring_writes_the_package_and_nothing_else(tmp_path: Path) -> None:
    vendored(tmp_path / "new" / "project", "--name", "_bg")
    assert files_under(tmp_path) == {
        f"new/project/_bg/{name}": data for name, data in sources().items()
    }


def test_a_vendored_zip_runs_tasks_beside_the_original(tmp_path: Path) -> None:
    vendored(tmp_path, "--name", "_bg", "--zip")
    assert [path.name for path in tmp_path.iterdir()] == ["_bg.zip"]
    run_both(tmp_path / "_bg.zip")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_the_core_alone_runs_and_says_of_each_part_that_it_is_missing(
    tmp_path: Path, kind: str
) -> None:
    parts = "history,webhook,park,shell,testing,web,stores,remote,cli"
    options = ["--name", "_bg", "--without", parts, *(["--zip"] if kind == "zip" else [])]
    vendored(tmp_path, *options)
    entry = tmp_path / "_bg.zip" if kind == "zip" else tmp_path
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-B",
            "-W",
            "error",
            "-c",
            CORE_ALONE,
            str(entry),
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1 line"), done.stderr
    assert "updated bgworker" in vendored(tmp_path, *options)


def test_a_copy_without_the_history_marks_what_is_resumable_and_says_why_it_cannot_resume(
    tmp_path: Path, made_without: Callable[[str], Path]
) -> None:
    code = """
from _bg import MissingPart, Scheduler, resumable
with Scheduler(1) as pool:
    task = pool.submit(resumable("double")(lambda number: 2 * number), 3)
    print(task.result(30), task.snapshot().metadata["resumable"]["name"])
    try:
        pool.resume("x.db")
    except MissingPart as error:
        print(error.name)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, text=True,
                          capture_output=True, timeout=60, env=importing(made_without("history")))
    assert done.stdout == "6 double\nhistory\n", done.stderr


VERBS_THAT_NEED = {
    "history": [
        "run -- python -c pass",
        "run --no-db --sink sqlite:x.db -- python -c pass",
        "run --resume -- python -c pass",
        "tasks",
        "runs",
        "rerun --failed",
        "diff",
        "show last",
        "why",
        "tail last",
        "grep x",
        "stats",
        "watch",
        "cancel --all",
        "prune --keep 1",
        "export --jsonl",
        "report",
        "replay park.jsonl --to sqlite:x.db",
    ],
    "webhook": [
        "run --no-db --sink webhook:https://example.com/ -- python -c pass",
        "replay park.jsonl --to webhook:https://example.com/",
    ],
    "park": ["replay park.jsonl --to jsonl:x.jsonl"],
    "shell": ["run --no-db -- python -c pass", "run -f commands.txt"],
    "testing": [],
    "web": ["report", "serve"],
    "stores": [],
    "remote": [],
    "cli": [],
}
"""Part -> command lines that cannot do without it."""


def once(part: str) -> object:
    """Which modules lack another is the same on each interpreter: only one part is left out on
    every one, the part that most others need."""
    return part if part == "history" else pytest.param(part, marks=pytest.mark.slow)


@pytest.mark.parametrize("part", [once(part) for part in VERBS_THAT_NEED])
def test_a_copy_lacks_the_files_of_a_part_left_out_and_no_others(
    made_without: Callable[[str], Path], part: str
) -> None:
    files = sources(made_without(part))
    lacking = sources().keys() - {name.partition("/")[2] for name in files}
    # which are no use without it
    others = {"cli": ("__main__.py",), "history": ("web/", "stores/")}
    prefixes = (f"{part}/", f"{part}.py", *others.get(part, ()))
    assert lacking == {name for name in sources() if name.startswith(prefixes)}


@pytest.mark.parametrize("part", [once(part) for part, lines in VERBS_THAT_NEED.items() if lines])
def test_each_verb_that_needs_a_part_left_out_says_so_in_one_line_and_does_nothing(
    tmp_path: Path, made_without: Callable[[str], Path], part: str
) -> None:
    made = made_without(part)
    (tmp_path / "commands.txt").write_text("exit 3\n", encoding="utf-8")
    before = files_under(tmp_path)
    for line in VERBS_THAT_NEED[part]:
        done = command_line(made, tmp_path, *line.split())
        assert done.returncode == 2 and done.stdout == "", (line, done)
        assert f"made without its part {part!r}" in done.stderr, (line, done.stderr)
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("part", [once(part) for part in VERBS_THAT_NEED if part != "cli"])
def test_each_verb_that_does_without_a_part_left_out_works(
    tmp_path: Path, made_without: Callable[[str], Path], part: str
) -> None:
    made = made_without(part)
    assert command_line(made, tmp_path, "--help").returncode == 0
    if part != "shell":
        run = command_line(made, tmp_path, "run", "--no-db", "--jsonl", "x.jsonl", "--",
                           sys.executable, "-c", "print(6)")
        assert (run.returncode, run.stdout, run.stderr) == (0, "6\n", "")
    if part not in ("shell", "park", "history"):
        again = command_line(made, tmp_path, "replay", "x.jsonl", "--to", "sqlite:bgworker.db")
        assert again.returncode == 0 and "delivered, 0 refused, 0 skipped" in again.stdout
        assert "completed" in command_line(made, tmp_path, "tasks").stdout


def command_line(made: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line of a copy in a folder, which is not the copy's."""
    return subprocess.run([sys.executable, "-W", "error", "-m", "_bg", *words], cwd=folder,
                          capture_output=True, text=True, timeout=120, env=importing(made))


def importing(made: Path) -> dict[str, str]:
    """Return an environment in which a copy is imported and no setting of the shell is seen."""
    return {**{key: value for key, value in os.environ.items() if not key.startswith("BGWORKER_")},
            "PYTHONPATH": str(made)}


def test_an_unknown_part_is_refused_in_one_line(tmp_path: Path) -> None:
    done = vendor(tmp_path, "--without", "history,running")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "'running'" in done.stderr and "webhook" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_same_source_makes_the_same_zip(tmp_path: Path) -> None:
    vendored(tmp_path, "--zip")
    first = (tmp_path / "bgworker.zip").read_bytes()
    assert "updated bgworker" in vendored(tmp_path, "--zip")
    assert (tmp_path / "bgworker.zip").read_bytes() == first


def test_a_second_run_updates_the_copy(good: Path) -> None:
    (good / "_bg" / "events.py").write_text("old", encoding="utf-8")
    (good / "_bg" / "gone_since.py").write_text("", encoding="utf-8")
    assert "updated bgworker" in vendored(good, "--name", "_bg")
    assert files_under(good) == {f"_bg/{name}": data for name, data in sources().items()}


@pytest.mark.parametrize("name", ["class", "None", "a.b", "1st", "a-b", "", "../up", "queue"])
def test_a_name_that_cannot_be_imported_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    done = vendor(tmp_path, "--name", name)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and repr(name) in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_command_line_is_refused_in_one_line() -> None:
    done = vendor()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "DEST" in done.stderr


@pytest.mark.parametrize(
    "content", [{}, {"__init__.py": "mine"}, {"errors.py": "class MyError(Exception): ..."}]
)
def test_a_folder_that_is_no_copy_is_never_replaced(
    tmp_path: Path, content: dict[str, str]
) -> None:
    (tmp_path / "_bg").mkdir()
    for name, text in content.items():
        (tmp_path / "_bg" / name).write_text(text, encoding="utf-8")
    before = files_under(tmp_path)
    done = vendor(tmp_path, "--name", "_bg")
    assert done.returncode == 2 and "no copy of bgworker" in done.stderr
    assert files_under(tmp_path) == before


def test_a_zip_that_is_no_copy_is_never_replaced(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "_bg.zip", "w") as writer:
        writer.writestr("_bg/errors.py", "mine")
    before = files_under(tmp_path)
    done = vendor(tmp_path, "--name", "_bg", "--zip")
    assert done.returncode == 2 and "no copy of bgworker" in done.stderr
    assert files_under(tmp_path) == before


def test_the_original_is_never_replaced_by_its_own_copy() -> None:
    for dest in (ROOT, ROOT / "bgworker", ROOT / "bgworker" / "sinks"):
        done = vendor(dest)
        assert done.returncode == 2 and "is the original" in done.stderr


@pytest.mark.parametrize(("line", "complaint"), [
    ("import numpy", "imports numpy, which is outside"),
    ("from bgworker.model import errors", "imports bgworker.model, which is outside"),
    ("from ... import pytest", "imports ..., which is outside"),
    ("raise RuntimeError('broken copy')", "broken copy"),
    ("__import__('bg' + 'worker.model.errors')", "No module named 'bgworker'"),
])
def test_a_copy_that_fails_its_verification_does_not_replace_a_good_one(
    tmp_path: Path, good: Path, line: str, complaint: str
) -> None:
    before = files_under(good)
    for folder in ("bgworker", "tools"):
        shutil.copytree(
            ROOT / folder, tmp_path / "root" / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    events = tmp_path / "root" / "bgworker" / "model" / "events.py"
    events.write_text(f"{events.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")

    done = vendor(good, "--name", "_bg", root=tmp_path / "root")
    assert done.returncode == 1 and complaint in done.stderr, done.stderr
    assert files_under(good) == before

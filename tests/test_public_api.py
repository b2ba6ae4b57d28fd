"""The names that users may rely on: they are there, documented, and cheap to import."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

import bgworker
from tests.support import ROOT

DEAR = (
    "sqlite3",
    "urllib.request",
    "ssl",
    "http",
    "asyncio",
    "multiprocessing",
    "dataclasses",
    "inspect",
    "typing",
)
"""What `import bgworker` alone must not load."""


def in_fresh_interpreter(code: str) -> str:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_resolves() -> None:
    assert sorted(set(bgworker.__all__)) == sorted(
        bgworker.__all__
    ), "a name stands in __all__ twice"
    missing = [name for name in bgworker.__all__ if not hasattr(bgworker, name)]
    assert not missing


def test_dir_lists_the_public_names() -> None:
    assert set(bgworker.__all__) <= set(dir(bgworker))
    listed = in_fresh_interpreter("import bgworker; print(*dir(bgworker))").split()
    assert set(bgworker.__all__) <= set(listed), "only once they have been used"


def test_importing_bgworker_loads_nothing_dear() -> None:
    # that of 3.14 loads dataclasses by itself
    code = ("import concurrent.futures._base\nbefore = set(sys.modules)\nimport bgworker\n"
            "print(*set(sys.modules) - before)")
    loaded = in_fresh_interpreter(code).split()
    assert "bgworker" in loaded
    assert not sorted(set(loaded) & set(DEAR))


def test_the_list_of_dear_modules_would_notice_one() -> None:
    code = (
        "before = set(sys.modules)\nimport bgworker, sqlite3, urllib.request, asyncio\n"
        "print(*set(sys.modules) - before)"
    )
    assert {"sqlite3", "urllib.request", "asyncio"} <= set(
        in_fresh_interpreter(code).split()
    ) & set(DEAR)


def test_a_star_import_brings_every_public_name() -> None:
    assert (
        in_fresh_interpreter(
            "from bgworker import *\nimport bgworker\n"
            "print([name for name in bgworker.__all__ if name not in globals()])"
        ).strip()
        == "[]"
    )


@pytest.mark.parametrize(("home", "names"), [
    ("bgworker.history", "History SqliteSink"),
    ("bgworker.webhook", "WebhookSink verify new_secret VerificationError"),
    ("bgworker.park", "replay"),
    ("bgworker.model.wire", "encode decode"),
    ("bgworker.testing", "MemorySink FlakySink check_sink"),
])
def test_what_only_a_part_offers_stands_in_its_room(home: str, names: str) -> None:
    code = (f"import importlib\nroom = importlib.import_module({home!r})\n"
            f"print(*[getattr(room, name).__name__ for name in {names.split()}])")
    assert in_fresh_interpreter(code).split() == names.split()


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import bgworker.shell.child; ",
        "from bgworker import shell; import bgworker.shell.pipes; ",
    ],
)
def test_shell_is_callable_whatever_was_imported_before(before: str) -> None:
    code = (f"{before}from bgworker import Scheduler, shell\n"
            "with Scheduler(1) as pool: pool.submit(shell(['true'])).result()\nprint('ran')")
    assert in_fresh_interpreter(code).strip() == "ran"


def public_names(kind: type, *bases: type) -> set[str]:
    """The names of a class that none of the bases has."""
    inherited = {name for base in bases for name in dir(base)}
    return {name for name in dir(kind) if not name.startswith("_") and name not in inherited}


def test_a_task_shows_what_its_submitter_needs_and_no_more() -> None:
    assert public_names(bgworker.Task, Future) == {
        "id", "name", "status", "cancel_requested", "cancel_reason", "snapshot", "streams", "wait",
    }
    with bgworker.Scheduler(1) as pool:
        task = pool.submit(int)
    assert all(name.startswith("_") for name in vars(task))


def test_the_inside_of_a_task_shows_what_its_code_needs_and_no_more() -> None:
    assert public_names(bgworker.TaskContext) == {
        "id", "name", "metadata", "cancel_requested", "cancel_reason", "time_remaining",
        "progress", "output", "error", "warning", "verbose", "checkpoint", "sleep",
    }
    assert all(name.startswith("_") for name in vars(bgworker.current_task()))


def test_an_unknown_attribute_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        bgworker.no_such_name
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from bgworker import no_such_name")


def test_the_version_is_the_one_of_the_project() -> None:
    assert bgworker.__version__.count(".") == 2


# --- docstrings ---


def undocumented(name: str, value: object) -> Iterator[str]:
    """Yield the dotted names, of the public thing and its public methods and properties, that have
    no docstring."""
    if inspect.isclass(value):
        if not has_own_docstring(value):
            yield name
        for attribute, member in vars(value).items():
            if not attribute.startswith("_"):
                yield from undocumented(f"{name}.{attribute}", member)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from undocumented(name, value.__func__)
    elif (inspect.isroutine(value) or isinstance(value, property)) and not value.__doc__:
        yield name


def has_own_docstring(cls: type) -> bool:
    made_by_dataclass = f"{cls.__name__}("
    return bool(cls.__dict__.get("__doc__")) and not str(cls.__doc__).startswith(made_by_dataclass)


def test_every_public_name_and_method_has_a_docstring() -> None:
    missing = [
        dotted
        for name in bgworker.__all__
        for dotted in undocumented(name, getattr(bgworker, name))
        if not name.startswith("__")
    ]
    assert not missing, "\n".join(missing)


def test_the_search_for_docstrings_finds_what_has_none() -> None:
    class Bare:
        def method(self) -> None: ...
        @property
        def value(self) -> int:
            return 1

        @staticmethod
        def static() -> None: ...

        @classmethod
        def made(cls) -> None: ...

        def _private(self) -> None: ...

    assert list(undocumented("Bare", Bare)) == [
        "Bare",
        "Bare.method",
        "Bare.value",
        "Bare.static",
        "Bare.made",
    ]

"""Every module imports only from its own room and the floors below, and leaves its neighbours'
internals alone.

Read from the source: imports inside functions and for type checkers count as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bgworker"

FLOORS = (
    ("model",),
    ("sinks",),
    ("delivery",),
    ("running",),
    ("history", "webhook", "park", "shell", "testing", "words"),
    ("web", "stores", "remote"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
"""The rooms, from the ground up. A module imports from its own room and from lower floors, never
from beside."""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS, 1) for room in rooms}

DOORS = {
    ("delivery.courier", "park.park"): "opened only where a sink's options name a park file",
    ("running.scheduler", "history.requests"): "opened only where a Scheduler listens to a history",
    ("running.scheduler", "remote.resume"): "opened only where a Scheduler resumes a history",
    ("running.scheduler", "remote.pool"): "opened only where a Scheduler is given an executor",
}
"""Ways up, each loaded when it is first used. The other doors, `__init__` and `sinks.specs`, name
modules as text."""

CONCRETE_SINKS = ("sinks.jsonl",)
"""What neither `delivery` nor `running` may import: a module that is one transport."""

ALLOWED_FROM_TOP = ("__version__",)
"""A constant of the whole package, with nothing behind it that could lead back up."""


def breaches(package: Path) -> list[str]:
    """Return one line, "module:line what", for every import in the package that the floors
    forbid."""
    modules = {dotted(path, package): path for path in sorted(package.rglob("*.py"))}
    found = [
        breach
        for module, path in modules.items()
        for breach in breaches_of(module, path, package, set(modules))
    ]
    # one line of code may import several names from the same wrong place
    return list(dict.fromkeys(found))


def dotted(path: Path, package: Path) -> str:
    """Return "sinks.jsonl" for sinks/jsonl.py, "sinks" for sinks/__init__.py, "__init__" for the
    top."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def breaches_of(module: str, path: Path, package: Path, modules: set[str]) -> Iterator[str]:
    if top(module) not in FLOOR:
        yield (f"{module}:1 is on no floor: place it in FLOORS of tests/test_layering.py, and in"
               " the design")
        return
    tree = ast.parse(path.read_bytes(), str(path))
    folder = list(path.parent.relative_to(package).parts)
    bound: set[str] = set()
    """Names under which this module holds modules of the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from absolute(module, node.lineno, alias.name, package.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from absolute(module, node.lineno, node.module or "", package.name)
        elif isinstance(node, ast.ImportFrom):
            for target, name, local in targets(node, folder, modules):
                if name is None:
                    bound.add(local)
                for wrong in judged(module, target, name):
                    yield f"{module}:{node.lineno} {wrong}"
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in bound
        ):
            if is_private(node.attr):
                yield f"{module}:{node.lineno} touches {node.value.id}.{node.attr}"


def top(module: str) -> str:
    return module.partition(".")[0]


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def absolute(module: str, line: int, imported: str, package: str) -> Iterator[str]:
    if top(imported) in ("bgworker", package):
        yield (f"{module}:{line} imports {imported} by its absolute name, which a vendored copy"
               " does not have")
    elif top(imported) not in sys.stdlib_module_names:
        yield f"{module}:{line} imports {imported}, which is neither relative nor standard library"


def targets(
    node: ast.ImportFrom, folder: list[str], modules: set[str]
) -> Iterator[tuple[str, str | None, str]]:
    """Yield (module imported from, name taken from it or None for the module itself, name
    bound)."""
    base = (
        folder[: len(folder) - (node.level - 1)] if node.level <= len(folder) + 1 else ["<outside>"]
    )
    origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
    for alias in node.names:
        inner = f"{origin}.{alias.name}".strip(".")
        if inner in modules:
            yield inner, None, alias.asname or alias.name
        else:
            yield origin or "__init__", alias.name, alias.asname or alias.name


def judged(module: str, target: str, name: str | None) -> Iterator[str]:
    """Yield what is wrong when ``module`` imports ``target``, or ``name`` from it."""
    if name is not None and is_private(name):
        yield f"touches {target}.{name}"
    if any(is_private(part) for part in target.split(".")):
        yield f"touches {target}"
    if target == "__init__" and name in ALLOWED_FROM_TOP:
        return
    source, goal = top(module), top(target)
    if goal not in FLOOR:
        yield f"imports {target}, which is on no floor"
    elif source == goal or (module, target) in DOORS:
        return
    elif FLOOR[goal] > FLOOR[source]:
        yield f"(floor {FLOOR[source]}) imports {target} (floor {FLOOR[goal]})"
    elif FLOOR[goal] == FLOOR[source]:
        yield f"imports {target}, a room beside its own"
    elif source in ("delivery", "running") and target in CONCRETE_SINKS:
        yield f"imports {target}: {source} knows no concrete sink"


# --- the package ---


def test_no_module_imports_from_a_higher_floor_or_touches_a_neighbours_internals() -> None:
    found = breaches(PACKAGE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "room", ["delivery", "history", "model", "park", "remote", "running", "shell",
             "sinks", "stores", "web", "webhook"])
def test_no_modules_of_a_room_import_one_another_in_a_circle(room: str) -> None:
    assert circles(PACKAGE, room) == []


def circles(package: Path, room: str) -> list[str]:
    """Return the modules of a room that lead back to themselves, by imports of whatever kind."""
    modules = {dotted(path, package): path for path in sorted(package.rglob("*.py"))}
    imported = {
        module: {
            target
            for node in ast.walk(ast.parse(path.read_bytes(), str(path)))
            if isinstance(node, ast.ImportFrom) and node.level
            for target, _, _ in targets(
                node, list(path.parent.relative_to(package).parts), set(modules)
            )
            if top(target) == room and target != module
        }
        for module, path in modules.items()
        if top(module) == room
    }
    return [module for module in imported if module in reached_from(module, imported)]


def reached_from(module: str, imported: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    ahead = [module]
    while ahead:
        further = imported.get(ahead.pop(), set()) - reached
        reached |= further
        ahead += further
    return reached


def test_a_circle_is_noticed_also_one_that_only_type_checkers_see(tmp_path: Path) -> None:
    package = tree_of(
        tmp_path,
        {
            "running/__init__.py": "",
            "running/task.py": "from .waits import Waits\n",
            "running/waits.py": "if TYPE_CHECKING:\n    from .loops import Loop\n",
            "running/loops.py": "def late():\n    from . import task\n",
            "running/pool.py": "from .task import Task\n",
        },
    )
    assert circles(package, "running") == ["running.loops", "running.task", "running.waits"]


# --- the tests ---


def imported_tests(folder: Path) -> list[str]:
    """Return one line, "path:line imports what", for every import of a test module in a folder of
    tests, helpers among them."""
    return [
        f"{path.relative_to(folder).as_posix()}:{node.lineno} imports {name}"
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_bytes(), str(path)))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        for name in [f"{getattr(node, 'module', None) or ''}.{alias.name}".strip(".")]
        if any(part.startswith("test_") for part in name.split("."))
    ]


def test_no_test_module_is_imported_what_several_need_is_in_a_module_without_tests() -> None:
    assert imported_tests(Path(__file__).resolve().parent) == []


def test_an_import_of_a_test_module_is_noticed_in_whatever_form(tmp_path: Path) -> None:
    for name, text in {
        "test_one.py": "from tests.support import SOON\nfrom tests.test_two import helper\n",
        "room/test_two.py": "import tests.test_one as one\nfrom . import test_three\n",
        "room/helpers.py": "def late():\n    from .test_two import test_this\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert imported_tests(tmp_path) == [
        "room/helpers.py:2 imports test_two.test_this",
        "room/test_two.py:1 imports tests.test_one",
        "room/test_two.py:2 imports test_three",
        "test_one.py:2 imports tests.test_two.helper",
    ]


# --- the checker itself ---


def tree_of(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "bgworker"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


def test_the_checker_accepts_what_the_floors_allow(tmp_path: Path) -> None:
    package = tree_of(
        tmp_path,
        {
            "__init__.py": "__version__ = '1'\nfrom .running.scheduler import Scheduler\n",
            "model/__init__.py": "",
            "model/events.py": "import json\n",
            "model/records.py": "from . import events\nevents.Event\nevents.__name__\n",
            "sinks/__init__.py": "from .base import Sink\n",
            "sinks/base.py": "from ..model.events import Event\n",
            "sinks/jsonl.py": "from .. import __version__\nfrom .base import Sink\nfrom . "
                              "import base\n",
            "delivery/__init__.py": "",
            "delivery/courier.py": "from ..sinks.base import Sink\ndef late():\n    from "
                                   "..park.park import Park\n",
            "park/__init__.py": "",
            "park/park.py": "from ..delivery import courier\n",
            "running/__init__.py": "",
            "running/scheduler.py": "from ..sinks import Sink, open_sink\nfrom . import task "
                                    "as t\nt.Task\n",
            "running/task.py": "from ..delivery.courier import Courier\n",
            "cli/__init__.py": "",
            "cli/run.py": "def main():\n    from .. import Scheduler\n",
            "__main__.py": "from .cli import main\n",
        },
    )
    assert breaches(package) == []


def test_the_checker_reports_each_kind_of_breach(tmp_path: Path) -> None:
    package = tree_of(
        tmp_path,
        {
            "__init__.py": "",
            "model/__init__.py": "",
            "model/events.py": "def late():\n    from ..running.task import Task\n",
            "model/errors.py": "if TYPE_CHECKING:\n    from ..running.task import Task\n",
            "model/wire.py": "import bgworker.model.events\nfrom bgworker import Task\n",
            "model/records.py": "import numpy\nfrom orjson import dumps\n",
            "sinks/__init__.py": "",
            "sinks/base.py": "",
            "sinks/jsonl.py": "from ..delivery.courier import Courier\nfrom .base import _inner\n",
            "delivery/__init__.py": "",
            "delivery/courier.py": "from ..sinks.jsonl import JsonlSink\nfrom ..sinks import "
                                   "jsonl\n",
            "delivery/registry.py": "from ..park.park import Park\n",
            "park/__init__.py": "",
            "park/park.py": "from ..shell import command\n",
            "shell/__init__.py": "",
            "shell/command.py": "from ..model import records as r, events\nr._secret\n"
                                "events._Text.x\n",
            "running/__init__.py": "",
            "running/task.py": "from ... import elsewhere\nfrom ..nowhere import a\nfrom "
                               "..delivery._inside import a\n",
            "cli/__init__.py": "",
            "history/__init__.py": "from .. import Scheduler\n",
            "mystery.py": "",
        },
    )
    assert sorted(breaches(package)) == sorted(
        [
            "model.events:2 (floor 1) imports running.task (floor 4)",
            "model.errors:2 (floor 1) imports running.task (floor 4)",
            "model.wire:1 imports bgworker.model.events by its absolute name, which a vendored "
            "copy does not have",
            "model.wire:2 imports bgworker by its absolute name, which a vendored copy does "
            "not have",
            "model.records:1 imports numpy, which is neither relative nor standard library",
            "model.records:2 imports orjson, which is neither relative nor standard library",
            "sinks.jsonl:1 (floor 2) imports delivery.courier (floor 3)",
            "sinks.jsonl:2 touches sinks.base._inner",
            "delivery.courier:1 imports sinks.jsonl: delivery knows no concrete sink",
            "delivery.courier:2 imports sinks.jsonl: delivery knows no concrete sink",
            "delivery.registry:1 (floor 3) imports park.park (floor 5)",
            "park.park:1 imports shell.command, a room beside its own",
            "shell.command:2 touches r._secret",
            "shell.command:3 touches events._Text",
            "running.task:1 imports <outside>, which is on no floor",
            "running.task:2 imports nowhere, which is on no floor",
            "running.task:3 touches delivery._inside",
            "history:1 (floor 5) imports __init__ (floor 7)",
            "mystery:1 is on no floor: place it in FLOORS of tests/test_layering.py, and in "
            "the design",
        ]
    )

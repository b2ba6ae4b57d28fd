"""Every module imports only from the floors below it, and leaves its neighbours' internals alone.

Read from the source, so that imports inside functions count as well; only ``if TYPE_CHECKING:`` blocks do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "bgworker"

FLOORS = (
    (1, ("enums", "events", "errors", "ids", "text", "files", "checks", "health")),
    (2, ("wire", "records", "linefile", "schema", "connections", "retention")),
    (3, ("delivery", "sinks")),
    (4, ("task", "context", "capture", "source", "memory", "waits", "pool", "roster", "deadlines", "coroutines")),
    (5, ("scheduler", "history", "questions", "answers", "command", "child", "pipes", "testing")),
    (6, ("__main__", "cli")),
    (7, ("__init__",)),
)
"""Bottom to top. A folder stands for all that is in it. Modules of one floor may use each other's public names."""

FLOOR = {module: floor for floor, modules in FLOORS for module in modules}

NEUTRAL_SINKS = ("sinks", "sinks.base")
"""What `scheduler` may import of the sinks: the modules that are not one transport."""

ALLOWED_FROM_TOP = ("__version__",)
"""A constant of the whole package, with nothing behind it that could lead back up."""


def breaches(package: Path) -> list[str]:
    """Return one line, "module:line what", for every import in the package that the floors forbid."""
    modules = {dotted(path, package): path for path in sorted(package.rglob("*.py"))}
    found = [breach for module, path in modules.items() for breach in breaches_of(module, path, package, set(modules))]
    return list(dict.fromkeys(found))  # one line of code may import several names from the same wrong place


def dotted(path: Path, package: Path) -> str:
    """Return "sinks.jsonl" for sinks/jsonl.py, "sinks" for sinks/__init__.py, "__init__" for the top."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def breaches_of(module: str, path: Path, package: Path, modules: set[str]) -> Iterator[str]:
    if top(module) not in FLOOR:
        yield f"{module}:1 is on no floor: place it in FLOORS of tests/test_layering.py, and in the design"
        return
    tree = without_type_checking(ast.parse(path.read_bytes(), str(path)))
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
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            if is_private(node.attr):
                yield f"{module}:{node.lineno} touches {node.value.id}.{node.attr}"


def top(module: str) -> str:
    return module.partition(".")[0]


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def absolute(module: str, line: int, imported: str, package: str) -> Iterator[str]:
    if top(imported) in ("bgworker", package):
        yield f"{module}:{line} imports {imported} by its absolute name, which a vendored copy does not have"
    elif top(imported) not in sys.stdlib_module_names:
        yield f"{module}:{line} imports {imported}, which is neither relative nor standard library"


def targets(node: ast.ImportFrom, folder: list[str], modules: set[str]) -> Iterator[tuple[str, str | None, str]]:
    """Yield (module imported from, name taken from it or None for the module itself, name bound)."""
    base = folder[:len(folder) - (node.level - 1)] if node.level <= len(folder) + 1 else ["<outside>"]
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
    elif FLOOR[goal] > FLOOR[source]:
        yield f"(floor {FLOOR[source]}) imports {target} (floor {FLOOR[goal]})"
    elif source == "sinks" and goal == "delivery":
        yield f"imports {target}: sinks know nothing of delivery"
    elif source == "delivery" and goal == "sinks" and target != "sinks.base":
        yield f"imports {target}: delivery knows only sinks.base"
    elif source == "scheduler" and goal == "sinks" and is_concrete(target, name):
        yield f"imports {target}{'.' + name if name else ''}: the scheduler knows no concrete sink"


def is_concrete(target: str, name: str | None) -> bool:
    """True for a module with one transport, and for its class where ``sinks`` passes that on."""
    passed_on = name is not None and name.endswith("Sink") and name not in ("Sink", "HookSink")
    return target not in NEUTRAL_SINKS or passed_on


def without_type_checking(tree: ast.Module) -> ast.Module:
    """Return the tree with every ``if TYPE_CHECKING:`` replaced by what stands in its ``else``."""

    class Strip(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            self.generic_visit(node)
            flag = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", None)
            return node.orelse if flag == "TYPE_CHECKING" else node

    stripped = Strip().visit(tree)
    assert isinstance(stripped, ast.Module)
    return stripped


# --- the package --------------------------------------------------------------------------------------------------------


def test_no_module_imports_from_a_higher_floor_or_touches_a_neighbours_internals() -> None:
    found = breaches(PACKAGE)
    assert not found, "\n".join(found)


# --- the checker itself -------------------------------------------------------------------------------------------------


def tree_of(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "bgworker"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


def test_the_checker_accepts_what_the_floors_allow(tmp_path: Path) -> None:
    package = tree_of(tmp_path, {
        "__init__.py": "__version__ = '1'\nfrom .scheduler import Scheduler\n",
        "events.py": "import json\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .task import Task\n",
        "records.py": "from . import events\nevents.Event\nevents.__name__\n",
        "wire.py": "from .records import Record\n",
        "sinks/__init__.py": "from .base import Sink\n",
        "sinks/base.py": "from ..events import Event\n",
        "sinks/sqlite.py": "from .. import __version__\nfrom .base import Sink\nfrom . import base\n",
        "delivery/__init__.py": "",
        "delivery/courier.py": "from ..sinks.base import Sink\nfrom .retry import Policy\n",
        "delivery/retry.py": "",
        "task.py": "from .delivery.courier import Courier\n",
        "scheduler.py": "from .sinks import Sink, open_sink\nfrom .task import Task\nfrom . import task as t\nt.Task\n",
        "cli/__init__.py": "",
        "cli/run.py": "def main():\n    from ..scheduler import Scheduler\n",
        "__main__.py": "from .cli import main\n",
    })
    assert breaches(package) == []


def test_the_checker_reports_each_kind_of_breach(tmp_path: Path) -> None:
    package = tree_of(tmp_path, {
        "__init__.py": "",
        "events.py": "def late():\n    from .task import Task\n",
        "errors.py": "if TYPE_CHECKING:\n    from .task import Task\nelse:\n    from . import task\n",
        "wire.py": "import bgworker.events\nfrom bgworker import errors\n",
        "records.py": "import numpy\nfrom orjson import dumps\n",
        "sinks/__init__.py": "",
        "sinks/base.py": "",
        "sinks/jsonl.py": "from ..delivery.courier import Courier\nfrom .. import delivery\nfrom .base import _inner\n",
        "delivery/__init__.py": "",
        "delivery/courier.py": "from ..sinks.jsonl import JsonlSink\nfrom ..sinks import Sink\nfrom ..sinks import jsonl\n",
        "task.py": "from . import records as r, events\nr._secret\nevents._Text.x\n",
        "capture.py": "from .. import elsewhere\nfrom .nowhere import a\nfrom .delivery._inside import a\n",
        "scheduler.py": "from .sinks import JsonlSink\nfrom .sinks.jsonl import x\nfrom .sinks import jsonl\n",
        "cli/__init__.py": "from .. import Scheduler\n",
        "mystery.py": "",
    })
    assert sorted(breaches(package)) == sorted([
        "events:2 (floor 1) imports task (floor 4)",
        "errors:4 (floor 1) imports task (floor 4)",
        "wire:1 imports bgworker.events by its absolute name, which a vendored copy does not have",
        "wire:2 imports bgworker by its absolute name, which a vendored copy does not have",
        "records:1 imports numpy, which is neither relative nor standard library",
        "records:2 imports orjson, which is neither relative nor standard library",
        "sinks.jsonl:1 imports delivery.courier: sinks know nothing of delivery",
        "sinks.jsonl:2 imports delivery: sinks know nothing of delivery",
        "sinks.jsonl:3 touches sinks.base._inner",
        "delivery.courier:1 imports sinks.jsonl: delivery knows only sinks.base",
        "delivery.courier:2 imports sinks: delivery knows only sinks.base",
        "delivery.courier:3 imports sinks.jsonl: delivery knows only sinks.base",
        "task:2 touches r._secret",
        "task:3 touches events._Text",
        "capture:1 imports <outside>, which is on no floor",
        "capture:2 imports nowhere, which is on no floor",
        "capture:3 touches delivery._inside",
        "scheduler:1 imports sinks.JsonlSink: the scheduler knows no concrete sink",
        "scheduler:2 imports sinks.jsonl.x: the scheduler knows no concrete sink",
        "scheduler:3 imports sinks.jsonl: the scheduler knows no concrete sink",
        "cli:1 (floor 6) imports __init__ (floor 7)",
        "mystery:1 is on no floor: place it in FLOORS of tests/test_layering.py, and in the design",
    ])

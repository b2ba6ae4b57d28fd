#!/usr/bin/env python3
"""Copy the bgworker package into another project, under any name, and prove that the copy works.

    python3 tools/vendor.py path/to/project                 path/to/project/bgworker/
    python3 tools/vendor.py path/to/project --name _bg      path/to/project/_bg/
    python3 tools/vendor.py path/to/project --zip           path/to/project/bgworker.zip
    python3 tools/vendor.py path/to/project --without history,webhook,park,shell,testing,web,cli
                                                            the core alone

The parts (those, stores and remote) may each be left out; without history there is no web and there
are no stores, either. The copy then lacks their files and their public names, and answers whoever
asks for one of them with an error that names the part.

The copy is verified before it takes its place, so that a broken one never replaces a good one: all
of its imports are relative or from the standard library, and in a fresh interpreter without
site-packages it runs a task, alone and beside the original. An update replaces the folder as a
whole (what was added to it by hand goes) by renaming; something that is no copy of bgworker is
never replaced. Nothing but the package is left behind.

Exit code: 0 done, 1 the copy failed its verification, 2 refused.
"""

from __future__ import annotations

import argparse
import ast
import keyword
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NoReturn

SOURCE = Path(__file__).resolve().parent.parent / "bgworker"
PARTS = {
    "history": ("history",),
    "webhook": ("webhook",),
    "park": ("park",),
    "shell": ("shell",),
    "testing": ("testing.py",),
    "web": ("web",),
    "stores": ("stores",),
    "remote": ("remote",),
    "cli": ("cli", "__main__.py"),
}
"""Part -> its folders and files in the package. What is not here is the core."""

NEEDED = {"web": "history", "stores": "history"}
"""Part -> the part that it cannot do without, and is left out with."""

# the line of __init__.py that tells a copy what it lacks
NOTHING_LEFT_OUT = "_LEFT_OUT: tuple[str, ...] = ()"
MARK = b"class BgworkerError("  # stands in model/errors.py of every copy, whatever its name

PROOF = """
import importlib, pkgutil, sys
entry, name, beside = sys.argv[1:]

def run_a_task(package):
    with package.Scheduler(1) as pool:
        result = pool.submit(divmod, 7, 2).result(timeout=30)
    if result != (3, 1):
        sys.exit(f"a task of {package.__name__} returned {result!r} instead of (3, 1)")

sys.path.insert(0, entry)
copy = importlib.import_module(name)
if not copy.__file__.startswith(entry):
    sys.exit(f"import {name} found {copy.__file__}")
for public in copy.__all__:
    getattr(copy, public)
for module in pkgutil.walk_packages(copy.__path__, name + "."):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
run_a_task(copy)
if name != "bgworker":
    strays = [module for module in sys.modules if module.partition(".")[0] == "bgworker"]
    if strays:
        sys.exit(f"the copy imported the original: {', '.join(strays)}")
    sys.path.append(beside)
    original = importlib.import_module("bgworker")
    if original.Scheduler is copy.Scheduler:
        sys.exit("the copy and the original share their Scheduler")
    run_a_task(original)
    run_a_task(copy)
print(copy.__version__)
"""
"""Run in a fresh interpreter: the copy alone, every module of it, then beside the original."""


class Refused(Exception):
    """What was asked for cannot be done; nothing was changed."""


class Unfit(Exception):
    """The copy failed its verification; nothing was changed."""


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def main(argv: list[str]) -> int:
    try:
        options = parser().parse_args(argv)
        name = checked_name(options.name)
        left_out = checked_parts(options.without)
        print(vendor(Path(options.dest), name, left_out, zipped=options.zip))
    except (Refused, OSError) as error:
        print(f"vendor.py: {error}", file=sys.stderr)
        return 2
    except Unfit as error:
        print(f"vendor.py: the copy was not put in place: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    made = OneLineParser(
        description="Copy the bgworker package into another project and verify the copy."
    )
    made.add_argument(
        "dest", metavar="DEST", help="folder that gets the copy; made if it is missing"
    )
    made.add_argument("--name", default="bgworker", help="name of the copy (default: bgworker)")
    made.add_argument("--without", metavar="PART,…", default="",
                      help=f"leave these parts out (of {', '.join(PARTS)})")
    made.add_argument(
        "--zip", action="store_true", help="make DEST/NAME.zip instead of the folder DEST/NAME"
    )
    return made


def checked_name(name: str) -> str:
    """Return the name when a package can be called so without hiding another; raise Refused
    otherwise."""
    if not name.isidentifier():
        raise Refused(f"expected --name to be one identifier without dots, got {name!r}")
    if keyword.iskeyword(name):
        raise Refused(f"expected --name to be no keyword of Python, got {name!r}")
    if name in sys.stdlib_module_names:
        raise Refused(f"expected --name to hide no module of the standard library, got {name!r}")
    return name


def checked_parts(listed: str) -> tuple[str, ...]:
    """Return the parts to leave out, sorted; raise Refused for a name that is none."""
    parts = [part.strip() for part in listed.split(",") if part.strip()]
    for part in parts:
        if part not in PARTS:
            raise Refused(f"expected --without to name parts (of {', '.join(PARTS)}), got {part!r}")
    parts += [part for part, needed in NEEDED.items() if needed in parts]
    return tuple(sorted(set(parts)))


def vendor(dest: Path, name: str, left_out: tuple[str, ...] = (), *, zipped: bool) -> str:
    """Copy, verify, put in place; return the line that says so."""
    target = dest.resolve() / (f"{name}.zip" if zipped else name)
    is_copy = is_zipped_copy if zipped else is_copied_folder
    if target == SOURCE or SOURCE in target.parents:
        raise Refused(f"{target} is the original: name another folder, or another name with --name")
    is_update = os.path.lexists(target)
    if is_update and not is_copy(target):
        raise Refused(
            f"{target} exists and is no copy of bgworker: move it away, or take another name "
            "with --name"
        )

    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as folder:
        # same disk: rename works
        plain = Path(folder) / "plain" / name
        copy_package(plain, left_out)
        made = Path(folder) / target.name
        if zipped:
            pack(plain, made, name)
        else:
            plain.rename(made)
        version = verify(made if zipped else made.parent, name)
        replace(made, target, aside=Path(folder) / "replaced")
    lacking = f" without {', '.join(left_out)}" if left_out else ""
    return (
        f"{'updated' if is_update else 'vendored'} bgworker {version}{lacking} as {name}: {target}"
    )


def copy_package(made: Path, left_out: tuple[str, ...]) -> None:
    """Copy the package without the parts named, and note in the copy what it lacks."""
    shutil.copytree(SOURCE, made, ignore=shutil.ignore_patterns("__pycache__", "*.py[co]", ".*"))
    for entry in [entry for part in left_out for entry in PARTS[part]]:
        path = made / entry
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left_out:
        front = made / "__init__.py"
        text = front.read_text(encoding="utf-8")
        if NOTHING_LEFT_OUT not in text:
            raise Unfit(
                f"__init__.py lacks the line {NOTHING_LEFT_OUT!r}, which is to say what the "
                "copy lacks"
            )
        noted = text.replace(NOTHING_LEFT_OUT, f"_LEFT_OUT: tuple[str, ...] = {left_out!r}")
        front.write_text(noted, encoding="utf-8", newline="\n")


def pack(package: Path, archive: Path, name: str) -> None:
    """Write the package as a zip file that zipimport reads; the same source makes the same
    bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        for path in sorted(package.rglob("*")):
            parts = path.relative_to(package).parts
            if (
                path.is_file()
                and path.suffix not in (".pyc", ".pyo")
                and not any(p.startswith(".") for p in parts)
            ):
                entry = zipfile.ZipInfo("/".join((name, *parts)))
                entry.external_attr = 0o644 << 16
                writer.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)


def replace(made: Path, target: Path, *, aside: Path) -> None:
    """Rename what was made to its place; if that fails, what stood there stands there again."""
    if not target.is_dir():
        os.replace(made, target)
        return
    os.rename(target, aside)  # a folder that is not empty cannot be replaced in one step
    try:
        os.rename(made, target)
    except BaseException:
        os.rename(aside, target)
        raise


def is_copied_folder(path: Path) -> bool:
    errors = path / "model" / "errors.py"
    return (
        path.is_dir() and not path.is_symlink() and errors.is_file() and MARK in errors.read_bytes()
    )


def is_zipped_copy(path: Path) -> bool:
    if path.is_symlink() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as reader:
        marks = [
            entry
            for entry in reader.namelist()
            if entry.count("/") == 2 and entry.endswith("/model/errors.py")
        ]
        return any(MARK in reader.read(entry) for entry in marks)


# --- verification ---


def verify(entry: Path, name: str) -> str:
    """Return the version of the package ``name`` under ``entry`` (a folder or a zip file); raise
    Unfit if it fails."""
    foreign = foreign_imports(SOURCE)
    if foreign:
        raise Unfit("; ".join(foreign))
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("BGWORKER_")
    }
    proof = [sys.executable, "-I", "-S", "-B", "-c", PROOF, str(entry), name, str(SOURCE.parent)]
    try:
        done = subprocess.run(proof, env=environment, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise Unfit(f"it ran for {error.timeout:.0f} s without an end") from error
    if done.returncode:
        raise Unfit(done.stderr.strip() or f"the interpreter ended with {done.returncode}")
    return done.stdout.strip()


def foreign_imports(package: Path) -> list[str]:
    """Return a line for each import, on any level of the code, that is neither relative nor
    standard library."""
    found = []
    for path in sorted(package.rglob("*.py")):
        depth = len(path.relative_to(package).parts)
        for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            elif isinstance(node, ast.ImportFrom) and node.level > depth:
                names = ["." * node.level + (node.module or "")]
            else:
                continue
            found += [
                f"{path.relative_to(package)}:{node.lineno} imports {imported}, which is "
                "outside the package and "
                "the standard library"
                for imported in names
                if imported.partition(".")[0] not in sys.stdlib_module_names
            ]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

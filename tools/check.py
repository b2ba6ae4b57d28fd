#!/usr/bin/env python3
"""Set up a virtual environment and run every check that CI runs; ends with pytest's summary.

    python3 tools/check.py                      all of it
    python3 tools/check.py --fast               without the tests marked slow
    python3 tools/check.py -- -k retry -x       what follows -- goes to pytest

Needs Python 3.10 or newer and, the first time, a network. The environment is `.venv` in the repository's root, made
again when the interpreter or `pyproject.toml` has changed. Every check runs even if an earlier one failed.

With CI in the environment, as CI services set it, the extra `integration` is installed too, for the tests against other
people's libraries; elsewhere those tests are skipped unless the libraries are there.

Exit code: 0 all passed, 1 a check failed, 2 the environment could not be set up.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "made-by-tools-check"
OLDEST = (3, 10)

LEAKS = ("PYTHON", "PYTEST_", "MYPY", "BGWORKER_", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__",
         "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
"""Beginnings of environment variables that would let the caller's set-up decide what is installed or tested."""

PARSE = "import pathlib, sys\nfor path in sys.argv[1:]: compile(pathlib.Path(path).read_bytes(), path, 'exec')"


class SetupError(Exception):
    """The environment cannot be set up; the message says what to do."""


def main(argv: list[str]) -> int:
    own, _, for_pytest = partition(argv, "--")
    options = parser().parse_args(own)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LEAKS)}
    try:
        version = version_of(options.python, environment)
        if options.no_install:
            python = options.python
        else:
            python = prepared_venv(options.python, version, environment)
    except SetupError as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 2
    return run_checks(python, version, environment, fast=options.fast, for_pytest=for_pytest)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Run every check of the project. What follows -- goes to pytest.")
    made.add_argument("--fast", action="store_true", help="skip the tests marked slow")
    made.add_argument("--python", metavar="PATH", default=sys.executable, help="interpreter to use (default: this one)")
    made.add_argument("--no-install", action="store_true",
                      help="use the interpreter as it is; it must have pytest, hypothesis and mypy")
    return made


def partition(argv: list[str], separator: str) -> tuple[list[str], list[str], list[str]]:
    if separator not in argv:
        return argv, [], []
    at = argv.index(separator)
    return argv[:at], [separator], argv[at + 1:]


# --- the environment ---------------------------------------------------------------------------------------------------


def version_of(python: str, environment: dict[str, str]) -> str:
    """Return the interpreter's version as "3.11.7"; raise SetupError when it does not run or is too old."""
    asked = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
    try:
        version = subprocess.run([python, "-I", "-c", asked], env=environment, check=True, stdout=subprocess.PIPE,
                                 universal_newlines=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"expected --python to name a Python interpreter, got {python!r}: {error}") from error
    if minor(version) < OLDEST:
        raise SetupError("expected Python {}.{} or newer, got {} ({}); name another one with --python PATH"
                         .format(*OLDEST, version, python))
    return version


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def prepared_venv(python: str, version: str, environment: dict[str, str]) -> str:
    """Return the interpreter of a `.venv` that has the project and its tools; make or renew it when it must be."""
    inside = str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    project = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    extras = extras_for(environment)
    # an editable install knows the root's path
    wanted = f"python {version}\nroot {ROOT}\npyproject {project}\nextras {extras}\n"
    found = STAMP.read_text(encoding="utf-8") if STAMP.exists() else None
    if found == wanted and os.path.exists(inside):
        return inside
    if VENV.exists() and found is None:
        raise SetupError(f"{VENV} exists and was not made by this tool: move it away, or run its own interpreter on this "
                         "tool with --no-install")

    begun = time.monotonic()
    create_venv(python, environment)
    STAMP.write_text("unfinished\n", encoding="utf-8")
    install(inside, extras, environment)
    STAMP.write_text(wanted, encoding="utf-8")
    report("ok", "install", begun)
    return inside


def extras_for(environment: dict[str, str]) -> str:
    return "dev,integration" if environment.get("CI", "").lower() not in ("", "0", "false") else "dev"


def create_venv(python: str, environment: dict[str, str]) -> None:
    made = subprocess.run([python, "-I", "-m", "venv", "--clear", str(VENV)], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    if made.returncode:
        if VENV.exists():
            STAMP.write_text("unfinished\n", encoding="utf-8")  # half a venv is this tool's to clear next time
        raise SetupError(f"{made.stdout}\n{python} could not create {VENV}: install Python's venv module "
                         "(Debian and Ubuntu: apt install python3-venv), name another interpreter with --python PATH, "
                         "or use one that has pytest, hypothesis and mypy with --no-install")


def install(inside: str, extras: str, environment: dict[str, str]) -> None:
    done = subprocess.run([inside, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input",
                           "--editable", f".[{extras}]"], cwd=str(ROOT), env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode:
        raise SetupError(f"{done.stdout}\npip could not install the project with its extras {extras}: is there a "
                         "network, or a mirror in pip's settings? Without one, use an interpreter that has pytest, "
                         "hypothesis and mypy with --no-install")


# --- the checks ---------------------------------------------------------------------------------------------------------


def run_checks(python: str, version: str, environment: dict[str, str], *, fast: bool, for_pytest: list[str]) -> int:
    """Run all checks, pytest last so that the output ends with its summary; return the exit code."""
    mypy = [python, "-m", "mypy", "--strict"]
    checks = [("mypy", [*mypy, "bgworker", "tests/typing"])]
    if minor(version) != OLDEST:
        oldest = ".".join(map(str, OLDEST))
        checks.append((f"mypy for {oldest}", [*mypy, "--python-version", oldest, "bgworker"]))
    checks.append(("syntax of tools", [python, "-I", "-W", "error", "-c", PARSE,
                                       *sorted(map(str, (ROOT / "tools").glob("*.py")))]))
    passed = [passes(name, command, environment) for name, command in checks]
    with tempfile.TemporaryDirectory() as folder:
        passed.append(passes("vendoring", [python, "tools/vendor.py", folder, "--name", "_bg"], environment))

    command = [python, "-m", "pytest", "-W", "error", *(["-m", "not slow"] if fast else []), *for_pytest]
    print("      pytest", flush=True)
    tested = subprocess.run(command, cwd=str(ROOT), env=environment)
    return 0 if all(passed) and tested.returncode == 0 else 1


def passes(name: str, command: list[str], environment: dict[str, str]) -> bool:
    """Run one check and report it in a line; show what it said only if it failed."""
    begun = time.monotonic()
    done = subprocess.run(command, cwd=str(ROOT), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    report("FAIL" if done.returncode else "ok", name, begun)
    if done.returncode:
        sys.stdout.write(done.stdout.decode("utf-8", "replace"))
        sys.stdout.flush()
    return done.returncode == 0


def report(outcome: str, name: str, begun: float) -> None:
    print(f"{outcome:<5} {name:<16} {time.monotonic() - begun:5.1f} s", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

#!/usr/bin/env python3
"""Set up a virtual environment and run every check that CI runs; ends with pytest's summary.

    python3 tools/check.py                      all of it, with this interpreter
    python3 tools/check.py --fast               without the tests marked slow
    python3 tools/check.py --python python3.14  with another interpreter; may be given twice or more
    python3 tools/check.py -- -k retry -x       what follows -- goes to pytest

Needs Python 3.10 or newer and, the first time, a network. The environment is `.venv` in the
repository's root (`.venv-3.14` for another interpreter), made again when the interpreter or
`pyproject.toml` has changed. In a repository that cannot be written to, it is made in a temporary
folder each time. Every check runs even if an earlier one failed.

Where several interpreters are named, the last one runs all tests, the others those that are not
marked slow. With two cores or more, the tests of the last one run beside everything else; they are
shown at the end all the same. With CI in the environment, as CI services set it, two things differ.
The interpreters are the oldest and the newest of this machine, unless --python names others. And
the extra `integration` is installed too, for the tests against other people's libraries, and for
root on Debian a browser and PostgreSQL; elsewhere those tests are skipped unless these are there.

Exit code: 0 all passed, 1 a check failed, 2 the environment could not be set up.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 10)
NEWEST = (3, 15)

HANGS = 30 * 60.0
"""Seconds after which a check counts as hanging: it is killed, and has failed."""

INITDB = "/usr/lib/postgresql/*/bin/initdb"
"""Where Debian has what makes a cluster of PostgreSQL, which is not on PATH."""

LEAKS = ("PYTHON", "PYTEST_", "MYPY", "BGWORKER_", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__",
         "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
"""Beginnings of environment variables that would let the caller's set-up decide what is installed
or tested."""

ASK_VERSION = """
import sys, sysconfig
free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
print("%d.%d.%d" % sys.version_info[:3] + ("t" if free_threaded else ""))
"""
WIDTH = """
import pathlib, sys
long = [
    f"{path}:{number}: expected at most 100 columns, got {len(line)}; fold the line"
    for folder in ("bgworker", "tests", "tools")
    for path in sorted(pathlib.Path(folder).rglob("*.py"))
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    if len(line) > 100
]
sys.exit("\\n".join(long) or 0)
"""
PARSE = """
import pathlib, sys
for path in sys.argv[1:]:
    compile(pathlib.Path(path).read_bytes(), path, "exec")
"""


class SetupError(Exception):
    """The environment cannot be set up; the message says what to do."""


class Interpreter:
    """A Python to run checks with: its command and its version, such as "3.11.7"."""

    def __init__(self, command: str, version: str) -> None:
        self.command = command
        self.version = version
        self.minor = tuple(int(part) for part in version.rstrip("t").split(".")[:2])


def main(argv: list[str]) -> int:
    own, for_pytest = split_at(argv, "--")
    options = parser().parse_args(own)
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(LEAKS)}
    with tempfile.TemporaryDirectory(prefix="bgworker-check-") as scratch:
        if not os.access(str(ROOT), os.W_OK):
            environment["MYPY_CACHE_DIR"] = os.path.join(scratch, "mypy")
            environment["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(scratch, "hypothesis")
            for_pytest = ["-p", "no:cacheprovider", *for_pytest]
        try:
            found = interpreters(options.python, environment)
            if not options.no_install:
                found = prepared_venvs(found, Path(scratch), environment)
        except SetupError as error:
            print(f"check.py: {error}", file=sys.stderr)
            return 2
        return run_checks(found, Path(scratch), environment, fast=options.fast,
                          for_pytest=for_pytest)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description="Run every check of the project. What follows -- goes to pytest.")
    made.add_argument("--fast", action="store_true", help="skip the tests marked slow")
    made.add_argument("--python", metavar="PATH", action="append",
                      help="interpreter to use (default: this one; with CI set, the oldest and the"
                           " newest here); the last one given runs the slow tests, too")
    made.add_argument("--no-install", action="store_true",
                      help="use the interpreter as it is; it must have pytest, hypothesis and mypy")
    return made


def split_at(argv: list[str], separator: str) -> tuple[list[str], list[str]]:
    if separator not in argv:
        return argv, []
    at = argv.index(separator)
    return argv[:at], argv[at + 1:]


# --- interpreters ---


def interpreters(named: list[str] | None, environment: dict[str, str]) -> list[Interpreter]:
    """Return the interpreters to run the checks with: those named, else this one.

    On CI those are the oldest and the newest of the machine.
    """
    if named or not on_ci(environment):
        return [interpreter(command, environment) for command in named or [sys.executable]]
    here = [interpreter(sys.executable, environment)]
    for command in candidates(environment):
        try:
            python = interpreter(command, environment)
        except SetupError:
            continue  # a stub of pyenv for a version that is not switched on, or one too old
        if can_make_venvs(python, environment):
            here.append(python)
    oldest = min(here, key=lambda python: python.minor)
    newest = max(here, key=lambda python: python.minor)
    return [oldest, newest] if oldest.minor != newest.minor else [oldest]


def candidates(environment: dict[str, str]) -> list[str]:
    """Return the commands that may be interpreters: those on PATH, and pyenv's."""
    names = ["python{}.{}".format(OLDEST[0], minor) for minor in range(OLDEST[1], NEWEST[1] + 1)]
    found = [shutil.which(name, path=environment.get("PATH")) for name in names]
    pyenv = environment.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    return [path for path in found if path] + sorted(glob.glob(f"{pyenv}/versions/*/bin/python"))


def interpreter(command: str, environment: dict[str, str]) -> Interpreter:
    """Ask an interpreter for its version; raise SetupError when it does not run or is too old."""
    try:
        version = subprocess.run([command, "-I", "-c", ASK_VERSION], env=environment, check=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 universal_newlines=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError("expected --python to name a Python interpreter,"
                         f" got {command!r}: {error}") from error
    python = Interpreter(command, version)
    if python.minor < OLDEST:
        raise SetupError("expected Python {}.{} or newer, got {} ({});"
                         " name another one with --python PATH"
                         .format(*OLDEST, version, command))
    return python


def own_version() -> str:
    free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
    return "{}.{}.{}".format(*sys.version_info[:3]) + ("t" if free_threaded else "")


def can_make_venvs(python: Interpreter, environment: dict[str, str]) -> bool:
    return subprocess.run([python.command, "-I", "-c", "import ensurepip, venv"], env=environment,
                          stderr=subprocess.DEVNULL).returncode == 0


def on_ci(environment: dict[str, str]) -> bool:
    return environment.get("CI", "").lower() not in ("", "0", "false")


# --- the environment ---


def prepared_venvs(pythons: list[Interpreter], scratch: Path,
                   environment: dict[str, str]) -> list[Interpreter]:
    """Prepare the environments side by side, and on CI the servers, too: each downloads much."""
    with ThreadPoolExecutor() as pool:
        servers = pool.submit(install_servers, environment) if on_ci(environment) else None
        prepared = list(pool.map(lambda one: prepared_venv(one, scratch, environment), pythons))
        if servers is not None:
            servers.result()
    return prepared


def prepared_venv(python: Interpreter, scratch: Path, environment: dict[str, str]) -> Interpreter:
    """Return the interpreter of a virtual environment that has the project and its tools.

    Makes or renews the environment when it must be.
    """
    venv = venv_for(python, scratch)
    stamp = venv / "made-by-tools-check"
    inside = Interpreter(str(venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")),
                         python.version)
    project = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    extras = "dev,integration" if on_ci(environment) else "dev"
    # an environment knows the root's path
    wanted = f"python {python.version}\nroot {ROOT}\npyproject {project}\nextras {extras}\n"
    found = stamp.read_text(encoding="utf-8") if stamp.exists() else None
    if found == wanted and os.path.exists(inside.command):
        return inside
    if venv.exists() and found is None:
        raise SetupError(f"{venv} exists and was not made by this tool: move it away, or run its"
                         " own interpreter on this tool with --no-install")

    begun = time.monotonic()
    create_venv(python, venv, stamp, environment)
    stamp.write_text("unfinished\n", encoding="utf-8")
    install(inside, extras, environment)
    stamp.write_text(wanted, encoding="utf-8")
    report("ok", "install", python, begun)
    return inside


def venv_for(python: Interpreter, scratch: Path) -> Path:
    """Return where the environment of this interpreter is: each version has its own."""
    name = ".venv" if python.version == own_version() else ".venv-{}.{}".format(*python.minor)
    if python.version.endswith("t"):
        name += "t"  # without the GIL
    return (ROOT if os.access(str(ROOT), os.W_OK) else scratch) / name


def create_venv(python: Interpreter, venv: Path, stamp: Path, environment: dict[str, str]) -> None:
    if not can_make_venvs(python, environment):
        raise SetupError("{} has no ensurepip, so it cannot make a virtual environment: install it"
                         " (Debian and Ubuntu: apt install python{}.{}-venv), name another"
                         " interpreter with --python PATH, or one that has pytest, hypothesis and"
                         " mypy with --no-install".format(python.command, *python.minor))
    made = subprocess.run([python.command, "-I", "-m", "venv", "--clear", str(venv)],
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode:
        if venv.exists():
            # half a venv is this tool's to clear next time
            stamp.write_text("unfinished\n", encoding="utf-8")
        said = made.stdout.decode("utf-8", "replace").strip()
        raise SetupError(f"{python.command} could not create {venv}: {said}")


def install(inside: Interpreter, extras: str, environment: dict[str, str]) -> None:
    """Install what the extras name, and nothing that would hide the sources in the repository.

    The project itself is built and installed for that, and taken out again. (An editable install
    writes the root's path into a file that Python before 3.13 reads in the locale's encoding.)
    """
    pip = [inside.command, "-I", "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for arguments in (
        ["install", "--no-input", f".[{extras}]"],
        ["uninstall", "--yes", "bgworker"],
    ):
        done = subprocess.run([*pip, *arguments], cwd=str(ROOT), env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            said = done.stdout.decode("utf-8", "replace")
            raise SetupError(f"{said}\npip could not install the project with its extras {extras}:"
                             " is there a network, or a mirror in pip's settings? Without one, use"
                             " an interpreter that has pytest, hypothesis and mypy with"
                             " --no-install")


def install_servers(environment: dict[str, str]) -> None:
    """Install a browser and PostgreSQL for the tests that need them, where we may and one is
    missing.

    Without them those tests are skipped, with the reason; so it is no error that they cannot be
    had.
    """
    path = environment.get("PATH")
    apt = shutil.which("apt-get", path=path)
    wanted = []
    if not (shutil.which("chromium", path=path) and shutil.which("chromedriver", path=path)):
        wanted += ["chromium", "chromium-driver"]
    if not (shutil.which("initdb", path=path) or glob.glob(INITDB)):
        wanted += ["postgresql"]
    if not wanted or apt is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    quietly = {**environment, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", *wanted]):
        done = subprocess.run([apt, "-q", *arguments], env=quietly, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        if done.returncode:
            said = done.stdout.decode("utf-8", "replace").strip().splitlines()[-1:]
            print(f"      no {' '.join(wanted)}: apt-get {arguments[0]} ended with "
                  f"{done.returncode} ({' '.join(said)}); the tests that need one are skipped",
                  flush=True)
            return


# --- the checks ---


def run_checks(pythons: list[Interpreter], scratch: Path, environment: dict[str, str], *,
               fast: bool, for_pytest: list[str]) -> int:
    """Run all checks, and show the tests of the last interpreter last, so that the output ends with
    pytest's summary; return the exit code.

    Where there are cores for it, those tests run beside everything else, the slow ones and the
    others each in a process of their own, and what they say is kept until it is their turn.
    """
    *others, last = pythons
    slow, not_slow = ["-m", "slow"], ["-m", "not slow"]
    if fast:
        parts = [not_slow]
    elif cores() > 1 and not for_pytest:
        parts = [slow, not_slow]
    else:
        parts = [[]]
    passed = []
    with ExitStack() as stack:
        of_last = [
            stack.enter_context(Tests(last, scratch, environment, [*part, *for_pytest]))
            for part in parts
        ]
        beside = of_last if cores() > 1 else []
        for tests in beside[:1]:
            tests.start()
        passed += static_checks(pythons, environment)
        # by now the first has compiled the modules of the tests, which takes 12 s, for both
        for tests in beside[1:]:
            tests.start()
        for python in others:
            with Tests(python, scratch, environment, [*not_slow, *for_pytest]) as tests:
                passed.append(tests.passed())
                report("ok" if passed[-1] else "FAIL", "pytest", python, tests.begun)
        passed += [tests.passed() for tests in of_last]
    return 0 if all(passed) else 1


def static_checks(pythons: list[Interpreter], environment: dict[str, str]) -> list[bool]:
    """Run what takes no test; return for each check whether it passed."""
    last = pythons[-1]
    passed = []
    for version in (OLDEST, NEWEST):
        target = "{}.{}".format(*version)
        mypy = ["-m", "mypy", "--strict", "--python-version", target, "bgworker", "tests/typing"]
        passed.append(passes(f"mypy for {target}", last, mypy, environment))
    passed.append(passes("width of lines", last, ["-I", "-c", WIDTH], environment))
    tools = sorted(map(str, (ROOT / "tools").glob("*.py")))
    for python in pythons:
        parse = ["-I", "-W", "error", "-c", PARSE, *tools]
        passed.append(passes("syntax of tools", python, parse, environment))
        with tempfile.TemporaryDirectory() as folder:
            copy = ["tools/vendor.py", folder, "--name", "_bg"]
            passed.append(passes("vendoring", python, copy, environment))
    return passed


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Tests:
    """A run of pytest, which goes on in the background until somebody asks how it ended. Leaving
    the context ends it."""

    def __init__(self, python: Interpreter, scratch: Path, environment: dict[str, str],
                 arguments: list[str]) -> None:
        self.begun = 0.0
        """When it was started, as `time.monotonic` tells."""
        self._version = python.version
        self._environment = environment
        self._command = [python.command, "-m", "pytest", "-W", "error"]
        if "no:cacheprovider" not in arguments:
            # runs that go on side by side may not write to one cache
            part = "-slow" if "slow" in arguments else ""
            self._command += ["-o", f"cache_dir=.pytest_cache/{python.version}{part}"]
        if sys.stdout.isatty():
            self._command.append("--color=yes")
        self._command += arguments
        with tempfile.NamedTemporaryFile(dir=scratch, delete=False) as output:
            self._output = Path(output.name)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Tests:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def start(self) -> None:
        """Begin; what pytest says is kept."""
        self.begun = time.monotonic()
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(self._command, cwd=str(ROOT), env=self._environment,
                                             stdout=output, stderr=subprocess.STDOUT)

    def passed(self) -> bool:
        """Show what pytest has said, and what it says until it ends; tell whether all is well."""
        if self._process is None:
            self.start()
        assert self._process is not None
        print(f"      pytest {' ' * 9} {self._version}", flush=True)
        with self._output.open("rb") as output:
            while True:
                has_ended = self._process.poll() is not None
                said = output.read()
                sys.stdout.buffer.write(said)
                sys.stdout.flush()
                if has_ended:
                    return self._process.returncode == 0
                if time.monotonic() > self.begun + HANGS:
                    print(f"pytest timed out after {HANGS:g} seconds", flush=True)
                    return False
                time.sleep(0.1)


def passes(name: str, python: Interpreter, arguments: list[str],
           environment: dict[str, str]) -> bool:
    """Run one check and report it in a line; show what it said only if it failed."""
    begun = time.monotonic()
    try:
        done = subprocess.run([python.command, *arguments], cwd=str(ROOT), env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=HANGS)
        has_failed, said = done.returncode != 0, done.stdout
    except subprocess.TimeoutExpired as error:
        has_failed, said = True, (error.output or b"") + f"{error}\n".encode()
    report("FAIL" if has_failed else "ok", name, python, begun)
    if has_failed:
        sys.stdout.buffer.write(said)
        sys.stdout.flush()
    return not has_failed


def report(outcome: str, name: str, python: Interpreter, begun: float) -> None:
    took = time.monotonic() - begun
    print(f"{outcome:<5} {name:<16} {python.version:<8} {took:5.1f} s", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

"""The command that sets up the checks: it finds interpreters, and says in one line what is
missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tools import check

TOOL = Path(check.__file__)
POSIX = pytest.mark.skipif(os.name == "nt", reason="interpreters and scripts as on POSIX")
HERE = check.own_version()


def run(
    *arguments: object, tool: Path = TOOL, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(tool), *map(str, arguments)], capture_output=True,
                          text=True, timeout=300, env={**os.environ, **environment})


def without_ensurepip(folder: Path) -> Path:
    """Lay out an interpreter as Debian does without python3-venv: all is there but ensurepip."""
    standard = Path(sysconfig.get_path("stdlib"))
    library = folder / "lib" / standard.name
    library.mkdir(parents=True)
    for each in standard.iterdir():
        if each.name != "ensurepip":
            (library / each.name).symlink_to(each)
    python = folder / "bin" / "python3"
    python.parent.mkdir()
    shutil.copy(os.path.realpath(sys.executable), python)
    return python


@POSIX
@pytest.mark.parametrize("environment", [{}, {"LANG": "C", "LC_ALL": "C"}])
def test_a_python_that_makes_no_environments_is_told_in_one_line_what_to_install(
        environment: dict[str, str], tmp_path: Path) -> None:
    python = without_ensurepip(tmp_path / "Söme Python")
    root = tmp_path / "repository"
    (root / "tools").mkdir(parents=True)
    shutil.copy(TOOL, root / "tools")
    shutil.copy(TOOL.parent.parent / "pyproject.toml", root)
    done = run("--python", python, tool=root / "tools" / "check.py", **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "apt install python{}.{}-venv".format(*sys.version_info[:2]) in done.stderr
    assert sorted(each.name for each in root.iterdir()) == ["pyproject.toml", "tools"]


@POSIX
@pytest.mark.parametrize(("there", "code", "asked"), [
    (["chromium", "chromedriver", "initdb"], 0, ""),
    (["initdb"], 0, "update install chromium chromium-driver"),
    (["chromium", "chromedriver"], 0, "update install postgresql"),
    ([], 0, "update install chromium chromium-driver postgresql"),
    ([], 100, "update")])
def test_a_browser_and_a_server_are_installed_where_they_are_missing_and_may_be(
        there: list[str], code: int, asked: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("apt-get", *there):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho no network\nexit {code}\n')
        tool.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(check, "INITDB", str(tmp_path / "nowhere"))
    check.install_servers({"PATH": str(tmp_path)})
    found = tmp_path / "asked"
    words = found.read_text().split() if found.exists() else []
    assert " ".join(word for word in words if not word.startswith("-")) == asked
    assert ("no network" in capsys.readouterr().out) == (code != 0)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found.unlink(missing_ok=True)
    check.install_servers({"PATH": str(tmp_path)})
    assert not found.exists()  # nobody else may


@pytest.mark.parametrize("python", ["no-such-python", __file__])
def test_what_is_no_python_is_named(python: str) -> None:
    done = run("--python", python)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert repr(python) in done.stderr


@POSIX
def test_on_ci_the_oldest_and_the_newest_that_run_here_are_taken(tmp_path: Path) -> None:
    def stub(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    def versions(named: list[str] | None = None, ci: str = "true") -> list[str]:
        environment = {"CI": ci, "PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
        return [python.version for python in check.interpreters(named, environment)]

    assert versions() == [HERE]
    stub("python3.10", "exit 127")  # as pyenv's, for a version that is not switched on
    stub("python3.12", "echo 3.9.1")
    assert versions() == [HERE]
    stub("python3.11", "echo 3.10.1")
    stub("python3.13", "echo 3.99.1")
    stub("python3.14", f'exec "{sys.executable}" "$@"')
    ends = ["3.10.1", "3.99.1"] if sys.version_info >= (3, 11) else [HERE, "3.99.1"]
    assert versions() == ends
    assert versions(ci="") == versions(ci="0") == [HERE]
    assert versions([sys.executable]) == [HERE], "who names one gets that one"


def test_each_interpreter_has_an_environment_of_its_own_in_a_place_that_can_be_written(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    root.mkdir()
    monkeypatch.setattr(check, "ROOT", root)
    own, other, free = (check.Interpreter("python", version)
                        for version in (HERE, "3.99.0", "3.99.0t"))
    folders = [check.venv_for(each, scratch) for each in (other, free)]
    assert folders == [root / ".venv-3.99", root / ".venv-3.99t"]
    assert check.venv_for(own, scratch).parent == root
    root.chmod(0o500)
    try:
        if os.access(root, os.W_OK):
            pytest.skip("root may write everywhere")
        assert check.venv_for(own, scratch) == scratch / ".venv"
    finally:
        root.chmod(0o700)


def test_an_environment_that_somebody_else_made_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    (root / "tools").mkdir(parents=True)
    shutil.copy(TOOL, root / "tools")
    shutil.copy(TOOL.parent.parent / "pyproject.toml", root)
    (root / ".venv").mkdir()
    (root / ".venv" / "mine").write_text("precious", encoding="utf-8")
    done = run(tool=root / "tools" / "check.py", CI="")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "was not made by this tool" in done.stderr
    assert [each.name for each in (root / ".venv").iterdir()] == ["mine"]


def test_a_check_that_hangs_is_killed_and_has_failed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "HANGS", 0.5)
    (tmp_path / "pytest.py").write_text("import time; time.sleep(600)", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(check, "ROOT", tmp_path)
    here = check.Interpreter(sys.executable, HERE)
    with check.Tests(here, tmp_path, environment, []) as tests:
        assert not tests.passed()
    hanging = ["-c", "import time; time.sleep(600)"]
    assert not check.passes("what hangs", here, hanging, environment)
    monkeypatch.setattr(check, "HANGS", 300.0)
    assert check.passes("what ends", here, ["-c", "pass"], environment)
    out = capfd.readouterr().out
    assert out.count("timed out after") == 2
    assert "\nFAIL  what hangs" in out and "\nok    what ends" in out


FAKE_PYTEST = """
import os, sys
version = next(word for word in sys.argv if word.startswith("cache_dir=")).rpartition("/")[2]
print("tests of", version, *sys.argv[-2:])
sys.exit(version in os.environ["FAIL"].split())
"""


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(("failing", "code"), [("", 0), ("3.10.0", 1), ("3.15.0", 1)])
def test_the_tests_of_each_interpreter_are_shown_in_turn_and_none_may_fail(
        cores: int, failing: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pytest.py").write_text(FAKE_PYTEST, encoding="utf-8")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "cores", lambda: cores)
    monkeypatch.setattr(check, "static_checks", lambda *given: [not print("mypy", flush=True)])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FAIL": failing}
    pythons = [check.Interpreter(sys.executable, version) for version in ("3.10.0", "3.15.0")]
    assert code == check.run_checks(pythons, tmp_path, environment, fast=False, for_pytest=["-x"])
    shown = [line for line in capfd.readouterr().out.splitlines() if not line.startswith(" ")]
    assert (shown[0], shown[1], shown[3]) == (
        "mypy", "tests of 3.10.0 not slow -x", "tests of 3.15.0 cache_dir=.pytest_cache/3.15.0 -x")
    assert shown[2].startswith("FAIL" if failing == "3.10.0" else "ok") and len(shown) == 4


@pytest.mark.parametrize("failing", ["", "3.15.0", "3.15.0-slow"])
def test_where_there_are_cores_the_slow_tests_run_beside_the_others_and_are_shown_before_them(
        failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pytest.py").write_text(FAKE_PYTEST, encoding="utf-8")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "cores", lambda: 2)
    monkeypatch.setattr(check, "static_checks", lambda *given: [])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FAIL": f" {failing} "}
    pythons = [check.Interpreter(sys.executable, "3.15.0")]
    code = check.run_checks(pythons, tmp_path, environment, fast=False, for_pytest=[])
    shown = [line for line in capfd.readouterr().out.splitlines() if not line.startswith(" ")]
    assert shown == ["tests of 3.15.0-slow -m slow", "tests of 3.15.0 -m not slow"]
    assert code == (1 if failing else 0)

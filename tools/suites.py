#!/usr/bin/env python3
"""Run other projects' test suites with the Scheduler in the place of ThreadPoolExecutor.

    python3 tools/suites.py                     three of them
    python3 tools/suites.py janus s3transfer    only these

Each suite runs twice, as it is and with nothing but `concurrent.futures.ThreadPoolExecutor =
bgworker.Scheduler` done before. What fails in the second run alone is run once more, since others'
tests may be flaky, and printed if it fails again. All runs go side by side. The projects come from
the package index and are installed into a temporary folder, with the interpreter that runs this
tool.

Exit code: 0 nothing fails that does not fail anyway, 1 something does, 2 a suite could not be had.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PYTEST = ("-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-o", "addopts=", "--timeout=60")
SUITES: dict[str, tuple[str, ...]] = {
    "aiofiles": (*PYTEST, "tests"),
    "asgiref": (*PYTEST, "tests"),
    # its warnings are errors, and its tests do not await the plugin for coroutines
    "dask": (*PYTEST, "-p", "no:asyncio", "-o", "filterwarnings=", "dask/tests/test_threaded.py"),
    "janus": (*PYTEST, "tests"),
    "requests-futures": (*PYTEST, "tests"),
    "s3transfer": (*PYTEST, "tests/unit", "tests/functional"),
    "tornado": ("-m", "tornado.test.runtests"),
}
"""What runs a suite, in its source folder."""
USUAL = ("aiofiles", "asgiref", "janus")

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
TOOLS = ("pytest", "pytest-asyncio", "pytest-timeout")
NEEDS = {"requests-futures": ("pytest-httpbin",)}
"""What the tests of a project need beside these."""

SWAP = """
import os, sys
if os.environ.get("SWAP"):
    import concurrent.futures.thread
    sys.path.append(os.environ["SWAP"])
    import bgworker
    concurrent.futures.ThreadPoolExecutor = bgworker.Scheduler
    concurrent.futures.thread.ThreadPoolExecutor = bgworker.Scheduler
"""
"""Runs at the start of every interpreter, as `sitecustomize`."""

FAILED = re.compile(r"^(?:FAILED|ERROR|FAIL:|ERROR:) +(.*?)(?: - .*)?$", re.MULTILINE)
SUMMARY = re.compile(r"^(?:\d+ .* in .*s.*|OK.*|FAILED \(.*)$", re.MULTILINE)


class Missing(Exception):
    """A suite cannot be had; the message says why."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Run other projects' suites on the Scheduler.")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"suites to run, of: {', '.join(SUITES)} (default: {', '.join(USUAL)})",
    )
    names = parser.parse_args(argv).names or USUAL
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        parser.error(f"no such suite: {', '.join(unknown)}; there are {', '.join(SUITES)}")
    with tempfile.TemporaryDirectory(prefix="bgworker-suites-") as scratch:
        folder = Path(scratch)
        try:
            needed = [each for name in names for each in NEEDS.get(name, ())]
            # most of what is installed is never imported, and so need not be compiled
            run([*PIP, "install", "--no-compile", "--target", str(folder / "site"), "--upgrade",
                 *names, *TOOLS, *needed])
            return 1 if any(new_failures_of(names, folder)) else 0
        except Missing as error:
            print(error, file=sys.stderr)
            return 2


def new_failures_of(names: Sequence[str], folder: Path) -> list[set[str]]:
    """Run the suites side by side: most of their time they wait."""
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(SWAP, encoding="utf-8")
    with ThreadPoolExecutor(2 * len(names)) as pool:
        runs = [pool.submit(new_failures, name, folder, pool) for name in names]
        return [each.result() for each in runs]


def new_failures(name: str, folder: Path, pool: ThreadPoolExecutor) -> set[str]:
    """Run one suite, say what came out, and return what fails because of the swap."""
    archive = fetched(name, folder)
    # a suite may write beside its sources: each run has a copy of its own
    plain = pool.submit(failures, name, unpacked(archive, "plain"), folder, swap=False)
    swapped = unpacked(archive, "swapped")
    new = failures(name, swapped, folder, swap=True) - plain.result()
    if new:
        new &= failures(name, swapped, folder, swap=True)
    for test in sorted(new):
        print(f"{name}: fails with the Scheduler alone: {test}")
    return new


def fetched(name: str, folder: Path) -> Path:
    """Download a project's source archive."""
    run([*PIP, "download", "--no-deps", "--no-binary", name, "--dest", str(folder / name), name])
    for archive in (folder / name).glob("*.tar.gz"):
        return archive
    raise Missing(f"{name} has no source archive in the package index")


def unpacked(archive: Path, to: str) -> Path:
    """Unpack a source archive beside it; return the folder of the source."""
    with tarfile.open(archive) as opened:
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        opened.extractall(archive.parent / to, **options)  # type: ignore[arg-type]
    return next((archive.parent / to).iterdir())


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Missing(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")


def failures(name: str, source: Path, folder: Path, swap: bool) -> set[str]:
    """Run a suite and return the names of the tests that fail."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder / "hook"), str(folder / "site")])
    environment["SWAP"] = str(ROOT) if swap else ""
    done = subprocess.run(
        [sys.executable, *SUITES[name]],
        cwd=source,
        env=environment,
        timeout=1800,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    summary = SUMMARY.findall(done.stdout)
    if not summary:
        raise Missing(f"the suite of {name} did not run to its end:\n{done.stdout[-2000:]}")
    print(
        f"{name}, {'Scheduler' if swap else 'ThreadPoolExecutor'}: {summary[-1].strip()}",
        flush=True,
    )
    return set(FAILED.findall(done.stdout))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

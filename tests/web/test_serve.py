"""``bgworker serve``: what it prints, when it refuses, how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.histories import Recorder, run_cli
from tests.support import SOON, environment

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent in another way there")

ADDRESS = re.compile(r"http://([^/]+):(\d+)/\?token=([\w-]{32})\n")


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-W", "error", "-m", "bgworker", "serve", *words],
                          cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> re.Match[str]:
    assert process.stdout is not None
    found = ADDRESS.fullmatch(process.stdout.readline())
    assert found is not None
    return found


def test_the_printed_address_leads_to_the_tasks_until_ctrl_c(
    tmp_path: Path, record: Recorder
) -> None:
    record.task("load users")
    with serving(tmp_path) as process:
        host, port, token = said(process).groups()
        assert host == "127.0.0.1"
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        opener.open(f"http://{host}:{port}/?token={token}", timeout=SOON).close()
        with opener.open(f"http://{host}:{port}/", timeout=SOON) as page:
            assert "load users" in page.read().decode()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SOON)
    assert (process.returncode, out, err) == (130, "", ""), "a line for a request has the token"


def test_a_history_that_is_not_there_yet_is_said_and_waited_for(tmp_path: Path) -> None:
    with serving(tmp_path, "--db", "later.db") as process:
        said(process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SOON)
    assert err == "bgworker serve: there is no history at later.db yet\n"
    assert not (tmp_path / "later.db").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_other_machines_are_let_in_only_by_who_knows_what_it_means(
    tmp_path: Path, host: str
) -> None:
    done = run_cli("serve", "--host", host, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{host} can be reached from other machines, and nothing is encrypted" in done.stderr
    assert "--i-know" in done.stderr and "ssh" in done.stderr


def test_who_knows_it_is_told_and_served(tmp_path: Path) -> None:
    with serving(tmp_path, "--host", "0.0.0.0", "--i-know") as process:
        host, port, _ = said(process).groups()
        assert host == socket.gethostname()
        socket.create_connection(("127.0.0.1", int(port)), timeout=SOON).close()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SOON)
    assert "can be reached from other machines" in err


@pytest.mark.parametrize("words, code, complaint", [
    (["--port", "PORT"], 1, "cannot listen at 127.0.0.1 port PORT: Address already in use"),
    (["--host", "no.such.host.invalid", "--i-know"], 1, "cannot listen at no.such.host.invalid"),
    (["--port", "65536"], 2, "expected a port from 0 to 65535, got '65536'"),
    (["--port", "x"], 2, "expected a whole number >= 0"), (["--db", ""], 2, "expected the path")])
def test_what_cannot_be_done_is_said_in_a_line(
    tmp_path: Path, words: list[str], code: int, complaint: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_cli("serve", *(word.replace("PORT", port) for word in words), cwd=tmp_path)
    assert done.returncode == code and complaint.replace("PORT", port) in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""

"""When the lines of each command are shown: ``--group``, ``-k``, and what they hold back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from bgworker.cli import order as order_module
from bgworker.cli.order import MOST_IN_MEMORY, SLOT, Held, Order, SlottedFile
from bgworker.cli.screen import ERR, OUT, OWN
from bgworker.cli.text import width_of
from tests.histories import run_cli
from tests.support import environment, until
from tests.terminal import Emulator, on_terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from bgworker.cli.screen import Line

POSIX = pytest.mark.skipif(os.name == "nt", reason="shell commands of POSIX")
WAIT = 60.0


def shown(order: Order, script: str) -> str:
    """Return what is shown of a script of words, such as ``1a 2a 1. 2b``: a command and what it
    says, or the dot of its end."""
    lines: list[Line] = []
    for word in script.split():
        number, what = int(word[:-1]), word[-1]
        if what == ".":
            lines += order.end(number)
        else:
            lines += order.take(number, (OUT, word))
    return " ".join(text for _, text in lines)


def rest(order: Order) -> str:
    return " ".join(text for _, text in order.rest())


SCRIPT = "2a 1a 3a 2b 3. 1b 2c 1. 2d 2. 4a 5a 5. 4b 4."


def test_in_order_the_first_that_has_not_ended_is_shown_as_it_speaks() -> None:
    order = Order(keeps_order=True, is_grouped=False)
    assert shown(order, SCRIPT) == "1a 1b 2a 2b 2c 2d 3a 4a 4b 5a"
    order = Order(keeps_order=True, is_grouped=False)
    assert shown(order, "1a 2a 1.") == "1a 2a", "its turn has come, though it has not ended"
    assert shown(order, "2b") == "2b"


def test_grouped_each_is_shown_when_it_has_ended() -> None:
    order = Order(keeps_order=False, is_grouped=True)
    assert shown(order, SCRIPT) == "3a 1a 1b 2a 2b 2c 2d 5a 4a 4b"
    assert shown(order, "6a 7a 7.") == "7a"
    assert rest(order) == "6a", "it never ended"


def test_grouped_and_in_order_each_is_shown_when_it_and_all_before_it_have_ended() -> None:
    order = Order(keeps_order=True, is_grouped=True)
    assert shown(order, "2a 1a 2. 1b") == ""
    assert shown(order, "1.") == "1a 1b 2a"
    order = Order(keeps_order=True, is_grouped=True)
    assert shown(order, SCRIPT) == "1a 1b 2a 2b 2c 2d 3a 4a 4b 5a"


@pytest.mark.parametrize("most", [0, 500, MOST_IN_MEMORY])
@pytest.mark.parametrize("keeps_order, is_grouped", [(True, False), (False, True), (True, True)])
def test_no_line_is_lost_doubled_or_changed_wherever_it_waits(
    keeps_order: bool, is_grouped: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "MOST_IN_MEMORY", most)
    monkeypatch.setattr(order_module, "SLOT", 64)
    random = Random(1)
    texts = ["", "plain", "two\nlines", "\r\x1b[2J\x7f", "gr\xfc\xdfe \u202e \U0001f642", "x" * 200,
             "0", "1", " ", "\n", "\x01\x02"]
    for _ in range(20):
        order = Order(keeps_order=keeps_order, is_grouped=is_grouped)
        given: dict[int, list[Line]] = defaultdict(list)
        got: list[tuple[int, Line]] = []
        running, following = [1, 2, 3], 4
        while running:
            number = random.choice(running)
            line = random.choice([OUT, ERR, OWN]), f"{number}:{random.choice(texts)}"
            given[number].append(line)
            arrived = list(order.take(number, line))
            if random.random() < 0.2:
                arrived += order.end(number)
                running.remove(number)
                if following < 20:
                    running.append(following)
                    following += 1
            got += [(int(text.partition(":")[0]), (kind, text)) for kind, text in arrived]
        assert list(order.rest()) == []
        order.close()
        numbers = [number for number, _ in got]
        assert {number: [line for each, line in got if each == number]
                for number in given} == given
        changes = [number for place, number in enumerate(numbers)
                   if not place or numbers[place - 1] != number]
        assert sorted(changes) == sorted(given), "the lines of a command are together"
        assert not keeps_order or numbers == sorted(numbers)


# ---------------------------------------------------------------- what is held back

@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    made.close()


def test_what_is_held_back_takes_no_more_memory_than_said(held: Held) -> None:
    block = "\n".join(["x" * 63] * 1000)
    tracemalloc.start()
    try:
        for at in range(600):  # 38 MB
            held.add(at % 3, (OUT, f"{at} {block}"))
        written = tracemalloc.get_traced_memory()[1]
        got = [int(text.partition(" ")[0]) for number in range(3)
               for _, text in held.pop(number)]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got == sorted(range(600), key=lambda at: at % 3)
    assert written < 4 * MOST_IN_MEMORY and most < 5 * MOST_IN_MEMORY


def test_ten_thousand_commands_that_wait_take_one_descriptor(held: Held) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    for number in range(10_000):
        held.add(number, (OUT, f"{number}" + "x" * 1000))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert held.numbers() == {*range(10_000)}
    assert all([text == f"{number}" + "x" * 1000 for _, text in held.pop(number)]
               for number in range(10_000))
    assert held.numbers() == set()


def test_room_in_the_file_is_used_again() -> None:
    file = SlottedFile()
    kept = file.write(b"k" * 10)
    for number in range(50):
        data = os.urandom(number * 1000)
        assert file.read(file.write(data), len(data)) == data
    assert file.read(kept, 10) == b"k" * 10
    file.close()
    assert file._count == 49_000 // SLOT + 2, "as many slots as the largest takes, and one"


def test_nothing_is_held_in_memory_or_on_disk_once_it_was_shown(held: Held) -> None:
    for _ in range(3):
        for at in range(100):
            held.add(1, (OUT, "x" * 100_000))
        assert sum(len(text) for _, text in held.pop(1)) == 10_000_000
        assert held._size == 0 and len(held._file._free) == held._file._count
    assert held._file._count * SLOT < 11_000_000


# ---------------------------------------------------------------- as its users see it

def command_line(*words: str, cwd: Path, input: str,
                 **how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bgworker", "run", "--no-db", "-f", "-", *words], cwd=cwd,
        input=input, env=environment(PYTHONWARNINGS="error", PYTHONUTF8="1", **how),
        capture_output=True, text=True, timeout=WAIT, check=False)


MIXED = """\
until [ -e go ]; do sleep 0.02; done; echo first; echo "first's error" >&2; sleep 0.1; echo done
echo second; echo "second's error" >&2; sleep 0.2; echo end; exit 3
echo third; printf 'no newline'; touch go
"""


def without_times(text: str) -> list[str]:
    return [re.sub(r" (in|after) [\d.]+m?s.*", "", line) for line in text.splitlines()]


@POSIX
@pytest.mark.parametrize("words, out, err", [
    (["-k"], [1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3]),
    (["-k", "--group"], [1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3]),
    (["--group"], [3, 3, 1, 1, 2, 2], [3, 1, 1, 2, 2]),
])
def test_the_lines_of_a_command_stay_together_on_the_stream_that_it_wrote_them_to(
    tmp_path: Path, words: list[str], out: list[int], err: list[int]
) -> None:
    commands = MIXED.replace("sleep 0.2", "sleep 1.5") if words == ["--group"] else MIXED
    done = command_line("-j", "3", *words, cwd=tmp_path, input=commands)
    said = {1: ["first", "done"], 2: ["second", "end"], 3: ["third", "no newline"]}
    errors = {1: ["first's error", "completed"], 2: ["second's error", "failed (exit code 3)"],
              3: ["completed"]}
    assert done.stdout.splitlines() == [
        f"[{number}] {text}" for number in dict.fromkeys(out) for text in said[number]]
    assert without_times(done.stderr)[:5] == [
        f"[{number}] {text}" for number in dict.fromkeys(err) for text in errors[number]]
    assert without_times(done.stderr)[-1] == "3 commands: 2 completed, 1 failed"
    assert done.returncode == 1


@POSIX
def test_without_these_options_lines_come_as_they_are_said(tmp_path: Path) -> None:
    done = command_line("-j", "3", cwd=tmp_path, input=MIXED)
    numbers = [int(line[1]) for line in done.stdout.splitlines()]
    assert sorted(numbers) == [1, 1, 2, 2, 3, 3] and numbers[0] != 1
    assert [number for number in numbers if number != 1] != [2, 2, 3, 3]


@POSIX
@pytest.mark.parametrize("words, lines", [
    ([], ["[1] a", "[1]  b", "[2] c"]),
    (["--no-prefix"], ["a", " b", "c"]),
    (["--tag"], ["echo a; echo ' b'\ta", "echo a; echo ' b'\t b", "echo  c\tc"]),
    (["--tag", "--name", "job"], ["echo a; echo ' b'\ta", "echo a; echo ' b'\t b", "echo  c\tc"]),
])
@pytest.mark.parametrize("more", [[], ["-k"], ["--group"]])
def test_each_line_begins_with_what_was_asked_for(
    tmp_path: Path, words: list[str], lines: list[str], more: list[str]
) -> None:
    done = command_line("-j", "1", *words, *more, cwd=tmp_path,
                        input="echo a; echo ' b'\necho  c")
    assert done.stdout.splitlines() == lines
    outcomes = [line[:13] for line in done.stderr.splitlines()[:2]]
    assert outcomes == ["[1] completed", "[2] completed"], "it names the task in any case"


@POSIX
def test_one_command_has_a_tag_if_asked_for_and_no_number(tmp_path: Path) -> None:
    for words, out in (([], "a\n"), (["--no-prefix"], "a\n"), (["-k"], "a\n"), (["--group"], "a\n"),
                       (["--tag"], "echo a\ta\n")):
        done = run_cli("run", "--no-db", *words, ":::", "echo a", cwd=tmp_path)
        assert (done.stdout, done.stderr, done.returncode) == (out, "", 0)


def test_a_tag_and_no_prefix_at_once_are_refused(tmp_path: Path) -> None:
    done = command_line("--tag", "--no-prefix", "--jsonl", "e", cwd=tmp_path, input="x\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "bgworker run: error: argument --no-prefix: expected without --tag, which begins each line "
        "with its command; leave out one of them\n")
    assert os.listdir(tmp_path) == []


@POSIX
def test_the_tag_of_a_command_that_was_made_for_arguments_are_these(tmp_path: Path) -> None:
    def tagged(*words: str) -> list[str]:
        done = run_cli("run", "--no-db", "-q", "-k", "--tag", *words, cwd=tmp_path)
        assert done.returncode == 0
        return done.stdout.splitlines()

    assert tagged("echo", "x", ":::", "a", "b c") == ["a\tx a", "b c\tx b c"]
    assert tagged("echo", "{2}{1}", ":::", "a", "b", ":::", "1") == ["a 1\t1a", "b 1\t1b"]
    assert tagged(":::", "echo a", "echo b") == ["echo a\ta", "echo b\tb"]
    evil = b"\xff\x1b[2J\n\tz"
    done = subprocess.run(
        [sys.executable, "-m", "bgworker", "run", "--no-db", "--tag", "echo", "x", "#", ":::",
         evil], cwd=tmp_path, env=environment(PYTHONUTF8="1"), capture_output=True, timeout=WAIT,
        check=False)
    assert done.stdout.startswith("\ufffd\\x1b[2J\\n".encode()), done
    assert done.stdout.count(b"\x1b") == 1, "what the command says itself comes as it is"


@POSIX
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_line_of_an_end_is_one_line_of_the_terminal(tmp_path: Path, columns: int) -> None:
    long = "true " + "日本語 " * 60
    (tmp_path / "commands").write_text(f"{long}\n{long}; exit 3\n", encoding="utf-8")
    code, sent = on_terminal("run", "--no-db", "-f", "commands", cwd=tmp_path, columns=columns)
    terminal = Emulator(columns, 12)
    terminal.feed(sent)
    lines = [line for line in terminal.lines if re.match(r"\[[12]\] (completed|failed)", line)]
    assert code == 1 and len(lines) == 2
    least = width_of("[2] failed (exit code 3) after 10ms: ") + 20
    assert all(columns - 2 <= width_of(line) <= max(columns, least) or columns == 40
               for line in lines)
    assert all(line.endswith("…") for line in lines)
    done = command_line(cwd=tmp_path, input=f"{long}\n{long}\n")
    assert width_of(done.stderr.splitlines()[0].partition(": ")[2]) >= 199, "in a log it is longer"


@POSIX
def test_a_tag_can_steer_no_terminal_and_is_one_line(tmp_path: Path) -> None:
    evil = "echo a # \x1b]0;evil\x07\u202e\tx" + "y" * 500
    done = command_line("--tag", cwd=tmp_path, input=evil)
    tag, said = done.stdout.rstrip("\n").split("\t")
    assert said == "a" and tag.isprintable() and r"\x1b]0;evil\x07\u202e" in tag
    assert len(tag) <= 200


@POSIX
def test_a_command_that_says_much_more_than_memory_holds_loses_no_line(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    count, wide = 150_000, "x" * 100
    say = f"seq -f '%g {wide}' {count}"
    with subprocess.Popen(
        [sys.executable, "-m", "bgworker", "run", "--no-db", "-q", "-k", "--group", "-j", "3", "-f",
         "-"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(TMPDIR=str(tmp_path / "temporary"))) as proc:
        assert proc.stdin is not None and proc.stdout is not None
        # the first ends last: all that the others say is held back
        proc.stdin.write(f"until [ -e go ]; do sleep 0.02; done; {say}\n{say}; touch two\n"
                         f"{say}; touch three\n")
        proc.stdin.close()
        until(lambda: (tmp_path / "two").exists() and (tmp_path / "three").exists())
        assert os.listdir(tmp_path / "temporary") == [], "it has no name: nothing stays behind"
        (tmp_path / "go").touch()
        place = -1
        for place, line in enumerate(proc.stdout):
            command, number = divmod(place, count)
            assert line == f"[{command + 1}] {number + 1:g} {wide}\n"
        assert place == 3 * count - 1
        assert proc.wait(WAIT) == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_stays_bounded_while_a_command_is_held_back(tmp_path: Path) -> None:
    def most_memory(words: list[str]) -> int:
        report = tmp_path / "report"
        code = ("import resource, sys; from bgworker.cli import main; code = main(sys.argv[1:]); "
                f"open({str(report)!r}, 'w').write(str(resource.getrusage("
                "resource.RUSAGE_SELF).ru_maxrss)); sys.exit(code)")
        done = subprocess.run(
            [sys.executable, "-c", code, "run", "--no-db", *words, "--", "seq", "-f",
             f"%g {'x' * 100}", "400000"], cwd=tmp_path, env=environment(),
            stdout=subprocess.DEVNULL, timeout=WAIT, check=False)
        assert done.returncode == 0
        return int(report.read_text()) * 1024

    assert most_memory(["--group"]) < most_memory([]) + 24 * 2**20  # of 43 MB


@POSIX
def test_no_room_for_what_is_held_back_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    script = "ulimit -f 4096; exec \"$@\""  # 2 or 4 MiB of any file
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-m", "bgworker", "run", "--no-db", "--group",
         "--", "seq", "9000000"], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=WAIT, check=False)
    assert done.returncode == 1
    assert re.fullmatch(
        r"bgworker run: error: cannot write the output: what is held back has no room in the "
        r"directory for temporary files \([^)]+\); set TMPDIR to a larger one, or leave out "
        r"--group and --keep-order\n", done.stderr)


@POSIX
def test_an_interrupt_shows_what_was_held_back_and_how_the_commands_ended(tmp_path: Path) -> None:
    import signal
    commands = "echo one; touch one; sleep 600\necho two; touch two; sleep 600\necho never\n"
    (tmp_path / "commands").write_text(commands)
    with subprocess.Popen(
        [sys.executable, "-m", "bgworker", "run", "--no-db", "--group", "-j", "2", "-f",
         "commands"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(), start_new_session=True) as proc:
        try:
            until(lambda: (tmp_path / "one").exists() and (tmp_path / "two").exists())
            time.sleep(0.3)
            proc.send_signal(signal.SIGINT)
            out, err = proc.communicate(timeout=WAIT)
        finally:
            proc.kill()
    assert sorted(out.splitlines()) == ["[1] one", "[2] two"]
    assert proc.returncode == 130 and err.count("cancelled (interrupted) after") == 2


@POSIX
@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("words", [["-k"], ["--group"], ["--tag"], ["-k", "--tag"],
                                   ["--no-prefix"]])
def test_on_a_terminal_the_table_tells_the_last_line_of_what_is_held_back_as_well(
    tmp_path: Path, words: list[str], columns: int
) -> None:
    (tmp_path / "commands").write_text(
        "sleep 0.8; printf '10%%\\r20%%\\rdone \\033[2J\\n'\n"
        "echo second; sleep 0.5; printf 'last \\342\\200\\256line'\n")
    pictures: list[str] = []
    code, sent = on_terminal("run", "--no-db", "-j", "2", "-f", "commands", *words, cwd=tmp_path,
                             columns=columns, height=12)
    terminal = Emulator(columns, 12)
    for part in re.split("(?<=\x1b\\[\\?25h)", sent):
        terminal.feed(part)
        pictures.append("\n".join(terminal.lines))
    assert code == 0 and terminal.is_cursor_visible
    assert any(re.search(r"\[2\] .*second", picture) and "0 of 2" in picture
               for picture in pictures) or columns == 40
    lines = [line.rstrip() for line in terminal.lines]
    assert sum(line.endswith(r"done \x1b[2J") for line in lines) == 1
    assert sum(line.endswith(r"last \u202eline") for line in lines) == 1
    said = [line for line in lines if line.endswith(("second", "2J", "line"))]
    if "-k" in words:
        assert said[0].endswith("2J")
    elif "--group" in words:
        assert said[-1].endswith("2J") and said[0].endswith("second")
    assert lines[-2].startswith("2 commands: 2 completed in ")

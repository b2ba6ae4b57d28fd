"""``bgworker run``: run commands as tasks, show what they say, and end with an exit code that tells
how it went.

The main thread submits and then only waits: for the end, or for a signal. A worker thread runs each
command. The printer's thread turns the events of a subscription into lines; while
it is blocked (by a pager, say) the subscription's queue fills, and then the commands' pipes are
read no further. So whatever blocks, a signal is answered.
"""

from __future__ import annotations

import gc
import os
import sys
from argparse import ArgumentTypeError
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic

from ..model.errors import BgworkerError, ConfigurationError
from ..running.scheduler import Scheduler
from .attempts import TimeLimit, time_limit
from .commands import SEPARATOR, commands_of, has_records, left_of
from .halt import FAIL_FAST, halt
from .jobs import AHEAD, MOST_UNSHOWN, Run
from .live import Live
from .options import add_db, typed, whole
from .printer import Notices, Prefix, Printer
from .screen import Channel, Screen
from .sinks import sinks_of
from .signals import Killed, Signals, kill_children, leave_at_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from typing import Any

    from ..model.records import Source
    from ..sinks.base import Sink
    from .commands import Commands
    from .order import Order

FOR_EVER = 1e6
"""Seconds, eleven days: as long as a pager may keep the last lines waiting. (`Thread.join` takes no
infinity.)"""

LAST_MOMENT = 2.0
"""Seconds that the sinks get when a second signal ends it all."""

MOST_RECORDED = 4 * 2**20
"""Bytes of a command that are recorded whole, so that it can be run again: what Linux takes is
half of that, and a history gives no longer text. Lines of output still are cut at 64 KiB."""

PATIENCE = 1.0
"""Seconds that a question to the history may take whose answer is only shown."""

MOST_ASKED = 1_000
"""Commands that are asked for in one question: a thirtieth of a second."""

REDRAW = 0.1
"""Seconds that lines and news are gathered for, where each time the table is redrawn."""

HELP = "run one command, or many of them"

DESCRIPTION = """\
Run one command, or many at a time, each as a task: with its own exit code,
time limit, and record.

What the commands say is shown line by line as it comes, their output on
stdout and their errors on stderr; of many commands each line begins with the
command's number, such as [12], which names its task afterwards: bgworker show
12, of an earlier run with --run. Our own lines go to stderr, at the end what
failed. On a terminal a live table shows what many commands are doing, and
control characters in what they say are shown, not obeyed. Commands read no
input: their stdin is empty.
"""

EPILOG = """\
arguments:
  Behind :::, or in the lines of -a FILE, are arguments: COMMAND is run once for
  each, in whose words these strings are replaced, as in GNU parallel. Without
  one of them the argument is appended.
    {}    the argument                     d/a.tar.gz
    {.}   without its extension            d/a.tar
    {/}   without its directory            a.tar.gz
    {//}  its directory                    d
    {/.}  without both                     a.tar
    {#}   the number of the command        1
  Several ::: give every combination; {1}, {2.} are the first argument and the
  second without its extension. :::: FILE is a list from a file. Behind -- too,
  ::: is no word of COMMAND; --arg-sep chooses another one.

  Other than in GNU parallel no shell sees an argument: it is one word, or part
  of one, whatever is in it. What needs a shell gets one so:
    bgworker run -- sh -c 'gzip -dc "$1" | wc -c' sh {} ::: *.gz
  Without COMMAND the arguments are lines for the shell, as those of -f.

  What comes from a pipe is run as it comes, and counts as many commands even if
  it is one.

the history:
  Everything is recorded in an SQLite file; bgworker tasks, show, tail, stats
  and watch read it, while the commands run and afterwards. bgworker cancel
  stops commands from another terminal.

  At most 10,000 commands are recorded before they run; of a longer list the
  next ones are as others end.

  --resume knows a command by its text and its directory, whatever its name,
  and skips it as often as it has completed before. What failed, was cancelled
  or was interrupted runs again, and takes its place in what bgworker tasks
  --left lists. bgworker rerun --failed does so without the list of commands.

the order of lines:
  Lines of commands that run at the same time come mixed, each of them whole.
  --group and -k keep the lines of a command together, its output on stdout and
  its errors on stderr. What they hold back takes some megabytes of memory; the
  rest waits in a temporary file, in $TMPDIR. Nothing is lost, and no command
  waits for another.

the time left:
  Of many commands it is told from the third second on: in the table, and where
  there is none, in a line at each tenth of the commands, at least 10 seconds
  apart. A command is expected to take the median of its last nine runs in the
  history, as far as this run is as fast as those; it is known by its text,
  whatever its name and directory. Others are expected to take the mean of
  this run.

sinks:
  jsonl:PATH, sqlite:PATH, webhook:URL or package.module:factory. Options may
  follow the path: jsonl:events.jsonl?max_bytes=10M. What signs the requests of
  a webhook is in $BGWORKER_WEBHOOK_SECRET. A factory's module is looked for as
  Python does; PYTHONPATH=. has one in this folder found.
  Those in $BGWORKER_SINKS, separated by commas, are added.

time limits and retries:
  Each attempt has its own time, counted from the start of its process. A share
  such as --timeout 300% is one of a median: of the last nine runs in the
  history, those that completed, of a command with the same text; where there
  are none, of the commands of this run that have completed. Until one has there
  is no limit; what runs then gets its limit with the first that completes. It
  is at least a second. The limit that a task got is in its record.

  The attempts of a command are one task, whose warnings tell how each failed.
  From the fourth on there is a pause before each: 0.1 seconds, and twice as
  long each time, up to 10.

  Where the system runs out of processes or descriptors, commands wait until
  others end.

--halt WHEN,WHY:
  WHEN is now (stop what runs) or soon (wait for it); nothing more is started.
  WHY is fail=N, success=N or done=N, or a share of all commands such as
  fail=10%. What runs out of time fails. What did not run is recorded as
  cancelled.

exit codes:
  one command   its own; 128+N if signal N ended it; 127 there is no such
                program; 126 it cannot be executed; 124 it ran longer than
                --timeout
  many          0 all completed, or as many as --halt asked for, or --halt
                done was met and none failed; 1 some failed; 124 none failed,
                but some ran longer than --timeout
  either        2 the command line, the file of commands or a sink cannot be
                used, and nothing was started; 128+N signal N ended it, such
                as 130 for Ctrl-C, 143 for SIGTERM, 129 for a terminal that is
                gone (SIGHUP); 141 nobody reads our output any more (as in
                ... | head -1); 1 our output cannot be written, for another
                reason, or the system has no thread for us

  The first Ctrl-C, or any other signal, asks the commands to stop (SIGTERM,
  and SIGKILL 5 seconds later) and records how they end; a second one, or
  Ctrl-\\, kills them at once. Ctrl-Z stops them until we go on, though not the
  clock of --timeout.

examples:
  bgworker run --timeout 60 -- gzip -t backup.gz
  bgworker run -j 4 -- gzip -t {} ::: *.gz
  find . -name '*.gz' -print0 | bgworker run -0 -a - -- gzip -t
  bgworker run -j 4 --db nightly.db --resume -f commands.txt
  bgworker run -j 4 -k --no-prefix -q -f commands.txt > all.txt
  bgworker run -j 4 --no-db --jsonl events.jsonl -f commands.txt
  bgworker run --halt soon,fail=3 --retries 2 -- ./simulate --seed ::: 1 2 3

  Lines of -f are shell commands: make none from names that you have not chosen,
  use -a or :::. A name with a blank is two words, and one such as a;b runs b.
"""


# ---------------------------------------------------------------- the command line

def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    parser.usage = (
        "%(prog)s [options] -- COMMAND [WORD ...]\n"
        "       %(prog)s [options] -- COMMAND [WORD ...] ::: ARGUMENT ...\n"
        "       %(prog)s [options] -a FILE -- COMMAND [WORD ...]\n"
        "       %(prog)s [options] -f FILE"
    )
    parser.add_argument("command", nargs="...", metavar="COMMAND ...",
                        help="the program and its words, run directly, without a shell; behind ::: "
                        "arguments, each for one run of it")
    _add_arguments_of_commands(parser)
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        help="run each line of FILE by the shell, - is stdin; blank lines and lines that begin "
        "with # are skipped",
    )
    parser.add_argument("--name", metavar="N", type=_name,
                        help="name of the task; of many, N-1, N-2 and so on (default: the command)")
    add_db(parser, "record what happens in this history")
    parser.add_argument(
        "--no-db", dest="db", action="store_const", const=None, help="record no history"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip the commands that completed in an earlier run of the history, in the same "
        "directory",
    )
    add_running_options(parser)


def add_running_options(parser: Any) -> None:
    """Add the options that tell how commands are run, recorded and shown. What "below" tells of
    them, the epilog of each verb does."""
    parser.add_argument(
        "-j",
        "--jobs",
        metavar="N",
        type=whole(1, "; leave it out for one command per CPU"),
        default=_cpus(),
        help="how many commands run at a time (default: the number of CPUs, here %(default)s)",
    )
    parser.add_argument(
        "--timeout", metavar="S", type=time_limit, default=TimeLimit(),
        help="how long each command may run: seconds, a duration such as 90s or 1h30m, or a share "
        "of what is usual, such as 300%%, see below"
    )
    parser.add_argument(
        "--retries", metavar="N", type=whole(0, "; leave it out to run each command once"),
        default=1,
        help="run a command that fails again, N times at most in all; 0 is until it completes"
    )
    parser.add_argument(
        "--jsonl", metavar="PATH", help="append all events to this file, one JSON object a line"
    )
    parser.add_argument(
        "--sink",
        metavar="SPEC",
        action="append",
        default=[],
        help="send all events to this sink too; may be given several times, see below",
    )
    parser.add_argument(
        "--halt", metavar="WHEN,WHY", type=halt,
        help="when to end before all commands have run, such as soon,fail=3; see below (default: "
        "never)"
    )
    parser.add_argument(
        "--fail-fast", dest="halt", action="store_const", const=FAIL_FAST,
        help="when a command fails or runs out of time, cancel all others: --halt now,fail=1"
    )
    parser.add_argument(
        "-k", "--keep-order", action="store_true",
        help="show what commands say in the order of the commands: of the first that has not ended "
        "as it comes, of the others when their turn comes"
    )
    parser.add_argument(
        "--group", action="store_true",
        help="show what a command says when it has ended, all of it together; with -k in the order "
        "of the commands"
    )
    parser.add_argument(
        "--tag", action="store_true",
        help="begin each line with the arguments of its command and a tab, or with the command "
        "if it was made for none, instead of a number such as [12]"
    )
    parser.add_argument(
        "--no-prefix", dest="prefix", action="store_false",
        help="begin no line with the number of its command"
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="no line for each command that completed"
    )


def _add_arguments_of_commands(parser: Any) -> None:
    parser.add_argument(
        "-a", "--arg-file", dest="arguments", metavar="FILE", action="append", default=[],
        help="run COMMAND once for each line of FILE, - is stdin; the line is one argument, "
        "whatever is in it"
    )
    parser.add_argument(
        "-0", "--null", action="store_true",
        help="lines of FILE end with a NUL, as find -print0 writes them"
    )
    # argparse takes -1 for an option, too, now that there is -0; it is a wrong value of one
    parser._has_negative_number_optionals.clear()
    parser.add_argument(
        "-I", dest="replace", metavar="STR", type=_replacement,
        help="put the arguments in the place of STR, and leave {} and its like as they are"
    )
    parser.add_argument(
        "--arg-sep", metavar="STR", type=_replacement, default=SEPARATOR,
        help="what stands before arguments instead of :::, for commands that have such a word "
        "themselves"
    )


def _replacement(text: str) -> str:
    if not text:
        raise ArgumentTypeError("expected at least one character, got ''")
    return text


def _cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))  # what this process may use of them
    return os.cpu_count() or 1


def _name(text: str) -> str:
    if not text.strip():
        raise ArgumentTypeError(
            f"expected a name, got {text!r}; leave it out to name tasks after their commands"
        )
    return text


# ---------------------------------------------------------------- the run

def act(options: Namespace) -> int:
    """Run the commands and return the exit code."""
    try:
        commands = commands_of(options)
        if options.resume:
            commands = left_of(commands, options)
    except BgworkerError as error:
        options.parser.error(str(error))
    return execute(commands, options)


def execute(commands: Commands, options: Namespace) -> int:
    """Run commands as `add_running_options` says, and return the exit code."""
    # a vendored copy may lack it, and so far there is no file
    from ..shell.command import ShellCommand  # noqa: F401

    try:
        prefix = _prefix(options)
        sinks = sinks_of(options)
    except BgworkerError as error:
        options.parser.error(str(error))
    if options.halt is not None and options.halt.is_share:
        commands.read_all()
    if commands.skipped:
        options.parser.tell(f"{commands.skipped} of {commands.skipped + (commands.total or 0)} "
                            f"commands completed before, {commands.total} are left")
    elif commands.is_empty():
        options.parser.tell("there is no argument, so nothing was run")
    if commands.is_empty():
        return 0
    with _medians(options):
        return _run(commands, sinks, options, prefix)


def _run(commands: Commands, sinks: Sequence[Sink], options: Namespace, prefix: Prefix) -> int:
    """Run the commands to their end, whatever happens to this process meanwhile but SIGKILL."""
    # A chatty command makes a million tuples a second, and to look for circles among them takes a
    # fifth of the time.
    gc.set_threshold(50_000)
    out, err = Channel(sys.stdout), Channel(sys.stderr)
    live = Live(commands.total, options.jobs, partial(_usual_seconds, options.db))
    is_live = not commands.is_single and err.can_redraw
    screen = Screen(out, err, live.lines if is_live else None)
    run = Run(commands, halt=options.halt, retries=options.retries, limit=options.timeout)
    printer = Printer(run, screen, live, err, quiet=options.quiet, program=options.parser.prog,
                      typed=None if options.db is None else partial(typed, options),
                      has_picture=is_live, order=_order(options), prefix=prefix)
    with Notices(printer.notices, options.parser.prog), Signals(run, screen):
        try:
            # `Run` lets it grow
            scheduler = Scheduler(1, sinks=sinks, keep_finished=0, max_payload=MOST_RECORDED)
        except BgworkerError as error:
            options.parser.error(str(error))
        try:
            _listen(scheduler, options)
            subscription = scheduler.subscribe(
                maxsize=2 * MOST_UNSHOWN + 4 * AHEAD, back_pressure=True
            )
            printer.follow(subscription, REDRAW if is_live else 0.0)
            run.submit(scheduler, options.jobs, lambda: subscription.health().pending)
            run.wait()
            subscription.close()
            printer.join(FOR_EVER)  # all is shown, however slowly it is read
            scheduler.shutdown()  # waits for commands that are past their deadline to be gone
            printer.finish(subscription.health().dropped, scheduler.sinks)
        except BaseException as error:
            # `Killed`, or a defect: in no case may commands go on unseen
            kill_children()
            run.stop("killed")
            scheduler.shutdown(timeout=LAST_MOMENT)
            if isinstance(error, Killed):
                leave_at_once(run, screen)
            # no thread could be started: ShutdownError, a RuntimeError, comes from the pool
            if isinstance(error, RuntimeError) and "thread" in str(error):
                options.parser.fail(f"{error}; raise the limit of processes (ulimit -u, the "
                                    "container's)")
            raise
    return run.exit_code()


def _order(options: Namespace) -> Order | None:
    """Return what holds back the lines of commands; None where they are shown as they come."""
    if not options.keep_order and not options.group:
        return None
    from .order import Order
    return Order(keeps_order=options.keep_order, is_grouped=options.group)


def _prefix(options: Namespace) -> Prefix:
    if options.tag and not options.prefix:
        raise ConfigurationError("argument --no-prefix: expected without --tag, which begins each "
                                 "line with its command; leave out one of them")
    return Prefix.TAG if options.tag else Prefix.NUMBER if options.prefix else Prefix.NONE


def _usual_seconds(db: str | None, script_hashes: Collection[str]) -> Mapping[str, float]:
    """Return how long commands ran before, by the hash of their text; nothing where no history can
    tell. The printer's thread, which it may hold up for a moment."""
    if db is None:
        return {}
    from ..history.reader import History
    found: dict[str, float] = {}
    asked = list(script_hashes)
    # an estimate is worth no trouble; what is wrong with the file, its sink tells
    with suppress(BgworkerError), History(db, patience=PATIENCE) as history:
        for start in range(0, len(asked), MOST_ASKED):
            found.update(history.usual_seconds(asked[start:start + MOST_ASKED]))
    return found


@contextmanager
def _medians(options: Namespace) -> Iterator[None]:
    """Let a limit that is a share of what is usual know the earlier runs of the history."""
    if not options.timeout.is_share or not has_records(options.db):
        yield
        return
    from ..history.reader import History
    try:
        history = History(options.db)
    except BgworkerError as error:
        options.parser.error(str(error))

    def median_of(source: Source) -> float | None:
        found = history.usual_seconds([source.script_hash], completed_only=True)
        return found.get(source.script_hash)

    with history:
        options.timeout.median_of = median_of
        yield


def _listen(scheduler: Scheduler, options: Namespace) -> None:
    """Let ``bgworker cancel`` cancel the commands, if they are recorded."""
    if options.db is not None:
        try:
            scheduler.listen(options.db)
        except BgworkerError as error:
            options.parser.tell(f"bgworker cancel cannot reach these commands: {error}")

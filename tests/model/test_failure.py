"""How exceptions become text, those included whose authors mean no good."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from bgworker import Scheduler, TaskCancelled, TaskStatus, TaskTimedOut
from bgworker.model import failure
from bgworker.model.failure import describe_failure

LONG = 30.0


def raising(error: BaseException) -> Callable[..., Any]:
    def method(*_: object) -> Any:
        raise error

    return method


def raising_another(error: BaseException) -> Callable[..., Any]:
    """Raises one like it each time: one that is kept would keep all whom it was raised at."""
    def method(*_: object) -> Any:
        raise type(error)(*error.args)

    return method


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def run(error: BaseException, **settings: Any) -> Any:
    """Have a task raise an exception; return the task, which has ended."""
    with Scheduler(1) as pool:
        task = pool.options(**settings).submit(raising(error))
        assert task.wait(LONG)
    return task


def test_a_plain_exception_is_told_as_python_tells_it() -> None:
    kind, message, trace = describe_failure(raised(KeyError("gone")), 65536)
    assert (kind, message) == ("KeyError", "'gone'")
    assert trace.startswith("Traceback (most recent call last):\n  File") and trace.endswith(
        "\nKeyError: 'gone'\n"
    )
    assert describe_failure(ValueError(), 64) == ("ValueError", "", "ValueError\n")
    assert describe_failure(TaskTimedOut("late"), 64)[0] == "TaskTimedOut"


def test_what_led_to_an_exception_stands_before_it() -> None:
    trace = describe_failure(raised(KeyError("last"), raised(ValueError("first"))), 65536)[2]
    assert trace.index(
        "ValueError: first\n\nThe above exception was the direct cause"
    ) < trace.index("KeyError: 'last'")
    try:
        try:
            raise ValueError("early")
        except ValueError:
            raise KeyError("late")
    except KeyError as error:
        assert "ValueError: early\n\nDuring handling of" in describe_failure(error, 65536)[2]
        assert (
            "early" not in describe_failure(raised(error, None), 65536)[2]
        ), "``from None`` hides it"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="has neither groups nor notes")
def test_members_of_groups_and_notes_are_shown() -> None:
    inner = ExceptionGroup("inner", [TypeError("two")])  # type: ignore[name-defined]
    group = ExceptionGroup("all", [raised(ValueError("one")), inner])  # type: ignore[name-defined]
    group.add_note("a note\ud800")
    trace = describe_failure(raised(group), 65536)[2]
    parts = [
        "ExceptionGroup: all (2 sub-exceptions)",
        "a note\ufffd",
        "| ValueError: one",
        "inner",
        "| TypeError: two",
    ]
    assert sorted(parts, key=trace.index) == parts


@pytest.mark.skipif(sys.version_info < (3, 11), reason="has no groups")
def test_endless_groups_end() -> None:
    group: Any = ValueError("leaf")
    for _ in range(3000):
        group = ExceptionGroup("deep", [group, group])  # type: ignore[name-defined]
    assert len(describe_failure(group, 65536)[2].encode()) <= 65536
    while not isinstance(group, ValueError):
        group = group.exceptions[0]


def test_circles_and_long_chains_end_and_the_latest_is_shown() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert describe_failure(first, 65536)[2].count("ValueError") == 2
    chain: BaseException = ValueError(0)
    for number in range(1, 10_000):
        latest = ValueError(number)
        latest.__cause__ = chain
        chain = latest
    trace = describe_failure(chain, 65536)[2]
    assert trace.endswith("ValueError: 9999\n") and trace.count("ValueError") == failure.MOST_SHOWN
    while chain.__cause__ is not None:  # else letting go of it takes as many stack frames
        earlier, chain.__cause__ = chain.__cause__, None
        chain = earlier


@pytest.mark.parametrize("text", ["x" * 10 ** 7, "\u00e9\n" * 10 ** 7], ids=["one line", "lines"])
def test_an_exception_with_a_huge_text_costs_no_more_memory_than_fits(text: str) -> None:
    error = raised(ValueError(text), ValueError(text))
    if sys.version_info >= (3, 11):
        error.add_note(text)
    tracemalloc.start()
    try:
        _, message, trace = describe_failure(error, 1000)
        assert tracemalloc.get_traced_memory()[1] < 2 ** 21
    finally:
        tracemalloc.stop()
    assert (
        len(message.encode()) <= 1000
        and len(trace.encode()) <= 1000
        and message.startswith(text[:400])
    )


class LyingClass(type):
    __eq__ = __hash__ = raising_another(GeneratorExit())  # type: ignore[assignment]
    __instancecheck__ = __getattribute__ = __eq__  # type: ignore[assignment]


SPEAKING = (
    "__str__",
    "__repr__",
    "__getattribute__",
    "with_traceback",
    "add_note",
    "__eq__",
    "__hash__",
    "__bool__",
    "__reduce_ex__",
    "__format__",
    "__len__",
    "__iter__",
)
TOLD = (
    "__class__",
    "__traceback__",
    "__cause__",
    "__context__",
    "__suppress_context__",
    "__notes__",
    "args",
    "reason",
    "__dict__",
    "exceptions",
    "code",
    "__module__",
)


def hostile(base: type, error: BaseException) -> Any:
    """Return a class of exceptions, each question to which raises."""
    attributes: dict[str, Any] = dict.fromkeys(SPEAKING, raising_another(error))
    attributes.update(dict.fromkeys(TOLD, property(raising_another(error))))
    del attributes["__module__"]
    return LyingClass("Hostile", (base,), attributes)


@pytest.mark.parametrize(
    "base",
    [
        Exception,
        ValueError,
        KeyError,
        OSError,
        SyntaxError,
        UnicodeDecodeError,
        SystemExit,
        GeneratorExit,
        KeyboardInterrupt,
        StopIteration,
        BaseException,
    ],
)
@pytest.mark.parametrize(
    "error",
    [RuntimeError(), SystemExit(), KeyboardInterrupt(), TaskCancelled(), GeneratorExit()],
    ids=repr,
)
def test_a_task_ends_as_it_did_whatever_its_exception_answers(
    base: type, error: BaseException
) -> None:
    arguments = ("utf-8", b"x", 0, 1, "no") if base is UnicodeDecodeError else ("text",)
    odd = hostile(base, error)(*arguments)
    task = run(odd)
    assert task.exception(LONG) is odd and task.status is TaskStatus.FAILED
    snapshot = task.snapshot()
    assert (
        snapshot.failure_type.endswith("Hostile")
        and snapshot.failure_message == "<unprintable object>"
    )
    assert "in method" in snapshot.invocation_info


@pytest.mark.parametrize("pretends", [TaskCancelled, KeyboardInterrupt, int])
def test_an_exception_is_what_it_is_and_not_what_it_claims(pretends: type) -> None:
    odd = type("Odd", (ValueError,), {"__class__": pretends, "reason": "none"})("text")
    task = run(odd)
    assert task.exception(LONG) is odd and task.snapshot().failure_message == "text"


def test_a_class_whose_module_is_no_text_has_a_type_that_is_text() -> None:
    for module, shown in (
        (sys, "?.Odd"),
        (None, "?.Odd"),
        (7, "?.Odd"),
        ("a\ud800b", "a\ufffdb.Odd"),
    ):
        odd = type("Odd", (ValueError,), {"__module__": module})
        assert describe_failure(odd(), 65536)[0] == shown
    kind = type("Odd", (ValueError,), {})
    kind.__qualname__ = type(
        "Lie", (str,), {"__str__": raising(GeneratorExit()), "encode": raising(GeneratorExit())}
    )("O\0dd")
    assert describe_failure(kind(), 65536)[0] == f"{__name__}.O\ufffddd"


@pytest.mark.parametrize(
    "reason",
    [
        None,
        "",
        0,
        "why\0",
        5,
        object(),
        type("Odd", (), {"__str__": raising(SystemExit())})(),
        type("Odd", (), {"__bool__": raising(KeyboardInterrupt())})(),
    ],
    ids=range(8),
)
def test_a_task_that_cancels_itself_for_whatever_reason_is_cancelled(reason: Any) -> None:
    task = run(TaskCancelled(reason))
    assert (
        task.cancelled()
        and type(task.snapshot().failure_message) is str
        and task.snapshot().failure_message
    )
    assert run(BaseException.__new__(hostile(TaskCancelled, SystemExit()), "x")).cancelled()


class OddLoader(importlib.abc.InspectLoader):
    """Loads a module, and answers the question for its source in its own way."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.get_source = answer  # type: ignore[method-assign]

    def exec_module(self, module: Any) -> None:
        exec(compile("def run(error):\n    raise error", "<nowhere>.py", "exec"), module.__dict__)

    def get_source(self, fullname: str) -> str | None:
        raise NotImplementedError


def module_of(loader: OddLoader, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_loader("odd_module", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "odd_module", module)
    return module


@pytest.mark.parametrize(
    "answer",
    [raising(SystemExit()), raising(KeyboardInterrupt()), lambda name: 7, lambda name: "x"],
    ids=range(4),
)
def test_the_loader_of_a_module_ends_no_task(
    answer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(OddLoader(answer), monkeypatch)
    with Scheduler(1, record_source=True) as pool:
        task = pool.submit(module.run, ValueError("bad"))
        assert isinstance(task.exception(LONG), ValueError)
        assert len(task.snapshot().script_hash or "") == 64
    assert 'File "<nowhere>.py", line 2, in run' in (task.snapshot().invocation_info or "")


@pytest.mark.leaks_threads(
    "the text that never comes is waited for by its own thread until the test releases it"
)
@pytest.mark.parametrize("place", ["text", "note", "cause", "loader"])
def test_an_exception_whose_text_never_comes_ends_its_task(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(failure, "PATIENCE", 0.1)
    stuck = type("Stuck", (ValueError,), {"__str__": lambda self: str(gate.wait(LONG))})
    function = raising
    error: Any = stuck() if place == "text" else ValueError("bad")
    if place == "note":
        error.__notes__ = [stuck()]
    elif place == "cause":
        error.__cause__ = stuck()
    elif place == "loader":
        module = module_of(OddLoader(lambda name: str(gate.wait(LONG))), monkeypatch)
        function = lambda error: lambda: module.run(error)
    try:
        with Scheduler(1) as pool:
            task = pool.submit(function(error))
            assert task.exception(LONG) is error
            snapshot = task.snapshot()
            assert snapshot.failure_message == (
                "(its text takes too long)" if place == "text" else "bad"
            )
            assert snapshot.status is TaskStatus.FAILED
            assert "in " in (snapshot.invocation_info or "")
    finally:
        gate.set()


def test_only_code_of_others_needs_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise AssertionError("a thread is started")

    monkeypatch.setattr(failure, "own_thread", refuse)
    # pytest has one of its own
    monkeypatch.setattr(failure, "_LOADERS", (*failure._LOADERS, type(__loader__)))
    class Own(ValueError):
        """As most exceptions are: with a name of its own and nothing else."""

    for error in (
        ValueError("x"),
        KeyError(1),
        OSError(2, "no", "file", None, b"other"),
        Own("x", 1.5, None),
        SystemExit(3),
    ):
        assert (
            describe_failure(raised(error, raised(Own("cause"))), 65536)[2].count("Own: cause") == 1
        )
    assert describe_failure(TaskCancelled("why"), 65536) == (None, "why", None)
    for odd in (
        ValueError([1]),
        OSError(2, "no", [1]),
        raised(ValueError(), ValueError(object())),
        UnicodeEncodeError("utf-8", "x", 0, 1, ""),
    ):
        with pytest.raises(AssertionError, match="a thread is started"):
            describe_failure(odd, 65536)


def test_a_syntax_error_shows_its_line_and_its_caret() -> None:
    try:
        compile("x = (1,\ny = 2\n", "<typed>", "exec")
    except SyntaxError as caught:
        trace = describe_failure(caught, 65536)[2]
    assert '  File "<typed>", line 1\n' in trace and "\n    x = (1,\n        ^\n" in trace


class Account:
    balance = 1


@pytest.mark.skipif(sys.version_info < (3, 12), reason="its tracebacks have no hints")
def test_a_hint_of_python_stands_in_the_traceback() -> None:
    def misspell() -> Any:
        return Account().balence  # type: ignore[attr-defined]

    for function, hint in (
        (misspell, "Did you mean: 'balance'?"),
        (lambda: Acount, "Did you mean: 'Account'?"),  # type: ignore[name-defined]  # noqa: F821
        (lambda: importlib.import_module("json") and exec("from json import lods"), "'loads'"),
    ):
        with Scheduler(1) as pool:
            task = pool.submit(function)
            assert task.wait(LONG)
        assert hint in task.snapshot().invocation_info.splitlines()[-1]


@pytest.mark.leaks_threads("the names that never come are waited for by their own thread")
def test_an_object_that_does_not_tell_its_names_holds_up_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(failure, "PATIENCE", 0.1)

    class Slow:
        def __dir__(self) -> Any:
            gate.wait(LONG)
            return []

    try:
        with Scheduler(1) as pool:
            task = pool.submit(lambda: Slow().missing)  # type: ignore[attr-defined]
            assert isinstance(task.exception(LONG), AttributeError)
        assert "in <lambda>" in task.snapshot().invocation_info
    finally:
        gate.set()

"""Where a task's code comes from is told of every callable, and its hash is always there."""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.abc
import importlib.util
import inspect
import sys
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bgworker import Scheduler
from bgworker.model.records import Source
from bgworker.running.source import _MOST_CACHED, _cache, source_of
from bgworker.testing import MemorySink

LONG = 30.0


def plain() -> int:
    return 1


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)
    return wrapper


@logged
def decorated() -> int:
    return 2


class Worker:
    def method(self) -> int:
        return 3

    @classmethod
    def of_class(cls) -> int:
        return 4

    @staticmethod
    def static() -> int:
        return 5

    def __call__(self) -> int:
        return 6


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("function", "name", "origin"),
    [
        (plain, "plain", plain),
        (functools.partial(plain), "plain", plain),
        (functools.partial(functools.partial(Worker().method)), "Worker.method", Worker.method),
        (decorated, "decorated", inspect.unwrap(decorated)),
        (functools.lru_cache(plain), "plain", plain),
        (Worker().method, "Worker.method", Worker.method),
        (Worker.of_class, "Worker.of_class", Worker.of_class),
        (Worker.static, "Worker.static", Worker.static),
        (Worker(), "Worker.__call__", Worker.__call__),
    ],
)
def test_the_source_of_what_is_made_of_a_function_is_that_functions(
    function: Callable[..., Any], name: str, origin: Any
) -> None:
    source = source_of(function)
    text = inspect.getsource(origin)
    assert (source.name, source.script_id) == (name, f"{__name__}:{name}")
    assert (source.script_text, source.script_hash) == (text, sha(text))


@pytest.mark.parametrize(
    ("function", "script_id"),
    [
        (len, "builtins:len"),
        (dict, "builtins:dict"),
        ("".join, "?:str.join"),
        (Worker, f"{__name__}:Worker"),
        (print, "builtins:print"),
    ],
)
def test_where_there_is_no_source_the_hash_is_that_of_the_name(
    function: Callable[..., Any], script_id: str
) -> None:
    source = source_of(function)
    assert (source.script_id, source.script_text, source.script_hash) == (
        script_id,
        None,
        sha(script_id),
    )


def test_a_lambda_has_the_source_of_its_lines() -> None:
    source = source_of(lambda: 41 + 1)
    assert source.name.endswith("<lambda>") and "41 + 1" in (source.script_text or "")
    assert source.script_hash == sha(source.script_text or "")


def test_code_that_came_from_no_file_has_a_hash_of_its_name() -> None:
    namespace: dict[str, Any] = {"__name__": "made_up"}
    exec("def run():\n    return 7", namespace)
    source = source_of(namespace["run"])
    assert (source.script_id, source.script_text) == ("made_up:run", None)
    assert source.script_hash == sha("made_up:run")


class BrokenLoader(importlib.abc.InspectLoader):
    """Loads a module and will not say from what."""

    def exec_module(self, module: ModuleType) -> None:
        exec(compile("def run():\n    return 8", "<no such file>", "exec"), module.__dict__)

    def get_source(self, fullname: str) -> str:
        raise RuntimeError("this archive is encrypted")


def test_a_module_whose_loader_will_not_tell_its_source_has_a_hash_of_the_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = importlib.util.spec_from_loader("encrypted", BrokenLoader())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "encrypted", module)
    with Scheduler(1, record_source=True) as pool:
        task = pool.submit(module.run)
        assert task.result(LONG) == 8
        snapshot = task.snapshot()
    assert (snapshot.script_id, snapshot.script_text, snapshot.script_hash) == (
        "encrypted:run",
        None,
        sha("encrypted:run"),
    )


class Proxy:
    """Answers every question with another of its kind."""

    def __getattr__(self, name: str) -> Any:
        return Proxy()

    def __call__(self) -> int:
        return 9


class Refuser:
    """Answers no question, as a proxy does that is bound to nothing."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"working outside of the request, asked for {name}")

    def __call__(self) -> int:
        return 10


def wraps_itself() -> int:
    return 11


wraps_itself.__wrapped__ = wraps_itself  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Proxy, Refuser])
def test_callables_that_answer_oddly_run_and_have_a_name(kind: type[Any]) -> None:
    with Scheduler(1) as pool:
        task = pool.submit(kind())
        assert task.result(LONG) in (9, 10) and task.name == f"{kind.__name__}.__call__"
        assert task.snapshot().script_hash == sha(inspect.getsource(kind.__call__))


def test_a_function_that_claims_to_wrap_itself_has_a_source() -> None:
    source = source_of(wraps_itself)
    assert source.name == "wraps_itself" and source.script_hash == sha(
        inspect.getsource(wraps_itself.__code__)
    )


def test_what_is_not_callable_has_a_source_too_and_fails_when_it_runs() -> None:
    with Scheduler(1) as pool:
        task = pool.submit(None)  # type: ignore[arg-type]
        assert isinstance(task.exception(LONG), TypeError) and task.name == "NoneType"
        assert len(task.snapshot().script_hash or "") == 64


def test_odd_characters_in_a_name_are_cleaned() -> None:
    def odd() -> None:
        pass

    odd.__qualname__ = odd.__module__ = "a\0b\ud800"
    source = source_of(odd)
    assert (source.name, source.script_id) == ("a�b�", "a�b�:a�b�") and source_of(odd) is source


class Text(str):
    """Lies about itself, as far as it can."""

    def __eq__(self, other: object) -> bool:
        raise SystemExit

    __hash__ = __len__ = __str__ = __contains__ = __ne__ = __eq__  # type: ignore[assignment]
    encode = isascii = replace = __eq__  # type: ignore[assignment]


class NoAttribute:
    __class__ = property(lambda self: 1 / 0)  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        raise GeneratorExit

    def __call__(self) -> int:
        return 3


def named(module: Any, qualname: str = "run", **attributes: Any) -> Any:
    def run() -> int:
        return 3

    run.__module__, run.__qualname__ = module, qualname
    run.__dict__.update(attributes)
    return run


@pytest.mark.parametrize(
    ("make", "script_id"),
    [
        (lambda: named(sys), "?:run"),
        (lambda: named(None), "?:run"),
        (lambda: named(7), "?:run"),
        (lambda: named(["m"]), "?:run"),
        (lambda: named(Text("m\0"), Text("r\ud800")), "m\ufffd:r\ufffd"),
        (lambda: named("m", source=sys), "m:run"),
        (lambda: named("m", __wrapped__=NoAttribute()), f"{__name__}:NoAttribute.__call__"),
        (lambda: named("m", __wrapped__=named(sys, Text("inner"))), "?:inner"),
        (NoAttribute, f"{__name__}:NoAttribute.__call__"),
        (lambda: functools.partial(NoAttribute()), f"{__name__}:NoAttribute.__call__"),
        (lambda: named("m", source=type("Lie", (), {"__class__": Source})()), "m:run"),
    ],
    ids=range(11),
)
def test_whatever_a_callable_is_called_it_runs_and_costs_its_neighbours_no_event(
        make: Callable[[], Any], script_id: str, tmp_path: Path) -> None:
    memory = MemorySink()
    with Scheduler(
        1,
        sinks=[f"jsonl:{tmp_path}/events.jsonl", f"sqlite:{tmp_path}/history.db", memory],
        record_source=True,
    ) as pool:
        for _ in range(3):
            pool.submit(len, "")
        task = pool.submit(make())
        assert task.result(LONG) == 3
    assert task.snapshot().script_id == script_id and type(task.name) is str
    for name in ("jsonl", "sqlite", "memory"):
        assert (pool.sinks[name].delivered, pool.sinks[name].dropped) == (16, 0)


def test_the_source_of_a_function_in_a_zip_archive_is_read_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        archive.writestr("zipped_module.py", "X = 1\n\ndef run():\n    return X\n\nY = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code.zip"))
    module = importlib.import_module("zipped_module")
    assert source_of(module.run).script_text == "def run():\n    return X\n"


def test_no_module_is_asked_for_anything_when_a_source_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Lazy(ModuleType):
        def __getattribute__(self, name: str) -> Any:
            asked.append(name)
            raise SystemExit

    asked: list[str] = []
    monkeypatch.setitem(sys.modules, "lazy_module", Lazy("lazy_module"))
    namespace: dict[str, Any] = {"__name__": "lazy_module"}
    exec(compile("def run():\n    return 8", "<nowhere at all>", "exec"), namespace)
    source = source_of(namespace["run"])
    assert (source.script_text, source.script_hash) == (None, sha("lazy_module:run")) and not asked


def test_a_callable_may_bring_its_own_source() -> None:
    class Own(Source):
        script_id = "program"
        script_hash = sha("program")
        script_text = None

    class Program:
        source = Own()

        def __call__(self) -> None:
            pass

    assert source_of(Program()) is Program.source


def test_functions_of_one_code_share_a_source_unless_their_names_differ() -> None:
    def make() -> Callable[[], None]:
        def made() -> None:
            pass
        return made

    first, second, third = make(), make(), make()
    third.__qualname__ = "another"
    assert source_of(first) is source_of(second) and source_of(third) is not source_of(first)
    assert source_of(third).name == "another" and source_of(first).name.endswith("made")


def test_the_cache_is_bounded_and_keeps_no_function_alive() -> None:
    made: list[Any] = []
    for number in range(_MOST_CACHED + 10):
        namespace: dict[str, Any] = {}
        exec(f"def run{number}(): pass", namespace)
        made.append(namespace[f"run{number}"])
        assert source_of(made[-1]).name == f"run{number}"
    assert len(_cache) <= _MOST_CACHED
    followed = [weakref.ref(each) for each in made[-5:]]
    made.clear()
    namespace.clear()
    gc.collect()  # a function and the namespace it lives in hold one another
    assert [each() for each in followed] == [None] * 5

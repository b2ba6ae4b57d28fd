"""A resumable function is recorded with all that its task needs to be run again, or refused."""

from __future__ import annotations

import enum
import functools
import importlib
import json
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from bgworker import ConfigurationError, Scheduler, checkpoint, current_task, resumable
from bgworker.model.events import TaskSnapshot
from bgworker.remote import resumable as module
from bgworker.running.source import source_of
from tests.support import SOON, environment


@resumable("echoed", version=3)
def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs, dict(current_task().metadata)


def sha_of(function: Callable[..., Any]) -> str:
    return source_of(function).script_hash


@pytest.fixture
def pool() -> Iterator[Scheduler]:
    with Scheduler(1) as made:
        yield made


def recorded(pool: Scheduler, *args: Any, **kwargs: Any) -> TaskSnapshot:
    task = pool.submit(echo, *args, **kwargs)
    task.result(SOON)
    return task.snapshot()


# -- the decorator --


def test_the_decorator_returns_the_function_itself_callable_as_ever() -> None:
    def plain(number: int) -> int:
        return number + 1

    assert resumable("returned itself")(plain) is plain
    assert plain(1) == 2
    assert pickle.loads(pickle.dumps(echo)) is echo


def test_the_hash_and_the_name_of_a_resumable_function_are_those_of_the_plain_one() -> None:
    def plain() -> None: ...

    before = source_of(plain)
    resumable("same source")(plain)
    after = source_of(plain)
    assert (after.script_hash, after.script_id, after.name) == (
        before.script_hash, before.script_id, before.name)


@pytest.mark.parametrize(("name", "told"), [
    ("", "1 to 1024 bytes of text, got ''"),
    ("  ", "got '  '"),
    (None, "got None"),
    (7, "got 7"),
    ("a\0b", "got 'a\\x00b'"),
    ("\ud800", "bytes of text"),
    ("x" * 1025, "1 to 1024 bytes"),
    ("\u20ac" * 400, "1 to 1024 bytes"),
])
def test_a_name_that_is_none_is_refused(name: Any, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resumable(name)
    assert told in str(caught.value)


@pytest.mark.parametrize("version", [-1, 1.0, "1", None, True, 2**53 + 1])
def test_a_version_that_is_none_is_refused(version: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^version: expected"):
        resumable("versions", version=version)


def test_the_decorator_without_a_name_says_how_it_is_written() -> None:
    with pytest.raises(ConfigurationError, match=r'write @resumable\("name"\)'):
        @resumable  # type: ignore[arg-type]
        def function() -> None: ...


class Thing:
    @resumable("thing's own")
    def method(self) -> None: ...

    @staticmethod
    @resumable("thing's static")
    def static(number: int) -> int:
        return number


@pytest.mark.parametrize("other", [len, Thing, Thing().method, functools.partial(len, "x"),
                                   staticmethod(len), 7])
def test_only_a_function_made_with_def_can_be_resumable(other: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"resumable\('other'\): expected a function made"):
        resumable("other")(other)


def test_two_functions_of_one_name_are_an_error_that_names_both() -> None:
    def first() -> None: ...
    def second() -> None: ...

    resumable("both")(first)
    with pytest.raises(ConfigurationError) as caught:
        resumable("both")(second)
    assert first.__qualname__ in str(caught.value) and second.__qualname__ in str(caught.value)
    assert module.registered()["both"].function is first


def test_the_same_function_reloaded_takes_the_place_of_the_earlier_one() -> None:
    def made() -> Callable[[], None]:
        @resumable("reloaded", version=len(versions))
        def function() -> None: ...
        return function

    versions: list[int] = []
    made()
    versions.append(1)
    later = made()
    found = module.registered()["reloaded"]
    assert found.function is later and found.version == 1


def test_the_source_is_that_of_the_import_whatever_becomes_of_the_file(
    pool: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from bgworker import resumable\n\n@resumable('edited')\ndef edited():\n    return 1\n"
    file = tmp_path / "edited_meanwhile.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    edited = importlib.import_module("edited_meanwhile").edited
    file.write_text(text.replace("return 1", "return 1 + 1"))
    task = pool.options(record_source=True).submit(edited)
    assert task.result(SOON) == 1
    snapshot = task.snapshot()
    assert snapshot.script_text == "@resumable('edited')\ndef edited():\n    return 1\n"
    assert snapshot.script_hash == sha256(snapshot.script_text.encode()).hexdigest()


# -- what is recorded --


@pytest.mark.parametrize("value", [
    None, True, False, 0, 1, -7, 10**40, 0.0, -0.0, 1.0, 1e300, 0.1, "", "\u20ac \U0001f600",
    "line\nline", [], {}, [1, 1.0, True, None, [[]]], {"a": {"b": [1, {"c": ""}]}, "": 2},
])
def test_arguments_are_recorded_so_that_they_come_back_the_same(
    pool: Scheduler, value: Any
) -> None:
    snapshot = recorded(pool, value, [value], key={"in": value})
    found = json.loads(snapshot.arguments or "")
    expected = {"args": [value, [value]], "kwargs": {"key": {"in": value}}}
    assert repr(found) == repr(expected), "equal, and of the same types"


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 1


class Text(str):
    pass


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)

REFUSED = [
    ((1, 2), "a tuple (1, 2); give a list"),
    ({1: 2}, "a dict with the key 1, which is an int; give it keys that are str"),
    ({None: 2}, "the key None, which is a NoneType"),
    ({Text("a"): 2}, "which is a Text"),
    ({1}, "a set {1}; give a sorted list"),
    (float("nan"), "nan; give None instead"),
    (float("-inf"), "-inf; give None instead"),
    (b"raw", "a bytes b'raw'; give text"),
    (Text("a"), "a Text 'a'; give a plain str"),
    (Level.HIGH, "a Level <Level.HIGH: 1>; give a plain int"),
    (Colour.RED, "a Colour <Colour.RED: 1>; give a text, a path or an id"),
    (OrderedDict(a=1), "an OrderedDict"),
    (1j, "a complex 1j"),
    (len, "function len>; give a text"),
    ("a\0b", "'a\\x00b', which has a NUL or half a surrogate pair; leave that out"),
    ("\udc80", "half a surrogate pair"),
    ({"\udc80": 1}, "the key"),
    (nested(91), "more than 90 lists and dicts inside one another; flatten it"),
    (CIRCLE, "more than 90 lists and dicts"),
]
if hasattr(sys, "get_int_max_str_digits"):
    REFUSED.append(([10**5000], "an integer too long to be read back; give it as hex(...)"))


@pytest.mark.parametrize(("value", "told"), REFUSED, ids=range(len(REFUSED)))
def test_an_argument_that_json_would_change_is_refused_with_its_place_and_a_remedy(
    pool: Scheduler, value: Any, told: str
) -> None:
    for args, kwargs, place in (
        ((0, value), {}, "argument 2 of "), ((), {"when": value}, "argument 'when' of "),
        (([1, {"a": value}],), {}, "argument 1 of "),
    ):
        with pytest.raises(ConfigurationError) as caught:
            pool.submit(echo, *args, **kwargs)
        text = str(caught.value)
        assert text.startswith(place + "tests.remote.test_resumable.echo"), text
        assert told in text and "expected a JSON value, since the function is resumable" in text
    if type(value) is not list:  # else it is the list that has a place of its own
        assert " at [1]['a']" in text
    assert pool.tasks() == [], "nothing was queued"


def test_the_name_of_an_argument_must_be_text_too(pool: Scheduler) -> None:
    with pytest.raises(ConfigurationError, match="the name 'a.udc80' of an argument"):
        pool.submit(echo, **{"a\udc80": 1})


def test_no_code_of_a_refused_value_goes_unguarded(pool: Scheduler) -> None:
    class Hostile:
        @property
        def __class__(self) -> type:  # type: ignore[override]
            return str

        def __repr__(self) -> str:
            raise SystemExit

    with pytest.raises(ConfigurationError, match="a Hostile <unprintable Hostile object>"):
        pool.submit(echo, [Hostile()])


def test_arguments_beyond_max_payload_are_refused_with_both_figures() -> None:
    with Scheduler(1, max_payload=1000) as pool:
        fits = "x" * (1000 - len('{"args":[""],"kwargs":{}}'))
        task = pool.submit(echo, fits)
        assert len(task.snapshot().arguments or "") == 1000
        with pytest.raises(ConfigurationError, match="have 1001 bytes as JSON; max_payload is"):
            pool.submit(echo, fits + "x")
        twice: Any = []
        for _ in range(60):  # 2**60 values
            twice = [twice, twice]
        with pytest.raises(ConfigurationError, match="have more than 1000 bytes as JSON"):
            pool.submit(echo, twice)


def test_the_record_names_the_function_and_keeps_the_users_metadata(pool: Scheduler) -> None:
    task = pool.options(metadata={"ticket": 7}, name="own name").submit(echo, 1)
    expected = {"ticket": 7, "resumable": {"name": "echoed", "version": 3}}
    assert task.result(SOON)[2] == expected, "the task sees what its record has"
    snapshot = task.snapshot()
    assert snapshot.metadata == expected
    assert (snapshot.name, snapshot.script_hash) == ("own name", sha_of(echo))


def test_a_key_of_the_users_own_called_resumable_is_refused(pool: Scheduler) -> None:
    with pytest.raises(ConfigurationError, match="metadata: the key 'resumable' is bgworker's"):
        pool.options(metadata={"resumable": True}).submit(echo)
    task = pool.options(metadata={"resumable": True}).submit(len, "x")
    assert task.snapshot().metadata == {"resumable": True}, "of other tasks it is the user's"


def test_metadata_that_cannot_be_recorded_in_full_are_refused_with_both_figures() -> None:
    with Scheduler(1, max_payload=1000) as pool:
        options = pool.options(metadata={"text": "x" * 1000})
        with pytest.raises(ConfigurationError, match=r"have 1\d\d\d bytes .* max_payload is 1000"):
            options.submit(echo)
        task = options.submit(len, "x")
        assert "truncated" in task.snapshot().metadata


def test_arguments_are_recorded_of_resumable_functions_alone(pool: Scheduler) -> None:
    assert recorded(pool, 1).arguments == '{"args":[1],"kwargs":{}}'
    task = pool.options(record_arguments=False).submit(echo, 2)
    assert task.snapshot().arguments == '{"args":[2],"kwargs":{}}'
    assert pool.submit(len, "x").snapshot().arguments is None


# -- what is around a resumable function --


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return "logged", function(*args, **kwargs)
    return wrapper


@pytest.mark.parametrize(("around", "told"), [
    (functools.partial(echo, 1), "a functools.partial of it; submit the function with all of its"),
    (Thing().method, "a method of an object; make it a function that finds the object by an id"),
    (logged(echo), "put @resumable above its other decorators"),
    (functools.lru_cache(echo), "put @resumable above its other decorators"),
    (functools.partial(Thing().method), "a functools.partial of it"),
])
def test_what_is_around_a_resumable_function_is_refused_rather_than_not_resumed(
    pool: Scheduler, around: Callable[..., Any], told: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        pool.submit(around)
    assert told in str(caught.value)


def test_a_resumable_function_may_be_around_another(pool: Scheduler) -> None:
    def inner() -> int:
        return 1

    outer = resumable("outer")(logged(inner))
    task = pool.submit(outer)
    assert task.result(SOON) == ("logged", 1)
    assert task.snapshot().metadata == {"resumable": {"name": "outer", "version": 1}}
    assert task.snapshot().script_hash == sha_of(inner)


def test_a_static_method_and_a_coroutine_function_can_be_resumable(pool: Scheduler) -> None:
    @resumable("coroutine")
    async def coroutine(number: int) -> int:
        checkpoint()
        return number

    assert pool.submit(coroutine, 5).result(SOON) == 5
    assert pool.submit(Thing.static, 6).result(SOON) == 6
    metadata = pool.submit(Thing.static, 6).snapshot().metadata
    assert metadata["resumable"]["name"] == "thing's static"


def test_two_closures_of_one_code_have_a_mark_each(pool: Scheduler) -> None:
    def made(name: str) -> Callable[[], str]:
        def function() -> str:
            return name
        function.__qualname__ = name
        return function

    first, second, plain = made("first"), made("second"), made("plain")
    resumable("closure 1")(first)
    resumable("closure 2")(second)
    names = [pool.submit(each).snapshot().metadata.get("resumable", {}).get("name")
             for each in (plain, first, second, plain)]
    assert names == [None, "closure 1", "closure 2", None]


def test_a_mark_that_is_carried_to_another_process_is_none_there() -> None:
    assert pickle.loads(pickle.dumps(module.registered()["echoed"])) is None


def test_map_submits_resumable_tasks(pool: Scheduler) -> None:
    assert [result[0] for result in pool.map(echo, [1, 2])] == [(1,), (2,)]
    assert [task.arguments for task in pool.tasks()] == [
        '{"args":[1],"kwargs":{}}', '{"args":[2],"kwargs":{}}']


def test_resumable_loads_no_history() -> None:
    code = ("import sys\nfrom bgworker import resumable\n"
            "print([name for name in sys.modules if 'history' in name or 'sqlite3' in name])")
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True,
                          text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr

"""The sink contract's helpers: per-event hooks, sink specs, sinks from the environment."""

from __future__ import annotations

import asyncio
import os
import string
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import bgworker.sinks
from bgworker.model.errors import ConfigurationError, SinkError
from bgworker.model.events import (
    Event,
    EventType,
    LifecycleEvent,
    LossEvent,
    StreamEvent,
    StreamType,
    TaskSnapshot,
    TaskStatus,
)
from bgworker.sinks import HookSink, SinkSpecError, open_sink, sinks_from_environ
from bgworker.sinks.base import HOOKS
from bgworker.sinks.jsonl import JsonlSink

NOW = datetime(2026, 11, 23, 14, 46, tzinfo=timezone.utc)
ID = "0" * 32


def event_of(type_: EventType) -> Event:
    if type_ == EventType.EVENTS_LOST:
        return LossEvent(type_, NOW, "hook", 2, "overflow", {"TaskOutput": 2})
    if type_.is_stream:
        return StreamEvent(type_, ID, 1, NOW, StreamType(type_.value[4:].lower()), "said")
    return LifecycleEvent(type_, ID, 1, NOW, TaskSnapshot(ID, "load", TaskStatus.CREATED, ID, NOW))


# -- HookSink --


@pytest.mark.parametrize("type_", list(EventType))
def test_every_event_type_has_its_hook_which_is_called_after_on_event(type_: EventType) -> None:
    called: list[tuple[str, Event]] = []
    body = {name: (lambda self, event, name=name: called.append((name, event)))
            for name in ["on_event", *HOOKS.values()]}
    sink = type("Recorder", (HookSink,), body)()
    event = event_of(type_)
    assert sink.write([event]) is None
    assert called == [("on_event", event), (HOOKS[type_], event)]


def test_a_sink_without_hooks_takes_every_event_and_closes() -> None:
    sink = HookSink()
    assert sink.write([event_of(type_) for type_ in EventType]) is None
    sink.close()


def test_hooks_before_the_first_async_one_run_inside_write_and_the_rest_as_one_coroutine() -> None:
    called: list[str] = []

    class Mixed(HookSink):
        def on_event(self, event: Event) -> None:
            called.append(event.type.value)

        async def on_task_error(self, event: StreamEvent) -> None:
            await asyncio.sleep(0)
            called.append("awaited")

    awaitable = Mixed().write([event_of(type_) for type_ in (
        EventType.TASK_OUTPUT, EventType.TASK_ERROR, EventType.TASK_WARNING, EventType.TASK_ERROR)])
    assert awaitable is not None
    assert called == ["TaskOutput", "TaskError"]

    async def finish() -> None:
        await awaitable

    asyncio.run(finish())
    assert called == ["TaskOutput", "TaskError", "awaited", "TaskWarning", "TaskError", "awaited"]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_hook_that_raises_ends_the_batch_with_its_exception(is_async: bool) -> None:
    called: list[str] = []

    class Failing(HookSink):
        def on_event(self, event: Event) -> None:
            called.append(event.type.value)

        def on_task_error(self, event: StreamEvent) -> None:
            raise OSError("no")

    class FailingLater(Failing):
        async def on_task_error(self, event: StreamEvent) -> None:  # type: ignore[override]
            raise OSError("no")

    async def write() -> None:
        sink = FailingLater() if is_async else Failing()
        awaitable = sink.write([event_of(EventType.TASK_ERROR), event_of(EventType.TASK_OUTPUT)])
        assert awaitable is not None
        await awaitable

    with pytest.raises(OSError, match="no"):
        asyncio.run(write())
    assert called == ["TaskError"]


@pytest.mark.parametrize(
    "hook",
    [
        lambda self, event: None,
        staticmethod(lambda event: None),
        classmethod(lambda cls, event: None),
    ],
)
def test_a_misspelled_hook_is_refused_with_the_close_match(hook: Any) -> None:
    with pytest.raises(
        TypeError, match=r"Typo\.on_task_complete is not a hook.*did you mean on_task_completed\?"
    ):
        type("Typo", (HookSink,), {"on_task_complete": hook})


def test_a_hook_like_nothing_known_is_refused_with_the_list_of_hooks() -> None:
    with pytest.raises(
        TypeError, match="the hooks are on_event, on_events_lost, on_task_cancelled"
    ):
        type("Typo", (HookSink,), {"on_zzzzzzzzzzzzzz": lambda self, event: None})


def test_what_is_no_method_or_comes_from_another_base_may_be_called_on_something() -> None:
    class Widget:
        def on_click(self) -> None: ...

    class Fine(HookSink, Widget):
        on_colour = "red"

    assert Fine().write([event_of(EventType.TASK_OUTPUT)]) is None


# -- specs --


def test_a_jsonl_spec_takes_options_in_the_types_of_the_sinks_keywords(tmp_path: Path) -> None:
    sink = open_sink(
        f"jsonl:{tmp_path}/a%20b.jsonl?max_bytes=10M&backups=3&compress=yes&durability=p%6fwer"
    )
    assert isinstance(sink, JsonlSink)
    assert sink.path == f"{tmp_path}{os.sep}a%20b.jsonl", "a path is not percent-decoded"
    assert (
        sink._file._max_bytes,
        sink._file._backups,
        sink._file._compress,
        sink._file._is_power_safe,
    ) == (10 * 1024**2, 3, True, True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("2K", 2048), ("2k", 2048), ("3G", 3 * 1024**3)]
)
def test_sizes_in_bytes_take_a_unit(text: str, value: int) -> None:
    sink = open_sink(f"jsonl:x?max_bytes={text}")
    assert isinstance(sink, JsonlSink) and sink._file._max_bytes == value


@pytest.mark.parametrize("text", ["true", "1", "yes", "on", "ON", "false", "0", "no", "off"])
def test_booleans_have_eight_spellings(text: str) -> None:
    sink = open_sink(f"jsonl:x?compress={text}")
    assert isinstance(sink, JsonlSink) and sink._file._compress is (
        text.lower() in ("true", "1", "yes", "on")
    )


def test_keywords_go_to_the_sink_as_they_are() -> None:
    sink = open_sink("jsonl:x?backups=2", max_bytes=7)
    assert isinstance(sink, JsonlSink) and (sink._file._backups, sink._file._max_bytes) == (2, 7)


def test_a_factory_is_imported_and_called_with_the_keywords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_sinks.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    sink: Any = open_sink("my_sinks:make", colour="red")
    assert sink.config == {"colour": "red"}
    assert type(open_sink("my_sinks:Nested.Inner")).__name__ == "Inner"


FACTORIES = """
from bgworker.sinks import HookSink
class Nested:
    class Inner(HookSink): pass
def make(**config):
    sink = HookSink()
    sink.config = config
    return sink
def nothing(): pass
def broken(): raise RuntimeError("two\\nlines")
number = 5
class Sulking(type):
    part = property(lambda cls: 1 / 0)
class hidden(metaclass=Sulking): pass
class Odd:
    write = property(lambda self: 1 / 0)
    close = print
odd = Odd
"""


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        (
            "debug.jsonl",
            {},
            "'debug.jsonl': it has no colon; expected jsonl:PATH, sqlite:PATH, webhook:URL or "
            "package",
        ),
        ("", {}, "'': it has no colon"),
        ("jsonl:", {}, "nothing follows its colon; expected jsonl:PATH"),
        ("jsonl:?backups=1", {}, "nothing follows its colon"),
        ("jsnl:/tmp/x.jsonl", {}, "no such kind of sink; expected jsonl:PATH"),
        ("C:\\x.jsonl", {}, "no such kind of sink"),
        (
            "jsonl:x?size=3",
            {},
            "no option 'size'; expected one of backups, compress, durability, max_bytes",
        ),
        (
            "jsonl:x",
            {"size": 3},
            "no option 'size'; expected one of backups, compress, durability, max_bytes",
        ),
        ("jsonl:x", {"path": "y"}, "no option 'path'"),
        ("jsonl:x?", {}, "option '' has no value; expected key=value"),
        ("jsonl:x?compress", {}, "option 'compress' has no value; expected key=value"),
        ("jsonl:x?backups=1&&backups=2", {}, "option '' has no value"),
        ("jsonl:x?backups=1&backups=2", {}, "option 'backups' is given twice; leave one out"),
        ("jsonl:x?backups=1", {"backups": 2}, "both in the spec and as a keyword"),
        ("jsonl:x?backups=2K", {}, "'backups' has the value '2K'; expected a whole number$"),
        ("jsonl:x?backups=\N{ARABIC-INDIC DIGIT ONE}", {}, "expected a whole number"),
        ("jsonl:x?backups=" + "9" * 5000, {}, "expected a whole number"),
        ("jsonl:x?max_bytes=10MB", {}, "'10MB'; expected a whole number, with K, M or G behind it"),
        ("jsonl:x?max_bytes=K", {}, "'K'; expected a whole number"),
        ("jsonl:x?max_bytes=-1", {}, "max_bytes: expected a whole number >= 1 or None, got -1"),
        ("jsonl:x?compress=maybe", {}, "'maybe'; expected true or false"),
        ("jsonl:x?durability=%FF", {}, "expected percent-encoded UTF-8"),
        ("jsonl:x?durability=gold", {}, "durability: expected 'process' or 'power', got 'gold'"),
        (
            "webhook:",
            {},
            "nothing follows its colon; expected jsonl:PATH, sqlite:PATH, webhook:URL",
        ),
        (
            "no_such_module:make",
            {},
            "module 'no_such_module' cannot be imported .ModuleNotFoundError.*sys.path; "
            "set PYTHONPATH=[.] to have",
        ),
        (
            "my_sinks:missing",
            {},
            "module 'my_sinks' has no 'missing'; expected the name of a class or function",
        ),
        ("my_sinks:number", {}, "'number' is not callable"),
        (
            "my_sinks:nothing",
            {},
            "returned NoneType; expected a sink, with methods write and close",
        ),
        ("my_sinks:odd", {}, "returned Odd; expected a sink, with methods write and close"),
        ("my_sinks:hidden.part", {}, "module 'my_sinks' has no 'hidden.part'"),
        ("my_sinks:nothing", {"a": 1}, "cannot be built .TypeError"),
        ("my_sinks:broken", {}, "cannot be built .RuntimeError: two lines.; correct its options"),
    ],
)
def test_a_spec_that_cannot_be_used_says_why_on_one_line(
    spec: str, config: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_sinks.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SinkSpecError, match=message) as caught:
        open_sink(spec, **config)
    assert isinstance(caught.value, SinkError) and isinstance(caught.value, ConfigurationError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_a_built_in_sink_whose_module_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(bgworker.sinks.specs._BUILT_IN, "pigeon", ("pigeon.sink", "PigeonSink"))
    with pytest.raises(SinkSpecError, match="made without its part 'pigeon'"):
        open_sink("pigeon:x")


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        (
            "webhook:https://user:s3cret@example.com:8080/s3cret?token=s3cret",
            "'webhook:https://example.com:8080'",
        ),
        ("webhook:https://example.com", "'webhook:https://example.com'"),
        ("webhook:https://[::1]:80/s3cret", "'webhook:https://[::1]:80'"),
        ("webhook:https://user:s3cret/x@example.com", "'webhook:https://...'"),
        ("webhook:https://12:34/s3cret@example.com", "'webhook:https://...'"),
        ("webhook:example.com/s3cret", "'webhook:...'"),
        ("webhook:https:/example.com/s3cret", "'webhook:...'"),
        ("webhook:s3cret s3cret//x", "'webhook:...'"),
        ("https://user:s3cret@example.com/s3cret#s3cret", "'https://example.com'"),
        ("postgres:user:s3cret@example.com", "'...'"),
        ("s3cret@host:80", "'...'"),
    ],
)
def test_no_secret_of_a_url_is_shown(
    spec: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bgworker.sinks.specs._BUILT_IN, "webhook", "NoSuchClass")
    monkeypatch.setattr(bgworker.sinks.specs, "_built_in", lambda spec, scheme: refuse)
    with pytest.raises(SinkSpecError) as caught:
        open_sink(spec)
    assert f"sink spec {shown}:" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def refuse(url: str) -> None:
    raise ConfigurationError("refused")


WORDS = st.sampled_from(
    [
        "jsonl:",
        "x",
        "?",
        "backups",
        "compress",
        "=",
        "&",
        "%",
        "1",
        "K",
        ":",
        "//",
        "@",
        "\0",
        "\ud800",
    ]
)


@settings(max_examples=50)
@given(
    st.one_of(
        st.text(string.printable + "é\u2028", max_size=30),
        st.lists(WORDS, max_size=12).map("".join),
    )
)
def test_any_text_is_a_sink_or_a_spec_error(spec: str) -> None:
    if spec.partition(":")[0].replace(".", "").isidentifier() and not spec.startswith("jsonl:"):
        spec = "x" + spec  # imports no module that happens to be there
    try:
        sink = open_sink(spec)
    except SinkSpecError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert isinstance(sink, JsonlSink)


def test_importing_the_package_imports_nothing_but_the_contract() -> None:
    code = (
        "import sys, typing, bgworker, bgworker.model.events, bgworker.model.errors; before = "
        "set(sys.modules); import bgworker.sinks; "
        "print(*sorted(set(sys.modules) - before - {'bgworker.sinks', 'bgworker.sinks.base', "
        "'bgworker.sinks.specs'}), end='')"
    )
    root = Path(bgworker.sinks.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout + done.stderr == ""


# -- the environment --


@pytest.mark.parametrize(("value", "specs"), [
    ("", []),
    (" , ,", []),
    ("jsonl:debug.jsonl", ["jsonl:debug.jsonl"]),
    ("jsonl:a, sqlite:b ,,m:f", ["jsonl:a", "sqlite:b", "m:f"]),
    ("jsonl:a%2Cb%2cc%20", ["jsonl:a,b,c%20"]),
    ("webhook:https://h/a%2Cb", ["webhook:https://h/a%2Cb"]),
])
def test_specs_in_the_environment_are_separated_by_commas(value: str, specs: Sequence[str]) -> None:
    assert sinks_from_environ({"BGWORKER_SINKS": value}) == specs


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sinks_from_environ() == []
    monkeypatch.setenv("BGWORKER_SINKS", string.ascii_letters)
    assert sinks_from_environ() == [string.ascii_letters]

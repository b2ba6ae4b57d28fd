"""The strings that name a sink in settings, in the environment and on command lines.

A concrete sink is imported when a spec first asks for it.
"""

from __future__ import annotations

import os
from operator import attrgetter

from ..model.errors import BgworkerError, ConfigurationError, MissingPart, SinkError
from ..model.text import ask, describe, name_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .base import Sink

SECRET_VARIABLE = "BGWORKER_WEBHOOK_SECRET"
"""The environment variable with the webhook's secret, which is not to come in a spec, nor to reach
a command."""

_BUILT_IN = {
    "jsonl": ("sinks.jsonl", "JsonlSink"),
    "sqlite": ("history.sink", "SqliteSink"),
    "webhook": ("webhook.sink", "WebhookSink"),
}
"""Scheme -> module in the package, class. A vendored copy may lack a room."""

_EXPECTED = "expected jsonl:PATH, sqlite:PATH, webhook:URL or package.module:factory"
_BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}
_UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3}


class SinkSpecError(SinkError, ConfigurationError):
    """A sink spec cannot be used. The message shows the spec, though of a URL only its scheme and
    host."""


def open_sink(spec: str, **config: Any) -> Sink:
    """Build the sink that a spec names. It does not touch its file or server before delivery calls
    it.

    Args:
        spec: one of

            ``jsonl:PATH``, ``sqlite:PATH``
                options may follow as ``?key=value&key=value``: the keywords of the sink's class.
                Values are percent-decoded; sizes in bytes take a suffix K, M or G (KiB, MiB, GiB);
                booleans are true, false, 1, 0, yes, no, on or off. The path is taken as it stands,
                up to the first ``?``.
            ``webhook:URL``
                the whole rest is the URL.
            ``package.module:factory``
                imported, and called with ``config``.
        config: further keywords of the sink's class, or of the factory.

    Raises:
        SinkSpecError: the spec is not understood, an option is unknown, doubled or has a value that
            cannot be used, or the module or factory cannot be imported or raised.
    """
    scheme, colon, rest = spec.partition(":")
    if not colon:
        raise _error(spec, f"it has no colon; {_EXPECTED}")
    if scheme not in _BUILT_IN:
        return _from_factory(spec, scheme, rest, config)
    path, question, query = (rest, "", "") if scheme == "webhook" else rest.partition("?")
    if not path:
        raise _error(spec, f"nothing follows its colon; {_EXPECTED}")
    factory = _built_in(spec, scheme)
    if scheme == "webhook":
        return _build(spec, factory, (path,), config)
    types = _keywords_of(factory)
    options = _parse_query(spec, query, types) if question else {}
    for key in config:
        if key not in types:
            raise _error(spec, _unknown(key, types))
        if key in options:
            raise _error(
                spec, f"option {key!r} is given both in the spec and as a keyword; leave one out"
            )
    return _build(spec, factory, (path,), {**options, **config})


def sinks_from_environ(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the sink specs in ``BGWORKER_SINKS``, which are separated by commas; blank ones are
    left out.

    A comma that belongs to a spec is written ``%2C``. (In a webhook's URL that already means a
    comma, and stays.)
    """
    specs = [spec.strip() for spec in environ.get("BGWORKER_SINKS", "").split(",")]
    return [spec if spec.startswith("webhook:") else spec.replace("%2C", ",").replace("%2c", ",")
            for spec in specs if spec]


def _built_in(spec: str, scheme: str) -> Callable[..., Sink]:
    from importlib import import_module
    module, class_name = _BUILT_IN[scheme]
    package = __package__.rpartition(".")[0]
    name = f"{package}.{module}"
    try:
        factory: Callable[..., Sink] = getattr(import_module(name), class_name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.rpartition(".")[0]):
            raise _error(
                spec, f"this Python lacks a module that the {scheme} sink needs ({error.name})"
            ) from error
        raise _error(spec, str(MissingPart(module.partition(".")[0]))) from error
    return factory


def _from_factory(spec: str, module_name: str, factory_name: str, config: dict[str, Any]) -> Sink:
    if not all(part.isidentifier() for part in f"{module_name}.{factory_name}".split(".")):
        raise _error(spec, f"there is no such kind of sink; {_EXPECTED}")
    from importlib import import_module
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever a stranger's module raises while it is imported
        raise _error(
            spec,
            f"module {module_name!r} cannot be imported ({describe(error)}); "
            + (_package_of(error, module_name) or f"{_EXPECTED}, with the module on sys.path; "
               "set PYTHONPATH=. to have one in this folder found"),
        ) from error
    factory = ask(attrgetter(factory_name), module)
    if factory is None:
        raise _error(
            spec,
            f"module {module_name!r} has no {factory_name!r}; expected the name of a class or "
            "function that returns a sink",
        )
    if not callable(factory):
        raise _error(
            spec,
            f"{factory_name!r} is not callable; expected a class or function that returns a sink",
        )
    return _build(spec, factory, (), config)


def _package_of(error: Exception, module_name: str = "") -> str:
    """Return what installs the package that a factory lacks; empty if it is not for that."""
    lacked = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if not isinstance(lacked, str) or f"{module_name}.".startswith(f"{lacked}."):
        return ""
    return f"install what it needs, such as with python -m pip install {lacked.partition('.')[0]}"


def _build(
    spec: str, factory: Callable[..., Any], arguments: tuple[str, ...], config: dict[str, Any]
) -> Sink:
    try:
        sink = factory(*arguments, **config)
    except BgworkerError as error:
        raise _error(spec, str(error)) from error
    except Exception as error:  # whatever a stranger's factory raises
        remedy = _package_of(error) or "correct its options, or the factory"
        raise _error(spec, f"it cannot be built ({describe(error)}); {remedy}") from error
    if not ask(lambda: callable(sink.write) and callable(sink.close)):
        raise _error(
            spec,
            f"its factory returned {name_of(type(sink))}; "
            "expected a sink, with methods write and close",
        )
    return sink  # type: ignore[no-any-return]


def _keywords_of(factory: Callable[..., Any]) -> dict[str, str]:
    """Return the type, as written, of each keyword-only parameter of a built-in sink's class."""
    init = factory.__init__
    return {key: str(init.__annotations__.get(key, "str")) for key in init.__kwdefaults__ or ()}


def _parse_query(spec: str, query: str, types: dict[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in query.split("&"):
        key, equals, text = item.partition("=")
        if not equals:
            raise _error(
                spec,
                f"option {item!r} has no value; expected key=value after the question mark "
                "(a path with a question mark fits in no spec: build the sink in code)",
            )
        if key not in types:
            raise _error(spec, _unknown(key, types))
        if key in options:
            raise _error(spec, f"option {key!r} is given twice; leave one out")
        options[key] = _convert(spec, key, text, types[key])
    return options


def _convert(spec: str, key: str, text: str, annotation: str) -> Any:
    """Return an option's text as what the sink's keyword takes, judged by its annotation ("int |
    None")."""
    from urllib.parse import unquote
    kinds = annotation.replace("|", " ").split()
    expected = "percent-encoded UTF-8"
    try:
        text = unquote(text, errors="strict")
        if "bool" in kinds:
            expected = "true or false"
            return _BOOLEANS[text.lower()]
        if key == "mode":
            expected = "permissions as octal digits, such as 640"
            return int(text, 8)
        if "int" in kinds and key.endswith("bytes"):
            expected = "a whole number, with K, M or G behind it for KiB, MiB or GiB"
            return _whole_number(text, _UNITS)
        if "int" in kinds:
            expected = "a whole number"
            return _whole_number(text, {})
        if "float" in kinds:
            expected = "a number"
            return float(text)
        return text
    except (KeyError, ValueError) as error:
        raise _error(spec, f"option {key!r} has the value {text!r}; expected {expected}") from error


def _whole_number(text: str, units: Mapping[str, int]) -> int:
    unit = units.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not (digits.isascii() and digits.lstrip("-").isdigit()):
        raise ValueError(text)
    return int(digits) * unit


def _unknown(key: str, types: dict[str, str]) -> str:
    return f"there is no option {key!r}; expected one of {', '.join(sorted(types))}"


def _error(spec: str, why: str) -> SinkSpecError:
    return SinkSpecError(f"sink spec {_shown(spec)!r}: {' '.join(why.split())}")


def _shown(spec: str) -> str:
    """Return the spec as it may be shown: of a URL, which may hold secrets, only the scheme and the
    host."""
    import re
    if spec.startswith(("jsonl:", "sqlite:")):
        return spec
    url = re.fullmatch(r"((?:webhook:)?[A-Za-z][A-Za-z0-9+.-]*:)//([^/?#\\]*)(.*)", spec, re.DOTALL)
    if url is None:
        return "webhook:..." if spec.startswith("webhook:") else "..." if "@" in spec else spec
    scheme, authority, rest = url.groups()
    host = authority.rpartition("@")[2]
    is_host = (
        re.fullmatch(r"[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?", host) is not None
    )
    # An @ further on may mean that all before it, "host" included, is a user name and a password
    # with a slash in it.
    return f"{scheme}//{host if is_host and ('@' in authority or '@' not in rest) else '...'}"

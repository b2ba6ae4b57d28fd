"""What goes to a worker process and what comes back: whole, or with an error that tells what is
wrong."""

from __future__ import annotations

import marshal
import pickle
import sys
import types
from typing import Any

import pytest

from bgworker import BgworkerError, RemoteError
from bgworker.model.records import CANCELLED, COMPLETED, FAILED, OUTPUT, STARTED
from bgworker.remote import messages
from bgworker.remote.messages import Order, Report

ORDER = Order("0" * 32, "né", "1" * 32, 2.5, True, False, (65536, "truncate", 0.1, 1.0), "{}",
              ("/tmp/x", b"key", 7), b"payload")
REPORT = Report(COMPLETED, pickle.dumps(7), None, "7", 0.5, "w-1", 3,
                [(STARTED, 5, None), (OUTPUT, 6, "a\ud800b"), (OUTPUT, 7, ["x", "y"])],
                {(OUTPUT, "intake"): 4}, "w")


def test_an_order_and_a_report_come_out_as_they_went_in() -> None:
    for ticket in (ORDER.ticket, ("host", 80), None):
        order = ORDER._replace(ticket=ticket)  # type: ignore[arg-type]
        assert messages.decode_order(messages.encode_order(order)) == order
    assert messages.decode_report(messages.encode_report(REPORT)) == REPORT


@pytest.mark.parametrize("data", [
    b"", b"nonsense", None, 7, "text", marshal.dumps(5), marshal.dumps(()),
    messages.encode_report(REPORT)[:-3], messages.encode_order(ORDER),
    marshal.dumps(("report", messages.FORMAT + 1, *REPORT)),
    marshal.dumps(("report", messages.FORMAT, *REPORT, 1)),
])
def test_what_is_no_report_is_refused_with_what_was_expected(data: object) -> None:
    with pytest.raises(RemoteError, match="expected the report") as caught:
        messages.decode_report(data)
    assert isinstance(caught.value, BgworkerError) and isinstance(caught.value, RuntimeError)


def test_another_version_of_the_format_is_told_with_its_remedy() -> None:
    with pytest.raises(RemoteError, match="same version of bgworker"):
        messages.decode_order(marshal.dumps(("order", 99, *ORDER)))


@pytest.mark.skipif(sys.version_info < (3, 13), reason="marshal cannot refuse code before 3.13")
def test_no_code_is_made_of_what_is_received() -> None:
    code = compile("1", "x", "eval")
    with pytest.raises(ValueError):
        messages.unmarshal(marshal.dumps(code))
    with pytest.raises(RemoteError):
        messages.decode_report(marshal.dumps(("report", messages.FORMAT, code)))


def test_a_result_comes_back_and_an_exception_with_the_traceback_of_there() -> None:
    assert messages.outcome_of(REPORT) == (7, None)
    failed = REPORT._replace(kind=FAILED, payload=messages.dumps(KeyError("x")),
                             failure=("KeyError", "'x'", "Traceback of there"))
    result, error = messages.outcome_of(failed)
    assert result is None and type(error) is KeyError and error.args == ("x",)
    assert "Traceback of there" in str(error.__cause__)
    cancelled = REPORT._replace(kind=CANCELLED, payload=b"", failure=(None, "user", None))
    assert messages.outcome_of(cancelled) == (None, None)


class NeedsTwo(Exception):
    """Pickles, and cannot be made again: a common mistake."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} and {two}")


class LoadsNever:
    def __reduce__(self) -> Any:
        return (_refuse, ())


def _refuse() -> None:
    raise OSError("not here")


def test_an_exception_that_cannot_be_loaded_here_keeps_its_text() -> None:
    failed = REPORT._replace(kind=FAILED, payload=messages.dumps(NeedsTwo(1, 2)),
                             failure=("NeedsTwo", "1 and 2", "Traceback of there"))
    _, error = messages.outcome_of(failed)
    assert type(error) is RemoteError and "1 and 2" in str(error) and "exception" in str(error)
    assert "Traceback of there" in str(error.__cause__)


def test_a_result_that_cannot_be_loaded_here_becomes_an_error_that_says_why() -> None:
    _, error = messages.outcome_of(REPORT._replace(payload=messages.dumps(LoadsNever())))
    assert type(error) is RemoteError and "OSError: not here" in str(error)
    assert type(error.__cause__) is OSError


def test_something_else_than_an_exception_is_never_raised() -> None:
    _, error = messages.outcome_of(REPORT._replace(kind=FAILED, payload=messages.dumps(5)))
    assert type(error) is RemoteError and "got int" in str(error)


def test_what_pickle_cannot_take_is_refused_unless_cloudpickle_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "cloudpickle", raising=False)
    with pytest.raises(Exception, match="(?i)pickle"):
        messages.dumps(lambda: 1)
    other = types.ModuleType("cloudpickle")
    other.dumps = lambda value, protocol: b"by value"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cloudpickle", other)
    assert messages.dumps(lambda: 1) == b"by value"
    assert messages.dumps(len) == pickle.dumps(len, messages.PICKLE)  # plain where that serves


def test_what_is_of_main_goes_by_value_where_the_other_side_has_another_main(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = types.ModuleType("cloudpickle")
    other.dumps = lambda value, protocol: b"by value"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cloudpickle", other)
    assert messages.dumps("__main__", by_value=True) == b"by value"
    assert messages.dumps("__main__") == pickle.dumps("__main__", messages.PICKLE)
    assert messages.dumps("elsewhere", by_value=True) != b"by value"


def test_what_is_larger_than_the_frame_can_hold_is_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = len(messages.dumps(b"x" * 100))
    monkeypatch.setattr(messages, "MOST_PAYLOAD", size)
    assert messages.loads(messages.dumps(b"x" * 100)) == b"x" * 100
    with pytest.raises(ValueError, match=f"at most {size} bytes .* give its path"):
        messages.dumps(b"x" * 101)

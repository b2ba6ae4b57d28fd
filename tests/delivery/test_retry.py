"""When a failed write is tried again: pure decisions, so no clock and no sleep here."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, strategies as st

from bgworker.delivery.retry import Breaker, Decision, RetryPolicy, Trouble
from bgworker.model.errors import ConfigurationError, PermanentSinkError, TemporarySinkError

DOWN = OSError("down")


def failed(breaker: Breaker, error: BaseException, size: int) -> Decision:
    return breaker.failed(Trouble.of(error), size)


def waits(breaker: Breaker, times: int, error: BaseException = DOWN) -> list[float]:
    decisions = [failed(breaker, error, 5) for _ in range(times)]
    assert {decision.action for decision in decisions} <= {"retry"}
    return [decision.wait for decision in decisions]


def test_waits_double_up_to_the_cap() -> None:
    assert waits(Breaker(RetryPolicy(base=0.5, cap=6, jitter="none")), 7) == [0.5, 1, 2, 4, 6, 6, 6]


def test_full_jitter_draws_each_wait_between_nothing_and_its_upper_end() -> None:
    draws = iter([0.0, 0.5, 1.0, 0.25])
    assert waits(Breaker(RetryPolicy(base=1, cap=60), lambda: next(draws)), 4) == [0, 1, 4, 2]


def test_the_last_attempt_gives_up_and_opens_the_breaker_which_then_probes_once_per_cap() -> None:
    breaker = Breaker(RetryPolicy(attempts=3, base=1, cap=10, jitter="none"))
    assert [failed(breaker, DOWN, 5) for _ in range(5)] == [
        Decision("retry", 1),
        Decision("retry", 2),
        Decision("give_up"),
        Decision("retry", 10),
        Decision("retry", 10),
    ]
    assert breaker.is_open


def test_a_success_closes_the_breaker_and_starts_the_count_again() -> None:
    breaker = Breaker(RetryPolicy(attempts=2, base=1, cap=10, jitter="none"))
    failed(breaker, DOWN, 1)
    breaker.succeeded()
    assert failed(breaker, DOWN, 1) == Decision("retry", 1)
    failed(breaker, DOWN, 1)
    assert breaker.is_open
    breaker.succeeded()
    assert not breaker.is_open
    assert failed(breaker, DOWN, 1) == Decision("retry", 1)


def test_a_single_attempt_gives_up_at_once() -> None:
    assert failed(Breaker(RetryPolicy(attempts=1)), DOWN, 1) == Decision("give_up")


def test_the_other_sides_wish_goes_before_the_backoff_but_not_beyond_the_cap() -> None:
    breaker = Breaker(RetryPolicy(attempts=9, base=1, cap=10, jitter="none"))
    asked = [TemporarySinkError("busy", retry_after=seconds) for seconds in (3.5, 0, -1, 1e9)]
    assert [failed(breaker, error, 1).wait for error in asked] == [3.5, 0, 0, 10]


def test_what_is_refused_for_good_is_halved_until_it_stands_alone() -> None:
    breaker = Breaker(RetryPolicy())
    refused = PermanentSinkError("bad event")
    assert [failed(breaker, refused, size).action for size in (100, 3, 2, 1)] == [
        "split",
        "split",
        "split",
        "give_up",
    ]
    assert (breaker.failures, breaker.is_open) == (
        0,
        False,
    ), "the sink works; the events are at fault"


def test_what_is_refused_whatever_is_in_it_is_not_halved() -> None:
    breaker = Breaker(RetryPolicy())
    refused = PermanentSinkError("no such place", concerns="batch")
    assert [failed(breaker, refused, size) for size in (100, 1)] == [
        Decision("give_up"),
        Decision("give_up"),
    ]
    assert (breaker.failures, breaker.is_open) == (0, False)


def test_a_sink_that_takes_nothing_any_more_ends_whether_the_breaker_is_open_or_not() -> None:
    breaker = Breaker(RetryPolicy(attempts=1))
    gone = PermanentSinkError("gone", concerns="sink")
    assert failed(breaker, gone, 100) == Decision("end")
    failed(breaker, DOWN, 1)
    assert breaker.is_open
    assert failed(breaker, gone, 1) == Decision("end")


def test_what_is_to_be_held_opens_the_breaker_at_once_and_is_never_given_up() -> None:
    breaker = Breaker(RetryPolicy(attempts=3, base=1, cap=10, jitter="none"))
    held = TemporarySinkError("wrong password", hold=True)
    assert failed(breaker, DOWN, 5) == Decision("retry", 1)
    assert [failed(breaker, error, 5) for error in (held, held, DOWN, held, DOWN, held, DOWN)] == [
        Decision("retry", 10)
    ] * 7
    assert breaker.is_open
    breaker.succeeded()
    assert waits(breaker, 2) == [1, 2], "the count of attempts starts again"


def test_who_asks_to_be_held_may_say_how_long_within_the_cap() -> None:
    policy = RetryPolicy(base=1, cap=10, jitter="none")
    asked = [TemporarySinkError("no", hold=True, retry_after=seconds) for seconds in (3.5, 1e9, -1)]
    assert [failed(Breaker(policy), error, 1) for error in asked] == [
        Decision("retry", wait) for wait in (3.5, 10, 0)
    ]


def test_an_error_that_forgets_to_initialise_its_base_is_as_good_as_any() -> None:
    class Lazy(TemporarySinkError):
        def __init__(self, code: int) -> None:
            self.code = code

    class LazyRefusal(PermanentSinkError):
        def __init__(self, code: int) -> None:
            self.code = code

    breaker = Breaker(RetryPolicy(base=1, jitter="none"))
    assert failed(breaker, Lazy(7), 5) == Decision("retry", 1)
    assert failed(breaker, LazyRefusal(7), 5) == Decision("split")


@pytest.mark.parametrize(
    "error", [ValueError("no"), TypeError(), KeyError("x"), UnicodeEncodeError("a", "b", 0, 1, "c")]
)
def test_an_error_that_one_value_may_cause_halves_a_batch_and_is_temporary_for_an_event_alone(
    error: Exception,
) -> None:
    breaker = Breaker(RetryPolicy(attempts=2, base=1, jitter="none"))
    assert [failed(breaker, error, size).action for size in (100, 50, 2, 1, 1)] == [
        "split",
        "split",
        "split",
        "retry",
        "give_up",
    ]


class Hostile:
    """Whose every attribute of interest runs code."""

    def __init__(self, error: BaseException | None, value: object = None) -> None:
        self.error = error
        self.value = value

    def __get__(self, *_: object) -> object:
        if self.error is not None:
            raise self.error
        return self.value


class Odd(float):
    def __lt__(self, other: object) -> bool:
        raise SystemExit

    __gt__ = __eq__ = __le__ = __ge__ = __float__ = __lt__  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "error", [ValueError(), SystemExit(), KeyboardInterrupt(), GeneratorExit()]
)
@pytest.mark.parametrize("base", [TemporarySinkError, PermanentSinkError, OSError])
def test_the_attributes_of_an_exception_may_raise_whatever_they_like(
    base: type, error: BaseException
) -> None:
    trap = Hostile(error)
    hostile = type(
        "Hostile",
        (base,),
        {name: trap for name in ("concerns", "retry_after", "hold", "__class__", "args")},
    )
    trouble: list[Trouble] = []
    thread = threading.Thread(target=lambda: trouble.append(Trouble.of(hostile())))
    thread.start()
    thread.join(30)
    assert trouble and trouble[0].text == "Hostile"
    assert trouble[0].concerns == ("event" if base is PermanentSinkError else "attempt")


@pytest.mark.parametrize(
    "wish",
    [float("nan"), "1", b"1", object(), Odd(1.0), 10**400, [], "x" * 10**6],
    ids=lambda wish: type(wish).__name__,
)
def test_a_wish_that_is_no_number_of_seconds_is_no_wish(wish: object) -> None:
    policy = RetryPolicy(base=2, cap=10, jitter="none")
    error = TemporarySinkError()
    error.retry_after = wish  # type: ignore[assignment]
    assert failed(Breaker(policy), error, 1) in (Decision("retry", 2), Decision("retry", 1))


@pytest.mark.parametrize("concerns", [object(), ["sink"], Hostile(None, "sink"), "all"])
def test_a_refusal_that_does_not_say_what_it_concerns_concerns_an_event(concerns: object) -> None:
    error = PermanentSinkError()
    error.concerns = concerns  # type: ignore[assignment]
    assert failed(Breaker(RetryPolicy()), error, 2) == Decision("split")


def test_a_thousand_failures_overflow_nothing() -> None:
    breaker = Breaker(RetryPolicy(attempts=2_000, base=1, cap=60, jitter="none"))
    assert waits(breaker, 1_500)[-1] == 60


@given(
    st.integers(1, 50),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
    st.lists(st.booleans(), max_size=100),
)
def test_no_wait_is_negative_or_beyond_the_cap(
    attempts: int, base: float, cap: float, outcomes: list[bool]
) -> None:
    breaker = Breaker(RetryPolicy(attempts=attempts, base=base, cap=cap))
    in_a_row = 0
    for has_worked in outcomes:
        if has_worked:
            breaker.succeeded()
            in_a_row = 0
            continue
        was_open = breaker.is_open
        decision = failed(breaker, DOWN, 1)
        in_a_row += 1
        assert 0 <= decision.wait <= cap
        assert was_open or (decision.action == "give_up") == (in_a_row == attempts)
        assert breaker.is_open == (in_a_row >= attempts)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempts", 0),
        ("attempts", 1.0),
        ("base", 0),
        ("cap", -1),
        ("base", float("nan")),
        ("jitter", "some"),
    ],
)
def test_a_wrong_policy_is_refused_with_its_name_and_value(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{name}: expected .*, got {value!r}"):
        RetryPolicy(**{name: value})  # type: ignore[arg-type]

"""Delivery under random histories of trouble: a state machine over a real Scheduler and scripted
sinks.

`tools/stress.py` runs it for longer. What is checked stands in `complaints`, which the twins at the
end have to displease.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bgworker import (
    Event,
    LossEvent,
    PermanentSinkError,
    Scheduler,
    SinkHealth,
    SinkOptions,
    TemporarySinkError,
)
from bgworker.running.context import TaskContext
from bgworker.delivery import dispatcher, registry
from bgworker.delivery.consumer import Consumer
from bgworker.delivery.courier import Courier
from bgworker.delivery.intake import Intake
from bgworker.delivery.retry import RetryPolicy, Trouble
from bgworker.running.task import current_task
from bgworker.testing import FlakySink, Hang, Step, crawl, fail, work

SOON = 60.0
FAST = RetryPolicy(attempts=3, base=0.0005, cap=0.001)
POISON = "poison"


def complaints(
    name: str,
    health: SinkHealth,
    acknowledged: Sequence[Event],
    meant: Counter[str] | None = None,
    *,
    has_ended: bool = True,
) -> list[str]:
    """Return what is wrong with what a sink got, at a moment when nothing is under way.

    Args:
        acknowledged: the events of all its writes that returned.
        meant: event type -> how many were emitted for this sink; None when unknown.
        has_ended: nothing waits any more, and the sink was told of all that it did not get.
    """
    wrong: list[str] = []
    settled = health.delivered + health.coalesced + health.dropped + health.parked + health.pending
    if health.emitted != settled:
        wrong.append(f"{name}: emitted {health.emitted}, but {settled} are accounted for: {health}")
    if health.dropped != sum(health.dropped_by_reason.values()):
        wrong.append(f"{name}: dropped {health.dropped}, but {health.dropped_by_reason}")
    events = [event for event in acknowledged if not isinstance(event, LossEvent)]
    if len(events) != health.delivered:
        wrong.append(
            f"{name}: has acknowledged {len(events)}, but the account says {health.delivered}"
        )
    last: dict[str, int] = {}
    ended: set[str] = set()
    for event in events:
        if event.seq <= last.get(event.task_id, 0):
            wrong.append(f"{name}: seq {event.seq} of {event.task_id} after {last[event.task_id]}")
        if event.task_id in ended:
            wrong.append(f"{name}: {event.type} after the terminal event of {event.task_id}")
        last[event.task_id] = event.seq
        if event.type.is_terminal:
            ended.add(event.task_id)
    announced = Counter[str]()
    for loss in acknowledged:
        if isinstance(loss, LossEvent):
            if loss.count != sum(loss.by_type.values()) or loss.sink != name:
                wrong.append(f"{name}: an odd announcement, {loss}")
            announced.update(loss.by_type)
    if sum(announced.values()) > health.dropped or (
        has_ended and sum(announced.values()) < health.dropped
    ):
        wrong.append(f"{name}: dropped {health.dropped}, but was told of {sum(announced.values())}")
    if meant is not None:
        if sum(meant.values()) != health.emitted:
            wrong.append(
                f"{name}: {sum(meant.values())} were emitted, but the account says {health.emitted}"
            )
        missing = meant - Counter(event.type.value for event in events)
        missing.subtract(announced)
        missing["TaskProgress"] -= health.coalesced
        if has_ended and any(missing.values()):
            wrong.append(f"{name}: missing and never announced: {dict(missing)}")
    return wrong


def refuse(times: int) -> Step:
    """Refuse events for good, but not the announcement of a loss: who refuses that one gets none
    any more."""
    def act(events: Sequence[Event], write: Any) -> None:
        if not all(isinstance(event, LossEvent) for event in events):
            raise PermanentSinkError("refused as it is")
        write(events)

    return Step(act, times)


class Talker:
    """A task that says what it is told, from the thread of the test, and ends when it is told."""

    def __init__(self, pool: Scheduler) -> None:
        self._ready = threading.Event()
        self._over = threading.Event()
        self.context: TaskContext
        self.task = pool.submit(self._run)
        assert self._ready.wait(SOON)

    def _run(self) -> None:
        self.context = current_task()
        self._ready.set()
        assert self._over.wait(SOON)

    def end(self) -> None:
        self._over.set()
        self.task.result(SOON)


class Watched:
    """A registered sink, what it should get, and what holds it."""

    def __init__(self, name: str, options: SinkOptions) -> None:
        self.name = name
        self.options = options
        self.sink = FlakySink(poison=self._is_poison)
        self.meant = Counter[str]()
        self.hangs: list[Hang] = []

    @staticmethod
    def _is_poison(event: Event) -> bool:
        return getattr(event, "payload", "") == POISON

    def release(self) -> None:
        for hang in self.hangs:
            hang.release()
        self.hangs.clear()


OPTIONS = st.builds(
    SinkOptions,
    queue_size=st.sampled_from([3, 20, 100_000]),
    queue_bytes=st.sampled_from([2_000, 1 << 26]),
    batch_size=st.sampled_from([1, 2, 7, 500]),
    linger=st.sampled_from([0.0, 0.0, 0.002]),
    overflow=st.sampled_from(["drop_oldest", "drop_newest"]),
    retry=st.just(FAST),
    types=st.sampled_from([None, None, ("TaskOutput", "TaskCompleted", "EventsLost")]),
)


class DeliveryMachine(RuleBasedStateMachine):
    """Sinks come, go, fail, hang, refuse and recover while tasks talk."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Scheduler(4, close_timeout=SOON, progress_interval=0)
        self.watched: list[Watched] = []
        self.talkers: list[Talker] = []
        self.count = 0

    # -- what happens --

    def _emitted(self, type_: str, count: int = 1) -> None:
        for each in self.watched:
            if each.options.types is None or type_ in each.options.types:
                each.meant[type_] += count

    def _talker(self, choice: int) -> Talker:
        if not self.talkers:
            self.start()
        return self.talkers[choice % len(self.talkers)]

    @precondition(lambda self: len(self.talkers) < 4)
    @rule()
    def start(self) -> None:
        for type_ in ("TaskCreated", "TaskScheduled", "TaskStarted"):
            self._emitted(type_)
        self.talkers.append(Talker(self.pool))

    @rule(choice=st.integers(0, 3))
    def end(self, choice: int) -> None:
        if self.talkers:
            self._emitted("TaskCompleted")
            self.talkers.pop(choice % len(self.talkers)).end()

    @rule(
        choice=st.integers(0, 3),
        text=st.sampled_from(["hello", "", POISON, "x" * 500, "nul \0", "\u00fc"]),
    )
    def emit(self, choice: int, text: str) -> None:
        self._talker(choice).context.output(text)
        self._emitted("TaskOutput")

    @rule(choice=st.integers(0, 3), count=st.sampled_from([5, 30, 300]), step=st.integers(0, 3))
    def burst(self, choice: int, count: int, step: int) -> None:
        context = self._talker(choice).context
        for number in range(count):
            if step and number % (step + 1) == 0:
                context.progress(number, None)
                self._emitted("TaskProgress")
            else:
                context.output(POISON if step == 3 and number % 50 == 1 else str(number))
                self._emitted("TaskOutput")

    @rule(options=OPTIONS)
    def register(self, options: SinkOptions) -> None:
        if len(self.watched) < 3:
            self.count += 1
            watched = Watched(f"sink-{self.count}", options)
            self.pool.register_sink(watched.sink, name=watched.name, options=options)
            self.watched.append(watched)

    @rule(
        choice=st.integers(0, 2),
        times=st.integers(1, 8),
        error=st.sampled_from(
            [
                None,
                ValueError("unknown"),
                SystemExit(),
                TemporarySinkError("mend me", hold=True),
                PermanentSinkError("no such place", concerns="batch"),
            ]
        ),
        is_permanent=st.booleans(),
    )
    def fail(
        self, choice: int, times: int, error: BaseException | None, is_permanent: bool
    ) -> None:
        if self.watched:
            self.watched[choice % len(self.watched)].sink.then(
                refuse(times) if is_permanent else fail(times, error)
            )

    @rule(choice=st.integers(0, 2))
    def crawl(self, choice: int) -> None:
        if self.watched:
            self.watched[choice % len(self.watched)].sink.then(crawl(5_000, 2))

    @rule(choice=st.integers(0, 2))
    def hang(self, choice: int) -> None:
        if self.watched:
            watched = self.watched[choice % len(self.watched)]
            watched.hangs.append(hang := Hang())
            watched.sink.then(hang)

    @rule(choice=st.integers(0, 2))
    def recover(self, choice: int) -> None:
        if self.watched:
            self.watched[choice % len(self.watched)].release()

    @rule(timeout=st.sampled_from([0.0, 0.001, 0.01]))
    def flush(self, timeout: float) -> None:
        self.pool.flush(timeout)

    @rule()
    def come_to_rest(self) -> None:
        """Let everything through, and look at all accounts."""
        for watched in self.watched:
            watched.release()
        assert self.pool.flush(SOON).done
        health = self.pool.sinks
        self._check({each: health[each.name] for each in self.watched}, has_ended=False)

    @rule(choice=st.integers(0, 2))
    def unregister(self, choice: int) -> None:
        if self.watched:
            watched = self.watched.pop(choice % len(self.watched))
            watched.release()
            watched.sink.poison = None
            self._check(
                {watched: self.pool.unregister_sink(watched.name, timeout=SOON)}, has_ended=False
            )

    # -- what must hold --

    def _check(self, health: dict[Watched, SinkHealth], *, has_ended: bool) -> None:
        wrong = [
            each
            for watched, account in health.items()
            for each in complaints(
                watched.name, account, watched.sink.acknowledged, watched.meant, has_ended=has_ended
            )
        ]
        assert not wrong, "\n".join(wrong)
        for watched, account in health.items():
            assert account.pending == 0, account

    @invariant()
    def every_account_balances_at_any_moment(self) -> None:
        for name, each in self.pool.sinks.items():
            assert (
                each.emitted
                == each.delivered + each.coalesced + each.dropped + each.parked + each.pending
            ), (name, each)

    def teardown(self) -> None:
        try:
            for talker in self.talkers:
                self._emitted("TaskCompleted")
                talker.end()
            for watched in self.watched:
                watched.release()
                # from here on all goes well, so that each loss can be announced
                watched.sink.recover()
            self.pool.flush(SOON)
            for type_ in ("TaskCreated", "TaskScheduled", "TaskStarted", "TaskCompleted"):
                # before the events of one more task, each sink is told of what it did not get
                self._emitted(type_)
            Talker(self.pool).end()
            self.pool.flush(SOON)
            self.pool.shutdown()
            health = self.pool.sinks
            self._check({each: health[each.name] for each in self.watched}, has_ended=True)
        finally:
            for watched in self.watched:
                watched.release()
            self.pool.shutdown()


def run_machine(
    examples: int, steps: int = 20, machine: type[DeliveryMachine] = DeliveryMachine, **more: Any
) -> None:
    """Run the state machine; also from tools/stress.py."""
    run_state_machine_as_test(
        machine,
        settings=settings(  # type: ignore[no-untyped-call]
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **more,
        ),
    )


@pytest.fixture
def no_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the 50 ms for which the dispatcher gathers, and a million log lines: they add nothing
    here."""
    monkeypatch.setattr(dispatcher, "GATHER", 0.001)
    monkeypatch.setattr(logging.getLogger("bgworker"), "disabled", True)


@pytest.mark.usefixtures("no_gathering")
def test_whatever_happens_each_account_is_exact_and_each_sink_is_told_of_all_that_it_misses() -> (
    None
):
    run_machine(200)


@pytest.mark.usefixtures("no_gathering")
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([0, 0, 0.0001, 0.001, 0.003]), min_size=1, max_size=8),
    st.integers(1, 50),
    st.sampled_from([1, 7, 500]),
)
def test_the_account_is_exact_at_whatever_speed_the_sink_works(
    pace: list[float], queue_size: int, batch: int
) -> None:
    sink = FlakySink()
    for seconds in pace:
        sink.then(crawl(1 / seconds, 1) if seconds else work())
    with Scheduler(3) as pool:
        pool.register_sink(
            sink, name="it", options=SinkOptions(queue_size=queue_size, batch_size=batch)
        )
        list(pool.map(_say_fifty, range(3)))
        pool.flush(SOON)
        list(pool.map(_say_fifty, range(1)))
        pool.flush(SOON)
    meant = Counter(
        {
            "TaskOutput": 4 * 50,
            **{f"Task{each}": 4 for each in ("Created", "Scheduled", "Started", "Completed")},
        }
    )
    assert not complaints("it", pool.sinks["it"], sink.acknowledged, meant)


def _say_fifty(_: int) -> None:
    for number in range(50):
        current_task().output(str(number))


# -- twins: what delivery would be without its care, and the same check that finds out --


class Forgetful(Courier):
    """Does not count what a full queue sheds."""

    def _drop(self, reason: str, kinds: Mapping[int, int]) -> None:
        if reason != "overflow":
            super()._drop(reason, kinds)


class Stuttering(Courier):
    """Writes a batch again though the sink has taken it, once there was a retry."""

    def _write(self, records: Sequence[Any]) -> Trouble | None:
        retries = self._retries
        error = super()._write(records)
        return super()._write(records) if error is None and retries else error


class Silent(Courier):
    """Counts its losses and tells the sink nothing."""

    def _drop(self, reason: str, kinds: Mapping[int, int]) -> None:
        Consumer._drop(self, reason, kinds)


class Reordering(Courier):
    """Hands over a batch the wrong way round."""

    def _write(self, records: Sequence[Any]) -> Trouble | None:
        return super()._write(list(reversed(records)))


class CarelessIntake(Intake):
    """Refuses without counting."""

    __slots__ = ()

    def refuse(self, kind: int, reason: str) -> None:
        pass


def history() -> list[str]:
    """Let an intake and a queue overflow and a batch fail twice; return what `complaints` has to
    say of it."""
    hang = Hang()
    sink = FlakySink(hang, fail(2))
    said = 600

    def chat() -> None:
        for number in range(said):
            current_task().output(str(number))

    with Scheduler(1) as pool:
        pool.register_sink(
            sink, name="it", options=SinkOptions(queue_size=100, batch_size=10, retry=FAST)
        )
        pool.submit(current_task).result(SOON)
        pool.flush(0)
        assert hang.entered.wait(SOON)
        intake = pool._dispatcher.intake
        intake._most = intake._limit = 400
        intake._unweighed = 200
        # nobody drains the intake meanwhile
        pool._dispatcher.call(lambda: pool.submit(chat).wait(SOON))
        pool.flush(0)
        hang.release()
        pool.flush(SOON)
        pool.submit(current_task).result(SOON)
        pool.flush(SOON)
    health = pool.sinks["it"]
    meant = Counter(
        {
            "TaskOutput": said,
            **{f"Task{each}": 3 for each in ("Created", "Scheduled", "Started", "Completed")},
        }
    )
    assert health.retries == 2, "the history lacks its retries"
    return complaints("it", health, sink.acknowledged, meant)


def test_the_history_that_the_twins_go_through_leaves_nothing_to_complain_about() -> None:
    assert history() == []


@pytest.mark.parametrize(
    ("module", "name", "twin", "complaint"),
    [
        (registry, "Courier", Forgetful, "are accounted for"),
        (registry, "Courier", Stuttering, "has acknowledged"),
        (registry, "Courier", Silent, "was told of 0"),
        (registry, "Courier", Reordering, "after"),
        (dispatcher, "Intake", CarelessIntake, "612 were emitted, but"),
    ],
)
def test_the_same_check_catches_delivery_that_is_careless(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, twin: type, complaint: str
) -> None:
    monkeypatch.setattr(module, name, twin)
    said = "\n".join(history())
    assert re.search(complaint, said), said

"""When a run of many commands ends before all of them have run: ``--halt``, as in GNU parallel."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError

from ..model.events import TaskStatus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_FORM = re.compile(r"(now|soon),(fail|success|done)=([0-9]{1,9})(%?)")

_FAILED = (TaskStatus.FAILED, TaskStatus.TIMED_OUT)
_COUNTED = {
    "fail": _FAILED,
    "success": (TaskStatus.COMPLETED,),
    "done": (TaskStatus.COMPLETED, *_FAILED),
}
"""What each condition counts. What was cancelled counts nowhere: it says nothing of the command."""

_WORDS = {"fail": "failed", "success": "completed", "done": "ended"}


class Halt:
    """A condition on how many commands have ended, and what happens when it is met.

    Args:
        why: "fail", "success" or "done".
        most: how many it takes; of ``is_share``, how many percent of all commands.
        is_now: whether commands that run are stopped, and not only those that wait.
    """

    def __init__(self, why: str, most: int, *, is_share: bool = False, is_now: bool) -> None:
        self._why = why
        self._most = most
        self.is_share = is_share
        """Whether it can be judged only where it is known how many commands there are."""
        self.is_now = is_now

    @property
    def reason(self) -> str:
        """Why the others are cancelled."""
        if self.is_share:
            return f"{self._most}% of the commands {_WORDS[self._why]}"
        who = "another command" if self._most == 1 else f"{self._most} commands"
        return f"{who} {_WORDS[self._why]}"

    def is_met(self, counts: Mapping[TaskStatus, int], total: int | None) -> bool:
        """Tell whether enough commands have ended so.

        Args:
            counts: of those that have ended, by status.
            total: how many there are; None if that is not known, which no share asks for.
        """
        count = sum(counts[status] for status in _COUNTED[self._why])
        if self.is_share:
            return count > 0 and 100 * count >= self._most * (total or 0)
        return count >= self._most

    def pardons(self, counts: Mapping[TaskStatus, int]) -> bool:
        """Tell whether a run that it ended is a success: as many as were asked for completed, or
        none failed."""
        return self._why == "success" or not any(counts[status] for status in _FAILED)


def halt(text: str) -> Halt | None:
    """Read an option's value; None is never."""
    if text == "never":
        return None
    found = _FORM.fullmatch(text)
    if found is None or not int(found[3]) or found[4] and int(found[3]) > 100:
        raise ArgumentTypeError(
            "expected never, or now or soon, then fail, success or done, then how many, such as "
            f"now,fail=1 or soon,fail=10% or now,success=1; got {text[:80]!r}"
        )
    when, why, most, percent = found.groups()
    return Halt(why, int(most), is_share=bool(percent), is_now=when == "now")


FAIL_FAST = Halt("fail", 1, is_now=True)
"""What ``--fail-fast`` is."""

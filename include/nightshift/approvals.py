"""Approvals: what a person has said to a run's cost, and how the runs of a backfill ask once for all of them.

Of the runs that need an approval at the same time one asks; the others wait for the answer to the same question. A yes is a grant of so
much, which each of them draws on; what does not fit into it asks again.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from nightshift.runs import Run
from nightshift.shapes import Approval, Wire
from nightshift.stores.accounts import Account, Full
from nightshift.stores.objects import Objects

ANSWER_WITHIN = timedelta(hours=24)  # or the question has timed out
LAPSES_AFTER = timedelta(hours=24)  # without a run that draws on it, a grant is over: another backfill asks anew
NUMBERED = re.compile(r"/(\d{6})-(asked|answer)\.json$")


class Question(Wire):
    """One of a job's runs asks for all. Stored as `grants/<job>/<n>-asked.json`."""

    run: str
    at: datetime


class Decision(Wire):
    """What a person has said to a question. Stored as `grants/<job>/<n>-answer.json`."""

    usd: Decimal | None  # that may be spent by all runs together; None: refused
    by: str
    at: datetime
    note: str = ""
    withdrawn: bool = False  # nobody has said anything: the run that asked was stopped, and another one asks


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask this question: nobody has, or what was granted is used up."""

    number: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Somebody has asked, and nobody has answered yet."""

    number: int


@dataclass(frozen=True, slots=True)
class Draw:
    """It was granted: draw on it."""

    number: int
    answer: Decision


@dataclass(frozen=True, slots=True)
class Refused:
    """The question that this run has waited for was refused."""

    number: int
    answer: Decision


def next_step(
    number: int,
    question: Question | None,
    answer: Decision | None,
    used_at: datetime | None,
    *,
    run: str,
    waited_for: int | None,
    now: datetime,
) -> Ask | Wait | Draw | Refused:
    """Decide from the last question, its answer, and when it was last drawn on. `waited_for`: the question that the run has waited for."""
    if question is None:
        return Ask(1)
    if answer is None:
        is_open = now - question.at < ANSWER_WITHIN
        return Ask(number) if is_open and question.run == run else Wait(number) if is_open else Ask(number + 1)
    if answer.usd is None:
        return Refused(number, answer) if waited_for == number and not answer.withdrawn else Ask(number + 1)
    return Draw(number, answer) if now - max(answer.at, used_at or answer.at) < LAPSES_AFTER else Ask(number + 1)


class Grants:
    """The questions and answers of a job's backfills."""

    def __init__(self, store: Objects, job: str) -> None:
        self._store, self._folder = store, f"grants/{job}"

    def step(self, run: str, *, waited_for: int | None, now: datetime) -> Ask | Wait | Draw | Refused:
        """What a run that needs an approval does next. Who is to ask has entered the question; who was not first waits."""
        while True:
            number = self._last()
            question, answer = self._question(number), self.answer(number)
            account = Account(self._store, self._account(number))
            step = next_step(number, question, answer, account.used_at, run=run, waited_for=waited_for, now=now)
            if not isinstance(step, Ask) or step.number == number:
                return step
            if self._store.create_shape(f"{self._folder}/{step.number:06d}-asked.json", Question(run=run, at=now)):
                return step

    def draw(self, draw: Draw, run: str, usd: Decimal, now: datetime) -> Ask | None:
        """Take a run's estimate out of a grant; the next question, entered, where it does not fit."""
        full = Account(self._store, self._account(draw.number)).book(run, usd, draw.answer.usd, now=now)
        if not isinstance(full, Full):
            return None
        self._store.create_shape(f"{self._folder}/{draw.number + 1:06d}-asked.json", Question(run=run, at=now))
        return Ask(draw.number + 1)

    def answer(self, number: int) -> Decision | None:
        """What was said to a question; None where nothing was, yet."""
        return self._store.get_shape(f"{self._folder}/{number:06d}-answer.json", Decision)

    def settle(self, number: int, answer: Decision) -> Decision:
        """Keep an answer; the first one stays."""
        return self._store.settle(f"{self._folder}/{number:06d}-answer.json", answer)

    def asked_by(self, run: str) -> int | None:
        """The last question, if this run has asked it and nobody has answered."""
        number = self._last()
        question = self._question(number)
        return number if question is not None and question.run == run and self.answer(number) is None else None

    def _question(self, number: int) -> Question | None:
        return self._store.get_shape(f"{self._folder}/{number:06d}-asked.json", Question)

    def _last(self) -> int:
        found = (NUMBERED.search(item.key) for item in self._store.scan(self._folder))
        return max((int(match[1]) for match in found if match), default=0)

    def _account(self, number: int) -> str:
        return f"{self._folder}/{number:06d}-drawn"


def record(run: Run, approval: Approval) -> None:
    """Keep what was said to a run, beside what was said before."""
    for number in itertools.count(1):
        if run.store.create_shape(run.key(f"approval-{number}.json"), approval):
            return


def approvals_of(run: Run) -> list[Approval]:
    """What was said to a run, in order."""
    found = (run.store.get_shape(run.key(f"approval-{number}.json"), Approval) for number in itertools.count(1))
    return [approval for approval in itertools.takewhile(lambda each: each is not None, found) if approval is not None]

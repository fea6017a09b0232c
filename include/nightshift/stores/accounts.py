"""Accounts: what was booked against a budget, as a chain of write-once entries whose last one holds the total.

The next number of a chain can be taken only by who has read the entry before it. So however many workers are about to buy, each
sees all that the others have booked, and a budget is never passed by more than one of them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from nightshift.shapes import Wire
from nightshift.stores.objects import Objects

NOTHING = Decimal(0)


class Entry(Wire):
    """One line of an account. Stored as `<account>/<number>.json`."""

    of: str  # what was booked: a shard, a run
    usd: Decimal  # that the total has changed by
    total: Decimal  # of the account, this entry with it
    open: int  # bookings whose cost is not known yet
    at: datetime


class Place(Wire):
    """Where a booking was about to be entered: written before it, so that it is found after a crash and never made twice."""

    account: str
    number: int


@dataclass(frozen=True, slots=True)
class Booked:
    """It is entered."""


@dataclass(frozen=True, slots=True)
class Full:
    """It does not fit: `open` others are not settled yet, and may turn out cheaper."""

    total: Decimal
    open: int
    since: datetime | None  # the last entry


def fits(last: Entry | None, usd: Decimal, usd_high: Decimal, limit: Decimal | None) -> bool:
    """Whether a cost fits into what is left. Beside others that are open, the most that it is expected to be has to fit."""
    if limit is None or last is None:
        return limit is None or usd <= limit
    return last.total + (usd_high if last.open else usd) <= limit


def _closing(of: str) -> str:
    """What the entry is of that settles another one."""
    return f"{of}/settled"


class Account:
    """One account of a store."""

    def __init__(self, objects: Objects, folder: str) -> None:
        self._objects, self._folder = objects, folder

    @property
    def total(self) -> Decimal:
        """All that is booked."""
        _, last = self._last()
        return last.total if last else NOTHING

    @property
    def used_at(self) -> datetime | None:
        """When it was last entered into; None where nothing was."""
        _, last = self._last()
        return last.at if last else None

    def book(self, of: str, usd: Decimal, limit: Decimal | None, usd_high: Decimal | None = None, *, now: datetime) -> Booked | Full:
        """Enter what something is about to cost, once: a repeated call finds the first."""
        high = usd if usd_high is None else max(usd, usd_high)
        while True:
            number, last = self._last()  # read first: what is entered after it takes the next number, and is seen then
            if self._entered(of) is not None:
                return Booked()
            if not fits(last, usd, high, limit):
                return Full(last.total, last.open, last.at) if last else Full(NOTHING, 0, None)
            amount = high if last and last.open else usd
            if self._enter(of, amount, number + 1, last, 1, now):
                return Booked()

    def booked(self, of: str) -> Decimal | None:
        """What was booked for something; None where nothing was."""
        entry = self._entered(of)
        return None if entry is None else entry.usd

    def held(self, of: str) -> Decimal:
        """What is booked for something and not settled yet."""
        entry = self._entered(of)
        return NOTHING if entry is None or self._entered(_closing(of)) is not None else entry.usd

    def fits(self, of: str, usd: Decimal, limit: Decimal, usd_high: Decimal) -> Booked | Full:
        """Whether something would be entered now; enters nothing."""
        _, last = self._last()
        if self._entered(of) is not None or fits(last, usd, usd_high, limit):
            return Booked()
        return Full(last.total, last.open, last.at) if last else Full(NOTHING, 0, None)

    def settle(self, of: str, usd: Decimal | None, *, now: datetime) -> None:
        """Put what something has cost in place of what was booked for it, once; None: nobody knows, and what was booked stays.

        What was never booked stays out.
        """
        closing, booked = _closing(of), self._entered(of)
        while booked is not None:
            number, last = self._last()
            if self._entered(closing) is not None:
                return
            if self._enter(closing, NOTHING if usd is None else usd - booked.usd, number + 1, last, -1, now):
                return

    def _enter(self, of: str, usd: Decimal, number: int, last: Entry | None, opened: int, now: datetime) -> bool:
        """Write the place, then the entry; False where another one has taken the number."""
        total, before = (last.total, last.open) if last else (NOTHING, 0)
        entry = Entry(of=of, usd=usd, total=total + usd, open=before + opened, at=now)
        tried = sum(1 for _ in self._places(of))
        if not self._objects.create_shape(self._place_key(of, tried), Place(account=self._folder, number=number)):
            return False
        return self._objects.create_shape(self._key(number), entry)

    def _entered(self, of: str) -> Entry | None:
        """The entry of something, wherever it was entered."""
        for place in self._places(of):
            entry = self._objects.get_shape(self._key(place.number), Entry)
            if entry is not None and entry.of == of:
                return entry
        return None

    def _places(self, of: str) -> Iterator[Place]:
        for number in itertools.count():
            place = self._objects.get_shape(self._place_key(of, number), Place)
            if place is None:
                return
            yield place

    def _last(self) -> tuple[int, Entry | None]:
        numbers = [int(found.key.rpartition("/")[2][:8]) for found in self._objects.scan(self._folder)]
        number = max(numbers, default=0)
        return number, self._objects.get_shape(self._key(number), Entry) if number else None

    def _key(self, number: int) -> str:
        return f"{self._folder}/{number:08d}.json"

    def _place_key(self, of: str, tried: int) -> str:
        return f"{self._folder}-places/{hashlib.sha256(of.encode()).hexdigest()[:24]}-{tried}.json"

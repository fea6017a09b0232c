"""One listing for all who wait for batches of one account, in place of a call each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from threading import Lock
from typing import Any, Generic, TypeVar

from nightshift.errors import NightshiftError

Batch = TypeVar("Batch")  # as the provider's own SDK lists it
FORGOTTEN_AFTER_SECONDS = 3600.0  # without a look a batch is waited for by nobody here
QUIET_SECONDS = 300.0  # without a listing, once it has failed
MOST_FOREIGN = 500  # batches of others that a listing is read over; who is not among them is asked for alone


@dataclass(slots=True)
class _Waiter:
    listing: int  # the last one that it has seen
    at: float  # monotonic seconds of its last look


class SharedLooks(Generic[Batch]):
    """How the batches of an account stood at the last listing.

    Who has seen the last listing makes the next one, and all others see that: one listing for each round of looks, however many
    wait. Alone, and at first, a batch is asked for by itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, Lock()
        self._listed: dict[str, Batch] = {}
        self._number = 0
        self._waiters: dict[str, _Waiter] = {}
        self._quiet_until = 0.0

    def look(self, batch_id: str, newest: Callable[[], Iterable[tuple[str, Batch]]]) -> Batch | None:
        """The batch as it stands in a listing that its waiter has not seen yet; None where it has to be asked for alone.

        `newest` lists the account's batches by their ids, newest first.
        """
        with self._lock:
            now = self._clock()
            before = self._waiters.get(batch_id)
            self._waiters = {key: each for key, each in self._waiters.items() if now - each.at < FORGOTTEN_AFTER_SECONDS}
            if before is None or len(self._waiters) < 2:
                self._waiters[batch_id] = _Waiter(self._number, now)
                return None
            if before.listing == self._number:
                if now < self._quiet_until:
                    return None
                try:
                    self._listed = _until_found(islice(newest(), MOST_FOREIGN + len(self._waiters)), set(self._waiters))
                except NightshiftError:  # there are servers that list nothing, and know each batch
                    self._quiet_until = now + QUIET_SECONDS
                    return None
                self._number += 1
            self._waiters[batch_id] = _Waiter(self._number, now)
            return self._listed.get(batch_id)

    def forget(self, batch_id: str) -> None:
        """Nobody waits for a batch any more."""
        with self._lock:
            self._waiters.pop(batch_id, None)


def _until_found(batches: Iterable[tuple[str, Batch]], wanted: set[str]) -> dict[str, Batch]:
    """Those of some batches that are wanted, read no further than the last of them."""
    found: dict[str, Batch] = {}
    for batch_id, batch in batches:
        if batch_id in wanted:
            found[batch_id] = batch
            if len(found) == len(wanted):
                break
    return found


@cache
def looks_at(where: str, key: str) -> SharedLooks[Any]:
    """The looks that this process shares at one account."""
    return SharedLooks()

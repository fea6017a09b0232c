"""The ledger: what was claimed, taken and ended for every attempt of a shard, as write-once objects.

An attempt is up to three objects under `shards/<shard>/`: `claim-<n>` before the paid call, `receipt-<n>` after it,
`ended-<n>` once nothing more will come of it. Nothing is edited, so what to do next follows from what is there:
`next_move` is a pure function of the facts and the time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from nightshift.errors import LedgerCorrupt
from nightshift.shapes import Receipt, Settled, Shard, Wire
from nightshift.stores.objects import Objects

LEASE = timedelta(seconds=90)  # a claim covers one create call and nothing else
CREATE_TIMEOUT = timedelta(seconds=30)  # so a live owner is done long before its lease is
QUEUE_PAUSE = timedelta(seconds=60)  # before a batch that found the queue full is sent again; doubles up to QUEUE_PAUSE_MAX
QUEUE_PAUSE_MAX = timedelta(minutes=30)
ATTEMPT_OBJECT = re.compile(r"/(claim|receipt|ended)-(\d+)\.json$")


class Claim(Wire):
    """We are about to pay: written before the create call, by the one writer who was first."""

    token: str
    owner: str
    claimed_at: datetime


class Ended(Wire):
    """Nothing more will come of this attempt.

    `refused`: the create call was refused, no batch exists. `rejected`: the provider took the batch and failed it as a
    whole. `queue_full`: the same, but only because too much was enqueued. `harvested`: its results are in `answers-<n>`.
    """

    how: Literal["refused", "rejected", "queue_full", "harvested", "lost"]
    status: str  # the provider's word
    ended_at: datetime
    remaining: int  # requests of the shard that are to be asked again
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The facts about one attempt."""

    number: int  # from 1
    claim: Claim
    receipt: Receipt | None = None
    ended: Ended | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Claim this attempt, then send."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Attach:
    """A batch of ours is there: wait for it, then harvest it."""

    attempt: int
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Hold:
    """Not now: somebody else is at it, or the provider's queue is full."""

    until: datetime
    why: str


@dataclass(frozen=True, slots=True)
class Search:
    """A claim lapsed without a receipt. Look its tokens up at the provider before anything is sent again."""

    attempt: int  # the attempt to claim for the search, and to send if nothing is found
    tokens: tuple[str, ...]  # by attempt, oldest first, of every attempt whose fate is unknown
    since: datetime


@dataclass(frozen=True, slots=True)
class Done:
    """Settled: every request has its last answer."""


Move = Send | Attach | Hold | Search | Done


def next_move(attempts: Sequence[Attempt], *, now: datetime) -> Move:
    """Decide from the ledger alone; every case is one line in a test."""
    if not attempts:
        return Send(1)
    for attempt in attempts:  # also an old one: its receipt may have been written late, by a slow owner or by a search
        if attempt.receipt is not None and attempt.ended is None:
            return Attach(attempt.number, attempt.receipt)
    harvests = [attempt.ended for attempt in attempts if attempt.ended is not None and attempt.ended.how == "harvested"]
    if harvests and not harvests[-1].remaining:
        return Done()  # whatever became of later claims: nothing is left to ask
    last = attempts[-1]
    if last.ended is not None:
        if last.ended.how == "queue_full":
            until = last.ended.ended_at + queue_pause(attempts)
            return Hold(until, "the provider's queue is full") if now < until else Send(last.number + 1)
        return Send(last.number + 1)
    if now < last.claim.claimed_at + LEASE:
        return Hold(last.claim.claimed_at + LEASE, last.claim.owner)
    doubtful = [attempt for attempt in attempts if attempt.receipt is None and attempt.ended is None]
    return Search(last.number + 1, tuple(attempt.claim.token for attempt in doubtful), doubtful[0].claim.claimed_at)


def queue_pause(attempts: Sequence[Attempt]) -> timedelta:
    """How long to let the provider's queue drain: doubling with every full queue in a row."""
    full = 0
    for attempt in reversed(attempts):
        if attempt.ended is None or attempt.ended.how != "queue_full":
            break
        full += 1
    doubled: timedelta = QUEUE_PAUSE * 2 ** max(0, full - 1)
    return min(doubled, QUEUE_PAUSE_MAX)


def token_for(shard: str, attempt: int) -> str:
    """The token of an attempt: the same whoever asks, and safe in every provider's names."""
    return hashlib.sha256(f"{shard}/{attempt}".encode()).hexdigest()[:32]


class Ledger:
    """Reads and writes the facts of shards in the store."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def attempts(self, shard: str) -> list[Attempt]:
        """Every attempt of a shard, oldest first. Raises LedgerCorrupt if a receipt or an end stands without its claim."""
        found: dict[int, set[str]] = {}
        for item in self._objects.scan(f"shards/{shard}"):
            if match := ATTEMPT_OBJECT.search(item.key):
                found.setdefault(int(match[2]), set()).add(match[1])
        return [self._attempt(shard, number, kinds) for number, kinds in sorted(found.items())]

    def _attempt(self, shard: str, number: int, kinds: set[str]) -> Attempt:
        claim = self._objects.get_shape(_key(shard, "claim", number), Claim)
        if claim is None:
            raise LedgerCorrupt(_key(shard, "claim", number), f"{sorted(kinds)} stand without it")
        return Attempt(
            number=number,
            claim=claim,
            receipt=self._objects.get_shape(_key(shard, "receipt", number), Receipt) if "receipt" in kinds else None,
            ended=self._objects.get_shape(_key(shard, "ended", number), Ended) if "ended" in kinds else None,
        )

    def claim(self, shard: str, attempt: int, owner: str, now: datetime) -> Claim | None:
        """Claim an attempt; None when somebody else was first."""
        claim = Claim(token=token_for(shard, attempt), owner=owner, claimed_at=now)
        return claim if self._objects.create_shape(_key(shard, "claim", attempt), claim) else None

    def record_receipt(self, shard: str, attempt: int, receipt: Receipt) -> Receipt:
        """Keep the proof that the provider took an attempt; the first one stays."""
        return self._objects.settle(_key(shard, "receipt", attempt), receipt)

    def record_end(self, shard: str, attempt: int, ended: Ended) -> Ended:
        """Keep an attempt's end; the first one stays."""
        return self._objects.settle(_key(shard, "ended", attempt), ended)

    def shard(self, key: str) -> Shard:
        """What a shard is. Raises LedgerCorrupt where it was never planned."""
        shard = self._objects.get_shape(f"shards/{key}/shard.json", Shard)
        if shard is None:
            raise LedgerCorrupt(f"shards/{key}/shard.json", "it does not exist")
        return shard

    def settled(self, shard: str) -> Settled | None:
        """The shard's last word, or None while it is under way."""
        return self._objects.get_shape(f"shards/{shard}/settled.json", Settled)

    def settle(self, settled: Settled) -> Settled:
        """Keep the shard's last word; the first one stays."""
        return self._objects.settle(f"shards/{settled.shard}/settled.json", settled)


def _key(shard: str, kind: str, attempt: int) -> str:
    return f"shards/{shard}/{kind}-{attempt}.json"

"""The ledger: what was claimed, taken and ended for every attempt of a shard, as write-once objects.

An attempt is a few objects under `shards/<shard>/`: `claim-<n>` before the paid call, `lease-<n>-<k>` each time its claim
is renewed or taken over, `receipt-<n>` after the call, `ended-<n>` once nothing more will come of it. None of these is edited,
so what to do next follows from what is there: `next_move` is a pure function of the facts and the time. `unknown-<n>` says since
when the provider does not know the attempt's batch, and goes once it does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Literal
from uuid import uuid4

from nightshift.errors import LedgerCorrupt
from nightshift.shapes import ProviderName, Receipt, Settled, Shard, Wire
from nightshift.stores.objects import Objects, Shape

LEASE = timedelta(seconds=90)  # a claim covers one create call and nothing else
CREATE_TIMEOUT = timedelta(seconds=30)  # so a live owner is done long before its lease is
QUEUE_PAUSE = timedelta(seconds=60)  # before a batch that found the queue full is sent again; doubles up to QUEUE_PAUSE_MAX
QUEUE_PAUSE_MAX = timedelta(minutes=30)
QUEUE_PATIENCE = timedelta(hours=24)  # of full queues in a row, before a person is asked to look (F23)
ATTEMPT_OBJECT = re.compile(r"/(claim|receipt|ended|unknown|lease)-(\d+)(?:-(\d+))?\.json$")


class StoreId(Wire):
    """What tells two stores apart that ask the same of one account. Stored as `store.json`, once."""

    id: str


class Claim(Wire):
    """We are about to pay: written before the create call, by the one writer who was first."""

    token: str
    owner: str
    claimed_at: datetime
    where: str  # the endpoint: a batch can be found again only there
    run: str  # URI of the run that pays
    provider: ProviderName
    model: str  # that this attempt asks: one batch, one model
    asked: int  # requests
    after: tuple[int, ...] = ()  # the harvested attempts that it builds on: it asks what they left
    most: int | None = None  # of what they left, so many at most


class Lease(Wire):
    """A claim's lease from a moment on: renewed by its owner, or taken over by somebody else once it had lapsed.

    Both write the same name (`lease-<n>-<k>`, the next k), so that one of them wins and the other one knows.
    """

    owner: str
    since: datetime


class Unknown(Wire):
    """When a provider first said that it does not know a batch which it gave us a receipt for."""

    since: datetime


class Ended(Wire):
    """Nothing more will come of this attempt.

    `refused`: the create call was refused, no batch exists. `rejected`: the provider took the batch and failed it as a
    whole. `queue_full`: the same, but only because too much was enqueued. `harvested`: its results are in `answers-<n>`.
    `lost`: the provider does not know it any more, and the job's policy buys its requests again.
    """

    how: Literal["refused", "rejected", "queue_full", "harvested", "lost"]
    status: str  # the provider's word
    ended_at: datetime
    remaining: int  # requests of the shard that are to be asked (again)
    alone: bool = False  # for `queue_full`: nothing else was in the queue, so that waiting alone cannot help (F24)
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The facts about one attempt."""

    number: int  # from 1
    claim: Claim
    leases: tuple[Lease, ...] = ()  # in order; the last one counts
    receipt: Receipt | None = None
    ended: Ended | None = None
    unknown: Unknown | None = None

    @property
    def holder(self) -> str:
        """Who holds the lease."""
        return self.leases[-1].owner if self.leases else self.claim.owner

    @property
    def lapses_at(self) -> datetime:
        """When the lease ends."""
        return (self.leases[-1].since if self.leases else self.claim.claimed_at) + LEASE

    @property
    def began_at(self) -> datetime:
        """When its batch was created, by the provider's clock where it has said so."""
        return self.receipt.created_at if self.receipt else self.claim.claimed_at

    @property
    def is_harvested(self) -> bool:
        """Whether its answers are in."""
        return self.ended is not None and self.ended.how == "harvested"


@dataclass(frozen=True, slots=True)
class Send:
    """Claim this attempt, then send."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Attach:
    """A batch of ours is there: wait for it, then harvest it."""

    attempt: Attempt
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Hold:
    """Not now: somebody else is at it, or the provider's queue is full."""

    until: datetime
    why: str


@dataclass(frozen=True, slots=True)
class Search:
    """A claim lapsed without a receipt. Take its lease over and look up every token in doubt before anything is sent again."""

    attempt: int  # to send, if nothing is found
    lapsed: Attempt  # whose lease is taken over
    doubtful: tuple[Attempt, ...]  # oldest first: those whose fate is unknown


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
            return Attach(attempt, attempt.receipt)
    harvests = [attempt.ended for attempt in attempts if attempt.ended is not None and attempt.ended.how == "harvested"]
    if harvests and not harvests[-1].remaining:
        return Done()  # whatever became of later claims: nothing is left to ask
    last = attempts[-1]
    if last.ended is not None:
        if last.ended.how == "queue_full":
            until = last.ended.ended_at + queue_pause(attempts)
            return Hold(until, "the provider's queue is full") if now < until else Send(last.number + 1)
        return Send(last.number + 1)
    if now < last.lapses_at:
        return Hold(last.lapses_at, f"{last.holder} holds its claim")
    return Search(last.number + 1, last, tuple(attempt for attempt in attempts if attempt.receipt is None and attempt.ended is None))


def queue_pause(attempts: Sequence[Attempt]) -> timedelta:
    """How long to let the provider's queue drain: doubling with every full queue in a row."""
    doublings = min(max(0, len(full_queues(attempts)) - 1), 10)  # far beyond the most; some forty are more than a timedelta holds
    doubled: timedelta = QUEUE_PAUSE * 2**doublings
    return min(doubled, QUEUE_PAUSE_MAX)


def full_queues(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The attempts at the end that all met a full queue, newest first."""
    return list(takewhile(lambda attempt: attempt.ended is not None and attempt.ended.how == "queue_full", reversed(attempts)))


def is_stuck(attempts: Sequence[Attempt], now: datetime) -> bool:
    """Whether the queue has been full for so long that a person should look (F23)."""
    full = full_queues(attempts)
    return bool(full and full[-1].ended and now - full[-1].ended.ended_at > QUEUE_PATIENCE)


def portion(attempts: Sequence[Attempt]) -> int | None:
    """How many requests the next attempt may ask at most; None: all that are left.

    A batch that met a full queue with nothing else in it is too large for the queue, so half of it is sent next (F24).
    """
    for attempt in reversed(attempts):
        if attempt.ended is not None and attempt.ended.how == "queue_full" and attempt.ended.alone:
            return max(1, attempt.claim.asked // 2)
        if attempt.receipt is not None:
            return attempt.claim.most
    return None


def token_for(store: str, shard: str, attempt: int) -> str:
    """The token of an attempt: the same whoever asks in this store, and safe in every provider's names."""
    return hashlib.sha256(f"{store}/{shard}/{attempt}".encode()).hexdigest()[:32]


class Ledger:
    """Reads and writes the facts of shards in the store."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def attempts(self, shard: str) -> list[Attempt]:
        """Every attempt of a shard, oldest first. Raises LedgerCorrupt if something stands without its claim."""
        found: dict[int, dict[str, str]] = {}
        for item in sorted(self._objects.scan(f"shards/{shard}"), key=lambda item: item.key):
            if match := ATTEMPT_OBJECT.search(item.key):
                found.setdefault(int(match[2]), {})[f"{match[1]}-{int(match[3]):04d}" if match[3] else match[1]] = item.key
        return [self._attempt(shard, number, keys) for number, keys in sorted(found.items())]

    def _attempt(self, shard: str, number: int, keys: dict[str, str]) -> Attempt:
        def read(kind: str, shape: type[Shape]) -> Shape | None:
            return self._objects.get_shape(keys[kind], shape) if kind in keys else None

        claim = read("claim", Claim)
        if claim is None:
            raise LedgerCorrupt(_key(shard, "claim", number), f"{', '.join(sorted(keys))} stand without it")
        leases = (read(kind, Lease) for kind in sorted(keys) if kind.startswith("lease-"))
        return Attempt(
            number=number,
            claim=claim,
            leases=tuple(lease for lease in leases if lease),
            receipt=read("receipt", Receipt),
            ended=read("ended", Ended),
            unknown=read("unknown", Unknown),
        )

    def token(self, shard: str, attempt: int) -> str:
        """The token of an attempt of this store."""
        store = self._objects.get_shape("store.json", StoreId) or self._objects.settle("store.json", StoreId(id=uuid4().hex))
        return token_for(store.id, shard, attempt)

    def claim(self, shard: str, attempt: int, claim: Claim) -> bool:
        """Claim an attempt; False when somebody else was first."""
        return self._objects.create_shape(_key(shard, "claim", attempt), claim)

    def take_lease(self, shard: str, attempt: Attempt, lease: Lease) -> bool:
        """Renew an attempt's lease, or take it over once it has lapsed; False when somebody else was first."""
        return self._objects.create_shape(_key(shard, "lease", attempt.number, len(attempt.leases) + 1), lease)

    def record_unknown(self, shard: str, attempt: int, now: datetime) -> Unknown:
        """Note that the provider does not know an attempt's batch; the first note stays until it does."""
        return self._objects.settle(_key(shard, "unknown", attempt), Unknown(since=now))

    def forget_unknown(self, shard: str, attempt: int) -> None:
        """The provider knows the batch again."""
        self._objects.delete([_key(shard, "unknown", attempt)])

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


def _key(shard: str, kind: str, *numbers: int) -> str:
    return f"shards/{shard}/{'-'.join([kind, *map(str, numbers)])}.json"

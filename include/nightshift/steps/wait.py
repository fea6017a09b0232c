"""wait: look at a batch until it has ended. Reads only; every look may fail without ending the wait."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from nightshift.budgets import is_crowded
from nightshift.errors import BatchUnknown, NightshiftError, Permanent, Transient
from nightshift.job import Job
from nightshift.providers.protocol import Provider, Snapshot
from nightshift.runs import Run, Site
from nightshift.shapes import Receipt
from nightshift.steps.submit import OWNER_PAUSE, may_pay, open_where, payer_of
from nightshift.stores.ledger import Attach, Attempt, Hold, Send, next_move

UNKNOWN_PATIENCE = timedelta(minutes=10)  # how long a batch that we hold a receipt for may be unknown to the provider
FILES_GRACE = timedelta(minutes=10)  # after its end, for a batch to show its result files
ERROR_PAUSE_MAX_SECONDS = 300.0
DOUBLINGS = 4  # of the pause between looks: who looks often wants to know soon that the provider is back

Seen = Callable[[Snapshot | NightshiftError], None]  # told of every look, also of those that failed


@dataclass(frozen=True, slots=True)
class Look:
    """Look again after a pause."""

    after_seconds: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """The deadline has passed: stop the batch, then go on looking until it has stopped."""

    after_seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing more to wait for; collect reads what there is."""


def next_look(
    snapshot: Snapshot | NightshiftError,
    *,
    failures: int,
    failing: timedelta,
    waited: timedelta,
    patience: timedelta,
    poll_seconds: float,
    awaits_files: bool = False,
) -> Look | Cancel | Ended:
    """Decide from one look. `failures`: looks in a row that failed, this one included; `failing`: since the first of them;

    `waited`: since the batch began; `awaits_files`: whether it has ended, and its result files lag behind.
    """
    if isinstance(snapshot, BatchUnknown):
        return Ended() if failing > UNKNOWN_PATIENCE else Look(_backoff(poll_seconds, failures))
    if isinstance(snapshot, Permanent):
        return Ended()  # collect meets the same error on a worker, where it can be reported and retried by a person
    if isinstance(snapshot, NightshiftError):
        return Look(_backoff(poll_seconds, failures))
    if snapshot.state != "running":
        return Look(poll_seconds) if awaits_files else Ended()
    if waited > patience and not snapshot.is_stopping:
        return Cancel(poll_seconds)
    return Look(poll_seconds)


def is_waiting_for_files(snapshot: Snapshot, now: datetime, latest: datetime) -> bool:
    """Result files can lag behind the status (F60). Without a grace everything would count as missing, and be paid again.

    `latest`: when the batch has ended at the latest, where the provider does not say when it did.
    """
    return snapshot.awaits_files and now < files_due(snapshot, latest)


def files_due(snapshot: Snapshot, latest: datetime) -> datetime:
    """Until when result files that are not there are waited for."""
    return (snapshot.ended_at or latest) + FILES_GRACE


def watch(
    provider: Provider, receipt: Receipt, job: Job, *, poll_seconds: float, now: Callable[[], datetime], seen: Seen
) -> Iterator[float]:
    """Pauses in seconds between looks, ending when there is nothing more to wait for. The driver sleeps as suits it."""
    failures, last_known = 0, now()
    while True:
        try:
            snapshot: Snapshot | NightshiftError = provider.poll(receipt.batch_id, waiting=True)
            failures, last_known = 0, now()
        except (Permanent, Transient) as error:
            snapshot, failures = error, failures + 1
        seen(snapshot)
        move = next_look(
            snapshot,
            failures=failures,
            failing=now() - last_known,
            waited=now() - receipt.created_at,
            patience=job.patience,
            poll_seconds=poll_seconds,
            awaits_files=isinstance(snapshot, Snapshot) and is_waiting_for_files(snapshot, now(), receipt.created_at + job.patience),
        )
        match move:
            case Ended():
                return
            case Cancel(after_seconds=pause):
                provider.cancel(receipt.batch_id)
                yield pause
            case Look(after_seconds=pause):
                yield pause


def pauses(site: Site, run: Run, shard: str, *, seen: Seen = lambda look: None) -> Iterator[float]:
    """The waiting that a shard needs now, as pauses in seconds: for its batch, for somebody's claim, for the provider's queue."""
    if site.ledger.settled(shard) is not None:
        return  # a receipt that was written late changes nothing any more
    attempts = site.ledger.attempts(shard)
    match next_move(attempts, now=site.now()):
        case Attach(attempt=attempt, receipt=receipt):
            provider = open_where(site, run, shard, attempt)
            yield from watch(provider, receipt, payer_of(site, run, attempt).job, poll_seconds=site.poll_seconds, now=site.now, seen=seen)
        case Hold(until=until):
            yield max(0.0, (until - site.now()).total_seconds())
        case Send() if not may_pay(site, run, shard):
            yield OWNER_PAUSE.total_seconds()
        case Send():
            yield from _room(site, run, shard, attempts)


def _room(site: Site, run: Run, shard: str, attempts: Sequence[Attempt]) -> Iterator[float]:
    """Pauses until a budget has room for the next attempt of a shard beside what is in flight, or for good none."""
    pause, facts = site.poll_seconds, site.ledger.shard(shard)
    while is_crowded(site, run, facts, attempts):
        yield pause
        pause = min(2 * pause, ERROR_PAUSE_MAX_SECONDS)


def _backoff(poll_seconds: float, failures: int) -> float:
    """Doubling, capped, jittered: a provider that comes back is not met by every waiter at once."""
    return float(min(poll_seconds * 2 ** min(failures, DOUBLINGS), ERROR_PAUSE_MAX_SECONDS)) * random.uniform(0.75, 1.25)

"""Asking again: which requests of an attempt, and how. Bounded by policy, by count and by money."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from nightshift.job import Job
from nightshift.providers.protocol import Reply
from nightshift.retry_budget import RetryBudget
from nightshift.runs import Run, Site
from nightshift.shapes import Shard, Variant
from nightshift.stores.ledger import Attempt
from nightshift.stores.shards import Left, read_answers
from nightshift.validation import AS_IT_WAS, Answer

BYSTANDER = "another line failed the batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """How a request is asked again, and whether that is taken out of the money that is left."""

    variant: Variant
    is_charged: bool = True


def decide(job: Job, reply: Reply, asked_as: Variant, times: int, *, is_overdue: bool, is_rushed: bool) -> Again | None:
    """Whether and how a request without a valid answer is asked again; None: this is its last word.

    `times`: how often it had this outcome, with this one; `is_overdue`: the run's deadline has cancelled its batch; `is_rushed`:
    what a batch had no time for is finished on demand.
    """
    is_cancelled_late = reply.outcome == "cancelled" and is_overdue
    if is_rushed and (reply.outcome == "expired" or is_cancelled_late):
        return Again(variant=asked_as.model_copy(update={"provider": "live"}))
    if reply.is_bystander:  # nothing was wrong with it, and each failure names a line less: this ends by itself
        return Again(variant=asked_as, is_charged=False)
    if reply.outcome == "errored" and not reply.retryable:  # alone, where others of its line may be to blame: it was not charged for it
        return Again(variant=asked_as.model_copy(update={"alone": True}), is_charged=False) if reply.is_shared else None
    retry = job.spec.policy.retry
    if is_cancelled_late or not retry.allows(reply.outcome, times):
        return None
    return Again(variant=retry.variant(reply.outcome, asked_as, job.token_limit))


def ask_again(
    site: Site,
    payer: Run,
    attempt: Attempt,
    facts: Shard,
    left: Mapping[bytes, Left | None],
    failed: Mapping[bytes, Answer],
    rest: Iterable[Left | None],
    budget: Callable[[], RetryBudget],
) -> dict[bytes, Answer]:
    """The answers of an attempt that are not valid, each with how it is asked again, in the order of what was `left` to ask.

    What that is to cost is put aside before anybody reads it, with what the `rest` costs that this attempt did not ask: shards
    that are harvested at the same moment see each other's, and who comes second decides anew, with what the first has left.
    `budget`: what is left now.
    """
    wanted = _wanted(site, payer.job, attempt, facts, left, failed)
    owed = Counter(each.variant if each else AS_IT_WAS for each in rest)
    owed.update(again.variant for _, again in wanted.values() if again and not again.is_charged)
    while True:
        money, decided = budget(), {}
        for variant, count in owed.items():
            money.owe(variant, count)
        for key, (asked_as, again) in wanted.items():
            is_granted = again is not None and (not again.is_charged or money.pays(again.variant))
            decided[key] = replace(failed[key], asked_as=asked_as, again=again.variant if again and is_granted else None)
        if money.put_aside():
            return decided


def _wanted(
    site: Site, job: Job, attempt: Attempt, facts: Shard, left: Mapping[bytes, Left | None], failed: Mapping[bytes, Answer]
) -> dict[bytes, tuple[Variant, Again | None]]:
    """How each request without a valid answer was asked, and is to be asked again if there is money for it."""
    history = _outcomes_so_far(site, facts.key, attempt)
    is_overdue = site.now() - attempt.began_at > job.patience
    is_rushed = job.spec.policy.on_demand and attempt.claim.provider != "live"
    wanted = {}
    for key, before in left.items():
        if key in failed:
            reply, asked_as = failed[key].reply, before.variant if before else AS_IT_WAS
            times = history.get(key, Counter())[reply.outcome] + 1
            wanted[key] = asked_as, decide(job, reply, asked_as, times, is_overdue=is_overdue, is_rushed=is_rushed)
    return wanted


def _outcomes_so_far(site: Site, shard: str, attempt: Attempt) -> dict[bytes, Counter[str]]:
    """How often each request had each outcome in the attempts before. Only requests asked again are in the later ones.

    What another line had kept from being looked at has not had an outcome of its own.
    """
    history: dict[bytes, Counter[str]] = {}
    for number in attempt.claim.after:
        if number:  # attempt 0 is what became of it before it was driven again
            table = read_answers(site.store, shard, number, ["request_key", "outcome", "reason", "again"])
            for line in table.filter(table.column("again").is_valid()).to_pylist():
                if line["reason"] == BYSTANDER:
                    continue
                history.setdefault(line["request_key"], Counter())[line["outcome"]] += 1
    return history

"""The retry budget: the money that is left for asking again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import ROUND_DOWN, Decimal
from functools import cache

from nightshift.budgets import BILLIONTH, Aside
from nightshift.money.estimate import actual_cost, estimate_requests, measured_before
from nightshift.money.prices import long_above
from nightshift.runs import Run, Site
from nightshift.settle import TOKENS, distinct, usage_of
from nightshift.shapes import Plan, Shard, Usage, Variant
from nightshift.stores.ledger import Attempt, Claim
from nightshift.stores.shards import read_answers


class RetryBudget:
    """The dollars that are left for asking a shard's requests again; without a budget there is no bound."""

    def __init__(self, dollars: Decimal | None, price: Callable[[Variant], Decimal | None], aside: Aside | None = None) -> None:
        self._dollars, self._price, self._aside = dollars, price, aside
        self._granted = self._owed = Decimal(0)  # dollars that were taken out of it

    def pays(self, asked_as: Variant) -> bool:
        """Whether one more request can be asked so; its estimated price is then taken out."""
        if self._dollars is None:
            return True
        price = self._price(asked_as)
        if price is None or price > self._dollars + BILLIONTH:
            return False
        self._dollars -= price
        self._granted += price
        return True

    def owe(self, asked_as: Variant, count: int) -> None:
        """Take out what some requests will cost that are asked in any case, whether or not as much is left."""
        price = self._price(asked_as) if self._dollars is not None else None
        if self._dollars is not None and price is not None:
            self._dollars -= price * count
            self._owed += price * count

    def put_aside(self) -> bool:
        """Book all that was taken out; False where others have booked so much meanwhile that it does not fit any more."""
        taken = (self._granted + self._owed).quantize(BILLIONTH, ROUND_DOWN)
        return self._aside is None or not taken or self._aside.book(taken, is_owed=not self._granted)


def retry_budget_of(site: Site, run: Run, facts: Shard, attempts: Sequence[Attempt], bought: Usage, attempt: Attempt) -> RetryBudget:
    """What budgets leave for a shard once all its answers so far are paid: its share by requests, less what it cost.

    Its share of the job's budget, and of what the month had left when the run was approved: what one shard asks again does not
    take the money that others have not been asked with at all. `bought`: by this attempt, whose answers are not in the store yet.
    """
    spent = _cost(attempt.claim, bought)
    aside = Aside(site, run, facts.key, attempt, attempts, spent)
    budget, month = run.job.spec.policy.budget_usd, aside.left()
    if budget is None and month is None:
        return RetryBudget(None, lambda asked_as: None)
    approved = site.store.get_shape(run.key("approved.json"), Plan)
    whole = min((each for each in (budget, _month_left(site, approved)) if each is not None), default=None)
    share = None if whole is None else whole * facts.request_count / max(facts.request_count, approved.submitted if approved else 0)
    for before in distinct(attempts):
        if before.is_harvested:
            table = read_answers(site.store, facts.key, before.number, ["paid", *TOKENS])
            spent += _cost(before.claim, usage_of(table, long_above(before.claim.provider, before.claim.model)))

    measured = measured_before(site.store, run.job)
    is_dear = facts.least > 1  # what is asked again may be too little for a batch

    @cache
    def price(asked_as: Variant) -> Decimal | None:
        if is_dear:
            asked_as = asked_as.model_copy(update={"provider": "live"})
        all_of_it = estimate_requests(run.job, facts.request_count, facts.request_bytes, asked_as=asked_as, measured=measured, once=True)
        return None if all_of_it.usd_high is None else all_of_it.usd_high / facts.request_count  # others are in flight beside it

    left = [each for each in (None if share is None else share - spent, month) if each is not None]
    return RetryBudget(max(Decimal(0), min(left)), price, aside)


def _month_left(site: Site, approved: Plan | None) -> Decimal | None:
    """What the month had left when a run was approved; None: nothing bounds it, or that was another month."""
    if approved is None or approved.approved_at is None or f"{approved.approved_at:%Y-%m}" != f"{site.now():%Y-%m}":
        return None
    return approved.month_left


def _cost(claim: Claim, usage: Usage) -> Decimal:
    """Dollars as far as they are known: answers without usage are left out here, and flagged in the report."""
    return actual_cost(claim.provider, claim.model, usage.model_copy(update={"unknown": 0})) or Decimal(0)

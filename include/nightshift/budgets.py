"""Budgets: what a run, a job's month and a connection's month may cost, and the booking of shards against them before they are sent."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal

from nightshift.errors import BudgetExceeded, ShardHeld
from nightshift.money.estimate import actual_cost
from nightshift.packing import estimate_shards
from nightshift.runs import Run, Site, run_id
from nightshift.shapes import Paid, Settled, Wire
from nightshift.stores.accounts import Account, Full

PAUSE = timedelta(seconds=30)  # before a shard that does not fit beside others in flight is looked at again
PATIENCE = timedelta(hours=26)  # with what is in flight: where nothing has been settled for so long, it is not waited for
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A bound on what is spent, and the account that keeps count of it."""

    name: str  # what to mend, where it is too low
    limit: Decimal
    account: str  # folder in the store


class Booking(Wire):
    """A shard was about to be booked. Stored as `shards/<shard>/booked-<hash>.json`, before it is."""

    account: str
    run: str  # URI of the run that is about to pay


def budgets_of(site: Site, run: Run) -> list[Budget]:
    """Every budget that a run's spending counts against, now. Months are calendar months in UTC."""
    policy, request, month = run.job.spec.policy, run.job.spec.request, f"{site.now():%Y-%m}"
    connection = site.monthly_budget(request.connection)
    found = [
        ("policy.budget_usd", policy.budget_usd, run.key("spending")),
        (f"policy.monthly_budget_usd of {run.job.name}, {month}", policy.monthly_budget_usd, f"spending/{month}/job-{run.job.name}"),
        (
            f"the monthly budget of {request.connection}, {month}",
            connection,
            f"spending/{month}/connection-{UNSAFE.sub('-', request.connection)}",
        ),
    ]
    return [Budget(name=name, limit=limit, account=account) for name, limit, account in found if limit is not None]


def book_shard(site: Site, run: Run, shard: str) -> None:
    """Book a shard that is about to be sent against every budget of its run, once.

    Raises ShardHeld where it fits only if what is in flight turns out cheaper than it may be, and BudgetExceeded where it does not fit.
    """
    budgets = budgets_of(site, run)
    if not budgets:
        return
    estimate = estimate_shards(site.store, run.job, [site.ledger.shard(shard)])
    if estimate.usd is None:
        return  # nobody can tell what it costs: a person was asked
    for budget in budgets:
        booking = Booking(account=budget.account, run=run.uri)
        site.store.create_shape(f"shards/{shard}/booked-{run_id(booking.account, booking.run)}.json", booking)
        account = Account(site.store, budget.account)
        full = account.book(_name(shard, run.uri), estimate.usd, budget.limit, estimate.usd_high, now=site.now())
        if isinstance(full, Full):
            if full.open and full.since is not None and site.now() - full.since < PATIENCE:
                raise ShardHeld(shard, f"{budget.name}: until others in flight are paid", PAUSE.total_seconds())
            raise BudgetExceeded(estimate.usd, budget.limit, budget.name, full.total)


def settle_shard(site: Site, word: Settled) -> None:
    """Put what a shard has cost in place of what was booked for it, in every account."""
    for found in list(site.store.scan(f"shards/{word.shard}")):
        if "/booked-" in found.key and (booking := site.store.get_shape(found.key, Booking)) is not None:
            cost = cost_of(paid for paid in word.paid if paid.run == booking.run)
            Account(site.store, booking.account).settle(_name(word.shard, booking.run), cost, now=site.now())


def cost_of(paid: Iterable[Paid]) -> Decimal | None:
    """Dollars for everything that was bought, each at its own price; None where any of it has no known price."""
    costs = [actual_cost(each.provider, each.model, each.usage) for each in paid]
    return None if any(cost is None for cost in costs) else sum((cost for cost in costs if cost is not None), Decimal(0))


def _name(shard: str, run: str) -> str:
    return f"{shard}/{run.rpartition('/')[2]}"

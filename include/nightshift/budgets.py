"""Budgets: what a run, a job's month and a connection's month may cost, and the booking of shards against them before they are sent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import product

from nightshift.errors import BudgetExceeded, ShardHeld
from nightshift.money.estimate import actual_cost, estimate_requests, measured_before
from nightshift.money.prices import long_above
from nightshift.packing import estimate_shards
from nightshift.runs import Run, Site, run_id
from nightshift.settle import TOKENS, distinct, usage_of
from nightshift.shapes import Estimate, Paid, Shard, Variant, Wire
from nightshift.stores.accounts import Account, Booked, Full
from nightshift.stores.ledger import Attempt, Claim
from nightshift.stores.shards import harvested, read_answers

PATIENCE = timedelta(hours=26)  # with what is in flight: where nothing has been settled for so long, it is not waited for
BILLIONTH = Decimal("1e-9")  # of a dollar: sums of quotients differ in their last digits, and nobody decides anew for that
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


def book_attempt(site: Site, run: Run, facts: Shard, claim: Claim, attempts: Sequence[Attempt], *, only_look: bool = False) -> None:
    """Book the attempt of a shard that is about to be sent against every budget of its run, once. `attempts`: those before it.

    What the run asks again was decided when its answers were harvested, so it is not refused; what was put aside for it then is
    its booking. For a first attempt, and for what another run has decided to ask again, it raises ShardHeld where it fits only if
    what is in flight turns out cheaper than it may be, and BudgetExceeded where it does not fit. `only_look`: raises the same, and
    books nothing.
    """
    budgets, number = budgets_of(site, run), len(attempts) + 1
    estimate = _estimate(site, run, facts, claim) if budgets else None
    if estimate is None or estimate.usd is None:
        return  # nothing bounds it, or nobody can tell what it costs, and a person was asked
    settle_attempts(site, facts.key, attempts)
    held = _places_held(site, run, facts.key, _entries(facts.key, run.uri, claim, number, attempts))
    budgets = [budget for budget in budgets if _place(budget.account) not in held]
    of, high, is_put_aside = _name(facts.key, run.uri, number), _high(estimate), has_put_aside(run, claim.after, attempts)
    for budget in budgets if not is_put_aside else ():  # all before the first is booked: what one refuses must not weigh on another
        _refuse_full(site, facts.key, budget, Account(site.store, budget.account).fits(of, estimate.usd, budget.limit, high), estimate.usd)
    if only_look:
        return
    for budget in budgets:
        _announce(site, run, facts.key, budget)
        booked = Account(site.store, budget.account).book(of, estimate.usd, None if is_put_aside else budget.limit, high, now=site.now())
        _refuse_full(site, facts.key, budget, booked, estimate.usd)


def has_put_aside(run: Run, after: Sequence[int], attempts: Sequence[Attempt]) -> bool:
    """Whether what is asked after some attempts was decided, and its money put aside, by a run itself: it has paid for the last of them."""
    last = max(after, default=0)
    return any(attempt.claim.run == run.uri for attempt in attempts if attempt.number == last)


def _funded_by(claim: Claim, number: int, attempts: Sequence[Attempt]) -> int | None:
    """The attempt whose harvest has put aside what another one is about to cost; None where none has, or one in between may use it up."""
    last = max(claim.after, default=0)
    doubtful = (attempt.number for attempt in attempts if attempt.ended is None or attempt.ended.how == "lost")
    return None if not last or any(last < each < number for each in doubtful) else last


def _entries(shard: str, run: str, claim: Claim, number: int, attempts: Sequence[Attempt]) -> list[str]:
    """What an attempt can be booked as: by itself, or as what was put aside for it."""
    funded_by = _funded_by(claim, number, attempts)
    return [_name(shard, run, number), *([] if funded_by is None else [_again(shard, run, funded_by)])]


def _places_held(site: Site, run: Run, shard: str, names: Sequence[str]) -> set[str]:
    """What the accounts are of, of whatever month, in which a run has something booked for a shard that is not settled yet."""
    own = [booking.account for booking in _bookings(site, shard) if booking.run == run.uri]
    return {_place(account) for account in own if any(Account(site.store, account).held(name) for name in names)}


def _place(account: str) -> str:
    """What an account is of, without its month."""
    return account.rpartition("/")[2]


def is_crowded(site: Site, run: Run, facts: Shard, attempts: Sequence[Attempt]) -> bool:
    """Whether the next attempt of a shard would be held by a budget until others in flight are paid. `attempts`: those before it."""
    budgets = budgets_of(site, run) if not has_put_aside(run, harvested(attempts), attempts) else []
    estimate = estimate_shards(site.store, run.job, [facts]) if budgets else None
    if estimate is None or estimate.usd is None:
        return False
    of = _name(facts.key, run.uri, len(attempts) + 1)
    found = (Account(site.store, budget.account).fits(of, estimate.usd, budget.limit, _high(estimate)) for budget in budgets)
    return any(isinstance(full, Full) and _may_pass(full, site.now()) for full in found)


@dataclass(frozen=True, slots=True)
class Aside:
    """What asking is to cost that an attempt leaves.

    It is booked before the attempt's answers can be read, and held until an attempt that asks it is harvested.
    """

    site: Site
    payer: Run
    shard: str
    attempt: Attempt
    attempts: Sequence[Attempt]
    cost: Decimal  # of the attempt, whose own booking is still open

    def left(self) -> Decimal | None:
        """What the month leaves for it; once something was put aside, that. None: nothing bounds it."""
        accounts = [(budget, Account(self.site.store, budget.account)) for budget in budgets_of(self.site, self.payer)]
        months = [(budget, account, account.booked(self._of)) for budget, account in accounts if not _is_own(self.payer, budget)]
        return min((self._limit(budget, account) - account.total if was is None else was for budget, account, was in months), default=None)

    def book(self, usd: Decimal, *, is_owed: bool) -> bool:
        """Book it once; whether it fits into the month beside what others have booked. `is_owed`: all of it was granted before."""
        held = _places_held(self.site, self.payer, self.shard, [self._of])  # by who has died before the month turned
        for budget in budgets_of(self.site, self.payer):
            if _place(budget.account) in held:
                continue
            _announce(self.site, self.payer, self.shard, budget)
            account = Account(self.site.store, budget.account)
            limit = None if is_owed or _is_own(self.payer, budget) else self._limit(budget, account) + BILLIONTH
            if isinstance(account.book(self._of, usd, limit, now=self.site.now()), Full):
                return False
        return True

    @property
    def _of(self) -> str:
        return _again(self.shard, self.payer.uri, self.attempt.number)

    def _limit(self, budget: Budget, account: Account) -> Decimal:
        """A budget's limit, as if the attempt were settled already."""
        names = _entries(self.shard, self.payer.uri, self.attempt.claim, self.attempt.number, self.attempts)
        held = sum((account.held(name) for name in names), Decimal(0))
        return budget.limit + held - self.cost if held else budget.limit


def give_back(site: Site, shard: str, claim: Claim, number: int, attempts: Sequence[Attempt]) -> None:
    """Free what was put aside for an attempt that is refused for good, before that is recorded: who goes on books it anew."""
    funded_by = _funded_by(claim, number, attempts)
    if funded_by is not None:
        for booking in _bookings(site, shard):
            Account(site.store, booking.account).settle(_again(shard, booking.run, funded_by), Decimal(0), now=site.now())


def months_leave(site: Site, run: Run) -> Decimal | None:
    """What the budgets of the month leave now; None: there is none."""
    budgets = [budget for budget in budgets_of(site, run) if not _is_own(run, budget)]
    return min((budget.limit - Account(site.store, budget.account).total for budget in budgets), default=None)


def _is_own(run: Run, budget: Budget) -> bool:
    """Whether a budget is the run's alone: it is shared out among its shards."""
    return budget.account == run.key("spending")


def _announce(site: Site, run: Run, shard: str, budget: Budget) -> None:
    """Say in a shard's folder which account it is about to be booked in, so that it is found there however this ends."""
    booking = Booking(account=budget.account, run=run.uri)
    site.store.create_shape(f"shards/{shard}/booked-{run_id(booking.account, booking.run)}.json", booking)


def settle_attempts(site: Site, shard: str, attempts: Sequence[Attempt]) -> None:
    """Put what the attempts of a shard that are over have cost in place of what was booked for them, in every account."""
    bookings = _bookings(site, shard) if any(attempt.ended for attempt in attempts) else []
    is_over = bool(bookings) and site.ledger.settled(shard) is not None
    over = [attempt for attempt in attempts if is_over or attempt.ended is not None] if bookings else []
    for attempt in over:
        if not any(_is_held(site, shard, booking, attempt, attempts) for booking in bookings):
            continue  # it is settled, and its answers may be gone since
        cost = _cost(site, shard, attempt) if attempt in distinct(attempts) else Decimal(0)
        funded_by = _funded_by(attempt.claim, attempt.number, attempts) if attempt.is_harvested or cost is None else None
        for booking in bookings:  # who has booked and was not quick enough to claim pays nothing
            account, of = Account(site.store, booking.account), _name(shard, booking.run, attempt.number)
            paid = cost if booking.run == attempt.claim.run else Decimal(0)
            account.settle(of, paid, now=site.now())
            if funded_by is not None:
                account.settle(_again(shard, booking.run, funded_by), paid if account.booked(of) is None else Decimal(0), now=site.now())
    if is_over:
        for attempt, booking in product(attempts, bookings):  # what was put aside and never asked
            Account(site.store, booking.account).settle(_again(shard, booking.run, attempt.number), Decimal(0), now=site.now())


def _is_held(site: Site, shard: str, booking: Booking, attempt: Attempt, attempts: Sequence[Attempt]) -> bool:
    account = Account(site.store, booking.account)
    return any(account.held(name) for name in _entries(shard, booking.run, attempt.claim, attempt.number, attempts))


def _cost(site: Site, shard: str, attempt: Attempt) -> Decimal | None:
    """What an attempt that is over has cost; None where nobody can tell: what was booked for it stays."""
    if attempt.receipt is None and attempt.ended is None:
        return Decimal(0)  # who claimed it has died, and nothing came of it
    if attempt.ended is None or attempt.ended.how == "lost":
        return None
    if not attempt.is_harvested:
        return Decimal(0)  # refused or rejected: nothing ran
    of = attempt.claim.provider, attempt.claim.model
    table = read_answers(site.store, shard, attempt.number, ["paid", *TOKENS])
    return actual_cost(*of, usage_of(table, long_above(*of)))


def _bookings(site: Site, shard: str) -> list[Booking]:
    keys = [found.key for found in site.store.scan(f"shards/{shard}") if "/booked-" in found.key]
    return [booking for key in keys if (booking := site.store.get_shape(key, Booking)) is not None]


def _estimate(site: Site, run: Run, facts: Shard, claim: Claim) -> Estimate:
    """What an attempt is expected to cost: all of the shard until some of it is answered, what it asks for those after it."""
    if not any(claim.after):
        return estimate_shards(site.store, run.job, [facts])
    asked_as = Variant(provider=claim.provider, model=claim.model)
    size = facts.request_bytes * claim.asked // facts.request_count
    return estimate_requests(run.job, claim.asked, size, asked_as=asked_as, measured=measured_before(site.store, run.job), once=True)


def _high(estimate: Estimate) -> Decimal:
    """The most that is expected; where nothing was measured, the most that it can be, if anything limits that."""
    highest = estimate.usd_high if estimate.measured_on or estimate.usd_max is None else estimate.usd_max
    return max(each for each in (highest, estimate.usd) if each is not None)


def _refuse_full(site: Site, shard: str, budget: Budget, found: Booked | Full, usd: Decimal) -> None:
    if isinstance(found, Full):
        if _may_pass(found, site.now()):
            raise ShardHeld(shard, f"{budget.name} has no room until others in flight are paid", site.poll_seconds)
        raise BudgetExceeded(usd, budget.limit, budget.name, found.total, shard)


def _may_pass(full: Full, now: datetime) -> bool:
    """Whether what is in flight can still turn out cheaper."""
    return bool(full.open) and full.since is not None and now - full.since < PATIENCE


def cost_of(paid: Iterable[Paid]) -> Decimal | None:
    """Dollars for everything that was bought, each at its own price; None where any of it has no known price."""
    costs = [actual_cost(each.provider, each.model, each.usage) for each in paid]
    return None if any(cost is None for cost in costs) else sum((cost for cost in costs if cost is not None), Decimal(0))


def _name(shard: str, run: str, number: int) -> str:
    return f"{shard}/{run.rpartition('/')[2]}/{number}"


def _again(shard: str, run: str, number: int) -> str:
    return f"{_name(shard, run, number)}/again"

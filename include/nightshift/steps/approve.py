"""approve: compare the estimate with the job's budget: pass, ask a person, or stop; then reserve what is to be bought.

Deciding is here, asking is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from nightshift.budgets import Budget, budgets_of, months_leave
from nightshift.errors import ApprovalNeeded, BudgetExceeded, PlanOutdated, TooManyRejected
from nightshift.job import Policy
from nightshift.reserve import reserve
from nightshift.runs import PLAN_STANDS, Run, Site
from nightshift.shapes import Plan
from nightshift.stores.accounts import Account


@dataclass(frozen=True, slots=True)
class Pass:
    """Nothing stands against it."""


@dataclass(frozen=True, slots=True)
class NeedsApproval:
    """A person has to say yes: the estimate is over the limit, or there is no price to estimate with."""

    limit: Decimal


@dataclass(frozen=True, slots=True)
class Stop:
    """Over a budget, whoever says yes."""

    budget: Budget
    spent: Decimal


def decide(plan: Plan, limit: Decimal | None, budgets: Sequence[tuple[Budget, Decimal]] = ()) -> Pass | NeedsApproval | Stop:
    """What the estimate allows. A run that sends nothing always passes; an unknown price asks wherever money is bounded.

    `limit`: what passes without asking; `budgets`: each with what is spent of it.
    """
    if plan.submitted == 0:
        return Pass()
    estimate = plan.estimate.usd
    if estimate is None:
        bounds = [*([] if limit is None else [limit]), *(budget.limit - spent for budget, spent in budgets)]
        return NeedsApproval(min(bounds)) if bounds else Pass()
    for budget, spent in budgets:
        if spent + estimate > budget.limit:
            return Stop(budget, spent)
    if limit is not None and estimate > limit:
        return NeedsApproval(limit)
    return Pass()


def approve(site: Site, run: Run, plan: Plan, *, ask: Callable[[], bool]) -> Plan:
    """Let a run pass and reserve its shards, or stop it: the plan as it is carried out. A repeated call finds the first.

    `ask` is called only where a person has to say yes. Raises TooManyRejected, BudgetExceeded, or ApprovalNeeded where nobody does, or
    PlanOutdated where the plan counts on what is not kept for it any more; nothing is reserved then.
    """
    stored = site.store.get_shape(run.key("approved.json"), Plan)
    if stored is not None:
        return stored
    _check_age(site, run, plan)
    check_rejected(run.job.spec.policy, plan)
    _let_pass(site, run, plan, ask)

    def weigh(revised: Plan) -> None:
        if is_dearer(revised, plan):  # what others have taken out can leave less than a batch, and that costs more
            _let_pass(site, run, revised, ask)

    reserved = reserve(site, run, plan, weigh=weigh)
    approved = {"approved_at": site.now(), "month_left": months_leave(site, run)}
    return site.store.settle(run.key("approved.json"), reserved.model_copy(update=approved))


def check_rejected(policy: Policy, plan: Plan) -> None:
    """Raise TooManyRejected where a plan buys answers that could not be published."""
    if plan.submitted and plan.rows - plan.rejected < policy.publish_at_least * plan.rows:
        raise TooManyRejected(plan.rejected, plan.rows, policy.publish_at_least, plan.reasons)


def _check_age(site: Site, run: Run, plan: Plan) -> None:
    found = site.store.head(run.key("plan.json"))
    is_old = found is not None and site.now().timestamp() - found.modified > PLAN_STANDS.total_seconds()
    if is_old and (plan.reused or plan.adopted or run.input.redrive):  # a redrive counts on the rows of another run, too
        raise PlanOutdated(run.uri, PLAN_STANDS.days)


def _let_pass(site: Site, run: Run, plan: Plan, ask: Callable[[], bool]) -> None:
    match weighed(site, run, plan):
        case Stop(budget, spent):
            raise BudgetExceeded(plan.estimate.usd or Decimal(0), budget.limit, budget.name, spent)
        case NeedsApproval(limit) if not ask():
            raise ApprovalNeeded(plan.estimate.usd, limit)


def weighed(site: Site, run: Run, plan: Plan) -> Pass | NeedsApproval | Stop:
    """What the estimate of a plan allows now, with what is spent of every budget."""
    budgets = [(budget, Account(site.store, budget.account).total) for budget in budgets_of(site, run)]
    return decide(plan, run.job.spec.policy.approve_above_usd, budgets)


def must_ask(site: Site, run: Run, plan: Plan) -> bool:
    """Whether a person has to say yes, and has not done so yet. Raises TooManyRejected: nobody is asked for what cannot be published."""
    check_rejected(run.job.spec.policy, plan)
    return isinstance(weighed(site, run, plan), NeedsApproval) and site.store.head(run.key("approved.json")) is None


def is_dearer(revised: Plan, plan: Plan) -> bool:
    """Whether a plan is estimated above another one."""
    return revised.estimate.usd is not None and plan.estimate.usd is not None and revised.estimate.usd > plan.estimate.usd

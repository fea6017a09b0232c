"""approve: compare the estimate with the job's budget: pass, ask a person, or stop. Decides; asking is the caller's."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from nightshift.errors import ApprovalNeeded, BudgetExceeded
from nightshift.job import Policy
from nightshift.runs import Run
from nightshift.shapes import Plan


@dataclass(frozen=True, slots=True)
class Pass:
    """Nothing stands against it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A person has to say yes: the estimate is over the limit, or there is no price to estimate with."""

    limit: Decimal


@dataclass(frozen=True, slots=True)
class Stop:
    """Over the budget, whoever says yes."""

    budget: Decimal


def decide(plan: Plan, policy: Policy) -> Pass | Ask | Stop:
    """What the estimate allows. A run that sends nothing always passes; an unknown price asks wherever money is bounded."""
    if plan.submitted == 0:
        return Pass()
    estimate, budget, limit = plan.estimate.usd, policy.budget_usd, policy.approve_above_usd
    if estimate is None:
        bound = limit if limit is not None else budget
        return Pass() if bound is None else Ask(bound)
    if budget is not None and estimate > budget:
        return Stop(budget)
    if limit is not None and estimate > limit:
        return Ask(limit)
    return Pass()


def approve(run: Run, plan: Plan, *, approved: bool) -> None:
    """Let a run pass or stop it. Raises BudgetExceeded, or ApprovalNeeded where nobody has said yes."""
    match decide(plan, run.job.spec.policy):
        case Stop(budget):
            raise BudgetExceeded(plan.estimate.usd or Decimal(0), budget)
        case Ask(limit) if not approved:
            raise ApprovalNeeded(plan.estimate.usd, limit)


def question(run: Run, plan: Plan) -> str:
    """What a person needs to know to say yes, as Markdown."""
    estimate = plan.estimate
    cost = "unknown (no price for this model)" if estimate.usd is None else f"**${estimate.usd:.4f}**, at most ${estimate.usd_max:.4f}"
    saved = "" if plan.saved_usd is None else f"\n| spared by reuse and duplicates | ${plan.saved_usd:.4f} |"
    return (
        f"`{run.job.name}` wants to send **{plan.submitted:,} requests** to `{run.job.spec.request.model}`.\n\n"
        f"| | |\n|---|---|\n| estimated cost | {cost} |\n| rows | {plan.rows:,} |\n| rejected, never sent | {plan.rejected:,} |\n"
        f"| duplicates | {plan.duplicates:,} |\n| answered earlier, reused | {plan.reused:,} |{saved}\n"
        f"| input tokens | {estimate.input_tokens:,} |\n\n"
        f"Prices: {estimate.basis}."
    )

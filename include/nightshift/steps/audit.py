"""audit: run the job's Great Expectations suite on the staged dataset, before readers can see it."""

from __future__ import annotations

from pathlib import Path

from nightshift.job import Job
from nightshift.runs import Run, Site
from nightshift.shapes import Assembled, Audit, Check, Plan
from nightshift.suite import Parts, run_suite


def audit(site: Site, run: Run, plan: Plan, assembled: Assembled) -> Audit:
    """The verdict on the staged dataset: the share of rows that succeeded, and every expectation."""
    stored = site.store.get_shape(run.key("audit.json"), Audit)
    if stored is not None:
        return stored
    checks = _checks(site, run.job, assembled) if run.job.expectations else ()
    return site.store.settle(run.key("audit.json"), verdict(run.job, plan.rows, assembled, checks))


def _checks(site: Site, job: Job, assembled: Assembled) -> tuple[Check, ...]:
    with site.scratch() as folder:
        return run_suite(job.expectations, Parts(site.store, assembled.parts, Path(folder)), job.spec.input.id)


def verdict(job: Job, rows: int, assembled: Assembled, checks: tuple[Check, ...]) -> Audit:
    """Decide: held when too few rows succeeded or a critical expectation failed."""
    share = assembled.outcomes["succeeded"] / rows if rows else 0.0
    least = job.spec.policy.publish_at_least
    reasons = [_too_few(assembled, share, least)] if share < least else []
    if not rows:
        reasons = ["no row was read, so there is nothing to publish"]
    reasons += [_broken(check) for check in checks if not check.success and check.severity == "critical"]
    return Audit(passed=not reasons, share_succeeded=share, reasons=tuple(reasons), checks=checks)


def _too_few(assembled: Assembled, share: float, least: float) -> str:
    """With what became of the others, the most frequent reason of each."""
    others = [
        f"{count:,} {outcome}{''.join(f' ({why})' for why in list(assembled.reasons.get(outcome, {}))[:1] if why)}"
        for outcome, count in assembled.outcomes.items()
        if count and outcome != "succeeded"
    ]
    return f"{share:.2%} of the rows succeeded, policy.publish_at_least asks for {least:.2%}: {', '.join(others)}"


def _broken(check: Check) -> str:
    rows = f" for {check.unexpected} rows (such as {', '.join(check.examples)})" if check.unexpected else ""
    return f"{check.expectation}{f' on {check.column}' if check.column else ''} failed{rows}{f': {check.detail}' if check.detail else ''}"

"""How far a run has come, what it has cost so far and what it has reused: from its files, while it is under way and afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from typing import Literal

from nightshift.approvals import approvals_of
from nightshift.budgets import cost_of
from nightshift.runs import Run, load_run, run_folder
from nightshift.shapes import Approval, Plan, Summary, Wire
from nightshift.stores.ledger import Ledger
from nightshift.stores.objects import Objects

State = Literal["planning", "waiting for approval", "under way", "published", "held", "failed", "planned"]


class Progress(Wire):
    """A run at one moment."""

    job: str
    run: str
    label: str
    partition: str
    started_at: datetime
    state: State
    sample: int | None  # rows that it was asked to stay with
    rows: int | None  # None: not planned yet
    requests: int  # that this run needs answers to, with those that it reuses
    answered: int  # of them: reused, or in shards that are settled
    reused: int
    duplicates: int
    shards: int
    settled: int  # of the shards
    cost_usd: Decimal | None  # of the shards that are settled; None: of some it is not known
    estimate_usd: Decimal | None
    saved_usd: Decimal | None
    approvals: tuple[Approval, ...]
    problem: str | None
    report: str | None  # URI, once it is written


def progress_of(run: Run) -> Progress:
    """The progress of a run: one look at the facts of each of its shards that is not settled for good."""
    store = run.store
    summary = store.get_shape(run.key("summary.json"), Summary)
    approved = store.get_shape(run.key("approved.json"), Plan)
    plan = approved or store.get_shape(run.key("plan.json"), Plan)
    words = [word for shard in (approved.shards if approved else ()) if (word := Ledger(store).settled(shard))]
    own = [paid for word in words for paid in word.paid if paid.run == run.uri]
    reused = plan.reused if plan else 0
    return Progress(
        job=run.job.name,
        run=run.input.run,
        label=run.input.label,
        partition=run.input.partition,
        started_at=run.input.started_at,
        state=_state(plan, approved, summary),
        sample=run.input.sample,
        rows=plan.rows if plan else None,
        requests=plan.unique if plan else 0,
        answered=min(plan.unique, reused + sum(word.requests for word in words)) if plan else 0,
        reused=reused,
        duplicates=plan.duplicates if plan else 0,
        shards=len(plan.shards) if plan else 0,
        settled=len(words),
        cost_usd=cost_of(own),
        estimate_usd=plan.estimate.usd if plan else None,
        saved_usd=plan.saved_usd if plan else None,
        approvals=tuple(approvals_of(run)),
        problem=summary.problem if summary else None,
        report=summary.report if summary else None,
    )


def state_of(run: Run) -> State:
    """Where a run stands, without a look at its shards."""
    plan, approved = (run.store.get_shape(run.key(name), Plan) for name in ("plan.json", "approved.json"))
    return _state(plan, approved, run.store.get_shape(run.key("summary.json"), Summary))


def _state(plan: Plan | None, approved: Plan | None, summary: Summary | None) -> State:
    if summary is not None:
        return summary.state
    return "planning" if plan is None else "waiting for approval" if approved is None else "under way"


def latest(store: Objects, job: str, most: int) -> Iterator[Run]:
    """The newest runs of a job, by when they were begun."""
    found = (each for each in store.scan(f"runs/{job}") if each.key.endswith("/input.json"))
    for each in sorted(found, key=lambda each: each.modified, reverse=True)[:most]:
        yield load_run(store, store.uri_of(run_folder(job, each.key.split("/")[-2])))

"""report: write what happened: counts that add up, cost against estimate, quality, drift. `summary.json` and `report.html`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import pyarrow.parquet as pq

from nightshift.approvals import approvals_of
from nightshift.budgets import cost_of
from nightshift.distributions import distributions, drift_of
from nightshift.errors import CountsDisagree
from nightshift.money.estimate import is_worth_keeping, measure, measured_before, measured_key
from nightshift.money.prices import tier_of
from nightshift.pages import render_report
from nightshift.partitions import quarantine_folder
from nightshift.runs import Run, Site, run_folder
from nightshift.shapes import OUTCOMES, Assembled, Audit, Cost, Counts, Distribution, Paid, Plan, Published, Summary, Tier, Usage, Wire

MEASURED_SHARDS = 50  # of a run: so many tell what its requests cost
TIERS: tuple[Tier, ...] = ("batch", "on_demand")


class LastPublished(Wire):
    """The newest published run of a job: what the next run's drift is measured against."""

    run: str
    before: str | None = None  # the one that was it before: what this run's own is measured against, whenever its report is written


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a run has come to, however far it came."""

    plan: Plan | None
    assembled: Assembled | None
    audit: Audit | None
    published: Published | None
    problem: str | None  # what stopped it
    error: str | None  # its class


def report(site: Site, run: Run, *, published: Published | None, problem: str | None = None, error: str | None = None) -> Summary:
    """Write the summary and the page from what the run left in the store, however far it came.

    Raises CountsDisagree where a run that was assembled does not add up.
    """
    store, last = site.store, _last_published(site, run)
    facts = Facts(
        plan=store.get_shape(run.key("approved.json"), Plan) or store.get_shape(run.key("plan.json"), Plan),
        assembled=store.get_shape(run.key("assembled.json"), Assembled),
        audit=store.get_shape(run.key("audit.json"), Audit),
        published=published,
        problem=problem,
        error=error,
    )
    figures = distributions(site, run.job, facts.assembled, last.figures if last else {}) if facts.assembled else {}
    columns = _columns(site, facts.assembled.parts) if facts.assembled else {}
    summary = summarise(site, run, facts, figures, columns, last)
    check_sums(summary)
    store.put(run.key("report.html"), render_report(summary).encode())
    if facts.plan and facts.assembled and not run.input.redrive:  # a redrive asks otherwise, and says nothing of the next run
        _measure(site, run, facts.plan)
    if published and run.input.sample is None:
        store.put_shape(_last_key(run), LastPublished(run=run.input.run, before=last.run if last else None))
    store.put_shape(run.key("summary.json"), summary)  # last: a run that has one is over, and the same command begins another
    return summary


def _measure(site: Site, run: Run, plan: Plan) -> None:
    """Keep what requests that this run alone has paid for have cost: the next estimate goes by it."""
    settled = [each for shard in plan.own_shards[:MEASURED_SHARDS] if (each := site.ledger.settled(shard))]
    own = [each for each in settled if all((paid.run, paid.model) == (run.uri, run.job.spec.request.model) for paid in each.paid)]
    facts, paid = [site.ledger.shard(each.shard) for each in own], [paid for each in own for paid in each.paid]
    measured = measure(
        run.job,
        sum(shard.request_count for shard in facts),
        sum(shard.request_bytes for shard in facts),
        sum(each.answers for each in paid),
        sum((each.usage for each in paid), Usage()),
    )
    before, is_sample = measured_before(site.store, run.job), run.input.sample is not None
    if measured is not None and is_worth_keeping(measured, before, sample=is_sample):
        site.store.put_shape(measured_key(run.job), measured)


def summarise(
    site: Site, run: Run, facts: Facts, figures: Mapping[str, Distribution], columns: Mapping[str, str], last: Summary | None
) -> Summary:
    """The summary of a run from its facts. `last`: that of the last published run."""
    job, request = run.job, run.job.spec.request
    plan, assembled, audit, published = facts.plan, facts.assembled, facts.audit, facts.published
    paid = assembled.paid if assembled else paid_so_far(site, run, plan)
    return Summary(
        job=job.name,
        run=run.input.run,
        label=run.input.label,
        redrive_of=run.input.redrive.run if run.input.redrive else None,
        sample=run.input.sample,
        approvals=tuple(approvals_of(run)),
        state=_state(run, audit, published),
        problem=facts.problem or ("; ".join(audit.reasons) if audit and not audit.passed else None),
        error=facts.error,
        partition=run.input.partition,
        model=request.model,
        prompt_version=job.prompt.version,
        started_at=run.input.started_at,
        finished_at=site.now(),
        input_uris=tuple(found.uri for found in run.input.objects),
        rows=plan.rows if plan else 0,
        outcomes=assembled.outcomes if assembled else dict.fromkeys(OUTCOMES, 0),
        reasons=assembled.reasons if assembled else {"rejected": dict(plan.reasons)} if plan and plan.reasons else {},
        requests=Counts(
            unique=plan.unique if plan else 0,
            duplicates=plan.duplicates if plan else 0,
            reused=plan.reused if plan else 0,
            adopted=plan.adopted if plan else 0,
            submitted=plan.submitted if plan else 0,
        ),
        taken_over=assembled.taken_over if assembled else 0,
        batches=sum(each.batches for each in paid),
        paid=sum(each.answers for each in paid),
        usage=sum((each.usage for each in paid), Usage()),
        alarms=assembled.alarms if assembled else {},
        cost_usd=Cost(
            estimated=_dollars(plan.estimate.usd) if plan else None,
            estimated_low=_dollars(plan.estimate.usd_low) if plan else None,
            estimated_high=_dollars(plan.estimate.usd_high) if plan else None,
            actual=_dollars(cost_of(paid)) if assembled or paid or not _has_claimed(site, run, plan) else None,
            saved=_dollars(_saved(plan, assembled)) if plan else None,
            by_tier={tier: _dollars(cost_of(own)) for tier in TIERS if (own := [each for each in paid if tier_of(each.provider) == tier])},
            basis=plan.estimate.basis if plan else "not planned",
        ),
        audit=audit,
        figures=dict(figures),
        drift={column: drift_of(figures.get(column), last.figures.get(column) if last else None) for column in job.spec.report.drift},
        drift_against=last.label if last else None,
        columns=dict(columns),
        changed_columns=tuple(changed_columns(last.columns if last else {}, columns)),
        published=published is not None,
        results=published.uri if published else None,
        quarantine=_quarantine(site, run, assembled, published),
        report=site.store.uri_of(run.key("report.html")),
    )


def _columns(site: Site, parts: Sequence[str]) -> dict[str, str]:
    """The columns of a dataset, by name. Its parts have the same."""
    if not parts:
        return {}
    with site.store.open(parts[0]) as file:
        return {field.name: str(field.type) for field in pq.read_schema(file)}


def changed_columns(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    """What who reads all partitions together does not find as it was, in words; new columns are no harm."""
    for name, kind in before.items() if after else ():
        if after.get(name) != kind:
            yield f"{name}: {kind} → {after.get(name, 'gone')}"


def _saved(plan: Plan, assembled: Assembled | None) -> Decimal | None:
    """What a plan has saved, less the share of the requests that were adopted and sent after all."""
    spared = plan.duplicates + plan.reused + plan.adopted
    if plan.saved_usd is None or assembled is None or not assembled.taken_over:
        return plan.saved_usd
    return plan.saved_usd * (spared - assembled.taken_over) / spared


def paid_so_far(site: Site, run: Run, plan: Plan | None) -> tuple[Paid, ...]:
    """What a run that was not assembled has paid for, as far as its shards are settled: its report is all that tells of it."""
    words = (site.ledger.settled(shard) for shard in (plan.shards if plan else ()))
    return tuple(paid for word in words if word for paid in word.paid if paid.run == run.uri)


def _quarantine(site: Site, run: Run, assembled: Assembled | None, published: Published | None) -> str | None:
    """Where the rows stand that did not succeed: published, or, of a run that was held, staged."""
    if published:
        return site.store.uri_of(quarantine_folder(run))
    return site.store.uri_of(run.key("quarantine")) if assembled else None


def _has_claimed(site: Site, run: Run, plan: Plan | None) -> bool:
    """Whether a run has claimed any attempt: where it has not, it has cost nothing, however it ended."""
    return any(attempt.claim.run == run.uri for shard in (plan.shards if plan else ()) for attempt in site.ledger.attempts(shard))


def _state(run: Run, audit: Audit | None, published: Published | None) -> Literal["published", "held", "failed", "planned"]:
    if published:
        return "published"
    if run.input.dry_run:
        return "planned"
    return "held" if audit and not audit.passed else "failed"


def check_sums(summary: Summary) -> None:
    """Raise CountsDisagree unless the numbers of an assembled run add up."""
    counts, outcomes = summary.requests, summary.outcomes
    if counts.unique != counts.reused + counts.adopted + counts.submitted:
        raise CountsDisagree(
            f"{counts.unique} unique requests are not {counts.reused} reused + {counts.adopted} adopted + {counts.submitted} submitted."
        )
    if not any(outcomes.values()):
        return
    if sum(outcomes.values()) != summary.rows:
        raise CountsDisagree(f"The outcomes add up to {sum(outcomes.values())}, the rows read are {summary.rows}.")
    if summary.rows - outcomes["rejected"] != counts.unique + counts.duplicates:
        raise CountsDisagree(
            f"{summary.rows} rows less {outcomes['rejected']} rejected are not "
            f"{counts.unique} unique requests + {counts.duplicates} duplicates."
        )


def _last_published(site: Site, run: Run) -> Summary | None:
    last = site.store.get_shape(_last_key(run), LastPublished)
    others = [name for name in (last.run, last.before) if name and name != run.input.run] if last else []
    summaries = (site.store.get_shape(f"{run_folder(run.job.name, name)}/summary.json", Summary) for name in others)
    return next((summary for summary in summaries if summary), None)  # the last one may have died before it wrote its own


def _last_key(run: Run) -> str:
    return f"runs/{run.job.name}/last-published.json"


def _dollars(value: Decimal | None) -> float | None:
    return None if value is None else float(round(value, 6))

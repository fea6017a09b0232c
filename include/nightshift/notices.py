"""Notices: what people are told of a run, and by which of a job's lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from nightshift.job import NotifySpec
from nightshift.overviews import PeriodicReport
from nightshift.pages import usd
from nightshift.shapes import Summary

Event = Literal["failure", "held", "budget", "approval", "deadline", "success"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """What happened, what it cost, and what to do next: plain text, fit for a chat and for a mail."""

    event: Event
    subject: str
    text: str


def listeners(notify: NotifySpec, event: Event) -> list[str]:
    """The connections that are told of an event. Who asked for failures hears of budgets, too, unless somebody else does."""
    named: list[str] = getattr(notify, f"on_{event}")
    return list(dict.fromkeys(named or (notify.on_failure if event == "budget" else [])))


def notice_of(summary: Summary, link: str) -> Notice:
    """What is said of a run that has ended. `link`: where people look at it."""
    event = event_of(summary)
    said = {"success": "published", "held": "held", "budget": "stopped by a budget", "failure": "failed"}[event]
    lines = [
        f"{summary.job} {said}: {summary.partition}",
        *_what_happened(summary),
        *_cost(summary),
        f"Next: {_next_step(summary, event)}",
        link,
    ]
    return Notice(event=event, subject=f"{summary.job} {said}: {summary.partition}", text="\n".join(lines))


def event_of(summary: Summary) -> Literal["failure", "held", "budget", "success"]:
    """Which event the end of a run is."""
    if summary.state in ("published", "planned"):
        return "success"
    if summary.state == "held":
        return "held"
    return "budget" if summary.error == "BudgetExceeded" else "failure"


def notice_of_period(report: PeriodicReport) -> Notice:
    """What is said of a period."""
    subject = f"{report.name}: {report.since:%Y-%m-%d} to {report.until:%Y-%m-%d}"
    lines = [
        subject,
        f"{report.total('runs'):,} runs ({report.total('held') + report.total('failed'):,} not published), {report.total('rows'):,} rows.",
        f"Cost {usd(report.cost_usd)} for {report.total('paid'):,} answers; {report.total('reused'):,} reused.",
        f"Saved by reuse and duplicates: {usd(report.saved_usd)}.",
        *(f"{line.job} ({line.model}): {line.rows:,} rows, {usd(line.cost_usd)}" for line in report.lines[:20]),
        f"The report: {report.page}",
    ]
    return Notice(event="success", subject=subject, text="\n".join(lines))


def _what_happened(summary: Summary) -> Iterator[str]:
    if summary.problem:
        yield summary.problem
    if any(summary.outcomes.values()):
        counted = ", ".join(f"{count:,} {outcome}" for outcome, count in summary.outcomes.items() if count)
        yield f"{summary.rows:,} rows: {counted}."
    if summary.changed_columns:
        yield f"Columns are not as in the last published run: {'; '.join(summary.changed_columns)}."


def _cost(summary: Summary) -> Iterator[str]:
    counts, cost = summary.requests, summary.cost_usd
    if summary.paid or cost.actual:
        yield f"Cost {usd(cost.actual)} for {summary.paid:,} answers (estimated {usd(cost.estimated)}); {counts.reused:,} reused."
    else:
        yield f"Nothing was paid as far as is known (estimated {usd(cost.estimated)})."


def _next_step(summary: Summary, event: Event) -> str:
    match event:
        case "success":
            return f"nothing. The report: {summary.report}"
        case "held":
            mend = "look at the report, mend the job or its input, and clear the run"
            return f"{mend}; readers still see the old partition. The report: {summary.report}"
        case "budget":
            return "raise the budget and clear the run, or let it be. What was paid for is kept and found again."
        case _:
            return f"mend it and clear the failed tasks; what was paid for is found again. The report: {summary.report}"

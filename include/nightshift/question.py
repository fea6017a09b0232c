"""The question that a person is asked before a run is sent: what it is to cost, and the first of what it asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nightshift.pages import measured_on, stated, usd
from nightshift.providers.forms import form_of
from nightshift.runs import Run
from nightshift.shapes import Plan
from nightshift.stores.shards import requests_key

SHOWN_REQUESTS, SHOWN_CHARACTERS, SHOWN_BYTES = 3, 300, 1 << 18  # of what is asked


def question(run: Run, plan: Plan, *, with_sample: bool = True) -> str:
    """What a person needs to know to say yes, as Markdown: the estimate, what is reused, and what a few of the requests say."""
    estimate, shown = plan.estimate, sample_of(run, plan) if with_sample else []
    saved = "" if plan.saved_usd is None else f"\n| spared by reuse and duplicates | {usd(plan.saved_usd)} |"
    cost = "unknown (no price for this model)" if estimate.usd is None else stated(estimate)
    fenced = "\n\n".join(text.replace("`", "'") for text in shown)  # what rows say is no Markdown of ours
    return (
        f"`{run.job.name}` wants to send **{plan.submitted:,} requests** to `{run.job.spec.request.model}`.\n\n"
        f"| | |\n|---|---|\n| estimated cost | {cost} |\n| rows | {plan.rows:,} |\n| rejected, never sent | {plan.rejected:,} |\n"
        f"| duplicates | {plan.duplicates:,} |\n| answered earlier, reused | {plan.reused:,} |{saved}\n"
        f"| tokens | {estimate.input_tokens:,} in, {estimate.output_tokens:,} out ({measured_on(estimate)}) |\n\n"
        f"Prices: {estimate.basis}." + (f"\n\nThe first of what is asked:\n\n```\n{fenced}\n```" if fenced else "")
    )


def sample_of(run: Run, plan: Plan) -> list[str]:
    """The texts of the first requests that are to be sent, each in one line and cut short."""
    if not plan.own_shards:
        return []
    key = requests_key(plan.own_shards[0])
    found = run.store.head(key)
    if found is None:
        return []
    lines = run.store.read_range(key, 0, min(found.size, SHOWN_BYTES), None, None).splitlines()
    form = form_of(run.job.spec.request.endpoint)
    whole = lines if found.size <= SHOWN_BYTES else lines[:-1]
    texts = (" ".join(said_in(form.opened(line)[1]).split()) for line in whole[:SHOWN_REQUESTS])
    return [text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …" for text in texts]


def said_in(body: Any) -> str:
    """The words of the last turn of a request's body, whatever form it has."""
    if isinstance(body, str):
        return body
    if isinstance(body, Mapping):
        turns = body.get("messages") or body.get("input") or body.get("inputText")
        inner = turns[-1] if isinstance(turns, list) and turns else turns or body.get("content") or body.get("text") or ""
        return said_in(inner)
    return " ".join(filter(None, map(said_in, body))) if isinstance(body, list) else ""

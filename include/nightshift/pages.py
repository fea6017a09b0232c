"""Pages for people: self-contained HTML with inline SVG. No script, no request to anywhere, light and dark."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template

from nightshift.shapes import OUTCOMES, Summary

MEANING = {
    "succeeded": "answered, parsed, valid under the output schema",
    "invalid": "answered, but not valid under the schema",
    "truncated": "cut by the token limit",
    "refused": "the model declined",
    "filtered": "a content filter stopped it",
    "errored": "the provider reported an error for this request",
    "expired": "never executed: the window was over",
    "cancelled": "never executed: stopped",
    "missing": "the provider returned nothing for it",
    "rejected": "the row broke the input contract and was never sent",
}


def render_report(summary: Summary) -> str:
    """The report page of a run."""
    return _template("report.html.j2").render(s=summary, outcomes=OUTCOMES, meaning=MEANING)


def usd(value: float | None) -> str:
    """Dollars for people: four digits below a dollar, and never a made-up zero."""
    if value is None:
        return "unknown"
    return f"${value:,.2f}" if value >= 1 else f"${value:.4f}"


@cache
def _template(name: str) -> Template:
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["usd"] = usd
    env.filters["n"] = lambda value: f"{value:,}"
    env.filters["pct"] = lambda part, whole: f"{part / whole:.1%}" if whole else "–"
    return env.from_string(files("nightshift").joinpath("templates", name).read_text(encoding="utf-8"))

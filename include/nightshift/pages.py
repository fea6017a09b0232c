"""Pages for people: self-contained HTML with inline SVG. No script, no request to anywhere, light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cache
from importlib.resources import files
from math import floor, log10
from typing import TYPE_CHECKING, Any

import orjson
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from nightshift.shapes import OUTCOMES, Estimate, Summary

if TYPE_CHECKING:
    from nightshift.overviews import Comparison, PeriodicReport
    from nightshift.progress import Progress

LEAST_SHOWN = 0.001  # dollars that four digits say enough of
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


def render_comparison(comparison: Comparison) -> str:
    """The page of two runs side by side."""
    return _template("compare.html.j2").render(c=comparison)


def render_progress(title: str, runs: Sequence[Progress], said: str) -> str:
    """The page of runs that may still be under way; it asks for itself again while one is."""
    costs = [run.cost_usd for run in runs]
    cost = None if None in costs else sum((each for each in costs if each is not None), Decimal(0))
    return _template("progress.html.j2").render(title=title, runs=runs, said=said, cost=cost)


def render_periodic(report: PeriodicReport) -> str:
    """The page of a period."""
    return _template("periodic.html.j2").render(r=report, outcomes=OUTCOMES)


def render_job_reference(schema: Mapping[str, Any]) -> str:
    """Every key of a job file as Markdown, from the job file's JSON Schema."""
    lines = ["# Job files", "", "Written by `make schema` from the contract in `include/nightshift/job.py`. Unknown keys are errors.", ""]
    named: dict[str, list[str]] = {}
    for name, reference in _references(schema, schema):
        named.setdefault(reference, []).append(f"`{name}`")
    sections = [("(top level)", schema), *((", ".join(names), _mapping(schema, reference)) for reference, names in named.items())]
    for name, section in sections:
        lines += [f"## {name}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        required = section.get("required", ())
        for key, field in section["properties"].items():
            default = "**required**" if key in required else f"`{orjson.dumps(field['default']).decode()}`" if "default" in field else ""
            lines.append(f"| `{key}` | {_type_name(schema, field)} | {default} | {field.get('description', '')} |")
        lines.append("")
    return "\n".join(lines)


def _references(schema: Mapping[str, Any], section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """The nested mappings of the job file: (path, reference into the schema)."""
    for key, field in section["properties"].items():
        inner = field.get("additionalProperties", field)
        reference = (inner if isinstance(inner, dict) else field).get("$ref")
        if reference:
            name = f"{path}{key}" if inner is field else f"{path}{key}.<column>"
            yield name, reference
            yield from _references(schema, _mapping(schema, reference), f"{name}.")


def _mapping(schema: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
    """A definition of the schema; where a number may stand in its place, what it stands for."""
    found: Mapping[str, Any] = schema["$defs"][reference.rpartition("/")[2]]
    return next((each for each in found.get("anyOf", ()) if "properties" in each), found)


def _type_name(schema: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    """A field's type in a word or two."""
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type_name(schema, each) for each in field["anyOf"] if each.get("type") != "null"))
    if "$ref" in field and "anyOf" in (found := schema["$defs"][field["$ref"].rpartition("/")[2]]):
        return _type_name(schema, found)
    if "$ref" in field or field.get("type") == "object":
        return "mapping"
    if field.get("type") == "array":
        return f"list of {_type_name(schema, field['items'])}"
    return str(field.get("type", "any"))


def stated(estimate: Estimate) -> str:
    """What a plan is estimated at, with its interval, in words for people."""
    if estimate.usd is None:
        return "unknown"
    most = "no limit is set" if estimate.usd_max is None else f"{usd(estimate.usd_max)} if every answer used its whole limit"
    return f"{usd(estimate.usd)}, between {usd(estimate.usd_low)} and {usd(estimate.usd_high)}; {most}"


def output_bound(estimate: Estimate) -> str:
    """How many tokens all answers can have together."""
    if estimate.output_tokens_max is None:
        return "request.parameters.max_output_tokens sets no limit: answers may be longer"
    return f"at most {estimate.output_tokens_max:,}"


def measured_on(estimate: Estimate) -> str:
    """What an estimate's tokens rest on."""
    return (
        f"measured on {estimate.measured_on:,} paid answers of this job"
        if estimate.measured_on
        else "from bytes; no run of this job to go by"
    )


def usd(value: float | Decimal | None) -> str:
    """Dollars for people: four digits below a dollar, more where they would all be zeros, and never a made-up zero."""
    if value is None:
        return "unknown"
    if not value:
        return "$0"
    amount = float(value)
    if amount >= 1:
        return f"${amount:,.2f}"
    digits = 4 if abs(amount) >= LEAST_SHOWN else 1 - floor(log10(abs(amount)))
    return f"${amount:.{digits}f}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """So many of something: 1 shard, 2 shards."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


@cache
def _template(name: str) -> Template:
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["usd"] = usd
    env.filters["n"] = lambda value: f"{value:,}"
    env.filters["pct"] = lambda part, whole: f"{part / whole:.1%}" if whole else "–"
    templates = files("nightshift").joinpath("templates")
    env.globals["style"] = Markup(templates.joinpath("style.css").read_text(encoding="utf-8"))  # noqa: S704 — our own file
    return env.from_string(templates.joinpath(name).read_text(encoding="utf-8"))

"""Estimates against the rehearsal's bill: within a quarter before a job was ever run, within a tenth after one run."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from local import sample
from nightshift.drive import begin, drive
from nightshift.money.estimate import answer_bytes, is_worth_keeping, measure
from nightshift.pages import stated, usd
from nightshift.runs import Options
from nightshift.shapes import Measured, Summary, Usage
from nightshift.steps.plan import plan
from tests.conftest import go, reviews

SUMMARY = {
    "type": "object",
    "properties": {"summary": {"type": "string", "maxLength": 120}, "grade": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["summary", "grade"],
    "additionalProperties": False,
}
TOPICS = {
    "type": "object",
    "properties": {
        "sentiment": {"enum": ["positive", "neutral", "negative"]},
        "topics": {"type": "array", "items": {"enum": ["cleanliness", "staff", "location", "food", "room", "noise", "value", "other"]}, "maxItems": 5},
    },
    "required": ["sentiment", "topics"],
    "additionalProperties": False,
}  # fmt: skip
JOBS: list[Any] = [
    pytest.param({}, id="a class and a number"),
    pytest.param({"schema": TOPICS}, id="a list of topics"),
    pytest.param({"schema": SUMMARY}, id="a sentence"),
    pytest.param({"request": {"model": "gpt-5.4-mini", "endpoint": "/v1/responses"}}, id="another endpoint"),
]


WIDE = {
    "type": "object",
    "properties": {f"question_{number:03d}_of_all": {"type": "integer"} for number in range(120)},
    "required": [f"question_{number:03d}_of_all" for number in range(120)],
    "additionalProperties": False,
}


def off(summary: Summary) -> float:
    """By what part the estimate missed the bill."""
    return abs(summary.cost_usd.estimated / summary.cost_usd.actual - 1)


def hotel_reviews(count: int, seed: int) -> bytes:
    return b"".join(line + b"\n" for line in sample.reviews(count, seed=seed))


@pytest.mark.parametrize("changes", JOBS)
def test_an_estimate_is_near_the_bill_and_nearer_after_one_run(world, changes):
    job = world.job(input={"id": "review_id", "require": {"text": {"min_length": 1, "max_length": 20000}}}, **changes)
    first = go(world, job, world.write("a.jsonl", hotel_reviews(300, 1)))
    second = go(world, job, world.write("b.jsonl", hotel_reviews(400, 2)))
    assert float(first.cost_usd.actual + second.cost_usd.actual) == pytest.approx(world.rehearsal.bill()["usd"], abs=1e-4)
    assert off(first) <= 0.25
    assert off(second) <= 0.10
    assert first.cost_usd.estimated_low <= first.cost_usd.actual <= first.cost_usd.estimated_high
    assert second.cost_usd.estimated_low <= second.cost_usd.actual <= second.cost_usd.estimated_high


def test_an_answer_that_nothing_limits_is_estimated_as_long_as_it_was(world):
    job = world.job(schema=WIDE, request={"parameters": {}})
    first = go(world, job, world.write("a.jsonl", reviews(120)))
    assert first.usage.output_tokens > 120 * 300, "more than anybody would take for a limit"
    run = begin(world.site, job, pattern=world.write("b.jsonl", reviews(150, room=1)), dates={}, scheduled=False, options=Options())
    planned = plan(world.site, run)
    assert planned.estimate.output_tokens_max is planned.estimate.usd_max is None
    assert "no limit is set" in stated(planned.estimate)
    second = drive(world.site, run, ask=lambda run, planned: True)
    assert off(second) <= 0.10


@pytest.mark.parametrize(
    ("dollars", "shown"),
    [(None, "unknown"), (0, "$0"), (Decimal("0.000031"), "$0.000031"), (0.0009, "$0.00090"), (0.0123, "$0.0123"), (12345.6, "$12,345.60")],
)
def test_dollars_are_shown_with_the_digits_that_say_something(dollars, shown):
    assert usd(dollars) == shown


def test_what_is_asked_again_is_in_the_next_estimate(world):
    world.rehearsal.faults(invalid=0.3)
    job = world.job(policy={"retry": {"invalid": 1}, "publish_at_least": 0})
    go(world, job, world.write("a.jsonl", reviews(300)))
    second = go(world, job, world.write("b.jsonl", [{**row, "text": row["text"] + " Yes."} for row in reviews(300)]))
    assert off(second) <= 0.10


def test_a_run_that_pays_nothing_leaves_the_measure_alone(world):
    job = world.job()
    uri = world.write("a.jsonl", reviews(20))
    go(world, job, uri)
    before = world.site.store.get("runs/reviews/measured.json")
    assert go(world, job, uri).cost_usd.estimated == 0
    assert world.site.store.get("runs/reviews/measured.json") == before


def a_measure(answers: int, model: str = "m", prompt_version: str = "p") -> Measured:
    ratio = Decimal(1)
    return Measured(
        model=model, prompt_version=prompt_version, answers=answers,
        per_request=ratio, input_factor=ratio, cached_share=ratio, output_per_answer=ratio,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("new", "old", "is_sample", "kept"),
    [
        pytest.param(a_measure(3), None, True, True, id="the first"),
        pytest.param(a_measure(100), a_measure(50_000), False, True, id="enough"),
        pytest.param(a_measure(3), a_measure(50_000), False, False, id="a handful after many"),
        pytest.param(a_measure(5), a_measure(4), False, True, id="a handful after a handful"),
        pytest.param(a_measure(3, prompt_version="q"), a_measure(50_000), False, True, id="the job's prompt has changed"),
        pytest.param(a_measure(200, "other"), a_measure(50_000), True, False, id="another model is being tried"),
        pytest.param(a_measure(200), a_measure(300), True, True, id="a sample of the job as it is"),
    ],
)
def test_a_measure_gives_way_to_what_tells_as_much(new, old, is_sample, kept):
    assert is_worth_keeping(new, old, sample=is_sample) is kept


def test_a_sample_of_another_model_leaves_the_jobs_measure_alone(world):
    go(world, world.job(), world.write("a.jsonl", reviews(20)))
    before = world.site.store.get("runs/reviews/measured.json")
    other, uri = world.job(request={"model": "gpt-5.4-mini"}), world.write("b.jsonl", reviews(40))
    sampled = begin(world.site, other, pattern=uri, dates={}, scheduled=False, options=Options(sample=30))
    assert drive(world.site, sampled, ask=lambda run, plan: True).paid == 30
    assert world.site.store.get("runs/reviews/measured.json") == before


def test_nothing_is_measured_on_answers_without_usage(world):
    assert measure(world.job(), 10, 4000, 10, Usage(input_tokens=100, unknown=1)) is None


@pytest.mark.parametrize(
    ("schema", "size"),
    [
        pytest.param({"enum": ["yes", "no"]}, Decimal("4.5"), id="the mean of the choices"),
        pytest.param({"type": ["string", "null"], "maxLength": 10}, Decimal(7), id="half of the longest"),
        pytest.param({"anyOf": [{"type": "integer"}, {"type": "null"}]}, Decimal(2), id="may be null"),
        pytest.param({"type": "object", "properties": {"a": {"type": "boolean"}}}, Decimal(11), id="object"),
        pytest.param({"type": "array", "items": {"type": "integer"}, "maxItems": 1}, Decimal(5), id="list"),
        pytest.param(True, Decimal(40), id="anything"),
    ],
)
def test_an_answer_is_as_long_as_its_schema_says(schema, size):
    assert answer_bytes(schema) == size

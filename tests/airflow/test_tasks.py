"""What tasks decide before they act: which fields a run may be triggered with, and which tasks a run has failed at."""

from __future__ import annotations

from decimal import Decimal

import pytest

from nightshift.drive import begin
from nightshift.errors import ApprovalNeeded, SettingInvalid
from nightshift.runs import load_run
from nightshift.shapes import Assembled
from nightshift_airflow.tasks import check_form, failed_tasks, published_by
from tests.conftest import go, reviews

NOTHING = {"reasons": {}, "parts": (), "quarantine": (), "paid": (), "alarms": {}}
BY_LINEAGE = {"openlineage": {"parentRunId": "x"}}  # Airflow's TriggerDagRunOperator adds it where OpenLineage is installed
FORM = ("input", "model", "sample", "redrive", "outcomes")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        pytest.param({"modle": "gpt-5.4"}, "modle: the form has no such field; did you mean 'model'?", id="misspelt"),
        pytest.param({"inptu": "s3://b/x", "sample": 2}, "did you mean 'input'", id="one of two"),
        pytest.param({"outcomes": ["invalid"]}, "outcomes: goes with redrive", id="outcomes of no run"),
    ],
)
def test_a_field_that_would_be_passed_over_is_refused(given, problem):
    with pytest.raises(SettingInvalid, match=problem.replace("?", r"\?")):
        check_form(given, FORM)


@pytest.mark.parametrize(
    "given", [{}, {"uploads": [{"uri": "s3://b/x"}]}, {"redrive": "x", "outcomes": ["invalid"]}, {"sample": 3}, BY_LINEAGE]
)
def test_what_the_form_has_and_what_uploads_come_with_is_taken(given):
    check_form(given, FORM)


@pytest.mark.parametrize(
    ("states", "failed"),
    [
        pytest.param({"plan": "failed", "approve": "upstream_failed", "report": "failed"}, ["plan"], id="what came after did not fail"),
        pytest.param(
            {"shard.wait": "failed", "shard.submit": "failed", "audit": "upstream_failed"}, ["shard.submit", "shard.wait"], id="two"
        ),
        pytest.param({"plan": "success", "approve": "upstream_failed"}, ["approve"], id="nothing else tells"),
        pytest.param({"plan": "success", "report": "running"}, [], id="none"),
    ],
)
def test_a_run_names_the_tasks_that_it_failed_at(states, failed):
    assert failed_tasks(states) == failed


def test_a_task_that_is_marked_as_done_has_published_nothing(world):
    run = begin(world.site, world.job(), pattern=world.write("in.jsonl", reviews(4)), dates={}, scheduled=False)
    world.site.store.put_shape(run.key("assembled.json"), Assembled(outcomes={"succeeded": 0}, **NOTHING))
    assert published_by(world.site, run) is None
    summary = go(world, world.job(), world.write("other.jsonl", reviews(4)))
    assert published_by(world.site, load_run(world.site.store, world.site.store.uri_of(f"runs/reviews/{summary.run}"))).rows == 4


def test_who_has_refused_stands_before_what_it_would_have_cost():
    told = str(ApprovalNeeded(Decimal("0.01"), Decimal(0), "admin has refused it: too dear"))
    assert told.startswith("admin has refused it: too dear. The run is estimated at $0.0100; policy.approve_above_usd lets $0.0000 pass")
    assert "--yes" not in told

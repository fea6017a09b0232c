"""What one run does otherwise than its job says: samples, other prompts and models, intervals, and beginning anew."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pyarrow.parquet as pq
import pytest

from nightshift.dates import interval_dates, render_dates
from nightshift.drive import drive
from nightshift.errors import BudgetExceeded, JobInvalid, SettingInvalid, UpToDate
from nightshift.job_file import read_prompt, vary
from nightshift.partitions import dated_partition, day_of_input, ticks_once_a_day
from nightshift.runs import Options, current_run, last_run
from nightshift.sampling import choose
from nightshift.shapes import Summary
from nightshift.steps.discover import discover
from tests.conftest import World, go, reviews


def ids(world: World, summary: Summary) -> list[str]:
    folder = world.site.store.key_of(summary.results)
    parts = json.loads(world.site.store.get(f"{folder}/_manifest.json"))["parts"]
    return [row for part in parts for row in pq.read_table(world.site.store.open(f"{folder}/{part['name']}")).column("id").to_pylist()]


def test_a_sample_asks_about_so_many_rows_and_publishes_them_beside_the_results(world):
    job, uri = world.job(), world.write("in.jsonl", reviews(200))
    whole = go(world, job, uri)
    before = world.site.store.get("runs/reviews/last-published.json")
    sample = go(world, job, uri, sample=30)
    assert (sample.rows, sample.sample, len(ids(world, sample))) == (30, 30, 30)
    assert "/samples/reviews/" in sample.results
    assert len(ids(world, whole)) == 200, "the partition is what it was"
    assert world.site.store.get("runs/reviews/last-published.json") == before
    assert world.rehearsal.bill()["requests"] == 200, "what was answered is reused, in a sample too"


def test_a_sample_of_the_same_rows_is_the_same_sample_whatever_the_order_and_a_smaller_one_is_part_of_it(world):
    rows = reviews(500)
    job = world.job()
    first = ids(world, go(world, job, world.write("a.jsonl", rows), sample=50))
    second = ids(world, go(world, job, world.write("b.jsonl", rows[::-1]), sample=50))
    smaller = ids(world, go(world, job, world.write("a.jsonl", rows), sample=20))
    assert sorted(first) == sorted(second)
    assert set(smaller) < set(first)
    assert first == [row["id"] for row in rows if row["id"] in first], "in the order of the rows"


def test_a_sample_larger_than_the_input_is_the_input_and_broken_rows_are_rows(world):
    data = b'{"id": "a", "text": "Lovely."}\nnot json\n{"id": "b", "text": "Awful."}\n'
    summary = go(world, world.job(), world.write("in.jsonl", data), sample=10)
    assert (summary.rows, summary.outcomes["rejected"], summary.outcomes["succeeded"]) == (3, 1, 2)


def test_choosing_keeps_no_more_in_memory_than_it_gives():
    assert len(choose(([str(i)] for i in range(100_000)), 10)) == 10


def test_another_prompt_asks_anew_and_its_rows_say_so(world):
    job, uri = world.job(), world.write("in.jsonl", reviews(10))
    first = go(world, job, uri)
    other = vary(job, prompt_source="user:\nIn one word: {{ text }}\n")
    second = go(world, other, uri, sample=5)
    assert first.prompt_version != second.prompt_version
    assert world.rehearsal.bill()["requests"] == 15
    assert go(world, job, uri).requests.submitted == 0, "the old prompt's answers are still its own"


def test_a_version_that_was_asked_once_can_be_asked_again(world):
    job, uri = world.job(prompt="user:\nThe first: {{ text }}\n"), world.write("in.jsonl", reviews(3))
    first = go(world, job, uri)
    later = world.job(prompt="user:\nThe second: {{ text }}\n")
    path = world.folder / "job-2" / "jobs" / "reviews.yaml"
    again = vary(later, prompt_source=read_prompt(world.site.store, path, first.prompt_version))
    assert go(world, again, uri).requests.submitted == 0
    with pytest.raises(SettingInvalid, match="no run has asked with version 0123456789ab"):
        read_prompt(world.site.store, path, "0123456789ab")
    with pytest.raises(SettingInvalid, match="no such prompt"):
        read_prompt(world.site.store, path, "prompts/none.md")


def test_a_variation_that_does_not_fit_the_rest_of_the_job_is_refused(world):
    job = world.job()
    with pytest.raises(JobInvalid, match="reads no column"):
        vary(job, prompt_source="user:\nSay something.\n")
    with pytest.raises(JobInvalid, match="remove the system part"):
        vary(
            world.job(
                request={"model": "text-embedding-3-small", "endpoint": "/v1/embeddings", "parameters": {}},
                output={"schema": None},
                prompt="user:\n{{ text }}\n",
            ),
            prompt_source="system:\nBe kind.\n\nuser:\n{{ text }}\n",
        )


DAY = {"pattern": "", "label": "x", "scheduled": True, "unless_made": True}


def scheduled(world: World, job, uri: str, run: str, **options):
    start = datetime(2026, 11, 21, tzinfo=UTC)
    dates = interval_dates(start, start + timedelta(days=1), "UTC")
    asked = {**DAY, "pattern": uri, "run": run, "dates": dates, "options": Options(**options)}
    return discover(world.site, job, **asked)


def test_an_interval_that_was_made_of_the_same_is_not_made_again(world):
    job, uri = world.job(), world.write("in.jsonl", reviews(5))
    drive(world.site, scheduled(world, job, uri, "r1"), ask=lambda run, plan: True)
    with pytest.raises(UpToDate, match="dt=2026-11-21"):
        scheduled(world, job, uri, "r2")
    assert world.site.store.head("runs/reviews/r2/input.json") is None, "what is not begun can be begun when the input has changed"
    scheduled(world, job, uri, "r3", fresh=True)
    scheduled(world, world.job(prompt="user:\nOtherwise: {{ text }}\n"), uri, "r4")
    with pytest.raises(UpToDate):
        scheduled(world, world.job(policy={"budget_usd": 3}, tags=["x"]), uri, "r5")
    scheduled(world, job, world.write("in.jsonl", reviews(6)), "r6")


def test_an_interval_with_rows_that_were_never_answered_is_made_again(world):
    world.rehearsal.faults(errored=1.0)
    job, uri = world.job(policy={"retry": {"errored": 0}, "publish_at_least": 0}), world.write("in.jsonl", reviews(5))
    drive(world.site, scheduled(world, job, uri, "r1"), ask=lambda run, plan: True)
    world.rehearsal.faults()
    assert drive(world.site, scheduled(world, job, uri, "r2"), ask=lambda run, plan: True).outcomes["succeeded"] == 5


def test_a_run_that_has_ended_is_begun_anew_and_one_that_was_stopped_in_the_middle_goes_on(world):
    store = world.site.store
    _, name = current_run(store, "reviews", "dag", "run")
    job, uri = world.job(), world.write("in.jsonl", reviews(3))
    run = discover(world.site, job, pattern=uri, label="run", run=name, dates={})
    assert current_run(store, "reviews", "dag", "run") == (1, name), "under way"
    drive(world.site, run, ask=lambda run, plan: True)
    number, second = current_run(store, "reviews", "dag", "run")
    assert (number, second == name) == (2, False)
    assert last_run(store, "reviews", "dag", "run") == name
    again = discover(world.site, job, pattern=world.write("in.jsonl", reviews(4)), label="run", run=second, dates={})
    assert drive(world.site, again, ask=lambda run, plan: True).rows == 4, "what lies there now is read"
    assert last_run(store, "reviews", "dag", "run") == second


def test_a_run_that_its_budget_stopped_before_it_cost_anything_is_begun_anew_with_the_job_as_it_is_then(world):
    uri = world.write("in.jsonl", reviews(30))
    _, name = current_run(world.site.store, "reviews", "dag", "run")
    run = discover(world.site, world.job(policy={"budget_usd": 0.000001}), pattern=uri, label="run", run=name, dates={})
    with pytest.raises(BudgetExceeded):
        drive(world.site, run, ask=lambda run, plan: True)
    number, second = current_run(world.site.store, "reviews", "dag", "run")
    assert number == 2
    run = discover(world.site, world.job(policy={"budget_usd": 5}), pattern=uri, label="run", run=second, dates={})
    assert drive(world.site, run, ask=lambda run, plan: True).published


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("start", "hours", "timezone", "partition"),
    [
        pytest.param(datetime(2026, 11, 20, 23, tzinfo=UTC), 24, "Europe/Berlin", "dt=2026-11-21", id="a day in Berlin"),
        pytest.param(datetime(2026, 3, 28, 23, tzinfo=UTC), 23, "Europe/Berlin", "dt=2026-03-29", id="the day that has 23 hours"),
        pytest.param(datetime(2026, 10, 24, 22, tzinfo=UTC), 25, "Europe/Berlin", "dt=2026-10-25", id="the day that has 25"),
        pytest.param(datetime(2026, 10, 25, 0, tzinfo=UTC), 1, "Europe/Berlin", "dt=2026-10-25/at=0000Z", id="two o'clock, the first time"),
        pytest.param(
            datetime(2026, 10, 25, 1, tzinfo=UTC), 1, "Europe/Berlin", "dt=2026-10-25/at=0100Z", id="two o'clock, the second time"
        ),
        pytest.param(datetime(2026, 11, 16, tzinfo=UTC), 168, "UTC", "dt=2026-11-16", id="a week"),
    ],
)
def test_an_interval_has_a_partition_of_its_own(start, hours, timezone, partition):
    assert dated_partition(interval_dates(start, start + timedelta(hours=hours), timezone), ["0 0 * * *"]) == partition


@pytest.mark.parametrize(
    ("schedules", "alone"),
    [
        (["0 2 * * *"], True),
        (["@weekly"], True),
        (["30 4 1 * *"], True),
        (["@hourly"], False),
        (["0 0,20 * * *"], False),
        (["*/5 2 * * *"], False),
        (["0 0 * * 1", "0 20 * * *"], False),
    ],
)
def test_a_day_that_may_have_several_intervals_has_a_partition_for_each(schedules, alone):
    assert ticks_once_a_day(schedules) is alone
    day = interval_dates(datetime(2026, 11, 23, tzinfo=UTC), datetime(2026, 11, 24, tzinfo=UTC), "UTC")
    assert dated_partition(day, schedules) == ("dt=2026-11-23" if alone else "dt=2026-11-23/at=0000Z")


@pytest.mark.parametrize(
    ("uri", "template", "day"),
    [
        pytest.param("s3://b/dt=2026-11-10/*.csv", "s3://b/dt={{ ds }}/*.csv", "2026-11-10", id="what the schedule reads of a day"),
        pytest.param("s3://b/20261110/2026-11-10", "s3://b/{{ds_nodash}}/{{ ds }}", "2026-11-10", id="in two ways"),
        pytest.param("s3://b/20261111/2026-11-10", "s3://b/{{ds_nodash}}/{{ ds }}", None, id="two days"),
        pytest.param("s3://b/dt=2026-11-10/a.csv", "s3://b/dt={{ ds }}/*.csv", None, id="one of its objects"),
        pytest.param("s3://b/dt=2026-13-45/*.csv", "s3://b/dt={{ ds }}/*.csv", None, id="no day"),
        pytest.param("s3://b/2026-11-10.csv", "s3://b/2026-11-10.csv", None, id="no template"),
    ],
)
def test_objects_named_by_hand_may_be_those_of_a_day(world, uri, template, day):
    job = world.job(input={"uri": template}, schedule="0 2 * * *", timezone="Europe/Berlin")
    named = day_of_input(job.spec, uri)
    assert (named and named["ds"]) == day
    assert day_of_input(job.spec.model_copy(update={"schedule": "0 * * * *"}), uri) is None, "a day has several partitions"


def test_templates_know_the_interval_in_the_jobs_time_zone():
    dates = interval_dates(datetime(2026, 11, 20, 23, tzinfo=UTC), datetime(2026, 11, 21, 23, tzinfo=UTC), "Europe/Berlin")
    assert render_dates("s3://b/{{ ds }}/{{ data_interval_start.strftime('%Y/%m/%d/%H') }}/*", dates) == "s3://b/2026-11-21/2026/11/21/00/*"
    assert render_dates("s3://b/{{ ds_nodash }}/{{ ts_nodash }}", dates) == "s3://b/20261121/20261121T000000"


@pytest.mark.parametrize(
    "template", ["s3://b/{{ dss }}/*", "s3://b/{{ ds / 2 }}", "s3://b/{{ data_interval_start.nothing }}", "s3://b/{% if %}"]
)
def test_a_template_that_no_run_could_fill_in_is_named_before_the_first_run(world, template):
    with pytest.raises(JobInvalid, match=r"input.uri: .*cannot be filled in"):
        world.job(schedule="@daily", input={"uri": template})

"""tidy and forget: what is kept is still reused and never bought twice; what is dropped is bought again, and nothing else."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightshift.compare import compare
from nightshift.drive import begin, drive
from nightshift.errors import ApprovalNeeded, InputMissing, PlanOutdated, QuotaExhausted, RowInUse, StoreUnavailable
from nightshift.forget import forget
from nightshift.runs import PLAN_STANDS, Options
from nightshift.steps.approve import approve
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.report import report
from nightshift.steps.submit import submit
from nightshift.steps.wait import pauses
from nightshift.stores.answers import AnswerStore
from nightshift.stores.database import open_database
from nightshift.stores.objects import Objects
from nightshift.tidy import GRACE, MERGE_AT, _best, tidy
from tests.conftest import World, go, reviews


def later(world: World, **delta: float):
    return replace(world.site, now=lambda: datetime.now(UTC) + timedelta(**delta))


def answers_files(world: World) -> list[str]:
    return [found.key for found in world.site.store.scan("answers") if found.key.endswith(".parquet")]


def test_what_a_run_counts_on_that_waits_for_its_approval_is_not_forgotten_under_it(world):
    job = world.job()
    go(world, job, world.write("a.jsonl", reviews(5)))
    waiting = discover(world.site, job, pattern=world.write("b.jsonl", reviews(6)), label="w", run="w", dates={})
    planned = plan(world.site, waiting)
    with pytest.raises(RowInUse, match="waits for approval"):
        forget(world.site, "reviews", ["r3"])
    assert tidy(replace(world.site, now=lambda: datetime.now(UTC) + timedelta(hours=2)), keep=timedelta(hours=1)).dropped == 0
    assert approve(world.site, waiting, planned, ask=lambda: True).reused == 5
    assert drive(world.site, waiting, ask=lambda run, planned: True).outcomes["succeeded"] == 6


def test_a_plan_that_has_waited_for_longer_than_its_answers_are_kept_is_made_anew(world):
    """A person clears the task `approve` days after its question has timed out."""
    job, uri = world.job(policy={"approve_above_usd": 0}), world.write("b.jsonl", reviews(6))
    go(world, world.job(), world.write("a.jsonl", reviews(5)))
    waiting = begin(world.site, job, pattern=uri, dates={}, scheduled=False)
    planned = plan(world.site, waiting)
    with pytest.raises(ApprovalNeeded):
        drive(world.site, waiting, ask=lambda run, planned: False)
    afterwards = later(world, days=PLAN_STANDS.days, minutes=1)
    assert tidy(afterwards, keep=timedelta(days=1)).dropped == 5
    with pytest.raises(PlanOutdated, match="planned anew; nothing was sent"):
        approve(afterwards, waiting, planned, ask=lambda: True)
    again = begin(world.site, job, pattern=uri, dates={}, scheduled=False)
    assert again.uri != waiting.uri
    assert drive(world.site, again, ask=lambda run, planned: True).outcomes["succeeded"] == 6


def test_a_plan_whose_question_has_timed_out_can_still_be_approved_while_it_stands(world):
    job, uri = world.job(policy={"approve_above_usd": 0}), world.write("b.jsonl", reviews(6))
    go(world, world.job(), world.write("a.jsonl", reviews(5)))
    waiting = begin(world.site, job, pattern=uri, dates={}, scheduled=False)
    with pytest.raises(ApprovalNeeded):
        drive(world.site, waiting, ask=lambda run, planned: False)
    afterwards = later(world, days=PLAN_STANDS.days - 1)
    assert tidy(afterwards, keep=timedelta(days=1)).dropped == 0
    assert approve(afterwards, waiting, plan(afterwards, waiting), ask=lambda: True).reused == 5
    assert drive(world.site, waiting, ask=lambda run, planned: True).outcomes["succeeded"] == 6


def test_an_old_plan_that_counts_on_what_another_run_had_in_flight_is_made_anew(world):
    uri = world.write("a.jsonl", reviews(5))
    one = begin(world.site, world.job(), pattern=uri, dates={}, scheduled=False)
    approve(world.site, one, plan(world.site, one), ask=lambda: True)
    two = begin(world.site, world.job(policy={"approve_above_usd": 0}), pattern=uri, dates={}, scheduled=False)
    planned = plan(world.site, two)
    drive(world.site, one, ask=lambda run, planned: True)
    assert planned.adopted == 5
    with pytest.raises(PlanOutdated):
        approve(later(world, days=PLAN_STANDS.days, minutes=1), two, planned, ask=lambda: True)


def test_forget_names_the_samples_that_show_a_row(world):
    job, uri = world.job(), world.write("a.jsonl", reviews(5))
    sampled = drive(
        world.site, begin(world.site, job, pattern=uri, dates={}, scheduled=False, options=Options(sample=5)), ask=lambda run, planned: True
    )
    assert forget(world.site, "reviews", ["r3"]).published == (sampled.results,)


@pytest.fixture
def many(world):
    """Twelve runs of five rows each, so twelve answers files: (job, uri of all rows)."""
    job = world.job()
    for i in range(12):
        go(world, job, world.write(f"{i}.jsonl", reviews(60)[5 * i : 5 * i + 5]))
    return job, world.write("all.jsonl", reviews(60))


def test_merged_answers_are_reused_as_before(world, many):
    job, uri = many
    assert len(answers_files(world)) == 12
    assert tidy(world.site, keep=None).merged == 12
    after_grace = later(world, seconds=GRACE.total_seconds() + 10)
    assert tidy(after_grace, keep=None).removed == 12
    assert len(answers_files(world)) == 1
    summary = go(world, job, uri)
    assert (summary.requests.reused, summary.requests.submitted, summary.outcomes["succeeded"]) == (60, 0, 60)
    assert world.rehearsal.bill()["requests"] == 60


def test_a_run_that_was_planned_before_a_merge_comes_to_its_end_after_it(world, many):
    job, uri = many
    run = discover(world.site, job, pattern=uri, label="x", run="early", dates={})
    planned = plan(world.site, run)
    assert len(planned.answers) == 12
    tidy(world.site, keep=None)
    tidy(later(world, seconds=GRACE.total_seconds() + 10), keep=None)
    assert drive(world.site, run, ask=lambda run, planned: True).outcomes["succeeded"] == 60
    assert world.rehearsal.bill()["requests"] == 60


def test_few_files_are_left_alone(world):
    job = world.job()
    for i in range(MERGE_AT - 1):
        go(world, job, world.write(f"{i}.jsonl", reviews(40)[5 * i : 5 * i + 5]))
    before = answers_files(world)
    assert tidy(world.site, keep=None).merged == 0
    assert answers_files(world) == before


def test_what_is_older_than_the_store_keeps_is_dropped_and_the_rest_is_not(world):
    job = world.job()
    old = go(world, job, world.write("old.jsonl", reviews(5)))
    done = tidy(later(world, days=31), keep=timedelta(days=30))
    assert (done.dropped, done.emptied) == (5, 2)
    assert answers_files(world) == []
    kept = [found.key for found in world.site.store.scan("")]
    assert not [key for key in kept if key.endswith(("requests.jsonl", "answers-1.parquet")) or "/staged/" in key]
    assert f"runs/reviews/{old.run}/summary.json" in kept
    assert any(key.endswith("/receipt-1.json") for key in kept)
    assert any(key.startswith("results/") for key in kept), "what is published is the users'"
    new = go(world, job, world.write("again.jsonl", reviews(5)))
    assert (new.requests.submitted, new.outcomes["succeeded"]) == (5, 5)
    assert tidy(world.site, keep=timedelta(days=30)).dropped == 0


def test_a_forgotten_row_is_gone_from_everything_that_is_kept_for_reuse_and_is_bought_again(world):
    job, uri = world.job(), world.write("a.jsonl", reviews(10))
    first = go(world, job, uri)
    done = forget(world.site, "reviews", ["r3", "r7", "nobody"])
    assert (done.requests, done.answers, done.unknown) == (2, 2, ("nobody",))
    assert done.published == (first.results,)
    kept = b"".join(world.site.store.get(found.key) for found in world.site.store.scan("shards") if found.key.endswith("requests.jsonl"))
    assert b"room number 3 " not in kept
    assert b"room number 4 " in kept
    for file in (found.key for found in world.site.store.scan("shards") if found.key.endswith(".parquet")):
        assert pq.read_table(world.site.store.open(file)).num_rows == 8
    again = go(world, job, uri)
    assert (again.requests.submitted, again.requests.reused, again.outcomes["succeeded"]) == (2, 8, 10)
    assert world.rehearsal.bill()["requests"] == 12


def test_a_forgotten_row_is_gone_from_what_runs_had_put_together_and_comparisons_are_named(world):
    world.rehearsal.faults(invalid=0.5)
    job, uri = world.job(policy={"publish_at_least": 0}), world.write("a.jsonl", reviews(10))
    run = begin(world.site, job, pattern=uri, dates={}, scheduled=False)
    summary = drive(world.site, run, ask=lambda run, planned: True)
    assert 0 < summary.outcomes["invalid"] < 10
    page = compare(world.site, run, run).page
    forgotten = ["r0", "r1", "r2", "r3", "r4"]
    assert set(forget(world.site, "reviews", forgotten).published) == {summary.results, summary.quarantine, page}
    staged = [found.key for found in world.site.store.scan(run.key("")) if found.key.endswith(".parquet") and "/slices/" not in found.key]
    left = [row for key in staged for row in pq.read_table(world.site.store.open(key)).column("id").to_pylist()]
    assert sorted(left) == ["r5", "r6", "r7", "r8", "r9"]


def test_a_row_that_was_put_together_and_not_published_cannot_be_forgotten(world, monkeypatch):
    job, uri = world.job(), world.write("a.jsonl", reviews(5))
    run = begin(world.site, job, pattern=uri, dates={}, scheduled=False)
    with monkeypatch.context() as patched:
        patched.setattr("nightshift.drive.audit", lambda *args: (_ for _ in ()).throw(StoreUnavailable("x", "away")))
        with pytest.raises(StoreUnavailable):
            drive(world.site, run, ask=lambda run, planned: True)
    with pytest.raises(RowInUse):
        forget(world.site, "reviews", ["r3"])
    assert drive(world.site, run, ask=lambda run, planned: True).published
    assert forget(world.site, "reviews", ["r3"]).answers == 1


def test_a_run_of_forgotten_rows_only_keeps_its_parts_and_is_told_from_one_without_results(world):
    job, uri = world.job(), world.write("a.jsonl", reviews(1))
    old, new = (begin(world.site, job, pattern=uri, dates={}, scheduled=False, options=Options(sample=sample)) for sample in (1, 2))
    for run in (old, new):
        drive(world.site, run, ask=lambda run, planned: True)
    forget(world.site, "reviews", ["r0"])
    with pytest.raises(InputMissing, match="it has published no row that"):
        compare(world.site, old, new)


def test_a_forget_that_died_in_the_middle_is_done_by_the_next(world, monkeypatch):
    go(world, world.job(), world.write("a.jsonl", reviews(5)))
    real = Objects._change

    def dies(self, verb, key, act):
        if "/answers-" in key:
            raise KeyboardInterrupt
        return real(self, verb, key, act)

    with monkeypatch.context() as patched:
        patched.setattr(Objects, "_change", dies)
        with pytest.raises(KeyboardInterrupt):
            forget(world.site, "reviews", ["r3"])
    forget(world.site, "reviews", ["r3"])
    [file] = [found.key for found in world.site.store.scan("shards") if "/answers-" in found.key]
    assert pq.read_table(world.site.store.open(file)).num_rows == 4


def test_a_row_that_another_job_counts_on_cannot_be_forgotten_under_it(world):
    uri = world.write("a.jsonl", reviews(5))
    go(world, world.job(), uri)
    second = begin(world.site, world.job(name="second"), pattern=uri, dates={}, scheduled=False)
    assert approve(world.site, second, plan(world.site, second), ask=lambda: True).reused == 5
    with pytest.raises(RowInUse, match="runs/second"):
        forget(world.site, "reviews", ["r0"])
    drive(world.site, second, ask=lambda run, planned: True)
    assert forget(world.site, "reviews", ["r0"]).requests == 1


def test_a_run_that_has_failed_and_that_nobody_goes_on_with_holds_no_row_for_ever(world):
    run = begin(world.site, world.job(), pattern=world.write("a.jsonl", reviews(5)), dates={}, scheduled=False)
    world.rehearsal.faults(create_quota=99)
    with pytest.raises(QuotaExhausted):
        drive(world.site, run, ask=lambda run, planned: True)
    with pytest.raises(RowInUse):
        forget(world.site, "reviews", ["r3"])
    assert forget(later(world, days=PLAN_STANDS.days, minutes=1), "reviews", ["r3"]).requests == 1


def test_a_row_whose_id_stands_twice_is_forgotten(world):
    rows = [*reviews(2), {**reviews(3)[2], "id": "r0"}]
    go(world, world.job(policy={"publish_at_least": 0}), world.write("a.jsonl", rows))
    assert forget(world.site, "reviews", ["r0"]).requests == 1


def test_a_row_that_was_only_rejected_is_forgotten_too(world):
    rows = [*reviews(2), {"id": "long", "text": "x" * 600, "stars": 3}]
    summary = go(world, world.job(policy={"publish_at_least": 0}), world.write("a.jsonl", rows))
    done = forget(world.site, "reviews", ["long"])
    assert (done.requests, done.published, done.unknown) == (0, (summary.quarantine,), ())
    staged = next(found.key for found in world.site.store.scan("runs") if "/quarantine/" in found.key)
    assert pq.read_table(world.site.store.open(staged)).num_rows == 0


def test_a_plan_that_was_refused_keeps_its_rows_while_it_stands_and_a_dry_run_keeps_none(world):
    uri = world.write("a.jsonl", reviews(3))
    refused = begin(world.site, world.job(policy={"approve_above_usd": 0}), pattern=uri, dates={}, scheduled=False)
    with pytest.raises(ApprovalNeeded):
        drive(world.site, refused, ask=lambda run, planned: False)
    with pytest.raises(RowInUse):
        forget(world.site, "reviews", ["r1"])
    world.write("b.jsonl", reviews(9)[6:])
    dry = begin(
        world.site, world.job(), pattern=f"file://{world.folder}/input/b.jsonl", dates={}, scheduled=False, options=Options(dry_run=True)
    )
    plan(world.site, dry)
    report(world.site, dry, published=None)
    assert forget(world.site, "reviews", ["r7"]).requests == 1


def test_every_row_of_a_shard_can_be_forgotten(world):
    job, uri = world.job(), world.write("a.jsonl", reviews(3))
    go(world, job, uri)
    forget(world.site, "reviews", ["r0", "r1", "r2"])
    assert answers_files(world) == []
    assert go(world, job, uri).requests.submitted == 3


def test_a_row_that_is_being_asked_cannot_be_forgotten_and_an_unknown_one_is_told(world):
    run = discover(world.site, world.job(), pattern=world.write("a.jsonl", reviews(3)), label="x", run="r", dates={})
    [shard] = approve(world.site, run, plan(world.site, run), ask=lambda: True).shards
    submit(world.site, run, shard)
    with pytest.raises(RowInUse):
        forget(world.site, "reviews", ["r1"])
    with pytest.raises(InputMissing, match="no run has read nobody"):
        forget(world.site, "reviews", ["nobody"])


def test_a_row_that_an_approved_run_counts_on_cannot_be_forgotten(world):
    job = world.job()
    go(world, job, world.write("a.jsonl", reviews(10)))
    run = discover(world.site, job, pattern=world.write("b.jsonl", reviews(12)), label="x", run="r", dates={})
    approve(world.site, run, plan(world.site, run), ask=lambda: True)
    with pytest.raises(RowInUse):
        forget(world.site, "reviews", ["r1"])
    assert drive(world.site, run, ask=lambda run, planned: True).outcomes["succeeded"] == 12
    assert forget(world.site, "reviews", ["r1"]).requests == 1


def test_answers_that_an_approved_run_counts_on_are_not_dropped(world):
    job = world.job()
    go(world, job, world.write("a.jsonl", reviews(10)))
    run = discover(world.site, job, pattern=world.write("b.jsonl", reviews(12)), label="x", run="r", dates={})
    approve(world.site, run, plan(world.site, run), ask=lambda: True)
    assert tidy(later(world, days=31), keep=timedelta(days=30)).dropped == 0
    assert drive(world.site, run, ask=lambda run, planned: True).outcomes["succeeded"] == 12
    assert tidy(later(world, days=31), keep=timedelta(days=30)).dropped == 12


def test_a_run_that_failed_before_it_paid_can_be_gone_on_with_after_a_tidy(world):
    job, uri = world.job(), world.write("a.jsonl", reviews(5))
    world.rehearsal.faults(create_quota=1)
    with pytest.raises(QuotaExhausted):
        go(world, job, uri)
    tidy(later(world, days=31), keep=timedelta(days=30))
    assert go(world, job, uri).outcomes["succeeded"] == 5


def test_a_plan_made_while_answers_are_merged_away_reuses_all_of_them(world, many, monkeypatch):
    job, uri = many
    tidy(world.site, keep=None)
    files, met = AnswerStore.files, []

    def slower(self):
        found = files(self)
        if not met:
            met.append(1)
            tidy(later(world, seconds=GRACE.total_seconds() + 10), keep=None)
        return found

    monkeypatch.setattr(AnswerStore, "files", slower)
    run = discover(world.site, job, pattern=uri, label="x", run="r", dates={})
    assert plan(world.site, run).reused == 60


def test_merging_keeps_what_each_model_has_answered(world):
    """A job that accepts another model's answers and one that does not share a store."""
    other = world.job(policy={"retry": {"refused": {"times": 1, "model": "gpt-5.4-mini"}}, "publish_at_least": 0})
    world.rehearsal.faults(refused=0.7)
    for i in range(MERGE_AT):
        go(world, other, world.write(f"{i}.jsonl", reviews(40)[5 * i : 5 * i + 5]))
    plain, uri = world.job(policy={"publish_at_least": 0}), world.write("all.jsonl", reviews(40))
    tidy(world.site, keep=None)
    tidy(later(world, seconds=GRACE.total_seconds() + 10), keep=None)
    assert len(answers_files(world)) == 1
    assert go(world, plain, uri).requests.reused == go(world, other, uri).requests.reused == 40


def test_what_an_unsettled_shard_counts_on_is_not_dropped(cloud):
    """Requests and paid results of a job that nobody has collected yet, however old."""
    cloud.rehearsal.faults(minimum_records=1)
    job = cloud.job(request={"provider": "bedrock", "model": "amazon.nova-lite-v1:0"})
    run = discover(cloud.site, job, pattern=cloud.write("a.jsonl", reviews(10)), label="x", run="r", dates={})
    [shard] = approve(cloud.site, run, plan(cloud.site, run), ask=lambda: True).shards
    submit(cloud.site, run, shard)
    for pause in pauses(cloud.site, run, shard):
        time.sleep(pause)
    cloud.site.store.put("live/nobodys/answers.jsonl", b"{}")
    cloud.site.store.put("bedrock/nobodys/x/requests.jsonl", b"{}")
    tidy(later(cloud, days=40), keep=timedelta(days=30))
    assert list(cloud.site.store.scan("live")) == []
    assert {found.key.split("/")[1] for found in cloud.site.store.scan("bedrock")} == {cloud.site.ledger.token(shard, 1)}
    assert drive(cloud.site, run, ask=lambda run, planned: True).outcomes["succeeded"] == 10
    assert cloud.rehearsal.bill()["requests"] == 10


def test_of_the_lines_for_a_request_a_success_stays_else_a_paid_one_else_the_latest(tmp_path):
    lines = [
        [
            ("a", None, "succeeded", True, 1),
            ("b", None, "errored", False, 1),
            ("c", None, "errored", False, 1),
            ("a", "m", "errored", False, 1),
        ],
        [("a", None, "invalid", True, 2), ("b", None, "invalid", True, 1), ("c", None, "expired", False, 2)],
        [("b", None, "errored", False, 3), ("d", None, "succeeded", True, 1)],
    ]
    names, paths = ("request_key", "stand_in", "outcome", "paid", "answered_at"), []
    for number, each in enumerate(lines):
        columns = [pa.array(values, pa.string()) for values in list(zip(*each, strict=True))[:3]]
        paid, at = list(zip(*each, strict=True))[3:]
        paths.append(tmp_path / f"it's {number}.parquet")
        pq.write_table(pa.table([*columns, pa.array(paid), pa.array(at, pa.timestamp("ms", "UTC"))], names), paths[-1])
    with open_database(tmp_path) as database:
        assert [mask.tolist() for mask in _best(database, paths)] == [[True, False, False, True], [False, True, True], [False, True]]

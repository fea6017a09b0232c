"""The provider `bedrock`: boto3 against the rehearsal's control plane and an S3 emulator."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from botocore.exceptions import ClientError, UnauthorizedSSOTokenError

from nightshift.drive import drive
from nightshift.errors import (
    AccessDenied,
    BatchRejected,
    BatchUnfinished,
    BatchUnknown,
    BudgetExceeded,
    JobInvalid,
    ModelNotFound,
    ProviderUnavailable,
    QueueFull,
    ResultsGone,
    SettingInvalid,
    ShardHeld,
)
from nightshift.job import Policy
from nightshift.providers.bedrock import BedrockJobs, translated
from nightshift.providers.protocol import Limits
from nightshift.runs import Run
from nightshift.steps.approve import approve
from nightshift.steps.collect import collect
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from nightshift.steps.wait import pauses
from nightshift.stores.ledger import QUEUE_PATIENCE, QUEUE_PAUSE_MAX
from nightshift.stores.objects import open_objects
from tests.conftest import Rehearsal, World, go, make_world, order, reviews

HAIKU = "us.anthropic.claude-haiku-4-5-20251001-v1:0"
BEDROCK = {"provider": "bedrock", "model": HAIKU}


def begun(world: World, job, count: int = 120):
    run = discover(world.site, job, pattern=world.write("a.jsonl", reviews(count)), label="x", run="r", dates={})
    [shard] = approve(world.site, run, plan(world.site, run), ask=lambda: True).shards
    return run, shard


def jobs_of(world: World) -> BedrockJobs:
    return BedrockJobs("converse", world.site.store, world.rehearsal.bedrock())


@pytest.mark.parametrize(
    ("endpoint", "model"),
    [
        ("converse", HAIKU),
        ("converse", "amazon.nova-lite-v1:0"),
        ("invoke", HAIKU),
        ("invoke", "amazon.nova-micro-v1:0"),
        ("invoke", "meta.llama3-3-70b-instruct-v1:0"),
        ("invoke", "openai.gpt-oss-20b-1:0"),
    ],
)
def test_F87_F88_F92_F96_an_unchanged_job_goes_the_whole_way(cloud, endpoint, model):
    job = cloud.job(
        request={"provider": "bedrock", "model": model, "endpoint": endpoint, "parameters": {"temperature": 0, "max_output_tokens": 90}}
    )
    uri = cloud.write("a.jsonl", [*reviews(150), {"id": "again", "text": reviews(1)[0]["text"]}])
    summary, bill = go(cloud, job, uri), cloud.rehearsal.bill()
    assert (summary.state, summary.outcomes["succeeded"], summary.requests.duplicates) == ("published", 151, 1)
    assert (bill["requests"], bill["unique_requests"], bill["batches"]) == (150, 150, 1)
    assert {line["tier"] for line in bill["by_batch"]} == {"batch"}
    assert summary.cost_usd.actual == pytest.approx(bill["usd"], abs=2e-6)
    assert go(cloud, job, uri).requests.submitted == 0
    assert list(cloud.site.store.scan("bedrock")) == [], "results echo every prompt, so nothing of a settled job stays (F96)"


@pytest.mark.parametrize(
    ("rows", "batches", "on_demand"),
    [
        pytest.param(230, [100, 130], 0, id="filled up from the one before"),
        pytest.param(270, [130, 130], 10, id="the one before cannot spare so many, so the fewest are asked on demand"),
    ],
)
def test_F20_the_last_shard_is_filled_up_to_the_minimum(cloud, rows, batches, on_demand):
    job = cloud.job(request=BEDROCK, policy={"max_requests_per_shard": 130})
    summary, bill = go(cloud, job, cloud.write("a.jsonl", reviews(rows))), cloud.rehearsal.bill()
    assert sorted(line["requests"] for line in bill["by_batch"] if line["tier"] == "batch") == batches
    assert sum(line["requests"] for line in bill["by_batch"] if line["tier"] == "standard") == on_demand
    assert summary.outcomes["succeeded"] == rows


def test_too_few_for_a_batch_are_asked_on_demand_and_estimated_so(cloud):
    summary = go(cloud, cloud.job(request=BEDROCK), cloud.write("a.jsonl", reviews(40)))
    bill = cloud.rehearsal.bill()
    assert (summary.outcomes["succeeded"], bill["requests"], bill["batches"]) == (40, 40, 0)
    assert summary.cost_usd.by_tier == {"on_demand": pytest.approx(bill["usd"], abs=1e-6)}
    batch = go(
        cloud,
        cloud.job(request={**BEDROCK, "limits": {"min_requests": 1}}, fresh=True),
        cloud.write("b.jsonl", reviews(100)),
    )
    per_request = summary.cost_usd.estimated / 40
    assert per_request == pytest.approx(2 * batch.cost_usd.estimated / 100, rel=0.01)


def test_what_is_asked_again_and_too_few_for_a_batch_is_asked_on_demand(cloud):
    cloud.rehearsal.faults(errored_once=0.1)
    summary = go(cloud, cloud.job(request=BEDROCK), cloud.write("a.jsonl", reviews(120)))
    bill = cloud.rehearsal.bill()
    assert (summary.outcomes["succeeded"], bill["requests"], bill["batches"]) == (120, 120, 1)
    tiers = {line["tier"]: line["requests"] for line in bill["by_batch"]}
    assert 0 < tiers["standard"] < 30
    assert summary.cost_usd.actual == pytest.approx(bill["usd"], abs=3e-6)


def test_a_job_that_forbids_every_batch_is_told(cloud):
    with pytest.raises(JobInvalid, match="max_requests_per_shard: 60 is below 100"):
        go(cloud, cloud.job(request=BEDROCK, policy={"max_requests_per_shard": 60}), cloud.write("a.jsonl", reviews(120)))
    assert cloud.rehearsal.bill()["requests"] == 0


def test_what_others_have_taken_out_is_weighed_again_before_it_is_bought(cloud):
    """Less than a batch is left, which costs twice as much a request: over the budget, though the plan was not."""
    job = cloud.job(request=BEDROCK)
    run = discover(cloud.site, job, pattern=cloud.write("a.jsonl", reviews(110)), label="x", run="r1", dates={})
    planned = plan(cloud.site, run)
    tight = job.model_copy(
        update={"spec": job.spec.model_copy(update={"policy": Policy(budget_usd=planned.estimate.usd * Decimal("1.1"))})}
    )
    run = Run(cloud.site.store, run.input.model_copy(update={"job": tight}))
    other = discover(cloud.site, job, pattern=cloud.write("b.jsonl", reviews(20)), label="x", run="r2", dates={})
    approve(cloud.site, other, plan(cloud.site, other), ask=lambda: True)
    with pytest.raises(BudgetExceeded):
        approve(cloud.site, run, planned, ask=lambda: True)


def test_F21_quotas_are_those_of_the_account_and_of_the_job_before_them(cloud):
    cloud.rehearsal.faults(minimum_records=30)
    job = cloud.job(request=BEDROCK)
    assert cloud.site.limits(job) == Limits(requests=50_000, request_bytes=1_000_000_000, least=30)
    assert cloud.site.limits(cloud.job(request={**BEDROCK, "limits": {"min_requests": 7, "max_requests": 9}})).least == 7
    cloud.rehearsal.faults(minimum_records=30, quotas_denied=True)
    assert cloud.site.limits(job).least == 100, "as documented, where the account does not tell"


def test_the_same_token_creates_one_job(cloud, tmp_path):
    provider = jobs_of(cloud)
    path = tmp_path / "lines"
    path.write_bytes(b"")
    uploaded = provider.upload("nightshift-a-1", path)
    one, two = (provider.create(order(uploaded, model=HAIKU, token="a" * 32, labels={"job": "reviews"}), lambda: True) for _ in range(2))
    assert one.batch_id == two.batch_id


def test_F25_a_full_queue_is_waited_for(cloud):
    cloud.rehearsal.faults(jobs_at_once=0)
    run, shard = begun(cloud, cloud.job(request=BEDROCK))
    for _ in range(2):
        with pytest.raises(ShardHeld, match=r"full queue|queue is full"):
            submit(cloud.site, run, shard)
    assert next(pauses(cloud.site, run, shard)) > 30
    cloud.rehearsal.faults()
    after = replace(cloud.site, now=lambda: datetime.now(UTC) + QUEUE_PAUSE_MAX)
    assert submit(after, run, shard) is not None


def test_F23_a_queue_that_stays_full_for_a_day_is_told(cloud):
    cloud.rehearsal.faults(jobs_at_once=0)
    run, shard = begun(cloud, cloud.job(request=BEDROCK))
    with pytest.raises(ShardHeld):
        submit(cloud.site, run, shard)
    with pytest.raises(QueueFull, match="takes no more batches for now"):
        submit(replace(cloud.site, now=lambda: datetime.now(UTC) + QUEUE_PATIENCE + QUEUE_PAUSE_MAX), run, shard)


@pytest.mark.parametrize(
    ("faults", "outcome"),
    [
        ({"never_run": 0.3}, "expired"),
        ({"missing": 0.2}, "missing"),
        ({"bad_request": 0.2}, "errored"),
        ({"refused": 0.2}, "refused"),
        ({"filtered": 0.2}, "filtered"),
        ({"truncated": 0.2}, "truncated"),
        ({"invalid": 0.2}, "invalid"),
    ],
)
def test_every_ending_of_a_record_is_an_outcome_of_its_row(cloud, faults, outcome):
    cloud.rehearsal.faults(**faults)
    job = cloud.job(
        request=BEDROCK, policy={"retry": dict.fromkeys(("invalid", "errored", "expired", "missing"), 0), "publish_at_least": 0}
    )
    summary = go(cloud, job, cloud.write("a.jsonl", reviews(120)))
    assert 0 < summary.outcomes[outcome] < 120
    assert summary.outcomes["succeeded"] + summary.outcomes[outcome] == 120
    billed = cloud.rehearsal.bill()["usd"]
    assert summary.cost_usd.actual == pytest.approx(billed * (1 - summary.outcomes["missing"] / 120), rel=0.02), "what is lost has no usage"


def test_F58_a_stopped_job_is_harvested(cloud):
    cloud.rehearsal.pace(validating=0.0, running=2.0, finalizing=0.0, cancelling=0.05)
    run, shard = begun(cloud, cloud.job(request=BEDROCK, policy={"retry": {"cancelled": 0}, "publish_at_least": 0}))
    receipt, provider = submit(cloud.site, run, shard), jobs_of(cloud)
    while provider.poll(receipt.batch_id).done < 20:
        time.sleep(0.05)
    provider.cancel(receipt.batch_id)
    provider.cancel(receipt.batch_id)  # too late or not: no error (F48)
    summary = drive(cloud.site, run, ask=lambda run, planned: True)
    assert summary.outcomes["succeeded"] >= 20
    assert summary.outcomes["succeeded"] + summary.outcomes["cancelled"] == 120
    assert cloud.rehearsal.bill()["requests"] == summary.outcomes["succeeded"]


def test_F60_results_that_come_after_the_end_are_waited_for(cloud, monkeypatch):
    monkeypatch.setattr("nightshift.drive.TRANSIENT_PAUSE_SECONDS", 0.1)
    cloud.rehearsal.faults(results_lag_seconds=1.0)
    summary = go(cloud, cloud.job(request=BEDROCK), cloud.write("a.jsonl", reviews(120)))
    assert (summary.outcomes["succeeded"], cloud.rehearsal.bill()["requests"]) == (120, 120)


def test_F60_results_of_a_job_that_ended_early_are_waited_for_too(cloud, monkeypatch):
    """Partially completed: what ran is billed, and its file comes a little later than the word."""
    monkeypatch.setattr("nightshift.drive.TRANSIENT_PAUSE_SECONDS", 0.1)
    cloud.rehearsal.faults(never_run=0.3, results_lag_seconds=1.0)
    summary = go(cloud, cloud.job(request=BEDROCK, policy={"on_demand": True}), cloud.write("a.jsonl", reviews(120)))
    assert (summary.outcomes["succeeded"], cloud.rehearsal.bill()["requests"]) == (120, 120)


def test_two_stores_of_one_account_buy_apart(cloud, tmp_path, rehearsal, bucket):
    """Same job, same rows, one account: neither is handed the other's job, nor finds its files gone."""
    other = make_world(tmp_path / "other", rehearsal, store_uri=f"{bucket}/other")
    (tmp_path / "other").mkdir()
    for world in (cloud, other):
        assert go(world, world.job(request=BEDROCK), world.write("a.jsonl", reviews(110))).outcomes["succeeded"] == 110
    bill = rehearsal.bill()
    assert (bill["batches"], bill["requests"]) == (2, 220)


def test_F87_files_that_somebody_else_has_removed_are_looked_for_again(cloud, tmp_path):
    run, shard = begun(cloud, cloud.job(request=BEDROCK))
    receipt = submit(cloud.site, run, shard)
    for pause in pauses(cloud.site, run, shard):
        time.sleep(pause)
    provider, [attempt] = jobs_of(cloud), cloud.site.ledger.attempts(shard)
    look = provider.poll(receipt.batch_id)
    provider.clean(attempt.claim.token, receipt.batch_id)
    with pytest.raises(ResultsGone):
        list(provider.replies(look, tmp_path))


def test_a_jobs_time_is_the_jobs_own_deadline_as_far_as_bedrock_lets_it(cloud, monkeypatch):
    asked = []
    create = BedrockJobs.create
    monkeypatch.setattr(BedrockJobs, "create", lambda self, order, may_send: asked.append(order.window) or create(self, order, may_send))
    go(cloud, cloud.job(request=BEDROCK, policy={"deadline_hours": 72}), cloud.write("a.jsonl", reviews(100)))
    assert asked == [timedelta(hours=72)]


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "ThrottlingException", ProviderUnavailable),
        (400, "Throttling", ProviderUnavailable),
        (429, "TooManyRequestsException", ProviderUnavailable),
        (500, "InternalServerException", ProviderUnavailable),
        (400, "ExpiredToken", AccessDenied),
        (403, "SignatureDoesNotMatch", AccessDenied),
        (403, "403", AccessDenied),
        (400, "ServiceQuotaExceededException", QueueFull),
        (400, "ValidationException", BatchRejected),
    ],
)
def test_errors_of_every_service_on_the_way_are_what_they_are(status, code, error):
    answer = {"Error": {"Code": code, "Message": "why"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(error), translated("here"):
        raise ClientError(answer, "CreateModelInvocationJob")


def test_credentials_that_cannot_be_renewed_are_told_and_are_no_doubt(cloud, monkeypatch):
    def expired(*given, **named):
        raise UnauthorizedSSOTokenError

    provider = jobs_of(cloud)
    monkeypatch.setattr(provider._once, "create_model_invocation_job", expired)
    with pytest.raises(AccessDenied, match="SSO"):
        provider.create(order("s3://b/x/requests.jsonl", model=HAIKU, token="a" * 32), lambda: True)


@pytest.mark.parametrize(
    "model",
    [
        "arn:aws:bedrock:us-east-1::foundation-model/amazon.nova-lite-v1:0",
        "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.amazon.nova-lite-v1:0",
        "arn:aws:bedrock:us-east-1:123456789012:imported-model/abcdefghijkl",
    ],
)
def test_a_model_can_be_named_by_its_arn(cloud, model):
    jobs_of(cloud).check(model)


def test_F89_a_manifest_is_compared_and_never_needed(cloud):
    cloud.rehearsal.faults(no_manifest=True)
    assert go(cloud, cloud.job(request=BEDROCK), cloud.write("a.jsonl", reviews(120))).alarms == {}
    cloud.rehearsal.faults(odd_counts=True)
    summary = go(cloud, cloud.job(request=BEDROCK), cloud.write("b.jsonl", reviews(240)[120:]))
    assert (summary.outcomes["succeeded"], summary.alarms) == (120, {"manifests that count otherwise": 1})


def test_looks_that_fail_and_words_nobody_knows_do_not_end_the_wait(cloud):
    cloud.rehearsal.faults(poll_500=2, poll_html=2, unknown_status=True, rate_limit=3)
    assert go(cloud, cloud.job(request=BEDROCK), cloud.write("a.jsonl", reviews(120))).outcomes["succeeded"] == 120


def test_what_a_job_has_not_run_in_time_is_finished_on_demand(cloud):
    cloud.rehearsal.faults(never_run=0.4)
    job = cloud.job(request=BEDROCK, policy={"on_demand": True})
    summary, bill = go(cloud, job, cloud.write("a.jsonl", reviews(120))), cloud.rehearsal.bill()
    assert (summary.outcomes["succeeded"], bill["requests"], bill["unique_requests"]) == (120, 120, 120)
    billed = {"batch" if line["tier"] == "batch" else "on_demand": line["usd"] for line in bill["by_batch"]}
    assert summary.cost_usd.by_tier == pytest.approx(billed, abs=1e-6)


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"role_arn": None}, "NIGHTSHIFT_BEDROCK_ROLE_ARN"),
        ({"role_arn": "nightshift"}, "not the ARN of a role"),
    ],
)
def test_a_role_that_is_none_is_told(cloud, changes, told):
    provider = BedrockJobs("converse", cloud.site.store, cloud.rehearsal.bedrock(**changes))
    with pytest.raises(SettingInvalid, match=told):
        go(cloud, cloud.job(request=BEDROCK), cloud.write("a.jsonl", reviews(120)), open_provider=lambda request: provider)


def test_files_that_bedrock_cannot_reach_are_told(cloud, tmp_path):
    for folder, why in ((f"file://{tmp_path}/store", "is not on S3"), ("s3://bucket/dt=2026-11-22/store", "characters")):
        with pytest.raises(SettingInvalid, match=why):
            BedrockJobs("converse", open_objects(folder), cloud.rehearsal.bedrock()).check(HAIKU)


def test_F38_a_role_without_access_to_s3_fails_the_job_and_costs_nothing(cloud):
    provider = BedrockJobs("converse", cloud.site.store, cloud.rehearsal.bedrock("arn:aws:iam::123456789012:role/no-access"))
    with pytest.raises(BatchRejected, match="does not have access"):
        go(cloud, cloud.job(request=BEDROCK), cloud.write("a.jsonl", reviews(120)), open_provider=lambda request: provider)
    assert cloud.rehearsal.bill()["requests"] == 0


def test_credentials_that_are_wrong_or_not_there_are_told(cloud, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    with pytest.raises(AccessDenied, match="security token"):
        jobs_of(cloud).check(HAIKU)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(AccessDenied, match="credentials"):
        jobs_of(cloud).check(HAIKU)


def test_a_dead_endpoint_and_one_that_answers_html_are_told(cloud, rehearsal: Rehearsal):
    dead = replace(rehearsal.bedrock(), endpoints=(("bedrock", "http://127.0.0.1:9"),))
    with pytest.raises(ProviderUnavailable, match=r"127\.0\.0\.1:9"):
        BedrockJobs("converse", cloud.site.store, dead).check(HAIKU)


def test_F95_a_profile_that_this_region_does_not_have_is_told(cloud):
    with pytest.raises(ModelNotFound, match="could not be found"):
        jobs_of(cloud).check("eu.anthropic.claude-99")


def test_F43_a_job_that_never_began_is_asked_again(cloud):
    cloud.rehearsal.faults(never_run=1.0)
    job = cloud.job(request=BEDROCK, policy={"retry": {"expired": 1}, "publish_at_least": 0})
    run, shard = begun(cloud, job)
    submit(cloud.site, run, shard)
    for pause in pauses(cloud.site, run, shard):
        time.sleep(pause)
    assert collect(cloud.site, run, shard) is None
    cloud.rehearsal.faults()
    summary, bill = drive(cloud.site, run, ask=lambda run, planned: True), cloud.rehearsal.bill()
    assert (summary.outcomes["succeeded"], bill["requests"], bill["batches"]) == (120, 120, 2)


def test_F94_a_job_that_runs_names_no_result_files(cloud):
    cloud.rehearsal.pace(validating=0.0, running=30.0, finalizing=0.0, cancelling=0.05)
    run, shard = begun(cloud, cloud.job(request=BEDROCK))
    receipt = submit(cloud.site, run, shard)
    [uploaded] = [found.key for found in cloud.site.store.scan("bedrock")]
    cloud.site.store.put(f"{uploaded.rpartition('/')[0]}/out/{receipt.batch_id.rpartition('/')[2]}/requests.jsonl.out", b"{")
    look = jobs_of(cloud).poll(receipt.batch_id)
    assert (look.state, look.result_files) == ("running", ())


def test_F46_a_job_nobody_knows_is_not_called_ended(cloud):
    with pytest.raises(BatchUnknown):
        jobs_of(cloud).poll("arn:aws:bedrock:us-east-1:123456789012:model-invocation-job/abcdefghijkl")


def test_collect_of_a_job_that_has_not_ended_comes_back_later(cloud):
    cloud.rehearsal.pace(validating=0.0, running=30.0, finalizing=0.0, cancelling=0.05)
    run, shard = begun(cloud, cloud.job(request=BEDROCK))
    submit(cloud.site, run, shard)
    with pytest.raises(BatchUnfinished, match=r"is still (InProgress|Validating)"):
        collect(cloud.site, run, shard)

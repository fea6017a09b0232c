"""Random lives of workers on one store; `make chaos` draws many more, and kills real processes."""

from __future__ import annotations

import contextlib

import boto3
import pytest
from hypothesis import HealthCheck, settings

from bench.chaos.machine import Lives
from bench.chaos.matrix import BUCKET, Case, Matrix, cases_of, create_points, summarise

Lives.TestCase.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
test_workers_that_die_sleep_and_race_pay_once_and_lose_nothing = Lives.TestCase


@pytest.fixture
def chaos_bucket(s3: str, aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket that Bedrock's requests and results go through."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    client = boto3.client("s3", endpoint_url=s3)
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
        client.create_bucket(Bucket=BUCKET)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("provider", "every", "look_up"), [("openai", 14, "/v1/batches"), ("bedrock", 60, "/model-invocation-jobs"), ("live", 30, None)]
)
def test_workers_killed_at_a_sample_of_all_effects_pay_once_and_lose_nothing(tmp_path, chaos_bucket, provider, every, look_up):
    """Real processes and real SIGKILLs; `make chaos` does this at every effect."""
    matrix = Matrix(tmp_path, workers=4, provider=provider)
    try:
        points, ideal = matrix.points()
        create = create_points(points, provider)[:8]
        cases = [
            *cases_of(points, {}, seed=1, rivals=2, timed=2, provider=provider)[::every],
            *(Case(scenario="killed at an effect", die_at=point) for point in create),
            *([Case(scenario="killed twice", die_at=create[0], then_at=f"after GET {look_up} #1")] if look_up else []),
        ]
        verdicts = matrix.run(cases, 2, lambda verdict: None)
    finally:
        matrix.stop()
    summary = summarise(verdicts, ideal)
    assert summary["crash_points"] > 8
    assert {name: summary[name] for name in ("duplicate_batches", "lost_rows", "double_outcomes", "torn_partitions", "misbooked", "stuck")} == {
        "duplicate_batches": 0, "lost_rows": 0, "double_outcomes": 0, "torn_partitions": 0, "misbooked": 0, "stuck": 0,
    }  # fmt: skip
    assert provider == "live" or summary["bill_ratio"] == 1.0, "on demand, what was in flight at a death is asked again"

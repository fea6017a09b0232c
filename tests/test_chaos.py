"""Random lives of workers on one store; `make chaos` draws many more, and kills real processes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from bench.chaos.machine import Lives
from bench.chaos.matrix import Case, Matrix, cases_of, create_points, summarise

Lives.TestCase.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
test_workers_that_die_sleep_and_race_pay_once_and_lose_nothing = Lives.TestCase


@pytest.mark.timeout(300)
def test_workers_killed_at_a_sample_of_all_effects_pay_once_and_lose_nothing(tmp_path):
    """Real processes and real SIGKILLs; `make chaos` does this at every effect."""
    matrix = Matrix(tmp_path, workers=4)
    try:
        points, ideal = matrix.points()
        create = create_points(points)
        cases = [
            *cases_of(points, {}, seed=1, rivals=2, timed=2)[::14],
            *(Case(scenario="killed at an effect", die_at=point) for point in create),
            Case(scenario="killed twice", die_at=create[0], then_at="after GET /v1/batches #1"),
        ]
        verdicts = matrix.run(cases, 2, lambda verdict: None)
    finally:
        matrix.stop()
    summary = summarise(verdicts, ideal)
    assert summary["crash_points"] > 10
    assert {name: summary[name] for name in ("duplicate_batches", "lost_rows", "double_outcomes", "torn_partitions", "stuck")} == {
        "duplicate_batches": 0, "lost_rows": 0, "double_outcomes": 0, "torn_partitions": 0, "stuck": 0,
    }  # fmt: skip
    assert summary["bill_ratio"] == 1.0

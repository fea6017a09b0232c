"""Random lives of workers on one store; `make chaos` draws many more, and kills real processes."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from bench.chaos.machine import Lives

Lives.TestCase.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
test_workers_that_die_sleep_and_race_pay_once_and_lose_nothing = Lives.TestCase

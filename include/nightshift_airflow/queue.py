"""The queue's settings: Airflow's own, and what its workers import before they fork. See `warm`."""

from __future__ import annotations

from typing import Any

from airflow.providers.celery.executors.default_celery import DEFAULT_CELERY_CONFIG

CELERY_CONFIG: dict[str, Any] = {**DEFAULT_CELERY_CONFIG, "imports": ("nightshift_airflow.warm",)}

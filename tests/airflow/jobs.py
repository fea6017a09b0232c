"""Jobs for a real Airflow: the example's prompt and schema, other schedules, uploads and bounds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.airflow.conftest import ROOT


def write_jobs(folder: Path, queue: str) -> Path:
    """A folder of jobs with all that they name; the folder of the job files."""
    for name in ("prompts", "schemas", "expectations"):
        shutil.copytree(ROOT / "include" / name, folder / name)
    jobs = folder / "jobs"
    jobs.mkdir()
    shutil.copy(ROOT / "include" / "jobs" / "review_sentiment.yaml", jobs)
    (folder / "prompts" / "terse.md").write_text("user:\nOne word: {{ text }}\n")
    nightly = {"schedule": "@daily", "start_date": "2026-10-01", "input": {"uri": "s3://reviews/nightly/dt={{ ds }}/*.jsonl"}}
    careful = {"input": {"uri": "s3://reviews/careful/dt={{ ds }}/*.jsonl"}, "policy": {"approve_above_usd": 0, "budget_usd": 5}}
    heard = {"on_upload": {"uri": "s3://reviews/heard/*.jsonl", "queue": queue}, "input": {"uri": "s3://reviews/heard/*.jsonl"}}
    late = {
        "input": {"uri": "s3://reviews/late/*.jsonl"},
        "policy": {"deadline_hours": 0.01, "retry": {"cancelled": 0}, "publish_at_least": 1},
        "notify": {"on_deadline": ["chat"], "on_held": ["chat"]},
    }
    for name, changes in {"late": late, "nightly": nightly, "careful": {**nightly, **careful}, "heard": heard}.items():
        (jobs / f"{name}.yaml").write_text(yaml.safe_dump(job(name, changes)))
    return jobs


def job(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A job about reviews; `changes` replace its sections, key by key."""
    spec: dict[str, Any] = {
        "name": name,
        "input": {"id": "review_id", "require": {"text": {"type": "string", "min_length": 1, "max_length": 20000}}},
        "request": {
            "provider": "openai",
            "model": "gpt-5.4-nano",
            "prompt": "prompts/review_sentiment.md",
            "parameters": {"max_output_tokens": 120},
        },
        "output": {"schema": "schemas/review_sentiment.json", "keep": ["hotel_id"]},
        "policy": {"publish_at_least": 0.5},
    }
    for key, value in changes.items():
        spec[key] = {**spec[key], **value} if isinstance(spec.get(key), dict) else value
    return spec

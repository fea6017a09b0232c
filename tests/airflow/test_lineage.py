"""Lineage as OpenLineage's own provider collects it from a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nightshift_airflow.lineage import MOST, datasets
from tests.airflow.conftest import ROOT
from tests.airflow.test_dags import run_dag
from tests.conftest import make_world, reviews

OPENLINEAGE = ROOT / ".venv" / "lineage"


def test_a_run_tells_what_it_reads_and_what_it_writes(airflow_home, rehearsal, tmp_path):
    if not OPENLINEAGE.exists():
        pytest.skip("apache-airflow-providers-openlineage is not installed: make test installs it")
    world = make_world(tmp_path / "world", rehearsal)
    world.job()
    events = tmp_path / "events.json"
    transport = {"type": "file", "log_file_path": str(events), "append": True}
    env = {"PYTHONPATH": str(OPENLINEAGE), "AIRFLOW__OPENLINEAGE__TRANSPORT": json.dumps(transport)}
    uri = world.write("in.jsonl", reviews(5))
    run_dag(airflow_home, "reviews", {"input": uri}, rehearsal, tmp_path / "world" / "job-1" / "jobs", **env)
    published = until_told(events, "reviews.publish")
    assert [each["name"] for each in published["inputs"]] == [uri.removeprefix("file://")]
    [written] = [each["name"] for each in published["outputs"]]
    assert Path(written).parent == airflow_home / "store" / "results" / "reviews"


def until_told(path: Path, job: str) -> dict:
    """The end of a job as it was told; events are written by processes of their own, which may live a little longer."""
    for _ in range(120):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        told = [json.loads(line) for line in lines if line.endswith(b"\n")]
        if found := [event for event in told if event["job"]["name"] == job and event["eventType"] == "COMPLETE"]:
            return found[0]
        time.sleep(0.25)
    raise AssertionError(f"{job} has not told its end")


def test_many_objects_are_told_by_their_folders():
    few = [f"s3://b/a/{number}.parquet" for number in range(MOST)]
    assert datasets([*few, *few]) == few
    assert datasets([*few, "s3://b/c/x.parquet"]) == ["s3://b/a", "s3://b/c"]

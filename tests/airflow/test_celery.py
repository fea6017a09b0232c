"""Queued workers: the processes of docker-compose.yaml on CeleryExecutor, with a PostgreSQL and a Redis of their own."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from local import postgres
from local.airflow_api import AirflowApi
from local.stack import Stack, airflow_api, airflow_env, down, reserve, s3_client, start_worker, tail, up
from tests.airflow.conftest import ROOT
from tests.airflow.jobs import job
from tests.airflow.test_stack import CALM, provider, put_reviews, requests_billed, summary_of, tasks_of, until

ROWS, SHARD = 120, 20
QUICK = {  # a dead worker is noticed in seconds, where an installation takes minutes
    **CALM,
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "30",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "10",
    "NIGHTSHIFT_WIDTH": "4",  # and so the six shards share four chains of tasks
}
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server: apt-get install redis-server"),
    pytest.mark.skipif(postgres.wrapper() is None, reason="no PostgreSQL can be run here: no binaries, or root without user namespaces"),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("queued")
    for name in ("prompts", "schemas"):
        shutil.copytree(ROOT / "include" / name, folder / "house" / name)
    (folder / "house" / "jobs").mkdir()
    for name, size in {"wide": SHARD, "narrow": 2}.items():
        spec = {"input": {"uri": "s3://reviews/wide/*.jsonl"}, "policy": {"max_requests_per_shard": size}}
        (folder / "house" / "jobs" / f"{name}.yaml").write_text(yaml.safe_dump(job(name, spec)))
    reserve(folder, apart=True)  # another stack may run beside this one
    started = up(folder, jobs=jobs_of(folder), say=lambda part: None, extra=QUICK, workers=1)
    put_reviews(started, "wide/a.jsonl", ROWS, seed=1)
    yield started
    down(folder)


def jobs_of(folder: Path) -> Path:
    return folder / "house" / "jobs"


def add_worker(stack: Stack, number: int) -> None:
    start_worker(stack, number, {**airflow_env(stack, jobs_of(Path(stack.folder))), **QUICK})


def start(api: AirflowApi, name: str, dag: str = "wide") -> str:
    """Start a run that buys everything anew; its path in the API."""
    api.call("POST", f"/dags/{dag}/dagRuns", {"logical_date": None, "dag_run_id": name, "conf": {"fresh": True}})
    return f"/dags/{dag}/dagRuns/{name}"


def finished(stack: Stack, api: AirflowApi, path: str) -> None:
    until(lambda: api.get(path)["state"] in ("success", "failed"), f"the end of {path}", 400)
    states = tasks_of(api, path.split("/")[2], path.rpartition("/")[2])
    assert api.get(path)["state"] == "success", f"{states}\n{tail(Path(stack.folder), 'airflow-scheduler')}"


def published(stack: Stack) -> dict[str, bytes]:
    """The published Parquet files, by name."""
    client = s3_client(stack)
    found = client.list_objects_v2(Bucket="nightshift", Prefix="store/results/wide/")["Contents"]
    parts = [each["Key"] for each in found if each["Key"].endswith(".parquet")]
    return {key.rpartition("/")[2]: client.get_object(Bucket="nightshift", Key=key)["Body"].read() for key in parts}


def test_workers_have_imported_what_tasks_import(stack):
    started = [pid for name, pid in stack.pids.items() if name.startswith("worker-")]
    assert started
    for pid in started:
        until(lambda pid=pid: "libarrow" in Path(f"/proc/{pid}/maps").read_text(), "what tasks import, in the worker that forks them", 60)


def test_results_are_the_same_bytes_with_one_two_and_four_workers(stack):
    api = airflow_api(stack)
    until(lambda: api.get("/dags", dag_ids="wide")["total_entries"], "the DAG")
    results = []
    for workers in (1, 2, 4):
        for number in range(stack.workers + 1, workers + 1):
            add_worker(stack, number)
        stack.workers = workers
        before = requests_billed(stack)
        path = start(api, f"with-{workers}")
        finished(stack, api, path)
        summary = summary_of(stack, api, f"with-{workers}", "wide")
        assert (summary.state, summary.rows, sum(summary.outcomes.values())) == ("published", ROWS, ROWS)
        assert requests_billed(stack) - before == summary.requests.submitted == summary.requests.unique
        assert summary.batches == -(-summary.requests.unique // SHARD)
        results.append(published(stack))
    assert results[0]
    assert results[0] == results[1] == results[2]


def test_a_worker_that_is_killed_in_the_middle_of_its_shards_loses_nothing_and_pays_nothing_twice(stack):
    api = airflow_api(stack)
    provider(stack, "PUT", "/rehearsal/pace", {"validating": 0.1, "running": 3.0, "finalizing": 0.1})
    before = requests_billed(stack)
    path = start(api, "bereft")

    def in_the_middle() -> bool:
        found = api.get(f"{path}/taskInstances", limit="100")["task_instances"]
        return any(each["task_id"].startswith("shard.") and each["state"] == "running" for each in found)

    until(in_the_middle, "a task of a shard on a worker")
    killed = [name for name in stack.pids if name.startswith("worker-")][:-1]
    for name in killed:  # all but one, so that one of them was at work
        os.killpg(stack.pids.pop(name), signal.SIGKILL)
    time.sleep(1)
    finished(stack, api, path)
    summary = summary_of(stack, api, "bereft", "wide")
    assert (summary.state, sum(summary.outcomes.values())) == ("published", ROWS)
    assert requests_billed(stack) - before == summary.requests.unique


def test_F104_a_run_that_is_stopped_when_none_of_its_tasks_is_at_work_is_cancelled_too(stack):
    """Between a chain's submit and its wait there is no process that Airflow could tell. The wait of a paused DAG does not begin."""
    api = airflow_api(stack)
    provider(stack, "PUT", "/rehearsal/pace", {"validating": 0.1, "running": 600.0, "finalizing": 0.1, "cancelling": 0.1})
    path = start(api, "unheard")
    until(lambda: states_of(api, path, "shard.submit") & {"queued", "running"}, "a task that submits", 90)
    api.call("PATCH", "/dags/wide", {"is_paused": True})
    try:
        until(lambda: not states_of(api, path, "shard.submit") & {"queued", "running"}, "the end of what submits", 90)
        assert open_batches(stack)
        assert states_of(api, path, "shard.wait") == {None}, "nothing waits for a batch yet"
        api.call("PATCH", path, {"state": "failed"})
    finally:
        api.call("PATCH", "/dags/wide", {"is_paused": False})
    until(lambda: not open_batches(stack), "the cancelling of all batches", 60)


def open_batches(stack: Stack) -> int:
    found = provider(stack, "GET", "/v1/batches?limit=100")["data"]
    return sum(batch["status"] in ("validating", "in_progress", "finalizing") for batch in found)


def states_of(api: AirflowApi, path: str, task: str) -> set[str | None]:
    """Of all tasks of a mapped one."""
    found = api.get(f"{path}/taskInstances", limit="100")["task_instances"]
    return {each["state"] for each in found if each["task_id"] == task}


def test_F104_a_run_that_is_stopped_while_it_submits_cancels_what_it_has_sent_and_goes_on_when_it_is_cleared(stack):
    """Sixty shards in four chains: each has many more to send when its process is told to end."""
    api = airflow_api(stack)
    until(lambda: api.get("/dags", dag_ids="narrow")["total_entries"], "the DAG")
    provider(stack, "PUT", "/rehearsal/pace", {"validating": 0.1, "running": 600.0, "finalizing": 0.1, "cancelling": 0.1})
    before = requests_billed(stack)
    path = start(api, "stopped", "narrow")
    until(lambda: open_batches(stack) >= 3, "some batches")
    api.call("PATCH", path, {"state": "failed"})
    assert tasks_of(api, "narrow", "stopped")["assemble"] == "skipped"
    until(lambda: not open_batches(stack), "the cancelling of all batches", 60)
    time.sleep(6)  # by then a process that was told to end is killed
    assert not open_batches(stack), "nothing was sent after that"
    provider(stack, "PUT", "/rehearsal/pace", {"validating": 0.1, "running": 0.5, "finalizing": 0.1})
    api.call("POST", f"{path}/clear", {"dry_run": False, "only_failed": False})
    finished(stack, api, path)
    summary = summary_of(stack, api, "stopped", "narrow")
    assert (summary.state, sum(summary.outcomes.values()), summary.outcomes["cancelled"]) == ("published", ROWS, 0)
    assert requests_billed(stack) - before == summary.requests.unique

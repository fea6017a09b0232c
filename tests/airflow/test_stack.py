"""The local stack as `make demo` starts it: a real Airflow (scheduler, triggerer, dag-processor, API server), S3 and provider."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from local import demo
from local.sample import reviews
from local.stack import AirflowApi, Stack, StackFailed, client_env, down, s3_client, tail, up
from nightshift.shapes import Summary

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    started = up(folder, say=lambda part: None)
    yield started
    down(folder)


@pytest.fixture
def api(stack: Stack) -> AirflowApi:
    return AirflowApi(stack)


def provider(stack: Stack, method: str, path: str, body: Any = None) -> Any:
    headers = {"Authorization": f"Bearer {client_env(stack)['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{stack.provider}{path}", None if body is None else json.dumps(body).encode(), headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


def until(found: Callable[[], Any], what: str, seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.5)
    raise AssertionError(f"{what} has not happened after {seconds:.0f} s")


def test_an_upload_becomes_a_published_dataset_and_the_same_upload_again_spends_nothing(stack):
    """`make demo`, twice. The demonstration checks the bill, the sums and the state itself and raises where they disagree."""
    first = demo.run(stack)
    assert (first.rows, first.state) == (3000, "published")
    assert first.requests.submitted > 2000
    assert first.outcomes["rejected"] > 20
    second = demo.run(stack)
    assert (second.requests.submitted, second.batches, second.cost_usd.actual) == (0, 0, 0)
    assert second.requests.reused == first.requests.submitted
    assert second.outcomes == first.outcomes
    published = s3_client(stack).list_objects_v2(Bucket="nightshift", Prefix="store/results/review_sentiment/")["Contents"]
    assert sum(found["Key"].endswith("_manifest.json") for found in published) == 2


def test_F104_stopping_a_run_cancels_its_batches_and_clearing_it_goes_on_without_paying_again(stack, api):
    provider(stack, "PUT", "/rehearsal/pace", {"validating": 0.1, "running": 60.0, "finalizing": 0.1, "cancelling": 0.5})
    data = b"".join(line + b"\n" for line in reviews(400, seed=7))
    s3_client(stack).put_object(Bucket="reviews", Key="inbox/stopped.jsonl", Body=data)
    before = provider(stack, "GET", "/rehearsal/bill")
    run = until(lambda: demo._run_of(api, "stopped.jsonl"), "the run of the upload")["dag_run_id"]
    path = f"/dags/{demo.JOB}/dagRuns/{run}"

    def waiting() -> bool:
        instances = api.get(f"{path}/taskInstances", limit="100")["task_instances"]
        return any(each["task_id"] == "shard.wait" and each["state"] == "deferred" for each in instances)

    until(waiting, "the wait for the batch")
    [batch] = [each for each in provider(stack, "GET", "/v1/batches")["data"] if each["status"] in ("validating", "in_progress")]
    until(lambda: provider(stack, "GET", f"/v1/batches/{batch['id']}")["request_counts"]["completed"] > 10, "some work at the provider")
    api.call("PATCH", path, {"state": "failed"})
    ended = until(
        lambda: status_of(stack, batch["id"]) == "cancelled" and provider(stack, "GET", f"/v1/batches/{batch['id']}"), "the cancel"
    )
    done = ended["request_counts"]["completed"]
    assert done > 10

    provider(stack, "PUT", "/rehearsal/pace", {"validating": 0.1, "running": 1.0, "finalizing": 0.1})
    until(lambda: api.get(path)["state"] == "failed", "the end of the stopped run")
    api.call("POST", f"{path}/clear", {"dry_run": False, "only_failed": False})
    until(lambda: api.get(path)["state"] in ("success", "failed"), "the end of the cleared run")
    summary = summary_of(stack, api, run)
    assert api.get(path)["state"] == "success", tail(Path(stack.folder), "airflow")
    assert (summary.state, summary.outcomes["cancelled"], sum(summary.outcomes.values())) == ("published", 0, summary.rows)
    after = provider(stack, "GET", "/rehearsal/bill")
    assert after["requests"] - before["requests"] == summary.requests.submitted
    assert after["requests"] == after["unique_requests"], "nothing was paid twice"


def status_of(stack: Stack, batch_id: str) -> str:
    return str(provider(stack, "GET", f"/v1/batches/{batch_id}")["status"])


def summary_of(stack: Stack, api: AirflowApi, run: str) -> Summary:
    return demo._fetch(stack, api, run)[0]


def test_a_missing_object_named_by_hand_fails_at_once_and_says_what_to_mend(stack, api):
    body = {"logical_date": None, "dag_run_id": "by-hand", "conf": {"input": "s3://reviews/inbox/none.jsonl"}}
    api.call("POST", f"/dags/{demo.JOB}/dagRuns", body)
    until(lambda: api.get(f"/dags/{demo.JOB}/dagRuns/by-hand")["state"] == "failed", "the failure")
    instance = api.get(f"/dags/{demo.JOB}/dagRuns/by-hand/taskInstances/discover")
    assert instance["try_number"] == 1, "what a person has to mend is not tried again"
    assert "Nothing to read at s3://reviews/inbox/none.jsonl" in demo._failed_log(api, "by-hand")


def test_a_part_that_does_not_start_is_told_with_its_log(tmp_path):
    with pytest.raises(StackFailed, match="provider ended while starting"):
        up(tmp_path, rehearse=("--fault", "nonsense=1"), say=lambda part: None)

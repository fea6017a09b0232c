"""The local stack as `make demo` starts it: a real Airflow (scheduler, triggerer, dag-processor, API server), S3 and provider."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest
from botocore.exceptions import ClientError
from playwright.sync_api import Page, sync_playwright

from local import demo
from local.airflow_api import AirflowApi
from local.sample import reviews
from local.stack import Stack, StackFailed, airflow_api, airflow_env, client_env, down, reserve, s3_client, tail, up
from nightshift.shapes import Summary
from nightshift_airflow.stops import STOPPED
from tests.airflow.jobs import write_jobs

DAYS = int(os.environ.get("NIGHTSHIFT_TEST_DAYS", "6"))  # of the backfill: thirty take some minutes longer
FULL_DAYS = range(1, DAYS + 1, 4)  # that there is something to read of
CALM = {"AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "300"}  # no file changes here, and reading all of them anew takes a core
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def chat() -> Iterator[tuple[str, list[str]]]:
    """A Slack webhook: its address, and what it was told."""
    told: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"ok")

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/services/x", told
        server.shutdown()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, chat: tuple[str, list[str]]) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    jobs = write_jobs(folder / "house", f"{reserve(folder).aws}/000000000000/uploads")
    hook = json.dumps({"conn_type": "slackwebhook", "password": chat[0]})
    started = up(folder, jobs=jobs, say=lambda part: None, extra={"AIRFLOW_CONN_CHAT": hook, **CALM})
    tell_uploads(started)
    yield started
    down(folder)


def tell_uploads(stack: Stack) -> None:
    """A queue, and a bucket that tells it of what lands below `heard/`."""
    queue = aws_client(stack, "sqs").create_queue(QueueName="uploads")["QueueUrl"]
    arn = aws_client(stack, "sqs").get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    told = {"QueueArn": arn, "Events": ["s3:ObjectCreated:*"], "Filter": {"Key": {"FilterRules": [{"Name": "prefix", "Value": "heard/"}]}}}
    s3_client(stack).put_bucket_notification_configuration(Bucket="reviews", NotificationConfiguration={"QueueConfigurations": [told]})


def aws_client(stack: Stack, service: str) -> Any:
    return boto3.client(
        service, endpoint_url=stack.aws, aws_access_key_id="rehearsal", aws_secret_access_key="rehearsal", region_name="us-east-1"
    )


@pytest.fixture
def api(stack: Stack) -> AirflowApi:
    return airflow_api(stack)


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

    def told() -> Summary | None:
        with suppress(ClientError):  # not written yet
            return summary_of(stack, api, run)

    stopped = until(told, "the report of the stopped run")
    assert (stopped.state, stopped.problem, stopped.cost_usd.actual) == ("failed", STOPPED, None)
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


def summary_of(stack: Stack, api: AirflowApi, run: str, job: str = demo.JOB) -> Summary:
    return demo._fetch(stack, api, run, job)[0]


def test_a_missing_object_named_by_hand_fails_at_once_and_says_what_to_mend(stack, api):
    body = {"logical_date": None, "dag_run_id": "by-hand", "conf": {"input": "s3://reviews/inbox/none.jsonl"}}
    api.call("POST", f"/dags/{demo.JOB}/dagRuns", body)
    until(lambda: api.get(f"/dags/{demo.JOB}/dagRuns/by-hand")["state"] == "failed", "the failure")
    instance = api.get(f"/dags/{demo.JOB}/dagRuns/by-hand/taskInstances/discover")
    assert instance["try_number"] == 1, "what a person has to mend is not tried again"
    assert "Nothing to read at s3://reviews/inbox/none.jsonl" in demo._failed_log(api, "by-hand")


def put_reviews(stack: Stack, key: str, count: int, seed: int) -> None:
    s3_client(stack).put_object(Bucket="reviews", Key=key, Body=b"".join(line + b"\n" for line in reviews(count, seed=seed)))


def runs_of(api: AirflowApi, dag: str, kind: str) -> list[dict[str, Any]]:
    return [run for run in api.get(f"/dags/{dag}/dagRuns", limit="100")["dag_runs"] if run["run_type"] == kind]


def tasks_of(api: AirflowApi, dag: str, run: str) -> dict[str, str]:
    found = api.get(f"/dags/{dag}/dagRuns/{quote(run)}/taskInstances", limit="100")["task_instances"]
    return {each["task_id"]: each["state"] for each in found}


def requests_billed(stack: Stack) -> int:
    return int(provider(stack, "GET", "/rehearsal/bill")["requests"])


def backfill(stack: Stack, api: AirflowApi, *options: str) -> list[dict[str, Any]]:
    """`airflow backfill create` over some days; the runs, once the backfill is done."""
    before = {each["id"] for each in api.get("/backfills", dag_id="nightly")["backfills"]}
    dates = ("--from-date", "2026-10-01", "--to-date", f"2026-10-{DAYS:02d}", "--max-active-runs", "16")
    command = [str(Path(sys.executable).parent / "airflow"), "backfill", "create", "--dag-id", "nightly", *dates, *options]
    env = airflow_env(stack, Path(stack.folder) / "house" / "jobs")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def is_done() -> bool:
        [new] = [each for each in api.get("/backfills", dag_id="nightly")["backfills"] if each["id"] not in before]
        return new["completed_at"] is not None

    until(is_done, "the end of the backfill", 400)
    return runs_of(api, "nightly", "backfill")


def test_a_backfill_over_many_intervals_done_twice_pays_once(stack, api):
    for day in FULL_DAYS:
        put_reviews(stack, f"nightly/dt=2026-10-{day:02d}/a.jsonl", 20, seed=day)
    before = requests_billed(stack)
    first = backfill(stack, api)
    assert (len(first), {run["state"] for run in first}) == (DAYS, {"success"})
    assert requests_billed(stack) - before > 10 * len(FULL_DAYS)
    manifests = s3_client(stack).list_objects_v2(Bucket="nightshift", Prefix="store/results/nightly/")["Contents"]
    assert sorted(found["Key"].split("/")[3] for found in manifests if found["Key"].endswith("_manifest.json")) == [
        f"dt=2026-10-{day:02d}" for day in FULL_DAYS
    ]
    paid = requests_billed(stack)
    second = backfill(stack, api, "--reprocess-behavior", "completed", "--run-backwards")
    assert {run["state"] for run in second} == {"success"}
    assert requests_billed(stack) == paid, "intervals with unchanged inputs cost nothing"
    made = tasks_of(api, "nightly", "backfill__2026-10-02T00:00:00+00:00")
    assert made["discover"] == made["plan"] == "skipped", "what was made of the same is not made again"


def test_F01_events_start_one_run_per_upload_that_is_named_for_it_and_links_to_it(stack, api):
    for number in range(3):
        put_reviews(stack, f"heard/file {number}+é.jsonl", 5, seed=100 + number)
    put_reviews(stack, "heard/file 0+é.jsonl", 5, seed=100)  # the same again: another event, no other upload
    until(lambda: len(runs_of(api, "heard", "operator_triggered")) == 3, "three runs")
    until(lambda: {run["state"] for run in runs_of(api, "heard", "operator_triggered")} == {"success"}, "their end")
    runs = sorted(runs_of(api, "heard", "operator_triggered"), key=lambda run: run["dag_run_id"])
    assert [run["dag_run_id"].rpartition("__")[0] for run in runs] == [f"upload__file-{number}-.jsonl" for number in range(3)]
    assert "s3://reviews/heard/file 0+é.jsonl" in runs[0]["note"]
    assert any(run["state"] == "success" for run in runs_of(api, "upload_events", "asset_triggered"))
    events = api.get("/assets/events", order_by="-timestamp", limit="100")["asset_events"]
    published = [event["extra"] for event in events if event["name"] == "heard_results"]
    assert len(published) == 3
    assert all(extra["rows"] and extra["cost_usd"] and extra["partition"].startswith("input=file-") for extra in published)
    keys = [event["partition_key"] for event in events if event["name"] == "heard_partitions"]
    assert sorted(keys) == sorted(extra["partition"] for extra in published)


def test_uploads_are_backfilled_and_what_was_answered_costs_nothing(stack, api):
    before, labels = requests_billed(stack), {run["dag_run_id"] for run in runs_of(api, "heard", "operator_triggered")}
    conf = {"job": "heard", "prefix": "s3://reviews/heard/file 1", "reprocess": "all", "newest_first": True}
    api.call("POST", "/dags/backfill_uploads/dagRuns", {"logical_date": None, "dag_run_id": "again", "conf": conf})
    until(lambda: api.get("/dags/backfill_uploads/dagRuns/again")["state"] in ("success", "failed"), "the end of the backfill")
    assert api.get("/dags/backfill_uploads/dagRuns/again")["state"] == "success"
    assert {run["dag_run_id"] for run in runs_of(api, "heard", "operator_triggered")} == labels, "its run begins anew, and is no other one"
    [cleared] = [label for label in labels if label.startswith("upload__file-1-")]
    assert api.get(f"/dags/heard/dagRuns/{cleared}/taskInstances/discover")["try_number"] == 2
    assert requests_billed(stack) == before


def test_a_run_that_is_late_is_told_while_it_is_and_when_it_has_failed(stack, api, chat):
    put_reviews(stack, "late/a.jsonl", 20, seed=300)
    pace = {"validating": 0.1, "running": 600.0, "finalizing": 0.1, "cancelling": 0.5}
    provider(stack, "PUT", "/rehearsal/pace", pace)
    try:
        api.call("POST", "/dags/late/dagRuns", {"logical_date": None, "dag_run_id": "slow", "conf": {}})
        until(lambda: [text for text in chat[1] if text.startswith("late is not done after 0.01 hours: slow")], "the deadline alert")
        until(lambda: [text for text in chat[1] if text.startswith("late held: ")], "the notice of its end")
    finally:
        provider(stack, "PUT", "/rehearsal/pace", {**pace, "running": 1.0})
    [held] = [text for text in chat[1] if text.startswith("late held: ")]
    assert "Next: look at the report" in held
    assert api.get("/dags/late/dagRuns/slow")["state"] in ("running", "failed")


def test_a_form_refuses_what_does_not_fit(stack, api):
    for conf in ({"model": "gpt-of-tomorrow"}, {"sample": 0}, {"input": "reviews.csv"}, {"prompt": "not a version"}, {"outcomes": ["x"]}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            api.call("POST", "/dags/careful/dagRuns", {"logical_date": None, "conf": conf})
        assert refused.value.code in (400, 422), conf


@pytest.fixture
def page(stack: Stack) -> Iterator[Page]:
    """A browser that is signed in to the UI."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on the PATH: make test installs Debian's where it may")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_context(viewport={"width": 1500, "height": 1600}).new_page()
        opened.set_default_timeout(60_000)
        opened.goto(f"{stack.airflow}/auth/login")
        opened.fill("input[name=username]", "admin")
        opened.fill("input[name=password]", stack.password)
        opened.click("button[type=submit]")
        opened.wait_for_url(lambda url: "login" not in url)
        yield opened
        browser.close()


def pick_day(page: Page, place: int, day: str) -> None:
    """Fill in one of the dates of a form."""
    page.get_by_test_id("datetime-input").nth(place).click()
    for name, text in (("YYYY/MM/DD", day), ("HH:mm", "00:00")):
        page.get_by_placeholder(name).last.fill(text)
        page.get_by_placeholder(name).last.press("Enter")
    page.get_by_test_id("datetime-input").nth(place).click()


def test_a_person_triggers_approves_and_backfills_in_the_browser(stack, api, page):
    for day in (1, 2):
        put_reviews(stack, f"careful/dt=2026-10-{day:02d}/a.jsonl", 20, seed=200 + day)

    page.goto(f"{stack.airflow}/dags/careful")  # a dry run by hand: planned, and nothing sent
    page.get_by_role("button", name="Trigger").first.click()
    dialog = page.get_by_role("dialog")
    dialog.locator("#element_input").fill("s3://reviews/careful/dt=2026-10-01/a.jsonl")
    dialog.locator("input[name=element_dry_run]").locator("xpath=..").click()
    before = requests_billed(stack)
    dialog.get_by_role("button", name="Trigger").click()
    [run] = until(lambda: runs_of(api, "careful", "manual"), "the run")
    until(lambda: api.get(f"/dags/careful/dagRuns/{quote(run['dag_run_id'])}")["state"] == "success", "the end of the dry run")
    tasks = tasks_of(api, "careful", run["dag_run_id"])
    assert (tasks["plan"], tasks["approve"], tasks["publish"], tasks["report"]) == ("success", "skipped", "skipped", "success")
    assert requests_billed(stack) == before

    page.goto(f"{stack.airflow}/dags/careful")  # a backfill of two days, which asks once
    page.get_by_role("button", name="Trigger").first.click()
    dialog.get_by_text("Backfill", exact=True).click()
    pick_day(page, 0, "2026/10/01")
    pick_day(page, 1, "2026/10/02")
    dialog.locator("input[name=max_active_runs]").fill("2")
    page.get_by_role("button", name="Run Backfill").click()

    def asked() -> list[dict[str, Any]]:
        return list(api.get("/dags/~/dagRuns/~/hitlDetails")["hitl_details"])

    until(lambda: {tasks_of(api, "careful", run["dag_run_id"]).get("approve") for run in runs_of(api, "careful", "backfill")} == {"awaiting_input", "deferred"}, "one question, and who waits for its answer")  # fmt: skip
    [question] = [each for each in asked() if not each.get("response_received")]
    assert "estimated cost" in question["body"]
    instance = question["task_instance"]
    way = f"/dags/careful/dagRuns/{quote(instance['dag_run_id'])}/taskInstances/approve/-1/hitlDetails"
    api.call("PATCH", way, {"chosen_options": ["Approve"], "params_input": {"up_to_usd": -1, "note": ""}})
    until(lambda: [each for each in asked() if not each.get("response_received")], "it asks again")
    page.goto(f"{stack.airflow}/required_actions")
    page.get_by_role("link", name="of careful to gpt-5.4-nano?").first.click()
    page.get_by_role("button", name="Approve").click()
    until(lambda: {run["state"] for run in runs_of(api, "careful", "backfill")} == {"success"}, "the end of the backfill")
    assert len([each for each in asked() if "careful" in each["subject"]]) == 1, "it asked once"
    assert requests_billed(stack) > before

    page.goto(f"{stack.airflow}/dags/careful/plugin/nightshift_runs")  # what they have cost, in a tab
    shown = page.frame_locator("iframe")
    shown.get_by_text("cost so far").wait_for()
    assert shown.get_by_text("approved by admin").count() == 2
    finished = runs_of(api, "careful", "backfill")[0]["dag_run_id"]
    page.goto(f"{stack.airflow}/dags/careful/runs/{quote(finished)}/plugin/nightshift")
    page.frame_locator("iframe").get_by_text("What became of every row").wait_for()


def test_a_part_that_does_not_start_is_told_with_its_log(tmp_path):
    with pytest.raises(StackFailed, match="provider ended while starting"):
        up(tmp_path, rehearse=("--fault", "nonsense=1"), say=lambda part: None)

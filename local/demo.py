"""`make demo`: a sample of hotel reviews is uploaded to S3, Airflow's sensor picks it up, and a published dataset and a
report come out. Fails loudly, with the log of the task that failed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from local.airflow_api import AirflowApi
from local.sample import write_sample
from local.stack import ROOT, USER, Stack, StackFailed, airflow_api, client_env, down, is_up, s3_client, up
from nightshift.shapes import Summary
from nightshift.terminal import show_summary

JOB = "review_sentiment"
PATIENCE_SECONDS = 600
ENDED = ("success", "failed", "skipped", "upstream_failed", "removed")
console = Console(highlight=False)


class DemoFailed(Exception):
    """The run did not end as it should."""


def main() -> None:
    """The whole demonstration; exit code 0 only when everything that it shows is true."""
    folder = ROOT / ".nightshift"
    was_up = is_up(folder)
    started = time.monotonic()
    try:
        stack = _start(folder)
        run(stack)
        console.print(f"\nThe whole demo took {time.monotonic() - started:.0f} s.", end=" ")
    except (DemoFailed, StackFailed) as error:
        console.print(f"\n[bold red]The demo failed.[/] {error}", soft_wrap=True)
        sys.exit(1)
    finally:
        if not was_up:
            down(folder)
    console.print("Look around in the same stack with [bold]make up[/]; a second [bold]make demo[/] spends nothing.")


def run(stack: Stack) -> Summary:
    """Upload, watch, check, show."""
    bill_before = _bill(stack)
    key = f"inbox/reviews-{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"
    sample = write_sample(Path(stack.folder) / "reviews-sample.jsonl")
    s3_client(stack).upload_file(str(sample), "reviews", key)
    console.print(f"Uploaded {sum(1 for _ in sample.open('rb')):,} reviews to s3://reviews/{key}")
    api = airflow_api(stack)
    run_id = _watch(stack, api, key)
    summary, page = _fetch(stack, api, run_id)
    console.print()
    show_summary(summary, console)
    console.print(f"          a copy for your browser: {os.path.relpath(page)}", soft_wrap=True)
    _check(summary, bill_before, _bill(stack))
    return summary


def _start(folder: Path) -> Stack:
    if is_up(folder):
        console.print("Using the stack that is up.")
    with console.status("Starting the local stack") as status:
        stack = up(folder, say=lambda part: status.update(f"Starting {part}"))
    console.print(
        f"Local stack: S3 {stack.aws}, rehearsal provider {stack.provider}, Airflow {stack.airflow} ({USER} / {stack.password})",
        soft_wrap=True,
    )
    return stack


def _watch(stack: Stack, api: AirflowApi, key: str) -> str:
    """Progress bars until the run of this upload has ended; its id. Raises DemoFailed with the failed task's log."""
    columns = (SpinnerColumn(), TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    deadline = time.monotonic() + PATIENCE_SECONDS
    with Progress(*columns, console=console) as progress:
        arrival = progress.add_task("sensor picks the upload up", total=1)
        tasks, requests = progress.add_task("Airflow tasks", total=None), progress.add_task("requests at the provider", total=None)
        earlier = {batch["id"] for batch in _batches(stack)}
        while time.monotonic() < deadline:
            found = _run_of(api, key)
            if found:
                progress.update(arrival, completed=1)
                instances = api.get(f"/dags/{JOB}/dagRuns/{found['dag_run_id']}/taskInstances", limit="200")["task_instances"]
                done = sum(1 for each in instances if each["state"] in ENDED)
                progress.update(tasks, completed=done, total=len(instances))
                counts = [batch["request_counts"] for batch in _batches(stack) if batch["id"] not in earlier]
                if counts:
                    progress.update(
                        requests, completed=sum(c["completed"] + c["failed"] for c in counts), total=sum(c["total"] for c in counts) or None
                    )
                if found["state"] in ("success", "failed"):
                    if not counts:
                        progress.update(requests, completed=0, total=0, description="no request had to be sent")
                    break
            time.sleep(1.0)
        else:
            raise DemoFailed(f"No run of {JOB} has ended after {PATIENCE_SECONDS} s. Logs: {stack.folder}/*.log")
    if found["state"] != "success":
        raise DemoFailed(_failed_log(api, found["dag_run_id"]))
    return str(found["dag_run_id"])


def _run_of(api: AirflowApi, key: str) -> dict[str, Any] | None:
    runs = api.get(f"/dags/{JOB}/dagRuns", order_by="-run_after", limit="20")["dag_runs"]
    return next((each for each in runs if any(upload["uri"].endswith(key) for upload in (each["conf"] or {}).get("uploads", ()))), None)


def _failed_log(api: AirflowApi, run_id: str) -> str:
    """The log of the first task that failed."""
    instances = api.get(f"/dags/{JOB}/dagRuns/{run_id}/taskInstances", limit="200")["task_instances"]
    failed = [each for each in instances if each["state"] == "failed"]
    if not failed:
        return f"Run {run_id} failed without a failed task."
    task = failed[0]
    path = f"/dags/{JOB}/dagRuns/{run_id}/taskInstances/{task['task_id']}/logs/{max(task['try_number'], 1)}"
    content = api.get(path, map_index=str(task["map_index"]), full_content="true")["content"]
    lines = [line for each in content for line in _log_lines(each)]
    return f"Task {task['task_id']} of run {run_id} failed. Its log ends with:\n" + "\n".join(lines[-40:])


def _log_lines(entry: Any) -> list[str]:
    """One entry of a task log, with its exception."""
    if not isinstance(entry, dict):
        return [str(entry)]
    errors = [f"{error.get('exc_type')}: {error.get('exc_value')}" for error in entry.get("error_detail") or []]
    return [str(entry.get("event", "")), *errors]


def _fetch(stack: Stack, api: AirflowApi, run_id: str, job: str = JOB) -> tuple[Summary, Path]:
    """The run's summary from the store, and a local copy of its report."""
    uri = api.get(f"/dags/{job}/dagRuns/{run_id}/taskInstances/discover/xcomEntries/return_value")["value"]
    prefix = str(uri).removeprefix("s3://nightshift/")
    client = s3_client(stack)
    summary = Summary.model_validate_json(client.get_object(Bucket="nightshift", Key=f"{prefix}/summary.json")["Body"].read())
    page = Path(stack.folder) / "report.html"
    client.download_file("nightshift", f"{prefix}/report.html", str(page))
    return summary, page


def _check(summary: Summary, before: dict[str, Any], after: dict[str, Any]) -> None:
    """The demo only succeeds when the provider's bill says the same as the report."""
    billed, dollars = after["requests"] - before["requests"], after["usd"] - before["usd"]
    twice = after["requests"] - after["unique_requests"]
    charged = f"{billed:,} requests, ${dollars:.4f}: what the rehearsal provider charged"
    console.print(f"bill      {charged}; {twice} paid twice, ever", soft_wrap=True)
    if not summary.published or sum(summary.outcomes.values()) != summary.rows:
        raise DemoFailed(f"The run is {summary.state} and its outcomes add up to {sum(summary.outcomes.values())} of {summary.rows} rows.")
    if billed != summary.requests.submitted or after["requests"] != after["unique_requests"]:
        raise DemoFailed(f"The provider billed {billed} requests, the report says {summary.requests.submitted}.")
    if summary.cost_usd.actual is None or abs(summary.cost_usd.actual - dollars) > 0.000_01:
        raise DemoFailed(f"The provider billed ${dollars:.6f}, the report says {summary.cost_usd.actual}.")


def _bill(stack: Stack) -> dict[str, Any]:
    return dict(_provider(stack, "/rehearsal/bill"))


def _batches(stack: Stack) -> list[dict[str, Any]]:
    return list(_provider(stack, "/v1/batches?limit=100")["data"])


def _provider(stack: Stack, path: str) -> Any:
    key = client_env(stack)["OPENAI_API_KEY"]
    request = urllib.request.Request(f"{stack.provider}{path}", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.loads(response.read())


if __name__ == "__main__":
    main()

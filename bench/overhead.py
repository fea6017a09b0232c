"""What Nightshift and Airflow add to a run whose provider answers at once: `python -m bench.overhead`.

The same number of tasks, in the same order, as Nightshift's DAG and as a DAG written by hand whose tasks do nothing; both in the
same Airflow, in turn. The difference is what Nightshift's own work costs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import yaml

from bench.__main__ import FOLDER
from bench.scale import until_up
from bench.watch import Watch
from local.airflow_api import AirflowApi
from local.sample import reviews
from local.stack import ROOT, Stack, airflow_api, down, reserve, s3_client, up
from tests.airflow.jobs import job

MINIMAL = """
from airflow.sdk import dag, task, task_group


@dag(schedule=None, dag_id="minimal")
def minimal():
    @task
    def discover(): return "uri"

    @task
    def plan(uri): return uri

    @task
    def approve(uri): return ["shard"] * {shards}

    @task
    def submit(shard): return shard

    @task
    def wait(shard): return shard

    @task
    def collect(shard): return shard

    @task
    def step(given): return "done"

    @task_group
    def shard(key): return collect(wait(submit(key)))

    settled = shard.expand(key=approve(plan(discover())))
    given = step.override(task_id="assemble")(settled)
    for name in ("audit", "publish", "report"):
        given = step.override(task_id=name)(given)


minimal()
"""


def start(rows: int, shards: int) -> Stack:
    """A stack with both DAGs, and the rows in its S3."""
    folder = (FOLDER / "overhead").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    dags, jobs = folder / "dags", folder / "house" / "jobs"
    for made in (dags, jobs):
        made.mkdir(parents=True)
    for name in ("prompts", "schemas"):
        shutil.copytree(ROOT / "include" / name, folder / "house" / name)
    shutil.copy(ROOT / "dags" / "jobs.py", dags)
    (dags / "minimal.py").write_text(MINIMAL.replace("{shards}", str(shards)))
    policy = {"max_requests_per_shard": -(-rows // shards)}
    (jobs / "wide.yaml").write_text(yaml.safe_dump(job("wide", {"input": {"uri": "s3://reviews/wide/*.jsonl"}, "policy": policy})))
    reserve(folder)
    stack = up(folder, jobs=jobs, extra={"AIRFLOW__CORE__DAGS_FOLDER": str(dags), "NIGHTSHIFT_POLL_SECONDS": "1"})
    answer_at_once(stack)
    s3_client(stack).put_object(Bucket="reviews", Key="wide/a.jsonl", Body=b"".join(line + b"\n" for line in reviews(rows, seed=1)))
    return stack


def answer_at_once(stack: Stack) -> None:
    """Put a provider in the place of the stack's own that does not read what it answers: reading takes it a millisecond a request."""
    os.killpg(stack.pids["provider"], signal.SIGKILL)
    command = [sys.executable, "-m", "bench.scale", "0", "--serve", str(stack.provider_port)]
    stack.pids["provider"] = subprocess.Popen(command, start_new_session=True).pid
    stack.save()
    until_up(stack.provider)


def took(api: AirflowApi, dag: str, name: str, conf: dict[str, object]) -> tuple[float, int]:
    """Seconds from the start of a run to its end, as Airflow counts them, and how many tasks it had."""
    api.call("POST", f"/dags/{dag}/dagRuns", {"logical_date": None, "dag_run_id": name, "conf": conf})
    while (run := api.get(f"/dags/{dag}/dagRuns/{name}"))["state"] not in ("success", "failed"):
        time.sleep(0.5)
    if run["state"] != "success":
        raise SystemExit(f"{dag} {name} failed: see {FOLDER}/overhead/airflow.log")
    begun, ended = (datetime.fromisoformat(run[key].replace("Z", "+00:00")) for key in ("start_date", "end_date"))
    tasks = api.get(f"/dags/{dag}/dagRuns/{name}/taskInstances", limit="1000")["total_entries"]
    return (ended - begun).total_seconds(), tasks


def main() -> None:
    """Run both in turn, and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without the DAG by hand: with a thousand shards it does not come to its end")
    given = parser.parse_args()
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    stack = start(given.rows, given.shards)
    try:
        api = airflow_api(stack)
        while {each["dag_id"] for each in api.get("/dags")["dags"]} != {"minimal", "wide"}:
            time.sleep(1)
        watch = Watch(stack.pids["airflow"])
        seconds: dict[str, list[float]] = {"minimal": [], "wide": []}
        tasks: dict[str, int] = {}
        turn: list[tuple[str, dict[str, object]]] = [("minimal", {}), ("wide", {"fresh": True})]
        for number in range(given.rounds):
            for dag, conf in turn[1:] if given.alone else turn:
                before = watch.cpu()
                found, tasks[dag] = took(api, dag, f"round-{number}", conf)
                seconds[dag].append(found)
                spent = ", ".join(f"{part} {each:.1f}" for part, each in (watch.cpu() - before).items())
                print(f"  {dag}: {found:.1f} s, {tasks[dag]} tasks; CPU-s: {spent}", flush=True)
        if given.alone:
            return
        minimal, ours = (statistics.median(seconds[dag]) for dag in ("minimal", "wide"))
        print(f"| {given.rows:,} rows in {given.shards} shards | tasks | seconds, median |\n|---|---:|---:|")
        print(f"| a minimal DAG | {tasks['minimal']} | {minimal:.1f} |")
        print(f"| Nightshift | {tasks['wide']} | {ours:.1f} |")
        print(f"| ratio | | {ours / minimal:.2f} |")
    finally:
        down(Path(stack.folder))


if __name__ == "__main__":
    main()

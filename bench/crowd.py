"""What many waits at once cost Airflow: `python -m bench.crowd --waits 5000 --chains 64`.

A run of so many shards is planned and submitted by the product's own steps; then one DAG run waits for all of them in one
triggerer, as mapped tasks, each for a chain of shards. The provider keeps nothing but batches, counts what it is asked, and ends them all
on demand.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import uvicorn
import yaml
from airflow.triggers.base import StartTriggerArgs, TriggerEvent
from fastapi import FastAPI, Request
from fastapi.responses import Response

from bench.__main__ import FOLDER
from bench.scale import until_up
from bench.watch import Watch
from local.airflow_api import AirflowApi
from local.stack import KEY, Stack, airflow_api, client_env, down, reserve, up
from nightshift.drive import begin
from nightshift.job_file import load_job
from nightshift.local_site import local_site
from nightshift.rehearsal.served import free_port
from nightshift.runs import approved_plan
from nightshift.settings import read_settings
from nightshift.steps.approve import approve
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from nightshift_airflow.chains import chains
from nightshift_airflow.shards import WaitForShards
from nightshift_airflow.site import run_at
from nightshift_airflow.waits import ChainTrigger
from tests.airflow.jobs import ROOT, job

DAG = """
from pathlib import Path

from airflow.sdk import dag, task

from bench.crowd import WaitInCrowd


@dag(schedule=None, dag_id="crowd")
def crowd():
    @task
    def discover(): return Path({run!r}).read_text()

    @task
    def places(run_uri): return list(range({width}))

    run_uri = discover()
    WaitInCrowd.partial(task_id="wait", run_uri=run_uri).expand(chain=places(run_uri))


crowd()
"""
STEADY_SECONDS = 120


@cache
def _chains(run_uri: str) -> list[str]:
    _, run = run_at(run_uri, "triggerer")
    return chains(approved_plan(run).shards, read_settings().width)


class TriggerInCrowd(ChainTrigger):
    """The product's trigger; its chain is given by its place among the chains of the run."""

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """See ChainTrigger."""
        self.chain = (await asyncio.to_thread(_chains, self.run_uri))[int(self.chain)]
        async for event in super().run():
            yield event


class WaitInCrowd(WaitForShards):
    """The product's wait, for a run whose shards no task has submitted."""

    start_trigger_args = StartTriggerArgs(
        trigger_cls="bench.crowd.TriggerInCrowd",
        trigger_kwargs={
            "run_uri": "{{ ti.xcom_pull(task_ids='discover', map_indexes=-1) }}",
            "chain": "{{ ti.map_index }}",
            "ends_task": True,
        },
        next_method="execute_complete",
    )


def provider() -> FastAPI:
    """Batches that run until they are told to end."""
    app, batches, asked = FastAPI(), dict[str, dict[str, Any]](), Counter[str]()
    ended: list[float] = []

    def shown(batch: dict[str, Any]) -> dict[str, Any]:
        status = {"status": "failed", "failed_at": int(ended[0])} if ended else {"status": "in_progress"}
        return {**batch, **status}

    def answer(body: Any) -> Response:
        return Response(orjson.dumps(body), media_type="application/json")

    @app.get("/asked")
    def told() -> Response:
        return answer(asked)

    @app.post("/end")
    def end() -> Response:
        ended.append(time.time())
        return answer({})

    @app.get("/v1/models/{name}")
    def known(name: str) -> Response:
        return answer({"id": name, "object": "model", "created": 0, "owned_by": "bench"})

    @app.post("/v1/files")
    def upload() -> Response:
        return answer({"id": "file-1", "object": "file", "bytes": 1, "created_at": 0, "filename": "a", "purpose": "batch", "status": "ok"})

    @app.post("/v1/batches")
    async def create(request: Request) -> Response:
        body = orjson.loads(await request.body())
        name = f"batch_{len(batches)}"
        batches[name] = {"id": name, "object": "batch", "created_at": int(time.time()), "request_counts": None, **body}
        return answer(shown(batches[name]))

    @app.get("/v1/batches")
    def listed(after: str | None = None, limit: int = 20) -> Response:
        asked["pages of lists"] += 1
        names = list(batches)[::-1]
        begin = names.index(after) + 1 if after else 0
        page = [shown(batches[name]) for name in names[begin : begin + limit]]
        return answer({"object": "list", "data": page, "has_more": begin + limit < len(names)})

    @app.get("/v1/batches/{name}")
    def retrieve(name: str) -> Response:
        asked["looks at one batch"] += 1
        return answer(shown(batches[name]))

    return app


def hand_in(folder: Path, waits: int) -> None:
    """Plan a run of so many shards and submit them all; run in the environment of the stack."""
    found = load_job(folder / "house" / "jobs" / "crowd.yaml")
    site = local_site(read_settings(), f"file://{folder}/store")
    run = begin(site, found, pattern=f"file://{folder}/rows.jsonl", dates={}, scheduled=False)
    approved = approve(site, run, plan(site, run), ask=lambda: True)
    if len(approved.shards) != waits:
        raise SystemExit(f"{len(approved.shards)} shards, wanted {waits}")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda shard: submit(site, run, shard), approved.shards))
    (folder / "run").write_text(run.uri)


def start(folder: Path, waits: int, width: int, port: int) -> Stack:
    """The provider, a stack that knows it, and the run's shards submitted to it."""
    dags, jobs = folder / "dags", folder / "house" / "jobs"
    for made in (dags, jobs, folder / "store"):
        made.mkdir(parents=True)
    for name in ("prompts", "schemas"):
        shutil.copytree(ROOT / "include" / name, folder / "house" / name)
    (dags / "crowd.py").write_text(DAG.format(run=str(folder / "run"), width=width))
    spec = job("crowd", {"input": {"uri": f"file://{folder}/rows.jsonl"}, "policy": {"max_requests_per_shard": 1}})
    (jobs / "crowd.yaml").write_text(yaml.safe_dump(spec))
    rows = ({"review_id": f"r{i}", "hotel_id": "h", "text": f"Room {i} was lovely."} for i in range(waits))
    (folder / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    stack = reserve(folder)
    own = {"NIGHTSHIFT_STORE": f"file://{folder}/store", "NIGHTSHIFT_POLL_SECONDS": "30", "NIGHTSHIFT_WIDTH": str(width)}
    url = f"http://127.0.0.1:{port}/v1"
    until_up(f"http://127.0.0.1:{port}")
    env = {**client_env(stack), **own, "OPENAI_BASE_URL": url}
    subprocess.run([sys.executable, "-m", "bench.crowd", "--hand-in", str(folder), "--waits", str(waits)], env=env, check=True)
    airflow = {
        **own,
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__TRIGGERER__CAPACITY": str(width),
        "AIRFLOW_CONN_OPENAI_DEFAULT": json.dumps({"conn_type": "openai", "host": url, "password": KEY}),
        "PYTHONPATH": str(ROOT),
    }
    return up(folder, jobs=jobs, extra=airflow)


def states(api: AirflowApi) -> Counter[str]:
    """How many chains are in which state."""
    seen = Counter[str]()
    for state in ("deferred", "success", "failed"):
        found = api.get("/dags/crowd/dagRuns/crowd/taskInstances", task_id="wait", state=state, limit="1")
        seen[state] = found["total_entries"]
    return seen


def main() -> None:
    """Hand in, wait, look, end; print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waits", type=int, default=1000)
    parser.add_argument("--chains", type=int, help="that share them; one each, where nothing is said")
    parser.add_argument("--hand-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        uvicorn.run(provider(), host="127.0.0.1", port=given.serve, log_level="critical")
        return
    if given.hand_in:
        hand_in(given.hand_in, given.waits)
        return
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    folder = (FOLDER / f"crowd-{given.waits}").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    port = free_port()
    serving = subprocess.Popen([sys.executable, "-m", "bench.crowd", "--serve", str(port)])
    try:
        width = given.chains or given.waits
        look(start(folder, given.waits, width, port), given.waits, width, f"http://127.0.0.1:{port}")
    finally:
        down(folder)
        serving.terminate()


def look(stack: Stack, waits: int, width: int, url: str) -> None:
    """Let all wait at once, watch them for a while, end them, and print a table."""
    api, watch = airflow_api(stack), Watch(stack.pids["airflow"])
    while "crowd" not in {each["dag_id"] for each in api.get("/dags")["dags"]}:
        time.sleep(1)

    def asked() -> Counter[str]:
        with urllib.request.urlopen(f"{url}/asked", timeout=60) as answer:
            return Counter(json.load(answer))

    def until(name: str, done: Any) -> None:
        begun, before = time.monotonic(), watch.cpu()
        while not done():
            if failed := states(api)["failed"]:
                sys.exit(f"{failed} chains have failed: see the logs of the stack")
            time.sleep(2)
        took = time.monotonic() - begun
        spent = watch.cpu() - before
        print(f"| {name} | {took:.0f} | " + " | ".join(f"{spent[part]:.1f}" for part in Watch.parts) + " |", flush=True)

    print(f"| {waits:,} waits in {width:,} chains | wall s | CPU-s scheduler | triggerer | API server |\n|---|---:|---:|---:|---:|")
    before = asked()
    api.call("POST", "/dags/crowd/dagRuns", {"logical_date": None, "dag_run_id": "crowd", "conf": {}})
    until("all are deferred", lambda: states(api)["deferred"] == width)
    until("each has looked once", lambda: (asked() - before)["looks at one batch"] >= waits)
    time.sleep(60)
    before, start = asked(), time.monotonic()
    until(f"{STEADY_SECONDS} s of waiting", lambda: time.monotonic() - start > STEADY_SECONDS)
    calls = asked() - before
    memory = watch.memory()
    urllib.request.urlopen(f"{url}/end", b"", timeout=60).close()
    until("all have ended", lambda: states(api)["success"] == width)
    print(f"MB of the largest process: {dict(memory)}; calls in {STEADY_SECONDS} s of waiting: {dict(calls)}")


if __name__ == "__main__":
    main()

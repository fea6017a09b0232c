"""A real Airflow whose parts are killed while a job runs: task processes, triggerer and scheduler, each time started again.

What a supervisor does in production is done here: a part that died is started anew. The tasks are retried by Airflow.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from local.airflow_api import AirflowApi
from local.sample import reviews
from local.stack import KEY, ROOT, Stack, airflow_api, airflow_env, down, s3_client, tail, up
from nightshift.shapes import Summary

JOB, ROWS, SHARD = "review_sentiment", 400, 60
PATIENCE_SECONDS = 900
PARTS = {
    "scheduler": re.compile("airflow scheduler"),
    "triggerer": re.compile("airflow triggerer"),
    "task": re.compile("airflow worker -- (LocalExecutor: )?[0-9a-f]"),  # the worker, and what it has forked for the task
}
ORDER = ("task", "triggerer", "task", "scheduler")
# A task whose process is gone is found by its missing heartbeat; the defaults (300 s) suit long tasks, not a rehearsal.
QUICK = {
    "NIGHTSHIFT_WIDTH": "2",  # so that several shards share the task that dies
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "15",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "20",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "10",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "15",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "10",
}


def kill_airflow(kills: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run a job of several shards under Airflow, kill its parts one after the other, and judge by the bill."""
    draw = random.Random(seed)
    with TemporaryDirectory(prefix="nightshift-chaos-airflow-") as folder:
        jobs = _jobs(Path(folder) / "jobs")
        stack = up(Path(folder) / "stack", jobs=jobs, say=say, extra=QUICK)
        env = {**airflow_env(stack, jobs), **QUICK}
        try:
            _call(stack, "PUT", "/rehearsal/pace", {"validating": 1.0, "running": 12.0, "finalizing": 0.5})
            _call(stack, "PUT", "/rehearsal/faults", {"errored_once": 0.2, "create_500_after_accept": 1})
            api, run = airflow_api(stack), _begin(stack)
            with ExitStack() as restarted:
                deaths = _kill_parts(stack, api, run, env, kills, draw, say, restarted)
                state = _end(api, run, say)
            say(f"the run ended as {state} after {deaths} deaths")
            if not deaths:
                raise AssertionError("nothing was killed, so nothing was shown: have Airflow's processes other titles?")
            return _judge(stack, deaths, state)
        finally:
            down(Path(folder) / "stack")


def _jobs(folder: Path) -> Path:
    """The example job with small shards and no schedule."""
    folder.mkdir()
    text = (ROOT / "include" / "jobs" / f"{JOB}.yaml").read_text()
    text, replaced = re.subn(r"max_requests_per_shard: \d+", f"max_requests_per_shard: {SHARD}", text)
    assert replaced == 1
    for part in ("prompts", "schemas", "expectations"):
        (folder.parent / part).symlink_to(ROOT / "include" / part)
    (folder / f"{JOB}.yaml").write_text(text)
    return folder


def _begin(stack: Stack) -> str:
    data = b"".join(line + b"\n" for line in reviews(ROWS, seed=11))
    s3_client(stack).put_object(Bucket="reviews", Key="elsewhere/chaos.jsonl", Body=data)
    body = {"logical_date": None, "dag_run_id": "chaos", "conf": {"input": "s3://reviews/elsewhere/chaos.jsonl"}}
    airflow_api(stack).call("POST", f"/dags/{JOB}/dagRuns", body)
    return f"/dags/{JOB}/dagRuns/chaos"


def _kill_parts(
    stack: Stack,
    api: AirflowApi,
    run: str,
    env: Mapping[str, str],
    kills: int,
    draw: random.Random,
    say: Callable[[str], None],
    restarted: ExitStack,
) -> int:
    """Kill task processes whenever some run, and in between the triggerer and the scheduler; how many died."""
    deaths, victims, sessions = 0, [part for part, _ in zip(itertools.cycle(ORDER), range(kills), strict=False)], [stack.pids["airflow"]]
    deadline = time.monotonic() + PATIENCE_SECONDS / 2
    while victims and time.monotonic() < deadline and api.get(run)["state"] in ("queued", "running"):
        victim = victims[0]
        found = _processes(sessions, PARTS[victim])
        if (
            victim == "task"
        ):  # what a worker has forked: the task itself. A worker of the LocalExecutor that dies holding one is never missed
            found = [pid for pid in found if _parent(pid) in found]
        if not found:
            time.sleep(0.2)
            continue
        for pid in [draw.choice(found)] if victim == "task" else found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deaths += 1
        victims.pop(0)
        say(f"killed {victim} ({len(victims)} to come)")
        if victim != "task":
            process = _restart(stack, victim, env)
            sessions.append(process.pid)
            restarted.callback(_end_part, process)
        time.sleep(draw.uniform(3.0, 12.0))
    return deaths


def _processes(sessions: list[int], title: re.Pattern[str]) -> list[int]:
    """Processes of this stack (and of no other on the machine) whose title matches."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if title.search(command) and os.getsid(int(entry.name)) in sessions:
                    found.append(int(entry.name))
    return found


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _restart(stack: Stack, part: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """What systemd or Kubernetes would do."""
    with (Path(stack.folder) / f"{part}.log").open("ab") as log:
        command = [str(Path(sys.executable).parent / "airflow"), part]
        return subprocess.Popen(command, env=dict(env), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=ROOT)


def _end_part(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


def _end(api: AirflowApi, run: str, say: Callable[[str], None]) -> str:
    """Wait for the run's end; where retries were used up by the killing, a person clears the failed tasks, and so do we."""
    deadline, cleared = time.monotonic() + PATIENCE_SECONDS, 0
    while time.monotonic() < deadline:
        state = str(api.get(run)["state"])
        if state == "success" or (state == "failed" and cleared == 3):
            return state
        if state == "failed":
            cleared += 1
            say("the run failed; clearing its failed tasks")
            api.call("POST", f"{run}/clear", {"dry_run": False, "only_failed": True})
        time.sleep(2.0)
    return "stuck"


def _judge(stack: Stack, deaths: int, state: str) -> dict[str, Any]:
    bill = _call(stack, "GET", "/rehearsal/bill?by_request=true")
    store = s3_client(stack)
    known = {json.loads(_read(store, key))["batch_id"] for key in _keys(store, "store/shards/") if "/receipt-" in key}
    summaries = [Summary.model_validate_json(_read(store, key)) for key in _keys(store, "store/runs/") if key.endswith("/summary.json")]
    summary = summaries[0] if summaries and state == "success" else None
    paid_again = sum(times - 1 for times in bill["by_request"].values())
    rows = sum(summary.outcomes.values()) if summary else 0
    return {
        "crash_points": deaths,
        "duplicate_batches": sum(1 for line in bill["by_batch"] if line["batch_id"] not in known) + (paid_again > 0),
        "lost_rows": max(0, ROWS - rows),
        "double_outcomes": max(0, rows - ROWS),
        "torn_partitions": 0,
        "misbooked": 0,
        "stuck": int(state != "success"),
        "repeated_requests": 0,
        "bill_ratio": round(bill["requests"] / bill["unique_requests"], 4) if bill["unique_requests"] else None,
        "log": tail(Path(stack.folder), "airflow", 20) if state != "success" else None,
    }


def _keys(store: Any, prefix: str) -> list[str]:
    pages = store.get_paginator("list_objects_v2").paginate(Bucket="nightshift", Prefix=prefix)
    return [found["Key"] for page in pages for found in page.get("Contents", ())]


def _read(store: Any, key: str) -> bytes:
    return bytes(store.get_object(Bucket="nightshift", Key=key)["Body"].read())


def _call(stack: Stack, method: str, path: str, body: Any = None) -> Any:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{stack.provider}{path}", None if body is None else json.dumps(body).encode(), headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())

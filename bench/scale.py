"""A run of millions of rows from plan to publish against the rehearsal server, on one machine: `python -m bench.scale ROWS`.

Says of every stage how long it took, and of every process how much memory it had at most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import httpx2
import uvicorn

from bench import peak
from bench.__main__ import FOLDER, measured
from bench.steps import job_in, site_in
from nightshift.drive import Watcher, begin, drive
from nightshift.job import Job
from nightshift.providers.openai import OpenAIAccess, OpenAIBatches
from nightshift.rehearsal import model
from nightshift.rehearsal.engine import Pace
from nightshift.rehearsal.served import free_port
from nightshift.rehearsal.server import build_app
from nightshift.rehearsal.state import KEY

PACE = {"validating": 0.0, "running": 0.0, "finalizing": 0.0, "cancelling": 0.0}


def job(folder: Path) -> Job:
    """The benchmark's job, with a language that the rehearsal's model can name: it knows no regular expressions."""
    found = job_in(folder, "reviews")
    schema = dict(found.answer_schema or {})
    schema["properties"] = {**schema["properties"], "language": {"type": "string", "maxLength": 2}}
    suite = tuple(each for each in found.expectations if each.kwargs.get("column") != "language")
    return found.model_copy(update={"answer_schema": schema, "expectations": suite})


def serve(folder: Path, port: int) -> None:
    """The rehearsal server, with a model that does not read: what is measured is not a lexicon of sentiment."""
    model.compound = lambda text: zlib.crc32(text.encode()) / 2**31 - 1
    uvicorn.run(build_app(folder / "provider", key=KEY, pace=Pace(**PACE)), host="127.0.0.1", port=port, log_level="critical")


def go(folder: Path, url: str) -> None:
    """The run itself, in this process; a line for every stage and one for its end."""
    access = OpenAIAccess(base_url=f"{url}/v1", api_key=KEY)
    site = replace(site_in(folder), open_provider=lambda request: OpenAIBatches(request.endpoint, access), poll_seconds=2.0)
    run = begin(site, job(folder), pattern=f"file://{folder}/reviews.parquet", dates={}, scheduled=False)
    watcher = Watcher(stage=lambda name: print(json.dumps({"stage": name, "cpu": sum(os.times()[:2])}), flush=True))
    summary = drive(site, run, ask=lambda run, plan: True, watcher=watcher)
    told = {"rows": summary.rows, "outcomes": summary.outcomes, "state": summary.state, "submitted": summary.requests.submitted}
    print(json.dumps({"stage": "end", "cpu": sum(os.times()[:2]), **told}), flush=True)


def watch(folder: Path, rows: int) -> dict[str, object]:
    """Start the server and the run; what was seen of both."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "bench.scale", str(rows), "--serve", str(port)])
    try:
        until_up(url)
        run = subprocess.Popen([sys.executable, "-m", "bench.scale", str(rows), "--go", url], stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        start, stages, most = time.monotonic(), [], 0.0
        for line in run.stdout:
            most = max(most, peak(run.pid))
            stages.append({**json.loads(line), "at": round(time.monotonic() - start, 1), "mb": round(most)})
            print(f"  {stages[-1]}", file=sys.stderr, flush=True)
        if run.wait():
            raise subprocess.CalledProcessError(run.returncode, "the run")
        bill = httpx2.get(f"{url}/rehearsal/bill", timeout=300).json()
        return {
            "stages": stages,
            "server_mb": round(peak(server.pid)),
            "bill": {key: bill[key] for key in ("requests", "unique_requests", "usd")},
        }
    finally:
        server.terminate()
        server.wait(timeout=60)


def until_up(url: str, seconds: float = 60) -> None:
    """Wait for a server to answer, whatever it says. Raises what stands in the way in the end."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            httpx2.get(url)
            return
        except httpx2.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def table(stages: Sequence[dict[str, float]]) -> str:
    """Stages as Markdown: what each took, and the run's memory when it ended."""
    lines = ["| stage | wall s | CPU-s | MB at most so far |", "|---|---:|---:|---:|"]
    for begun, ended in itertools.pairwise(stages):
        lines.append(f"| {begun['stage']} | {ended['at'] - begun['at']:.0f} | {ended['cpu'] - begun['cpu']:.0f} | {ended['mb']} |")
    return "\n".join(lines)


def main() -> None:
    """Make the rows, let the run go, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int)
    parser.add_argument("--go", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = (FOLDER / f"scale-{given.rows}").resolve()
    if given.go:
        go(folder, given.go)
        return
    if given.serve:
        serve(folder, given.serve)
        return
    if not (folder / "reviews.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        measured([sys.executable, "-m", "bench.reviews", str(folder / "reviews.parquet"), str(given.rows)])
    seen = watch(folder, given.rows)
    print(table(seen["stages"]))  # type: ignore[arg-type]
    print(json.dumps({key: value for key, value in seen.items() if key != "stages"}))


if __name__ == "__main__":
    main()

"""The product's own steps, each as a process of its own: `python -m bench.steps STEP FOLDER`.

FOLDER holds the rows (`reviews.parquet`), the store and what the provider has answered. The provider takes batches and leaves
their results as files; everything else is what runs in a worker.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nightshift.arrow import keep_freed_memory, keep_pandas_out
from nightshift.drive import begin
from nightshift.encode import Encoder
from nightshift.formats import read_rows
from nightshift.job import Job
from nightshift.job_file import load_job
from nightshift.process import end_process
from nightshift.providers.forms import form_of
from nightshift.providers.protocol import Garbage, Limits, Order, Reply, Snapshot
from nightshift.providers.results import read_file
from nightshift.runs import Run, Site, approved_plan, load_run
from nightshift.shapes import Assembled, Plan, Receipt
from nightshift.steps.approve import approve
from nightshift.steps.collect import collect
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from nightshift.stores.objects import open_input, open_objects
from nightshift.stores.shards import request_keys

JOB = Path(__file__).with_name("job")
NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
ENDPOINT = "/v1/chat/completions"


class Files:
    """A provider whose batches are answered by files in a folder: `out-<shard>.jsonl` and `err-<shard>.jsonl`."""

    where = "files"

    def __init__(self, folder: Path) -> None:
        self._folder, self._form = folder, form_of(ENDPOINT)

    def limits(self, model: str) -> Limits:
        """OpenAI's."""
        return Limits(requests=50_000, request_bytes=200_000_000)

    def check(self, model: str) -> None:
        """See Provider."""

    def upload(self, token: str, path: Path) -> str:
        """See Provider."""
        return token

    def create(self, order: Order, may_send: Callable[[], bool]) -> Receipt:
        """See Provider."""
        return Receipt(batch_id=order.labels["shard"], token=order.token, created_at=NOON)

    def find(self, tokens: Sequence[str], since: datetime) -> Receipt | None:
        """See Provider."""
        return None

    def is_busy(self) -> bool:
        """See Provider."""
        return False

    def poll(self, batch_id: str, *, waiting: bool = False) -> Snapshot:
        """See Provider."""
        files = (f"out-{batch_id}.jsonl", f"err-{batch_id}.jsonl")
        return Snapshot(state="ended", status="completed", done=0, total=0, result_files=files, reasons=(), bad_lines={}, ended_at=NOON)

    def replies(self, snapshot: Snapshot, scratch: Path) -> Iterator[Reply | Garbage]:
        """See Provider."""
        for name in snapshot.result_files:
            with (self._folder / name).open("rb") as file:
                yield from read_file(self._form, file)

    def cancel(self, batch_id: str) -> None:
        """See Provider."""

    def clean(self, token: str, batch_id: str | None) -> None:
        """See Provider."""


def site_in(folder: Path, store: str | None = None) -> Site:
    """A site whose rows and answers are in one folder, and the store as well unless it is named."""
    provider: Any = Files(folder / "results")
    return Site(
        store=open_objects(store or f"file://{folder}/store"),
        open_input=open_input,
        open_provider=lambda request: provider,
        owner="bench",
        poll_seconds=0,
        scratch_folder=folder,
    )


def job_in(folder: Path, prompt: str) -> Job:
    """The benchmark's job over the rows of a folder; its prompt reads plain columns, or holds some logic."""
    job = load_job(JOB / "reviews.yaml")
    source = (JOB / f"{prompt}.md").read_text(encoding="utf-8")
    return job.model_copy(update={"prompt_source": source})


def run_in(folder: Path, prompt: str = "reviews", store: str | None = None) -> Run:
    """The run over the rows of a folder, begun or gone on with."""
    pattern = f"file://{folder}/reviews.parquet"
    return begin(site_in(folder, store), job_in(folder, prompt), pattern=pattern, dates={}, scheduled=False)


def do_plan(folder: Path, prompt: str = "reviews", store: str | None = None) -> dict[str, Any]:
    """Rows to frozen shards."""
    made = plan(site_in(folder, store), run_in(folder, prompt, store))
    return {"rows": made.rows, "unique": made.unique, "submitted": made.submitted, "reused": made.reused, "shards": len(made.shards)}


def do_encode(folder: Path) -> dict[str, Any]:
    """Rows to request lines with their keys, and nothing done with them."""
    job, count, size = job_in(folder, "reviews"), 0, 0
    encoder = Encoder(job)
    keep_pandas_out()
    keep_freed_memory()
    with (folder / "reviews.parquet").open("rb") as file:
        for rows in read_rows(file, "reviews.parquet", "parquet", None, job.columns):
            requests = encoder.encode(rows, {})
            count += len(requests.keys)
            size += len(encoder.lines(requests.keys, requests.tails))
    return {"requests": count, "bytes": size}


def do_known(folder: Path) -> dict[str, Any]:
    """Rows whose answers are all there already: the same question by another job."""
    job = job_in(folder, "reviews")
    policy = job.spec.policy.model_copy(update={"deadline_hours": 25})
    job = job.model_copy(update={"spec": job.spec.model_copy(update={"policy": policy})})
    site = site_in(folder)
    run = begin(site, job, pattern=f"file://{folder}/reviews.parquet", dates={}, scheduled=False)
    made = plan(site, run)
    (folder / "known").write_text(run.uri)
    return {"rows": made.rows, "reused": made.reused, "submitted": made.submitted}


def do_submit(folder: Path) -> dict[str, Any]:
    """Approve the plan, claim its shards, and let the provider answer them."""
    from bench.reviews import write_results

    site, run = site_in(folder), run_in(folder)
    approved = approve(site, run, plan(site, run), ask=lambda: True)
    results = folder / "results"
    results.mkdir(exist_ok=True)
    for shard in approved.shards:
        submit(site, run, shard)
        write_results(results, shard[:12], [key.hex() for key in request_keys(site.store, shard)])
    (folder / "run").write_text(run.uri)
    return {"shards": len(approved.shards)}


def _begun(folder: Path) -> tuple[Site, Run, Plan]:
    site = site_in(folder)
    run = load_run(site.store, (folder / "run").read_text())
    return site, run, approved_plan(run)


def do_collect(folder: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Harvest and settle the shards, or every so many-th of them."""
    site, run, approved = _begun(folder)
    found = [collect(site, run, shard) for shard in approved.shards[part::parts]]
    return {"requests": sum(each.requests for each in found if each)}


def do_assemble(folder: Path) -> dict[str, Any]:
    """Join answers to rows, and stage them."""
    from nightshift.steps.assemble import assemble

    site, run, approved = _begun(folder)
    return {"outcomes": assemble(site, run, approved).outcomes}


def do_audit(folder: Path) -> dict[str, Any]:
    """The suite over the staged rows."""
    from nightshift.steps.audit import audit

    site, run, approved = _begun(folder)
    assembled = site.store.get_shape(run.key("assembled.json"), Assembled)
    if assembled is None:
        sys.exit("assemble comes first")
    return {"passed": audit(site, run, approved, assembled).passed}


def forget(folder: Path, step: str) -> None:
    """Make as if a step had not been done, nor any after it."""
    store = folder / "store"
    doomed = {
        "encode": [],
        "plan": ["*"],
        "collect": ["shards/*/answers-*", "shards/*/ended-*", "shards/*/settled*", "answers/*/*.parquet", "runs/*/*/assembled.json"],
        "assemble": ["runs/*/*/assembled.json", "runs/*/*/staged", "runs/*/*/quarantine", "runs/*/*/audit.json"],
        "audit": ["runs/*/*/audit.json"],
        "known": [f"runs/*/{name.read_text().rpartition('/')[2]}" for name in folder.glob("known")],
    }[step]
    for path in [path for pattern in doomed for path in store.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "encode": do_encode, "plan": do_plan, "known": do_known, "submit": do_submit,
    "collect": do_collect, "assemble": do_assemble, "audit": do_audit,
}  # fmt: skip


def main() -> None:
    """Do one step, and say what it counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rest", nargs="*", help="plan: the prompt and the store; collect: PART PARTS")
    given = parser.parse_args()
    rest = [int(each) if each.isdigit() else each for each in given.rest]
    print(json.dumps(STEPS[given.step](given.folder.resolve(), *rest)))
    end_process(0)


if __name__ == "__main__":
    main()

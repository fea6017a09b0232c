"""Stopping: the batches of what a person marks as failed or skipped are cancelled. Clearing, or a process that ends, cancels nothing.

A task or a trigger that is at work cancels its own; the API server those of a run that no process of Airflow is at work for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import Any

import structlog
from airflow.models.dagrun import DagRun
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.utils.session import create_session
from sqlalchemy import select

from nightshift.approvals import Decision, Grants
from nightshift.errors import Interrupted, NightshiftError
from nightshift.runs import Run, Site, approved_plan, awaited_elsewhere
from nightshift.steps.report import report
from nightshift.steps.submit import open_where
from nightshift.stores.ledger import Attach, next_move
from nightshift_airflow.site import folder_of, open_store, run_at

log = structlog.get_logger(__name__)

STOPPED_STATES = ["failed", "skipped", "removed", "upstream_failed"]
CLEARED_OR_STOPPED_SECONDS = 3.0  # until the state of a task that a person acted on can be told
CANCELLED_AT_ONCE = 8
STOPPED = "it was stopped, and its batches with it, but for those that others wait for; what they answered is found again after a clear"
_places = BoundedSemaphore(4)  # runs: a person may mark hundreds at once


def is_stopped(ti: Any) -> bool:
    """Whether a person has stopped a task, and not cleared it, nor ended its worker."""
    stopped = RuntimeTaskInstance.get_ti_count(
        dag_id=ti.dag_id, task_ids=[ti.task_id], map_index=ti.map_index, run_ids=[ti.run_id], states=STOPPED_STATES
    )
    return stopped > 0


def cancel_stopped_run(dag_id: str, run_id: str) -> None:
    """Cancel what a run that a person has just marked as failed has at the provider. In the API server, whose database says so."""
    time.sleep(CLEARED_OR_STOPPED_SECONDS)
    with create_session() as session:
        state = session.scalar(select(DagRun.state).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id))
    if state != "failed":
        return
    try:
        store = open_store()
        folder = folder_of(store, dag_id, run_id)
        if store.head(f"{folder}/input.json"):
            with _places:
                end_stopped_run(*run_at(store.uri_of(folder), "API server"))
    except NightshiftError as error:
        log.warning("The API server cannot cancel batches of a stopped run; those that no task cancels run to their end", error=str(error))


def end_stopped_run(site: Site, run: Run) -> None:
    """Cancel what a run has at the provider, and say in its report that it was stopped: none of its tasks is left to do so."""
    grants = Grants(site.store, run.job.name)
    if (asked := grants.asked_by(run.uri)) is not None:  # others wait for an answer that nobody can give any more
        grants.settle(asked, Decision(usd=None, by="nobody", at=site.now(), withdrawn=True))
    if site.store.head(run.key("approved.json")):
        cancel_batches(site, run, None)
    if all(site.store.head(run.key(name)) is None for name in ("summary.json", "assembled.json")):
        report(site, run, published=None, problem=STOPPED, error=Interrupted.__name__)


def cancel_batches(site: Site, run: Run, shards: Iterable[str] | None) -> None:
    """Cancel what shards of a run have at the provider, or all of them, but for those that another run waits for, too."""
    approved = approved_plan(run)
    spared = awaited_elsewhere(run).union(approved.adopted_shards)
    with ThreadPoolExecutor(CANCELLED_AT_ONCE) as pool:  # there are seconds until a task is killed
        for shard in approved.shards if shards is None else shards:
            if shard not in spared:
                pool.submit(_cancel, site, run, shard)


def _cancel(site: Site, run: Run, shard: str) -> None:
    """Where it fails, the others are cancelled all the same."""
    try:
        move = next_move(site.ledger.attempts(shard), now=site.now())
        if isinstance(move, Attach):
            log.info("Cancelling a batch of what was stopped", shard=shard[:12], batch=move.receipt.batch_id)
            open_where(site, run, shard, move.attempt).cancel(move.receipt.batch_id)
    except Exception as error:  # noqa: BLE001 — whatever it is, the others are still to be cancelled
        log.warning("A batch of what was stopped could not be cancelled, and runs to its end", shard=shard[:12], error=str(error))

"""The whole way in one process: the same steps as in Airflow, one after the other, shards side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

from nightshift.dates import render_dates
from nightshift.errors import CountsDisagree, Interrupted, NightshiftError, ReportUnwritten, RunHeld, ShardHeld, Transient
from nightshift.job import Job, Policy
from nightshift.providers.protocol import Snapshot
from nightshift.redrive import begin_redrive, find_run
from nightshift.runs import Options, Run, Site, current_run, run_id
from nightshift.shapes import Outcome, Plan, Published, Settled, Summary
from nightshift.steps.approve import approve
from nightshift.steps.assemble import assemble
from nightshift.steps.audit import audit
from nightshift.steps.collect import collect
from nightshift.steps.discover import AS_THE_JOB_SAYS, discover, pin
from nightshift.steps.plan import plan
from nightshift.steps.publish import publish
from nightshift.steps.report import report
from nightshift.steps.submit import submit
from nightshift.steps.wait import pauses

SHARDS_AT_ONCE = 16  # threads that mostly sleep; the provider's queue is the real bound
TRANSIENT_TRIES = 6
TRANSIENT_PAUSE_SECONDS = 2.0  # doubles


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """What a person is shown while a run goes on; every part may stay silent."""

    stage: Callable[[str], None] = lambda name: None
    stopping: Callable[[], None] = lambda: None  # nothing more is sent; what is being asked gets some seconds
    rows: Callable[[int], None] = lambda rows: None
    planned: Callable[[Plan], None] = lambda plan: None
    shard: Callable[[str, Snapshot | NightshiftError | Settled], None] = lambda shard, seen: None


def begin(site: Site, job: Job, *, pattern: str, dates: Mapping[str, Any], scheduled: bool, options: Options = AS_THE_JOB_SAYS) -> Run:
    """Begin a run, or go on with one that was interrupted: the same job on the same objects is the same run until it is reported."""
    identity = run_id(job.digest, pin(site, job, render_dates(pattern, dates)).identity, options.model_dump_json())
    number, name = current_run(site.store, job.name, identity)
    label = f"local {identity[:6]}-{number}"
    return discover(site, job, pattern=pattern, label=label, run=name, dates=dates, scheduled=scheduled, options=options)


def begin_again(site: Site, name: str, outcomes: Sequence[Outcome], *, policy: Callable[[str], Policy | None]) -> Run:
    """Begin to drive a run's failures again, or go on with it: same run, outcomes and policy are the same redrive until it is reported.

    `policy`: by the job's name, the policy in place of that of the first run.
    """
    original = find_run(site.store, name)
    wanted = policy(original.job.name) or original.job.spec.policy
    identity = run_id("redrive", name, wanted.model_dump_json(), *outcomes)
    number, run = current_run(site.store, original.job.name, identity)
    return begin_redrive(site, original, outcomes, label=f"redrive of {name[:6]}-{number}", run=run, policy=wanted)


def drive(site: Site, run: Run, *, ask: Callable[[Run, Plan], bool], watcher: Watcher | None = None) -> Summary:
    """Take a run the whole way. Raises what stopped it, after its report is written; an interruption leaves it to be gone on with."""
    watcher = watcher or Watcher()
    published: Published | None = None
    problem: NightshiftError | None = None
    try:
        published = _drive(site, run, ask, watcher)
    except NightshiftError as error:
        problem = error
    watcher.stage("report")
    told = {"problem": str(problem), "error": type(problem).__name__} if problem else {}
    try:
        summary = report(site, run, published=published, **told)
    except (NightshiftError, OSError) as error:
        if published is None or isinstance(error, CountsDisagree):
            raise
        raise ReportUnwritten(published.uri, error) from error
    if problem is not None and not isinstance(problem, RunHeld):
        raise problem
    return summary


def _drive(site: Site, run: Run, ask: Callable[[Run, Plan], bool], watcher: Watcher) -> Published:
    watcher.stage("plan")
    planned = plan(site, run, progress=watcher.rows)
    watcher.planned(planned)
    watcher.stage("approve")
    approved = approve(site, run, planned, ask=lambda: ask(run, planned))
    watcher.stage("wait")
    _settle_all(site, run, approved, watcher)
    watcher.stage("assemble")
    assembled = assemble(site, run, approved)
    watcher.stage("audit")
    verdict = audit(site, run, approved, assembled)
    watcher.stage("publish")
    return publish(site, run, assembled, verdict)


def _settle_all(site: Site, run: Run, approved: Plan, watcher: Watcher) -> None:
    """Drive every shard until it is settled. The first permanent error stops new work; what is in flight stays in the ledger."""
    stop = Event()
    site = replace(site, stopped=stop.is_set)
    # Harvests need memory: one after the other, and in one thread, because what a thread has freed no other one gets to use.
    harvester = ThreadPoolExecutor(1, thread_name_prefix="harvest")
    with harvester, ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="shard") as pool:
        futures = [pool.submit(_settle, site, run, shard, watcher, stop, harvester) for shard in approved.shards]
        try:
            for future in futures:
                future.result()
        except BaseException:  # Ctrl-C too: it wakes every sleeping shard, so that the process ends at once
            stop.set()
            watcher.stopping()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _settle(site: Site, run: Run, shard: str, watcher: Watcher, stop: Event, harvester: ThreadPoolExecutor) -> Settled:
    """Submit → wait → collect, until the shard is settled."""
    failures = 0
    while True:
        try:
            submit(site, run, shard)
            for pause in pauses(site, run, shard, seen=lambda look: watcher.shard(shard, look)):
                _sleep(stop, pause)
            settled = harvester.submit(collect, site, run, shard).result()
            failures = 0
        except ShardHeld as held:
            watcher.shard(shard, held)
            _sleep(stop, min(max(held.seconds_left, 1.0), 30.0))
            continue
        except Interrupted:
            raise
        except Transient as error:
            failures += 1
            if failures == TRANSIENT_TRIES:
                raise
            watcher.shard(shard, error)
            _sleep(stop, TRANSIENT_PAUSE_SECONDS * 2 ** (failures - 1))
            continue
        if settled is not None:
            watcher.shard(shard, settled)
            return settled


def _sleep(stop: Event, seconds: float) -> None:
    if stop.wait(seconds):
        raise Interrupted("Stopped between two looks.")

"""The steps as tasks. XCom carries the run's URI and the keys of shards; everything else is in the store."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from airflow.sdk import task
from airflow.sdk.exceptions import AirflowSkipException

from nightshift.budgets import cost_of
from nightshift.dates import interval_dates, render_dates
from nightshift.errors import (
    BEGIN_ANEW,
    GO_ON,
    InputMissing,
    RunFailed,
    RunHeld,
    SettingInvalid,
    ShardsFailed,
    UpToDate,
    is_permanent,
    nearest,
)
from nightshift.job import Job
from nightshift.job_file import load_job, read_prompt, redriven, vary
from nightshift.money.prices import retirements
from nightshift.notices import event_of, listeners, notice_of
from nightshift.partitions import MANIFEST, day_of_input, results_folder
from nightshift.redrive import begin_redrive
from nightshift.runs import Options, Run, Site, approved_plan, current_run, last_run, load_run, run_folder
from nightshift.shapes import Assembled, Audit, Problem, Published
from nightshift.steps.assemble import assemble as assemble_run
from nightshift.steps.audit import audit as audit_run
from nightshift.steps.discover import discover as discover_run
from nightshift.steps.plan import plan as plan_run
from nightshift.steps.publish import publish as publish_run
from nightshift.steps.report import report as report_run
from nightshift.stores.objects import Objects
from nightshift_airflow.lineage import reads, writes
from nightshift_airflow.notices import tell
from nightshift_airflow.site import folder_of, open_store, owner_of, run_at, site_for

log = logging.getLogger(__name__)
DRY_RUN = "A dry run: planned, and nothing sent"
PARTITION_KEY_MOST = 250  # characters that Airflow takes
BY_AIRFLOW = ("uploads", "openlineage")  # in what a run was triggered with, beside its form: by our own DAGs, and by Airflow's operator
RUN_NAME = re.compile(r"[0-9a-f]{16}")


@task
def discover(job_file: str, **context: Any) -> str:
    """Pin the objects of this run. Skips the run, green and quick, where a schedule finds nothing to do."""
    path, params, dag_run = Path(job_file), context["params"], context["dag_run"]
    check_form(dag_run.conf or {}, context["dag"].params)
    job = load_job(path)
    site = site_for(job.spec, owner_of(context))
    if params.get("redrive"):
        return _redrive(site, job, params, dag_run)
    source = read_prompt(site.store, path, params["prompt"], within=True) if params.get("prompt") else None
    if source or params.get("model", job.spec.request.model) != job.spec.request.model:
        job = vary(job, model=params.get("model"), prompt_source=source)
    uploads = [upload["uri"] for upload in (dag_run.conf or {}).get("uploads", ())]
    given, dates = params.get("input") or uploads, run_dates(context, job.spec.timezone)
    if not given and not dates and "{{" in job.spec.input.uri:
        why = "this run has no dates: give it a logical date, or `input` in its form"
        raise SettingInvalid([f"{job.name} reads {job.spec.input.uri}, and {why}."])
    is_scheduled = not given and bool(dates) and dates["data_interval_start"] < dates["data_interval_end"]
    if params.get("input") and (named := day_of_input(job.spec, render_dates(given, dates))):
        dates, is_scheduled = named, True
    _, name = current_run(site.store, job.name, dag_run.dag_id, dag_run.run_id)
    options = Options(fresh=bool(params.get("fresh")), sample=params.get("sample"), dry_run=bool(params.get("dry_run")))
    try:
        run = discover_run(
            site,
            job,
            pattern=given or job.spec.input.uri,
            label=dag_run.run_id,
            run=name,
            dates=dates,
            scheduled=is_scheduled,
            options=options,
            unless_made=is_scheduled,
        )
    except (UpToDate, InputMissing) as error:
        if isinstance(error, InputMissing) and (given or job.spec.input.required):
            raise
        keep_problem(site.store, run_folder(job.name, name), "discover", error)
        raise AirflowSkipException(f"Nothing to do: {error}") from error
    reads(found.uri for found in run.input.objects)
    log.info("Pinned %s objects, %s bytes", len(run.input.objects), sum(found.size for found in run.input.objects))
    return run.uri


def check_form(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise SettingInvalid for what a run was triggered with and the form does not know: it would be passed over."""
    names = [*known, *BY_AIRFLOW]
    unknown = [name for name in given if name not in names]
    problems = [f"{name}: the form has no such field{nearest(name, names)}; it has {', '.join(known)}" for name in unknown]
    if given.get("outcomes") and not given.get("redrive"):
        problems.append("outcomes: goes with redrive, which names the run whose rows are driven again")
    if problems:
        raise SettingInvalid(problems)


def _redrive(site: Site, job: Job, params: Any, dag_run: Any) -> str:
    """Begin to drive an earlier run's failures again. It is named as in Airflow, or by its name in the store."""
    others = [name for name in ("input", "prompt", "sample", "fresh") if params.get(name)]
    if params.get("model", job.spec.request.model) != job.spec.request.model:
        others.append("model")
    if others:
        raise SettingInvalid([f"redrive asks what the earlier run asked, of the same rows: leave {', '.join(others)} as they are."])
    name = params["redrive"]
    found = name if RUN_NAME.fullmatch(name) else last_run(site.store, job.name, dag_run.dag_id, name)
    if site.store.head(f"{run_folder(job.name, found)}/input.json") is None:
        raise SettingInvalid([f"redrive: this job has begun no run {name!r}; a run is named as in Airflow, or as in its report"])
    original = load_run(site.store, site.store.uri_of(run_folder(job.name, found)))
    _, run = current_run(site.store, job.name, dag_run.dag_id, dag_run.run_id)
    begun = begin_redrive(
        site,
        original,
        redriven(params.get("outcomes") or ()),
        label=dag_run.run_id,
        run=run,
        policy=job.spec.policy,
        dry_run=bool(params.get("dry_run")),
    )
    return begun.uri


@task
def plan(run_uri: str, **context: Any) -> str:
    """Plan the run; approve and everything after it read the plan in the store."""
    site, run = run_at(run_uri, owner_of(context))
    for said in retirements(run.job.spec.request.provider, (run.job.spec.request.model, *run.job.spec.stand_ins), site.now().date()):
        log.warning(said)
    planned = plan_run(site, run, progress=_every(100_000))
    log.info(
        "%s rows: %s rejected, %s duplicates, %s reused, %s adopted, %s to submit in %s shards; estimate %s",
        planned.rows, planned.rejected, planned.duplicates, planned.reused, planned.adopted, planned.submitted, len(planned.shards),
        planned.estimate.usd,
    )  # fmt: skip
    return run_uri


@task(trigger_rule="none_failed_min_one_success")
def assemble(run_uri: str, settled: Any, **context: Any) -> str:
    """Join answers to rows. The shards are read from the approved plan: a failed one vanishes from what its siblings return."""
    site, run = run_at(run_uri, owner_of(context))
    if run.input.dry_run:
        raise AirflowSkipException(DRY_RUN)
    assembled = assemble_run(site, run, approved_plan(run))
    log.info("Outcomes: %s", {name: count for name, count in assembled.outcomes.items() if count})
    return run_uri


@task
def audit(run_uri: str, **context: Any) -> str:
    """Judge the staged dataset; publish acts on the verdict."""
    site, run = run_at(run_uri, owner_of(context))
    approved = approved_plan(run)
    verdict = audit_run(site, run, approved, assemble_run(site, run, approved))
    for check in verdict.checks:
        log.log(
            logging.INFO if check.success else logging.WARNING,
            "%s on %s: %s",
            check.expectation,
            check.column,
            "passed" if check.success else "failed",
        )
    return run_uri


def publish_to(results: Any, partitions: Any) -> Any:
    """The task `publish` of a job, whose results are an Airflow asset; `partitions`: the same, for who is scheduled by partition."""

    @task(task_id="publish", outlets=[results, partitions])
    def publish(run_uri: str, **context: Any) -> str:
        """Swap the partition, or hold it."""
        site, run = run_at(run_uri, owner_of(context))
        approved = approved_plan(run)
        assembled = assemble_run(site, run, approved)
        published = publish_run(site, run, assembled, audit_run(site, run, approved, assembled))
        log.info("Published %s rows at %s", published.rows, published.uri)
        if run.input.sample is not None:  # a task that is skipped tells nobody that there are new results
            raise AirflowSkipException(f"A sample of {published.rows:,} rows stands at {published.uri}")
        reads(found.uri for found in run.input.objects)
        writes(published.uri)
        for asset in (results, partitions):
            context["outlet_events"][asset].extra = results_event(run, assembled, published)
        context["outlet_events"][partitions].add_partitions([run.input.partition[:PARTITION_KEY_MOST]])
        return published.uri

    return publish


def results_event(run: Run, assembled: Assembled, published: Published) -> dict[str, Any]:
    """What an asset event says of new results."""
    cost = cost_of(assembled.paid)
    return {
        "partition": run.input.partition,
        "rows": published.rows,
        "outcomes": {name: count for name, count in assembled.outcomes.items() if count},
        "cost_usd": None if cost is None else float(round(cost, 6)),
        "results": published.uri,
        "run": run.input.run,
        "model": run.job.spec.request.model,
        "prompt_version": run.job.prompt.version,
    }


@task(trigger_rule="all_done")
def report(run_uri: str | None, **context: Any) -> str:
    """Write what happened, however far the run came, and end as the run ends: the last task decides a run's state."""
    states = task_states(context)
    failed = failed_tasks(states)
    if not run_uri:
        if failed:
            raise RunFailed(f"{failed[0]} has failed, and its log says why; nothing was begun", None, BEGIN_ANEW)
        raise AirflowSkipException("Nothing was begun, so there is nothing to report")
    site, run = run_at(run_uri, owner_of(context))
    is_published = states.get("publish") == "success" or (run.input.sample is not None and states.get("publish") == "skipped")
    verdict = site.store.get_shape(run.key("audit.json"), Audit)
    held = verdict is not None and not verdict.passed
    published = published_by(site, run) if is_published and verdict is not None and not held else None  # a mark publishes nothing
    problem = f"{', '.join(failed)} failed" if failed else "it was stopped"
    is_dry, met = run.input.dry_run and not failed, site.store.get_shape(run.key("problem.json"), Problem) if failed else None
    if met is not None:
        problem = f"{met.task}: {met.message}" if failed == [met.task] else f"{problem}. {met.task}: {met.message}"
    told = {} if published or held or is_dry else {"problem": problem, "error": met.error if met else None}
    summary = report_run(site, run, published=published, **told)
    log.info("Report: %s", summary.report)
    tell(listeners(run.job.spec.notify, event_of(summary)), notice_of(summary, context["ti"].log_url), context)
    if published or is_dry:
        return summary.report
    if verdict is not None and held:
        raise RunHeld(verdict.reasons, summary.report)
    is_sent = site.store.head(run.key("approved.json")) is not None
    raise RunFailed(problem, summary.report, GO_ON if is_sent or not is_permanent(summary.error) else BEGIN_ANEW)


def failed_tasks(states: Mapping[str, str]) -> list[str]:
    """The tasks that a run failed at; those after them, which never began, only where no other has failed."""
    own = sorted(name for name, state in states.items() if state == "failed" and name != "report")
    return own or sorted(name for name, state in states.items() if state == "upstream_failed" and name != "report")


def note_problem(context: Any) -> None:
    """Keep what a task has failed with, for the report; called by Airflow where it failed."""
    ti, error = context["ti"], context.get("exception")
    run_uri = ti.xcom_pull(task_ids="discover", map_indexes=-1)
    if isinstance(error, ShardsFailed) or not isinstance(error, BaseException) or ti.task_id == "report":
        return  # each of the shards was kept as it failed
    store = open_store()
    folder = folder_of(store, ti.dag_id, ti.run_id) if run_uri is None else store.key_of(run_uri)
    keep_problem(store, folder, ti.task_id, error)


def keep_problem(store: Objects, folder: str, task_id: str, error: BaseException) -> None:
    """Write what a task of a run has failed with, or why it had nothing to do, over what was there."""
    problem = Problem(task=task_id, error=type(error).__name__, message=str(error)[:2000])
    store.put_shape(f"{folder}/problem.json", problem)


def run_dates(context: Any, timezone: str) -> dict[str, Any]:
    """The dates of a run's interval as templates know them; none for a run without an interval."""
    start, end = context.get("data_interval_start"), context.get("data_interval_end")
    if not isinstance(start, datetime) or not isinstance(end, datetime):
        return {}
    return interval_dates(start, end, timezone)


def task_states(context: Any) -> dict[str, str]:
    """The states of this run's tasks by task id; of a mapped task the worst."""
    ti = context["ti"]
    found = ti.get_task_states(dag_id=ti.dag_id, run_ids=[ti.run_id]).get(ti.run_id, {})
    states: dict[str, str] = {}
    for name, state in found.items():
        plain = name.rpartition("_")[0] if name.rpartition("_")[2].isdigit() else name
        if states.get(plain) not in ("failed", "upstream_failed"):
            states[plain] = str(state)
    return states


def published_by(site: Site, run: Run) -> Published | None:
    """What a run has published; None where somebody has marked the task, and nothing stands there."""
    assembled, folder = site.store.get_shape(run.key("assembled.json"), Assembled), results_folder(run)
    if assembled is None or site.store.head(f"{folder}/{MANIFEST}") is None:
        return None
    return Published(uri=site.store.uri_of(folder), rows=assembled.outcomes["succeeded"], parts=())


def _every(step: int) -> Any:
    """Log progress now and then."""
    seen = [0]

    def progress(rows: int) -> None:
        if rows // step > seen[0]:
            seen[0] = rows // step
            log.info("%s rows read", f"{rows:,}")

    return progress

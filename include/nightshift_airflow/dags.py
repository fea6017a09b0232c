"""One DAG per job file."""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pendulum
from airflow.sdk import DAG, Asset, AssetWatcher, task, task_group
from airflow.sdk import chain as in_order

from nightshift.errors import JobInvalid, Unusable
from nightshift.job import OWN_DAGS, JobFile
from nightshift.partitions import UNSAFE
from nightshift.runs import run_id
from nightshift.settings import read_settings
from nightshift_airflow.approval import ApproveRun
from nightshift_airflow.form import form_of
from nightshift_airflow.notices import deadline_of
from nightshift_airflow.retries import RETRIES, RETRY_DELAY, ByErrorClass
from nightshift_airflow.shards import CollectShards, SubmitShards, WaitForShards
from nightshift_airflow.tasks import assemble, audit, discover, note_problem, plan, publish_to, report
from nightshift_airflow.timetables import CronsTimetable
from nightshift_airflow.uploads import S3UploadTrigger, jobs_with_uploads

DAG_ID = re.compile(r"[A-Za-z0-9_.-]{1,200}")
STEP_TIMEOUT = timedelta(hours=6)
DEFAULTS = {
    "retries": RETRIES,
    "retry_delay": RETRY_DELAY,
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=10),
    "retry_policy": ByErrorClass(),
    "execution_timeout": STEP_TIMEOUT,
}


def job_dag(spec: JobFile, path: Path) -> DAG:
    """The DAG of a job: the steps in the order of the data, shards side by side."""
    with DAG(
        dag_id=spec.name,
        description=spec.description or f"{spec.request.model} over {spec.input.uri}",
        doc_md=_doc(spec),
        schedule=timetable_of(spec),
        start_date=pendulum.datetime(*spec.start_date.timetuple()[:3], tz=spec.timezone),
        catchup=spec.catchup,
        max_active_runs=16,
        max_active_tasks=read_settings().width,
        tags=["nightshift", *spec.tags],
        params=form_of(spec, path),
        deadline=deadline_of(spec, path),
        default_args={**DEFAULTS, "owner": spec.owner, "on_failure_callback": note_problem},
    ) as dag:
        run_uri: Any = discover(str(path))
        planned: Any = plan(run_uri)
        approved = ApproveRun(task_id="approve", run_uri=planned, retries=2)

        @task_group(group_id="shard")
        def shard_group(run_uri: str, chain: str) -> Any:
            submitted = SubmitShards(task_id="submit", run_uri=run_uri, chain=chain)
            patience = timedelta(hours=spec.policy.deadline_hours) + STEP_TIMEOUT  # by then a batch is cancelled and harvested
            waited = WaitForShards(task_id="wait", run_uri=run_uri, chain=submitted.output, execution_timeout=patience)
            collected = CollectShards(task_id="collect", run_uri=run_uri, chain=submitted.output)
            in_order(submitted, waited, collected)
            return collected.output

        settled = shard_group.partial(run_uri=run_uri).expand(chain=approved.output)  # nothing is submitted before it is approved
        assembled = assemble(planned, settled)
        audited = audit(assembled)
        published = publish_to(results_asset(spec), partitions_asset(spec))(audited)
        reported = report(run_uri)
        in_order(approved, dag.task_group_dict["shard"])  # the whole group, also where it is empty
        in_order(approved, assembled)
        in_order(published, reported)
    return dag


def timetable_of(spec: JobFile) -> Any:
    """When a job runs by the clock; None: never. Intervals are the job's own, in its time zone."""
    return CronsTimetable(*spec.schedules, timezone=spec.timezone) if spec.schedules else None


def results_asset(spec: JobFile) -> Asset:
    """The results of a job, for other DAGs to be scheduled on."""
    store = read_settings().store
    uri = f"{store.rstrip('/')}/results/{spec.name}" if store else None
    return Asset(name=f"{spec.name}_results", uri=uri, group="nightshift")


def partitions_asset(spec: JobFile) -> Asset:
    """The same results, whose events carry the partition as their key: one run per partition for who is scheduled so.

    An asset of its own, because a keyed event (3.3.2) does not wake who is scheduled without keys.
    """
    return Asset(name=f"{spec.name}_partitions", group="nightshift")


def upload_assets() -> list[Asset]:
    """One asset per queue of upload events, with the watcher that listens to it."""
    queues: dict[str, str] = {}
    for job in jobs_with_uploads(has_queue=True):
        assert job.spec.on_upload
        assert job.spec.on_upload.queue
        queues.setdefault(job.spec.on_upload.queue, job.spec.input.connection)
    return [
        Asset(
            name=f"uploads_of_{urlsplit(url).path.rpartition('/')[2]}_{run_id(url)[:6]}",
            group="nightshift",
            watchers=[AssetWatcher(name="queue", trigger=S3UploadTrigger(queue_url=url, connection=connection))],
        )
        for url, connection in queues.items()
    ]


def broken_dag_id(path: Path) -> str:
    """The id of the DAG in place of a job file that cannot be used: its name, as far as Airflow takes it and no DAG of ours has it."""
    name = path.stem
    if DAG_ID.fullmatch(name) and name not in own_dags():
        return name
    return f"{UNSAFE.sub('-', name)[:100]}__{run_id(name)[:6]}"


def own_dags() -> set[str]:
    """The ids of DAGs that no job can have."""
    return {*OWN_DAGS, *(name for name, _ in read_settings().reports)}


def broken_job_dag(path: Path, error: Exception) -> DAG:
    """A DAG in place of a job file that cannot be used: it says what to mend, where everybody looks."""
    problems = error.problems if isinstance(error, Unusable) else (f"{path}: {type(error).__name__}: {error}",)
    with DAG(
        dag_id=broken_dag_id(path),
        description=f"INVALID JOB FILE: {problems[0]}",
        doc_md="# This job file has to be mended\n\n" + "\n".join(f"- `{problem}`" for problem in problems),
        schedule=None,
        tags=["nightshift", "invalid job file"],
        default_args={**DEFAULTS, "owner": "nightshift"},
    ) as dag:

        @task
        def mend_the_job_file(problems: list[str]) -> None:
            """Fails with everything that is wrong."""
            raise JobInvalid(problems)

        mend_the_job_file(list(problems))
    return dag


def _dollars(amount: Decimal | None, otherwise: str, before: str = "") -> str:
    return otherwise if amount is None else f"{before}{amount} USD"


def _doc(spec: JobFile) -> str:
    """What a person finds under the DAG's docs button."""
    starts = " and ".join(
        part
        for part in (
            f"on {', '.join(f'`{cron}`' for cron in spec.schedules)} ({spec.timezone})" if spec.schedules else "",
            f"for each upload to `{spec.on_upload.uri}`" if spec.on_upload else "",
        )
        if part
    )
    policy = spec.policy
    return (
        f"# {spec.name}\n\n{spec.description}\n\n"
        f"Starts {starts or 'by hand'}. Reads `{spec.input.uri}`, asks `{spec.request.model}` at `{spec.request.endpoint}` "
        f"with `{spec.request.prompt}`, "
        f"publishes `results/{spec.name}/` when at least {policy.publish_at_least:.0%} of the rows succeeded.\n\n"
        "| task | does |\n|---|---|\n"
        "| discover | pins the input objects |\n| plan | renders, hashes, collapses duplicates, reuses paid answers, packs shards |\n"
        "| approve | compares the estimate with the budget "
        f"({_dollars(policy.budget_usd, 'none')}; {_dollars(policy.approve_above_usd, 'never asks', 'asks above ')}) |\n"
        "| shard.submit → wait → collect | one provider batch per shard, paid once; in wide runs several shards share a chain of tasks |\n"
        "| assemble | one outcome per row |\n"
        "| audit | Great Expectations on the staged results |\n"
        "| publish | swaps the partition in one step |\n| report | counts, cost, quality |\n\n"
        "Clearing any task is safe: what was paid for is found again."
    )

"""Runs an upload-triggered job over what lies in its inbox: below a prefix, from a time to a time, newest or oldest first.

Airflow's own backfill is for schedules. This one is started by its form, runs a few uploads at a time, and shows one task for each. Uploads
whose answers are paid for cost nothing, whatever `reprocess` says.
"""

import pendulum
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import Param, dag

from nightshift_airflow.dags import DEFAULTS
from nightshift_airflow.uploads import choose_uploads, jobs_with_uploads, tell_failed_runs

AT_ONCE = 4
jobs = [job.name for has_queue in (False, True) for job in jobs_with_uploads(has_queue=has_queue)]


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    max_active_runs=1,
    tags=["nightshift"],
    params={
        "job": Param(jobs[0] if jobs else "", type="string", enum=jobs or [""], title="Job", description="jobs with on_upload"),
        "prefix": Param(
            None, type=["null", "string"], title="Prefix", description="of the objects' URIs, such as s3://reviews/inbox/2026-11"
        ),
        "since": Param(None, type=["null", "string"], format="date-time", title="Landed since"),
        "until": Param(None, type=["null", "string"], format="date-time", title="Landed before"),
        "reprocess": Param(
            "none",
            type="string",
            enum=["none", "failed", "all"],
            title="Reprocess",
            description="none: what no run was started for; failed: also what failed or was held; all: everything",
        ),
        "newest_first": Param(False, type="boolean", title="Newest first"),
    },
    default_args={**DEFAULTS, "owner": "nightshift"},
    doc_md=__doc__,
)
def backfill_uploads():
    chosen = choose_uploads()
    run = TriggerDagRunOperator.partial(
        task_id="run",
        logical_date=None,
        reset_dag_run=True,
        wait_for_completion=True,
        deferrable=True,
        poke_interval=20,
        max_active_tis_per_dagrun=AT_ONCE,
        allowed_states=["success", "failed"],  # a repeated task would clear a run that has failed; what failed is told at the end
        failed_states=[],
    ).expand_kwargs(chosen)
    run >> tell_failed_runs(chosen)


backfill_uploads()

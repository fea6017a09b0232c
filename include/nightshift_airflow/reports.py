"""Periodic reports as DAGs: one task, which reads run summaries and published partitions and pays nothing."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import pendulum
from airflow.sdk import DAG, CronDataIntervalTimetable, Param, task

from nightshift.errors import SettingInvalid
from nightshift.job_file import load_jobs
from nightshift.notices import notice_of_period
from nightshift.periodic import write_periodic
from nightshift.settings import read_settings
from nightshift_airflow.dags import DEFAULTS
from nightshift_airflow.lineage import writes
from nightshift_airflow.notices import tell
from nightshift_airflow.site import owner_of, site_for

log = logging.getLogger(__name__)


def periodic_dag(name: str, cron: str, doc: str) -> DAG:
    """The DAG of one periodic report."""
    with DAG(
        dag_id=name,
        description=f"What all jobs did and cost, {cron}",
        doc_md=doc,
        schedule=CronDataIntervalTimetable(cron, timezone="UTC"),
        start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
        catchup=False,
        max_active_runs=4,
        tags=["nightshift", "report"],
        params={
            "since": Param(None, type=["null", "string"], format="date", title="Since", description="first day, in UTC"),
            "until": Param(None, type=["null", "string"], format="date", title="Until", description="the day after the last one"),
        },
        default_args={**DEFAULTS, "owner": "nightshift"},
    ) as dag:
        report_period(name)
    return dag


@task(task_id="report")
def report_period(name: str, **context: Any) -> str:
    """Write the report of the run's interval, or of the days that were given, and send it."""
    settings, (since, until) = read_settings(), period_of(context)
    report = write_periodic(site_for(None, owner_of(context)), load_jobs(settings.jobs), name=name, since=since, until=until)
    log.info("%s runs, %s rows: %s", report.total("runs"), report.total("rows"), report.page)
    writes(report.page.rpartition("/")[0])
    tell(settings.report_to, notice_of_period(report), context)
    return report.page


def period_of(context: Any) -> tuple[datetime, datetime]:
    """The days that were given, else the run's interval, else the last seven days. Raises SettingInvalid where they are none."""
    params, now = context["params"], datetime.now(UTC)
    start, end = context.get("data_interval_start"), context.get("data_interval_end")
    since, until = (datetime.fromisoformat(params[name]).replace(tzinfo=UTC) if params.get(name) else None for name in ("since", "until"))
    if since or until:
        period = since or (until or now) - timedelta(days=7), until or now
    elif isinstance(start, datetime) and isinstance(end, datetime) and start < end:
        period = start, end
    else:
        period = now - timedelta(days=7), now
    if period[0] >= period[1]:
        raise SettingInvalid([f"since {period[0]:%Y-%m-%d} is not before until {period[1]:%Y-%m-%d}"])
    return period

"""Starts one run per uploaded object, for every job with `on_upload`. A doorbell and a list: nothing depends on an event."""

import pendulum
from airflow.sdk import dag

from nightshift_airflow.dags import DEFAULTS
from nightshift_airflow.uploads import UploadSensor, find_uploads, start_and_note


@dag(
    schedule="@continuous",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,
    tags=["nightshift"],
    default_args={**DEFAULTS, "owner": "nightshift"},
    doc_md=__doc__,
)
def uploads():
    arrived = UploadSensor(task_id="arrived")
    found = find_uploads()
    arrived >> found
    start_and_note(found)


uploads()

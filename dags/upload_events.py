"""Starts runs for uploads as their buckets tell of them: S3 → SQS → an asset's watcher. For every job whose `on_upload` names a queue.

An event only rings. What it says is noted in the inbox before its message is deleted, and every quarter of an hour the buckets are
listed for what no event has told of.
"""

import pendulum
from airflow.sdk import AssetOrTimeSchedule, CronTriggerTimetable, dag

from nightshift_airflow.dags import DEFAULTS, upload_assets
from nightshift_airflow.uploads import HeardSensor, find_heard_uploads, ring_again, start_and_note

assets = upload_assets()

if assets:

    @dag(
        schedule=AssetOrTimeSchedule(timetable=CronTriggerTimetable("*/15 * * * *", timezone="UTC"), assets=assets),
        start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
        catchup=False,
        max_active_runs=1,
        tags=["nightshift"],
        default_args={**DEFAULTS, "owner": "nightshift"},
        doc_md=__doc__,
    )
    def upload_events():
        arrived = HeardSensor(task_id="arrived")
        found = find_heard_uploads()
        arrived >> found
        start_and_note(found) >> ring_again(assets)()

    upload_events()

"""What Airflow's plugin manager is told of: timetables that DAGs are scheduled by."""

from __future__ import annotations

from typing import ClassVar

from airflow.plugins_manager import AirflowPlugin

from nightshift_airflow.timetables import CronsTimetable


class NightshiftPlugin(AirflowPlugin):
    """See AirflowPlugin."""

    name = "nightshift"
    timetables: ClassVar = [CronsTimetable]

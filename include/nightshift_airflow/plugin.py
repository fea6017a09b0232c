"""What Airflow's plugin manager is told of: timetables that DAGs are scheduled by, and tabs of the UI."""

from __future__ import annotations

from typing import Any, ClassVar

from airflow.plugins_manager import AirflowPlugin

from nightshift_airflow.timetables import CronsTimetable


class _Console:
    """The console as an ASGI app that is built with its first request: every process loads plugins, and one serves pages."""

    _app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._app is None:
            from nightshift_airflow.console import build_app

            type(self)._app = build_app()
        await self._app(scope, receive, send)


class NightshiftPlugin(AirflowPlugin):
    """See AirflowPlugin."""

    name = "nightshift"
    timetables: ClassVar = [CronsTimetable]
    fastapi_apps: ClassVar = [{"app": _Console(), "url_prefix": "/nightshift", "name": "Nightshift"}]
    external_views: ClassVar = [
        {
            "name": "Nightshift",
            "href": "/nightshift/run?dag_id={DAG_ID}&run_id={RUN_ID}",
            "destination": "dag_run",
            "url_route": "nightshift",
        },
        {"name": "Nightshift", "href": "/nightshift/runs?dag_id={DAG_ID}", "destination": "dag", "url_route": "nightshift_runs"},
    ]

"""What Airflow's plugin manager is told of: timetables that DAGs are scheduled by, tabs of the UI, and who hears that a run is stopped."""

from __future__ import annotations

from threading import Thread
from typing import Any, ClassVar

from airflow.listeners import hookimpl
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


class _Stops:
    """Hears in the API server that a person has stopped a run: between two of its tasks there is no process that would be told.

    A middleware that changes nothing, because only the API server makes those. A listener of the plugin would be one in every process:
    there Airflow (3.3.2) refuses all DAGs with a task that ends from its trigger, and a run that fails by itself would be heard of, too.
    """

    def __init__(self, app: Any) -> None:
        from airflow.listeners.listener import get_listener_manager

        self._app = app
        get_listener_manager().add_listener(self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    @hookimpl
    def on_dag_run_failed(self, dag_run: Any) -> None:
        """Called within the request that marks the run, before that is committed."""
        Thread(target=self._cancel, args=(dag_run.dag_id, dag_run.run_id)).start()

    def _cancel(self, dag_id: str, run_id: str) -> None:
        from nightshift_airflow.stops import cancel_stopped_run

        cancel_stopped_run(dag_id, run_id)


class NightshiftPlugin(AirflowPlugin):
    """See AirflowPlugin."""

    name = "nightshift"
    timetables: ClassVar = [CronsTimetable]
    fastapi_apps: ClassVar = [{"app": _Console(), "url_prefix": "/nightshift", "name": "Nightshift"}]
    fastapi_root_middlewares: ClassVar = [{"middleware": _Stops, "name": "Nightshift"}]
    external_views: ClassVar = [
        {
            "name": "Nightshift",
            "href": "/nightshift/run?dag_id={DAG_ID}&run_id={RUN_ID}",
            "destination": "dag_run",
            "url_route": "nightshift",
        },
        {"name": "Nightshift", "href": "/nightshift/runs?dag_id={DAG_ID}", "destination": "dag", "url_route": "nightshift_runs"},
    ]

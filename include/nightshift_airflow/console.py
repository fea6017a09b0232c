# FastAPI reads the annotations of what is defined here: no `from __future__ import annotations`.
"""The console: tabs in Airflow's UI that show a run's progress, cost and reuse, and its report once it is written."""

from typing import Annotated, Any

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from fastapi import Depends, FastAPI, Query
from fastapi.responses import HTMLResponse

from nightshift.errors import NightshiftError
from nightshift.pages import render_progress
from nightshift.progress import latest, progress_of
from nightshift.runs import Run, load_run
from nightshift.stores.objects import Objects
from nightshift_airflow.site import folder_of, open_store

LATEST = 60  # runs of a job that its tab shows
NO_RUNS = "No run of this DAG has begun, or it is no Nightshift job."
NOTHING = "Nothing has begun: there was nothing to do, the interval stands as it was made before, or this is no run of a Nightshift job."


def build_app() -> FastAPI:
    """The console's own app; every page asks for the right to see the DAG's runs."""
    app = FastAPI(title="Nightshift", docs_url=None, redoc_url=None, openapi_url=None)
    allowed = [Depends(requires_access_dag("GET", DagAccessEntity.RUN))]

    @app.get("/runs", dependencies=allowed, response_class=HTMLResponse)
    def runs(dag_id: Annotated[str, Query()]) -> Any:
        return _page(
            f"{dag_id}: latest runs",
            "No run of this DAG has begun, or it is no Nightshift job.",
            lambda store: latest(store, dag_id, LATEST),
        )

    @app.get("/run", dependencies=allowed, response_class=HTMLResponse)
    def run(dag_id: Annotated[str, Query()], run_id: Annotated[str, Query()]) -> Any:
        store = open_store()
        folder = folder_of(store, dag_id, run_id)
        report = store.get(f"{folder}/report.html")
        if report is not None:
            return HTMLResponse(report)
        return _page(run_id, NOTHING, lambda store: _one(store, folder))

    return app


def _one(store: Objects, folder: str) -> list[Run]:
    return [load_run(store, store.uri_of(folder))] if store.head(f"{folder}/input.json") else []


def _page(title: str, otherwise: str, find: Any) -> HTMLResponse:
    try:
        found = [progress_of(run) for run in find(open_store())]
    except NightshiftError as error:
        return HTMLResponse(render_progress(title, [], str(error)), status_code=503)
    return HTMLResponse(render_progress(title, found, "" if found else otherwise))

# FastAPI reads the annotations of what is defined here: no `from __future__ import annotations`.
"""The console: tabs in Airflow's UI that show a run's progress, cost and reuse, and its report once it is written."""

from collections.abc import Iterable
from typing import Annotated, Any

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import HTMLResponse

from nightshift.errors import NightshiftError
from nightshift.pages import render_progress
from nightshift.progress import latest, progress_of
from nightshift.runs import Run, load_run
from nightshift.shapes import Problem
from nightshift_airflow.site import folder_of, open_store

LATEST = 60  # runs of a job that its tab shows
NO_RUNS = "No run of this DAG has begun, or it is no Nightshift job."
NOTHING = "Nothing has begun yet. Where the task discover has failed, its log says why. Or this is no run of a Nightshift job."


def build_app() -> FastAPI:
    """The console's own app; every page asks for the right to see the DAG's runs."""
    app = FastAPI(title="Nightshift", docs_url=None, redoc_url=None, openapi_url=None)
    allowed = [Depends(requires_access_dag("GET", DagAccessEntity.RUN))]

    @app.get("/runs", dependencies=allowed, response_class=HTMLResponse)
    def runs(dag_id: Annotated[str, Query()]) -> Any:
        return _page(f"{dag_id}: latest runs", latest(open_store(), dag_id, LATEST), NO_RUNS)

    @app.get("/run", dependencies=allowed, response_class=HTMLResponse)
    def run(dag_id: Annotated[str, Query()], run_id: Annotated[str, Query()]) -> Any:
        store = open_store()
        folder = folder_of(store, dag_id, run_id)
        report = store.get(f"{folder}/report.html")
        if report is not None:
            return HTMLResponse(report)
        if store.head(f"{folder}/input.json"):
            return _page(run_id, [load_run(store, store.uri_of(folder))], "")
        met = store.get_shape(f"{folder}/problem.json", Problem)
        return _page(run_id, [], NOTHING if met is None else f"Nothing has begun: {met.message}")

    @app.exception_handler(NightshiftError)
    def unavailable(request: Request, error: NightshiftError) -> HTMLResponse:
        return HTMLResponse(render_progress("Nightshift", [], str(error)), status_code=503)

    return app


def _page(title: str, runs: Iterable[Run], otherwise: str) -> HTMLResponse:
    found = [progress_of(run) for run in runs]
    return HTMLResponse(render_progress(title, found, "" if found else otherwise))

"""Uploads: what lies in the inboxes of all jobs and has not started a run yet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import structlog
from airflow.sdk import BaseOperator, task
from airflow.triggers.base import BaseTrigger, StartTriggerArgs, TaskSuccessEvent, TriggerEvent

from nightshift.errors import JobInvalid, NightshiftError
from nightshift.inbox import Upload, new_uploads, note_started
from nightshift.job import Job
from nightshift.job_file import load_job
from nightshift.settings import read_settings
from nightshift_airflow.site import open_store, site_for

log = structlog.get_logger(__name__)

LISTEN_SECONDS = 1800  # then the run of the DAG ends and the next begins, so that its history stays readable
MOST_AT_ONCE = 200  # runs started per round; the rest follows in the next


class UploadTrigger(BaseTrigger):
    """Lists the inboxes until something new lies there, or the listening time is over."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """See BaseTrigger."""
        return f"{type(self).__module__}.{type(self).__qualname__}", {}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Each listing runs in a thread; one that fails is logged and tried again."""
        deadline = time.monotonic() + LISTEN_SECONDS
        while time.monotonic() < deadline:
            if await asyncio.to_thread(uploads_of_all_jobs):
                break
            await asyncio.sleep(read_settings().upload_poll_seconds)
        yield TaskSuccessEvent()


class UploadSensor(BaseOperator):
    """The task `arrived`: waits in the triggerer for the first new upload of any job."""

    start_from_trigger = True
    start_trigger_args = StartTriggerArgs(
        trigger_cls="nightshift_airflow.uploads.UploadTrigger", trigger_kwargs={}, next_method="execute_complete"
    )

    def execute(self, context: Any) -> None:
        """Where nothing starts from a trigger (`dag.test()`): defer in the ordinary way."""
        self.defer(trigger=UploadTrigger(), method_name="execute_complete")

    def execute_complete(self, context: Any, event: Any = None) -> None:
        """Nothing to bring back: the next task lists again."""


@task
def find_uploads() -> list[dict[str, Any]]:
    """What to start: one DAG run per new upload, named for the object's identity."""
    return [
        {"trigger_dag_id": upload.job, "trigger_run_id": upload.run_label, "conf": {"input": upload.uri}}
        for upload in uploads_of_all_jobs()[:MOST_AT_ONCE]
    ]


@task(trigger_rule="none_failed")
def note_uploads(started: list[dict[str, Any]]) -> int:
    """Note what was started, so that the next listing passes it over; how many."""
    store = open_store()
    for each in started:
        note_started(store, each["trigger_dag_id"], each["trigger_run_id"], each["conf"]["input"])
    return len(started)


def uploads_of_all_jobs() -> list[Upload]:
    """New uploads of every job. A job whose file or bucket cannot be read is passed over with a warning; the others go on."""
    found: list[Upload] = []
    for job in _jobs_with_uploads():
        try:
            found += new_uploads(site_for(job.spec, "uploads"), job)
        except NightshiftError as error:
            log.warning("Cannot list the inbox of a job", job=job.name, error=str(error))
    return found


def _jobs_with_uploads() -> list[Job]:
    jobs = []
    for path in sorted(read_settings().jobs.glob("*.y*ml")):
        try:
            job = load_job(path)
        except JobInvalid:
            continue  # its own DAG says so
        if job.spec.on_upload:
            jobs.append(job)
    return jobs

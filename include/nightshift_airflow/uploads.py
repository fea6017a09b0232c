"""Uploads: what lies in the inboxes of all jobs and has not started a run yet, by listing them and by the events of their buckets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import structlog
from airflow.sdk import BaseOperator, task
from airflow.sdk.exceptions import AirflowSkipException
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.triggers.base import BaseEventTrigger, BaseTrigger, StartTriggerArgs, TaskSuccessEvent, TriggerEvent
from airflow.triggers.shared_stream import AdvanceItem, SharedStreamProducer

from nightshift.errors import NightshiftError, RunFailed, SettingInvalid
from nightshift.events import read_message
from nightshift.inbox import (
    Start,
    Upload,
    again,
    begin_group,
    begun_groups,
    hear,
    hear_all,
    heard_uploads,
    list_uploads,
    new_uploads,
    note_started,
    started_run,
    starts,
    state_of_run,
    still_there,
)
from nightshift.job import Job
from nightshift.job_file import find_job, load_job, load_jobs
from nightshift.settings import read_settings
from nightshift_airflow.site import open_store, queue_client, site_for

log = structlog.get_logger(__name__)

LISTEN_SECONDS = 1800  # then the run of the DAG ends and the next begins, so that its history stays readable
POLL_SECONDS = 20  # of one long poll of a queue, the most that SQS allows
AFTER_ERROR_SECONDS = 30.0
RUNS_AT_ONCE = 16  # of one job that uploads have started; the rest waits in the inbox, where nothing is lost
BACKFILLED_AT_ONCE = 1000  # uploads: Airflow maps no more tasks than that, unless it is told to
UNFINISHED = ["queued", "running"]
STARTED = ("success", "skipped")  # skipped: the run was there already


class UploadTrigger(BaseTrigger):
    """Looks into the inboxes until there is a run to start, or the listening time is over.

    `heard`: into those that events fill, and only until nothing waits there any more; without it the buckets are listed.
    """

    def __init__(self, heard: bool = False) -> None:
        super().__init__()
        self.heard = heard

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """See BaseTrigger."""
        return f"{type(self).__module__}.{type(self).__qualname__}", {"heard": self.heard}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Each look runs in a thread; one that fails is logged and made again."""
        deadline = time.monotonic() + LISTEN_SECONDS
        while time.monotonic() < deadline and not await asyncio.to_thread(self._is_over):
            await asyncio.sleep(read_settings().upload_poll_seconds)
        yield TaskSuccessEvent()

    def _is_over(self) -> bool:
        found, waiting = starts_of(self.heard)
        return bool(found) or (self.heard and not waiting)


class UploadSensor(BaseOperator):
    """The task `arrived`: waits in the triggerer for the first upload of any job that a run can be started for."""

    start_from_trigger = True
    start_trigger_args = StartTriggerArgs(
        trigger_cls="nightshift_airflow.uploads.UploadTrigger", trigger_kwargs={}, next_method="execute_complete"
    )

    heard = False

    def execute(self, context: Any) -> None:
        """Where nothing starts from a trigger (`dag.test()`): defer in the ordinary way."""
        self.defer(trigger=UploadTrigger(self.heard), method_name="execute_complete")

    def execute_complete(self, context: Any, event: Any = None) -> None:
        """Nothing to bring back: the next task looks again."""


class HeardSensor(UploadSensor):
    """The same for uploads that events have told of: ends at once where none of them waits for room, or for others."""

    start_trigger_args = StartTriggerArgs(
        trigger_cls="nightshift_airflow.uploads.UploadTrigger", trigger_kwargs={"heard": True}, next_method="execute_complete"
    )
    heard = True


class S3UploadTrigger(BaseEventTrigger):
    """Hears of uploads through a queue of S3 events, and notes them in the inboxes of all jobs of that queue.

    A message is deleted once what it says is noted and the asset event is kept (an ack-mode shared stream), so a triggerer that dies in
    between hears it again. The asset event itself is a doorbell: nothing is read from it.
    """

    def __init__(self, queue_url: str, connection: str) -> None:
        super().__init__()
        self.queue_url, self.connection = queue_url, connection

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """See BaseTrigger."""
        return f"{type(self).__module__}.{type(self).__qualname__}", {"queue_url": self.queue_url, "connection": self.connection}

    def shared_stream_key(self) -> tuple[str, str, str]:
        """One poll per queue, however many watch it."""
        return "nightshift-uploads", self.queue_url, self.connection

    @classmethod
    def create_shared_stream_producer(cls, kwargs: dict[str, Any]) -> SharedStreamProducer:
        """See BaseEventTrigger."""
        return _Queue(kwargs["queue_url"], kwargs["connection"])

    async def filter_shared_stream(self, shared_stream: AsyncIterator[str]) -> AsyncIterator[TriggerEvent]:
        """Note what each message says; ring where there is something new."""
        async for body in shared_stream:
            noted = await asyncio.to_thread(_hear, self.queue_url, body)
            if noted:
                yield TriggerEvent({"uploads": noted})

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Never called where streams are shared; the same, alone."""
        async for body, receipt in (queue := _Queue(self.queue_url, self.connection)).open_stream():
            noted = await asyncio.to_thread(_hear, self.queue_url, body)
            await asyncio.to_thread(queue.delete, [receipt])
            if noted:
                yield TriggerEvent({"uploads": noted})


class _Queue(SharedStreamProducer):
    """An SQS queue as a stream of message bodies."""

    def __init__(self, queue_url: str, connection: str) -> None:
        self._queue_url, self._connection = queue_url, connection
        self._client: Any = None

    async def open_stream(self) -> AsyncIterator[tuple[str, str]]:
        """Bodies and their receipts, for ever. A queue that does not answer is asked again."""
        while True:
            try:
                messages = await asyncio.to_thread(self._receive)
            except Exception as error:  # noqa: BLE001 — whatever SQS or the network does, uploads are listed meanwhile
                log.warning("The queue of uploads does not answer", queue=self._queue_url, error=str(error))
                await asyncio.sleep(AFTER_ERROR_SECONDS)
                continue
            for message in messages:
                yield message["Body"], message["ReceiptHandle"]

    async def advance(self, batch: Sequence[AdvanceItem]) -> None:
        """Delete what everybody has noted."""
        await asyncio.to_thread(self.delete, [item.broker_payload for item in batch if item.outcome.is_clean])

    def delete(self, receipts: Sequence[str]) -> None:
        """Delete messages, ten a call. One that cannot be deleted comes again, and is known by then."""
        for at in range(0, len(receipts), 10):
            entries = [{"Id": str(number), "ReceiptHandle": receipt} for number, receipt in enumerate(receipts[at : at + 10])]
            self._open().delete_message_batch(QueueUrl=self._queue_url, Entries=entries)

    def _receive(self) -> list[Any]:
        answer = self._open().receive_message(QueueUrl=self._queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=POLL_SECONDS)
        found: list[Any] = answer.get("Messages", [])
        return found

    def _open(self) -> Any:
        self._client = self._client or queue_client(self._connection)
        return self._client


def _hear(queue_url: str, body: str) -> int:
    jobs = [job for job in jobs_with_uploads(has_queue=True) if job.spec.on_upload and job.spec.on_upload.queue == queue_url]
    return hear(site_for(None, "uploads"), jobs, read_message(body))


@task
def find_uploads() -> list[dict[str, Any]]:
    """What to start now: one DAG run per upload, or per group of uploads, named for them. For jobs whose inboxes are listed."""
    return _to_start(starts_of(heard=False)[0])


@task
def find_heard_uploads(**context: Any) -> list[dict[str, Any]]:
    """The same for jobs that hear of uploads by events. Where time has started this, and no event, their buckets are listed, too."""
    if context["dag_run"].run_type != "asset_triggered":
        for job in jobs_with_uploads(has_queue=True):
            with _passed_over(job):
                hear_all(site_for(job.spec, "uploads"), job)
    return _to_start(starts_of(heard=True)[0])


def start_and_note(found: Any) -> Any:
    """The tasks that start what was found, one run each, and note what was started.

    The run id is the upload's identity, so a second announcement finds the run that the first one started.
    """
    # It imports Airflow's database models, which takes as long as all else here; a job's DAG, which imports this file, never needs them.
    from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator

    started = TriggerDagRunOperator.partial(task_id="start", logical_date=None, skip_when_already_exists=True).expand_kwargs(found)
    noted = note_uploads(found)
    started >> noted
    return noted


def _to_start(found: Sequence[Start]) -> list[dict[str, Any]]:
    store = open_store()
    for start in found:
        begin_group(store, start)
    return [_as_run(start) for start in found]


def ring_again(assets: Sequence[Any]) -> Any:
    """The task that rings for itself where uploads still wait: for room, or for others to share their run with."""

    @task(task_id="ring_again", outlets=list(assets), trigger_rule="none_failed")
    def ring() -> None:
        _, waiting = starts_of(heard=True)
        if not waiting:
            raise AirflowSkipException("Nothing waits")

    return ring


@task
def choose_uploads(**context: Any) -> list[dict[str, Any]]:
    """The runs of a backfill over uploads, in order. A run that is there already is cleared and begins anew."""
    params = context["params"]
    job = load_job(find_job(params["job"], read_settings().jobs))
    site = site_for(job.spec, "uploads")
    prefix = params.get("prefix") or ""
    if prefix and "://" not in prefix:
        raise SettingInvalid(
            [f"prefix: {prefix!r} is no URI; uploads of {job.name} are {job.spec.on_upload.uri if job.spec.on_upload else 'none'}"]
        )
    found = again(
        list_uploads(site, job),
        lambda upload: state_of_run(site.store, job.name, upload),
        prefix=prefix,
        since=_moment(params.get("since")),
        until=_moment(params.get("until")),
        reprocess=params["reprocess"],
        newest_first=bool(params.get("newest_first")),
    )
    if not found:
        log.warning("No upload is to be run: none lies there in that time, or all have their runs", prefix=prefix)
    if len(found) > BACKFILLED_AT_ONCE:
        raise SettingInvalid([f"{len(found):,} uploads are more than {BACKFILLED_AT_ONCE:,} at once: narrow the prefix or the time range."])
    groups: dict[str, list[Upload]] = {}
    for upload in list_uploads(site, job):  # who shares a run is run again with those that it was run with
        groups.setdefault(started_run(site.store, job.name, upload) or upload.label, []).append(upload)
    of = {upload.label: label for label, uploads in groups.items() for upload in uploads}
    labels = dict.fromkeys(of[upload.label] for upload in found)
    return [_as_run(Start(job=job.name, label=label, uploads=tuple(groups[label]))) for label in labels]


@task
def tell_failed_runs(chosen: list[dict[str, Any]], **context: Any) -> int:
    """Fail where a run of the backfill has not ended well, and name it; how many have."""
    ended = {each["trigger_run_id"]: context["ti"].get_dagrun_state(each["trigger_dag_id"], each["trigger_run_id"]) for each in chosen}
    failed = [name for name, state in ended.items() if state != "success"]
    if failed:
        raise RunFailed(f"{len(failed)} of {len(ended)} runs have not ended well: {', '.join(failed[:10])}", None)
    return len(ended)


def _moment(text: str | None) -> datetime | None:
    """A date-time as the form gives it; in UTC where it names no zone."""
    if not text:
        return None
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@task(trigger_rule="all_done")
def note_uploads(chosen: list[dict[str, Any]], **context: Any) -> int:
    """Note what was started, so that the next look passes it over; how many. What was not is started by the next look."""
    store, states = open_store(), mapped_states(context, "start")
    started = [each for place, each in enumerate(chosen or ()) if states.get(place) in STARTED]
    for each in started:
        uploads = tuple(Upload.model_validate(upload) for upload in each["conf"]["uploads"])
        note_started(store, Start(job=each["trigger_dag_id"], label=each["trigger_run_id"], uploads=uploads))
    return len(started)


def _as_run(start: Start) -> dict[str, Any]:
    """A run as TriggerDagRunOperator takes it."""
    conf = {"uploads": [upload.model_dump(mode="json") for upload in start.uploads]}
    return {"trigger_dag_id": start.job, "trigger_run_id": start.label, "conf": conf, "note": start.note}


def starts_of(heard: bool) -> tuple[list[Start], int]:
    """The runs to start now, of all jobs whose uploads are listed, or heard of; and how many uploads wait, with those."""
    found: list[Start] = []
    waiting = 0
    for job in jobs_with_uploads(has_queue=heard):
        with _passed_over(job):
            site = site_for(job.spec, "uploads")
            uploads = heard_uploads(site, job) if heard else new_uploads(site, job)
            if uploads:
                free = RUNS_AT_ONCE - RuntimeTaskInstance.get_dr_count(dag_id=job.name, states=UNFINISHED)
                begun = begun_groups(site.store, job.name)
                for start in starts(job, uploads, free=free, now=site.now(), begun=begun):
                    kept = still_there(site, job.name, start.uploads)
                    found += [start.model_copy(update={"uploads": tuple(kept)})] if kept else []
                waiting += len(uploads)
    return found, waiting


def mapped_states(context: Any, task_id: str) -> dict[int, str]:
    """The states of a mapped task's instances in this run, by their places."""
    ti = context["ti"]
    found = ti.get_task_states(dag_id=ti.dag_id, run_ids=[ti.run_id]).get(ti.run_id, {})
    places = ((name.removeprefix(f"{task_id}_"), state) for name, state in found.items() if name.startswith(f"{task_id}_"))
    return {int(place): str(state) for place, state in places if place.isdigit()}


@contextmanager
def _passed_over(job: Job) -> Iterator[None]:
    """A job whose bucket cannot be read is passed over with a warning; the others go on, whatever it is."""
    try:
        yield
    except NightshiftError as error:
        log.warning("Cannot look into the inbox of a job", job=job.name, error=str(error))
    except Exception:
        log.warning("Cannot look into the inbox of a job", job=job.name, exc_info=True)


def jobs_with_uploads(*, has_queue: bool) -> list[Job]:
    """The jobs that uploads start, by whether they hear of them through a queue."""
    jobs = load_jobs(read_settings().jobs)
    return [job for job in jobs if job.spec.on_upload and (job.spec.on_upload.queue is not None) == has_queue]

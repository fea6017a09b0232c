"""The inbox of a job: which uploaded objects have not started a run yet. Identity is the object and its version or eTag."""

from __future__ import annotations

from pathlib import PurePosixPath

from nightshift.job import Job
from nightshift.runs import UNSAFE, Site, run_id
from nightshift.shapes import Wire
from nightshift.stores.objects import Objects, matching


class Upload(Wire):
    """One uploaded object that a run is to be started for."""

    job: str
    uri: str
    run_label: str  # the run's name: readable, and the same for the same object in the same version


class Started(Wire):
    """A note that an upload has its run. Stored as `inbox/<job>/<run label>.json`, once."""

    uri: str


def new_uploads(site: Site, job: Job) -> list[Upload]:
    """Objects under the job's `on_upload` pattern without a note, oldest first. Empty objects and folder markers are none."""
    if not job.spec.on_upload:
        return []
    bucket, pattern = site.open_input(job.spec.on_upload.uri)
    noted = {PurePosixPath(found.key).stem for found in site.store.scan(f"inbox/{job.name}")}
    found = sorted(
        (item for item in matching(bucket, pattern) if item.size and not item.key.endswith("/")), key=lambda item: (item.modified, item.key)
    )
    uploads = [
        Upload(job=job.name, uri=bucket.uri_of(item.key), run_label=label(bucket.uri_of(item.key), item.version or item.etag))
        for item in found
    ]
    return [upload for upload in uploads if upload.run_label not in noted]


def note_started(store: Objects, job: str, run_label: str, uri: str) -> None:
    """Note that an upload has its run."""
    store.create_shape(f"inbox/{job}/{run_label}.json", Started(uri=uri))


def label(uri: str, version: str) -> str:
    """The name of the run of an upload."""
    stem = UNSAFE.sub("-", PurePosixPath(uri).name)[:80]
    return f"upload__{stem}__{run_id(uri, version)[:10]}"

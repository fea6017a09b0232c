"""The inbox of a job: which uploaded objects have not started a run yet. Identity is the object and its eTag.

Two ways lead into it, and both give the same identities: a listing, and events, which are noted as they come. So it does not
matter whether an event comes twice, late, out of order or not at all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import quote, urlsplit

from nightshift.errors import InputUnreadable
from nightshift.events import Hint, Strange
from nightshift.job import Job, Together
from nightshift.runs import Site, last_run, run_folder, run_id
from nightshift.shapes import Summary, Wire
from nightshift.stores.objects import Found, Objects, matches, matching

Reprocess = Literal["none", "failed", "all"]
RunState = Literal["published", "held", "failed", "under way"]
OUTSIDE_RUN_ID = re.compile(r"[^A-Za-z0-9._-]+")  # Airflow refuses more than that: `=`
NOTE_CHARACTERS = 800  # of the thousand that Airflow keeps
MANY = "and-{}-more"


class Upload(Wire):
    """One uploaded object."""

    uri: str
    etag: str
    size: int  # bytes
    at: datetime  # when it landed, or was heard of

    @property
    def label(self) -> str:
        """The name of its run: readable, and the same for the same object of the same content."""
        stem = OUTSIDE_RUN_ID.sub("-", PurePosixPath(self.uri).name)[:80]
        return f"upload__{stem}__{run_id(self.uri, self.etag)[:10]}"


class Start(Wire):
    """A run that is to be started, for one upload or for several together."""

    job: str
    label: str
    uploads: tuple[Upload, ...]

    @property
    def note(self) -> str:
        """What stands at the run, as Markdown: where its objects are."""
        shown: list[str] = []
        for each in self.uploads:
            link = f"[{each.uri}]({console_link(each.uri)})"
            if sum(map(len, shown)) + len(link) > NOTE_CHARACTERS:
                break
            shown.append(link)
        left = len(self.uploads) - len(shown)
        more = [f"{'and ' if shown else ''}{left} {'more' if shown else 'objects'}"] if left else []
        return "\n\n".join([*shown, *more])


class Started(Wire):
    """A note that an upload has its run. Stored as `inbox/<job>/<label of the upload>.json`, once."""

    uri: str
    run: str | None = None  # label; None: the upload's own


class Parked(Wire):
    """A message that is no event of S3, or one of an object that cannot be read. Stored as `inbox/_parked/<hash>.json`."""

    why: str
    body: str


def new_uploads(site: Site, job: Job) -> list[Upload]:
    """Objects under the job's `on_upload` pattern that have no run yet, oldest first. Empty objects and folder markers are none."""
    return without_run(site, job, list_uploads(site, job))


def heard_uploads(site: Site, job: Job) -> list[Upload]:
    """Objects that events, or a listing, have told of and that have no run yet, oldest first."""
    heard = (site.store.get_shape(found.key, Upload) for found in site.store.scan(_heard_folder(job.name)))
    return without_run(site, job, sorted((each for each in heard if each is not None), key=lambda each: (each.at, each.uri)))


def hear_all(site: Site, job: Job) -> int:
    """Note what a listing finds and no event has told of (F03); how many."""
    return sum(site.store.create_shape(_heard_key(job.name, upload), upload) for upload in new_uploads(site, job))


def still_there(site: Site, job: str, uploads: Iterable[Upload]) -> list[Upload]:
    """The uploads that are what was told of them. An older event that comes late tells of what is gone: it is forgotten (F02, F13)."""
    kept = []
    for upload in uploads:
        bucket, key = site.open_input(upload.uri)
        try:
            found = bucket.head(key)
        except InputUnreadable as error:  # its key cannot be addressed: nobody could read it, and the others go on
            _park(site.store, Strange(str(error), upload.uri))
            found = None
        if found is not None and _plain(found.etag) == upload.etag:
            kept.append(upload)
        else:
            site.store.delete([_heard_key(job, upload)])
    return kept


def list_uploads(site: Site, job: Job) -> list[Upload]:
    """Every object under the job's `on_upload` pattern, oldest first."""
    if not job.spec.on_upload:
        return []
    bucket, pattern = site.open_input(job.spec.on_upload.uri)
    found = sorted((item for item in matching(bucket, pattern) if _holds_something(item)), key=lambda item: (item.modified, item.key))
    return [
        Upload(uri=bucket.uri_of(item.key), etag=_plain(item.etag), size=item.size, at=datetime.fromtimestamp(item.modified, UTC))
        for item in found
    ]


def without_run(site: Site, job: Job, uploads: Iterable[Upload]) -> list[Upload]:
    """The uploads that no run was started for."""
    folder = _inbox(job.name)
    noted = {PurePosixPath(found.key).stem for found in site.store.scan(folder) if found.key.rpartition("/")[0] == folder}
    return [upload for upload in uploads if upload.label not in noted]


def hear(site: Site, jobs: Iterable[Job], said: Iterable[Hint | Strange]) -> int:
    """Note what events tell of, under every job whose pattern it matches; park what is strange. How many objects were noted."""
    jobs, noted = list(jobs), 0
    for each in said:
        if isinstance(each, Strange):
            _park(site.store, each)
            continue
        for job in jobs:
            if job.spec.on_upload and each.size and not each.key.endswith("/") and matches(each.uri, job.spec.on_upload.uri):
                upload = Upload(uri=each.uri, etag=_plain(each.etag), size=each.size, at=site.now())
                noted += site.store.create_shape(_heard_key(job.name, upload), upload)
    return noted


def _park(store: Objects, strange: Strange) -> None:
    name = hashlib.sha256(strange.body.encode()).hexdigest()[:24]
    store.create_shape(f"inbox/_parked/{name}.json", Parked(why=strange.why, body=strange.body))


def starts(job: Job, waiting: Sequence[Upload], *, free: int, now: datetime, begun: Sequence[Start] = ()) -> list[Start]:
    """The runs to start now, oldest first, so many at most. Decides from what waits and the time alone.

    Uploads that share a run wait until they are enough, or until the first of them has waited for long enough. `begun`: groups that were
    to be started before, and may have been: they stay as they were, whatever has landed since.
    """
    together = job.spec.on_upload.together if job.spec.on_upload else None
    taken = {upload.label for start in begun for upload in start.uploads}
    left = [upload for upload in waiting if upload.label not in taken]
    groups = [[upload] for upload in left] if together is None else list(_ripe(left, together, now))
    new = [Start(job=job.name, label=_label(group), uploads=tuple(group)) for group in groups]
    return [*begun, *new][: max(0, free)]


def begun_groups(store: Objects, job: str) -> list[Start]:
    """Groups of uploads that were to be started and are not noted as started, in key order."""
    found = (store.get_shape(each.key, Start) for each in store.scan(f"{_inbox(job)}/groups"))
    return [start for start in found if start is not None]


def begin_group(store: Objects, start: Start) -> None:
    """Fix who shares a run, before it is started: a look after a crash finds the same group under the same name."""
    if len(start.uploads) > 1:
        store.create_shape(_group_key(start), start)


def _ripe(waiting: Sequence[Upload], together: Together, now: datetime) -> Iterator[list[Upload]]:
    for at in range(0, len(waiting), together.files):
        group = list(waiting[at : at + together.files])
        if len(group) == together.files or now - group[0].at >= timedelta(minutes=together.minutes):
            yield group


def note_started(store: Objects, start: Start) -> None:
    """Note that the uploads of a run have it."""
    for upload in start.uploads:
        store.create_shape(f"{_inbox(start.job)}/{upload.label}.json", Started(uri=upload.uri, run=start.label))
        store.delete([_heard_key(start.job, upload)])
    store.delete([_group_key(start)])


def again(
    uploads: Iterable[Upload],
    state_of: Callable[[Upload], RunState | None],
    *,
    prefix: str,
    since: datetime | None,
    until: datetime | None,
    reprocess: Reprocess,
    newest_first: bool,
) -> list[Upload]:
    """The uploads of a backfill: below a prefix, landed in a time range, and as far as what became of them says so.

    `none`: that no run was started for; `failed`: those, and whose run has failed or was held; `all`: every one.
    """
    wanted = {"none": (None,), "failed": (None, "failed", "held"), "all": (None, "failed", "held", "published", "under way")}[reprocess]
    found = [
        upload
        for upload in uploads
        if upload.uri.startswith(prefix) and (since is None or upload.at >= since) and (until is None or upload.at < until)
    ]
    return sorted((each for each in found if state_of(each) in wanted), key=lambda each: (each.at, each.uri), reverse=newest_first)


def state_of_run(store: Objects, job: str, upload: Upload) -> RunState | None:
    """What became of the run of an upload; None where there is none."""
    label = started_run(store, job, upload)
    folder = run_folder(job, last_run(store, job, job, label or upload.label))
    if label is None and store.head(f"{folder}/input.json") is None:
        return None  # a backfill has begun its runs under the uploads' own labels, and notes nothing
    summary = store.get_shape(f"{folder}/summary.json", Summary)
    return "under way" if summary is None else "published" if summary.state == "planned" else summary.state


def started_run(store: Objects, job: str, upload: Upload) -> str | None:
    """The label of the run that an upload has started; None where it has started none."""
    note = store.get_shape(f"{_inbox(job)}/{upload.label}.json", Started)
    return None if note is None else note.run or upload.label


def console_link(uri: str) -> str:
    """Where a person can look at an object."""
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        return uri
    return f"https://s3.console.aws.amazon.com/s3/object/{parts.netloc}?prefix={quote(parts.path.lstrip('/'))}"


def _label(group: Sequence[Upload]) -> str:
    if len(group) == 1:
        return group[0].label
    stem = OUTSIDE_RUN_ID.sub("-", PurePosixPath(group[0].uri).name)[:60]
    return f"upload__{stem}-{MANY.format(len(group) - 1)}__{run_id(*(upload.label for upload in group))[:10]}"


def _heard_folder(job: str) -> str:
    return f"{_inbox(job)}/heard"


def _inbox(job: str) -> str:
    return f"inbox/{job}"


def _group_key(start: Start) -> str:
    return f"{_inbox(start.job)}/groups/{start.label}.json"


def _heard_key(job: str, upload: Upload) -> str:
    return f"{_heard_folder(job)}/{upload.label}.json"


def _holds_something(item: Found) -> bool:
    return bool(item.size) and not item.key.endswith("/")


def _plain(etag: str) -> str:
    """An eTag as events have it; listings put it in quotes."""
    return etag.strip('"')

"""discover: list the input objects of a run and pin each by version or eTag. What is not pinned is not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nightshift.dates import render_dates
from nightshift.errors import InputMissing, InputUnreadable, UpToDate
from nightshift.formats import count_rows, guess_format
from nightshift.job import Job
from nightshift.partitions import is_up_to_date, partition_of
from nightshift.runs import Options, Run, RunInput, Site, check_models, prompt_key, run_folder, run_id
from nightshift.shapes import PinnedObject, Wire
from nightshift.stores.objects import Found, Objects, matching
from nightshift.suite_check import check_suite

AS_THE_JOB_SAYS = Options()


class Pinned(Wire):
    """The objects of a run, in key order."""

    objects: tuple[PinnedObject, ...]

    @property
    def identity(self) -> str:
        """The same objects in the same versions have the same identity."""
        return run_id(*(f"{found.uri} {found.version or found.etag}" for found in self.objects))


def pin(site: Site, job: Job, patterns: str | Sequence[str]) -> Pinned:
    """Every object that matches a pattern, or one of several, pinned.

    Folder markers hold no rows, nor do empty objects, unless objects are the rows.

    Raises InputMissing where nothing matches (of several patterns some may match nothing any more), and InputUnreadable where a format
    cannot be told or a Parquet footer is broken.
    """
    pinned, empty = dict[str, PinnedObject](), list[str]()
    are_rows = job.spec.input.format == "files"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        bucket, key_pattern = site.open_input(pattern)
        found = [item for item in matching(bucket, key_pattern) if not item.key.endswith("/")]
        empty += [item.key for item in found if not (item.size or are_rows)]
        for item in sorted((item for item in found if item.size or are_rows), key=lambda item: item.key):
            pinned.setdefault(bucket.uri_of(item.key), _pinned(bucket, item, job))
    if not pinned:
        wanted = patterns if isinstance(patterns, str) else ", ".join(patterns)
        raise InputMissing(wanted, f"what matches it is empty ({', '.join(empty[:3])})") if empty else InputMissing(wanted)
    return Pinned(objects=tuple(pinned.values()))


def discover(
    site: Site,
    job: Job,
    *,
    pattern: str | Sequence[str],
    label: str,
    run: str,
    dates: Mapping[str, Any],
    scheduled: bool = False,
    options: Options = AS_THE_JOB_SAYS,
    unless_made: bool = False,
) -> Run:
    """Begin a run, or find it begun: a repeated discovery reads the objects of the first.

    Raises JobInvalid now, where the suite can never be applied, and AccessDenied or ModelNotFound, where the provider would refuse
    every request later. With `unless_made` it raises UpToDate, and begins nothing, where the partition was made of the same objects by
    the same job.
    """
    key = f"{run_folder(job.name, run)}/input.json"
    begun = site.store.get_shape(key, RunInput)
    if begun is None:
        objects = pin(site, job, render_dates(pattern, dates) if isinstance(pattern, str) else pattern).objects
        asked = RunInput(
            run=run,
            label=label,
            started_at=site.now(),
            partition=partition_of(job, dates, objects, scheduled=scheduled),
            objects=objects,
            job=job,
            **{**options.model_dump(), "fresh": options.fresh or job.spec.fresh},
        )
        if unless_made and options == AS_THE_JOB_SAYS and not asked.fresh and is_up_to_date(Run(site.store, asked)):
            raise UpToDate(asked.partition)
        check_suite(site.store, job)
        check_models(site, job)
        site.store.create(prompt_key(job.prompt.version), job.prompt_source.encode())
        begun = site.store.settle(key, asked)
    return Run(site.store, begun)


def _pinned(bucket: Objects, found: Found, job: Job) -> PinnedObject:
    uri = bucket.uri_of(found.key)
    fmt, compression = guess_format(found.key)
    fmt, compression = job.spec.input.format or fmt, job.spec.input.compression or compression
    if fmt is None:
        raise InputUnreadable(uri, "its name does not tell the format; set input.format to parquet, csv or jsonl")
    rows = None
    if fmt == "parquet" and not compression:
        with bucket.open(found.key, etag=found.etag, version=found.version) as file:
            rows = count_rows(file, uri)
    return PinnedObject(uri=uri, etag=found.etag, version=found.version, size=found.size, rows=rows, format=fmt, compression=compression)

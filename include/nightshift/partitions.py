"""Partitions of published results: what they are called, where they stand, what they consist of, and what they were made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, timedelta
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from nightshift.dates import day_named, render_dates
from nightshift.errors import JobInvalid
from nightshift.job import Job, JobFile
from nightshift.runs import Run, run_id
from nightshift.shapes import Outcome, PinnedObject, Wire

MANIFEST = "_manifest.json"
SHORTEST_DAY = timedelta(hours=20)  # whatever the clocks do
UNSAFE = re.compile(r"[^A-Za-z0-9._=-]+")
UNANSWERED: tuple[Outcome, ...] = ("errored", "expired", "cancelled", "missing")  # the next run asks them again


class Part(Wire):
    """One file of a partition."""

    name: str
    size: int  # bytes
    sha256: str


class Manifest(Wire):
    """What a partition consists of. Stored as `results/<job>/<partition>/_manifest.json`: the commit."""

    job: str
    partition: str
    parts: tuple[Part, ...]
    outcomes: dict[Outcome, int]
    prompt_version: str
    model: str
    made_from: str | None = None  # the objects and the recipe; the same make the same partition


def partition_of(job: Job, dates: Mapping[str, Any], objects: Sequence[PinnedObject], *, scheduled: bool) -> str:
    """The partition a run publishes: as the job says, else by its interval, else by its input's name.

    Uploading a file again under its name replaces its partition; files of the same name in two folders stay apart.
    """
    if job.spec.output.partition:
        named = render_dates(job.spec.output.partition, dates)
        partition = "/".join(UNSAFE.sub("-", part) for part in named.split("/") if part.strip("."))
        if not partition:
            raise JobInvalid([f"output.partition: {named!r} names no partition; write something like dt={{{{ ds }}}}"])
        return partition
    if scheduled:
        return dated_partition(dates, job.spec.schedules)
    first = objects[0].uri
    stem = UNSAFE.sub("-", PurePosixPath(urlsplit(first).path).name.partition(".")[0])[:60] or "input"
    return f"input={stem}-{run_id(*(found.uri for found in objects))[:8]}"


def dated_partition(dates: Mapping[str, Any], schedules: Sequence[str]) -> str:
    """The partition of an interval: its day; where a day may have several, also its time, in UTC, which no clock change repeats."""
    start, end = (dates[name].astimezone(UTC) for name in ("data_interval_start", "data_interval_end"))
    is_alone = end - start >= SHORTEST_DAY and (not schedules or ticks_once_a_day(schedules))
    return f"dt={dates['ds']}" if is_alone else f"dt={start:%Y-%m-%d}/at={start:%H%M}Z"


def day_of_input(spec: JobFile, uri: str) -> dict[str, Any] | None:
    """The dates of the day whose objects somebody has named by hand, as the schedule would read them; None where they are others.

    What is named so replaces that day's partition, and does not stand beside it as a second one of the same rows.
    """
    return day_named(uri, spec.input.uri, spec.timezone) if ticks_once_a_day(spec.schedules) else None


def ticks_once_a_day(schedules: Sequence[str]) -> bool:
    """Whether cron expressions can tick no more than once on any day."""
    if len(schedules) != 1:
        return False
    fields = schedules[0].split()
    return schedules[0] != "@hourly" if len(fields) == 1 else fields[0].isdigit() and fields[1].isdigit()


def results_folder(run: Run) -> str:
    """Where the run's partition stands; a sample never replaces one."""
    if run.input.sample is not None:
        return f"samples/{run.job.name}/{run.input.run}/results"
    return f"results/{run.job.name}/{run.input.partition}"


def quarantine_folder(run: Run) -> str:
    """Where the rows of the run's partition stand that did not succeed."""
    if run.input.sample is not None:
        return f"samples/{run.job.name}/{run.input.run}/quarantine"
    return f"quarantine/{run.job.name}/{run.input.partition}"


def is_up_to_date(run: Run) -> bool:
    """Whether the run's partition was made of the same already, and no request of it could be answered better now."""
    manifest = run.store.get_shape(f"{results_folder(run)}/{MANIFEST}", Manifest)
    return manifest is not None and manifest.made_from == run.made_from and not any(manifest.outcomes[name] for name in UNANSWERED)

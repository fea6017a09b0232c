"""What a command was given: read, and refused with the option to mend."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from nightshift.dates import interval_dates
from nightshift.errors import JobInvalid, SettingInvalid
from nightshift.job import Job
from nightshift.job_file import find_job, load_job, read_prompt, vary
from nightshift.partitions import day_of_input
from nightshift.settings import Settings

if TYPE_CHECKING:
    from nightshift.runs import Site
    from nightshift.stores.objects import Objects


def store_of(given: str | None, settings: Settings) -> str:
    """The URI of the store: the option's, else that of the environment."""
    store = given or settings.store
    if not store:
        raise SettingInvalid(["No store: give --store or set NIGHTSHIFT_STORE (s3://bucket/prefix or file:///folder)"])
    if "://" not in store:
        raise SettingInvalid([f"The store {store!r} is not a URI: write s3://bucket/prefix or file://{Path(store).absolute()}"])
    address = urlsplit(store)
    if address.scheme != "file" and not address.netloc:
        raise SettingInvalid([f"The store {store!r} names no bucket: write {address.scheme}://bucket/prefix"])
    return store


def varied(site: Site, job: str, settings: Settings, model: str | None, prompt: str | None) -> Job:
    """The job of a command, with another model or prompt where they are given."""
    path = find_job(job, settings.jobs)
    loaded = load_job(path)
    if prompt is not None and Path(prompt).is_file():
        prompt = str(Path(prompt).absolute())
    source = None if prompt is None else read_prompt(site.store, path, prompt)
    return loaded if model is None and source is None else vary(loaded, model=model, prompt_source=source)


def pattern_of(job: Job, given: str | None, ds: str | None) -> str:
    """What a run is to read: the option's objects, else the job's."""
    if given is None:
        if "{{" in job.spec.input.uri and ds is None:
            raise SettingInvalid([f"{job.name} reads {job.spec.input.uri}: give the date with --ds, or the objects with --input"])
        return job.spec.input.uri
    if "://" in given:
        return given
    path = Path(given).absolute()
    return f"file://{path}{'/' if path.is_dir() else ''}"


def interval_of(job: Job, given: str | None, ds: str | None) -> tuple[dict[str, Any], bool]:
    """The dates a run's templates may use, and whether they are those of a scheduled interval: of `ds`, or of the day that is named."""
    if given is not None and (named := day_of_input(job.spec, pattern_of(job, given, ds))):
        return named, True
    return dates_of(job, ds), ds is not None and given is None


def dates_of(job: Job, ds: str | None) -> dict[str, Any]:
    """The dates a template may use: those of the day `ds`, in the job's time zone."""
    if ds is None:
        return {}
    try:
        start = datetime.combine(date.fromisoformat(ds), time(), ZoneInfo(job.spec.timezone))
        return interval_dates(start, start + timedelta(days=1), job.spec.timezone)
    except (ValueError, OverflowError) as error:
        raise SettingInvalid([f"--ds {ds}: expected a date such as 2026-11-22"]) from error


def day_of(text: str, option: str) -> datetime:
    """A day that an option names, in UTC."""
    try:
        return datetime.combine(date.fromisoformat(text), time(), UTC)
    except ValueError as error:
        raise SettingInvalid([f"{option} {text}: expected a date such as 2026-11-22"]) from error


def pairs_of(option: str, given: list[str] | None) -> dict[str, str]:
    """The values of an option that is said several times, as NAME=VALUE."""
    pairs = [pair.partition("=") for pair in given or []]
    if alone := [name for name, equals, _ in pairs if not equals]:
        raise SettingInvalid([f"{option} {name}: expected a value, such as {name}=1" for name in alone])
    return {name: value for name, _, value in pairs}


def job_name(job: str, settings: Settings, store: Objects) -> str:
    """The name of a job: that of its file, or one that has runs in the store wherever its file is."""
    try:
        return load_job(find_job(job, settings.jobs)).name
    except JobInvalid:
        if "/" not in job and any(True for _ in store.folders(f"runs/{job}")):
            return job
        raise

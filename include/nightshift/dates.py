"""The dates that templates of a job are filled in with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from jinja2 import TemplateError

from nightshift.errors import JobInvalid
from nightshift.prompts import environment

DAY = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)")


def interval_dates(start: datetime, end: datetime, timezone: str) -> dict[str, Any]:
    """What templates know of a run's interval, in the job's time zone: the day of a job in Berlin is Berlin's day."""
    zone = ZoneInfo(timezone)
    start, end = (datetime.fromtimestamp(moment.timestamp(), zone) for moment in (start, end))
    return {
        "ds": f"{start:%Y-%m-%d}",
        "ds_nodash": f"{start:%Y%m%d}",
        "ts": start.isoformat(),
        "ts_nodash": f"{start:%Y%m%dT%H%M%S}",
        "data_interval_start": start,
        "data_interval_end": end,
    }


def day_named(uri: str, template: str, timezone: str) -> dict[str, Any] | None:
    """The dates of the day whose objects a URI names, if it is what a template says of that day; None otherwise."""
    for found in DAY.finditer(uri) if "{{" in template else ():
        with suppress(ValueError):  # 2026-13-45
            year, month, day = map(int, found.groups())
            start = datetime(year, month, day, tzinfo=ZoneInfo(timezone))
            dates = interval_dates(start, start + timedelta(days=1), timezone)
            if render_dates(template, dates) == uri:
                return dates
    return None


def has_ticks(cron: str) -> bool:
    """Whether a cron expression names any moment at all: `0 25 * * *` and `0 0 31 2 *` name none."""
    from croniter import CroniterBadDateError, croniter

    try:
        return croniter.is_valid(cron) and bool(croniter(cron).get_next())
    except CroniterBadDateError:
        return False


def render_dates(template: str, dates: Mapping[str, Any]) -> str:
    """A URI or partition template with the run's dates filled in. Raises JobInvalid where it asks for something else."""
    try:
        return environment().from_string(template).render(dates) if "{" in template else template
    except (TemplateError, TypeError, ValueError, AttributeError) as error:
        known = "ds, ds_nodash, ts, ts_nodash, data_interval_start, data_interval_end"
        raise JobInvalid([f"{template!r} cannot be filled in: {error}. Known in a run with an interval: {known}"]) from error

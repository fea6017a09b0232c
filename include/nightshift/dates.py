"""The dates that templates of a job are filled in with."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from jinja2 import TemplateError

from nightshift.errors import JobInvalid
from nightshift.prompts import environment


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


def render_dates(template: str, dates: Mapping[str, Any]) -> str:
    """A URI or partition template with the run's dates filled in. Raises JobInvalid where it asks for something else."""
    try:
        return environment().from_string(template).render(dates) if "{" in template else template
    except (TemplateError, TypeError, ValueError, AttributeError) as error:
        known = "ds, ds_nodash, ts, ts_nodash, data_interval_start, data_interval_end"
        raise JobInvalid([f"{template!r} cannot be filled in: {error}. Known in a run with an interval: {known}"]) from error

"""One or several cron expressions as a schedule of data intervals: a run reads from the last tick of any of them to the next."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pendulum
from airflow.timetables.base import DagRunInfo, DataInterval, TimeRestriction, Timetable
from airflow.timetables.interval import CronDataIntervalTimetable
from airflow.utils.dates import cron_presets
from croniter import croniter

CHANGE = timedelta(hours=2)  # that a zone's clocks are put forward or back by, at most


class CronsTimetable(Timetable):
    """Ticks of cron expressions in one time zone, and the intervals between them. No moment is read twice, and none is left out.

    Airflow's own leave out half an hour of `*/30 0-4 * * *` when the clocks are put forward (3.3.2), and for several expressions give
    every run an interval of the same length, whatever lies between the ticks.
    """

    def __init__(self, *crons: str, timezone: str) -> None:
        self._crons, self._timezone = crons, timezone
        self._clocks = [Clock(cron, timezone) for cron in crons]
        self.description = "; ".join(CronDataIntervalTimetable(cron, timezone=pendulum.timezone(timezone)).description for cron in crons)

    @property
    def summary(self) -> str:
        """What the UI shows."""
        return ", ".join(self._crons)

    def serialize(self) -> dict[str, Any]:
        """See Timetable."""
        return {"crons": list(self._crons), "timezone": self._timezone}

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> CronsTimetable:
        """See Timetable."""
        return cls(*data["crons"], timezone=data["timezone"])

    def infer_manual_data_interval(self, *, run_after: pendulum.DateTime) -> DataInterval:
        """The last interval that has ended by then."""
        end = self._tick_until(run_after)
        return DataInterval(start=self._tick_before(end), end=end)

    def next_dagrun_info(self, *, last_automated_data_interval: DataInterval | None, restriction: TimeRestriction) -> DagRunInfo | None:
        """The interval after the last one; without catchup, the latest that has ended."""
        earliest = restriction.earliest
        if not restriction.catchup:
            latest = self.infer_manual_data_interval(run_after=pendulum.now("UTC")).start
            earliest = latest if earliest is None else max(latest, earliest)
        start = last_automated_data_interval.end if last_automated_data_interval else earliest
        if start is None:
            return None
        if earliest is not None and start < earliest:
            start = earliest
        if self._tick_until(start) != start:
            start = self._tick_after(start)
        if restriction.latest is not None and start > restriction.latest:
            return None
        return DagRunInfo.interval(start=start, end=self._tick_after(start))

    def _tick_after(self, moment: pendulum.DateTime) -> pendulum.DateTime:
        """The first tick after a moment."""
        return pendulum.instance(min(clock.after(moment) for clock in self._clocks))

    def _tick_until(self, moment: pendulum.DateTime) -> pendulum.DateTime:
        """The last tick at a moment or before."""
        return self._tick_before(moment.add(microseconds=1))

    def _tick_before(self, moment: pendulum.DateTime) -> pendulum.DateTime:
        """The last tick before a moment."""
        return pendulum.instance(max(clock.before(moment) for clock in self._clocks))


class Clock:
    """The ticks of one cron expression by the clocks of a zone.

    A time that the clocks leave out when they are put forward comes as much later, as if they had not been. One that comes twice when
    they are put back ticks the first time, and both times where it ticks in every hour.
    """

    def __init__(self, cron: str, timezone: str) -> None:
        self._cron, self._zone = cron_presets.get(cron, cron), ZoneInfo(timezone)
        self._is_hourly = croniter(self._cron).expanded[1] == ["*"]

    def after(self, moment: datetime) -> datetime:
        """The first tick after a moment."""
        found: list[datetime] = []
        times = croniter(self._cron, self._shown(moment) - CHANGE)
        while True:
            ticks = list(self._ticks(times.get_next(datetime)))
            if found and ticks[0] - CHANGE > min(found):
                return min(found)
            found += [tick for tick in ticks if tick > moment]

    def before(self, moment: datetime) -> datetime:
        """The last tick before a moment."""
        found: list[datetime] = []
        times = croniter(self._cron, self._shown(moment) + CHANGE)
        while True:
            ticks = list(self._ticks(times.get_prev(datetime)))
            if found and ticks[-1] + CHANGE < max(found):
                return max(found)
            found += [tick for tick in ticks if tick < moment]

    def _shown(self, moment: datetime) -> datetime:
        return moment.astimezone(self._zone).replace(tzinfo=None)

    def _ticks(self, shown: datetime) -> Iterator[datetime]:
        """The moments, in UTC, that are meant by what the clocks show."""
        first, second = (shown.replace(tzinfo=self._zone, fold=fold).astimezone(UTC) for fold in (0, 1))
        yield first
        if self._is_hourly and second > first:
            yield second

"""Several cron expressions as one schedule of data intervals: a run reads from the last tick of any of them to the next."""

from __future__ import annotations

from typing import Any

import pendulum
from airflow.timetables.base import DagRunInfo, DataInterval, TimeRestriction, Timetable
from airflow.timetables.interval import CronDataIntervalTimetable

LONG_AGO = pendulum.datetime(1970, 1, 1)
UNRESTRICTED = TimeRestriction(earliest=None, latest=None, catchup=True)


class CronsTimetable(Timetable):
    """Ticks of several cron expressions in one time zone, and the intervals between them. No moment is read twice, and none is left out.

    Airflow's own MultipleCronTriggerTimetable gives every run an interval of the same length, whatever lies between the ticks.
    """

    def __init__(self, *crons: str, timezone: str) -> None:
        self._crons, self._timezone = crons, timezone
        self._timetables = [CronDataIntervalTimetable(cron, timezone=pendulum.timezone(timezone)) for cron in crons]
        self.description = "; ".join(each.description for each in self._timetables)

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
        before = DataInterval(start=LONG_AGO, end=moment)
        found = (each.next_dagrun_info(last_automated_data_interval=before, restriction=UNRESTRICTED) for each in self._timetables)
        return min(info.data_interval.end for info in found if info and info.data_interval)

    def _tick_until(self, moment: pendulum.DateTime) -> pendulum.DateTime:
        """The last tick at a moment or before."""
        return max(each.infer_manual_data_interval(run_after=moment).end for each in self._timetables)

    def _tick_before(self, moment: pendulum.DateTime) -> pendulum.DateTime:
        """The last tick before a moment."""
        intervals = [each.infer_manual_data_interval(run_after=moment) for each in self._timetables]
        return max(each.end if each.end < moment else each.start for each in intervals)

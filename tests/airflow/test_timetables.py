"""Several crons as one schedule: every moment is in one interval."""

from __future__ import annotations

import json
from itertools import pairwise

import pendulum
import pytest
from airflow.timetables.base import DataInterval, TimeRestriction

from nightshift_airflow.timetables import CronsTimetable
from tests.airflow.conftest import in_airflow
from tests.conftest import make_world

WORKDAYS, WEEKENDS = "0 2 * * 1-5", "0 9 * * 0,6"
ALWAYS = TimeRestriction(earliest=pendulum.datetime(2026, 11, 16), latest=None, catchup=True)


def intervals(timetable: CronsTimetable, count: int, restriction: TimeRestriction = ALWAYS) -> list[DataInterval]:
    found: list[DataInterval] = []
    for _ in range(count):
        info = timetable.next_dagrun_info(last_automated_data_interval=found[-1] if found else None, restriction=restriction)
        found.append(info.data_interval)
        assert info.run_after == info.data_interval.end
    return found


def test_intervals_reach_from_one_tick_to_the_next_of_any_cron():
    found = intervals(CronsTimetable(WORKDAYS, WEEKENDS, timezone="UTC"), 7)
    assert [f"{each.start:%a %H}-{each.end:%a %H}" for each in found] == [
        "Mon 02-Tue 02", "Tue 02-Wed 02", "Wed 02-Thu 02", "Thu 02-Fri 02", "Fri 02-Sat 09", "Sat 09-Sun 09", "Sun 09-Mon 02",
    ]  # fmt: skip


@pytest.mark.parametrize("start", [pendulum.datetime(2026, 3, 27), pendulum.datetime(2026, 10, 23)], ids=["forward", "back"])
def test_no_moment_is_left_out_or_read_twice_when_the_clocks_change(start):
    restriction = TimeRestriction(earliest=start, latest=None, catchup=True)
    found = intervals(CronsTimetable("30 2 * * *", "0 14 * * *", timezone="Europe/Berlin"), 12, restriction)
    assert all(before.end == after.start for before, after in pairwise(found))
    assert all(each.start < each.end for each in found)


NIGHTS = [  # on which the clocks of a zone change
    ("Europe/Berlin", pendulum.datetime(2027, 3, 26)),
    ("Europe/Berlin", pendulum.datetime(2026, 10, 23)),
    ("America/New_York", pendulum.datetime(2027, 3, 12)),
    ("America/New_York", pendulum.datetime(2026, 10, 30)),
    ("Australia/Lord_Howe", pendulum.datetime(2026, 10, 2)),
    ("Australia/Lord_Howe", pendulum.datetime(2027, 4, 2)),
]


@pytest.mark.parametrize(
    "crons",
    [
        ("30 2 * * *", "0 3 * * *"),
        ("0 * * * 1-5", "0 2 * * 0,6"),
        ("*/15 * * * 1-5", "0 * * * 0,6"),
        ("*/15 0-6 * * *", "0 12 * * *"),
        ("0 2 * * 1-6", "0 2 * * 0"),
        ("*/30 0-4 * * *",),
        ("@hourly", "45 1 * * *"),
    ],
)
@pytest.mark.parametrize(("zone", "start"), NIGHTS, ids=[f"{zone} {start:%Y-%m}" for zone, start in NIGHTS])
def test_every_moment_is_in_one_interval_whatever_the_clocks_do(zone, start, crons):
    """Forwards one after the other, and the same backwards: Airflow's scheduler does not survive an interval that ends before it starts."""
    timetable = CronsTimetable(*crons, timezone=zone)
    restriction = TimeRestriction(earliest=start, latest=None, catchup=True)
    found = intervals(timetable, 2, restriction)
    while found[-1].end < start.add(days=5):
        info = timetable.next_dagrun_info(last_automated_data_interval=found[-1], restriction=restriction)
        found.append(info.data_interval)
    assert all(before.end == after.start for before, after in pairwise(found))
    assert all(each.start < each.end for each in found)
    for each in found:
        assert timetable.infer_manual_data_interval(run_after=each.end) == each
        assert timetable.infer_manual_data_interval(run_after=each.end.add(seconds=1)) == each


def test_a_time_that_comes_twice_ticks_once_and_an_hour_that_does_twice():
    start = pendulum.datetime(2026, 10, 24, 12)
    restriction = TimeRestriction(earliest=start, latest=None, catchup=True)
    daily = intervals(CronsTimetable("30 2 * * *", timezone="Europe/Berlin"), 3, restriction)
    assert [f"{each.end:%d %H:%M}" for each in daily] == ["26 01:30", "27 01:30", "28 01:30"]
    hourly = intervals(CronsTimetable("0 * * * *", timezone="Europe/Berlin"), 30, restriction)
    assert all(each.end - each.start == pendulum.duration(hours=1) for each in hourly)


def test_a_time_that_is_left_out_comes_as_much_later():
    restriction = TimeRestriction(earliest=pendulum.datetime(2027, 3, 27, 12), latest=None, catchup=True)
    found = intervals(CronsTimetable("30 2 * * *", timezone="Europe/Berlin"), 2, restriction)
    assert [f"{each.start:%d %H:%M}" for each in found] == ["28 01:30", "29 00:30"]


def test_crons_that_tick_together_tick_once():
    found = intervals(CronsTimetable("0 0 * * *", "0 */12 * * *", timezone="UTC"), 4)
    assert [each.end - each.start for each in found] == [pendulum.duration(hours=12)] * 4


def test_without_catchup_the_latest_interval_that_has_ended_comes_first():
    restriction = TimeRestriction(earliest=pendulum.datetime(2020, 1, 1), latest=None, catchup=False)
    [found] = intervals(CronsTimetable("0 * * * *", "30 * * * *", timezone="UTC"), 1, restriction)
    now = pendulum.now("UTC")
    assert found.end <= now < found.end.add(minutes=31)


def test_nothing_is_scheduled_past_the_end():
    restriction = TimeRestriction(earliest=pendulum.datetime(2026, 1, 1), latest=pendulum.datetime(2025, 1, 1), catchup=True)
    assert CronsTimetable(WORKDAYS, timezone="UTC").next_dagrun_info(last_automated_data_interval=None, restriction=restriction) is None


def test_a_run_by_hand_reads_the_last_interval_that_has_ended():
    found = CronsTimetable(WORKDAYS, WEEKENDS, timezone="UTC").infer_manual_data_interval(run_after=pendulum.datetime(2026, 11, 22, 12))
    assert (found.start, found.end) == (pendulum.datetime(2026, 11, 21, 9), pendulum.datetime(2026, 11, 22, 9))


def test_it_survives_being_written_into_the_database_and_a_backfill_asks_it(migrated, tmp_path, rehearsal):
    world = make_world(tmp_path, rehearsal)
    world.job(schedule=[WORKDAYS, WEEKENDS], timezone="Europe/Berlin", catchup=True)
    code = """
import json, logging, os
logging.disable(logging.CRITICAL)
import pendulum
from airflow.dag_processing.dagbag import DagBag
from airflow.serialization.serialized_objects import DagSerialization
dag = DagBag(dag_folder=os.environ["AIRFLOW__CORE__DAGS_FOLDER"]).dags["reviews"]
again = DagSerialization.from_dict(DagSerialization.to_dict(dag))
between = again.iter_dagrun_infos_between(pendulum.datetime(2026, 11, 16), pendulum.datetime(2026, 11, 22))
print("RESULT" + json.dumps([again.timetable.summary, again.catchup, len(list(between))]))
"""
    jobs = str(tmp_path / "job-1" / "jobs")
    said = json.loads(in_airflow(migrated, code, NIGHTSHIFT_JOBS=jobs).rpartition("RESULT")[2])
    assert said == [f"{WORKDAYS}, {WEEKENDS}", True, 6]

"""Periodic reports over all jobs: rows, outcomes and cost by job, model and prompt version, and the figures that jobs declare.

Each covers the data interval of its schedule (NIGHTSHIFT_REPORTS), and can be backfilled; started by hand, the period that the form names.
"""

from nightshift.settings import read_settings
from nightshift_airflow.reports import periodic_dag

for name, cron in read_settings().reports:
    globals()[name] = periodic_dag(name, cron, __doc__)

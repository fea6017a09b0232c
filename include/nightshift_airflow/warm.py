"""What tasks import, imported once by the process that forks them: every task is a process of its own and would begin with a second of it.

For LocalExecutor: `[scheduler] mp_start_method = forkserver` and `[scheduler] mp_forkserver_preload = nightshift_airflow.warm`.
For Celery: `[celery] celery_config_options = nightshift_airflow.queue.CELERY_CONFIG`. Nothing but imports happens here: what is opened
before a fork is shared after it.
"""

from __future__ import annotations

import atexit
import gc
import importlib

# What is imported late by whom needs it, and by most tasks in the end.
LATE = (
    "airflow.providers.amazon.aws.hooks.base_aws",
    "airflow.providers.amazon.aws.utils.connection_wrapper",
    "airflow.sdk.execution_time.task_runner",
    "boto3",
    "duckdb",
    "nightshift_airflow.dags",
    "obstore.auth.boto3",
    "obstore.store",
    "openai",
    "openai.resources.batches",
    "openai.resources.files",
)

for name in LATE:
    importlib.import_module(name)
gc.collect()
gc.freeze()  # the collector of a task need not look at what all tasks share, nor copy it by doing so
atexit.register(gc.unfreeze)  # of this process: what stays frozen to the end is reported as leaked by the extensions that own it

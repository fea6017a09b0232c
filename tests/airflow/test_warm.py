"""What is imported before tasks are forked: all that they wait for, and nothing that must not be shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.airflow.conftest import airflow_env

SEEN = """
import json, os, sys
from pathlib import Path
import nightshift_airflow.warm
opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
heavy = ("duckdb", "pyarrow", "openai", "botocore", "nightshift_airflow.dags", "pandas", "great_expectations")
print(json.dumps({
    "threads": [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())],
    "sockets": [name for name in opened if "socket:" in name],
    "imported": [name for name in heavy if name in sys.modules],
}))
"""


def test_imports_are_done_and_nothing_is_opened(airflow_home):
    env = {**os.environ, **airflow_env(airflow_home), "OPENBLAS_NUM_THREADS": "1"}  # its threads know how to be forked
    ended = subprocess.run([sys.executable, "-c", SEEN], env=env, capture_output=True, text=True, check=True)
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert set(seen["threads"]) <= {"jemalloc_bg_thd"}, "Arrow starts it where it is built with jemalloc, which knows how to be forked, too"
    assert seen["sockets"] == []
    assert seen["imported"] == ["duckdb", "pyarrow", "openai", "botocore", "nightshift_airflow.dags"]
    assert "leaked" not in ended.stderr

"""Airflow without a running one: a migrated SQLite database in a temporary home, made once per session."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROLE, Rehearsal

ROOT = Path(__file__).parents[2]
RUN = """
import json, logging, os, sys
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
from nightshift_airflow import waits
logging.disable(logging.WARNING)
waits.RESUME_AFTER_SECONDS, waits.LINGER_SECONDS = 0, (0, 0)  # they are for the scheduler, and there is none
bag = DagBag(dag_folder=os.environ["AIRFLOW__CORE__DAGS_FOLDER"])
DagBundlesManager().sync_bundles_to_db()
sync_bag_to_db(bag, "dags-folder", None)
dag = bag.dags[%r]
run = dag.test(run_conf=%r)
print("RESULT" + json.dumps({"state": str(run.state), "tasks": {f"{t.task_id}[{t.map_index}]": str(t.state) for t in run.get_task_instances()}}))
"""


def airflow_env(home: Path) -> dict[str, str]:
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "NIGHTSHIFT_STORE": f"file://{home}/store",
        "PYTHONWARNINGS": "ignore",
    }


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Airflow home whose database is there."""
    home = tmp_path_factory.mktemp("airflow")
    env = {**os.environ, **airflow_env(home)}
    done = subprocess.run([str(Path(sys.executable).parent / "airflow"), "db", "migrate"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return home


@pytest.fixture
def airflow_home(migrated: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    home = tmp_path / "airflow"
    home.mkdir()
    shutil.copy(migrated / "airflow.db", home / "airflow.db")
    return home


def in_airflow(home: Path, code: str, **env: str) -> str:
    """Run Python in a process of its own that has this Airflow; Airflow reads its configuration once, at import."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **airflow_env(home), **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def aws_connection(rehearsal: Rehearsal, s3: str) -> str:
    """An AWS connection of Airflow to the S3 emulator and the rehearsal's Bedrock, as JSON."""
    services = {name: {"endpoint_url": rehearsal.url} for name in ("bedrock", "bedrock-runtime", "service-quotas")}
    services["bedrock"]["role_arn"] = ROLE
    extra = {"region_name": "us-east-1", "endpoint_url": s3, "service_config": services}
    return json.dumps({"conn_type": "aws", "login": "rehearsal", "password": "rehearsal", "extra": extra})

"""Airflow's own `@task.llm_batch` with a model of Bedrock: its operator, our adapter, the rehearsal's control plane, an S3 emulator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.airflow.conftest import RUN, aws_connection, in_airflow

COMMON_AI = Path(__file__).parents[2] / ".venv" / "llm-batch"
MODEL = "bedrock:amazon.nova-lite-v1:0"
DAG = """
import os
from datetime import datetime
from typing import Literal
from pydantic import BaseModel
from airflow.sdk import DAG, task
from airflow.providers.common.ai.operators import llm_batch
llm_batch._MIN_POLL_INTERVAL = 1  # half a minute is right for jobs of hours

class Mood(BaseModel):
    sentiment: Literal["positive", "neutral", "negative"]

with DAG("moods", start_date=datetime(2026, 1, 1), schedule=None) as dag:
    @task.llm_batch(
        llm_conn_id="bedrock_llm", model_id="MODEL", output_type=Mood, result_path=os.environ["RESULTS"], poll_interval=1, timeout=120,
    )
    def ask():
        return [f"The room number {i} was {'lovely' if i % 2 else 'awful'}." for i in range(COUNT)]
    ask()
"""


@pytest.fixture
def llm_batch(airflow_home, rehearsal, bucket, s3):
    """Runs the DAG; (what it said, its results as the operator wrote them)."""
    if not COMMON_AI.exists():
        pytest.skip("apache-airflow-providers-common-ai is not installed: make test installs it")
    results = airflow_home / "results"

    def run(count: int, code: str = RUN % ("moods", {})) -> tuple[str, list[dict]]:
        env = {
            "PYTHONPATH": str(COMMON_AI),
            "AIRFLOW_CONN_AWS_DEFAULT": aws_connection(rehearsal, s3),
            "AIRFLOW_CONN_BEDROCK_LLM": json.dumps({"conn_type": "pydanticai", "host": "aws_default"}),
            "NIGHTSHIFT_STORE": f"{bucket}/store",
            "RESULTS": f"file://{results}",
            "AIRFLOW__CORE__DAGS_FOLDER": str(airflow_home / "dags"),
        }
        (airflow_home / "dags").mkdir()
        (airflow_home / "dags" / "moods.py").write_text(DAG.replace("COUNT", str(count)).replace("MODEL", MODEL))
        said = in_airflow(airflow_home, code, **env)
        lines = [json.loads(line) for path in results.rglob("*.jsonl") for line in path.read_text().splitlines()]
        return said, lines

    return run


def test_a_task_of_airflows_own_asks_bedrock_through_our_engine(llm_batch, rehearsal):
    said, lines = llm_batch(120)
    assert '"state": "success"' in said, said[-3000:]
    assert len(lines) == 120
    assert {line["status"] for line in lines} == {"success"}
    bill = rehearsal.bill()
    assert (bill["requests"], bill["batches"]) == (120, 1)


ADAPTER = """
import json, time
from nightshift_airflow.llm_batch import BedrockBatchAdapter
from airflow.providers.common.ai.batch.output_schema import build_output_spec

adapter, spec = BedrockBatchAdapter(base_url="aws_default"), build_output_spec(str)
requests = [{"prompt": f"Room {i} was lovely."} for i in range(100)]
def submit():
    return adapter.submit(requests, model="amazon.nova-lite-v1:0", idempotency_key="k" * 16, input_fingerprint="f" * 64, output_spec=spec).batch_id
first, again = submit(), submit()
adapter.cancel_batch(first)
while (state := adapter.get_batch(first).status) == "in_progress":
    time.sleep(0.1)
after = submit()
found = adapter.find_orphaned_batch("k" * 16, "f" * 64, "2026-01-01T00:00:00+00:00")
try:
    adapter.get_batch(first[:-12] + "z" * 12)
except Exception as error:
    code = error.status_code
print("RESULT" + json.dumps([first == again, state, after != first, found == after, code]))
"""


def test_a_job_that_was_stopped_is_over_and_the_same_input_becomes_another_one(llm_batch, rehearsal):
    rehearsal.pace(validating=0.0, running=20.0, finalizing=0.0, cancelling=0.0)
    said, _ = llm_batch(100, ADAPTER)
    assert json.loads(said.rpartition("RESULT")[2]) == [True, "cancelled", True, True, 404]


def test_a_batch_below_the_minimum_is_refused_before_it_is_sent(llm_batch, rehearsal):
    said, _ = llm_batch(5)
    assert '"state": "failed"' in said, said[-3000:]
    assert rehearsal.bill()["batches"] == 0

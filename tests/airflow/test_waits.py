"""The wait as a trigger: a pause of minutes ends with the event of its job."""

from __future__ import annotations

import json

from nightshift.steps.approve import approve
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from tests.airflow.conftest import aws_connection, in_airflow
from tests.conftest import reviews

WAIT = """
import asyncio, json, time
from nightshift_airflow.waits import ChainTrigger

async def wait():
    started = time.monotonic()
    events = [event async for event in ChainTrigger(%r, %r).run()]
    print("RESULT" + json.dumps([len(events), time.monotonic() - started]))

asyncio.run(asyncio.wait_for(wait(), 100))
"""


def test_F51_an_event_ends_a_long_pause_and_the_job_is_looked_at(airflow_home, cloud, queue, s3):
    _, url = queue
    cloud.rehearsal.pace(validating=0.0, running=6.0, finalizing=0.0, cancelling=0.0)
    cloud.rehearsal.faults(minimum_records=1, events_queue=url)
    job = cloud.job(request={"provider": "bedrock", "model": "amazon.nova-lite-v1:0"})
    run = discover(cloud.site, job, pattern=cloud.write("a.jsonl", reviews(5)), label="x", run="r", dates={})
    [shard] = approve(cloud.site, run, plan(cloud.site, run), ask=lambda: True).shards
    submit(cloud.site, run, shard)
    env = {
        "AIRFLOW_CONN_AWS_DEFAULT": aws_connection(cloud.rehearsal, s3),
        "NIGHTSHIFT_STORE": cloud.site.store.uri,
        "NIGHTSHIFT_POLL_SECONDS": "600",
        "NIGHTSHIFT_BEDROCK_EVENTS": url,
    }
    said = in_airflow(airflow_home, WAIT % (run.uri, shard), **env)
    events, seconds = json.loads(said.rpartition("RESULT")[2])
    assert events == 1
    assert seconds < 90

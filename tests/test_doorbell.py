"""Events that shorten waits: from an SQS queue, twice, in any order, about anybody's jobs, or not at all."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from nightshift import doorbell
from nightshift.doorbell import Doorbell, job_of, listen_to
from nightshift.steps.approve import approve
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from tests.conftest import reviews

ARN = "arn:aws:bedrock:us-east-1:123456789012:model-invocation-job/abcdefghijkl"


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(doorbell, "LISTEN_SECONDS", 1)


def event(arn: str) -> str:
    return json.dumps({"source": "aws.bedrock", "resources": [arn], "detail": {"batchJobArn": arn, "status": "Completed"}})


def slept(bell: Doorbell, job: str, seconds: float) -> float:
    started = time.monotonic()
    asyncio.run(bell.sleep(job, seconds))
    return time.monotonic() - started


def test_F51_an_event_ends_the_pause_of_its_job_and_of_no_other(queue):
    client, url = queue
    bell = Doorbell(listen_to(url, client))
    client.send_message(QueueUrl=url, MessageBody=event(ARN))
    client.send_message(QueueUrl=url, MessageBody="not an event")
    assert slept(bell, "another job", 2.0) >= 2.0
    assert slept(bell, ARN, 30.0) < 15.0, "what nobody waited for was left in the queue, for whoever does"


def test_F51_a_queue_that_does_not_answer_leaves_the_pauses_as_they_are(monkeypatch):
    monkeypatch.setattr(doorbell, "AFTER_ERROR_SECONDS", 0.05)

    def broken(is_waited_for):
        raise ConnectionError

    assert 0.3 <= slept(Doorbell(broken), ARN, 0.3) < 5.0


def test_the_rehearsal_tells_of_its_jobs(cloud, queue):
    client, url = queue
    cloud.rehearsal.faults(minimum_records=1, events_queue=url)
    job = cloud.job(request={"provider": "bedrock", "model": "amazon.nova-lite-v1:0"})
    run = discover(cloud.site, job, pattern=cloud.write("a.jsonl", reviews(5)), label="x", run="r", dates={})
    [shard] = approve(cloud.site, run, plan(cloud.site, run), ask=lambda: True).shards
    receipt = submit(cloud.site, run, shard)
    assert slept(Doorbell(listen_to(url, client)), receipt.batch_id, 30.0) < 20.0


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"detail": {}}', '{"detail": {}, "resources": []}', '{"detail": 7}'])
def test_what_is_no_event_names_no_job(body):
    assert job_of(body) is None

"""Chains of tasks: which shards share one, and what becomes of a chain whose shards do not end alike."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from nightshift.errors import JobInvalid, StoreUnavailable
from nightshift.providers.protocol import Snapshot
from nightshift.settings import read_settings
from nightshift.shapes import Receipt
from nightshift.steps.approve import approve
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from nightshift.steps.wait import pauses
from nightshift.stores.ledger import Claim
from nightshift_airflow import site, waits
from nightshift_airflow.chains import chain_of, chains, shards_of
from nightshift_airflow.waits import News
from tests.airflow.conftest import in_airflow
from tests.conftest import reviews

ROUND = """
from types import SimpleNamespace
from airflow.sdk.exceptions import TaskDeferred
from nightshift_airflow.waits import CollectShards

task = CollectShards(task_id="collect", run_uri=%r, chain=%r)
try:
    ended = task.execute({"ti": SimpleNamespace(dag_id="d", run_id="r", task_id="collect", map_index=0, try_number=1)})
except TaskDeferred as deferred:
    ended = f"waits for {deferred.trigger.chain}"
except Exception as error:
    ended = type(error).__name__
print("RESULT" + ended)
"""
WAIT = """
import asyncio
from nightshift_airflow import waits

waits.LINGER_SECONDS = 2.0

async def wait():
    return [event async for event in waits.ChainTrigger(%r, %r).run()]

print(f"RESULT{len(asyncio.run(asyncio.wait_for(wait(), 100)))}")
"""
STOP = """
from nightshift_airflow.waits import ChainTrigger

trigger = ChainTrigger(%r, %r)
trigger._is_stopped = lambda: True  # there is no Airflow that could say so
trigger._cancel_if_stopped()
"""
names = st.lists(st.from_regex("[0-9a-f]{64}", fullmatch=True), unique=True, max_size=40)


@given(shards=names, most=st.integers(1, 12))
def test_every_shard_is_in_one_chain_and_the_first_of_all_chains_are_the_first_of_the_run(shards, most):
    dealt = [shards_of(chain) for chain in chains(shards, most)]
    assert sorted(shard for chain in dealt for shard in chain) == sorted(shards)
    assert len(dealt) == min(most, len(shards))
    assert [chain[0] for chain in dealt] == shards[: len(dealt)]
    assert max(map(len, dealt), default=0) - min(map(len, dealt), default=0) <= 1


def test_a_run_of_few_shards_has_a_chain_for_each():
    assert chains(["a", "b"], 64) == ["a", "b"]


@pytest.mark.parametrize("said", ["0", "-1", "many", "1.5", ""])
def test_a_width_that_is_none_is_refused_and_named(said):
    with pytest.raises(JobInvalid, match="NIGHTSHIFT_WIDTH"):
        read_settings({"NIGHTSHIFT_WIDTH": said})


@pytest.fixture
def planned(world):
    """A run of three shards, none of them submitted: (world, run, shards)."""
    job = world.job(policy={"max_requests_per_shard": 5, "retry": {"cancelled": 0}})
    run = discover(world.site, job, pattern=world.write("in.jsonl", reviews(15)), label="x", run="r", dates={})
    shards = approve(world.site, run, plan(world.site, run), ask=lambda: True).shards
    assert len(shards) == 3
    return world, run, shards


def env_of(world) -> dict[str, str]:
    connection = {"conn_type": "openai", "host": f"{world.rehearsal.url}/v1", "password": world.rehearsal.key}
    return {
        "AIRFLOW_CONN_OPENAI_DEFAULT": json.dumps(connection),
        "NIGHTSHIFT_STORE": world.site.store.uri,
        "NIGHTSHIFT_POLL_SECONDS": "0.2",
    }


def submit_one_that_ends_and_one_that_goes_on(world, run, quick: str, slow: str) -> Receipt:
    """The receipt of the one that goes on."""
    submit(world.site, run, quick)
    until_over(world, run, quick)
    world.rehearsal.pace(validating=0.0, running=600.0, finalizing=0.0, cancelling=0.0)
    return submit(world.site, run, slow)


def until_over(world, run, shard: str) -> None:
    for pause in pauses(world.site, run, shard):
        time.sleep(pause)


def submit_elsewhere(world, run, shard: str) -> None:
    """As if another connection had sent it: nobody can look at it from here, until somebody mends that."""
    now = world.site.now()
    token = world.site.ledger.token(shard, 1)
    claim = Claim(
        token=token, owner="x", claimed_at=now, where="http://elsewhere", run=run.uri, provider="openai", model="gpt-5.4-nano", asked=5
    )
    assert world.site.ledger.claim(shard, 1, claim)
    world.site.ledger.record_receipt(shard, 1, Receipt(token=token, batch_id="batch_1", created_at=now))


def test_what_is_over_is_collected_before_what_goes_on_and_before_what_failed(airflow_home, planned):
    world, run, (quick, slow, lost) = planned
    receipt = submit_one_that_ends_and_one_that_goes_on(world, run, quick, slow)
    submit_elsewhere(world, run, lost)

    def collect_round() -> str:
        said = in_airflow(airflow_home, ROUND % (run.uri, chain_of([lost, slow, quick])), **env_of(world))
        return said.rpartition("RESULT")[2].strip()

    assert collect_round() == f"waits for {slow}"
    assert world.site.ledger.settled(quick) is not None
    assert world.site.ledger.settled(slow) is None
    world.rehearsal.provider().cancel(receipt.batch_id)
    until_over(world, run, slow)
    assert collect_round() == "WrongPlace"
    assert world.site.ledger.settled(slow) is not None
    assert world.rehearsal.bill()["requests"] <= 10, "nothing was bought twice"


def test_the_first_that_is_over_waits_for_the_others_only_a_while(airflow_home, planned):
    world, run, (quick, slow, _) = planned
    submit_one_that_ends_and_one_that_goes_on(world, run, quick, slow)
    assert in_airflow(airflow_home, WAIT % (run.uri, chain_of([slow, quick])), **env_of(world)).rpartition("RESULT")[2].strip() == "1"


def test_F104_stopping_a_chain_cancels_each_of_its_batches_that_it_can(airflow_home, planned):
    world, run, (quick, slow, lost) = planned
    receipt = submit_one_that_ends_and_one_that_goes_on(world, run, quick, slow)
    submit_elsewhere(world, run, lost)
    in_airflow(airflow_home, STOP % (run.uri, chain_of([lost, quick, slow])), **env_of(world))
    assert world.rehearsal.provider().poll(receipt.batch_id).status in ("cancelling", "cancelled")


def test_a_wait_says_what_is_news_and_not_every_look(monkeypatch):
    def look(status: str, done: int) -> Snapshot:
        return Snapshot(state="running", status=status, done=done, total=1000, result_files=(), reasons=(), bad_lines={})

    with structlog.testing.capture_logs() as lines:
        monkeypatch.setattr(waits, "log", structlog.get_logger())
        news = News("a" * 64)
        for each in [look("validating", 0), look("validating", 0), *(look("in_progress", done) for done in range(1001))]:
            news(each)
        news(StoreUnavailable("s3", "no"))
        news(look("in_progress", 1000))
    tenths = [("in_progress", done) for done in range(0, 1001, 100)]
    assert [(line.get("status"), line.get("done")) for line in lines] == [("validating", 0), *tenths, (None, None)]


def test_a_connection_is_asked_for_once_a_minute_and_a_mended_one_is_seen(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(site, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(site, "_connections", {})

    def host(says: str) -> str | None:
        monkeypatch.setenv("AIRFLOW_CONN_MENDED", json.dumps({"conn_type": "openai", "host": says}))
        return site.openai_access("mended").base_url

    assert host("http://before") == "http://before"
    clock[0] = 59.0
    assert host("http://after") == "http://before"
    clock[0] = 60.0
    assert host("http://after") == "http://after"

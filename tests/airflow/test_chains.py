"""Chains of tasks: which shards share one, and what becomes of a chain whose shards do not end alike."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from nightshift.errors import AccessDenied, SettingInvalid, StoreUnavailable
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
from nightshift_airflow.retries import RETRIES
from nightshift_airflow.waits import News, linger_seconds
from tests.airflow.conftest import in_airflow
from tests.conftest import reviews

TASK = """
import json
from dataclasses import replace
from types import SimpleNamespace
from airflow.sdk.exceptions import TaskDeferred
from nightshift_airflow import shards

context = {"ti": SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=0, try_number=1)}
shards.is_stopped = lambda ti: False  # there is no Airflow that could say so

def told(does):
    try:
        found = {"gives": does()}
    except TaskDeferred as deferred:
        found = {"waits for": deferred.trigger.chain, "later": deferred.trigger.later, **deferred.kwargs}
    except Exception as error:
        found = {"raises": type(error).__name__, "says": str(error)}
    print("RESULT" + json.dumps(found))
"""
SUBMIT = (
    TASK
    + """
told(lambda: shards.SubmitShards(task_id="submit", run_uri=%r, chain=%r).execute(context))
"""
)
COLLECT = (
    TASK
    + """
told(lambda: shards.CollectShards(task_id="collect", run_uri=%r, chain=%r).execute(context))
"""
)
ROUND = (
    TASK
    + """
told(lambda: shards.CollectShards(task_id="collect", run_uri=%r, chain=%r).go_on(context, {"over": %r, "goes_on": ""}, failed=%r, tries=%r))
"""
)
KILLED = (
    TASK
    + """
stopped, is_sent = %r, %r
shards.is_stopped = lambda ti: stopped
task = shards.SubmitShards(task_id="submit", run_uri=%r, chain=%r)
submit, kills = shards.submit, iter([task.on_kill])

def submit_and_be_killed(site, run, shard):
    kill = next(kills, None)
    if kill is None:
        return submit(site, run, shard)
    if is_sent:
        receipt = submit(site, run, shard)
    kill()
    task._killing.join()
    return receipt if is_sent else submit(replace(site, stopped=lambda: False), run, shard)  # as if its call were out by then

shards.submit = submit_and_be_killed
told(lambda: task.execute(context))
"""
)
WAIT = """
import asyncio, json
from nightshift_airflow import waits

waits.RESUME_AFTER_SECONDS, waits.LINGER_SECONDS = 0, (%r, %r)

async def wait():
    return [event.payload async for event in waits.ChainTrigger(%r, %r, ends_task=False, later=%r).run()]

[told] = asyncio.run(asyncio.wait_for(wait(), 100))
print("RESULT" + json.dumps(told))
"""
STOP = """
from nightshift_airflow import waits

waits.is_stopped = lambda ti: True  # there is no Airflow that could say so
waits.ChainTrigger(%r, %r)._cancel_if_stopped()
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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *(("NIGHTSHIFT_WIDTH", said) for said in ("0", "-1", "many", "1.5", "")),
        *(("NIGHTSHIFT_POLL_SECONDS", said) for said in ("0", "-1", "often", "inf", "nan")),
        ("NIGHTSHIFT_SCRATCH", "/scratch/a[1]"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_and_named(name, said):
    with pytest.raises(SettingInvalid, match=name):
        read_settings({name: said})


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


def in_task(home, world, code: str) -> dict:
    return json.loads(in_airflow(home, code, **env_of(world)).rpartition("RESULT")[2])


def status_of(world, shard: str) -> str:
    """What the provider says of the last batch of a shard."""
    return world.rehearsal.provider().poll(world.site.ledger.attempts(shard)[-1].receipt.batch_id).status


def test_a_chain_goes_on_without_the_shard_that_fails_and_says_so_in_the_end(airflow_home, planned):
    world, run, (quick, slow, broke) = planned
    receipt, chain = submit_one_that_ends_and_one_that_goes_on(world, run, quick, slow), chain_of([broke, slow, quick])
    world.rehearsal.faults(create_quota=1)
    told = in_task(airflow_home, world, COLLECT % (run.uri, chain))
    assert told["waits for"] == slow
    assert len(told["failed"]) == 1
    assert broke[:12] in told["failed"][0]
    assert world.site.ledger.settled(quick) is not None, "what is over is collected all the same"
    world.rehearsal.provider().cancel(receipt.batch_id)
    until_over(world, run, slow)
    told = in_task(airflow_home, world, ROUND % (run.uri, chain, slow, told["failed"], told["tries"]))
    assert told["raises"] == "ShardsFailed"
    assert broke[:12] in told["says"]
    assert world.site.ledger.settled(slow) is not None
    assert len(world.site.ledger.attempts(broke)) == 1, "a person has to look before it is sent again"
    assert world.site.store.get(run.key("problem.json")).find(b"QuotaExhausted") > 0


def test_what_may_pass_is_tried_again_later_and_not_for_ever(airflow_home, planned):
    world, run, (quick, slow, broke) = planned
    submit_one_that_ends_and_one_that_goes_on(world, run, quick, slow)
    world.rehearsal.faults(content_404=99)
    told = in_task(airflow_home, world, COLLECT % (run.uri, chain_of([quick, slow])))
    assert (told["waits for"], told["later"], told["failed"]) == (chain_of([slow, quick]), quick, [])
    world.rehearsal.faults(content_404=99, create_quota=1)
    chain = chain_of([broke, quick])
    told = in_task(airflow_home, world, COLLECT % (run.uri, chain))
    assert (told["waits for"], told["later"], told["tries"], len(told["failed"])) == (quick, quick, 1, 1)
    told = in_task(airflow_home, world, ROUND % (run.uri, chain, quick, told["failed"], RETRIES))
    assert told["raises"] == "ShardsFailed"
    assert broke[:12] in told["says"]
    assert quick[:12] in told["says"]


def test_a_chain_of_one_shard_fails_with_its_own_error(airflow_home, planned):
    world, run, (shard, *_) = planned
    submit_elsewhere(world, run, shard)
    assert in_task(airflow_home, world, COLLECT % (run.uri, shard))["raises"] == "WrongPlace"


def test_F37_the_others_of_a_chain_are_submitted_where_one_is_refused(airflow_home, planned):
    world, run, shards = planned
    world.rehearsal.faults(create_quota=1)
    told = in_task(airflow_home, world, SUBMIT % (run.uri, chain_of(shards)))
    assert told["gives"] == chain_of(shards)
    assert [bool(world.site.ledger.attempts(shard)[-1].receipt) for shard in shards] == [False, True, True]
    world.rehearsal.faults(create_quota=9)
    assert in_task(airflow_home, world, SUBMIT % (run.uri, shards[0]))["raises"] == "QuotaExhausted"


@pytest.mark.parametrize(
    ("stopped", "is_sent"),
    [
        pytest.param(True, True, id="stopped between two shards"),
        pytest.param(True, False, id="stopped while a create call is out"),
        pytest.param(False, True, id="its worker is to end"),
    ],
)
def test_F104_a_task_that_is_stopped_while_it_submits_cancels_and_sends_nothing_more(airflow_home, planned, stopped, is_sent):
    world, run, (first, *others) = planned
    world.rehearsal.pace(validating=0.0, running=600.0, finalizing=0.0, cancelling=0.0)
    in_task(airflow_home, world, KILLED % (stopped, is_sent, run.uri, chain_of([first, *others])))
    assert (status_of(world, first) in ("cancelling", "cancelled")) == stopped
    sent = [shard for shard in others if any(attempt.receipt for attempt in world.site.ledger.attempts(shard))]
    assert sent == ([] if stopped else others)


def test_the_first_that_is_over_waits_for_the_others_only_a_while(airflow_home, planned):
    world, run, (quick, slow, later) = planned
    submit_one_that_ends_and_one_that_goes_on(world, run, quick, slow)

    def wait(linger: float, shards: list[str], later: str = "") -> dict:
        return json.loads(
            in_airflow(airflow_home, WAIT % (linger, linger, run.uri, chain_of(shards), later), **env_of(world)).rpartition("RESULT")[2]
        )

    assert wait(2.0, [slow, quick]) == {"over": quick, "goes_on": slow}
    world.rehearsal.pace(validating=0.0, running=10.0, finalizing=0.0, cancelling=0.0)
    submit(world.site, run, later)
    assert wait(60.0, [later, quick]) == {"over": chain_of([later, quick]), "goes_on": ""}
    assert wait(2.0, [later, quick], later=later) == {"over": quick, "goes_on": later}, "something has failed for it a moment ago"


@pytest.mark.parametrize(("waited", "lingers"), [(0, 20), (199, 20), (900, 90), (86_400, 600)])
def test_who_has_waited_long_waits_longer_for_the_others(waited, lingers):
    assert linger_seconds(waited) == lingers


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


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"profile_name": "nobody"}, id="no such profile"),
        pytest.param({"assume_role_method": "by magic", "role_arn": "arn:aws:iam::1:role/x"}, id="no such way to a role"),
        pytest.param({"config_kwargs": {"nonsense": 1}}, id="no such setting"),
    ],
)
def test_a_connection_that_cannot_be_used_is_told_by_its_name(monkeypatch, extra):
    monkeypatch.setenv("AIRFLOW_CONN_CROOKED", json.dumps({"conn_type": "aws", "extra": extra}))
    with pytest.raises(SettingInvalid, match="The connection crooked cannot be used"):
        site.queue_client("crooked")


def test_a_connection_of_openai_may_name_port_and_organization_apart(monkeypatch):
    said = {"host": "http://gateway/v1", "port": 8443, "extra": {"openai_client_kwargs": json.dumps({"organization": "o", "project": "p"})}}
    monkeypatch.setenv("AIRFLOW_CONN_APART", json.dumps({"conn_type": "openai", **said}))
    access = site.openai_access("apart")
    assert access.base_url == "http://gateway:8443/v1"
    assert access.headers == (("OpenAI-Organization", "o"), ("OpenAI-Project", "p"))


def test_a_connection_is_asked_for_once_a_minute_and_a_mended_one_is_seen(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(site, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def host(says: str) -> str | None:
        monkeypatch.setenv("AIRFLOW_CONN_MENDED", json.dumps({"conn_type": "openai", "host": says}))
        return site.openai_access("mended").base_url

    with pytest.raises(AccessDenied, match="no Airflow connection"):
        site.openai_access("mended")
    assert host("http://before") == "http://before", "that there was none is not kept"
    clock[0] = 59.0
    assert host("http://after") == "http://before"
    clock[0] = 60.0
    assert host("http://after") == "http://after"

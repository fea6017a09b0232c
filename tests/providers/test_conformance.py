"""What every provider promises, in the same sentences. A new one is one more line in PLACES."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from nightshift.drive import begin, begin_again, drive
from nightshift.errors import AccessDenied, BatchUnknown, ModelNotFound, NightshiftError, ProviderUnavailable, ShardHeld
from nightshift.job import Job, RequestSpec
from nightshift.money.prices import tier_of
from nightshift.providers.bedrock import BedrockJobs, BedrockRuntime
from nightshift.providers.forms import form_of
from nightshift.providers.live import LiveServer, OpenAIApi
from nightshift.providers.openai import OpenAIBatches
from nightshift.providers.protocol import Provider, Question
from nightshift.shapes import Summary
from nightshift.steps.approve import approve
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from nightshift.stores.ledger import LEASE
from tests.conftest import World, make_world, order, reviews

CLAUDE, NOVA = "us.anthropic.claude-haiku-4-5-20251001-v1:0", "amazon.nova-lite-v1:0"


@dataclass(frozen=True)
class Place:
    """Where a job's requests are asked: the `request` section of its file, and a model that can stand in."""

    name: str
    request: dict[str, Any]
    stand_in: str = "gpt-5.4-mini"


PLACES = [
    Place("openai-chat", {"provider": "openai"}),
    Place("openai-responses", {"provider": "openai", "endpoint": "/v1/responses"}),
    Place("live-chat", {"provider": "live"}),
    Place("live-responses", {"provider": "live", "endpoint": "/v1/responses"}),
    Place("bedrock-converse", {"provider": "bedrock", "model": NOVA}, CLAUDE),
    Place("bedrock-claude", {"provider": "bedrock", "endpoint": "invoke", "model": CLAUDE}, "anthropic.claude-sonnet-4-6"),
    Place("live-converse", {"provider": "live", "endpoint": "converse", "model": NOVA}, CLAUDE),
]


@dataclass
class Ready:
    """A place with its servers up."""

    place: Place
    world: World
    site: Any

    def job(self, request: dict[str, Any] | None = None, **changes: Any) -> Job:
        return self.world.job(request={**self.place.request, **(request or {})}, **changes)

    @property
    def provider(self) -> Provider:
        return self.site.open_provider(self.job().spec.request)

    @property
    def is_batch(self) -> bool:
        return tier_of(self.place.request["provider"]) == "batch"

    def go(self, job: Job, uri: str, **changes: Any) -> Summary:
        site = replace(self.site, **changes)
        return drive(site, begin(site, job, pattern=uri, dates={}, scheduled=False), ask=lambda run, planned: True)

    def faults(self, **wanted: Any) -> None:
        self.world.rehearsal.faults(**{"minimum_records": 1, **wanted})

    def begun(self, job: Job, count: int) -> tuple[Any, str]:
        uri = self.world.write("a.jsonl", reviews(count))
        run = discover(self.site, job, pattern=uri, label="x", run="r", dates={})
        [shard] = approve(self.site, run, plan(self.site, run), ask=lambda: True).shards
        return run, shard

    def elsewhere(self, key: str | None = None, url: str | None = None) -> Provider:
        """The same provider with another key or at another address."""
        request, rehearsal = RequestSpec(**{"model": "gpt-5.4-nano", **self.place.request, "prompt": "p"}), self.world.rehearsal
        if request.is_on_bedrock:
            access = rehearsal.bedrock()
            access = replace(access, endpoints=tuple((service, url) for service, _ in access.endpoints)) if url else access
            api = BedrockRuntime(request.endpoint, access)
            return (
                LiveServer(request.endpoint, self.site.store, api)
                if request.provider == "live"
                else BedrockJobs(request.endpoint, self.site.store, access)
            )
        access = replace(rehearsal.access(key=key), base_url=f"{url}/v1") if url else rehearsal.access(key=key)
        if request.provider == "live":
            return LiveServer(request.endpoint, self.site.store, OpenAIApi(request.endpoint, access))
        return OpenAIBatches(request.endpoint, access, sleep=lambda seconds: None)


@pytest.fixture(params=PLACES, ids=lambda place: place.name)
def ready(request: pytest.FixtureRequest, tmp_path, rehearsal, bucket, monkeypatch) -> Ready:
    monkeypatch.setattr("nightshift.drive.TRANSIENT_PAUSE_SECONDS", 0.05)
    world = make_world(tmp_path, rehearsal, store_uri=f"{bucket}/store")
    found = Ready(place=request.param, world=world, site=world.site)
    found.faults()
    return found


def test_an_unchanged_job_goes_the_whole_way_and_the_bill_is_the_reports(ready):
    job = ready.job(policy={"max_requests_per_shard": 12})
    uri = ready.world.write("a.jsonl", [*reviews(30), {"id": "again", "text": reviews(1)[0]["text"]}, {"id": "none", "text": None}])
    summary, bill = ready.go(job, uri), ready.world.rehearsal.bill()
    assert (summary.state, summary.outcomes["succeeded"], summary.outcomes["rejected"]) == ("published", 31, 1)
    assert (bill["requests"], bill["unique_requests"], bill["batches"]) == (30, 30, 3 if ready.is_batch else 0)
    assert summary.cost_usd.actual == pytest.approx(bill["usd"], abs=3e-6)
    assert {line["tier"] for line in bill["by_batch"]} == {"batch" if ready.is_batch else "standard"}
    again = ready.go(job, uri)
    assert (again.requests.submitted, ready.world.rehearsal.bill()["requests"]) == (0, 30)


def test_every_row_gets_its_own_answer(ready):
    ready.go(ready.job(), ready.world.write("a.jsonl", reviews(40)))
    [part] = [found.key for found in ready.site.store.scan("results") if found.key.endswith(".parquet")]
    table = pq.read_table(ready.site.store.open(part))
    found = dict(zip(table.column("id").to_pylist(), table.column("sentiment").to_pylist(), strict=True))
    assert found == {row["id"]: "positive" if "lovely" in row["text"] else "negative" for row in reviews(40)}


def test_nothing_of_a_settled_batch_stays_beside_the_store(ready):
    ready.go(ready.job(), ready.world.write("a.jsonl", reviews(10)))
    assert [found.key for folder in ("live", "bedrock") for found in ready.site.store.scan(folder)] == []


def test_what_is_wrong_is_mended_made_longer_or_asked_of_another_model(ready, monkeypatch):
    """A repair shows the model its answer; a longer one has a larger limit; a stand-in is another model: all in the provider's words."""
    asked: list[str] = []

    def answer(text: str, schema: Any) -> str:
        asked.append(text)
        return "no JSON" if "number 3 " in text and asked.count(text) < 3 else '{"sentiment":"neutral","confidence":0.5}'

    monkeypatch.setattr("nightshift.rehearsal.model.answer", answer)
    job = ready.job(policy={"retry": {"invalid": {"times": 2, "model": ready.place.stand_in}}})
    summary = ready.go(job, ready.world.write("a.jsonl", reviews(8)))
    assert (summary.outcomes["succeeded"], summary.paid) == (8, 10)
    models = {line["model"] for line in ready.world.rehearsal.bill()["by_batch"]}
    assert models == {job.spec.request.model, ready.place.stand_in}


def test_answers_that_are_cut_are_asked_for_with_a_larger_limit(ready):
    job = ready.job(request={"parameters": {"max_output_tokens": 5}}, policy={"retry": {"truncated": {"times": 1, "token_factor": 16}}})
    summary = ready.go(job, ready.world.write("a.jsonl", reviews(6)))
    assert (summary.outcomes["succeeded"], summary.paid) == (6, 12)


def test_F33_F100_an_answer_that_is_lost_on_the_way_is_not_lost_for_us(ready):
    ready.faults(**({"create_500_after_accept": 1} if ready.is_batch else {"live_cut": 1}))
    assert ready.go(ready.job(), ready.world.write("a.jsonl", reviews(12))).outcomes["succeeded"] == 12
    assert ready.world.rehearsal.bill()["requests"] == (12 if ready.is_batch else 13), "what was in flight on demand is asked again"


def test_F35_a_receipt_that_was_never_written_costs_nothing_twice(ready):
    run, shard = ready.begun(ready.job(), 10)
    first = submit(ready.site, run, shard)
    ready.site.store.delete([f"shards/{shard}/receipt-1.json"])
    later = replace(ready.site, now=lambda: datetime.now(UTC) + LEASE + timedelta(seconds=1))
    assert submit(later, run, shard).batch_id == first.batch_id
    assert drive(later, run, ask=lambda run, planned: True).outcomes["succeeded"] == 10
    assert ready.world.rehearsal.bill()["requests"] == 10


def test_F36_of_two_workers_at_one_shard_one_pays(ready):
    run, shard = ready.begun(ready.job(), 10)
    told: list[object] = []

    def work() -> None:
        try:
            told.append(submit(ready.site, run, shard))
        except ShardHeld as held:
            told.append(held)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(told) == 4
    assert drive(ready.site, run, ask=lambda run, planned: True).outcomes["succeeded"] == 10
    assert ready.world.rehearsal.bill()["requests"] == 10


def test_who_has_lost_the_claim_sends_nothing(ready, tmp_path):
    provider, lines = ready.provider, tmp_path / "lines"
    form = form_of(ready.job().spec.request.endpoint)
    lines.write_bytes(form.line("ab" * 32, b"{}") + b"\n")
    with pytest.raises(ProviderUnavailable):
        provider.create(order(provider.upload("nightshift-x-1", lines), token="a" * 32), lambda: False)
    bill = ready.world.rehearsal.bill()
    assert (bill["batches"], bill["requests"]) == (0, 0)


def test_a_look_up_finds_nothing_or_fails_and_never_mixes_the_two(ready):
    since = datetime.now(UTC)
    assert ready.provider.find(["0" * 32], since) is None
    if ready.is_batch:
        with pytest.raises(NightshiftError):
            ready.elsewhere(url="http://127.0.0.1:9").find(["0" * 32], since)
        with pytest.raises(BatchUnknown):
            ready.provider.poll("arn:aws:bedrock:us-east-1:123456789012:model-invocation-job/abcdefghijkl")


def test_a_batch_is_stopped_more_than_once_and_too_late_without_an_error(ready):
    run, shard = ready.begun(ready.job(), 5)
    receipt = submit(ready.site, run, shard)
    drive(ready.site, run, ask=lambda run, planned: True)
    for _ in range(2):
        ready.provider.cancel(receipt.batch_id)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        pytest.param(lambda ready: ready.elsewhere(key="sk-wrong"), AccessDenied, id="wrong key"),
        pytest.param(lambda ready: ready.elsewhere(url="http://127.0.0.1:9"), ProviderUnavailable, id="nobody there"),
    ],
)
def test_F38_a_place_where_nothing_can_succeed_says_so_for_nothing(ready, monkeypatch, place: Callable[[Ready], Provider], error):
    if error is AccessDenied:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    model = ready.job().spec.request.model
    with pytest.raises(error):
        place(ready).check(model)


def test_F40_F102_a_model_that_is_not_offered_is_told_before_anything_is_read(ready):
    model = "anthropic.claude-99" if "claude" in ready.place.name else "no-such-model"
    with pytest.raises(ModelNotFound, match=r"Change request\.model"):
        ready.go(ready.job(request={"model": model}), ready.world.write("a.jsonl", reviews(2)))


def test_F26_F44_F99_what_stumbles_is_asked_again(ready):
    ready.faults(**({"rate_limit": 2, "poll_500": 2, "poll_html": 2} if ready.is_batch else {"live_429": 3, "live_500": 2, "live_html": 2}))
    assert ready.go(ready.job(), ready.world.write("a.jsonl", reviews(10))).outcomes["succeeded"] == 10
    assert ready.world.rehearsal.bill()["requests"] == 10


def test_failures_are_driven_again_by_a_redrive(ready, monkeypatch):
    job = ready.job(policy={"retry": {"invalid": 0}})
    with monkeypatch.context() as patched:
        said = '{"sentiment":"neutral","confidence":0.5}'
        patched.setattr("nightshift.rehearsal.model.answer", lambda text, schema: "no JSON" if "number 3 " in text else said)
        first = ready.go(job, ready.world.write("a.jsonl", reviews(8)))
    assert first.outcomes["invalid"] == 1
    again = begin_again(ready.site, first.run, ("invalid",), policy=lambda name: None)
    summary = drive(ready.site, again, ask=lambda run, planned: True)
    assert (summary.outcomes["succeeded"], summary.paid, ready.world.rehearsal.bill()["requests"]) == (8, 1, 9)


def test_a_line_starts_with_its_id_and_opens_as_it_was_made(ready):
    request = ready.job().spec.request
    form = form_of(request.endpoint)
    body = form.body(Question(model=request.model, system="S", user="U", parameters={"max_output_tokens": 9}, schema={"type": "object"}))
    line = form.line("ab" * 32, orjson.dumps(body))
    assert line[line.index(b'":"') + 3 :].startswith(b"ab" * 32)
    assert form.opened(line) == ("ab" * 32, body)

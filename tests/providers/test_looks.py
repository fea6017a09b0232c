"""How often the provider is asked while many batches are waited for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import boto3
import httpx2

from nightshift.errors import ProviderUnavailable
from nightshift.providers.bedrock import BedrockJobs
from nightshift.providers.looks import FORGOTTEN_AFTER_SECONDS, QUIET_SECONDS, SharedLooks
from nightshift.providers.openai import OpenAIBatches
from tests.conftest import Rehearsal, World, order

BATCHES, ROUNDS, JOBS = 130, 4, 15
HAIKU = "us.anthropic.claude-haiku-4-5-20251001-v1:0"


def batch(name: str, status: str = "in_progress") -> Any:
    return SimpleNamespace(id=name, status=status)


class Account:
    """An account's batches, newest first, and how often they were listed."""

    def __init__(self, *names: str) -> None:
        self.names, self.listings, self.read = names, 0, 0

    def newest(self) -> Any:
        self.listings += 1
        for name in self.names:
            self.read += 1
            yield name, batch(name)


def test_one_listing_serves_a_round_of_looks_however_many_wait():
    looks, account = SharedLooks(), Account("c", "b", "a")
    assert [looks.look(name, account.newest) for name in "abc"] == [None, None, None], "at first each is asked for alone"
    for _ in range(ROUNDS):
        assert [looks.look(name, account.newest).id for name in "abc"] == ["a", "b", "c"]
    assert account.listings == ROUNDS


def test_who_looks_more_often_sees_the_newest():
    looks, account = SharedLooks(), Account("b", "a")
    for name in "ab":
        looks.look(name, account.newest)
    for _ in range(5):
        assert looks.look("a", account.newest) is not None
    assert account.listings == 5
    assert looks.look("b", account.newest) is not None
    assert account.listings == 5, "it has not seen the last of them"


def test_a_batch_alone_is_asked_for_alone_and_so_is_one_that_no_listing_shows():
    looks, account = SharedLooks(), Account("b")
    assert [looks.look("b", account.newest) for _ in range(3)] == [None, None, None]
    looks.look("old", account.newest)
    assert looks.look("old", account.newest) is None
    assert looks.look("b", account.newest).id == "b"
    looks.forget("old")
    assert looks.look("b", account.newest) is None, "alone again"


def test_who_has_not_looked_for_long_counts_no_more():
    now = [0.0]
    looks, account = SharedLooks(lambda: now[0]), Account("a", "gone")
    for name in ("a", "gone"):
        looks.look(name, account.newest)
    now[0] += FORGOTTEN_AFTER_SECONDS / 2
    looks.look("a", account.newest)
    now[0] += FORGOTTEN_AFTER_SECONDS * 0.6
    assert looks.look("a", account.newest) is None
    assert account.listings == 1


def test_where_nothing_is_listed_each_is_asked_for_alone_and_the_list_left_alone_for_a_while():
    now, asked = [0.0], []

    def refused() -> Any:
        asked.append(now[0])
        raise ProviderUnavailable("here", "no list")

    looks = SharedLooks(lambda: now[0])
    for _ in range(4):
        assert [looks.look(name, refused) for name in "ab"] == [None, None]
    assert len(asked) == 1
    now[0] += QUIET_SECONDS
    looks.look("a", refused)
    assert len(asked) == 2


def test_many_waits_cost_two_pages_of_a_list_a_round(rehearsal: Rehearsal, tmp_path):
    """Over real HTTP, from clients that share nothing but the account."""
    rehearsal.pace(validating=0.1, running=600.0)
    called: Counter[str] = Counter()

    def count(request: httpx2.Request) -> None:
        path = request.url.path.removeprefix("/v1")
        called["list" if path == "/batches" else "retrieve"] += request.method == "GET"

    def provider() -> OpenAIBatches:
        client = httpx2.Client(event_hooks={"request": [count]})
        return OpenAIBatches("/v1/chat/completions", replace(rehearsal.access(), http_client=client))

    path = tmp_path / "lines"
    first = provider()
    path.write_bytes(first._form.line("00" * 32, b'{"model":"gpt-5.4-nano","messages":[{"role":"user","content":"x"}]}') + b"\n")
    uploaded = first.upload("t", path)
    batches = [first.create(order(uploaded, token=f"t{i}"), lambda: True).batch_id for i in range(BATCHES)]
    waits = [(provider(), batch_id) for batch_id in batches]
    called.clear()
    for _ in range(1 + ROUNDS):
        assert {one.poll(batch_id, waiting=True).state for one, batch_id in waits} == {"running"}
    assert called == {"retrieve": BATCHES, "list": 2 * ROUNDS}
    waits[0][0].poll(batches[0])
    assert called["retrieve"] == BATCHES + 1, "who does not only wait looks for itself"


def test_many_waits_for_jobs_of_bedrock_cost_one_list_a_round(cloud: World, tmp_path):
    cloud.rehearsal.pace(validating=0.1, running=600.0)
    cloud.rehearsal.faults(jobs_at_once=JOBS)
    session = boto3.Session()
    called: Counter[str] = Counter()
    session.events.register("before-send.bedrock", lambda event_name, **rest: called.update([event_name.rpartition(".")[2]]))
    access = replace(cloud.rehearsal.bedrock(), session=session)
    first = BedrockJobs("converse", cloud.site.store, access)
    path = tmp_path / "lines"
    path.write_bytes(b"".join(first._form.line(f"{i:064x}", b'{"messages":[]}') + b"\n" for i in range(100)))
    uploaded = first.upload("nightshift-a-1", path)
    jobs = [first.create(order(uploaded, model=HAIKU, token=f"{i:032x}"), lambda: True).batch_id for i in range(JOBS)]
    waits = [(BedrockJobs("converse", cloud.site.store, access), job) for job in jobs]
    called.clear()
    for _ in range(1 + ROUNDS):
        assert {one.poll(job, waiting=True).state for one, job in waits} == {"running"}
    assert called == {"GetModelInvocationJob": JOBS, "ListModelInvocationJobs": ROUNDS}

"""Shared pieces: a rehearsal provider over real HTTP, stores in temporary folders, and small jobs."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import settings

from local.s3 import MINISTACK, served_s3
from nightshift.drive import begin, drive
from nightshift.job import Job, RequestSpec
from nightshift.job_file import load_job
from nightshift.providers.bedrock import BedrockAccess, BedrockJobs, BedrockRuntime
from nightshift.providers.live import LiveServer, OpenAIApi
from nightshift.providers.openai import OpenAIAccess, OpenAIBatches
from nightshift.providers.protocol import Order, Provider
from nightshift.rehearsal import served
from nightshift.rehearsal.bedrock_server import ACCESS_KEY
from nightshift.rehearsal.served import Served
from nightshift.runs import Options, Site
from nightshift.shapes import Summary
from nightshift.stores.objects import open_input, open_objects

settings.register_profile("shared machines", deadline=None)  # where seconds say nothing
settings.load_profile("shared machines")

ROLE = "arn:aws:iam::123456789012:role/nightshift-bedrock"
NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
SCHEMA = {
    "type": "object",
    "properties": {"sentiment": {"type": "string", "enum": ["positive", "neutral", "negative"]}, "confidence": {"type": "number"}},
    "required": ["sentiment", "confidence"],
    "additionalProperties": False,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that the others run beside them and nobody waits for one in the end."""
    longest = ("test_stack", "test_dags", "test_celery", "test_chaos", "test_conformance", "test_failures")
    items.sort(key=lambda item: next((place for place, name in enumerate(longest) if name in item.nodeid), len(longest)))


def pytest_unconfigure() -> None:
    """Listeners are daemons: one that speaks while the process ends finds nobody to write it down."""
    logging.raiseExceptions = False


class Rehearsal(Served):
    """A rehearsal server in this process, and the way to it."""

    def access(self, key: str | None = None) -> OpenAIAccess:
        return OpenAIAccess(base_url=f"{self.url}/v1", api_key=key or self.key)

    def bedrock(self, role_arn: str | None = ROLE, **changes: Any) -> BedrockAccess:
        endpoints = tuple((service, self.url) for service in ("bedrock", "bedrock-runtime", "service-quotas"))
        return BedrockAccess(endpoints=endpoints, role_arn=role_arn, **changes)

    def provider(self, endpoint: str = "/v1/chat/completions") -> OpenAIBatches:
        return OpenAIBatches(endpoint, self.access(), sleep=lambda seconds: time.sleep(min(seconds, 0.05)))


def serve(state: Path, **options: Any) -> Rehearsal:
    return Rehearsal(**vars(served.serve(state, **options)))


@pytest.fixture
def rehearsal(tmp_path: Path) -> Iterator[Rehearsal]:
    server = serve(tmp_path / "provider")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 emulator; its endpoint."""
    if not MINISTACK.exists():
        pytest.skip("the S3 emulator is not installed: make test installs it")
    with served_s3(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that every emulator takes, and nothing else of AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_") and "CA_BUNDLE" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "rehearsal")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def bucket(s3: str, aws: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of its own for each test; its URI."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def queue(s3: str, aws: None, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """An SQS queue: (client, URL)."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    client = boto3.client("sqs", endpoint_url=s3)
    return client, client.create_queue(QueueName=f"queue-{uuid.uuid4().hex[:12]}", Attributes={"VisibilityTimeout": "1"})["QueueUrl"]


@dataclass
class Clock:
    """A clock that tests move."""

    at: datetime = NOON

    def __call__(self) -> datetime:
        return self.at

    def pass_by(self, **delta: float) -> None:
        self.at += timedelta(**delta)


@dataclass
class World:
    """A store, a folder of inputs, a provider and a job: all that a run needs."""

    folder: Path
    rehearsal: Rehearsal
    site: Site
    jobs: int = field(default=0)

    def job(self, **changes: Any) -> Job:
        """A small job; keyword arguments replace whole sections of its file."""
        self.jobs += 1
        folder = self.folder / f"job-{self.jobs}"
        (folder / "jobs").mkdir(parents=True)
        (folder / "prompt.md").write_text(changes.pop("prompt", "system:\nJudge the review.\n\nuser:\n{{ text }}\n"))
        (folder / "schema.json").write_text(json.dumps(changes.pop("schema", SCHEMA)))
        suite = changes.pop("suite", None)
        if suite is not None:
            (folder / "suite.yaml").write_text(json.dumps({"expectations": suite}))
        spec: dict[str, Any] = {
            "name": "reviews",
            "input": {"uri": f"file://{self.folder}/input/*", "id": "id", "require": {"text": {"min_length": 1, "max_length": 500}}},
            "request": {"provider": "openai", "model": "gpt-5.4-nano", "prompt": "prompt.md", "parameters": {"max_output_tokens": 100}},
            "output": {"schema": "schema.json", "keep": ["stars"], **({"expectations": "suite.yaml"} if suite is not None else {})},
            "policy": {"publish_at_least": 0.5},
        }
        for name, value in changes.items():
            spec[name] = {**spec[name], **value} if isinstance(spec.get(name), dict) else value
        path = folder / "jobs" / "reviews.yaml"
        path.write_text(json.dumps(spec))
        return load_job(path)

    def write(self, name: str, rows: list[dict[str, Any]] | bytes) -> str:
        """An input file; its URI."""
        path = self.folder / "input" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        return f"file://{path}"


def go(world: World, job: Job, uri: str, *, approved: bool = True, **changes: Any) -> Summary:
    """A run from its input to its report. `changes`: options of the run, and what surrounds it otherwise than in its world."""
    options = Options(**{name: changes.pop(name) for name in Options.model_fields if name in changes})
    site = replace(world.site, **changes)
    run = begin(site, job, pattern=uri, dates={}, scheduled=False, options=options)
    return drive(site, run, ask=lambda run, planned: approved)


def order(uploaded: str, *, model: str = "gpt-5.4-nano", token: str = "t", labels: dict[str, str] | None = None) -> Order:
    """What an attempt asks a provider to create."""
    return Order(uploaded=uploaded, model=model, token=token, work="w", labels=labels or {})


def make_world(folder: Path, rehearsal: Rehearsal, owner: str = "test", store_uri: str | None = None, **changes: Any) -> World:
    """A world over a folder; two worlds on one folder share their store."""
    shared, store = rehearsal.provider(), open_objects(store_uri or f"file://{folder}/store")
    bedrock, quick = rehearsal.bedrock(), lambda seconds: time.sleep(min(seconds, 0.05))

    def open_provider(request: RequestSpec) -> Provider:
        if request.is_on_bedrock and request.provider == "live":
            return LiveServer(request.endpoint, store, BedrockRuntime(request.endpoint, bedrock), timeout_seconds=5.0)
        if request.is_on_bedrock:
            return BedrockJobs(request.endpoint, store, bedrock, sleep=quick)
        if request.provider == "live":
            return LiveServer(request.endpoint, store, OpenAIApi(request.endpoint, rehearsal.access()), timeout_seconds=5.0)
        return shared if request.endpoint == shared.endpoint else rehearsal.provider(request.endpoint)

    site = Site(
        store=store,
        open_input=open_input,
        open_provider=open_provider,
        owner=owner,
        poll_seconds=0.05,
        scratch_folder=folder,
        **changes,
    )
    return World(folder=folder, rehearsal=rehearsal, site=site)


@pytest.fixture
def cloud(tmp_path: Path, rehearsal: Rehearsal, bucket: str) -> World:
    """A world whose store is on S3, as Bedrock wants it."""
    return make_world(tmp_path, rehearsal, store_uri=f"{bucket}/store")


@pytest.fixture
def world(tmp_path: Path, rehearsal: Rehearsal) -> World:
    return make_world(tmp_path, rehearsal)


def reviews(count: int, **extra: Any) -> list[dict[str, Any]]:
    """Rows that all ask something different."""
    return [
        {"id": f"r{i}", "text": f"The room number {i} was {'lovely' if i % 2 else 'awful'}.", "stars": 1 + i % 5, **extra}
        for i in range(count)
    ]


def s3_event(bucket: str, key: str, etag: str, name: str = "ObjectCreated:Put", **changes: Any) -> str:
    """A message as S3 sends it to SQS; `key` as it stands there, encoded."""
    found = {"key": key, "size": 10, "eTag": etag, "sequencer": "0055AED6DCD90281E5"}
    record = {"eventVersion": "2.5", "eventSource": "aws:s3", "eventName": name, "s3": {"bucket": {"name": bucket}, "object": found}}
    return json.dumps({"Records": [{**record, **changes}]})

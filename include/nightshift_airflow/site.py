"""A site inside Airflow: endpoints and credentials from Airflow connections."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, wraps
from typing import Any, TypeVar
from urllib.parse import urlsplit

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from nightshift.aws import default_session, make_client
from nightshift.doorbell import Doorbell, listen_to
from nightshift.errors import AccessDenied, SettingInvalid, StoreUnavailable
from nightshift.job import JobFile
from nightshift.providers.bedrock import BedrockAccess
from nightshift.providers.openai import OpenAIAccess
from nightshift.providers.opening import open_provider
from nightshift.runs import Run, Site, last_run, load_run, run_folder
from nightshift.settings import dollars, read_settings
from nightshift.stores.objects import Objects, open_objects, split_input

logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request, of which a shard may have 50,000
OPENAI_HEADERS = {"organization": "OpenAI-Organization", "project": "OpenAI-Project"}  # of what the SDK's client can be given
BEDROCK_SERVICES = ("bedrock", "bedrock-runtime", "service-quotas")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Aws:
    """An AWS connection, and its session: making one costs half a second with the interpreter's lock held."""

    uri: str
    connection: Any  # Airflow's AwsConnectionWrapper
    session: Any


Found = TypeVar("Found")
# For so long what a connection says counts. A triggerer (3.3.2) takes every question and every line of a log in a round of its loop, and
# looks into the database in each: thousands of waits that all ask would be late by minutes.
CONNECTION_SECONDS = 60.0
ABSENCE_SECONDS = 5.0  # also where it could not be asked for, Airflow says that there is none
# Kept for the life of a process, by what the connection says: a trigger asks every few seconds.
_sessions: dict[str, _Aws] = {}
_opened: dict[tuple[str, str], Objects] = {}
_accesses: dict[tuple[str, str], BedrockAccess] = {}


def kept(read: Callable[[str], Found]) -> Callable[[str], Found]:
    """Keep what is read of a connection, by its id. What raises is read again."""
    known: dict[str, tuple[float, Found]] = {}

    @wraps(read)
    def known_or_read(connection_id: str) -> Found:
        if connection_id not in known or time.monotonic() >= known[connection_id][0]:
            found = read(connection_id)
            known[connection_id] = time.monotonic() + (ABSENCE_SECONDS if found is None else CONNECTION_SECONDS), found
        return known[connection_id][1]

    return known_or_read


def site_for(spec: JobFile | None, owner: str) -> Site:
    """What surrounds a run in Airflow. Without a job, only the store is of use."""
    settings = read_settings()
    if not settings.store:
        raise SettingInvalid(["NIGHTSHIFT_STORE is not set where Airflow runs: s3://bucket/prefix or file:///folder"])
    input_connection = spec.input.connection if spec else settings.store_connection
    store = _open(settings.store, settings.store_connection)
    return Site(
        store=store,
        open_input=lambda pattern: _open_input(pattern, input_connection),
        open_provider=lambda request: open_provider(
            request, store, bedrock_access(request.connection) if request.is_on_bedrock else openai_access(request.connection)
        ),
        owner=owner,
        poll_seconds=settings.poll_seconds,
        monthly_budget=monthly_budget,
        scratch_folder=settings.scratch,
    )


def run_at(run_uri: str, owner: str) -> tuple[Site, Run]:
    """The site and the run of a task that knows only the run's URI."""
    run = load_run(site_for(None, owner).store, run_uri)
    return site_for(run.job.spec, owner), run


def open_store() -> Objects:
    """The store of this Airflow."""
    return site_for(None, "").store


def folder_of(store: Objects, dag_id: str, dag_run: str) -> str:
    """Where in the store the last run is that a DAG run has begun; nothing is there if it has begun none."""
    return run_folder(dag_id, last_run(store, dag_id, dag_id, dag_run))


def owner_of(context: Any) -> str:
    """Who claims: the task instance and its try, as people find it in the grid."""
    ti = context["ti"]
    index = f"[{ti.map_index}]" if getattr(ti, "map_index", -1) >= 0 else ""
    return f"{ti.dag_id}/{ti.run_id}/{ti.task_id}{index} try {ti.try_number} pid {os.getpid()}"


@kept
def openai_access(connection_id: str) -> OpenAIAccess:
    """The way to a server of OpenAI's API, from its Airflow connection: host = base URL, password = key."""
    try:
        connection = BaseHook.get_connection(connection_id)
    except AirflowNotFoundException as error:
        why = f"there is no Airflow connection {connection_id!r}; "
        why += "add it under Admin → Connections (host = base URL, password = API key)."
        raise AccessDenied("Airflow", why) from error
    with _told_of(connection_id):
        kwargs = connection.extra_dejson.get("openai_client_kwargs") or {}
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
        named = {header: kwargs[name] for name, header in OPENAI_HEADERS.items() if kwargs.get(name)}
        return OpenAIAccess(
            base_url=_with_port(connection.host, connection.port) or kwargs.get("base_url"),
            api_key=connection.password or kwargs.get("api_key"),
            headers=tuple({**named, **(kwargs.get("default_headers") or {})}.items()),
        )


def _with_port(host: str | None, port: int | None) -> str | None:
    """A base URL with the port that a connection names beside it."""
    parts = urlsplit(host or "")
    return parts._replace(netloc=f"{parts.netloc}:{port}").geturl() if port and parts.netloc and parts.port is None else host


@contextmanager
def _told_of(connection_id: str) -> Iterator[None]:
    """What is wrong with a connection, as one of our errors: Airflow and boto3 raise whatever they meet first."""
    try:
        yield
    except Exception as error:
        from botocore.exceptions import ConnectionError as Unreachable
        from botocore.exceptions import HTTPClientError

        if isinstance(error, Unreachable | HTTPClientError):
            raise StoreUnavailable(f"behind the connection {connection_id}", str(error)) from error
        raise SettingInvalid([f"The connection {connection_id} cannot be used: {type(error).__name__}: {error}"]) from error


@kept
def monthly_budget(connection_id: str) -> Decimal | None:
    """What all jobs of a connection may spend in a month: `monthly_budget_usd` in its extra; None where it does not say."""
    try:
        found = BaseHook.get_connection(connection_id).extra_dejson.get("monthly_budget_usd")
    except AirflowNotFoundException:
        return None
    return None if found is None else dollars(found, f"connection {connection_id}: monthly_budget_usd")


def _open_input(pattern: str, connection_id: str) -> tuple[Objects, str]:
    root, key_pattern = split_input(pattern)
    return _open(root, connection_id), key_pattern


def bedrock_access(connection_id: str) -> BedrockAccess:
    """The way to Bedrock, from an AWS connection: its session, its endpoints, and `bedrock` under its `service_config`.

    What the connection does not say of the role and the folder on S3 is taken from NIGHTSHIFT_BEDROCK_*.
    """
    aws = _aws(connection_id)
    key = (connection_id, aws.uri if aws else "")
    if key not in _accesses:
        _accesses[key] = _bedrock_access(aws, connection_id)
    return _accesses[key]


def _bedrock_access(aws: _Aws | None, connection_id: str) -> BedrockAccess:
    settings = read_settings()
    config = aws.connection.get_service_config("bedrock") if aws else {}
    endpoints = {service: aws.connection.get_service_endpoint_url(service) for service in BEDROCK_SERVICES} if aws else {}
    folder, region = config.get("files") or settings.bedrock_files, aws.connection.region_name if aws else None
    return BedrockAccess(
        session=aws.session if aws else None,
        clients=(("region_name", region),) if region else (),
        endpoints=tuple((service, url) for service, url in endpoints.items() if url),
        role_arn=config.get("role_arn") or settings.bedrock_role_arn,
        files=_open(folder, connection_id) if folder else None,
    )


@cache
def doorbell() -> Doorbell | None:
    """What ends waits for jobs of Bedrock early, where a queue of their events is set."""
    settings = read_settings()
    if not settings.bedrock_events:
        return None
    return Doorbell(listen_to(settings.bedrock_events, queue_client(settings.store_connection)))


def queue_client(connection_id: str) -> Any:
    """A client of SQS, from an AWS connection; boto3's own defaults where there is none."""
    aws = _aws(connection_id)
    return make_client(aws.session if aws else default_session(), "sqs", **(_client_config(aws, "sqs") if aws else {}))


@kept
def _aws(connection_id: str) -> _Aws | None:
    """An AWS connection; None where there is none, and boto3's own defaults count."""
    try:
        connection = BaseHook.get_connection(connection_id)
    except AirflowNotFoundException:
        return None
    uri = connection.get_uri()
    if uri not in _sessions:
        from airflow.providers.amazon.aws.hooks.base_aws import BaseSessionFactory
        from airflow.providers.amazon.aws.utils.connection_wrapper import AwsConnectionWrapper

        with _told_of(connection_id):
            wrapper = AwsConnectionWrapper(connection)
            _sessions[uri] = _Aws(uri=uri, connection=wrapper, session=BaseSessionFactory(conn=wrapper).create_session())
    return _sessions[uri]


def _open(root: str, connection_id: str) -> Objects:
    """A bucket with an AWS connection; boto3's own defaults where there is no such connection."""
    aws = _aws(connection_id) if root.startswith("s3://") else None
    if aws is None:
        return open_objects(root)
    key = (root, aws.uri)
    if key not in _opened:
        _opened[key] = open_objects(root, aws.session, _client_config(aws, "s3"))
    return _opened[key]


def _client_config(aws: _Aws, service: str) -> dict[str, str]:
    """What a connection says of the client of a service."""
    said = {"endpoint_url": aws.connection.get_service_endpoint_url(service), "region_name": aws.connection.region_name}
    return {name: value for name, value in said.items() if value}

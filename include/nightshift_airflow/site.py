"""A site inside Airflow: endpoints and credentials from Airflow connections."""

from __future__ import annotations

import os
from typing import Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from nightshift.errors import AccessDenied, JobInvalid
from nightshift.job import JobFile
from nightshift.providers.openai import OpenAIAccess
from nightshift.providers.opening import open_provider
from nightshift.runs import Run, Site, load_run
from nightshift.settings import read_settings
from nightshift.stores.objects import Objects, open_objects, split_input


def site_for(spec: JobFile | None, owner: str) -> Site:
    """What surrounds a run in Airflow. Without a job, only the store is of use."""
    settings = read_settings()
    if not settings.store:
        raise JobInvalid(["NIGHTSHIFT_STORE is not set where Airflow runs: s3://bucket/prefix or file:///folder"])
    input_connection = spec.input.connection if spec else settings.store_connection
    store = _open(settings.store, settings.store_connection)
    return Site(
        store=store,
        open_input=lambda pattern: _open_input(pattern, input_connection),
        open_provider=lambda request: open_provider(request, store, access_of(request.connection)),
        owner=owner,
        poll_seconds=settings.poll_seconds,
        scratch_folder=settings.scratch,
    )


def run_at(run_uri: str, owner: str) -> tuple[Site, Run]:
    """The site and the run of a task that knows only the run's URI."""
    run = load_run(site_for(None, owner).store, run_uri)
    return site_for(run.job.spec, owner), run


def open_store() -> Objects:
    """The store of this Airflow."""
    return site_for(None, "").store


def owner_of(context: Any) -> str:
    """Who claims: the task instance and its try, as people find it in the grid."""
    ti = context["ti"]
    index = f"[{ti.map_index}]" if getattr(ti, "map_index", -1) >= 0 else ""
    return f"{ti.dag_id}/{ti.run_id}/{ti.task_id}{index} try {ti.try_number} pid {os.getpid()}"


def access_of(connection_id: str) -> OpenAIAccess:
    """The way to a provider, from its Airflow connection: host = base URL, password = key."""
    try:
        connection = BaseHook.get_connection(connection_id)
    except AirflowNotFoundException as error:
        why = f"there is no Airflow connection {connection_id!r}; "
        why += "add it under Admin → Connections (host = base URL, password = API key)."
        raise AccessDenied("Airflow", why) from error
    kwargs = connection.extra_dejson.get("openai_client_kwargs", {})
    return OpenAIAccess(
        base_url=connection.host or kwargs.get("base_url"),
        api_key=connection.password or kwargs.get("api_key"),
        headers=tuple((kwargs.get("default_headers") or {}).items()),
    )


def _open_input(pattern: str, connection_id: str) -> tuple[Objects, str]:
    root, key_pattern = split_input(pattern)
    return _open(root, connection_id), key_pattern


_opened: dict[tuple[str, str], Objects] = {}


def _open(root: str, connection_id: str) -> Objects:
    """A bucket with an AWS connection; boto3's own defaults where there is no such connection.

    Kept per connection as it is: making a boto3 session costs half a second with the interpreter's lock held, and a
    trigger asks every few seconds.
    """
    if not root.startswith("s3://"):
        return open_objects(root)
    try:
        connection = BaseHook.get_connection(connection_id)
    except AirflowNotFoundException:
        return open_objects(root)
    key = (root, connection.get_uri())
    if key not in _opened:
        from airflow.providers.amazon.aws.hooks.base_aws import BaseSessionFactory
        from airflow.providers.amazon.aws.utils.connection_wrapper import AwsConnectionWrapper

        wrapper = AwsConnectionWrapper(connection)
        config = {"endpoint_url": wrapper.get_service_endpoint_url("s3"), "region_name": wrapper.region_name}
        given = {name: value for name, value in config.items() if value}
        _opened[key] = open_objects(root, BaseSessionFactory(conn=wrapper).create_session(), given)
    return _opened[key]

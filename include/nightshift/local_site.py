"""A site outside Airflow: endpoints and credentials from where each SDK has them (`OPENAI_*`, `AWS_*`)."""

from __future__ import annotations

import getpass
import os
import socket
from functools import cache

from nightshift.job import RequestSpec
from nightshift.providers.openai import OpenAIBatches
from nightshift.providers.protocol import Provider
from nightshift.runs import Site
from nightshift.settings import Settings
from nightshift.shapes import Endpoint
from nightshift.stores.objects import open_input, open_objects


def local_site(settings: Settings, store: str) -> Site:
    """The site of a command line on this machine."""
    return Site(
        store=open_objects(store),
        open_input=open_input,
        open_provider=_open_provider,
        owner=f"{getpass.getuser()}@{socket.gethostname()} pid {os.getpid()}",
        poll_seconds=settings.poll_seconds,
        scratch_folder=settings.scratch,
    )


def _open_provider(request: RequestSpec) -> Provider:
    return _shared_provider(request.endpoint)


@cache
def _shared_provider(endpoint: Endpoint) -> Provider:
    """One client, and so one connection pool, for all shards of a process."""
    return OpenAIBatches(endpoint)

"""A site outside Airflow: endpoints and credentials from where each SDK has them (`OPENAI_*`, `AWS_*`)."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping

from nightshift.providers.openai import OpenAIAccess
from nightshift.providers.opening import open_provider
from nightshift.runs import Site
from nightshift.settings import Settings
from nightshift.stores.objects import open_input, open_objects


def local_site(settings: Settings, store: str) -> Site:
    """The site of a command line on this machine."""
    objects = open_objects(store)
    return Site(
        store=objects,
        open_input=open_input,
        open_provider=lambda request: open_provider(request, objects, access_from(os.environ)),
        owner=f"{getpass.getuser()}@{socket.gethostname()} pid {os.getpid()}",
        poll_seconds=settings.poll_seconds,
        scratch_folder=settings.scratch,
    )


def access_from(env: Mapping[str, str]) -> OpenAIAccess:
    """Where the OpenAI SDK finds its endpoint and key."""
    return OpenAIAccess(base_url=env.get("OPENAI_BASE_URL"), api_key=env.get("OPENAI_API_KEY"))

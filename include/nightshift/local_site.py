"""A site outside Airflow: endpoints and credentials from where each SDK has them (`OPENAI_*`, `AWS_*`)."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping

from nightshift.providers.bedrock import BedrockAccess
from nightshift.providers.openai import OpenAIAccess
from nightshift.providers.opening import open_provider
from nightshift.runs import Site
from nightshift.settings import Settings
from nightshift.stores.objects import open_input, open_objects


def local_site(settings: Settings, store: str) -> Site:
    """The site of a command line on this machine."""
    objects = open_objects(store)
    openai, bedrock = openai_access(os.environ), bedrock_access(settings)
    return Site(
        store=objects,
        open_input=open_input,
        open_provider=lambda request: open_provider(request, objects, bedrock if request.is_on_bedrock else openai),
        owner=f"{getpass.getuser()}@{socket.gethostname()} pid {os.getpid()}",
        poll_seconds=settings.poll_seconds,
        monthly_budget=lambda connection: settings.monthly_budget_usd,
        scratch_folder=settings.scratch,
    )


def bedrock_access(settings: Settings) -> BedrockAccess:
    """The way to Bedrock: boto3 finds endpoint, region and credentials itself."""
    files = open_objects(settings.bedrock_files) if settings.bedrock_files else None
    return BedrockAccess(role_arn=settings.bedrock_role_arn, files=files)


def openai_access(env: Mapping[str, str]) -> OpenAIAccess:
    """Where the OpenAI SDK finds its endpoint and key."""
    return OpenAIAccess(base_url=env.get("OPENAI_BASE_URL"), api_key=env.get("OPENAI_API_KEY"))

"""The provider that a job names."""

from __future__ import annotations

from collections.abc import Hashable

from nightshift.job import RequestSpec
from nightshift.providers.bedrock import BedrockAccess, BedrockJobs, BedrockRuntime
from nightshift.providers.live import LiveServer, OpenAIApi
from nightshift.providers.openai import OpenAIAccess, OpenAIBatches
from nightshift.providers.protocol import Provider
from nightshift.stores.objects import Objects

_opened: dict[Hashable, Provider] = {}


def open_provider(request: RequestSpec, store: Objects, access: OpenAIAccess | BedrockAccess) -> Provider:
    """One provider, and so one client and one connection pool, for all shards of a process."""
    key = (request.provider, request.endpoint, store.uri, access)
    if key not in _opened:
        _opened[key] = _open(request, store, access)
    return _opened[key]


def _open(request: RequestSpec, store: Objects, access: OpenAIAccess | BedrockAccess) -> Provider:
    if isinstance(access, BedrockAccess):
        if request.provider == "live":
            return LiveServer(request.endpoint, store, BedrockRuntime(request.endpoint, access))
        return BedrockJobs(request.endpoint, store, access)
    if request.provider == "live":
        return LiveServer(request.endpoint, store, OpenAIApi(request.endpoint, access))
    return OpenAIBatches(request.endpoint, access)

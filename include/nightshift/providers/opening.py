"""The provider that a job names."""

from __future__ import annotations

from nightshift.job import RequestSpec
from nightshift.providers.live import LiveServer
from nightshift.providers.openai import OpenAIAccess, OpenAIBatches
from nightshift.providers.protocol import Provider
from nightshift.stores.objects import Objects

_opened: dict[tuple[str, str, str, OpenAIAccess], Provider] = {}


def open_provider(request: RequestSpec, store: Objects, access: OpenAIAccess) -> Provider:
    """One provider, and so one client and one connection pool, for all shards of a process."""
    key = (request.provider, request.endpoint, store.uri, access)
    if key not in _opened:
        _opened[key] = (
            LiveServer(request.endpoint, store, access) if request.provider == "live" else OpenAIBatches(request.endpoint, access)
        )
    return _opened[key]

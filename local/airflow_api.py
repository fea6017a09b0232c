"""Airflow's REST API, as far as the local stack, its demo and its benches call it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from typing import Any

HEALTHY = ("metadatabase", "scheduler", "triggerer", "dag_processor")


class AirflowApi:
    """Airflow's REST API with one user of the simple auth manager."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self._url, self._signing_in = url, {"username": user, "password": password}
        self._token = ""

    def get(self, path: str, **query: str) -> Any:
        """GET below /api/v2."""
        return self.call("GET", path, None, query)

    def call(self, method: str, path: str, body: Any = None, query: Mapping[str, str] | None = None) -> Any:
        """One call, signed in."""
        if not self._token:
            self._token = _http("POST", f"{self._url}/auth/token", self._signing_in, {})["access_token"]
        asked = "?" + "&".join(f"{name}={value}" for name, value in query.items()) if query else ""
        return _http(method, f"{self._url}/api/v2{path}{asked}", body, {"Authorization": f"Bearer {self._token}"})


def is_healthy(url: str) -> bool:
    """Whether every part of the Airflow at a URL says that it is well. Nobody has to be signed in."""
    try:
        health = _http("GET", f"{url}/api/v2/monitor/health", None, {})
    except (OSError, ValueError):
        return False
    return all((health.get(part) or {}).get("status") == "healthy" for part in HEALTHY)


def _http(method: str, url: str, body: Any, headers: Mapping[str, str]) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers}, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read() or b"null")

"""What docker-compose.yaml runs, for running the same processes without containers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).resolve().parent.parent / "docker-compose.yaml"
PARTS = ("airflow-apiserver", "airflow-scheduler", "airflow-dag-processor", "airflow-triggerer", "airflow-worker")


def services() -> dict[str, dict[str, Any]]:
    """The services by name, with what they share merged in."""
    return dict(yaml.safe_load(FILE.read_text(encoding="utf-8"))["services"])


def command(service: str) -> list[str]:
    """The arguments that a service gives to `airflow`."""
    return [str(part) for part in services()[service]["command"]]


def settings() -> dict[str, str]:
    """Airflow's settings as they stand in the file: all but secrets, and what names a place inside the containers."""
    found = services()["airflow-worker"]["environment"]
    return {
        name: value
        for name, value in found.items()
        if name.startswith("AIRFLOW__") and not name.endswith("_CMD") and not set("$/") & set(value)
    }

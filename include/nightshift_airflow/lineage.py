"""What a run reads and writes, for whoever collects lineage (OpenLineage, where its provider is installed; nobody otherwise)."""

from __future__ import annotations

from collections.abc import Iterable

from airflow.sdk import BaseHook
from airflow.sdk.lineage import get_hook_lineage_collector

MOST = 50  # datasets of one task: a run over more objects is told by their folders


class Files(BaseHook):
    """In whose name objects are read and written."""


FILES = Files()


def reads(uris: Iterable[str]) -> None:
    """The objects that a task has read."""
    for uri in datasets(uris):
        get_hook_lineage_collector().add_input_asset(context=FILES, uri=uri)


def writes(uri: str) -> None:
    """The folder that a task has written."""
    get_hook_lineage_collector().add_output_asset(context=FILES, uri=uri)


def datasets(uris: Iterable[str]) -> list[str]:
    """Objects as datasets: themselves, or their folders where they are many."""
    found = list(dict.fromkeys(uris))
    return found if len(found) <= MOST else list(dict.fromkeys(uri.rpartition("/")[0] for uri in found))[:MOST]

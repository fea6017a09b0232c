"""Chains of tasks: submit → wait → collect. A run has one for each shard, and a wide run several shards in each.

Airflow's scheduler (3.3.2) looks at every unfinished task of a mapped group at every pass, at 4 ms each, and a task is a process. So a run
has no more chains than it has tasks side by side: more would make nothing sooner. A chain goes through XCom and the templates of a
trigger, which make text of everything: it is the keys of its shards with spaces between.
"""

from __future__ import annotations

from collections.abc import Sequence


def chains(shards: Sequence[str], most: int) -> list[str]:
    """Shards dealt out to at most so many chains. The first ones of all chains are the first of the run."""
    return [chain_of(shards[first::most]) for first in range(min(most, len(shards)))]


def chain_of(shards: Sequence[str]) -> str:
    """The chain of shards, given by their keys."""
    return " ".join(shards)


def shards_of(chain: str) -> list[str]:
    """The keys of a chain's shards."""
    return chain.split()

"""A sample of a run's rows: those whose ids have the smallest hashes, so that the same input gives the same sample."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nightshift.formats import Rows


def choose(ids: Iterable[Sequence[Any]], count: int) -> frozenset[int]:
    """The places of the sampled rows among all rows. `ids`: in batches, in order; in memory are `count` of them."""
    heap: list[tuple[int, int]] = []  # the smallest so far, the largest of them on top: both numbers are negated
    place = 0
    for batch in ids:
        for value in batch:
            rank = (-_hash(value), -place)
            if len(heap) < count:
                heapq.heappush(heap, rank)
            elif rank > heap[0]:
                heapq.heapreplace(heap, rank)
            place += 1
    return frozenset(-place for _, place in heap)


def only(batches: Iterable[Rows], places: frozenset[int], start: int) -> Iterator[Rows]:
    """The rows at some places; `start`: the place of the first."""
    for rows in batches:
        kept = [i for i in range(rows.count) if start + i in places]
        start += rows.count
        if kept:
            yield rows.at(kept)


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(str(value).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")

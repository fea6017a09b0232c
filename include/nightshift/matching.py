"""Result lines matched to the requests of an attempt, as they come: each request keeps one, and every oddity is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice

from msgspec.structs import replace

from nightshift.providers.protocol import Garbage, Reply
from nightshift.settle import RANK
from nightshift.stores.shards import KEY_BYTES

AT_ONCE = 512  # replies: few enough that what they hold stays near the processor


class Matching:
    """The replies to an attempt's requests. Those that succeeded are handed on at once; the others are few, and kept.

    Of two lines for one request the better outcome stays, of equals the first; tokens of both are counted as paid.
    """

    def __init__(self, keys: Collection[bytes], hold: Callable[[Reply], Reply] = lambda reply: reply) -> None:
        """`hold`: what is done with a reply that is kept."""
        self._keys, self._unseen, self._hold = keys, set(keys), hold
        self.failed: dict[bytes, Reply] = {}
        self.twice: dict[bytes, list[Reply]] = {}  # further lines for requests whose first success is handed on already
        self.alarms: Counter[str] = Counter()

    @property
    def absent(self) -> frozenset[bytes]:
        """The requests without any line."""
        return frozenset(self._unseen)

    def successes(self, replies: Iterable[Reply | Garbage], at_once: int) -> Iterator[Sequence[tuple[bytes, Reply]]]:
        """The request keys that succeeded, each with the reply that it keeps, as so many replies at once bring them."""
        todo = iter(replies)
        while batch := list(islice(todo, at_once)):
            found = self._match_all(batch)
            yield list(self._one_by_one(batch)) if found is None else found

    def _match_all(self, batch: Sequence[Reply | Garbage]) -> list[tuple[bytes, Reply]] | None:
        """What has succeeded of a batch. None, and nothing changes, where one is not the first reply to a request that was asked."""
        try:
            by_key = {bytes.fromhex(reply.custom_id): reply for reply in batch if isinstance(reply, Reply)}
        except ValueError:
            return None
        if len(by_key) < len(batch) or not by_key.keys() <= self._unseen:
            return None
        self._unseen.difference_update(by_key)
        found = [each for each in by_key.items() if each[1].outcome == "succeeded"]
        if len(found) < len(batch):
            self.failed.update((key, self._hold(reply)) for key, reply in by_key.items() if reply.outcome != "succeeded")
        return found

    def _one_by_one(self, batch: Iterable[Reply | Garbage]) -> Iterator[tuple[bytes, Reply]]:
        unseen, failed = self._unseen, self.failed
        for reply in batch:
            if isinstance(reply, Garbage):
                self.alarms[reply.alarm] += 1
                continue
            key = key_of(reply.custom_id)
            if key in unseen:
                unseen.remove(key)
                if reply.outcome == "succeeded":
                    yield key, reply
                else:
                    failed[key] = self._hold(reply)
            elif key in failed:
                self.alarms["duplicate lines"] += 1
                best = better(failed[key], reply)
                if best.outcome == "succeeded":
                    del failed[key]
                    yield key, best
                else:
                    failed[key] = self._hold(best)
            elif key in self._keys:  # and handed on already
                self.alarms["duplicate lines"] += 1
                self.twice.setdefault(key, []).append(self._hold(reply))
            else:
                self.alarms["lines for unknown requests"] += 1


def better(first: Reply, second: Reply) -> Reply:
    """Of two lines for one request the one that stays, with the tokens of both."""
    if RANK.get(second.outcome, 0) > RANK.get(first.outcome, 0):
        first, second = second, first
    return with_tokens(first, [second])


def with_tokens(reply: Reply, further: Sequence[Reply]) -> Reply:
    """A reply with the tokens of further ones to the same request added: they are paid for, too."""
    return replace(
        reply,
        input_tokens=sum_known([reply.input_tokens, *(each.input_tokens for each in further)]),
        output_tokens=sum_known([reply.output_tokens, *(each.output_tokens for each in further)]),
        cached_tokens=reply.cached_tokens + sum(each.cached_tokens for each in further),
    )


def sum_known(values: Sequence[int | None]) -> int | None:
    """The sum of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def unfold(replies: Iterable[Reply | Garbage], groups: Iterable[Sequence[bytes]]) -> Iterator[Reply | Garbage]:
    """Replies to lines that several requests share, as one reply each. `groups`: the keys of each line, under the id of the first.

    The tokens of a line are divided among its requests. A line that was refused is asked again, each of its requests alone: one of
    them may be to blame, the others are not.
    """
    shared = {group[0]: group for group in groups if len(group) > 1}
    for reply in replies:
        keys = shared.get(key_of(reply.custom_id)) if isinstance(reply, Reply) else None
        if keys is None or isinstance(reply, Garbage):
            yield reply
            continue
        for place, key in enumerate(keys):
            yield replace(
                reply,
                custom_id=key.hex(),
                vectors=reply.vectors[place : place + 1],
                is_shared=True,
                input_tokens=_part(reply.input_tokens, place, len(keys)),
                cached_tokens=_part(reply.cached_tokens, place, len(keys)) or 0,
                output_tokens=_part(reply.output_tokens, place, len(keys)),
            )


def key_of(custom_id: str) -> bytes:
    """The request key that an id says; nothing where it says none."""
    try:
        key = bytes.fromhex(custom_id)
    except ValueError:
        return b""
    return key if len(key) == KEY_BYTES else b""


def _part(tokens: int | None, place: int, count: int) -> int | None:
    return None if tokens is None else tokens // count + (place < tokens % count)

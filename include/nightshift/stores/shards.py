"""A shard's folder: its frozen requests, and which of them an attempt asks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nightshift.errors import InputMissing, LedgerCorrupt
from nightshift.shapes import ProviderName, Shard, Variant
from nightshift.stores.ledger import Attempt, Claim
from nightshift.stores.objects import Buffer, Objects

KEY_BYTES = 32
WAS_REMOVED = "Was it removed by hand, or by a lifecycle rule of the bucket?"
READ_ROWS = 256  # of answers in words, which may be long
Hold = Callable[[str | None], str | None]
Keys = npt.NDArray[np.bytes_]  # 32 bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A request that an attempt left to be asked again: how it is asked now, what came last, and what is wrong with that."""

    variant: Variant
    text: str | None
    reason: str | None


def shard_key(keys: bytes, salt: str = "") -> str:
    """A shard's name: the hash of its request keys, in any order. A salt tells apart what asks the same once more."""
    digest = hashlib.sha256(salt.encode())
    digest.update(sorted_keys(keys).data)
    return digest.hexdigest()


def sorted_keys(keys: bytes) -> Keys:
    """Request keys in order."""
    found = np.frombuffer(keys, f"S{KEY_BYTES}")
    heads = np.frombuffer(keys, ">u8")[:: KEY_BYTES // 8].astype(np.uint64)  # as numbers they are in order twenty times as fast
    order = np.argsort(heads)
    if (heads[order[1:]] == heads[order[:-1]]).any():
        return np.sort(found)
    return found[order]


def without_doubles(keys: Keys) -> Keys:
    """Sorted request keys, each once: a stand-in's word on one stands beside that of the model itself."""
    return keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys


def requests_key(shard: str) -> str:
    """Where the lines of a shard stand, written once."""
    return f"shards/{shard}/requests.jsonl"


def keys_key(shard: str) -> str:
    """Where the request keys of a shard stand: 32 bytes each, in the order of its lines."""
    return f"shards/{shard}/requests.keys"


def answers_key(shard: str, attempt: int) -> str:
    """Where the answers of one attempt stand."""
    return f"shards/{shard}/answers-{attempt}.parquet"


def live_folder(work: str) -> str:
    """Where the answers of a live server stand as they came, until their shard is settled."""
    return f"live/{work}"


def keep_shard(objects: Objects, shard: Shard, lines: Iterable[Buffer], keys: bytes, seed: Path | None) -> None:
    """Freeze a shard: its lines, in pieces, their keys, what became of them before, and last what the shard is."""
    objects.stream(requests_key(shard.key), lines)
    objects.put(keys_key(shard.key), keys)
    if seed is not None:
        objects.put(answers_key(shard.key, 0), seed)
    objects.create_shape(f"shards/{shard.key}/shard.json", shard)


def read_answers(objects: Objects, shard: str, attempt: int, columns: Sequence[str] | None = None) -> pa.Table:
    """The answers of one attempt; a shard holds at most one batch's worth, which may be large. Raises InputMissing."""
    with open_answers(objects, shard, attempt) as file:
        return file.read(None if columns is None else list(columns), use_threads=False)


def open_answers(objects: Objects, shard: str, attempt: int) -> pq.ParquetFile:
    """The answers of one attempt, to be read in parts. Raises InputMissing."""
    file = objects.read(answers_key(shard, attempt))
    if file is None:
        raise InputMissing(objects.uri_of(answers_key(shard, attempt)), "the ledger says that it was written", WAS_REMOVED)
    return pq.ParquetFile(file, pre_buffer=False)


def keys_in(answers: pa.Table | pa.RecordBatch) -> list[bytes]:
    """The request keys of answers, many times as fast as Arrow's own conversion."""
    return _apart(key_bytes(answers.column("request_key")))


def key_bytes(keys: pa.Array | pa.ChunkedArray) -> bytes:
    """Request keys one after another, 32 bytes each."""
    column = keys.cast(pa.binary(KEY_BYTES))
    return b"".join(map(_bytes_of, column.chunks if isinstance(column, pa.ChunkedArray) else [column]))


def _bytes_of(keys: pa.FixedSizeBinaryArray) -> memoryview:
    return memoryview(keys.buffers()[1])[keys.offset * KEY_BYTES : (keys.offset + len(keys)) * KEY_BYTES]


def _apart(keys: bytes) -> list[bytes]:
    return [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]


def request_keys(objects: Objects, shard: str) -> list[bytes]:
    """The request keys of a shard, in the order of its lines; a shard holds at most one batch's worth."""
    return _apart(frozen_keys(objects, shard))


def frozen_keys(objects: Objects, shard: str) -> bytes:
    """The request keys of a shard one after another, 32 bytes each, in the order of its lines."""
    data = objects.get(keys_key(shard))
    if data is None:
        raise InputMissing(objects.uri_of(keys_key(shard)), "a frozen shard has it", WAS_REMOVED)
    if len(data) % KEY_BYTES:
        raise LedgerCorrupt(keys_key(shard), f"{len(data)} bytes are no whole number of keys")
    return data


def key_of_line(line: bytes) -> bytes:
    """The request key in a line of `requests.jsonl`: every provider's line starts with its id."""
    start = line.index(b'":"') + 3
    return bytes.fromhex(line[start : start + 2 * KEY_BYTES].decode())


def same_of_line(line: bytes) -> bytes:
    """A line of `requests.jsonl` less its request key: what lines of requests that are alike have in common."""
    return line[line.index(b'":"') + 3 + 2 * KEY_BYTES :]


def shared_lines(asked: Mapping[bytes, Left | None], per_line: int) -> Iterator[Sequence[bytes]]:
    """The requests of an attempt, in groups that share a line of its input file, in order."""
    if per_line == 1:
        yield from zip(asked)
        return
    group: list[bytes] = []
    for key, left in asked.items():
        is_alone = left is not None and left.variant.alone
        if group and (is_alone or len(group) == per_line):
            yield group
            group = []
        group.append(key)
        if is_alone:
            yield group
            group = []
    if group:
        yield group


def harvested(attempts: Iterable[Attempt]) -> tuple[int, ...]:
    """The numbers of the attempts whose answers are in."""
    return tuple(attempt.number for attempt in attempts if attempt.is_harvested)


def pending(objects: Objects, shard: str, after: Sequence[int], hold: Hold | None = None) -> dict[bytes, Left | None]:
    """What is still to be asked once these attempts are harvested, in line order; None where it was not asked yet.

    `hold`: what is kept of a text that is shown with its request; without it nothing is, and none is read.
    """
    left: dict[bytes, Left | None] = dict.fromkeys(request_keys(objects, shard))
    for number in sorted(after):
        final, varied = set[bytes](), dict[bytes, Left]()
        with open_answers(objects, shard, number) as file:
            names = ["request_key", "again", "reason", *(["text"] if hold else [])]
            for batch in file.iter_batches(READ_ROWS, columns=names, use_threads=False):
                is_left = batch.column("again").is_valid()
                final.update(keys_in(batch.filter(pc.invert(is_left))))
                for line in batch.filter(is_left).to_pylist():
                    variant = Variant.model_validate_json(line["again"])
                    text = hold(line["text"]) if hold and variant.repair else None
                    varied[line["request_key"]] = Left(variant=variant, text=text, reason=line["reason"])
        left = {} if final == left.keys() else {key: each for key, each in left.items() if key not in final}
        left.update(varied)
    return left


def asked(objects: Objects, shard: Shard, claim: Claim, hold: Hold) -> dict[bytes, Left | None]:
    """The requests that an attempt asks, in line order: what follows from its claim. `hold`: as in `pending`."""
    return asked_of(pending(objects, shard.key, claim.after, hold), shard, claim)


def asked_of(left: Mapping[bytes, Left | None], shard: Shard, claim: Claim) -> dict[bytes, Left | None]:
    """The same, where it is known what was left before."""
    chosen = next_asked(left, shard)
    return chosen if claim.most is None else dict(islice(chosen.items(), claim.most))


def next_asked(left: Mapping[bytes, Left | None], shard: Shard) -> dict[bytes, Left | None]:
    """Of what is left, what is asked next: all that goes to where the first of them goes. One batch asks one model."""
    if not any(left.values()):  # all are asked for the first time, and so of one
        return dict(left)
    own = whom(Variant(), shard)
    of = {key: whom(each.variant, shard) if each else own for key, each in left.items()}
    first = next(iter(of.values()), None)
    return {key: left[key] for key, each in of.items() if each == first}


def whom(variant: Variant, shard: Shard) -> tuple[ProviderName, str]:
    """Whom a request is asked of: (provider, model); what is not asked otherwise, of the shard's own."""
    return variant.provider or shard.provider, variant.model or shard.model

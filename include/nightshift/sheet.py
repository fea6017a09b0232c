"""The sheet that an attempt's answers are put down on: columns, and then the file that they are kept in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.columns import GROUP_ROWS, UNFIT, answers_schema, rows_at_once
from nightshift.job import Job
from nightshift.judge import Answer
from nightshift.matching import sum_known
from nightshift.providers.protocol import Reply
from nightshift.settle import TOKENS, usage_of
from nightshift.shapes import Usage
from nightshift.stores.shards import keys_in

WRITE_ROWS = 2048  # of answers in words
OF_REPLY = ("outcome", "reason", "paid", "model", *TOKENS)
TAKEN = {  # the columns of a line that stand in its answer as they are, and where
    **{name: f"reply.{name}" for name in OF_REPLY},
    "token_limit": "asked_as.max_output_tokens",
}
OWN = ("request_key", "output", "text", "again", *TAKEN)
_taken = attrgetter(*TAKEN.values())


class Sheet:
    """The answers of an attempt on their way into a file: columns as soon as there are enough for a batch.

    `origin`: the columns that are the same in every line.
    """

    def __init__(self, job: Job, origin: Mapping[str, Any]) -> None:
        self._schema, self._origin = answers_schema(job), origin
        self._own = pa.schema([field for field in self._schema if field.name not in origin])  # of each line
        self._at_once = rows_at_once(self._schema, WRITE_ROWS)
        self._lines: list[tuple[Any, ...]] = []
        self._batches: list[pa.RecordBatch] = []
        self.asked_again = 0

    def add(self, key: bytes, answer: Answer) -> None:
        """Add the line of a request. What is not written is let go of at once: tens of thousands of replies are not kept in memory."""
        output, again = answer.output, answer.again
        text = answer.reply.text if output is None else None
        self._lines.append((key, output, text, again.model_dump_json(exclude_defaults=True) if again else None, *_taken(answer)))
        self.asked_again += again is not None
        if len(self._lines) == self._at_once:
            self._flush()

    def add_all(self, found: Sequence[tuple[bytes, Reply]], outputs: pa.Array) -> None:
        """Add the lines of requests that were answered as they were asked, and whose answers are columns already."""
        keys, replies = zip(*found, strict=True) if found else ((), ())
        told = {name: list(map(attrgetter(name), replies)) for name in OF_REPLY}
        own = {"request_key": keys, "output": outputs, "text": None, "again": None, "token_limit": None, **told}
        self._batches.append(_put_together(own, self._own, len(found)))

    def _flush(self) -> None:
        if self._lines:
            self._batches.append(_as_batch(self._lines, self._own))
            self._lines = []

    def count_twice(self, replies: Mapping[bytes, Sequence[Reply]]) -> None:
        """Count the tokens of further replies to requests that have their line: they are paid for, too."""
        self._flush()
        if replies:
            self._batches = [_with_tokens(batch, replies) for batch in self._batches]

    def usage(self, above: int | None) -> Usage:
        """The tokens of all lines so far that were paid for. `above`: input tokens that make a request a long one."""
        self._flush()
        return usage_of(pa.Table.from_batches(self._batches, self._own).select(["paid", *TOKENS]), above)

    def write(self, path: Path) -> None:
        """Write the file: in one row group, or in several where vectors would make it a large one."""
        self._flush()
        rows, own = rows_at_once(self._schema, GROUP_ROWS), pa.Table.from_batches(self._batches, self._own)
        plain = {"use_dictionary": list(_repeating(self._schema)), "write_statistics": False}  # lines are looked up by keys alone
        pq.write_table(_with_origin(own, self._schema, self._origin), path, compression="zstd", row_group_size=rows, **plain)


def _repeating(fields: Iterable[pa.Field], above: str = "") -> Iterator[str]:
    """The paths, as Parquet names them, of the columns whose values may stand in many lines: neither keys nor raw answers nor vectors."""
    for field in fields:
        path, kind = f"{above}{field.name}", field.type
        if pa.types.is_struct(kind):
            yield from _repeating(kind, f"{path}.")
        elif pa.types.is_list(kind):
            yield from _repeating([kind.value_field.with_name("element")], f"{path}.list.")
        elif not pa.types.is_fixed_size_list(kind) and path not in ("request_key", "text"):
            yield path


def _with_origin(own: pa.Table, schema: pa.Schema, origin: Mapping[str, Any]) -> pa.Table:
    """The lines with the columns that are the same in each of them."""
    return pa.table(
        [
            pa.repeat(pa.scalar(origin[field.name], field.type), own.num_rows) if field.name in origin else own.column(field.name)
            for field in schema
        ],
        schema=schema,
    )


def _with_tokens(batch: pa.RecordBatch, replies: Mapping[bytes, Sequence[Reply]]) -> pa.RecordBatch:
    """A batch with the tokens of further replies added to its lines."""
    further = {place: replies[key] for place, key in enumerate(keys_in(batch)) if key in replies}
    for name in TOKENS if further else ():
        values = batch.column(name).to_pylist()
        for place, more in further.items():
            values[place] = sum_known([values[place], *(getattr(reply, name) for reply in more)])
        batch = batch.set_column(batch.schema.get_field_index(name), batch.schema.field(name), pa.array(values, pa.int64()))
    return batch


def _as_batch(lines: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    """Lines as columns. An answer that is valid but fits no column (an integer of twenty digits) becomes invalid, alone."""
    own = _columns(lines)
    kind = schema.field("output").type
    try:
        own["output"] = pa.array(own["output"], kind)
    except UNFIT:
        own = _columns([_fitting(line, kind) for line in lines])
    return _put_together(own, schema, len(lines))


def _put_together(own: Mapping[str, Any], schema: pa.Schema, count: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([_column(own[field.name], field.type, count) for field in schema], schema=schema)


def _columns(lines: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    return dict(zip(OWN, zip(*lines, strict=True), strict=True))


def _column(values: Any, kind: pa.DataType, count: int) -> pa.Array:
    if values is None:
        return pa.nulls(count, kind)
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


def _fitting(line: tuple[Any, ...], kind: pa.DataType) -> tuple[Any, ...]:
    named = dict(zip(OWN, line, strict=True))
    try:
        pa.scalar(named["output"], kind)
    except UNFIT as error:
        text = orjson.dumps(named["output"], option=orjson.OPT_NON_STR_KEYS, default=str).decode()
        return tuple({**named, "outcome": "invalid", "reason": f"fits no column: {error}"[:300], "text": text, "output": None}.values())
    return line

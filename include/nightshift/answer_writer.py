"""The answers of an attempt, written: into columns as they come, and then into the file that they are kept in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
from msgspec.structs import replace

from nightshift.columns import GROUP_ROWS, UNFIT, answers_schema, rows_at_once, write_answers
from nightshift.job import Job
from nightshift.matching import sum_known
from nightshift.providers.protocol import Reply
from nightshift.settle import TOKENS, usage_of
from nightshift.shapes import Usage
from nightshift.stores.shards import keys_in
from nightshift.texts import Texts
from nightshift.validation import Answer

WRITE_ROWS = 2048  # of answers in words
WRITE_CHARACTERS = 4 << 20  # of texts, or fewer lines
HELD_BYTES = 32 << 20  # of lines in memory: what comes before waits on local disk, and becomes a row group of its own
OF_REPLY = ("outcome", "reason", "paid", "model", *TOKENS)
TAKEN = {  # the columns of a line that stand in its answer as they are, and where
    **{name: f"reply.{name}" for name in OF_REPLY},
    "token_limit": "asked_as.max_output_tokens",
}
OWN = ("request_key", "output", "text", "again", *TAKEN)
_taken = attrgetter(*TAKEN.values())


class AnswerWriter:
    """The answers of an attempt on their way into a file: columns as soon as there are enough for a batch.

    `origin`: the columns that are the same in every line; `folder`: local disk, for what memory does not hold.
    """

    def __init__(self, job: Job, origin: Mapping[str, Any], folder: Path) -> None:
        self._schema, self._origin, self._folder = answers_schema(job), origin, folder
        self._own = pa.schema([field for field in self._schema if field.name not in origin])  # of each line
        self._at_once = rows_at_once(self._schema, WRITE_ROWS)
        self._lines: list[tuple[Any, ...]] = []
        self._characters = 0  # of their texts
        self._batches: list[pa.RecordBatch] = []
        self._held = 0  # bytes of them
        self._spilled: list[Path] = []
        self._texts = Texts(folder)
        self._twice: Mapping[bytes, Sequence[Reply]] = {}
        self.asked_again = 0

    def add(self, key: bytes, answer: Answer) -> None:
        """Add the line of a request. What is not written is let go of at once: tens of thousands of replies are not kept in memory."""
        output, again = answer.output, answer.again
        text = self._texts.get(answer.reply.text) if output is None else None
        self._lines.append((key, output, text, again.model_dump_json(exclude_defaults=True) if again else None, *_taken(answer)))
        self.asked_again += again is not None
        self._characters += len(text or "")
        if len(self._lines) == self._at_once or self._characters >= WRITE_CHARACTERS:
            self._flush()

    def hold(self, reply: Reply) -> Reply:
        """A reply whose line is added later: its text waits on local disk."""
        return _with_text(reply, self._texts.put(reply.text))

    def recall(self, reply: Reply) -> Reply:
        """A reply that was held, with its text."""
        return _with_text(reply, self._texts.get(reply.text))

    def add_all(self, found: Sequence[tuple[bytes, Reply]], outputs: pa.Array) -> None:
        """Add the lines of requests that were answered as they were asked, and whose answers are columns already."""
        keys, replies = zip(*found, strict=True) if found else ((), ())
        told = {name: list(map(attrgetter(name), replies)) for name in OF_REPLY}
        own = {"request_key": keys, "output": outputs, "text": None, "again": None, "token_limit": None, **told}
        self._keep(_put_together(own, self._own, len(found)))

    def _flush(self) -> None:
        if self._lines:
            self._keep(_as_batch(self._lines, self._own))
            self._lines, self._characters = [], 0

    def _keep(self, batch: pa.RecordBatch) -> None:
        self._batches.append(batch)
        self._held += batch.get_total_buffer_size()
        if self._held >= HELD_BYTES:
            self._spilled.append(self._folder / f"lines-{len(self._spilled)}.arrow")
            with pa.OSFile(str(self._spilled[-1]), "wb") as file, pa.ipc.new_stream(file, self._own) as stream:
                for each in self._batches:
                    stream.write_batch(each)
            self._batches, self._held = [], 0

    def _parts(self) -> Iterator[pa.Table]:
        """The lines so far, in parts that memory holds."""
        self._flush()
        for path in self._spilled:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                yield self._part(stream)
        if self._batches:
            yield self._part(self._batches)

    def _part(self, batches: Iterable[pa.RecordBatch]) -> pa.Table:
        return pa.Table.from_batches([_with_tokens(batch, self._twice) if self._twice else batch for batch in batches], self._own)

    def count_twice(self, replies: Mapping[bytes, Sequence[Reply]]) -> None:
        """Count the tokens of further replies to requests that have their line: they are paid for, too."""
        self._twice = replies

    def usage(self, above: int | None) -> Usage:
        """The tokens of all lines so far that were paid for. `above`: input tokens that make a request a long one."""
        return sum((usage_of(part.select(["paid", *TOKENS]), above) for part in self._parts()), Usage())

    def write(self, path: Path) -> None:
        """Write the file: in one row group, or in several where it is a large one."""
        with write_answers(path, self._schema) as writer:
            for part in self._parts():
                writer.write_table(_with_origin(part, self._schema, self._origin), rows_at_once(self._schema, GROUP_ROWS))
        self._texts.close()


def _with_text(reply: Reply, text: str | None) -> Reply:
    return reply if text is reply.text else replace(reply, text=text)


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

"""Replies into answers: parsed and validated once, and written as the lines of an answers file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.columns import answers_schema, fit, needs_fitting, rows_at_once
from nightshift.job import Job
from nightshift.providers.protocol import Reply
from nightshift.shapes import Variant

WRITE_ROWS = 8192  # of answers in words
AS_IT_WAS = Variant()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request's line of an answers file: classified, validated, parsed."""

    reply: Reply
    output: dict[str, Any] | None = None
    asked_as: Variant = AS_IT_WAS
    again: Variant | None = None  # how it is asked again; None: this is the last word


def judge_for(job: Job) -> Callable[[Reply], Answer]:
    """The function that validates a reply under the job's schema; parsing and validating happen once, here."""
    schema = job.answer_schema
    if job.dimensions is not None:
        return partial(_judge_vector, job.dimensions)
    if schema is None:
        return lambda reply: Answer(
            reply=replace(reply, text=None) if reply.outcome == "succeeded" else reply,
            output={"answer": reply.text} if reply.outcome == "succeeded" else None,
        )
    import jsonschema_rs

    validator = jsonschema_rs.validator_for(schema)
    fitted = needs_fitting(schema)

    def judge(reply: Reply) -> Answer:
        if reply.outcome != "succeeded":
            return Answer(reply=reply)
        try:
            value = orjson.loads(reply.text or "")
        except orjson.JSONDecodeError as error:
            return Answer(reply=replace(reply, outcome="invalid", reason=f"not valid JSON: {error.msg}"))
        if not validator.is_valid(value):
            why = next(iter(validator.iter_errors(value))).message[:300]
            return Answer(reply=replace(reply, outcome="invalid", reason=f"breaks the schema: {why}"))
        try:
            output = fit(value, schema) if fitted else value
        except (TypeError, RecursionError) as error:
            return Answer(reply=replace(reply, outcome="invalid", reason=f"fits no column: {error}"))
        return Answer(reply=replace(reply, text=None), output=output)

    return judge


def _judge_vector(dimensions: int, reply: Reply) -> Answer:
    """An embedding of the right length whose numbers are numbers (F81)."""
    if reply.outcome != "succeeded":
        return Answer(reply=reply)
    vector = np.frombuffer(reply.vectors[0] if reply.vectors else b"", np.dtype("<f4"))
    if len(vector) != dimensions:
        return Answer(reply=replace(reply, outcome="invalid", reason=f"{len(vector)} numbers in place of {dimensions}"))
    if not np.isfinite(vector).all():
        return Answer(reply=replace(reply, outcome="invalid", reason="a number of the embedding is none"))
    return Answer(reply=reply, output={"embedding": vector})


def write_answers(path: Path, job: Job, answers: Iterable[tuple[bytes, Answer]], origin: Mapping[str, Any]) -> None:
    """Write an answers file, one line per request; `origin`: the columns that are the same in every line."""
    schema = answers_schema(job)
    rows = rows_at_once(schema, WRITE_ROWS)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        batch: list[dict[str, Any]] = []
        for key, answer in answers:
            batch.append({**_line(key, answer), **origin})
            if len(batch) == rows:
                writer.write_batch(_as_batch(batch, schema))
                batch = []
        if batch:
            writer.write_batch(_as_batch(batch, schema))


def _as_batch(lines: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Lines as columns. An answer that is valid but fits no column (an integer of twenty digits) becomes invalid, alone."""
    try:
        return pa.RecordBatch.from_pylist(lines, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.RecordBatch.from_pylist([_fitting(line, schema.field("output").type) for line in lines], schema=schema)


def _fitting(line: dict[str, Any], kind: pa.DataType) -> dict[str, Any]:
    try:
        pa.scalar(line["output"], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        text = orjson.dumps(line["output"], option=orjson.OPT_NON_STR_KEYS, default=str).decode()
        return {**line, "outcome": "invalid", "reason": f"fits no column: {error}"[:300], "text": text, "output": None}
    return line


def _line(key: bytes, answer: Answer) -> dict[str, Any]:
    reply = answer.reply
    return {
        "request_key": key,
        "outcome": reply.outcome,
        "reason": reply.reason,
        "text": reply.text,
        "output": answer.output,
        "paid": reply.paid,
        "token_limit": answer.asked_as.max_output_tokens,
        "again": answer.again.model_dump_json(exclude_defaults=True) if answer.again else None,
        "model": reply.model,
        "input_tokens": reply.input_tokens,
        "cached_tokens": reply.cached_tokens,
        "output_tokens": reply.output_tokens,
    }

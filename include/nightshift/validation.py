"""Replies into answers: parsed and validated once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgspec
import numpy as np
import orjson
from msgspec.structs import replace

from nightshift.columns import fit, needs_fitting
from nightshift.job import Job
from nightshift.providers.protocol import Reply
from nightshift.shapes import Usage, Variant
from nightshift.typed import Read, read_texts, reader_of

AS_IT_WAS = Variant()


class Answer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's line of an answers file: classified, validated, parsed. With an output, the text that it was is dropped."""

    reply: Reply
    output: dict[str, Any] | None = None
    asked_as: Variant = AS_IT_WAS
    again: Variant | None = None  # how it is asked again; None: this is the last word


def validator_for(job: Job) -> Callable[[Reply], Answer]:
    """The function that validates a reply under the job's schema; parsing and validating happen once, here."""
    schema, shape = job.answer_schema, job.answer_shape
    if job.dimensions is not None:
        return partial(_validate_vector, job.dimensions)
    if schema is None:
        return lambda reply: Answer(reply=reply, output={"answer": reply.text} if reply.outcome == "succeeded" else None)
    import jsonschema_rs

    validator = jsonschema_rs.validator_for(schema)
    is_valid, loads, fitted = validator.is_valid, orjson.loads, needs_fitting(shape)

    def validate(reply: Reply) -> Answer:
        if reply.outcome != "succeeded":
            return Answer(reply=reply)
        try:
            value = loads(reply.text or "")
        except orjson.JSONDecodeError as error:
            return Answer(reply=replace(reply, outcome="invalid", reason=f"not valid JSON: {error.msg}"))
        if not is_valid(value):
            why = next(iter(validator.iter_errors(value))).message[:300]
            return Answer(reply=replace(reply, outcome="invalid", reason=f"breaks the schema: {why}"))
        try:
            output = fit(value, shape) if fitted else value
        except (TypeError, RecursionError) as error:
            return Answer(reply=replace(reply, outcome="invalid", reason=f"fits no column: {error}"))
        return Answer(reply=reply, output=output)

    return validate


def reader_for(job: Job) -> Read | None:
    """The function that reads many answers at once; None where each has to be judged by itself."""
    if job.dimensions is not None:
        return None
    return read_texts if job.answer_shape is None else reader_of(job.answer_shape)


def _validate_vector(dimensions: int, reply: Reply) -> Answer:
    """An embedding of the right length whose numbers are numbers (F81)."""
    if reply.outcome != "succeeded":
        return Answer(reply=reply)
    data = reply.vectors[0] if reply.vectors else b""
    if len(data) != 4 * dimensions:
        return Answer(reply=replace(reply, outcome="invalid", reason=f"{len(data) / 4:g} numbers in place of {dimensions}"))
    vector = np.frombuffer(data, np.dtype("<f4"))
    if not np.isfinite(vector).all():
        return Answer(reply=replace(reply, outcome="invalid", reason="a number of the embedding is none"))
    return Answer(reply=reply, output={"embedding": vector})


def usage_of_replies(answers: Iterable[Answer], above: int | None) -> Usage:
    """The tokens of some answers that were paid for."""
    return sum((_tokens_of(answer.reply, above) for answer in answers if answer.reply.paid), Usage())


def _tokens_of(reply: Reply, above: int | None) -> Usage:
    tokens = {"input_tokens": reply.input_tokens or 0, "cached_tokens": reply.cached_tokens, "output_tokens": reply.output_tokens or 0}
    is_long = above is not None and tokens["input_tokens"] > above
    return Usage(**tokens, **{f"long_{name}": count for name, count in tokens.items() if is_long})

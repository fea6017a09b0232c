"""Answers as columns: the Arrow type of a JSON Schema, and the files that answers are kept in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.job import Job

GROUP_ROWS = 1 << 20  # in a row group of answers in words: all of a shard
VECTOR_BATCH_BYTES = 4 << 20
UNFIT = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)  # what Arrow says of values that fit no column
SCALARS: dict[str, pa.DataType] = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}


def answer_type(schema: Mapping[str, Any] | None) -> pa.DataType:
    """The struct that an answer under this schema fills; without a schema, one text field."""
    if schema is None:
        return pa.struct([("answer", pa.string())])
    return pa.struct([(name, arrow_type(inner)) for name, inner in schema.get("properties", {}).items()])


def arrow_type(schema: Any) -> pa.DataType:
    """The Arrow type of a JSON Schema. What has no fixed type (unions, free objects) is kept as JSON text."""
    kind = _single_type(schema) if isinstance(schema, Mapping) else None
    if kind in SCALARS:
        return SCALARS[kind]
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        return pa.list_(arrow_type(schema["items"]))
    if kind == "object" and schema.get("properties"):
        return pa.struct([(name, arrow_type(inner)) for name, inner in schema["properties"].items()])
    return pa.string()


def is_json_text(schema: Any) -> bool:
    """Whether values under this schema are kept as JSON text because no Arrow type fits them."""
    kind = _single_type(schema) if isinstance(schema, Mapping) else None
    if kind in SCALARS:
        return False
    return not ((kind == "array" and isinstance(schema.get("items"), Mapping)) or (kind == "object" and bool(schema.get("properties"))))


def fit(value: Any, schema: Any) -> Any:
    """A valid value as its column holds it: JSON text where the schema leaves the type open."""
    import orjson

    if value is None:
        return None
    if is_json_text(schema):
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
    if isinstance(value, dict):
        return {name: fit(value.get(name), inner) for name, inner in schema["properties"].items()}
    if isinstance(value, list):
        return [fit(item, schema["items"]) for item in value]
    return value


def needs_fitting(schema: Any) -> bool:
    """Whether any part of a schema is kept as JSON text, so that plain values cannot be stored as they are."""
    if not isinstance(schema, Mapping) or is_json_text(schema):
        return True
    inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    return any(needs_fitting(part) for part in inner)


def output_type(job: Job) -> pa.DataType:
    """The struct that an answer of a job fills: the fields of its schema, or a vector of fixed length."""
    if job.dimensions is not None:
        return pa.struct([("embedding", pa.list_(pa.float32(), job.dimensions))])
    return answer_type(job.answer_shape)


def rows_at_once(schema: pa.Schema, rows: int) -> int:
    """How many lines of answers are handled at once: of vectors, as many as a few megabytes hold."""
    length = vector_length(schema)
    return rows if length is None else min(rows, max(1, VECTOR_BATCH_BYTES // (4 * length)))


def vector_length(schema: pa.Schema) -> int | None:
    """How many numbers the vectors of an answers file have; None where its answers are none."""
    kind = schema.field("output").type
    first = kind.field(0).type if kind.num_fields else None
    return int(first.list_size) if first is not None and pa.types.is_fixed_size_list(first) else None


def answers_schema(job: Job) -> pa.Schema:
    """Columns of an answers file: one line per request."""
    return pa.schema(
        [
            ("request_key", pa.binary(32)),
            ("outcome", pa.string()),
            ("reason", pa.string()),
            ("text", pa.string()),  # raw answer; null where `output` holds it
            ("output", output_type(job)),
            ("paid", pa.bool_()),
            ("again", pa.string()),  # how it is asked again (a Variant as JSON), null where this is the last word
            ("shard", pa.string()),
            ("attempt", pa.int32()),
            ("batch_id", pa.string()),
            ("answered_at", pa.timestamp("ms", "UTC")),
            ("tier", pa.string()),  # batch or on_demand
            ("stand_in", pa.string()),  # the model that was asked in place of the job's
            ("token_limit", pa.int32()),  # where it was raised above the job's
            ("model", pa.string()),  # that answered, as it calls itself
            ("input_tokens", pa.int64()),
            ("cached_tokens", pa.int64()),
            ("output_tokens", pa.int64()),
        ]
    )


def write_answers(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """An answers file to be written: what repeats in it once, and without statistics, since lines are looked up by keys alone."""
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=list(_repeating(schema)), write_statistics=False)


def copy_kept(file: pq.ParquetFile, kept: npt.NDArray[np.bool_], path: Path) -> Path:
    """The lines of an answers file that are kept, in a file of their own."""
    with write_answers(path, file.schema_arrow) as writer:
        for lines in kept_lines(file, kept):
            writer.write_table(lines)
    return path


def kept_lines(file: pq.ParquetFile, kept: npt.NDArray[np.bool_]) -> Iterator[pa.Table]:
    """The lines of an answers file that are kept, in tables that memory holds; row groups without any are not read."""
    end = 0
    for group in range(file.num_row_groups):
        start, end = end, end + file.metadata.row_group(group).num_rows
        if kept[start:end].any():
            yield file.read_row_group(group, use_threads=False).filter(pa.array(kept[start:end]))


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


def _single_type(schema: Mapping[str, Any]) -> str | None:
    """The one type that a schema allows beside null, or None."""
    kind = schema.get("type")
    if isinstance(kind, list):
        kinds = [each for each in kind if each != "null"]
        return kinds[0] if len(kinds) == 1 else None
    if isinstance(kind, str):
        return kind
    variants = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(variants, list):
        kinds = [each for each in variants if isinstance(each, Mapping) and each.get("type") != "null"]
        only = kinds[0].get("type") if len(kinds) == 1 else None
        if isinstance(only, str) and only in SCALARS:
            return only
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and {type(value) for value in values} in ({str}, {str, type(None)}):
        return "string"
    return None

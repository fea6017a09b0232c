"""Answers in JSON read straight into columns: parsed and validated in one pass, where their schema can be said in types.

What the types accept the schema accepts, and its columns hold the same. What they refuse may still be valid (an integer
written as 1.0), and has to be looked at more closely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Annotated, Any, Literal

import msgspec
import pyarrow as pa

from nightshift.columns import UNFIT, answer_type, arrow_type, needs_fitting

Read = Callable[[Sequence[str | None]], tuple[pa.Array, Sequence[bool]]]  # texts → the answers that could be read; which they are

NOTES = frozenset({"$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated"})  # ask nothing of a value
OF_TEXTS = frozenset({"pattern", "format"})  # no type says them as JSON Schema means them
LENGTHS = {"minLength": "min_length", "maxLength": "max_length"}
COUNTS = {"minItems": "min_length", "maxItems": "max_length"}
BOUNDS = {"minimum": "ge", "maximum": "le", "exclusiveMinimum": "gt", "exclusiveMaximum": "lt"}
EXACT = float(2**53 - 1)  # up to here no integer is rounded to one that a double holds
LATEST = "https://json-schema.org/draft/2020-12/schema"  # what a schema is read as that does not say
REFUSED = (ValueError, RecursionError, TypeError)  # the last: no text


class _Untyped(Exception):
    """A schema says what no type says."""


def reader_of(schema: Mapping[str, Any]) -> Read | None:
    """The function that reads answers under a schema of objects; None where types cannot say it."""
    if needs_fitting(schema) or "properties" not in schema:
        return None
    try:
        decode, checks = msgspec.json.Decoder(_type_of(_without_checks(schema))).decode, list(_checks(schema))
    except (_Untyped, TypeError, ValueError):  # the latter two: names and bounds that msgspec does not take
        return None
    kind = answer_type(schema)

    def read(texts: Sequence[str | None]) -> tuple[pa.Array, Sequence[bool]]:
        values = _decoded(decode, texts)
        for look, is_valid in checks:
            values = _checked(values, look, is_valid)
        try:
            column = _column([value for value in values if value is not None], kind)
        except UNFIT:  # an integer of twenty digits, say
            return pa.nulls(0, kind), [False] * len(values)
        return column, [value is not None for value in values]

    return read


def read_texts(texts: Sequence[str | None]) -> tuple[pa.Array, Sequence[bool]]:
    """Answers without a schema: all that came are as they should be."""
    kind = answer_type(None)
    return pa.StructArray.from_arrays([pa.array(texts, pa.string())], fields=list(kind)), [True] * len(texts)


def _decoded(decode: Callable[[Any], Any], texts: Iterable[str | None]) -> list[Any]:
    values = []
    for text in texts:
        try:
            values.append(decode(text))
        except REFUSED:
            values.append(None)
    return values


def _checked(values: Sequence[Any], look: Callable[[Any], Any], is_valid: Callable[[Any], bool]) -> list[Any]:
    """The same, with None for those whose text is not valid. Each text is looked at once: in many columns they are few."""
    texts = [None if value is None else look(value) for value in values]
    wrong = {text for text in set(texts) if text is not None and not is_valid(text)}
    return [None if text in wrong else value for value, text in zip(values, texts, strict=True)] if wrong else list(values)


def _is_text(schema: Any) -> bool:
    return isinstance(schema, Mapping) and bool(arrow_type(schema) == pa.string())


def _without_checks(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema less what is checked by itself in the texts of its own fields."""
    less = {
        name: {word: value for word, value in inner.items() if word not in OF_TEXTS} if _is_text(inner) else inner
        for name, inner in schema["properties"].items()
    }
    return {**schema, "properties": less}


def _checks(schema: Mapping[str, Any]) -> Iterator[tuple[Callable[[Any], Any], Callable[[Any], bool]]]:
    """How to look at each field that is checked by itself, and whether its text is valid."""
    import jsonschema_rs

    for place, inner in enumerate(schema["properties"].values()):
        if _is_text(inner) and inner.keys() & OF_TEXTS:
            yield attrgetter(_attribute(place)), jsonschema_rs.validator_for({**inner, "$schema": schema.get("$schema", LATEST)}).is_valid


def _type_of(schema: Mapping[str, Any]) -> Any:
    """The type whose values are valid under a schema. Raises _Untyped."""
    said = {word: value for word, value in schema.items() if word not in NOTES}
    if said.keys() == {"anyOf"}:
        variants = [each for each in said["anyOf"] if each != {"type": "null"}]
        if len(variants) == 1 and len(said["anyOf"]) == 2:
            return _type_of(variants[0]) | None
        raise _Untyped
    kinds = said.pop("type", None)
    kinds = [kinds] if isinstance(kinds, str) else kinds or []
    may_be_null = "null" in kinds and None in said.get("enum", [None])
    match [kind for kind in kinds if kind != "null"]:
        case ["string"] if "enum" in said:
            found: Any = Literal[tuple(each for each in said.pop("enum") if isinstance(each, str))]
        case ["string"]:
            found = _limited(str, _renamed(said, LENGTHS))
        case ["boolean"]:
            found = bool
        case ["integer"]:
            found = _limited(int, {name: int(bound) if bound % 1 == 0 else bound for name, bound in _renamed(said, BOUNDS).items()})
        case ["number"]:
            found = _limited(float, _within_exact(_renamed(said, BOUNDS)))
        case ["array"]:
            found = _limited(list[_type_of(said.pop("items"))], _renamed(said, COUNTS))  # type: ignore[misc]
        case ["object"]:
            found = _struct_of(said)
        case _:
            raise _Untyped
    if said:
        raise _Untyped
    return found | None if may_be_null else found


def _struct_of(said: dict[str, Any]) -> type[msgspec.Struct]:
    """The type of an object without other fields; takes what it has understood out of `said`.

    Others may be allowed. But they would be read over, and what is wrong with them (a number that is none) would go unseen.
    """
    properties, required = said.pop("properties"), said.pop("required", ())
    said.pop("additionalProperties", None)
    if not properties.keys() >= set(required):
        raise _Untyped
    names = {_attribute(place): name for place, name in enumerate(properties)}
    types = {attribute: _type_of(properties[name]) for attribute, name in names.items()}
    fields = [(each, kind) if names[each] in required else (each, kind, None) for each, kind in types.items()]
    return msgspec.defstruct("Object", fields, rename=names, kw_only=True, forbid_unknown_fields=True, eq=False, gc=False)


def _limited(kind: Any, limits: Mapping[str, Any]) -> Any:
    return Annotated[kind, msgspec.Meta(**limits)]


def _attribute(place: int) -> str:
    return f"field_{place}"


def _renamed(said: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What a schema says of values, as msgspec names it; taken out of `said`."""
    return {names[word]: said.pop(word) for word in names.keys() & said.keys()}


def _within_exact(bounds: Mapping[str, float]) -> dict[str, float]:
    """Bounds that also leave out what a column of doubles would not hold exactly, were it written as an integer."""
    if any(abs(bound) > EXACT for bound in bounds.values()):
        raise _Untyped
    lower, upper = {"ge": -EXACT} if "gt" not in bounds else {}, {"le": EXACT} if "lt" not in bounds else {}
    return {**lower, **upper, **bounds}


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values of a type as a column: objects, and lists of them, by their parts."""
    is_list = pa.types.is_list(kind) and pa.types.is_nested(kind.value_type)
    if not is_list and not pa.types.is_struct(kind):
        return pa.array(values, kind)
    mask = pa.array([value is None for value in values], pa.bool_()) if None in values else None
    if is_list:
        ends = pa.array([0, *accumulate(len(value or ()) for value in values)], pa.int32())
        items = _column([item for value in values for item in value or ()], kind.value_type)
        return pa.ListArray.from_arrays(ends, items, type=kind, mask=mask)
    looks = [attrgetter(_attribute(place)) for place in range(kind.num_fields)]
    parts = [
        [None if value is None else look(value) for value in values] if mask is not None else list(map(look, values)) for look in looks
    ]
    return pa.StructArray.from_arrays(list(map(_column, parts, (field.type for field in kind))), fields=list(kind), mask=mask)

"""What the answer's JSON Schema says, looked at as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nightshift.errors import nearest

VALUES = frozenset({"const", "enum", "default", "examples"})  # keywords whose values are data, and no schemas


def inlined(schema: Any, root: Mapping[str, Any], within: tuple[str, ...] = ()) -> Any:
    """A schema with the parts that it refers to in place of `$ref`, as pydantic and others write them; one that refers to itself stays."""
    if isinstance(schema, list):
        return [inlined(each, root, within) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    reference, only = schema.get("$ref"), schema.get("allOf")
    beside = {name: value for name, value in schema.items() if name not in ("$ref", "allOf")}
    if isinstance(reference, str) and reference not in within and isinstance(found := _referred(root, reference), Mapping):
        return {**inlined(found, root, (*within, reference)), **inlined(beside, root, within)}
    if isinstance(only, list) and len(only) == 1 and isinstance(only[0], Mapping):
        return {**inlined(only[0], root, within), **inlined(beside, root, within)}
    plain = {name: value for name, value in schema.items() if name not in ("$defs", "definitions")}
    return {name: _inlined_below(name, value, root, within) for name, value in plain.items()}


def _inlined_below(name: str, value: Any, root: Mapping[str, Any], within: tuple[str, ...]) -> Any:
    if name in VALUES:
        return value
    if name == "properties" and isinstance(value, Mapping):  # names of the answer's own, whatever they are
        return {field: inlined(inner, root, within) for field, inner in value.items()}
    return inlined(value, root, within)


def _referred(root: Any, reference: str) -> Any:
    """What a local reference, such as `#/$defs/Point`, leads to; None where it leads elsewhere."""
    if not reference.startswith("#/"):
        return None
    for part in reference[2:].split("/"):
        root = root.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root


def unmet(schema: Any, path: str = "", loc: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """What a schema without references requires and does not describe: no answer that keeps to its properties would ever be valid.

    Each with the place in the schema. `path`: in the answer; `loc`: in the schema.
    """
    if isinstance(schema, list):
        for number, each in enumerate(schema):
            yield from unmet(each, path, (*loc, str(number)))
    if not isinstance(schema, Mapping):
        return
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        required = schema.get("required")
        for name in required if isinstance(required, list) else ():
            if name not in properties:
                why = f"{path or 'the answer'}: required names {name!r}, which is no property{nearest(str(name), properties)}"
                yield (*loc, "required"), why
        for name, inner in properties.items():
            yield from unmet(inner, f"{path}.{name}".lstrip("."), (*loc, "properties", name))
    for keyword in ("items", "anyOf", "oneOf"):
        yield from unmet(schema.get(keyword), path, (*loc, keyword))

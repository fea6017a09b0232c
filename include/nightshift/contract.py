"""The input contract: which rows may be asked at all, decided before anything is paid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from operator import eq
from typing import Any

from nightshift.job import Requirement

Check = Callable[[Any], str | None]
TRUE, FALSE = frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no"})


def compile_contract(require: Mapping[str, Requirement]) -> dict[str, Callable[[Sequence[Any]], Sequence[str | None]]]:
    """Per column a function: values → for each why its row is rejected, or None; nothing at all where none is."""
    return {column: _checks(_are_good(requirement), _check(column, requirement)) for column, requirement in require.items()}


def _checks(are_good: Callable[[Sequence[Any]], bool], check: Check) -> Callable[[Sequence[Any]], Sequence[str | None]]:
    return lambda values: () if are_good(values) else [check(value) for value in values]


def typed(value: Any, requirement: Requirement | None) -> Any:
    """A value as its declared type. CSV knows only text, so numbers and booleans are read from it; None where that fails."""
    if value is None or requirement is None or requirement.type == "string":
        return value
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        match requirement.type:
            case "integer":
                return int(text)
            case "number":
                return float(text)
            case "boolean":
                return True if text.lower() in TRUE else False if text.lower() in FALSE else None
    except ValueError:
        return None


def _are_good(requirement: Requirement) -> Callable[[Sequence[Any]], bool]:
    """A quick look at many values, which may say no to good ones but never yes to a bad one."""
    low, high, minimum, maximum = requirement.min_length, requirement.max_length, requirement.minimum, requirement.maximum
    plain = {"string": frozenset({str}), "integer": frozenset({int}), "number": frozenset({int, float})}.get(
        requirement.type, frozenset({bool})
    )
    enum = frozenset(requirement.enum) if requirement.enum is not None else None

    def are_good(values: Sequence[Any]) -> bool:
        if not values or not plain.issuperset(map(type, values)) or (enum is not None and not enum.issuperset(values)):
            return False
        if requirement.type == "string":
            return (low is None or min(map(len, map(str.strip, values))) >= low) and (high is None or max(map(len, values)) <= high)
        if requirement.type == "boolean":
            return True
        least, most = min(values), max(values)
        if not all(map(eq, values, values)):
            return False  # a number that is none compares with nothing
        return least >= -(2**63) and most < 2**63 and (minimum is None or least >= minimum) and (maximum is None or most <= maximum)

    return are_good


def _check(column: str, requirement: Requirement) -> Check:
    low, high, enum = requirement.min_length, requirement.max_length, requirement.enum

    def check(value: Any) -> str | None:
        if value is None or (value == "" and requirement.type != "string"):
            return None if requirement.optional else f"{column} is null"
        if requirement.type == "string":
            if not isinstance(value, str):
                return f"{column} is not a string"
            if low is not None and len(value.strip()) < low:
                return f"{column} is shorter than {low}" if low > 1 else f"{column} is empty"
            if high is not None and len(value) > high:
                return f"{column} is longer than {high}"
        else:
            value = typed(value, requirement)
            if not _is_a(value, requirement.type):
                return f"{column} is not of type {requirement.type}"
            if requirement.type == "integer" and not -(2**63) <= value < 2**63:
                return f"{column} is beyond 64 bits"
            if requirement.minimum is not None and value < requirement.minimum:
                return f"{column} is below {requirement.minimum:g}"
            if requirement.maximum is not None and value > requirement.maximum:
                return f"{column} is above {requirement.maximum:g}"
        if enum is not None and value not in enum:
            return f"{column} is not one of the allowed values"
        return None

    return check


def _is_a(value: Any, kind: str) -> bool:
    match kind:
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float | Decimal) and not isinstance(value, bool) and value == value
        case _:
            return isinstance(value, bool)

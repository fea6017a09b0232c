"""The input contract: which rows may be asked at all, decided before anything is paid."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from decimal import Decimal
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nightshift.arrow import contents
from nightshift.formats import Rows
from nightshift.job import Requirement

Mask = npt.NDArray[np.bool_]
EXACT = 1 << 53  # integers up to it are held against a float as they are
SPACE, DELETE = 0x20, 0x7F  # between the two is what ASCII prints
TRUE, FALSE = frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no"})


def compile_contract(require: Mapping[str, Requirement]) -> Callable[[Rows], dict[int, str]]:
    """A function: rows → why some of them are rejected, by their place; of several reasons the first."""
    checks = [(column, requirement, reason_for(column, requirement)) for column, requirement in require.items()]

    def rejected(rows: Rows) -> dict[int, str]:
        found = dict[int, str]()
        for column, requirement, check in checks:
            for i, value in _doubtful(rows, column, requirement):
                reason = check(value)
                if reason is not None:
                    found.setdefault(i, reason)
        return found

    return rejected


def _doubtful(rows: Rows, column: str, requirement: Requirement) -> Iterable[tuple[int, Any]]:
    """The values of a column that a quick look at all of them leaves in doubt, and their places."""
    array = rows.array(column)
    good = None if array is None else _are_good(array, requirement)
    if array is None or good is None:
        return enumerate(rows.columns[column])
    places = np.flatnonzero(~(good & array.is_valid().to_numpy(zero_copy_only=False)))
    return zip(places.tolist(), array.take(pa.array(places)).to_pylist(), strict=True) if len(places) else ()


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


def _are_good(values: pa.Array, requirement: Requirement) -> Mask | None:
    """A quick look: it may say no to what is good, but never yes to what is bad. Of nulls it says anything; of other types nothing."""
    if pa.types.is_string(values.type) and requirement.type == "string":
        return _are_long(values, requirement.min_length, requirement.max_length) & _are_among(values, requirement.enum)
    if requirement.enum is not None:
        return None
    if pa.types.is_boolean(values.type) and requirement.type == "boolean" and requirement.minimum is requirement.maximum is None:
        return np.ones(len(values), bool)
    if pa.types.is_integer(values.type) and requirement.type in ("integer", "number"):
        integers: npt.NDArray[np.integer[Any]] = values.fill_null(0).to_numpy()
        return _are_between(integers, -EXACT, EXACT) & _are_between(integers, requirement.minimum, requirement.maximum)
    if pa.types.is_float64(values.type) and requirement.type == "number":
        numbers: npt.NDArray[np.float64] = values.to_numpy(zero_copy_only=False)
        return ~np.isnan(numbers) & _are_between(numbers, requirement.minimum, requirement.maximum)
    return None


def _are_long(texts: pa.Array, low: int | None, high: int | None) -> Mask:
    """By their bytes, one to four a character. White space at the ends is not counted, and they have none there."""
    data, offsets = contents(texts)
    sizes = np.diff(offsets)
    good = np.ones(len(texts), bool) if high is None else sizes <= high
    if low:
        good &= sizes >= 4 * low
        ends = np.concatenate([offsets[:-1][good], offsets[1:][good] - 1])
        printed = (data[ends] > SPACE) & (data[ends] < DELETE)
        good[good] = np.logical_and(*np.split(printed, 2))
    return good


def _are_between(numbers: npt.NDArray[Any], minimum: float | None, maximum: float | None) -> Mask:
    good = np.ones(len(numbers), bool)
    if minimum is not None:
        good &= numbers >= minimum
    if maximum is not None:
        good &= numbers <= maximum
    return good


def _are_among(texts: pa.Array, enum: Collection[Any] | None) -> Mask | bool:
    if enum is None:
        return True
    allowed = pa.array([each for each in enum if isinstance(each, str)], pa.string())
    return cast("Mask", pc.is_in(texts, value_set=allowed).to_numpy(zero_copy_only=False))


def reason_for(column: str, requirement: Requirement) -> Callable[[Any], str | None]:
    """A function: a value → why its row is rejected, or None."""
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

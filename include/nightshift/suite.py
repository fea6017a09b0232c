"""Great Expectations over a dataset of any size: an expectation is shown as much of the rows at once as its verdict needs.

Great Expectations judges pandas frames that it holds whole, and costs seconds and 290 MB to import: it is imported here, inside a call, and
nowhere else.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.arrow import collector_paused, is_text
from nightshift.formats import rows_that_fit
from nightshift.job import Expectation
from nightshift.shapes import Check
from nightshift.stores.database import open_database, quoted
from nightshift.stores.objects import Objects

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = 5
BOUNDS_SHOWN = 120  # characters of what an expectation asks for
UNTOLD = ("column", "severity", "meta", "notes", "description")  # of its arguments
PLACE = "place"  # of an expectation among others, noted in what Great Expectations keeps with it: results come in an order of their own
ROWS_AT_ONCE, BYTES_AT_ONCE = 50_000, 4 << 20  # pandas and Great Expectations take several times as much
SORT_MEMORY = "64MB"  # beside Great Expectations; what does not fit is sorted on local disk, of short rows only
TOLD_APART = 64  # bytes of a text; of longer ones, a digest tells as well which are the same

# These judge a row by what stands in it, so rows can be judged part by part and counted together.
ROW_BY_ROW = frozenset(
    {
        "expect_column_pair_values_a_to_be_greater_than_b",
        "expect_column_pair_values_to_be_equal",
        "expect_column_pair_values_to_be_in_set",
        "expect_column_value_lengths_to_be_between",
        "expect_column_value_lengths_to_equal",
        "expect_column_values_to_be_between",
        "expect_column_values_to_be_dateutil_parseable",
        "expect_column_values_to_be_in_set",
        "expect_column_values_to_be_json_parseable",
        "expect_column_values_to_be_null",
        "expect_column_values_to_match_json_schema",
        "expect_column_values_to_match_regex",
        "expect_column_values_to_match_regex_list",
        "expect_column_values_to_match_strftime_format",
        "expect_column_values_to_not_be_in_set",
        "expect_column_values_to_not_be_null",
        "expect_column_values_to_not_match_regex",
        "expect_column_values_to_not_match_regex_list",
        "expect_multicolumn_sum_to_equal",
        "expect_select_column_values_to_be_unique_within_record",
    }
)
# These ask whether a row is alone with its values, so a part has to show that of each of its rows.
BY_VALUE = frozenset({"expect_column_values_to_be_unique", "expect_compound_columns_to_be_unique"})
# These judge what columns there are: all of them and no row.
COLUMNS_ONLY = frozenset(
    {
        "expect_column_to_exist",
        "expect_table_column_count_to_be_between",
        "expect_table_column_count_to_equal",
        "expect_table_columns_to_match_ordered_list",
        "expect_table_columns_to_match_set",
    }
)
# These end in one figure of a column and name no row, so that nobody needs the ids.
IN_ONE_FIGURE = frozenset(
    {
        "expect_column_distinct_values_to_be_in_set",
        "expect_column_distinct_values_to_contain_set",
        "expect_column_distinct_values_to_equal_set",
        "expect_column_max_to_be_between",
        "expect_column_mean_to_be_between",
        "expect_column_median_to_be_between",
        "expect_column_min_to_be_between",
        "expect_column_most_common_value_to_be_in_set",
        "expect_column_proportion_of_non_null_values_to_be_between",
        "expect_column_proportion_of_unique_values_to_be_between",
        "expect_column_quantile_values_to_be_between",
        "expect_column_stdev_to_be_between",
        "expect_column_sum_to_be_between",
        "expect_column_unique_value_count_to_be_between",
    }
)


Build = Callable[[Expectation, int], Any]  # an expectation, its place → what Great Expectations applies


class Parts:
    """A dataset in Parquet files of the store, of which columns and rows are taken as they are needed. `folder`: local disk to sort on."""

    def __init__(self, store: Objects, keys: Sequence[str], folder: Path, rows_at_once: int = ROWS_AT_ONCE) -> None:
        self._store, self._keys, self._folder, self._rows_at_once = store, keys, folder, rows_at_once
        with store.open(keys[0]) as file:
            self.schema: pa.Schema = pq.read_schema(file)

    def whole(self, names: set[str]) -> pd.DataFrame:
        """All rows of some columns; of a name that the dataset does not have, nothing."""
        tables = []
        for key in self._keys:
            with self._store.open(key) as file:
                tables.append(pq.read_table(file, columns=self._known(names)))
        frame: pd.DataFrame = pa.concat_tables(tables).to_pandas()
        return frame

    def in_turn(self, names: set[str]) -> Iterator[pd.DataFrame]:
        """The same, at most `rows_at_once` at a time; an empty dataset is one empty frame."""
        seen = 0
        for batch in self._batches(names):
            seen += batch.num_rows
            yield _frame(batch)
        if not seen:
            yield self.whole(names)

    def by_value(self, names: set[str], others: set[str]) -> Iterator[pd.DataFrame]:
        """The rows of some columns and of others beside them, in parts that tell which rows have the same in those columns as another.

        Such rows come in the same part, or two and more of them in each of several. A part has at most twice `rows_at_once`.
        """
        if not names or not names <= set(self.schema.names):  # nothing to sort by: the expectation says itself what is wrong with it
            yield self.whole(names | others)
            return
        shown = self._known(names | others)
        with open_database(self._folder, SORT_MEMORY) as database:
            rows = pa.RecordBatchReader.from_batches(pa.schema([self.schema.field(name) for name in shown]), self._batches(set(shown)))
            database.register("rows", rows)
            values = ", ".join(map(quoted, sorted(names)))
            columns = ", ".join(self._short(name) if name not in others else quoted(name) for name in shown)
            found = database.sql(f"SELECT hash({values}), {columns} FROM rows ORDER BY 1").to_arrow_reader(self._rows_at_once)
            for table in _by_value(found, self._rows_at_once):
                yield _frame(table.remove_column(0))

    def length(self) -> pd.DataFrame:
        """All rows of the column that is least to read."""
        widths = {field.name: field.type.bit_width for field in self.schema if pa.types.is_primitive(field.type)}
        return self.whole({min(widths, key=widths.__getitem__, default=self.schema.names[0])})

    def columns(self) -> pd.DataFrame:
        """All columns and no row."""
        frame: pd.DataFrame = self.schema.empty_table().to_pandas()
        return frame

    def _batches(self, names: set[str]) -> Iterator[pa.RecordBatch]:
        for key in self._keys:
            with self._store.open(key) as file:
                parquet, known = pq.ParquetFile(file), self._known(names)
                at_once = rows_that_fit(parquet, known, self._rows_at_once, BYTES_AT_ONCE)
                yield from parquet.iter_batches(at_once, columns=known)

    def _short(self, name: str) -> str:
        """A column in SQL, with what is as unique in place of long texts: DuckDB sorts long rows in memory only."""
        column = quoted(name)
        if not is_text(self.schema.field(name).type):
            return column
        return f"CASE WHEN strlen({column}) > {TOLD_APART} THEN md5({column}) ELSE {column} END AS {column}"

    def _known(self, names: set[str]) -> list[str]:
        return [name for name in self.schema.names if name in names]


def _frame(rows: pa.RecordBatch | pa.Table) -> pd.DataFrame:
    """Rows for pandas. Integers stay such beside a null, and do not become floats in the one part that has it."""
    frame: pd.DataFrame = rows.to_pandas(integer_object_nulls=True)
    return frame


def _by_value(batches: pa.RecordBatchReader, most: int) -> Iterator[pa.Table]:
    """Batches of at most so many rows in the order of their first column, cut anew between its values. One at least.

    What is not alone stays so: of a value with more rows than a part holds, two at least come in each.
    """
    held = batches.schema.empty_table()  # rows of one value, the last one
    for batch in batches:
        table = pa.Table.from_batches([batch])
        values = batch.column(0).to_numpy()
        first_of_last = int(np.searchsorted(values, values[-1]))
        if first_of_last or (held.num_rows and held.column(0)[-1].as_py() != values[0]):
            yield pa.concat_tables([held, table.slice(0, first_of_last)])
            held = table.slice(first_of_last)
        else:
            held = pa.concat_tables([held, table])
        if held.num_rows > most:
            yield held.slice(0, held.num_rows - 2)
            held = held.slice(held.num_rows - 2)
    yield held


@dataclass(slots=True)
class _Seen:
    """What was found of one expectation so far."""

    expectation: Expectation
    success: bool = True
    considered: int = 0  # rows that it looked at, where it looks at rows
    unexpected: int | None = None
    examples: list[str] = field(default_factory=list)
    detail: str | None = None

    def whole(self, result: Mapping[str, Any], id_column: str) -> None:
        """Take a verdict on all rows as it is."""
        self._take(result, id_column)
        self.success = self.success and bool(result["success"])

    def part(self, result: Mapping[str, Any], id_column: str) -> None:
        """Count a part of the rows; the verdict is that on all counted so far, by the rule of Great Expectations."""
        self._take(result, id_column)
        found = result.get("result") or {}
        self.considered += (found.get("element_count") or 0) - (found.get("missing_count") or 0)
        if self.considered and self.detail is None:
            mostly = self.expectation.kwargs.get("mostly", 1.0)
            self.success = (self.considered - (self.unexpected or 0)) / self.considered >= mostly

    def _take(self, result: Mapping[str, Any], id_column: str) -> None:
        found = result.get("result") or {}
        if found.get("unexpected_count") is not None:
            self.unexpected = (self.unexpected or 0) + found["unexpected_count"]
        indexes = (each for each in found.get("partial_unexpected_index_list") or () if isinstance(each, dict))
        self.examples = [*self.examples, *(str(each.get(id_column)) for each in indexes)][:EXAMPLES]
        failed = None if result["success"] else _exception_message(result.get("exception_info") or {})
        observed = found.get("observed_value")
        observed = round(observed, 4) if isinstance(observed, float) else observed
        if failed is not None:
            self.success, self.detail = False, failed
        elif observed is not None:
            self.detail = f"observed {observed}"

    def check(self) -> Check:
        """The verdict."""
        return Check(
            expectation=self.expectation.type,
            column=self.expectation.column,
            bounds=_bounds(self.expectation),
            severity=self.expectation.severity,
            success=self.success,
            unexpected=self.unexpected,
            examples=tuple(self.examples),
            detail=self.detail,
        )


def _bounds(expectation: Expectation) -> str:
    """What an expectation asks for, beside its column: its arguments, cut short."""
    named = ((name, value) for name, value in expectation.kwargs.items() if name not in UNTOLD and value is not None)
    told = ", ".join(f"{name} {orjson.dumps(value, default=str).decode()}" for name, value in named)
    return told if len(told) <= BOUNDS_SHOWN else f"{told[:BOUNDS_SHOWN]}…"


def registered() -> Mapping[str, Collection[str]]:
    """Every expectation that Great Expectations knows, with its arguments. Imports it."""
    from great_expectations.expectations.registry import get_expectation_impl, list_registered_expectation_implementations

    return {name: get_expectation_impl(name).__fields__ for name in list_registered_expectation_implementations()}


def builder() -> Build:
    """Great Expectations, imported."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations._docs_decorators").addFilter(lambda record: record.levelno > logging.INFO)  # 216 lines at import
    with collector_paused():  # a million objects, and all of them stay
        import great_expectations  # noqa: F401
        from great_expectations.expectations.registry import get_expectation_impl
    return lambda each, place: get_expectation_impl(each.type)(**each.kwargs | {"meta": {PLACE: place}})


def run_suite(expectations: Sequence[Expectation], parts: Parts, id_column: str) -> tuple[Check, ...]:
    """Apply a suite to a dataset; rows that break it are named by their id.

    Reads the rows once, and once more for each expectation that does not judge them row by row.
    """
    validate = _validator(id_column)
    seen = [_Seen(expectation) for expectation in expectations]
    for each in seen:  # the larger ones first: parts find room in what they leave
        if each.expectation.type in BY_VALUE:
            for frame in parts.by_value(_named(each.expectation), {id_column} | _conditions(each.expectation, parts)):
                [result] = validate([each.expectation], frame)
                each.part(result, id_column)
        elif each.expectation.type not in ROW_BY_ROW:
            [result] = validate([each.expectation], _shown(each.expectation, parts, id_column))
            each.whole(result, id_column)
    by_row = [each for each in seen if each.expectation.type in ROW_BY_ROW]
    if by_row:
        named = {id_column}.union(*(_read_by(each.expectation, parts) for each in by_row))
        for frame in parts.in_turn(named):
            for each, result in zip(by_row, validate([each.expectation for each in by_row], frame), strict=True):
                each.part(result, id_column)
    return tuple(each.check() for each in seen)


def _shown(expectation: Expectation, parts: Parts, id_column: str) -> pd.DataFrame:
    """What an expectation has to see that judges neither row by row nor by value."""
    named = _read_by(expectation, parts)
    if expectation.type in COLUMNS_ONLY:
        return parts.columns()
    if not named:
        return parts.length()
    return parts.whole(named if expectation.type in IN_ONE_FIGURE else {id_column} | named)


def _validator(id_column: str) -> Any:
    """Great Expectations, set up: (expectations, frame) -> the result of each, as a dict."""
    build = builder()
    import great_expectations as gx
    from great_expectations.exceptions.exceptions import GreatExpectationsError

    context = gx.get_context(mode="ephemeral")
    quiet: Any = {"globally": False, "metric_calculations": False}  # else tqdm fills the task's log
    context.variables.progress_bars = quiet
    definition = context.data_sources.add_pandas("staged").add_dataframe_asset("rows").add_batch_definition_whole_dataframe("all")
    shown: Any = {
        "result_format": "SUMMARY",  # COMPLETE keeps every row that breaks an expectation, however many
        "partial_unexpected_count": EXAMPLES,
        "unexpected_index_column_names": [id_column],
        "return_unexpected_index_query": False,
    }

    def validate(expectations: Sequence[Expectation], frame: pd.DataFrame) -> list[Mapping[str, Any]]:
        try:
            built = [build(each, place) for place, each in enumerate(expectations)]
            batch = definition.get_batch(batch_parameters={"dataframe": frame})
            # All at once: a frame is hashed whole for each validation, and what two expectations ask for is computed for each.
            found: Any = batch.validate(gx.ExpectationSuite(name="all", expectations=built), result_format=shown).results
            return [each.to_json_dict() for each in sorted(found, key=lambda each: each.expectation_config.meta[PLACE])]
        except (GreatExpectationsError, ValueError, TypeError) as error:
            if len(expectations) > 1:
                return [result for each in expectations for result in validate([each], frame)]
            # A suite line that cannot even be applied is red, not green: nobody has checked what it asks for.
            return [{"success": False, "exception_info": {"exception_message": str(error).splitlines()[0]}}]

    return validate


def _named(expectation: Expectation) -> set[str]:
    """The columns that an expectation names."""
    named: set[str] = set()
    for name, value in expectation.kwargs.items():
        if name.startswith("column"):
            named |= {value} if isinstance(value, str) else set(value) if isinstance(value, list) else set()
    return named


def _read_by(expectation: Expectation, parts: Parts) -> set[str]:
    """The columns that an expectation has to see."""
    return _named(expectation) | _conditions(expectation, parts)


def _conditions(expectation: Expectation, parts: Parts) -> set[str]:
    """The columns that tell which rows an expectation is about."""
    condition = str(expectation.kwargs.get("row_condition") or "")
    return {name for name in parts.schema.names if re.search(rf"\b{re.escape(name)}\b", condition)}


def _exception_message(info: Mapping[str, Any]) -> str | None:
    """Great Expectations nests this once per metric, or not at all."""
    for inner in (info, *info.values()):
        if isinstance(inner, Mapping) and inner.get("exception_message"):
            return str(inner["exception_message"]).splitlines()[0][:300]
    return None

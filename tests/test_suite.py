"""Great Expectations over parts: the verdict on rows judged part by part is the verdict on all of them."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightshift.job import Expectation
from nightshift.stores.objects import open_objects
from nightshift.suite import BY_VALUE, COLUMNS_ONLY, ROW_BY_ROW, Parts, run_suite

ROWS = 240
WORDS = ["positive", "neutral", "negative", None]


def rows() -> pa.Table:
    """Nulls throughout in the first third, so that a part looks different from the whole; then all sorts."""
    numbers = [None if i < 80 else i % 7 for i in range(ROWS)]
    return pa.table(
        {
            "id": [f"r{i}" for i in range(ROWS)],
            "word": [None if i < 80 else WORDS[i % 4] for i in range(ROWS)],
            "number": pa.array(numbers, pa.int64()),
            "other": pa.array([None if number is None else 6 - number for number in numbers], pa.int64()),
            "value": pa.array([6] * ROWS, pa.int64()),
            "day": [f"2026-11-{1 + i % 31}" for i in range(ROWS)],
            "json": ['{"a": 1}' if i % 9 else "{" for i in range(ROWS)],
        }
    )


@pytest.fixture
def parts(tmp_path):
    """The rows in three files of the store."""
    store, table = open_objects(f"file://{tmp_path}"), rows()
    for number in range(3):
        pq.write_table(table.slice(80 * number, 80), tmp_path / f"{number}.parquet")
    return Parts(store, [f"{number}.parquet" for number in range(3)], tmp_path, rows_at_once=20)


ASKED = {
    "expect_column_pair_values_a_to_be_greater_than_b": {"column_A": "number", "column_B": "other"},
    "expect_column_pair_values_to_be_equal": {"column_A": "number", "column_B": "other", "mostly": 0.1},
    "expect_column_pair_values_to_be_in_set": {"column_A": "number", "column_B": "other", "value_pairs_set": [(0, 6), (1, 5), (2, 4)]},
    "expect_column_value_lengths_to_be_between": {"column": "word", "min_value": 8},
    "expect_column_value_lengths_to_equal": {"column": "word", "value": 8, "mostly": 0.6},
    "expect_column_values_to_be_between": {"column": "number", "min_value": 1, "max_value": 5, "mostly": 0.7},
    "expect_column_values_to_be_dateutil_parseable": {"column": "day"},
    "expect_column_values_to_be_in_set": {"column": "word", "value_set": ["positive", "neutral"], "mostly": 0.67},
    "expect_column_values_to_be_json_parseable": {"column": "json", "mostly": 0.88},
    "expect_column_values_to_be_null": {"column": "word", "mostly": 0.4},
    "expect_column_values_to_match_json_schema": {"column": "json", "json_schema": {"type": "object"}},
    "expect_column_values_to_match_regex": {"column": "word", "regex": "^[np]"},
    "expect_column_values_to_match_regex_list": {"column": "word", "regex_list": ["^n", "e$"]},
    "expect_column_values_to_match_strftime_format": {"column": "day", "strftime_format": "%Y-%m-%d"},
    "expect_column_values_to_not_be_in_set": {"column": "number", "value_set": [3, 4]},
    "expect_column_values_to_not_be_null": {"column": "word", "mostly": 0.5},
    "expect_column_values_to_not_match_regex": {"column": "word", "regex": "^neg"},
    "expect_column_values_to_not_match_regex_list": {"column": "word", "regex_list": ["^neg", "^z"]},
    "expect_multicolumn_sum_to_equal": {"column_list": ["number", "other"], "sum_total": 6},
    "expect_select_column_values_to_be_unique_within_record": {"column_list": ["number", "other"]},
}


def suite(kwargs_by_type):
    return [Expectation(type=name, kwargs=kwargs) for name, kwargs in kwargs_by_type.items()]


def test_rows_judged_part_by_part_get_the_verdict_of_all_of_them_at_once(parts, monkeypatch):
    assert set(ASKED) == ROW_BY_ROW
    in_turn = run_suite(suite(ASKED), parts, "id")
    monkeypatch.setattr("nightshift.suite.ROW_BY_ROW", frozenset())
    at_once = run_suite(suite(ASKED), parts, "id")
    assert [check.model_dump() for check in in_turn] == [check.model_dump() for check in at_once]
    assert {check.success for check in at_once} == {True, False}
    assert any(check.unexpected and check.examples for check in at_once)


UNIQUE = [
    ("expect_column_values_to_be_unique", {"column": "id"}),
    ("expect_column_values_to_be_unique", {"column": "day"}),
    ("expect_column_values_to_be_unique", {"column": "word", "mostly": 0.9}),
    ("expect_column_values_to_be_unique", {"column": "value"}),  # one value in more rows than a part has
    ("expect_column_values_to_be_unique", {"column": "nowhere"}),
    ("expect_compound_columns_to_be_unique", {"column_list": ["number", "other"]}),
    ("expect_compound_columns_to_be_unique", {"column_list": ["word", "id"]}),
]


def test_rows_held_against_others_of_their_value_get_the_verdict_of_all_of_them_at_once(parts, monkeypatch):
    asked = [Expectation(type=name, kwargs=kwargs) for name, kwargs in UNIQUE]
    assert {each.type for each in asked} == BY_VALUE
    in_parts = run_suite(asked, parts, "id")
    monkeypatch.setattr("nightshift.suite.BY_VALUE", frozenset())
    at_once = run_suite(asked, parts, "id")
    assert [check.model_dump(exclude={"examples"}) for check in in_parts] == [check.model_dump(exclude={"examples"}) for check in at_once]
    assert [check.success for check in at_once] == [True, False, False, False, False, False, True]
    table = rows()
    day = dict(zip(table["id"].to_pylist(), table["day"].to_pylist(), strict=True))
    assert len({day[each] for each in in_parts[1].examples}) == 1, "rows that are named share what they should not"


@pytest.mark.parametrize("column", ["id", "day", "word", "value"])
def test_parts_by_value_are_short_and_show_what_is_not_alone(parts, column):
    frames = list(parts.by_value({column}, {"id"}))
    assert sum(len(frame) for frame in frames) == ROWS
    assert max(len(frame) for frame in frames) <= 2 * 20
    alone = {value for value, count in Counter(rows()[column].to_pylist()).items() if count == 1}
    for frame in frames:
        counted = Counter(None if value != value else value for value in frame[column])
        assert {value for value, count in counted.items() if count == 1} <= alone


def test_what_needs_all_rows_sees_all_of_them_and_what_judges_columns_sees_every_column(parts):
    names = ["id", "word", "number", "other", "value", "day", "json"]
    checks = run_suite(
        suite(
            {
                "expect_column_values_to_be_unique": {"column": "day"},
                "expect_column_mean_to_be_between": {"column": "number", "min_value": 2.9, "max_value": 3.1},
                "expect_table_row_count_to_equal": {"value": ROWS},
                "expect_column_to_exist": {"column": "value"},
                "expect_table_column_count_to_be_between": {"min_value": 7, "max_value": 7},
                "expect_table_column_count_to_equal": {"value": 7},
                "expect_table_columns_to_match_ordered_list": {"column_list": names},
                "expect_table_columns_to_match_set": {"column_set": [*names, "missing"], "exact_match": False},
            }
        ),
        parts,
        "id",
    )
    assert {check.expectation for check in checks} > COLUMNS_ONLY
    assert [check.success for check in checks] == [False, True, True, True, True, True, True, False]
    assert checks[0].unexpected == ROWS


def test_an_expectation_that_cannot_be_applied_is_red_and_says_why(parts):
    [unknown, nothing, wrong, unnamed, number] = run_suite(
        [
            Expectation(type="expect_column_values_to_be_in_set", kwargs={"column": "nowhere", "value_set": [1]}),
            Expectation(type="expect_column_mean_to_be_between", kwargs={"column": "nowhere", "min_value": 1}),
            Expectation(type="expect_column_values_to_be_between", kwargs={"column": "number", "mostly": "most"}),
            Expectation(type="expect_column_values_to_be_unique", kwargs={}),
            Expectation(type="expect_column_values_to_be_unique", kwargs={"column": 5}),
        ],
        parts,
        "id",
    )
    assert not unknown.success
    assert "nowhere" in (unknown.detail or "")
    assert not nothing.success
    assert "nowhere" in (nothing.detail or "")
    for each in (wrong, unnamed, number):
        assert not each.success
        assert each.detail


def test_an_empty_dataset_is_judged_too(tmp_path):
    pq.write_table(rows().slice(0, 0), tmp_path / "0.parquet")
    empty = Parts(open_objects(f"file://{tmp_path}"), ["0.parquet"], tmp_path)
    asked = {
        "expect_column_values_to_not_be_null": {"column": "word"},
        "expect_column_values_to_be_unique": {"column": "word"},
        "expect_table_row_count_to_be_between": {"min_value": 1},
    }
    assert [check.success for check in run_suite(suite(asked), empty, "id")] == [True, True, False]


def test_a_line_that_cannot_be_applied_takes_no_other_with_it(parts):
    broken = Expectation(type="expect_column_values_to_be_between", kwargs={"column": "number", "min_value": []})
    unknown = Expectation(type="expect_column_values_to_be_in_set", kwargs={"column": "nowhere", "value_set": [1]})
    good = Expectation(type="expect_column_values_to_not_be_null", kwargs={"column": "value"})
    checks = run_suite([good, broken, unknown, good], parts, "id")
    assert [(check.success, bool(check.detail)) for check in checks] == [(True, False), (False, True), (False, True), (True, False)]


@pytest.mark.parametrize(
    ("name", "kwargs", "condition"),
    [
        pytest.param(
            "expect_column_values_to_be_between", {"column": "number", "max_value": 3}, 'other == 6 - number and word == "neutral"'
        ),
        pytest.param("expect_column_values_to_be_unique", {"column": "number"}, "number == 3 and id in ('r80', 'r87')"),
        pytest.param("expect_column_mean_to_be_between", {"column": "number", "max_value": 3}, "number < 4"),
        pytest.param("expect_table_row_count_to_equal", {"value": 160}, "number >= 0"),
    ],
)
def test_an_expectation_under_a_condition_sees_the_columns_that_it_names(parts, name, kwargs, condition):
    [check] = run_suite([Expectation(type=name, kwargs={**kwargs, "row_condition": condition, "condition_parser": "pandas"})], parts, "id")
    at_once = Parts(parts._store, parts._keys, parts._folder)
    at_once.in_turn = lambda names: [at_once.whole(set(at_once.schema.names))]
    at_once.by_value = lambda names, others: [at_once.whole(set(at_once.schema.names))]
    [whole] = run_suite(
        [Expectation(type=name, kwargs={**kwargs, "row_condition": condition, "condition_parser": "pandas"})], at_once, "id"
    )
    assert "not defined" not in (check.detail or "")
    assert (check.success, check.unexpected) == (whole.success, whole.unexpected)


def test_integers_stay_integers_beside_a_null(tmp_path):
    numbers = [2**53 + i for i in range(9)] + [None]
    pq.write_table(pa.table({"id": [f"r{i}" for i in range(10)], "number": pa.array(numbers, pa.int64())}), tmp_path / "0.parquet")
    asked = {
        "expect_column_values_to_be_unique": {"column": "number"},
        "expect_column_values_to_match_regex": {"column": "number", "regex": r"^\d+$"},
    }
    for rows_at_once in (3, 100):
        checks = run_suite(suite(asked), Parts(open_objects(f"file://{tmp_path}"), ["0.parquet"], tmp_path, rows_at_once), "id")
        assert [(check.success, check.unexpected) for check in checks] == [(True, 0), (True, 0)]


def test_long_texts_are_told_apart_in_the_memory_that_sorting_has(tmp_path):
    words = [f"{i % 29_999:05d}" + "long " * 400 for i in range(30_000)]
    pq.write_table(pa.table({"id": [f"r{i}" for i in range(30_000)], "text": words}), tmp_path / "0.parquet")
    parts = Parts(open_objects(f"file://{tmp_path}"), ["0.parquet"], tmp_path)
    [check] = run_suite(suite({"expect_column_values_to_be_unique": {"column": "text"}}), parts, "id")
    assert (check.unexpected, set(check.examples)) == (2, {"r0", "r29999"})
    assert all(frame.memory_usage(deep=True).sum() < 64 << 20 for frame in parts.in_turn({"id", "text"}))

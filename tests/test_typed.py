"""Answers that are read at once are those that would be judged valid one by one, and their columns hold the same."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema_rs
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightshift.answer_writer import AnswerWriter
from nightshift.columns import UNFIT, answer_type
from nightshift.job import Job, JobFile
from nightshift.matching import Matching
from nightshift.providers.protocol import Garbage, Reply
from nightshift.shapes import Variant
from nightshift.steps.collect import write_valid
from nightshift.stores.shards import Left
from nightshift.typed import reader_of
from nightshift.validation import Answer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
NAMES = st.text("abc é", max_size=2)
BOUNDS = st.integers(-3, 3)
LEAVES = st.one_of(
    st.builds(lambda least, most: {"type": "string", "minLength": least, "maxLength": most}, st.integers(0, 2), st.integers(1, 4)),
    st.lists(st.sampled_from(["a", "b", "", None]), unique=True).map(lambda each: {"type": ["string", "null"], "enum": ["c", *each]}),
    st.builds(lambda kind, least: {"type": kind, "minimum": least}, st.sampled_from(["integer", "number"]), BOUNDS),
    st.builds(lambda least, most: {"type": "number", "exclusiveMinimum": least, "exclusiveMaximum": most}, BOUNDS, BOUNDS),
    st.sampled_from([{"type": "boolean"}, {"type": ["integer", "null"]}, {"anyOf": [{"type": "number"}, {"type": "null"}]}]),
)

PATTERNS = st.sampled_from([{"type": "string", "pattern": "^[a-c]*$"}, {"type": ["string", "null"], "pattern": "^.$"}])


def objects(fields: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of objects with such fields: some required, open or closed, perhaps null."""
    properties = st.dictionaries(NAMES, fields, min_size=1, max_size=3)
    return properties.flatmap(
        lambda found: st.fixed_dictionaries(
            {
                "type": st.sampled_from(["object", ["object", "null"]]),
                "properties": st.just(found),
                "required": st.lists(st.sampled_from(sorted(found)), unique=True),
                "additionalProperties": st.booleans(),
            }
        )
    )


def lists(items: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of lists of such items."""
    kinds = st.sampled_from(["array", ["array", "null"]])
    return st.builds(lambda kind, inner, most: {"type": kind, "items": inner, "maxItems": most}, kinds, items, st.integers(0, 3))


SCHEMAS = objects(st.recursive(LEAVES, lambda inner: objects(inner) | lists(inner), max_leaves=4) | PATTERNS)
NUMBERS = st.one_of(st.integers(-4, 4), st.sampled_from([1.0, -0.0, 2.5, 2**53 + 1, 2**63, 10**25, 1e300]))


def near(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema may accept, and some that it does not."""
    if "anyOf" in schema:
        return near(schema["anyOf"][0]) | st.none()
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    own: dict[str, st.SearchStrategy[Any]] = {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": NUMBERS,
        "number": NUMBERS,
        "string": st.sampled_from(schema.get("enum", ["a", "bb", "cccc", "\n", "d", "😀😀"])) | TEXTS,
    }
    if "items" in schema:
        own["array"] = st.lists(near(schema["items"]), max_size=4)
    if "properties" in schema:
        fields = {name: near(inner) for name, inner in schema["properties"].items()}
        own["object"] = (
            st.fixed_dictionaries(fields) | st.fixed_dictionaries(fields) | st.fixed_dictionaries({}, optional={**fields, "other": NUMBERS})
        )
    good, odd = st.one_of(*(own[kind] for kind in kinds)), st.sampled_from([None, True, 1, "a", [], {}])
    return st.integers(0, 9).flatmap(lambda which: odd if which == 9 else good)


def judged(schema: dict[str, Any], text: str) -> Any:
    """An answer as its column holds it, parsed and validated one by one; None where it is not valid or fits no column."""
    value = orjson.loads(text)
    try:
        valid = jsonschema_rs.validator_for(schema).is_valid(value)
        return pa.array([value], answer_type(schema)).to_pylist()[0] if valid else None
    except UNFIT:
        return None


def of_one(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with one field."""
    return {"type": "object", "properties": {"a": field}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("schemas", [SCHEMAS, *(each.map(of_one) for each in (LEAVES, PATTERNS, lists(LEAVES), objects(LEAVES)))])
@given(st.data())
def test_what_is_read_at_once_is_valid_and_stands_in_its_columns_as_it_would_one_by_one(schemas, data):
    schema = data.draw(schemas)
    read = reader_of(schema)
    assert read is not None
    texts = [json.dumps(value) for value in data.draw(st.lists(near(schema), max_size=20))]
    column, are_read = read(texts)
    assert (column.type, len(are_read)) == (answer_type(schema), len(texts))
    assert column.to_pylist() == [judged(schema, text) for text, is_read in zip(texts, are_read, strict=True) if is_read]


CLOSED = {"type": "object", "required": ["n", "s"], "additionalProperties": False}
SCHEMA = {**CLOSED, "properties": {"n": {"type": "number", "minimum": 0}, "s": {"type": "string", "pattern": "^[a-z]{2}$"}}}


@pytest.mark.parametrize(
    ("text", "is_read"),
    [
        pytest.param('{"n": 1, "s": "en"}', True, id="an integer where a number is asked for"),
        pytest.param(' {"s": "en",\n "n": 1.5}\n', True, id="other order, white space around"),
        pytest.param('{"n": 1, "s": "EN"}', False, id="breaks the pattern"),
        pytest.param('{"n": 1, "s": "en\\n"}', False, id="a newline at the end, which Python's $ would let pass"),
        pytest.param('{"n": -1, "s": "en"}', False, id="below the minimum"),
        pytest.param('{"n": 9007199254740993, "s": "en"}', False, id="an integer that no double holds"),
        pytest.param('{"n": 1, "s": "en", "t": 1}', False, id="a field too many"),
        pytest.param('{"n": 1}', False, id="a field too few"),
        pytest.param('{"n": NaN, "s": "en"}', False, id="no JSON"),
        pytest.param('```json\n{"n": 1, "s": "en"}\n```', False, id="fenced"),
        pytest.param("", False, id="empty"),
        pytest.param(None, False, id="no text"),
    ],
)
def test_what_is_not_surely_valid_is_left_to_a_closer_look(text, is_read):
    read = reader_of(SCHEMA)
    assert read is not None
    good = '{"n": 0, "s": "de"}'
    column, are_read = read([good, text, good])
    assert list(are_read) == [True, is_read, True]
    assert len(column) == 2 + is_read


def test_one_integer_of_twenty_digits_leaves_all_to_a_closer_look():
    read = reader_of({**CLOSED, "required": ["n"], "properties": {"n": {"type": "integer"}}})
    assert read is not None
    column, are_read = read(['{"n": 1}', '{"n": 12345678901234567890}'])
    assert (len(column), list(are_read)) == (0, [False, False])


@pytest.mark.parametrize(
    "properties",
    [
        pytest.param({"n": {"type": ["integer", "string"]}}, id="a union"),
        pytest.param({"n": {"type": "object"}}, id="an object of any fields"),
        pytest.param({"n": {"type": "integer", "multipleOf": 5}}, id="a word that no type says"),
        pytest.param({"n": {"type": "integer", "minimum": 0.5}}, id="a bound that is no integer"),
        pytest.param({"n": {"type": "number", "maximum": 1e300}}, id="a bound beyond what a double holds exactly"),
        pytest.param({"n": {"type": "string", "enum": ["a"], "minLength": 1}}, id="an enum with a length"),
        pytest.param({"n": {"type": "array", "items": {"type": "string", "pattern": "a"}}}, id="a pattern within a list"),
        pytest.param({"n": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}}, id="unique items"),
        pytest.param({'a"b': {"type": "string"}}, id="a name with a quote"),
        pytest.param({"n": {"anyOf": [{"type": "string"}, {"type": "integer"}]}}, id="one of two types"),
    ],
)
def test_a_schema_that_no_type_says_is_read_one_by_one(properties):
    assert reader_of({"type": "object", "properties": properties}) is None


def test_what_stands_in_fields_that_the_schema_does_not_name_is_not_read_over():
    read = reader_of({"type": "object", "properties": {"n": {"type": "integer"}}})
    assert read is not None
    assert list(read(['{"n": 1}', '{"n": 1, "other": 2}', '{"n": 1, "other": 1e400}'])[1]) == [True, False, False]


@pytest.mark.parametrize("least", [7, 7.0], ids=["an integer", "an integer written as a number"])
def test_a_bound_of_integers_may_be_written_as_a_number(least):
    read = reader_of({"type": "object", "properties": {"n": {"type": "integer", "minimum": least}}})
    assert read is not None
    assert list(read(['{"n": 7}', '{"n": 6}'])[1]) == [True, False]


def test_a_pattern_is_read_in_the_dialect_of_the_whole_schema():
    read = reader_of({"type": "object", "properties": {"s": {"type": "string", "pattern": "^x", "$schema": "http://nowhere/x"}}})
    assert read is not None
    assert list(read(['{"s": "x"}', '{"s": "y"}'])[1]) == [True, False]


KEYS = [bytes([place]) * 32 for place in range(8)]


def answered(place: int, text: str | None, outcome: str = "succeeded") -> Reply:
    """The reply to one of the requests."""
    return Reply(custom_id=KEYS[place].hex(), outcome=outcome, text=text, paid=True, model="m", input_tokens=place, output_tokens=1)


ORIGIN = {
    "shard": "s",
    "attempt": 1,
    "batch_id": "b",
    "answered_at": datetime(2026, 11, 22, tzinfo=UTC),
    "tier": "batch",
    "stand_in": None,
}


def job_under(schema: dict[str, Any] | None) -> Job:
    spec = {
        "name": "j",
        "input": {"uri": "s3://b/k.jsonl", "id": "id"},
        "request": {"provider": "openai", "model": "gpt-5.4-nano", "prompt": "-"},
    }
    return Job(spec=JobFile.model_validate(spec), prompt_source="user:\n-\n", answer_schema=schema, expectations=())


def taken(job: Job, replies: list[Reply | Garbage], left: dict[bytes, Left | None]) -> tuple[list[Any], dict[bytes, Answer], Matching]:
    """The lines of the good answers, by request; the others; and what was odd."""
    matching = Matching(left)
    with TemporaryDirectory() as folder:
        writer = AnswerWriter(job, ORIGIN, Path(folder))
        others = write_valid(writer, job, matching, replies, left)
        writer.write(Path(folder) / "answers.parquet")
        lines = pq.read_table(Path(folder) / "answers.parquet").to_pylist()
    return sorted(lines, key=lambda line: line["request_key"]), others, matching


@pytest.mark.parametrize("schema", [SCHEMA, None], ids=["a schema", "plain text"])
def test_an_answer_stands_in_its_file_as_it_would_if_it_were_taken_by_itself(schema):
    job = job_under(schema)
    good = '{"n": 1, "s": "en"}'
    texts = [good, '{"n": 2.5, "s": "de"}', '{"n": 3, "s": "EN"}', "{", '{"n": 9007199254740992, "s": "fr"}']
    replies = [*(answered(place, text) for place, text in enumerate(texts)), answered(5, None, "refused"), Garbage(reason="cut")]
    replies += [answered(0, good), answered(5, good)]  # each for the second time
    again = dict.fromkeys(KEYS, Left(variant=Variant(), text=None, reason=None))  # which sends every answer the other way
    at_once, alone = taken(job, replies, dict.fromkeys(KEYS)), taken(job, replies, again)
    assert at_once[:2] == alone[:2]
    assert vars(at_once[2])["alarms"] == vars(alone[2])["alarms"] == {"unreadable lines": 1, "duplicate lines": 2}
    assert at_once[2].absent == alone[2].absent == set(KEYS[6:])
    assert [line["request_key"] for line in at_once[0]] == [KEYS[place] for place in ([0, 1, 4, 5] if schema else [0, 1, 2, 3, 4, 5])]
    assert at_once[0][-1]["input_tokens"] == 5 + 5, "both lines were paid for"


def test_F67_of_two_lines_for_a_request_the_valid_one_stays_and_both_are_paid_for(tmp_path):
    job = job_under(SCHEMA)
    good, broken = '{"n": 1, "s": "en"}', "{" + "x" * 999
    for texts in ((broken, good), (good, broken)):
        [line], others, _ = taken(job, [answered(5, text) for text in texts], dict.fromkeys(KEYS[5:6]))
        assert (line["outcome"], line["output"], line["input_tokens"], others) == ("succeeded", {"n": 1, "s": "en"}, 10, {})
    left = dict.fromkeys(KEYS[5:6])
    writer = AnswerWriter(job, ORIGIN, tmp_path)
    others = write_valid(writer, job, Matching(left, writer.hold), [answered(5, broken), answered(5, "{")], left)
    writer.add(KEYS[5], others[KEYS[5]])
    writer.write(tmp_path / "answers.parquet")
    [line] = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    assert (line["outcome"], line["text"], line["input_tokens"]) == ("invalid", broken, 10)

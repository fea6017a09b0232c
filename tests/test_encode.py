"""Encoding by columns says what rendering row by row says, to the byte."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightshift.contract import compile_contract, reason_for
from nightshift.encode import Encoder, Requests, escaped
from nightshift.formats import Rows
from nightshift.job import Job, JobFile, Requirement
from nightshift.prompts import NullInPrompt, Printed, PromptInvalid, Rendered, parse_prompt
from nightshift.providers.forms import FORMS, form_of
from nightshift.providers.protocol import Limits
from nightshift.spool import REQUEST_BYTES, Spool, slice_schema
from nightshift.stores.database import open_database

PLAIN = 'user:\nFrom {{ who }}: {{ text }} 100%\n"{{ text }}"\n'
SYSTEM_TOO = "system:\nYou are {{ who }}.\nuser:\n{{ text }}\n"
LOGIC = "user:\n{% if who %}{{ who | upper }}{% endif %}{% for word in text.split() %}{{ loop.index }}{{ word }}{% endfor %}\n"
PIECES = 'user:\n{{ who }}{{ [1, 2] | sum }}{{ who | string | trim }}{% if text %}\n"{{ text }}"{% else %}-{% endif %}{{ text }}\t{{ who ~ text }}\n'
ASSIGNS = "user:\n{% set shown = text if text else '-' %}{{ shown }}{{ who }}\n"
PROMPTS = {"plain": PLAIN, "a system part that varies": SYSTEM_TOO, "logic": LOGIC, "many pieces": PIECES, "logic with names": ASSIGNS}
MODELS = {"converse": "amazon.nova-lite-v1:0", "invoke": "anthropic.claude-haiku-4-5-20251001-v1:0"}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
KINDS = [TEXTS, st.integers(-9, 9), st.integers(), st.sampled_from([0.0, -0.0, 1.0, 0.1]), st.floats(), st.booleans()]
WHO = st.sampled_from([*KINDS, st.one_of(KINDS)])  # columns of one type, and of several
ROWS = WHO.flatmap(lambda who: st.lists(st.fixed_dictionaries({"text": TEXTS, "who": who}), max_size=6))


def job(prompt: str, endpoint: str = "/v1/chat/completions", **require: Any) -> Job:
    provider = "bedrock" if endpoint in MODELS else "openai"
    request = {"provider": provider, "model": MODELS.get(endpoint, "gpt-5.4-nano"), "prompt": "-", "endpoint": endpoint}
    given = {"name": "j", "input": {"uri": "s3://b/k.jsonl", "id": "text", "require": require}, "request": request}
    return Job(spec=JobFile.model_validate(given), prompt_source=prompt, answer_schema=None, expectations=())


def as_rows(rows: list[dict[str, Any]]) -> Rows:
    return Rows(count=len(rows), columns={name: [row[name] for row in rows] for name in ("text", "who")})


def encoded(encoder: Encoder, rows: list[dict[str, Any]]) -> Requests:
    return encoder.encode(as_rows(rows), {})


def keys(encoder: Encoder, rows: list[dict[str, Any]]) -> list[bytes]:
    return encoded(encoder, rows).keys.to_pylist()


def lines(encoder: Encoder, rows: list[dict[str, Any]]) -> list[bytes]:
    found = encoded(encoder, rows)
    return bytes(encoder.lines(found.keys, found.tails)).splitlines()


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@given(rows=ROWS)
def test_a_batch_says_what_the_template_says_of_each_row(prompt, rows):
    asking = job(prompt)
    bodies = [orjson.loads(line)["body"] for line in lines(Encoder(asking), rows)]
    parts = [part for part in (asking.prompt.system, asking.prompt.user) if part]
    said = [[part.template.render(row) for part in parts] for row in rows]
    assert [[turn["content"] for turn in body["messages"]] for body in bodies] == said


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@given(rows=ROWS)
def test_the_bytes_are_those_of_a_body_that_is_dumped_at_once_and_the_key_is_their_hash(prompt, rows):
    encoder = Encoder(job(prompt))
    found = encoded(encoder, rows)
    for line, key, tail, weight in zip(lines(encoder, rows), keys(encoder, rows), found.tails.to_pylist(), found.weights, strict=True):
        body = orjson.dumps(orjson.loads(line)["body"])
        assert line == encoder.form.line(key.hex(), body)
        assert len(line) + 1 == encoder.line_bytes + len(tail) == weight
        assert key == hashlib.sha256(b'["openai","/v1/chat/completions","gpt-5.4-nano"]\n' + body).digest()


@given(rows=ROWS)
def test_alone_and_in_a_batch_a_row_is_the_same_request(rows):
    encoder = Encoder(job(PLAIN))
    assert keys(encoder, rows) == [key for row in rows for key in keys(encoder, [row])]


@pytest.mark.parametrize("endpoint", FORMS)
def test_what_varies_stands_last_in_every_form(endpoint):
    row = {"text": "a view of the sea", "who": "Ann"}
    [line] = lines(Encoder(job(PLAIN, endpoint)), [row])
    assert line.index(b"a view of the sea") > line.index(b'"model"' if b'"model"' in line else b'"modelInput"')
    assert form_of(endpoint).opened(line)[0] == keys(Encoder(job(PLAIN, endpoint)), [row])[0].hex()


@pytest.mark.parametrize(
    ("prompt", "row", "why"),
    [
        (PLAIN, {"text": "x", "who": None}, "prints a null (who)"),
        (LOGIC, {"text": None, "who": "a"}, "cannot be rendered"),
        (PLAIN, {"text": "\ud800", "who": "a"}, "cannot be rendered"),
        (LOGIC, {"text": "\ud800", "who": "a"}, "cannot be rendered"),
        (PIECES, {"text": "b", "who": None}, "prints a null (who)"),
        (PIECES, {"text": None, "who": "a"}, "prints a null (text)"),
    ],
)
def test_a_row_that_cannot_be_asked_about_says_why_and_spoils_no_other(prompt, row, why):
    good = {"text": "fine", "who": "Bob"}
    found = encoded(Encoder(job(prompt)), [good, row, good])
    assert list(found.refused) == [1]
    assert why in found.refused[1]
    assert found.keys.to_pylist() == keys(Encoder(job(prompt)), [good]) * 2


def test_what_cannot_be_asked_whatever_it_holds_says_its_own_reason():
    found = Encoder(job(PIECES)).encode(as_rows([{"text": None, "who": None}, {"text": "a", "who": "b"}]), {0: "not valid JSON"})
    assert (found.refused, len(found.keys)) == ({0: "not valid JSON"}, 1)


def test_a_piece_is_rendered_once_for_rows_that_hold_the_same_in_what_it_reads():
    calls = []
    asking = job("user:\n{{ who | upper }} {{ text }}\n")
    [piece] = [piece for piece in asking.prompt.user.pieces if isinstance(piece, Rendered)]
    piece.template.environment.filters["upper"] = lambda value: calls.append(value) or value.upper()
    rows = [{"text": str(i), "who": "ab"[i % 2]} for i in range(10)]
    said = [orjson.loads(line)["body"]["messages"][0]["content"] for line in lines(Encoder(asking), rows)]
    assert said == [f"{row['who'].upper()} {row['text']}" for row in rows]
    assert sorted(calls) == ["a", "b"]


def test_a_row_that_is_refused_is_not_rendered():
    asking = job("user:\n{{ 'x' * n }}{{ text }}\n", n={"type": "integer", "maximum": 9})
    rows = Rows(count=3, columns={"n": [10**15, 2, 10**15], "text": ["a", "b", "c"]})
    found = Encoder(asking).encode(rows, {})
    assert found.refused == {0: "n is above 9", 2: "n is above 9"}
    assert found.tails.to_pylist()[0].startswith(b"xxb")


def test_a_row_says_all_nulls_that_its_prompt_prints():
    found = encoded(Encoder(job("user:\n{{ who }} {{ who }} {{ text | upper }}\n")), [{"text": None, "who": None}])
    assert found.refused == {0: "the prompt prints a null (who, text)"}


def test_neighbours_that_read_the_same_are_one_piece():
    source = (
        "{% if text %}a{% endif %} b {{ text | upper }} {% if who %}c{% endif %}{{ who | upper }} {{ text }} {{ 2 + 3 }} {{ text | lower }}"
    )
    pieces = parse_prompt(f"user:\n{source}").user.pieces
    assert [piece.columns if isinstance(piece, Rendered) else piece for piece in pieces] == [
        ("text",), " ", ("who",), " ", Printed("text"), " ", "5", " ", ("text",),
    ]  # fmt: skip
    assert "".join(
        piece if isinstance(piece, str) else "t" if isinstance(piece, Printed) else piece.template.render(text="t", who="w")
        for piece in pieces
    ) == parse_prompt(f"user:\n{source}").user.template.render(text="t", who="w")


@pytest.mark.parametrize("constant", ["{{ 3 | dictsort }}", "{{ '\\ud83d' }}", "{{ none }}", "{{ 1 / 0 }}", "{{ [1, 2] | random }}"])
def test_a_constant_that_cannot_be_said_is_told_with_its_line_when_the_prompt_is_read(constant):
    with pytest.raises(PromptInvalid, match=r"template error: .*(rendered \(.+\)|random)") as told:
        parse_prompt(f"system:\nHi\nuser:\n{{{{ text }}}}\n{constant}\n")
    assert told.value.line == 5


@pytest.mark.parametrize("prompt", [PLAIN, "user:\n{{ text }}" + "x" * 40_000 + "{{ who }}\n"], ids=["long rows", "a long prompt"])
def test_requests_are_made_a_few_megabytes_at_a_time(prompt, tmp_path, monkeypatch):
    made = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *given: made.append(encode(*given)) or made[-1])
    text = "t" * (40_000 if prompt == PLAIN else 1)
    array = pa.array([text] * 2048)
    rows = Rows(count=2048, columns={"text": [text] * 2048, "who": ["w"] * 2048}, arrays={"text": array, "who": array})
    with open_database(tmp_path) as database:
        spool = Spool(tmp_path, database, job(prompt), Encoder(job(prompt)), Limits(requests=9, request_bytes=1 << 30))
        spool.take([rows], slice_schema(job(prompt), {}))
    assert sum(len(each.keys) for each in made) == 2048
    assert all(each.tails.nbytes <= 3 * REQUEST_BYTES for each in made)


@given(st.lists(TEXTS))
def test_text_is_escaped_as_json_says_it(texts):
    assert [escaped(text.encode()) for text in texts] == [orjson.dumps(text)[1:-1] for text in texts]


def test_nothing_outlives_its_row_where_a_template_gives_names():
    said = [
        orjson.loads(line)["body"]["messages"][0]["content"]
        for line in lines(Encoder(job(ASSIGNS)), [{"text": "a", "who": 1}, {"text": "", "who": 2}])
    ]
    assert said == ["a1", "-2"]


SPACED = st.text(st.sampled_from("a ä\u3000\x1f\x85"), max_size=9)
VALUES = [st.text(max_size=5), SPACED, st.integers(-(2**65), 2**65), st.floats(), st.booleans(), st.sampled_from([2**53, 2**53 + 1])]
COLUMNS = st.sampled_from([*VALUES, st.one_of(VALUES)]).flatmap(lambda of: st.lists(st.none() | of, max_size=5))


@given(
    values=COLUMNS,
    requirement=st.sampled_from(
        [
            Requirement(type="string", min_length=1, max_length=3),
            Requirement(type="string", min_length=2, optional=True),
            Requirement(type="string", enum=["a", ""]),
            Requirement(type="integer", minimum=0, maximum=9),
            Requirement(type="number", minimum=0, optional=True),
            Requirement(type="number", maximum=float(2**53)),
            Requirement(type="integer", enum=[1, 2.0]),
            Requirement(type="boolean"),
        ]
    ),
)
def test_many_values_at_once_are_judged_like_each_alone(values, requirement):
    rejected, check = compile_contract({"column": requirement}), reason_for("column", requirement)
    alone = {i: why for i, value in enumerate(values) if (why := check(value)) is not None}
    assert rejected(Rows(count=len(values), columns={"column": values})) == alone


def test_a_row_that_fails_leaves_nothing_behind_for_those_after_it():
    prompt = "user:\n{% autoescape true %}{{ who | upper }}{% endautoescape %} {{ [text, '<'] | join('&') }}\n"
    good, bad = {"text": "1<2", "who": "a"}, {"text": "1<2", "who": None}
    found = encoded(Encoder(job(prompt)), [good, bad, good])
    assert found.keys.to_pylist() == keys(Encoder(job(prompt)), [good]) * 2


def test_a_null_is_no_word():
    with pytest.raises(NullInPrompt):
        job(PLAIN).prompt.user.template.render(text=None, who="a")


def test_a_spool_says_where_requests_stand_beyond_what_32_bits_can_count(tmp_path, monkeypatch):
    with open_database(tmp_path) as database:
        spool = Spool(tmp_path, database, job(PLAIN), Encoder(job(PLAIN)), Limits(requests=9, request_bytes=9_000))
        monkeypatch.setattr(spool, "_end", 5 << 30)
        spool.take([as_rows([{"text": "a", "who": "b"}, {"text": "c", "who": "d"}])], slice_schema(job(PLAIN), {}))
        spool.load()
        [(first, size), (second, _)] = database.execute("SELECT start, size FROM spool ORDER BY ordinal").fetchall()
        assert (first, second) == (5 << 30, (5 << 30) + size)

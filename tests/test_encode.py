"""Encoding by columns says what rendering row by row says, to the byte."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightshift.contract import compile_contract
from nightshift.encode import Encoder, Requests
from nightshift.job import Job, JobFile, Requirement
from nightshift.prompts import NullInPrompt
from nightshift.providers.forms import FORMS, form_of

PLAIN = 'user:\nFrom {{ who }}: {{ text }} 100%\n"{{ text }}"\n'
SYSTEM_TOO = "system:\nYou are {{ who }}.\nuser:\n{{ text }}\n"
LOGIC = "user:\n{% if who %}{{ who | upper }}{% endif %}{% for word in text.split() %}{{ loop.index }}{{ word }}{% endfor %}\n"
ASSIGNS = "user:\n{% set shown = text if text else '-' %}{{ shown }}{{ who }}\n"
PROMPTS = {"plain": PLAIN, "a system part that varies": SYSTEM_TOO, "logic": LOGIC, "logic with names": ASSIGNS}
MODELS = {"converse": "amazon.nova-lite-v1:0", "invoke": "anthropic.claude-haiku-4-5-20251001-v1:0"}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ROWS = st.lists(st.fixed_dictionaries({"text": TEXTS, "who": st.one_of(TEXTS, st.integers(), st.floats(), st.booleans())}), max_size=6)


def job(prompt: str, endpoint: str = "/v1/chat/completions", **require: Any) -> Job:
    provider = "bedrock" if endpoint in MODELS else "openai"
    request = {"provider": provider, "model": MODELS.get(endpoint, "gpt-5.4-nano"), "prompt": "-", "endpoint": endpoint}
    given = {"name": "j", "input": {"uri": "s3://b/k.jsonl", "id": "text", "require": require}, "request": request}
    return Job(spec=JobFile.model_validate(given), prompt_source=prompt, answer_schema=None, expectations=())


def encoded(encoder: Encoder, rows: list[dict[str, Any]]) -> Requests:
    return encoder.encode({name: [row[name] for row in rows] for name in ("text", "who")}, [None] * len(rows))


def lines(encoder: Encoder, rows: list[dict[str, Any]]) -> list[bytes]:
    found = encoded(encoder, rows)
    return encoder.lines(found.keys, found.tails).splitlines() if found.keys else []


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
    for line, key in zip(lines(encoder, rows), encoded(encoder, rows).keys, strict=True):
        body = orjson.dumps(orjson.loads(line)["body"])
        assert line == encoder.form.line(key.hex(), body)
        assert len(line) + 1 == encoder.line_bytes + len(encoded(encoder, rows).tails[encoded(encoder, rows).keys.index(key)])
        assert key == hashlib.sha256(b'["openai","/v1/chat/completions","gpt-5.4-nano"]\n' + body).digest()


@given(rows=ROWS)
def test_alone_and_in_a_batch_a_row_is_the_same_request(rows):
    encoder = Encoder(job(PLAIN))
    assert list(encoded(encoder, rows).keys) == [key for row in rows for key in encoded(encoder, [row]).keys]


@pytest.mark.parametrize("endpoint", FORMS)
def test_what_varies_stands_last_in_every_form(endpoint):
    row = {"text": "a view of the sea", "who": "Ann"}
    [line] = lines(Encoder(job(PLAIN, endpoint)), [row])
    assert line.index(b"a view of the sea") > line.index(b'"model"' if b'"model"' in line else b'"modelInput"')
    assert form_of(endpoint).opened(line)[0] == encoded(Encoder(job(PLAIN, endpoint)), [row]).keys[0].hex()


@pytest.mark.parametrize(
    ("prompt", "row", "why"),
    [
        (PLAIN, {"text": "x", "who": None}, "prints a null (who)"),
        (LOGIC, {"text": None, "who": "a"}, "cannot be rendered"),
        (PLAIN, {"text": "\ud800", "who": "a"}, "cannot be rendered"),
    ],
)
def test_a_row_that_cannot_be_asked_about_says_why_and_spoils_no_other(prompt, row, why):
    good = {"text": "fine", "who": "Bob"}
    found = encoded(Encoder(job(prompt)), [good, row, good])
    assert [reason is None for reason in found.reasons] == [True, False, True]
    assert why in found.reasons[1]
    assert list(found.keys) == list(encoded(Encoder(job(prompt)), [good]).keys) * 2


def test_nothing_outlives_its_row_where_a_template_gives_names():
    said = [
        orjson.loads(line)["body"]["messages"][0]["content"]
        for line in lines(Encoder(job(ASSIGNS)), [{"text": "a", "who": 1}, {"text": "", "who": 2}])
    ]
    assert said == ["a1", "-2"]


VALUES = st.one_of(st.none(), st.text(max_size=5), st.integers(), st.floats(), st.booleans(), st.just(2**63))


@given(
    values=st.lists(VALUES, max_size=5),
    requirement=st.sampled_from(
        [
            Requirement(type="string", min_length=1, max_length=3),
            Requirement(type="string", enum=["a", ""]),
            Requirement(type="integer", minimum=0, maximum=9),
            Requirement(type="number", minimum=0, optional=True),
            Requirement(type="boolean"),
        ]
    ),
)
def test_many_values_at_once_are_judged_like_each_alone(values, requirement):
    check = compile_contract({"column": requirement})["column"]
    alone = [why for value in values for why in (check([value]) or [None])]
    assert list(check(values) or [None] * len(values)) == alone


def test_a_row_that_fails_leaves_nothing_behind_for_those_after_it():
    prompt = "user:\n{% autoescape true %}{{ who | upper }}{% endautoescape %} {{ [text, '<'] | join('&') }}\n"
    good, bad = {"text": "1<2", "who": "a"}, {"text": "1<2", "who": None}
    found = encoded(Encoder(job(prompt)), [good, bad, good])
    assert (found.keys[0], len(found.keys)) == (found.keys[1], 2)


def test_a_null_is_no_word():
    with pytest.raises(NullInPrompt):
        job(PLAIN).prompt.user.template.render(text=None, who="a")

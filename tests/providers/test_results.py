"""Result files read many lines at once say what their lines say one by one."""

from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightshift.arrow import collector_paused
from nightshift.providers.forms import FORMS, form_of
from nightshift.providers.openai_forms import ChatForm
from nightshift.providers.protocol import Garbage, Reply
from nightshift.providers.results import READ_BYTES, read_file

GOOD = b'{"custom_id": "%d", "recordId": "%d", "error": {"errorCode": 400, "code": "batch_expired", "errorMessage": "no"}}'
ODD = [
    b"not json", b'{"custom_id": "c", "recordId": "c", "response": 7, "modelOutput": 7}', b'{"custom_id": 7, "recordId": 7}',
    b"\xff", b'{"custom_id": "\xff", "recordId": "\xff"}', b'{"custom_id": "c", "recordId": "c", "x": ' + b"[" * 5000,
]  # fmt: skip
LINES = st.lists(st.integers(0, 99).map(lambda i: GOOD % (i, i)) | st.sampled_from([*ODD, b"", b"  "]), max_size=20)


@pytest.mark.parametrize("endpoint", FORMS)
@given(lines=LINES, end=st.sampled_from([b"", b"\n"]), at_once=st.integers(1, 500))
def test_many_lines_at_once_tell_what_each_tells_alone(endpoint, lines, end, at_once):
    form = form_of(endpoint)
    assert list(read_file(form, io.BytesIO(b"\n".join(lines) + end), at_once)) == [told for line in lines for told in form.read(line)]
    assert all(len(form.read(line)) == (1 if line.strip() else 0) for line in lines)


def test_lines_are_read_many_at_once():
    class Counted(ChatForm):
        calls = 0

        def _told(self, line):
            Counted.calls += 1
            return super()._told(line)

    form = Counted()
    form._decoder = Once(form._decoder)
    assert len(list(read_file(form, io.BytesIO(b"\n".join(GOOD % (i, i) for i in range(100)))))) == Counted.calls == 100


class Once:
    """A decoder that reads no line by itself."""

    def __init__(self, decoder):
        self.decode_lines = decoder.decode_lines


@pytest.mark.parametrize("tokens", [2**63, -1])
@pytest.mark.parametrize(
    ("endpoint", "answer", "outcome"),
    [
        (
            "/v1/chat/completions",
            '{"custom_id": "c", "response": {"status_code": 200, "body": {"usage": {"prompt_tokens": %d}}}}',
            "invalid",
        ),
        ("/v1/responses", '{"custom_id": "c", "response": {"status_code": 200, "body": {"usage": {"input_tokens": %d}}}}', "invalid"),
        ("/v1/embeddings", '{"custom_id": "c", "response": {"status_code": 200, "body": {"data": [{"index": %d}]}}}', "errored"),
        ("converse", '{"recordId": "c", "modelOutput": {"usage": {"inputTokens": %d}}}', "invalid"),
    ],
)
def test_counts_that_no_column_holds_are_the_fault_of_their_request(endpoint, answer, outcome, tokens):
    [reply] = form_of(endpoint).read((answer % tokens).encode())
    assert (reply.custom_id, reply.outcome, reply.paid, reply.input_tokens) == ("c", outcome, True, None)


def test_two_records_in_one_line_are_garbage():
    assert [type(told) for told in form_of("converse").read(GOOD % (1, 1) + GOOD % (2, 2) + b"\n" + GOOD % (3, 3))] == [Garbage, Reply]


def test_a_line_that_is_longer_than_what_is_read_at_once_is_one_line():
    long = b'{"custom_id": "a", "response": {"body": {"model": "%b"}}}' % (b"m" * (3 * READ_BYTES))
    first, second, third = read_file(form_of("/v1/chat/completions"), io.BytesIO(b"\n".join([GOOD % (1, 1), long, b"x"])))
    assert (first.custom_id, second.custom_id, type(second), type(third)) == ("1", "a", Reply, Garbage)


def test_lines_outside_the_contract_are_let_go_of_while_the_collector_rests():
    line = bytes(b'{"custom_id": "c", "response": {"status_code": 200, "body": {"choices": 7}}}%b' % (b" " * 99))
    held = sys.getrefcount(line)
    with collector_paused():
        [reply] = form_of("/v1/chat/completions").read(line)
        assert (reply.outcome, sys.getrefcount(line)) == ("errored", held)

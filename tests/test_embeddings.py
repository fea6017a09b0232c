"""Jobs whose answers are vectors: several inputs a line at OpenAI, one a record at Bedrock, one fixed-size column in Parquet."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec import structs

from nightshift.job import Job
from nightshift.matching import unfold
from nightshift.providers.openai_forms import OpenAIForm
from nightshift.providers.protocol import Reply
from nightshift.rehearsal import model, openai_desk
from nightshift.rehearsal.engine import error_body
from nightshift.shapes import Variant
from nightshift.stores.shards import Left, shared_lines
from nightshift.validation import validator_for
from nightshift.vectors import LINE, with_vectors
from tests.conftest import World, go, make_world, reviews

SMALL = {"model": "text-embedding-3-small", "endpoint": "/v1/embeddings", "parameters": {"dimensions": 64}}
TITAN = {"model": "amazon.titan-embed-text-v2:0", "endpoint": "invoke", "parameters": {"dimensions": 256}}
PLAIN = {"prompt": "user:\n{{ text }}\n"}


def embedding_job(world: World, request: dict, **changes) -> Job:
    return world.job(request=request, output={"schema": None}, **{**PLAIN, **changes})


def published(world: World) -> pa.Table:
    parts = sorted(found.key for found in world.site.store.scan("results") if found.key.endswith(".parquet"))
    return pa.concat_tables(pq.read_table(world.site.store.open(part)) for part in parts)


@pytest.fixture
def cloud(tmp_path, rehearsal, bucket) -> World:
    rehearsal.faults(minimum_records=1)
    return make_world(tmp_path, rehearsal, store_uri=f"{bucket}/store")


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({"provider": "openai", **SMALL}, id="openai"),
        pytest.param({"provider": "live", **SMALL}, id="live"),
        pytest.param({"provider": "bedrock", **TITAN}, id="bedrock"),
        pytest.param({"provider": "live", **TITAN}, id="bedrock on demand"),
    ],
)
def test_every_row_gets_the_vector_of_its_own_text_in_a_fixed_size_column(cloud, request_):
    size = request_["parameters"]["dimensions"]
    rows = [*reviews(100), {"id": "again", "text": reviews(1)[0]["text"]}, {"id": "none", "text": None}]
    summary = go(cloud, embedding_job(cloud, request_), cloud.write("a.jsonl", rows))
    bill = cloud.rehearsal.bill()
    assert (summary.outcomes["succeeded"], summary.outcomes["rejected"], summary.paid) == (101, 1, 100)
    lines = 100 if request_["endpoint"] == "invoke" else 4
    assert bill["requests"] == lines, "so many inputs share a line as the provider takes"
    assert summary.cost_usd.actual == pytest.approx(bill["usd"], abs=2e-6)
    table = published(cloud)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), size)
    found = dict(zip(table.column("id").to_pylist(), table.column("embedding").to_pylist(), strict=True))
    for row in (reviews(100)[0], reviews(100)[31], reviews(100)[32], reviews(100)[99]):
        assert found[row["id"]] == pytest.approx(model.embed(row["text"], size), abs=1e-6)
    assert found["again"] == found["r0"]


def test_a_line_that_is_refused_is_asked_again_each_input_alone(world, monkeypatch):
    """One input that the model cannot read does not take its neighbours with it."""
    answer = openai_desk.answer

    def picky(endpoint, body, hit=lambda name: False):
        if any("number 7 " in text for text in ([body["input"]] if isinstance(body["input"], str) else body["input"])):
            return 400, error_body("This model's maximum context length is exceeded.", "context_length_exceeded"), 0, 0
        return answer(endpoint, body, hit)

    monkeypatch.setattr(openai_desk, "answer", picky)
    summary = go(world, embedding_job(world, {"provider": "openai", **SMALL}), world.write("a.jsonl", reviews(40)))
    assert (summary.outcomes["succeeded"], summary.outcomes["errored"]) == (39, 1)
    assert summary.cost_usd.actual == pytest.approx(world.rehearsal.bill()["usd"], abs=2e-6)


def test_F32_a_bad_line_that_several_inputs_share_condemns_none_of_the_others(world, monkeypatch):
    """A batch that fails validation names its bad lines: lines are counted, not the requests in them."""
    line = OpenAIForm.line

    def spoiled(self, key, body):
        return line(self, key, body).replace(b'"POST"', b'"PUT"') if b"number 70 " in body else line(self, key, body)

    monkeypatch.setattr(OpenAIForm, "line", spoiled)
    summary = go(world, embedding_job(world, {"provider": "openai", **SMALL}), world.write("a.jsonl", reviews(96)))
    assert (summary.outcomes["succeeded"], summary.outcomes["errored"]) == (95, 1)


def test_vectors_are_found_wherever_their_lines_are(tmp_path, monkeypatch):
    """Over several files and row groups, in any order, with fewer groups in memory than there are."""
    monkeypatch.setattr("nightshift.vectors.GROUPS_KEPT", 2)
    kind = pa.struct([("embedding", pa.list_(pa.float32(), 3))])
    for number in range(3):
        rows = [{"embedding": [number, i, 0.5]} if i % 7 else None for i in range(50)]
        pq.write_table(pa.table({"output": pa.array(rows, kind)}), tmp_path / f"{number}.parquet", row_group_size=8)
    wanted = [(number, i) for i in (49, 1, 20, 8, 9, 33) for number in (2, 0, 1)]
    line = pa.array([{"file": str(tmp_path / f"{number}.parquet"), "row": i} for number, i in wanted])
    batch = pa.record_batch({"id": pa.array(range(len(wanted))), LINE: line})
    [found] = with_vectors(pa.RecordBatchReader.from_batches(batch.schema, [batch]), 3)
    assert found.column("embedding").to_pylist() == [[number, i, 0.5] if i % 7 else [0, 0, 0] for number, i in wanted]


def test_F81_a_vector_of_another_length_is_invalid(world):
    job = embedding_job(world, {"provider": "openai", **SMALL}, policy={"publish_at_least": 0, "retry": {"invalid": 0}})
    job = job.model_copy(update={"spec": job.spec.model_copy(update={"output": job.spec.output.model_copy(update={"dimensions": 65})})})
    summary = go(world, job, world.write("a.jsonl", reviews(5)))
    assert (summary.outcomes["invalid"], summary.reasons["invalid"]) == (5, {"64 numbers in place of 65": 5})


def test_lines_are_shared_in_order_and_who_is_to_be_alone_is():
    alone = Left(variant=Variant(alone=True), text=None, reason=None)
    asked = {b"a": None, b"b": None, b"c": alone, b"d": None, b"e": None, b"f": None}
    assert list(shared_lines(asked, 2)) == [[b"a", b"b"], [b"c"], [b"d", b"e"], [b"f"]]
    assert [list(group) for group in shared_lines(asked, 1)] == [[key] for key in asked]


def test_tokens_of_a_line_are_divided_and_none_is_lost():
    keys = [bytes([number]) * 32 for number in range(3)]
    line = Reply(custom_id=keys[0].hex(), outcome="succeeded", input_tokens=11, output_tokens=0, vectors=(b"1", b"2"))
    replies = list(unfold([line, structs.replace(line, custom_id="ff" * 32)], [keys]))
    assert [reply.custom_id for reply in replies] == [*(key.hex() for key in keys), "ff" * 32]
    assert sum(reply.input_tokens for reply in replies[:3]) == 11
    assert [reply.vectors for reply in replies[:3]] == [(b"1",), (b"2",), ()]


def test_F81_a_vector_that_is_no_whole_number_of_numbers_is_invalid(world):
    validate = validator_for(embedding_job(world, {"provider": "openai", **SMALL}))
    answer = validate(Reply(custom_id="", outcome="succeeded", vectors=(b"\x00" * 254,)))
    assert (answer.reply.outcome, answer.reply.reason, answer.output) == ("invalid", "63.5 numbers in place of 64", None)

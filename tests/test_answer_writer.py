"""The files that answers are kept in."""

from __future__ import annotations

import pyarrow.parquet as pq

from nightshift.answer_writer import AnswerWriter
from nightshift.providers.protocol import Reply
from nightshift.texts import Texts, Waiting
from nightshift.typed import read_texts
from nightshift.validation import Answer
from tests.test_encode import PLAIN, job

TOPIC = {"type": "object", "properties": {"name": {"type": "string"}}}
SCHEMA = {"type": "object", "properties": {"mood": {"type": "string"}, "topics": {"type": "array", "items": TOPIC}}}
ORIGIN = {"shard": "s", "attempt": 1, "batch_id": "b", "answered_at": None, "tier": "batch", "stand_in": None}


def test_values_that_repeat_are_written_once_and_keys_and_raw_answers_as_they_are(tmp_path):
    writer = AnswerWriter(job(PLAIN).model_copy(update={"answer_schema": SCHEMA}), ORIGIN, tmp_path)
    output = {"mood": "good", "topics": [{"name": "food"}]}
    for number in range(3):
        reply = Reply(custom_id="", outcome="succeeded", text="raw", model="m")
        writer.add(bytes([number]) * 32, Answer(reply=reply, output=output if number else None))
    writer.write(tmp_path / "answers.parquet")
    group = pq.ParquetFile(tmp_path / "answers.parquet").metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    encoded = {column.path_in_schema for column in columns if "RLE_DICTIONARY" in column.encodings}
    assert {"output.mood", "output.topics.list.element.name", "outcome", "model", "shard"} <= encoded
    assert not {"request_key", "text"} & encoded
    assert all(column.statistics is None for column in columns)
    assert pq.read_table(tmp_path / "answers.parquet").column("output").to_pylist() == [None, output, output]


def test_what_memory_does_not_hold_waits_on_disk_and_is_a_row_group_of_its_own(tmp_path, monkeypatch):
    asked = job(PLAIN)
    twice = {bytes([9]) * 32: [Reply(custom_id="", outcome="succeeded", input_tokens=100)], bytes([1]) * 32: []}
    lines, groups = [], []
    for held in (1 << 30, 1):
        monkeypatch.setattr("nightshift.answer_writer.HELD_BYTES", held)
        folder = tmp_path / str(held)
        folder.mkdir()
        writer = AnswerWriter(asked, ORIGIN, folder)
        for start in range(0, 30, 10):
            found = [
                (bytes([i]) * 32, Reply(custom_id="", outcome="succeeded", paid=True, input_tokens=i)) for i in range(start, start + 10)
            ]
            writer.add_all(found, read_texts(["said"] * 10)[0])
        writer.add(bytes([31]) * 32, Answer(reply=Reply(custom_id="", outcome="refused", text="no", paid=True, input_tokens=1)))
        writer.count_twice(twice)
        assert writer.usage(None).input_tokens == sum(range(30)) + 100 + 1
        writer.write(folder / "answers.parquet")
        lines.append(pq.read_table(folder / "answers.parquet").to_pylist())
        groups.append(pq.ParquetFile(folder / "answers.parquet").num_row_groups)
    assert (lines[0], groups) == (lines[1], [1, 4])


def test_long_texts_wait_on_disk_and_come_back_as_they_were(tmp_path):
    texts = Texts(tmp_path)
    given = [None, "", "short", "long " * 99, "ä\ud800 " * 300, "long " * 99]
    held = [texts.put(text) for text in given]
    assert held[:3] == given[:3]
    assert all(isinstance(text, Waiting) and len(text) < 20 for text in held[3:])
    assert [texts.put(text) for text in held] == held
    assert [texts.get(text) for text in reversed(held)] == given[::-1]
    texts.close()


def test_lines_are_put_down_sooner_where_their_texts_are_long(tmp_path, monkeypatch):
    monkeypatch.setattr("nightshift.answer_writer.WRITE_CHARACTERS", 1000)
    writer = AnswerWriter(job(PLAIN), ORIGIN, tmp_path)
    for number in range(10):
        writer.add(bytes([number]) * 32, Answer(reply=Reply(custom_id="", outcome="invalid", text="x" * 300)))
    assert [batch.num_rows for batch in writer._batches] == [4, 4]

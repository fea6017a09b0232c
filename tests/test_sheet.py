"""The files that answers are kept in."""

from __future__ import annotations

import pyarrow.parquet as pq

from nightshift.judge import Answer
from nightshift.providers.protocol import Reply
from nightshift.sheet import Sheet
from tests.test_encode import PLAIN, job

TOPIC = {"type": "object", "properties": {"name": {"type": "string"}}}
SCHEMA = {"type": "object", "properties": {"mood": {"type": "string"}, "topics": {"type": "array", "items": TOPIC}}}
ORIGIN = {"shard": "s", "attempt": 1, "batch_id": "b", "answered_at": None, "tier": "batch", "stand_in": None}


def test_values_that_repeat_are_written_once_and_keys_and_raw_answers_as_they_are(tmp_path):
    sheet = Sheet(job(PLAIN).model_copy(update={"answer_schema": SCHEMA}), ORIGIN)
    output = {"mood": "good", "topics": [{"name": "food"}]}
    for number in range(3):
        reply = Reply(custom_id="", outcome="succeeded", text="raw", model="m")
        sheet.add(bytes([number]) * 32, Answer(reply=reply, output=output if number else None))
    sheet.write(tmp_path / "answers.parquet")
    group = pq.ParquetFile(tmp_path / "answers.parquet").metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    encoded = {column.path_in_schema for column in columns if "RLE_DICTIONARY" in column.encodings}
    assert {"output.mood", "output.topics.list.element.name", "outcome", "model", "shard"} <= encoded
    assert not {"request_key", "text"} & encoded
    assert pq.read_table(tmp_path / "answers.parquet").column("output").to_pylist() == [None, output, output]

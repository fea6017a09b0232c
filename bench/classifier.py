"""The code of a project of AWS over the same rows: `python -m bench.classifier NAME FOLDER OUT`.

`aws-samples/sample-genai-bedrock-batch-classifier` has no package; `python -m bench.classifier fetch` takes the two files that prepare
requests and read results from its repository, as they stood at COMMIT. They run unchanged. What they call of AWS is a file here: neither
the network nor an SDK is measured. They do less than the steps they are held against: no keys, no duplicates, no schema, no join, no
accounts.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from bench.question import FILE_REQUESTS, job_parts
from nightshift.process import end_process

FOLDER = Path(".nightshift/bench/peers/classifier")
COMMIT = "63032654cf1c1ae0781cd42cb4ba98282fcbc222"
SOURCE = f"https://raw.githubusercontent.com/aws-samples/sample-genai-bedrock-batch-classifier/{COMMIT}/app/lambda"
FILES = ("dataPreparation/dataProcessor.py", "batchResultsProcessing/dataProcessor.py")


def is_there() -> bool:
    """Whether the peer's files have been fetched."""
    return all((FOLDER / name).exists() for name in FILES)


def fetch() -> None:
    """Take the peer's files from where it is published."""
    for name in FILES:
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(f"{SOURCE}/{name}", timeout=60) as answer:
            path.write_bytes(answer.read())


def prepare(folder: Path) -> None:
    """The rows and the results in the forms that the peer reads: a list in JSON, and Bedrock's own lines. Not measured."""
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "reviews.parquet", columns=["review_id", "text"]).to_pylist()
    (folder / "peer-rows.json").write_bytes(orjson.dumps([{"id": row["review_id"], "text": row["text"]} for row in rows]))
    system = job_parts()[0]
    for number, first in enumerate(range(0, len(rows), FILE_REQUESTS)):
        with (folder / f"peer-{number:05d}.jsonl.out").open("wb") as file:
            for row in rows[first : first + FILE_REQUESTS]:
                file.write(orjson.dumps(_answered(system, row["review_id"], row["text"])) + b"\n")


def _answered(system: str, record: str, text: str) -> dict[str, Any]:
    said = "<class>positive</class> <rationale>The guest praises the room, the staff and the breakfast.</rationale>"
    asked = {"role": "user", "content": [{"type": "text", "text": text}]}
    return {
        "recordId": record,
        "modelInput": {"anthropic_version": "bedrock-2023-05-31", "max_tokens": 2048, "messages": [asked], "system": system},
        "modelOutput": {
            "role": "assistant",
            "content": [{"type": "text", "text": said}],
            "usage": {"input_tokens": 600, "output_tokens": 80},
        },
    }


class _Config(dict[str, Any]):
    """The peer's configuration, which it reads from the environment of a Lambda."""

    def get_int(self, name: str, default: int = 0) -> int:
        """See the peer."""
        return int(self.get(name, default))


def _processor(part: str, out: Path, **config: Any) -> Any:
    """The peer's processor of one part, whose files go to a folder."""

    def save(content: str, bucket: str, key: str) -> None:
        path = out / key.replace("/", "-")
        path.write_bytes(content.encode())

    def nothing(*args: Any, **kwargs: Any) -> None:
        """A status in a table of AWS."""

    stubs: dict[str, dict[str, Any]] = {
        "utils": {},
        "utils.s3": {"save_file_to_s3": save},
        "utils.id_generator": {"generate_random_id": lambda: uuid.uuid4().hex, "get_current_date_short_str": lambda: "2026-11-22"},
        "utils.dynamodb": dict.fromkeys(
            ("create_job_status_record", "get_job_status_items", "update_or_create_job_status_record"), nothing
        ),
        f"{part}.environmentConfig": {"EnvironmentConfig": _Config},
        "openpyxl": {"Workbook": None},
    }
    for name, members in stubs.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
    sys.path.insert(0, str(FOLDER.resolve()))
    module = __import__(f"{part}.dataProcessor", fromlist=["DataProcessor"])
    return module.DataProcessor(_Config(output_bucket_name="bucket", output_folder_name="out", **config))


def classifier_encode(folder: Path, out: Path) -> None:
    """Its requests, from rows to batches."""
    processor = _processor(
        "dataPreparation",
        out,
        batch_size=FILE_REQUESTS,
        minimum_records_per_batch=100,
        prompt=job_parts()[0],
        input_mapping_id_field="id",
        input_mapping_text_field="text",
    )
    lines = processor.convert_to_jsonl("json", (folder / "peer-rows.json").read_bytes().decode())
    processor.save_batches(processor.process_jsonl_batches(lines))


def classifier_collect(folder: Path, out: Path) -> None:
    """Its results, from Bedrock's lines to records in JSON."""
    processor = _processor("batchResultsProcessing", out, output_format=".json")
    for path in _results(folder):
        records = processor.process_results(path.read_bytes().decode().splitlines())
        processor.save_results_externally("parent", path.stem, records)


def _results(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("peer-*.jsonl.out"))


PEERS: dict[str, Callable[[Path, Path], None]] = {"classifier-encode": classifier_encode, "classifier-collect": classifier_collect}


def main() -> None:
    """Do one of them; `fetch` and `prepare` come first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["fetch", "prepare", *PEERS])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    given = parser.parse_args()
    if given.name == "fetch":
        fetch()
    elif given.name == "prepare":
        prepare(given.folder)
    else:
        given.out.mkdir(parents=True, exist_ok=True)
        PEERS[given.name](given.folder, given.out)
        print(json.dumps({"bytes": sum(path.stat().st_size for path in given.out.iterdir())}))
    end_process(0)


if __name__ == "__main__":
    main()

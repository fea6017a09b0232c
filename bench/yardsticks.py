"""What the product is measured against: the limits of the machine, and the usual ways. `python -m bench.yardsticks NAME FOLDER OUT`.

Each does less than the product: no request keys, no duplicates collapsed, no row index; or no join and no files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import orjson

from bench.question import COLUMNS, FILE_REQUESTS, MODEL, PARAMETERS, job_parts
from nightshift.process import end_process

BATCH_ROWS = 2048
MARK = "\x00{}\x00"


def _request(custom_id: str, user: str) -> dict[str, Any]:
    system, _, schema = _job_parts
    body = {
        "model": MODEL,
        **PARAMETERS,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}},
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
    }
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


_job_parts = job_parts()


def _batches(folder: Path) -> Iterator[list[list[Any]]]:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(folder / "reviews.parquet", pre_buffer=False)
    for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=COLUMNS, use_threads=False):
        yield [column.to_pylist() for column in batch.columns]


def _write(out: Path, batches: Iterator[list[bytes]]) -> None:
    """Lines into files of as many requests as a batch takes."""
    number, count = 0, 0
    file = (out / "00000.jsonl").open("wb", buffering=1 << 20)
    for lines in batches:
        if count + len(lines) > FILE_REQUESTS:
            file.close()
            number, count = number + 1, 0
            file = (out / f"{number:05d}.jsonl").open("wb", buffering=1 << 20)
        file.write(b"\n".join(lines))
        file.write(b"\n")
        count += len(lines)
    file.close()


def read(folder: Path, out: Path) -> None:
    """Read the columns and do nothing with them."""
    for _ in _batches(folder):
        pass


def preescaped(folder: Path, out: Path) -> None:
    """The ceiling of Python, row by row: constant bytes escaped once, the fields of each row escaped and joined. No keys."""
    template = _job_parts[1]
    for name in ("country", "stars", "text"):
        template = template.replace(f"{{{{ {name} }}}}", MARK.format(name))
    line = orjson.dumps(_request(MARK.format("id"), template)).replace(b"%", b"%%")
    for name in ("id", "country", "stars", "text"):
        line = line.replace(orjson.dumps(MARK.format(name))[1:-1], b"%b")
    dumps = orjson.dumps

    def lines() -> Iterator[list[bytes]]:
        for ids, countries, stars, texts in _batches(folder):
            yield [
                line % (i.encode(), dumps(country)[1:-1], b"%d" % star, dumps(text)[1:-1])
                for i, country, star, text in zip(ids, countries, stars, texts, strict=True)
            ]

    _write(out, lines())


def jinja_orjson(folder: Path, out: Path) -> None:
    """The usual way with good libraries: `template.render` and `orjson.dumps` per row."""
    _rendered(folder, out, lambda request: orjson.dumps(request))


def _rendered(folder: Path, out: Path, dumps: Callable[[dict[str, Any]], bytes]) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment(autoescape=False).from_string(_job_parts[1])

    def lines() -> Iterator[list[bytes]]:
        for ids, countries, stars, texts in _batches(folder):
            yield [
                dumps(_request(i, template.render(country=country, stars=star, text=text)))
                for i, country, star, text in zip(ids, countries, stars, texts, strict=True)
            ]

    _write(out, lines())


class _Message(msgspec.Struct, gc=False):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct, gc=False):
    message: _Message
    finish_reason: str | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Body(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None


class _Response(msgspec.Struct, gc=False):
    status_code: int
    body: _Body


class _Line(msgspec.Struct, gc=False):
    custom_id: str
    response: _Response | None = None


def outer_typed(folder: Path, out: Path) -> None:
    """The floor of a collection: read every result line into typed objects, and look at what matters."""
    decode = msgspec.json.Decoder(_Line).decode
    read, tokens = 0, 0
    for raw in _results(folder):
        line = decode(raw)
        if line.response is not None and line.response.body.usage is not None:
            read += len(line.response.body.choices[0].message.content or "")
            tokens += line.response.body.usage.prompt_tokens
    print(json.dumps({"characters": read, "tokens": tokens}))


def json_jsonschema(folder: Path, out: Path) -> None:
    """The usual way of a collection: `json.loads` twice and `jsonschema` per row, streamed into Parquet. No join."""
    import jsonschema
    import pyarrow as pa
    import pyarrow.parquet as pq

    validator = jsonschema.Draft202012Validator(_job_parts[2])
    rows: list[dict[str, Any]] = []
    writer: Any = None

    def flush() -> None:
        nonlocal writer
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(out / "answers.parquet", table.schema, compression="zstd")
        writer.write_table(table.cast(writer.schema))
        rows.clear()

    for raw in _results(folder):
        line = json.loads(raw)
        try:
            answer = json.loads(line["response"]["body"]["choices"][0]["message"]["content"])
            validator.validate(answer)
        except (TypeError, KeyError, ValueError, jsonschema.ValidationError):
            continue
        rows.append({"custom_id": line["custom_id"], **answer})
        if len(rows) == FILE_REQUESTS:
            flush()
    flush()
    writer.close()


def _results(folder: Path) -> Iterator[bytes]:
    for path in sorted((folder / "results").glob("*.jsonl")):
        with path.open("rb", buffering=1 << 20) as file:
            yield from file


def copy(folder: Path, out: Path) -> None:
    """Copy the frozen requests: what moving so many bytes costs."""
    import shutil

    for number, path in enumerate(sorted((folder / "store" / "shards").glob("*/requests.jsonl"))):
        shutil.copyfile(path, out / f"{number:05d}.jsonl")


YARDSTICKS: Sequence[Callable[[Path, Path], None]] = (
    read, copy, preescaped, jinja_orjson, outer_typed, json_jsonschema,
)  # fmt: skip


def main() -> None:
    """Do one of them."""
    by_name = {each.__name__: each for each in YARDSTICKS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=by_name)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    by_name[given.name](given.folder, given.out)
    end_process(0)


if __name__ == "__main__":
    main()

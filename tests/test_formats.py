from __future__ import annotations

import gzip
import io
from datetime import datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightshift.errors import InputUnreadable
from nightshift.formats import BATCH_BYTES, MAX_LINE_BYTES, Fault, Rows, guess_format, read_rows


def rows(data: bytes, fmt: str, compression: str | None = None, wanted: tuple[str, ...] = ("id", "text")):
    """(values of each column, reasons of faulty rows by position)"""
    columns: dict[str, list] = {name: [] for name in wanted}
    faults: dict[int, str] = {}
    for batch in read_rows(io.BufferedReader(io.BytesIO(data)), "s3://b/k", fmt, compression, wanted):
        start = len(columns[wanted[0]])
        faults |= {start + i: fault.reason for i, fault in batch.faults.items()}
        for name in wanted:
            columns[name] += batch.columns[name]
    return columns, faults


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(**columns) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a/b.parquet", ("parquet", None)),
        ("a/b.csv.gz", ("csv", "gzip")),
        ("a/B.JSONL.ZST", ("jsonl", "zstd")),
        ("a/b.ndjson", ("jsonl", None)),
        ("a/b.txt", (None, None)),
    ],
)
def test_the_name_tells_the_format(key, expected):
    assert guess_format(key) == expected


@pytest.mark.parametrize(("pack", "compression"), [(bytes, None), (gzip.compress, "gzip"), (zstd, "zstd")], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize(
    ("data", "fmt"), [(b'{"id":"1","text":"a"}\n{"id":"2","text":"b"}\n', "jsonl"), (b"id,text\n1,a\n2,b\n", "csv")], ids=["jsonl", "csv"]
)
def test_text_formats_read_the_same_in_every_packing(data, fmt, pack, compression):
    assert rows(pack(data), fmt, compression) == ({"id": ["1", "2"], "text": ["a", "b"]}, {})


def test_parquet_reads_only_the_wanted_columns():
    assert rows(parquet(id=["1"], text=["a"], other=[1]), "parquet") == ({"id": ["1"], "text": ["a"]}, {})


def test_F14_only_newline_bytes_end_a_line():
    data = '{"id":"1","text":"a\u2028b\u0085c"}\r\n{"id":"2","text":"x"}'.encode()
    assert rows(data, "jsonl") == ({"id": ["1", "2"], "text": ["a\u2028b\u0085c", "x"]}, {})


def test_F14_a_byte_order_mark_is_not_part_of_the_first_name():
    assert rows(b"\xef\xbb\xbfid,text\n1,a\n", "csv")[0]["id"] == ["1"]
    assert rows(b'\xef\xbb\xbf{"id":"1","text":"a"}\n', "jsonl")[0]["id"] == ["1"]


def test_F14_a_broken_jsonl_row_does_not_take_its_neighbours_along():
    data = b'{"id":"1","text":"a"}\n{bad\n[1]\n{"id":"4","text":"\xff"}\n{"id":"5","text":"\\ud800"}\n\n{"id":"6","text":"b"}\n'
    columns, faults = rows(data, "jsonl")
    assert columns["id"] == ["1", None, None, None, None, "6"]
    assert {position: reason.split(":")[0] for position, reason in faults.items()} == {
        1: "not valid JSON", 2: "not a JSON object", 3: "not valid JSON", 4: "not valid JSON",
    }  # fmt: skip


def test_F14_a_ragged_or_wrongly_encoded_csv_row_does_not_take_its_neighbours_along():
    columns, faults = rows(b'id,text\n1,"two\nlines"\n2,b,c\n3\n4,caf\xe9\n5,e\n', "csv")
    assert columns["text"] == ["two\nlines", None, None, None, "e"]
    assert faults == {1: "3 cells where the header has 2", 2: "1 cells where the header has 2", 3: "not valid UTF-8"}


def test_F15_a_line_without_end_is_one_bad_row():
    data = b'{"id":"1","text":"' + b"x" * (MAX_LINE_BYTES + 10) + b'"}\n{"id":"2","text":"b"}\n'
    columns, faults = rows(data, "jsonl")
    assert columns["id"] == [None, "2"]
    assert "longer than" in faults[0]


@pytest.mark.parametrize(
    ("data", "fmt", "compression", "why"),
    [
        pytest.param("id,text\n".encode("utf-16"), "csv", None, "UTF-16", id="UTF-16"),
        pytest.param(gzip.compress(b'{"id":1}\n' * 9999)[:60], "jsonl", "gzip", "cut off", id="gzip cut off"),
        pytest.param(zstd(b'{"id":1}\n' * 9999)[:-4], "jsonl", "zstd", "cut off", id="zstd cut off"),
        pytest.param(b"plain", "jsonl", "gzip", "damaged", id="not gzip"),
        pytest.param(gzip.compress(b"x"), "jsonl", None, "gzip data under another name", id="gzip under another name"),
        pytest.param(parquet(id=["1"], text=["a"])[:-20], "parquet", None, "not a whole Parquet file", id="parquet cut off"),
        pytest.param(parquet(id=["1"], text=["a"]), "jsonl", None, "Parquet file under another name", id="parquet under another name"),
        pytest.param(parquet(id=["1"], txt=["a"]), "parquet", None, "no column 'text'; did you mean 'txt'?", id="parquet without a column"),
        pytest.param(b"id,txt\n1,a\n", "csv", None, "no column 'text'; did you mean 'txt'?", id="csv without a column"),
        pytest.param("id;t\xe4xt\n1;a\n".encode("latin-1"), "csv", None, "columns: id;t\ufffdxt", id="csv whose header is not UTF-8"),
        pytest.param(b"id;text\n1;a\n", "csv", None, "are its columns parted by ';', where a comma", id="csv with semicolons"),
        pytest.param(
            b'id,text\n1,a\n2,"open\n3,b\n4,c\n', "csv", None, "a quote that opens in the row at line 3", id="csv quote never closed"
        ),
        pytest.param(
            b'id,text\n1,"open\n2,"b"\n3,c\n', "csv", None, "a quote that opens in the row at line 2", id="csv quote closed by another"
        ),
        pytest.param(b"id,text,text\n1,a,b\n", "csv", None, "stands twice", id="csv header twice"),
    ],
)
def test_a_broken_file_is_one_clear_error(data, fmt, compression, why):
    with pytest.raises(InputUnreadable, match="Nothing was sent") as caught:
        rows(data, fmt, compression)
    assert why in str(caught.value)


def test_nanoseconds_are_cut_off_alike_whether_pandas_is_there_or_not():
    """Arrow makes pandas' own objects of them where pandas is loaded, and refuses elsewhere."""
    table = pa.table(
        {"id": ["a"], "at": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns", "UTC")), "took": pa.array([1_999], pa.duration("ns"))}
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    buffer.seek(0)
    [batch] = read_rows(io.BufferedReader(buffer), "s3://b/k", "parquet", None, ("id", "at", "took"))
    assert str(batch.columns["at"][0]) == "2023-11-14 22:13:20.123456+00:00"
    assert batch.columns["took"] == [timedelta(microseconds=1)]


def test_nanoseconds_within_a_value_are_cut_off_too():
    moment = pa.timestamp("ns")
    stays = pa.array([{"at": [1_999], "where": "Rome"}, None], pa.struct([("at", pa.list_(moment)), ("where", pa.string())]))
    kinds = pa.array([[("in", 1_999)], None], pa.map_(pa.string(), moment))
    [batch] = read_rows(io.BufferedReader(io.BytesIO(parquet(stay=stays, kinds=kinds))), "s3://b/k", "parquet", None, ("stay", "kinds"))
    at = datetime(1970, 1, 1, 0, 0, 0, 1)
    assert [repr(value) for value in batch.columns["stay"]] == [repr({"at": [at], "where": "Rome"}), "None"]
    assert [repr(value) for value in batch.columns["kinds"]] == [repr([("in", at)]), "None"]


def test_some_rows_of_a_batch_keep_their_values_arrays_and_faults():
    whole = Rows(
        count=5, columns={"id": list("abcde")}, faults={1: Fault("bad", ""), 4: Fault("worse", "")}, arrays={"id": pa.array(list("abcde"))}
    )
    pieces = [whole.at(places) for places in ([0, 1], range(2, 4), [4])]
    assert [piece.count for piece in pieces] == [2, 2, 1]
    assert [value for piece in pieces for value in piece.columns["id"]] == list("abcde")
    assert [piece.arrays["id"].to_pylist() for piece in pieces] == [["a", "b"], ["c", "d"], ["e"]]
    assert [list(piece.faults.items()) for piece in pieces] == [[(1, whole.faults[1])], [], [(0, whole.faults[4])]]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_text_of_every_arrow_type_reads_the_same(kind):
    [batch] = read_rows(io.BytesIO(parquet(id=pa.array(["a", None, "ä"]).cast(kind))), "s3://b/k", "parquet", None, ("id",))
    assert batch.columns["id"] == ["a", None, "ä"]
    assert batch.array("id").cast(pa.string()).to_pylist() == ["a", None, "ä"]


def test_text_that_is_not_utf8_is_no_column_and_a_null():
    broken = pa.array([b"a", b"\xff"]).view(pa.string())
    [batch] = read_rows(io.BytesIO(parquet(id=broken)), "s3://b/k", "parquet", None, ("id",))
    assert (batch.array("id"), batch.columns["id"]) == (None, ["a", None])


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", None], pa.string()),
        ([1, None], pa.int64()),
        ([0.5], pa.float64()),
        ([True, False], pa.bool_()),
        ([1, 2.0], None),
        ([1, True], None),
        ([2**63], None),
        (["\ud800"], None),
        ([{}], None),
        ([None], None),
    ],
)
def test_values_are_an_array_where_one_plain_type_holds_each_as_it_is(values, kind):
    array = Rows(count=len(values), columns={"id": values}).array("id")
    assert (array and (array.type, array.to_pylist())) == (kind and (kind, values))


def test_a_long_text_that_rows_have_in_common_comes_with_few_of_them_at_once():
    packed = parquet(id=["x" * (BATCH_BYTES // 10)] * 100, **{"a.b": ["y"] * 100})
    batches = list(read_rows(io.BytesIO(packed), "s3://b/k", "parquet", None, ("id", "a.b")))
    assert (sum(batch.count for batch in batches), max(batch.count for batch in batches) <= 10) == (100, True)


@pytest.mark.parametrize("fmt", ["jsonl", "csv", "parquet"])
def test_rows_that_are_long_come_few_at_once(fmt):
    texts = [f"{i:09d}," * (BATCH_BYTES // 100) for i in range(35)]  # of 400 kB
    packed = {
        "jsonl": "".join(f'{{"id": "{text}"}}\n' for text in texts).encode(),
        "csv": "\n".join(["id", *(f'"{text}"' for text in texts)]).encode(),
        "parquet": parquet(id=texts),
    }[fmt]
    batches = list(read_rows(io.BytesIO(packed), "s3://b/k", fmt, None, ("id",)))
    assert [text for batch in batches for text in batch.columns["id"]] == texts
    assert all(batch.count <= 11 for batch in batches)


@pytest.mark.parametrize("kind", [pa.list_(pa.string_view()), pa.large_list(pa.string_view()), pa.struct([("a", pa.string_view())])])
def test_rows_can_be_taken_out_of_columns_that_hold_views(kind):
    values = [{"a": "x"}, None, {"a": "z"}] if pa.types.is_struct(kind) else [["x"], None, ["z"]]
    data = parquet(id=pa.array(["a", "b", "c"]), text=pa.array(values, kind))
    [batch] = read_rows(io.BufferedReader(io.BytesIO(data)), "s3://b/k", "parquet", None, ("id", "text"))
    assert list(batch.at([2, 1]).columns["text"]) == [values[2], None]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view()])
def test_rows_can_be_taken_out_of_columns_of_views(kind):
    data = parquet(id=pa.array(["a", "b", "c"]), text=pa.array(["x", None, "z"], kind))
    [batch] = read_rows(io.BufferedReader(io.BytesIO(data)), "s3://b/k", "parquet", None, ("id", "text"))
    assert list(batch.at([2, 1]).columns["text"]) in (["z", None], [b"z", None])


def test_long_rows_that_stand_together_are_not_read_all_at_once(monkeypatch):
    monkeypatch.setattr("nightshift.formats.GROUP_BYTES", 1 << 20)
    texts = [f"short {i}" for i in range(20_000)] + [f"{i}" + "long " * 4000 for i in range(1000)]
    data = parquet(id=[str(i) for i in range(len(texts))], text=texts)
    batches = list(read_rows(io.BufferedReader(io.BytesIO(data)), "s3://b/k", "parquet", None, ("id", "text")))
    assert [text for batch in batches for text in batch.columns["text"]] == texts
    assert max(batch.nbytes for batch in batches) < 2 * BATCH_BYTES
    assert min(batch.count for batch in batches[:5]) > 1000, "short ones are still read many at once"

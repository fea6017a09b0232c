from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nightshift.errors import InputChanged, InputMissing, InputUnreadable
from nightshift.stores.objects import Objects, matching, open_input, open_objects, split_input


@pytest.fixture(params=["local", "memory"])
def objects(request, tmp_path: Path) -> Objects:
    return open_objects(f"file://{tmp_path}/store" if request.param == "local" else "memory:///")


def test_an_object_is_created_once(objects):
    assert objects.create("a/b.json", b"1")
    assert not objects.create("a/b.json", b"2")
    assert objects.get("a/b.json") == b"1"


def test_one_of_many_creators_wins(objects):
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: objects.create("one", str(i).encode()), range(64)))
    assert sum(won) == 1


def test_what_is_not_there_is_none_and_an_empty_listing(objects):
    assert objects.get("nope") is None
    assert objects.head("nope") is None
    assert list(objects.scan("nope")) == []
    objects.delete(["nope"])


def test_a_scan_ends_at_the_folder(objects):
    for key in ("a/1", "a/2", "ab/3"):
        objects.create(key, b"x")
    assert sorted(found.key for found in objects.scan("a")) == ["a/1", "a/2"]


def test_ranges_read_like_a_file(objects):
    data = bytes(range(256)) * 64
    objects.put("big", data)
    with objects.open("big") as file:
        file.seek(1000)
        assert file.read(24) == data[1000:1024]
        file.seek(-10, 2)
        assert file.read() == data[-10:]


def test_F12_a_replaced_object_is_not_read_on(tmp_path):
    objects = open_objects(f"file://{tmp_path}")
    objects.put("input", b"old" * 100)
    pinned = objects.head("input").etag
    objects.put("input", b"new" * 200)
    with objects.open("input", etag=pinned) as file, pytest.raises(InputChanged, match="no longer the object this run pinned"):
        file.read()


def test_F13_a_deleted_object_is_told_from_an_empty_one(tmp_path):
    objects = open_objects(f"file://{tmp_path}")
    objects.put("input", b"x" * 100)
    file = objects.open("input", etag=objects.head("input").etag)
    objects.delete(["input"])
    with pytest.raises(InputChanged):
        file.read()


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        pytest.param("in/a.csv", ["in/a.csv"], id="exact"),
        pytest.param("in/*.csv", ["in/a.csv", "in/b.csv", "in/odd[1].csv"], id="star stays in one folder"),
        pytest.param("in/**/*.csv", ["in/a.csv", "in/b.csv", "in/odd[1].csv", "in/sub/c.csv"], id="two stars cross folders"),
        pytest.param("in/", ["in/a.csv", "in/b.csv", "in/odd[1].csv", "in/sub/c.csv", "in/sub/d.txt"], id="a folder"),
        pytest.param("in/?.csv", ["in/a.csv", "in/b.csv"], id="question mark"),
        pytest.param("in/odd[1].csv", ["in/odd[1].csv"], id="brackets in a name"),
        pytest.param("in/c.csv", [], id="not there"),
        pytest.param("in", [], id="a folder without its slash"),
    ],
)
def test_patterns(objects, pattern, keys):
    for key in ("in/a.csv", "in/b.csv", "in/sub/c.csv", "in/sub/d.txt", "in/odd[1].csv", "inner/a.csv"):
        objects.create(key, b"x")
    assert sorted(found.key for found in matching(objects, pattern)) == keys


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/a/b#c?.csv", ("s3://bucket", "a/b#c?.csv")),
        ("s3://bucket/a+b%2B c/ü.csv", ("s3://bucket", "a+b%2B c/ü.csv")),
        ("file:///tmp/x/*.csv", ("file://", "tmp/x/*.csv")),
    ],
)
def test_F05_a_key_is_taken_as_it_stands(uri, expected):
    assert split_input(uri) == expected


def test_a_uri_without_a_bucket_is_told():
    with pytest.raises(InputMissing, match="names no bucket"):
        open_input("s3:///key")


@pytest.mark.parametrize("key", ["a//b.jsonl", "a/../b.jsonl", "a/\tb.jsonl"])
def test_a_key_that_cannot_be_addressed_is_told_as_what_it_is(objects, key):
    with pytest.raises(InputUnreadable, match="so rename the object"):
        objects.head(key)


def test_uris_of_local_files_can_be_opened_again(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x.csv").write_text("x")
    bucket, pattern = open_input(f"file://{tmp_path}/a b/*.csv")
    [found] = matching(bucket, pattern)
    again, key = open_input(bucket.uri_of(found.key))
    assert again.get(key) == b"x"

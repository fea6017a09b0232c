"""The object store over S3's HTTP: an emulator for what works, a small server for what does not."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from pytest_httpserver import HTTPServer

from nightshift.errors import AccessDenied, BucketMissing, InputChanged, StoreUnavailable
from nightshift.rehearsal.served import free_port
from nightshift.stores.objects import Objects, matching, open_input, open_objects


@pytest.fixture
def store(s3: str, aws: None, monkeypatch: pytest.MonkeyPatch) -> Objects:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket="bucket")
    return open_objects("s3://bucket/root")


def test_objects_live_below_the_root(store):
    store.put("a/b", b"x")
    bucket, pattern = open_input("s3://bucket/root/a/*")
    assert [found.key for found in matching(bucket, pattern)] == ["root/a/b"]
    assert store.uri_of("a/b") == "s3://bucket/root/a/b"


def test_one_of_many_creators_wins_on_s3(store):
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda i: store.create("race", str(i).encode()), range(32))) == 1


@pytest.mark.parametrize("key", ["a b+c%41ü.jsonl", "x/y=1/z:2.csv", "q?mark#hash.csv", "dots..and[brackets].csv"])
def test_F05_every_legal_key_comes_back_as_it_is(store, key):
    store.put(key, b"data")
    assert store.get(key) == b"data"
    bucket, pattern = open_input(store.uri_of(key))
    [found] = matching(bucket, pattern)
    assert bucket.open(found.key, etag=found.etag).read() == b"data"


def test_F12_a_replaced_object_is_not_read_on_from_s3(store):
    store.put("input", b"old" * 100)
    pinned = store.head("input").etag
    store.put("input", b"new" * 100)
    with pytest.raises(InputChanged):
        store.open("input", etag=pinned).read()


def test_large_objects_are_streamed_in_ranges(store, tmp_path):
    data = os.urandom(9 << 20)
    store.put("large", data)
    assert store.open("large").read() == data
    assert store.download("large", tmp_path / "copy").read_bytes() == data


def test_a_missing_bucket_is_told(s3, store):
    bucket, pattern = open_input("s3://no-such-bucket/in/*.csv")
    with pytest.raises(BucketMissing, match="no-such-bucket"):
        list(matching(bucket, pattern))


def test_a_missing_bucket_is_not_an_empty_store(s3, store):
    with pytest.raises(BucketMissing):
        open_objects("s3://no-such-bucket/root").get("x")
    with pytest.raises(BucketMissing):
        open_objects("s3://no-such-bucket/root").create("x", b"1")


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_credentials_that_s3_refuses_are_told(aws, monkeypatch, httpserver: HTTPServer, code):
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
    httpserver.expect_request(httpserver_any()).respond_with_data(
        body, 400 if code == "ExpiredToken" else 403, content_type="application/xml"
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", httpserver.url_for("").rstrip("/"))
    with pytest.raises(AccessDenied, match="refused our credentials"):
        list(open_objects("s3://bucket/root").scan("x"))


def httpserver_any():
    import re

    return re.compile(".*")


def test_no_credentials_at_all_are_told(aws, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(AccessDenied, match="Set AWS_"):
        open_objects("s3://bucket/root").get("x")


def test_an_unreachable_store_is_not_an_empty_one(aws, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("nightshift.stores.objects.RETRY", {"max_retries": 1})
    with pytest.raises(StoreUnavailable):
        open_objects("s3://bucket/root").get("x")

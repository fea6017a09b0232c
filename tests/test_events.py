"""S3 events in every envelope, and what of them starts which runs."""

from __future__ import annotations

import json
import re
from datetime import timedelta

import pytest

from nightshift.drive import drive
from nightshift.events import Hint, Strange, read_message
from nightshift.inbox import Upload, again, console_link, hear, heard_uploads, list_uploads, starts, state_of_run, still_there
from nightshift.runs import run_id
from nightshift.steps.discover import discover
from tests.conftest import NOON, reviews, s3_event

A = Hint(bucket="b", key="in/a b.jsonl", etag="e1", size=10)
PLAIN = s3_event("b", "in/a+b.jsonl", "e1")
BRIDGED = {
    "source": "aws.s3",
    "detail-type": "Object Created",
    "detail": {"bucket": {"name": "b"}, "object": {"key": "in/a b.jsonl", "size": 10, "etag": "e1", "version-id": "v"}},
}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        pytest.param(PLAIN, [A], id="S3 to SQS"),
        pytest.param(json.dumps({"Type": "Notification", "TopicArn": "arn", "Message": PLAIN}), [A], id="through SNS"),
        pytest.param(json.dumps(BRIDGED), [A], id="through EventBridge, whose keys are not encoded"),
        pytest.param(json.dumps({**BRIDGED, "detail-type": "Object Deleted"}), [], id="a removal through EventBridge"),
        pytest.param(json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "b"}), [], id="the test event"),
        pytest.param(s3_event("b", "in/a+b.jsonl", "e1", "ObjectRemoved:Delete"), [], id="a removal"),
        pytest.param(s3_event("b", "in/a+b.jsonl", "e1", eventVersion="2.1"), [A], id="an older version of 2"),
    ],
)  # fmt: skip
def test_F04_F06_events_are_read_from_every_envelope(body, said):
    assert list(read_message(body)) == said


@pytest.mark.parametrize(
    ("encoded", "key"),
    [("a+b", "a b"), ("a%2Bb", "a+b"), ("a%2541", "a%41"), ("in%2F%C3%A9", "in/é"), ("100%25", "100%"), ("%F0%9F%98%8D", "😍")],
)  # fmt: skip
def test_F05_keys_are_decoded_once(encoded, key):
    [hint] = read_message(s3_event("b", encoded, "e"))
    assert hint.key == key


@pytest.mark.parametrize(
    "body",
    [
        "not json", "[]", "{}", "null", '{"Records": [{}]}', '{"Records": [null]}', '{"Records": [{"eventVersion": "2.5", "eventName": "ObjectCreated:Put"}]}',
        s3_event("b", "a", "e", eventVersion="3.0"), json.dumps({"source": "aws.s3", "detail-type": "Object Created"}), s3_event("b", "%FF", "e"),
    ],
)  # fmt: skip
def test_F04_F08_what_is_no_event_is_parked_and_stops_nobody(world, body):
    said = list(read_message(body))
    assert [type(each) for each in said] == [Strange]
    assert hear(world.site, [], said) == 0
    [parked] = [world.site.store.get(found.key) for found in world.site.store.scan("inbox/_parked")]
    assert json.loads(parked)["body"] == said[0].body


def test_F07_a_bad_record_leaves_its_neighbours_alone():
    good = json.loads(PLAIN)["Records"][0]
    said = list(read_message(json.dumps({"Records": [good, {"eventVersion": "2.5"}, good]})))
    assert [type(each) for each in said] == [Hint, Strange, Hint]


def uploads(count: int, minutes_ago: float = 0) -> list[Upload]:
    return [Upload(uri=f"s3://b/in/{i}.jsonl", etag=str(i), size=1, at=NOON - timedelta(minutes=minutes_ago)) for i in range(count)]


@pytest.mark.parametrize(
    ("together", "waiting", "free", "sizes"),
    [
        pytest.param(None, uploads(3), 16, [1, 1, 1], id="one upload, one run"),
        pytest.param(None, uploads(1000), 16, [1] * 16, id="a thousand at once start no thousand runs"),
        pytest.param(None, uploads(3), 0, [], id="no room"),
        pytest.param(None, uploads(3), -2, [], id="more runs than there should be"),
        pytest.param({"files": 10, "minutes": 5}, uploads(25), 16, [10, 10], id="what is not enough yet waits for others"),
        pytest.param({"files": 10, "minutes": 5}, uploads(25, minutes_ago=5), 16, [10, 10, 5], id="and not for ever"),
    ],
)
def test_which_runs_are_started(world, together, waiting, free, sizes):
    on_upload = {"uri": "s3://b/in/*", **({"together": together} if together else {})}
    job = world.job(on_upload=on_upload, input={"uri": "s3://b/in/*"})
    found = starts(job, waiting, free=free, now=NOON)
    assert [len(start.uploads) for start in found] == sizes
    assert len({start.label for start in found}) == len(found)


def test_a_run_is_named_for_its_object_and_links_to_it(world):
    job = world.job(on_upload="s3://b/in/*", input={"uri": "s3://b/in/*"})
    upload = Upload(uri="s3://b/in/a b.jsonl", etag="e", size=1, at=NOON)
    [start] = starts(job, [upload], free=1, now=NOON)
    assert start.label.startswith("upload__a-b.jsonl__")
    assert start.note == "[s3://b/in/a b.jsonl](https://s3.console.aws.amazon.com/s3/object/b?prefix=in/a%20b.jsonl)"
    assert console_link("file:///x/a.jsonl") == "file:///x/a.jsonl"


def test_a_run_is_named_so_that_airflow_takes_it():
    allowed = re.compile(r"^[A-Za-z0-9_.~:+-]+$")  # [scheduler] allowed_run_id_pattern, as it comes
    names = [f"s3://b/in/{name}" for name in ("dt=2026-11-01.jsonl", "a+b c.csv", "đánh giá.jsonl", "x" * 300, "%41&=.gz")]
    labels = {Upload(uri=uri, etag="e", size=1, at=NOON).label for uri in names}
    assert len(labels) == len(names)
    assert all(allowed.fullmatch(label) and len(label) < 200 for label in labels)


def test_an_upload_whose_key_cannot_be_read_is_parked_and_the_others_go_on(world):
    job = world.job(on_upload=f"file://{world.folder}/input/**", input={"uri": f"file://{world.folder}/input/**"})
    world.write("good.jsonl", reviews(1))
    [good] = list_uploads(world.site, job)
    odd = good.model_copy(update={"uri": good.uri.replace("input/", "input//"), "etag": "odd"})
    for each in (odd, good):
        world.site.store.create_shape(f"inbox/reviews/heard/{each.label}.json", each)
    waiting = heard_uploads(world.site, job)
    assert len(waiting) == 2
    assert still_there(world.site, "reviews", waiting) == [good]
    assert heard_uploads(world.site, job) == [good], "it is not looked at again"
    [parked] = [json.loads(world.site.store.get(found.key)) for found in world.site.store.scan("inbox/_parked")]
    assert parked["body"] == odd.uri
    assert "rename the object" in parked["why"]


def test_a_backfill_knows_the_runs_that_it_has_begun_itself(world):
    job = world.job(on_upload=f"file://{world.folder}/input/*")
    uri = world.write("in.jsonl", reviews(2))
    [upload] = list_uploads(world.site, job)
    assert state_of_run(world.site.store, "reviews", upload) is None
    name = run_id("reviews", upload.label)
    run = discover(world.site, job, pattern=uri, label=upload.label, run=name, dates={})
    assert state_of_run(world.site.store, "reviews", upload) == "under way"
    drive(world.site, run, ask=lambda run, planned: True)
    assert state_of_run(world.site.store, "reviews", upload) == "published"


STATES = {"a": None, "b": "failed", "c": "held", "d": "published", "e": "under way"}


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        pytest.param({"reprocess": "none"}, "a", id="what no run was started for"),
        pytest.param({"reprocess": "failed"}, "abc", id="and what failed or was held"),
        pytest.param({"reprocess": "all"}, "abcde", id="everything"),
        pytest.param({"reprocess": "all", "newest_first": True}, "edcba", id="newest first"),
        pytest.param({"reprocess": "all", "since": NOON + timedelta(hours=1), "until": NOON + timedelta(hours=3)}, "bc", id="a time range"),
        pytest.param({"reprocess": "all", "prefix": "s3://b/in/c"}, "c", id="a prefix"),
        pytest.param({"reprocess": "all", "prefix": "s3://b/out"}, "", id="another prefix"),
    ],
)
def test_which_uploads_a_backfill_runs_and_in_which_order(asked, names):
    landed = [Upload(uri=f"s3://b/in/{name}", etag=name, size=1, at=NOON + timedelta(hours=hour)) for hour, name in enumerate("abcde")]
    given = {"prefix": "", "since": None, "until": None, "newest_first": False, **asked}
    found = again(landed, lambda upload: STATES[upload.etag], **given)
    assert "".join(upload.etag for upload in found) == names

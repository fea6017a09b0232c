"""The rehearsal server through the official SDK: what a client written for OpenAI meets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import httpx2
import openai
import pytest

from nightshift.rehearsal.served import FAST, free_port
from tests.conftest import Rehearsal, serve

SCHEMA = {
    "type": "object",
    "properties": {"sentiment": {"type": "string", "enum": ["positive", "neutral", "negative"]}},
    "required": ["sentiment"],
    "additionalProperties": False,
}


@pytest.fixture
def client(rehearsal: Rehearsal) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{rehearsal.url}/v1", api_key=rehearsal.key, max_retries=0)


def lines(count: int = 3, **changes) -> bytes:
    body = {"model": "gpt-5.4-nano", "messages": [{"role": "user", "content": "Lovely room."}], **changes.pop("body", {})}
    made = [{"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body, **changes} for i in range(count)]
    return b"".join(json.dumps(line).encode() + b"\n" for line in made)


def upload(client: openai.OpenAI, data: bytes) -> str:
    return client.files.create(file=("in.jsonl", data, "application/jsonl"), purpose="batch").id


def start(client: openai.OpenAI, data: bytes, **kwargs):
    return client.batches.create(
        input_file_id=upload(client, data), endpoint=kwargs.pop("endpoint", "/v1/chat/completions"), completion_window="24h", **kwargs
    )


def wait(client: openai.OpenAI, batch_id: str, seconds: float = 20):
    deadline = time.monotonic() + seconds
    seen = []
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if not seen or seen[-1] != batch.status:
            seen.append(batch.status)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch, seen
        time.sleep(0.01)
    raise AssertionError(f"the batch did not end: {seen}")


def output(client: openai.OpenAI, file_id: str) -> list[dict]:
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_a_batch_goes_through_its_statuses_and_answers_every_line(client, rehearsal):
    rehearsal.pace(validating=0.2, running=0.3, finalizing=0.2)
    batch = start(client, lines(50), metadata={"token": "t1"})
    assert (batch.status, batch.output_file_id, batch.metadata, batch.expires_at - batch.created_at) == (
        "validating",
        None,
        {"token": "t1"},
        86_400,
    )
    ended, seen = wait(client, batch.id)
    assert seen == ["validating", "in_progress", "finalizing", "completed"]
    assert (ended.request_counts.completed, ended.request_counts.failed, ended.error_file_id) == (50, 0, None)
    answered = output(client, ended.output_file_id)
    assert sorted(line["custom_id"] for line in answered) == sorted(f"c{i}" for i in range(50))
    assert [line["custom_id"] for line in answered] != [f"c{i}" for i in range(50)], "order is not promised, so it is not kept"
    assert client.files.retrieve(ended.output_file_id).bytes == len(client.files.content(ended.output_file_id).content)


@pytest.mark.parametrize(
    ("data", "code", "line"),
    [
        pytest.param(lines(2) + b"{broken\n", "invalid_json_line", 3, id="not JSON"),
        pytest.param(lines(2) + lines(1), "duplicate_custom_id", 3, id="id twice"),
        pytest.param(lines(2, url="/v1/responses"), "invalid_url", 1, id="another endpoint"),
        pytest.param(lines(1, method="PUT"), "invalid_method", 1, id="another method"),
        pytest.param(lines(1) + lines(1, custom_id="x", body={"model": "gpt-5.4"}), "model_mismatch", 2, id="two models"),
        pytest.param(b'{"custom_id": "a"}\n', "missing_required_parameter", 1, id="parts missing"),
        pytest.param(b"", "empty_file", None, id="empty"),
    ],
)
def test_F29_validation_is_asynchronous_and_names_the_line(client, rehearsal, data, code, line):
    ended, _ = wait(client, start(client, data).id)
    assert (ended.status, ended.output_file_id) == ("failed", None)
    assert (ended.errors.data[0].code, ended.errors.data[0].line) == (code, line)
    assert rehearsal.bill()["requests"] == 0


def test_requests_that_the_api_refuses_stand_in_the_error_file_with_the_error_inside(client):
    data = lines(1) + lines(
        1,
        custom_id="bad",
        body={
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": {"type": "object", "properties": {"a": {}}}},
            }
        },
    )
    ended, _ = wait(client, start(client, data).id)
    assert (ended.request_counts.completed, ended.request_counts.failed) == (1, 1)
    [line] = output(client, ended.error_file_id)
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("bad", None, 400)
    assert line["response"]["body"]["error"]["code"] == "invalid_schema"


def test_F57_a_cancelled_batch_keeps_what_ran_and_bills_it(client, rehearsal):
    rehearsal.pace(validating=0.0, running=2.0, finalizing=0.0, cancelling=0.1)
    batch = start(client, lines(100))
    while client.batches.retrieve(batch.id).request_counts.completed < 5:
        time.sleep(0.02)
    assert client.batches.cancel(batch.id).status == "cancelling"
    ended, _ = wait(client, batch.id)
    done, never = output(client, ended.output_file_id), output(client, ended.error_file_id)
    assert ended.status == "cancelled"
    assert len(done) + len(never) == 100
    assert len(done) >= 5
    assert {line["error"]["code"] for line in never} == {"batch_cancelled"}
    assert rehearsal.bill()["requests"] == len(done)
    over = wait(client, start(client, lines(1)).id)[0]
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(over.id)


def test_F56_an_expired_batch_keeps_what_ran(client, rehearsal):
    rehearsal.pace(validating=0.0, running=2.0, finalizing=0.0, window=1.0)
    ended, _ = wait(client, start(client, lines(100)).id)
    done, never = output(client, ended.output_file_id), output(client, ended.error_file_id)
    assert (ended.status, len(done) + len(never)) == ("expired", 100)
    assert 10 < len(done) < 90
    assert {line["error"]["code"] for line in never} == {"batch_expired"}
    assert rehearsal.bill()["requests"] == len(done)


def test_F22_the_token_queue_is_per_model_and_is_released(client, rehearsal):
    rehearsal.pace(validating=0.0, running=0.6, finalizing=0.0)
    rehearsal.faults(enqueued_token_limit=150)
    first = start(client, lines(10))
    time.sleep(0.3)
    refused, _ = wait(client, start(client, lines(10)).id)
    assert (refused.status, refused.errors.data[0].code, refused.errors.data[0].line) == ("failed", "token_limit_exceeded", None)
    wait(client, first.id)
    assert wait(client, start(client, lines(10)).id)[0].status == "completed"


def test_lists_are_newest_first_and_paged(client):
    ids = [start(client, lines(1)).id for _ in range(7)]
    page = client.batches.list(limit=3)
    assert [batch.id for batch in page.data] == ids[::-1][:3]
    assert page.has_more
    assert [batch.id for batch in client.batches.list(limit=3)] == ids[::-1]


def test_files_are_refused_and_found_as_at_openai(client):
    with pytest.raises(openai.BadRequestError, match=r"Must be \.jsonl"):
        client.files.create(file=b"{}", purpose="batch")
    file_id = upload(client, b"x\n")
    assert client.files.retrieve(file_id).purpose == "batch"
    assert [file.id for file in client.files.list(purpose="batch")] == [file_id]
    assert client.files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file_id)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_file_id": "file-nope"}, "Cannot find file file-nope"),
        ({"endpoint": "/v1/nope"}, "Invalid value"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
    ],
)
def test_creation_is_refused_as_at_openai(client, changes, message):
    arguments = {"input_file_id": upload(client, lines(1)), "endpoint": "/v1/chat/completions", "completion_window": "24h", **changes}
    with pytest.raises(openai.BadRequestError, match=message):
        client.batches.create(**arguments)


def test_the_wrong_key_and_the_unknown_model(rehearsal, client):
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        openai.OpenAI(base_url=f"{rehearsal.url}/v1", api_key="sk-wrong").models.list()
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-none")
    assert caught.value.code == "model_not_found"
    assert "gpt-5.4-nano" in [model.id for model in client.models.list()]


def test_sentiment_is_really_judged(client):
    form = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}

    def judged(text: str) -> str:
        answer = client.chat.completions.create(model="gpt-5.4-nano", messages=[{"role": "user", "content": text}], response_format=form)
        return json.loads(answer.choices[0].message.content)["sentiment"]

    assert judged("The room was clean and affordable.") == "positive"
    assert judged("The bathroom was dirty and the staff were rude.") == "negative"
    assert judged("The hotel has eighty rooms.") == "neutral"


def test_on_demand_answers_in_all_three_endpoints_and_bills_at_the_standard_price(client, rehearsal):
    assert client.responses.create(model="gpt-5.4-nano", input="Lovely.").output_text == "positive"
    assert (
        client.chat.completions.create(model="gpt-5.4-nano", messages=[{"role": "user", "content": "Awful."}]).choices[0].message.content
        == "negative"
    )
    near, far, same = (
        each.embedding
        for each in client.embeddings.create(model="text-embedding-3-small", input=["clean room", "loud street", "a clean room"]).data
    )
    likeness = [sum(x * y for x, y in zip(near, other, strict=True)) for other in (same, far)]
    assert likeness[0] > likeness[1]
    assert {line["tier"] for line in rehearsal.bill()["by_batch"]} == {"standard"}


def test_the_token_limit_cuts_the_answer(client):
    form = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model="gpt-5.4-nano", messages=[{"role": "user", "content": "x"}], response_format=form, max_completion_tokens=2
    )
    assert answer.choices[0].finish_reason == "length"


def test_F33_the_sdk_left_alone_buys_three_times(rehearsal):
    """Why Nightshift creates with retries off: this is what the default client does when an answer is lost."""
    careless = openai.OpenAI(base_url=f"{rehearsal.url}/v1", api_key=rehearsal.key)
    file_id = upload(careless, lines(1))
    rehearsal.faults(create_500_after_accept=2)
    careless.batches.create(input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h")
    assert len(list(careless.batches.list())) == 3


def test_F52_a_killed_server_goes_on_where_it_was_and_bills_once(tmp_path):
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "nightshift.cli",
        "rehearse",
        "--state",
        str(tmp_path / "state"),
        "--port",
        str(port),
        "--pace",
        "running=2",
    ]

    def launch() -> subprocess.Popen:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                httpx2.get(f"http://127.0.0.1:{port}/rehearsal/health")
                return process
            except httpx2.HTTPError:
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    process = launch()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-rehearsal", max_retries=0)
    batch = start(client, lines(200))
    while client.batches.retrieve(batch.id).status != "in_progress":
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process = launch()
    try:
        second = subprocess.run([*command[:-4], "--port", "0"], capture_output=True, text=True, timeout=60)
        assert (second.returncode, "another rehearsal server has it" in second.stderr) == (2, True)
        ended, _ = wait(client, batch.id)
        assert (ended.status, len(output(client, ended.output_file_id))) == ("completed", 200)
        assert httpx2.get(f"http://127.0.0.1:{port}/rehearsal/bill").json()["requests"] == 200
    finally:
        process.terminate()
        process.wait()


def test_two_servers_on_one_state_are_not_needed_and_a_restart_forgets_nothing(tmp_path):
    first = serve(tmp_path, pace=FAST)
    client = openai.OpenAI(base_url=f"{first.url}/v1", api_key=first.key)
    batch = start(client, lines(3))
    wait(client, batch.id)
    first.stop()
    second = serve(tmp_path, pace=FAST)
    client = openai.OpenAI(base_url=f"{second.url}/v1", api_key=second.key)
    assert client.batches.retrieve(batch.id).status == "completed"
    second.stop()


def test_faults_are_drawn_again_as_they_were_and_fall_otherwise_on_the_next_batch(tmp_path):
    drawn = []
    for name in ("one", "two"):
        server = serve(tmp_path / name)
        server.faults(errored=0.5)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)
        ended = [wait(client, start(client, lines(20)).id)[0] for _ in range(2)]
        drawn.append([[line["custom_id"] for line in output(client, batch.error_file_id)] for batch in ended])
        server.stop()
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]

"""Notices through Airflow's own notifiers: Slack over HTTP, mail over SMTP, SNS through an emulator. What cannot be told fails nothing."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator

import boto3
import pytest

from nightshift.job import NotifySpec
from nightshift.notices import event_of, listeners, notice_of
from nightshift.shapes import OUTCOMES, Cost, Counts, Summary, Usage
from tests.airflow.conftest import in_airflow
from tests.conftest import NOON

TELL = """
import json
from nightshift.notices import Notice
from nightshift_airflow.notices import tell
tell(%r, Notice(event="held", subject="reviews held: dt=2026-11-21", text="reviews held\\n{{ not a template }} <b>&\\nNext: look"), {})
"""


class Mailbox(socketserver.BaseRequestHandler):
    """As much of SMTP as a client needs to hand over a mail."""

    mails: list[str]

    def handle(self) -> None:
        file = self.request.makefile("rwb")

        def say(line: str) -> None:
            file.write(line.encode() + b"\r\n")
            file.flush()

        say("220 mailbox")
        while line := file.readline().decode().strip():
            if line.upper().startswith("DATA"):
                say("354 go on")
                mail = []
                while (part := file.readline().decode().rstrip("\r\n")) != ".":
                    mail.append(part)
                type(self).mails.append("\n".join(mail))
                say("250 taken")
            elif line.upper().startswith("QUIT"):
                say("221 bye")
                return
            else:
                say("250 ok")


@pytest.fixture
def mailbox() -> Iterator[tuple[int, list[str]]]:
    handler = type("OneMailbox", (Mailbox,), {"mails": []})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], handler.mails
        server.shutdown()


def connection(**parts) -> str:
    return json.dumps(parts)


def test_slack_mail_and_sns_are_told_and_one_that_is_down_stops_nobody(airflow_home, httpserver, mailbox, s3, queue):
    sqs, queue_url = queue
    sns = boto3.client("sns", endpoint_url=s3)
    topic = sns.create_topic(Name="nightshift")["TopicArn"]
    arn = sqs.get_queue_attributes(QueueUrl=queue_url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn)
    httpserver.expect_request("/services/x").respond_with_data("ok")
    httpserver.expect_request("/api/chat.postMessage").respond_with_json({"ok": True})
    port, mails = mailbox
    env = {
        "AIRFLOW_CONN_DOWN": connection(conn_type="slackwebhook", host="127.0.0.1", password="http://127.0.0.1:9/services/x"),
        "AIRFLOW_CONN_NOBODY": connection(conn_type="smtp", host="127.0.0.1", port=port),
        "AIRFLOW_CONN_ODD": connection(conn_type="ftp", host="x"),
        "AIRFLOW_CONN_HOOK": connection(conn_type="slackwebhook", password=httpserver.url_for("/services/x")),
        "AIRFLOW_CONN_CHAT": connection(conn_type="slack", password="xoxb-1", extra=json.dumps({"channel": "#data", "base_url": httpserver.url_for("/api/")})),
        "AIRFLOW_CONN_MAIL": connection(
            conn_type="smtp", host="127.0.0.1", port=port,
            extra=json.dumps({"to": "ada@example.org, bob@example.org", "from_email": "n@example.org", "disable_ssl": True, "disable_tls": True}),
        ),
        "AIRFLOW_CONN_TOPIC": connection(
            conn_type="aws", login="rehearsal", password="rehearsal",
            extra=json.dumps({"region_name": "us-east-1", "endpoint_url": s3, "sns_topic_arn": topic}),
        ),
    }  # fmt: skip
    told = in_airflow(airflow_home, TELL % (["down", "nobody", "odd", "hook", "chat", "mail", "topic", "absent"],), **env)
    bodies = [request.get_data(as_text=True) for request, _ in httpserver.log]
    assert len(bodies) == 2, told
    assert all("not a template" in body for body in bodies)
    [mail] = mails
    assert "Subject: reviews held: dt=2026-11-21" in mail
    assert "ada@example.org" in mail
    [message] = sqs.receive_message(QueueUrl=queue_url, WaitTimeSeconds=5)["Messages"]
    assert "{{ not a template }} <b>&" in json.loads(message["Body"])["Message"]


def summary(state: str, **changes) -> Summary:
    cost = Cost(estimated=1.5, actual=changes.pop("actual", 1.25), saved=0.5, by_tier={}, basis="")
    counts = Counts(unique=10, duplicates=0, reused=4, adopted=0, submitted=6)
    given = {
        "job": "reviews", "run": "r", "label": "l", "redrive_of": None, "state": state, "problem": None, "partition": "dt=2026-11-21",
        "model": "m", "prompt_version": "v", "started_at": NOON, "finished_at": NOON, "input_uris": (), "rows": 10,
        "outcomes": {**dict.fromkeys(OUTCOMES, 0), "succeeded": 8, "invalid": 2}, "reasons": {}, "requests": counts, "batches": 1, "paid": 6,
        "usage": Usage(), "alarms": {}, "cost_usd": cost, "audit": None, "figures": {}, "drift": {}, "drift_against": None,
        "published": state == "published", "results": None, "quarantine": None, "report": "s3://b/report.html",
    }  # fmt: skip
    return Summary(**{**given, **changes})


@pytest.mark.parametrize(
    ("ended", "event", "words"),
    [
        pytest.param(summary("published"), "success", ["published", "8 succeeded, 2 invalid", "$1.25 for 6 answers", "4 reused"], id="published"),
        pytest.param(summary("held", problem="too few rows"), "held", ["held", "too few rows", "readers still see the old partition"], id="held"),
        pytest.param(summary("failed", error="BudgetExceeded", problem="over"), "budget", ["stopped by a budget", "raise the budget"], id="budget"),
        pytest.param(summary("failed", error="AccessDenied", problem="no key"), "failure", ["failed", "no key", "clear the failed tasks"], id="failed"),
        pytest.param(
            summary("failed", actual=None, paid=0, outcomes=dict.fromkeys(OUTCOMES, 0)), "failure", ["Nothing was paid as far as is known"], id="nothing paid"
        ),
    ],
)  # fmt: skip
def test_a_notice_says_what_happened_what_it_cost_and_what_to_do_next(ended, event, words):
    notice = notice_of(ended, "http://airflow/run")
    assert (event_of(ended), notice.event) == (event, event)
    for word in words:
        assert word in notice.text
    assert "Next: " in notice.text
    assert notice.text.endswith("http://airflow/run")


def test_who_hears_of_failures_hears_of_budgets_unless_somebody_else_does():
    assert listeners(NotifySpec(on_failure=["a"]), "budget") == ["a"]
    assert listeners(NotifySpec(on_failure=["a"], on_budget=["b"]), "budget") == ["b"]
    assert listeners(NotifySpec(on_failure=["a"]), "held") == []

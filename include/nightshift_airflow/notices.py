"""Notices through Airflow's notifiers: a connection's type says which. A notice that cannot be sent never fails a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from airflow.sdk import BaseHook, DeadlineAlert, DeadlineReference, SyncCallback

from nightshift.errors import SettingInvalid
from nightshift.job import JobFile
from nightshift.job_file import load_job
from nightshift.notices import Notice, listeners

log = logging.getLogger(__name__)


def tell(connections: Iterable[str], notice: Notice, context: Any) -> None:
    """Send a notice to each connection."""
    for connection_id in connections:
        try:
            notifier_for(connection_id, notice).notify(context)
            log.info("Told %s: %s", connection_id, notice.subject)
        except Exception:  # whatever a chat or a mail server does, the run has ended as it has
            log.exception("Cannot tell %s: %s", connection_id, notice.subject)


def notifier_for(connection_id: str, notice: Notice) -> Any:
    """The notifier of a connection. Raises SettingInvalid where its type is none that can be told, or where it does not say whom."""
    connection = BaseHook.get_connection(connection_id)
    makers: dict[str, Callable[[Any, Notice], Any]] = {
        "slack": _slack,
        "slackwebhook": _slack_webhook,
        "smtp": _mail,
        "aws": _sns,
    }
    if connection.conn_type not in makers:
        raise SettingInvalid([f"connection {connection_id!r} is of type {connection.conn_type!r}; told can be: {', '.join(makers)}"])
    return makers[connection.conn_type](connection, notice)


def _slack(connection: Any, notice: Notice) -> Any:
    from airflow.providers.slack.notifications.slack import SlackNotifier

    return SlackNotifier(slack_conn_id=connection.conn_id, text=notice.text, channel=_needed(connection, "channel"))


def _slack_webhook(connection: Any, notice: Notice) -> Any:
    from airflow.providers.slack.notifications.slack_webhook import SlackWebhookNotifier

    return SlackWebhookNotifier(slack_webhook_conn_id=connection.conn_id, text=notice.text)


def _mail(connection: Any, notice: Notice) -> Any:
    from airflow.providers.smtp.notifications.smtp import SmtpNotifier

    html = "<br>\n".join(escape(line) for line in notice.text.splitlines())
    to = [each.strip() for each in _needed(connection, "to").split(",")]
    return SmtpNotifier(smtp_conn_id=connection.conn_id, to=to, subject=notice.subject, html_content=html)


def _sns(connection: Any, notice: Notice) -> Any:
    from airflow.providers.amazon.aws.notifications.sns import SnsNotifier

    subject = notice.subject.encode("ascii", "replace").decode()[:100]  # all that SNS takes
    return SnsNotifier(
        aws_conn_id=connection.conn_id,
        target_arn=_needed(connection, "sns_topic_arn"),
        subject=subject,
        message=notice.text,
        region_name=connection.extra_dejson.get("region_name"),
    )


def _needed(connection: Any, name: str) -> str:
    found = connection.extra_dejson.get(name)
    if not isinstance(found, str) or not found:
        raise SettingInvalid([f"connection {connection.conn_id!r}: its extra has to say {name!r}"])
    return found


def deadline_of(spec: JobFile, path: Path) -> list[DeadlineAlert] | None:
    """The alert of a job whose runs are late, where somebody wants to hear of it."""
    if not spec.notify.on_deadline:
        return None
    return [
        DeadlineAlert(
            name="late",
            reference=DeadlineReference.DAGRUN_QUEUED_AT,
            interval=timedelta(hours=spec.policy.deadline_hours),
            callback=SyncCallback(tell_late, kwargs={"job_file": str(path)}),
        )
    ]


def tell_late(job_file: str, context: Any) -> None:
    """Say that a run is not done by its job's deadline; called by Airflow."""
    spec = load_job(Path(job_file)).spec
    tell(listeners(spec.notify, "deadline"), late(spec, context["dag_run"]), context)


def late(spec: JobFile, dag_run: Any) -> Notice:
    """What is said of a run that is late."""
    run = dag_run["dag_run_id"] if isinstance(dag_run, dict) else dag_run.run_id
    hours = f"{spec.policy.deadline_hours:g} hours"
    finishes = "what its batches have not answered is finished on demand, at the full price" if spec.policy.on_demand else "it is reported"
    text = (
        f"{spec.name} is not done after {hours}: {run}\n"
        f"Batches that are still running are cancelled and harvested by then; {finishes}.\n"
        "Next: look at the run; if the provider is slow, let it be. Nothing that was paid for is lost by stopping it."
    )
    return Notice(event="deadline", subject=f"{spec.name} is late: {run}", text=text)

"""The task `approve`: passes, stops, or asks a person in the Airflow UI. The runs of a backfill ask once, for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import datetime
from decimal import Decimal
from typing import Any, cast

import structlog
from airflow.providers.standard.exceptions import HITLRejectException, HITLTimeoutError
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Param
from airflow.sdk.configuration import conf
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.exceptions import AirflowSkipException
from airflow.triggers.base import BaseTrigger, TriggerEvent

from nightshift.approvals import ANSWER_WITHIN, Ask, Decision, Draw, Grants, Refused, record
from nightshift.errors import ApprovalNeeded, NightshiftError, SettingInvalid
from nightshift.notices import Notice, listeners
from nightshift.pages import usd
from nightshift.question import question
from nightshift.runs import Run, Site
from nightshift.settings import dollars, read_settings
from nightshift.shapes import Approval, Plan
from nightshift.steps.approve import approve, must_ask
from nightshift.steps.plan import plan
from nightshift_airflow.chains import chains
from nightshift_airflow.notices import tell
from nightshift_airflow.site import owner_of, run_at
from nightshift_airflow.tasks import DRY_RUN
from nightshift_airflow.waits import RESUME_AFTER_SECONDS

log = structlog.get_logger(__name__)
LOOK_SECONDS = 15.0  # between two looks at whether somebody has answered
UNFINISHED = ["queued", "running"]


class ApproveRun(ApprovalOperator):
    """Asks only where the estimate is above `policy.approve_above_usd`; over a budget nobody is asked."""

    template_fields = ("run_uri", "subject", "body")

    def __init__(self, *, run_uri: str, **kwargs: Any) -> None:
        super().__init__(subject="Send this run to the model?", body="", fail_on_reject=True, response_timeout=ANSWER_WITHIN, **kwargs)
        self.run_uri = run_uri

    def execute(self, context: Any) -> list[str]:
        """The chains of shards to drive. A question waits in the state `awaiting_input`, with no worker and no trigger."""
        site, run = run_at(self.run_uri, owner_of(context))
        planned = plan(site, run)
        if run.input.dry_run:
            raise AirflowSkipException(DRY_RUN)
        if not must_ask(site, run, planned):
            return _chains(site, run, planned, is_approved=False)
        if context["dag_run"].run_type == "backfill":
            return self._with_others(context, site, run, planned, waited_for=None)
        return self._ask(context, run, planned, {})

    def go_on(self, context: Any, event: dict[str, Any]) -> list[str]:
        """Somebody has answered the question of another run of this backfill, or it has timed out."""
        site, run = run_at(self.run_uri, owner_of(context))
        return self._with_others(context, site, run, plan(site, run), waited_for=int(event["question"]))

    def execute_complete(self, context: Any, event: dict[str, Any]) -> list[str]:
        """Go on with a person's yes. A no, and no answer, end the task for good: asking again is a person's to decide."""
        site, run = run_at(self.run_uri, owner_of(context))
        planned = plan(site, run)
        grants = Grants(site.store, run.job.name)
        number, given = grants.asked_by(run.uri), event.get("params_input") or {}
        person, note = _person(event), str(given.get("note") or "")
        try:
            super().execute_complete(context, event)
        except (HITLRejectException, HITLTimeoutError) as error:
            if number is not None:
                grants.settle(number, Decision(usd=None, by=person, at=site.now(), note=note))
            is_late = isinstance(error, HITLTimeoutError)
            _record(run, planned, "timed_out" if is_late else "refused", person, site.now(), note, number)
            raise _needed(run, planned, "Nobody has answered in time" if is_late else _refusal(person, note)) from error
        if number is not None:
            try:
                granted = dollars(given["up_to_usd"], "up_to_usd") if given.get("up_to_usd") else planned.estimate.usd or Decimal(0)
            except SettingInvalid as error:  # the form takes what its schema forbids
                self.log.warning("%s has answered with %s; asking again", person, error)
                return self._ask(context, run, planned, self._for_all(context, planned))
            answer = grants.settle(number, Decision(usd=granted, by=person, at=site.now(), note=note))
            if grants.draw(Draw(number, answer), run.uri, planned.estimate.usd or Decimal(0), site.now()) is not None:
                self.log.info("%s is less than this run alone is estimated at; asking again", usd(granted))
                return self._with_others(context, site, run, planned, waited_for=number)
        _record(run, planned, "approved", person, site.now(), note, number)
        return _chains(site, run, planned, is_approved=True)

    def _with_others(self, context: Any, site: Site, run: Run, planned: Plan, *, waited_for: int | None) -> list[str]:
        """Draw on what was granted to this backfill, wait for the answer to its question, or be the one who asks."""
        grants = Grants(site.store, run.job.name)
        step = grants.step(run.uri, waited_for=waited_for, now=site.now())
        if isinstance(step, Draw):
            drawn, step = step, grants.draw(step, run.uri, planned.estimate.usd or Decimal(0), site.now()) or step
            if step is drawn:
                _record(run, planned, "approved", drawn.answer.by, site.now(), drawn.answer.note, drawn.number)
                return _chains(site, run, planned, is_approved=True)
        if isinstance(step, Refused):
            _record(run, planned, "refused", step.answer.by, site.now(), step.answer.note, step.number)
            raise _needed(run, planned, _refusal(step.answer.by, step.answer.note))
        if isinstance(step, Ask):
            if step.number == grants.asked_by(run.uri):
                return self._ask(context, run, planned, self._for_all(context, planned))
            step = grants.step(run.uri, waited_for=waited_for, now=site.now())  # another one was quicker
        self.log.info("Another run of this backfill has asked; waiting for the answer")
        self.defer(trigger=AnswerTrigger(self.run_uri, step.number), method_name="go_on")
        raise AssertionError("defer does not return")

    def _for_all(self, context: Any, planned: Plan) -> dict[str, Param]:
        """What the form of a backfill's question says: how much all of its runs may spend together."""
        runs = max(1, context["ti"].get_dr_count(dag_id=context["ti"].dag_id, states=UNFINISHED))
        about = (planned.estimate.usd_high or planned.estimate.usd or Decimal(0)) * runs
        return {
            "up_to_usd": Param(
                float(round(about, 4)),
                type="number",
                exclusiveMinimum=0,
                title="All runs of this backfill together may spend (USD)",
                description=f"{runs} runs are queued or running; alike they cost about {usd(about)}. Beyond it you are asked again.",
            )
        }

    def _ask(self, context: Any, run: Run, planned: Plan, form: dict[str, Param]) -> list[str]:
        spec = run.job.spec
        self.subject = f"Send {planned.submitted:,} requests of {run.job.name} to {spec.request.model}?"
        self.body = question(run, planned)
        if form:
            self.body += "\n\n**Your answer counts for all runs of this backfill.**"
        self.params = ParamsDict({**form, "note": Param("", type=["null", "string"], title="Note", description="kept with the answer")})
        asked = question(run, planned, with_sample=False)  # rows are for who is signed in, not for a chat
        text = f"{self.subject}\n\n{asked}\n\nNext: approve or reject it under Required Actions: {context['ti'].log_url}"
        tell(listeners(spec.notify, "approval"), Notice(event="approval", subject=self.subject, text=text), context)
        return cast("list[str]", super().execute(context))


class AnswerTrigger(BaseTrigger):
    """Waits until a question of a backfill is answered, or can be answered no more."""

    def __init__(self, run_uri: str, question: int) -> None:
        super().__init__()
        self.run_uri, self.question = run_uri, question

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """See BaseTrigger."""
        return f"{type(self).__module__}.{type(self).__qualname__}", {"run_uri": self.run_uri, "question": self.question}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Each look runs in a thread; one that fails is logged and made again."""
        started = time.monotonic()
        while time.monotonic() - started < ANSWER_WITHIN.total_seconds():
            try:
                if await asyncio.to_thread(self._is_answered):
                    break
            except NightshiftError as error:
                log.warning("A look failed; looking again", question=self.question, error=str(error))
            await asyncio.sleep(LOOK_SECONDS)
        await asyncio.sleep(max(0.0, RESUME_AFTER_SECONDS - (time.monotonic() - started)))
        yield TriggerEvent({"question": self.question})

    def _is_answered(self) -> bool:
        site, run = run_at(self.run_uri, "triggerer")
        return Grants(site.store, run.job.name).answer(self.question) is not None


def _chains(site: Site, run: Run, planned: Plan, *, is_approved: bool) -> list[str]:
    most = min(read_settings().width, conf.getint("core", "max_map_length"))  # Airflow refuses a longer list, after the approval
    return chains(approve(site, run, planned, ask=lambda: is_approved).shards, most)


def _needed(run: Run, planned: Plan, said: str) -> ApprovalNeeded:
    return ApprovalNeeded(planned.estimate.usd, run.job.spec.policy.approve_above_usd or Decimal(0), said)


def _refusal(person: str, note: str) -> str:
    return f"{person} has refused it{f': {note}' if note else ''}"


def _person(event: dict[str, Any]) -> str:
    who = event.get("responded_by_user") or {}
    return str(who.get("name") or who.get("id") or "nobody")


def _record(run: Run, planned: Plan, decision: Any, by: str, at: datetime, note: str, grant: int | None) -> None:
    record(run, Approval(decision=decision, by=by, at=at, estimate_usd=planned.estimate.usd, note=note, grant=grant))

"""The task `approve`: passes, stops, or asks a person in the Airflow UI."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

from airflow.providers.standard.exceptions import HITLRejectException, HITLTimeoutError
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk.exceptions import AirflowSkipException

from nightshift.errors import ApprovalNeeded
from nightshift.steps.approve import approve, must_ask, question
from nightshift.steps.plan import plan
from nightshift_airflow.site import owner_of, run_at
from nightshift_airflow.tasks import DRY_RUN


class ApproveRun(ApprovalOperator):
    """Asks only where the estimate is above `policy.approve_above_usd`; over the budget nobody is asked."""

    template_fields = ("run_uri", "subject", "body")

    def __init__(self, *, run_uri: str, **kwargs: Any) -> None:
        super().__init__(
            subject="Send this run to the model?", body="", fail_on_reject=True, response_timeout=timedelta(hours=24), **kwargs
        )
        self.run_uri = run_uri

    def execute(self, context: Any) -> list[str]:
        """The shards to drive. A question waits in the state `awaiting_input`, with no worker and no trigger."""
        site, run = run_at(self.run_uri, owner_of(context))
        planned = plan(site, run)
        if run.input.dry_run:
            raise AirflowSkipException(DRY_RUN)
        if must_ask(site, run, planned):
            self.subject = f"Send {planned.submitted:,} requests of {run.job.name} to {run.job.spec.request.model}?"
            self.body = question(run, planned)
            super().execute(context)
        return list(approve(site, run, planned, ask=lambda: False).shards)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> list[str]:
        """Go on with a person's yes. A no, and no answer, end the task for good: asking again is a person's to decide."""
        site, run = run_at(self.run_uri, owner_of(context))
        planned = plan(site, run)
        try:
            super().execute_complete(context, event)
        except (HITLRejectException, HITLTimeoutError) as error:
            limit = run.job.spec.policy.approve_above_usd or run.job.spec.policy.budget_usd or Decimal(0)
            raise ApprovalNeeded(planned.estimate.usd, limit) from error
        return list(approve(site, run, planned, ask=lambda: True).shards)

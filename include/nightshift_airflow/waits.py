"""Waiting for a shard without a worker: a trigger that polls off the event loop, and the operators around it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import structlog
from airflow.sdk import BaseOperator
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.triggers.base import BaseTrigger, StartTriggerArgs, TaskSuccessEvent, TriggerEvent

from nightshift.doorbell import Doorbell
from nightshift.errors import NightshiftError, Permanent, ShardHeld
from nightshift.providers.protocol import Snapshot
from nightshift.runs import approved_plan
from nightshift.steps.collect import collect
from nightshift.steps.submit import open_where, submit
from nightshift.steps.wait import pauses
from nightshift.stores.ledger import Attach, next_move
from nightshift_airflow.site import doorbell, owner_of, run_at

log = structlog.get_logger(__name__)

STORE_PAUSE_SECONDS = 30.0
# A task that is resumed within seconds of deferring can be failed by the scheduler's stale success event (apache/airflow
# issue 72716), so a wait that ends in a worker lasts at least this long.
RESUME_AFTER_SECONDS = 20.0
CLEARED_OR_STOPPED_SECONDS = 3.0  # until the state of a task that a person acted on can be told
_last_words: set[asyncio.Task[None]] = set()  # the event loop keeps no strong reference to its tasks
STOPPED_STATES = ["failed", "skipped", "removed", "upstream_failed"]


class ShardTrigger(BaseTrigger):
    """Looks at a shard's batch until there is nothing more to wait for. Survives every error of a look.

    `ends_task` ends the task in the triggerer, with no worker at all; otherwise a worker is resumed.
    """

    def __init__(self, run_uri: str, shard: str, ends_task: bool = True) -> None:
        super().__init__()
        self.run_uri, self.shard, self.ends_task = run_uri, shard, ends_task
        self._batch: str | None = None  # what is waited for, once it is known
        self._bell: Doorbell | None = None  # that may end a pause early

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """See BaseTrigger."""
        kwargs = {"run_uri": self.run_uri, "shard": self.shard, "ends_task": self.ends_task}
        return f"{type(self).__module__}.{type(self).__qualname__}", kwargs

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Every look runs in a thread: provider clients block, and the triggerer has one event loop for everybody."""
        started = time.monotonic()
        looks: Iterator[float] | None = None
        while True:
            try:
                looks = looks or await asyncio.to_thread(self._looks)
                pause = await asyncio.to_thread(next, looks, None)
            except Permanent:
                break  # collect meets the same on a worker, where it can be reported and mended
            except NightshiftError as error:  # of the store; the provider's are handled by the wait itself
                log.warning("A look failed; looking again", shard=self.shard[:12], error=str(error))
                looks, pause = None, STORE_PAUSE_SECONDS
            if pause is None:
                break
            await self._pause(pause)
        if self.ends_task:
            yield TaskSuccessEvent()
        else:
            await asyncio.sleep(max(0.0, RESUME_AFTER_SECONDS - (time.monotonic() - started)))
            yield TriggerEvent({"shard": self.shard})

    async def _pause(self, seconds: float) -> None:
        """Sleep, or less where an event tells that the batch has come further."""
        if self._bell is None or self._batch is None:
            await asyncio.sleep(seconds)
        else:
            await self._bell.sleep(self._batch, seconds)

    async def on_kill(self) -> None:
        """Cancel the batch when a person stopped the task, but not when it was cleared: its next try attaches to the batch.

        Shielded, because the triggerer cancels what is slow to end once more with every round of its loop.
        """
        last_words = asyncio.create_task(self._after_kill())
        _last_words.add(last_words)
        last_words.add_done_callback(_last_words.discard)
        await asyncio.shield(last_words)

    async def _after_kill(self) -> None:
        await asyncio.sleep(CLEARED_OR_STOPPED_SECONDS)
        await asyncio.to_thread(self._cancel_if_stopped)

    def _looks(self) -> Iterator[float]:
        site, run = run_at(self.run_uri, "triggerer")
        move = next_move(site.ledger.attempts(self.shard), now=site.now())
        self._batch, self._bell = move.receipt.batch_id if isinstance(move, Attach) else None, doorbell()
        return pauses(site, run, self.shard, seen=self._seen)

    def _seen(self, look: Snapshot | NightshiftError) -> None:
        if isinstance(look, Snapshot):
            log.info("Batch seen", shard=self.shard[:12], status=look.status, done=look.done, total=look.total)
        else:
            log.warning("A look failed; looking again", shard=self.shard[:12], error=str(look))

    def _cancel_if_stopped(self) -> None:
        if not self._is_stopped():
            log.info("The task goes on, so its batch does too", shard=self.shard[:12])
            return
        if "{{" in self.shard:  # killed while its templates were still being rendered
            self.render_template_fields(cast("Any", self.task_instance).get_template_context())
        site, run = run_at(self.run_uri, "triggerer")
        if self.shard in approved_plan(run).adopted_shards:
            return  # another run waits for it, too
        move = next_move(site.ledger.attempts(self.shard), now=site.now())
        if isinstance(move, Attach):
            log.info("Cancelling the batch of a stopped task", shard=self.shard[:12], batch=move.receipt.batch_id)
            open_where(site, run, self.shard, move.attempt).cancel(move.receipt.batch_id)

    def _is_stopped(self) -> bool:
        ti: Any = self.task_instance
        stopped = RuntimeTaskInstance.get_ti_count(
            dag_id=ti.dag_id, task_ids=[ti.task_id], map_index=ti.map_index, run_ids=[ti.run_id], states=STOPPED_STATES
        )
        return stopped > 0


class WaitForShard(BaseOperator):
    """The task `wait`: starts and ends in the triggerer."""

    template_fields = ("run_uri", "shard")
    start_from_trigger = True
    # Class level, because mapped tasks ignore what __init__ sets; the kwargs are templates that the triggerer renders.
    # Without map_indexes xcom_pull asks for a list, which the triggerer (3.3.2) never answers.
    start_trigger_args = StartTriggerArgs(
        trigger_cls="nightshift_airflow.waits.ShardTrigger",
        trigger_kwargs={
            "run_uri": "{{ ti.xcom_pull(task_ids='discover', map_indexes=-1) }}",
            "shard": "{{ ti.xcom_pull(task_ids='shard.submit', map_indexes=ti.map_index) }}",
            "ends_task": True,
        },
        next_method="execute_complete",
    )

    def __init__(self, *, run_uri: str, shard: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run_uri, self.shard = run_uri, shard

    def execute(self, context: Any) -> None:
        """Where nothing starts from a trigger (`dag.test()`): defer in the ordinary way."""
        self.defer(trigger=ShardTrigger(self.run_uri, self.shard), method_name="execute_complete")

    def execute_complete(self, context: Any, event: Any = None) -> None:
        """Nothing to bring back: collect reads the ledger."""


class CollectShard(BaseOperator):
    """The task `collect`: harvest, and drive what failed again until the shard is settled, waiting in the triggerer."""

    template_fields = ("run_uri", "shard")

    def __init__(self, *, run_uri: str, shard: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run_uri, self.shard = run_uri, shard

    def execute(self, context: Any) -> str:
        """The shard's key once it is settled."""
        return self.go_on(context)

    def go_on(self, context: Any, event: Any = None) -> str:
        """One round: settled, or submitted again and waited for."""
        site, run = run_at(self.run_uri, owner_of(context))
        settled = collect(site, run, self.shard)
        if settled is not None:
            self.log.info("Settled: %s requests in %s batches", settled.requests, sum(paid.batches for paid in settled.paid))
            return settled.shard
        try:
            submit(site, run, self.shard)
        except ShardHeld as held:
            self.log.info("%s", held)
        self.defer(trigger=ShardTrigger(self.run_uri, self.shard, ends_task=False), method_name="go_on")
        raise AssertionError("defer does not return")

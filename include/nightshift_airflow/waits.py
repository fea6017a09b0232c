"""Waiting for shards without a worker: a trigger that polls off the event loop, and the operators around it."""

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
from nightshift.errors import BatchUnfinished, NightshiftError, Permanent, ShardHeld, Transient
from nightshift.providers.protocol import Snapshot
from nightshift.runs import Run, Site, approved_plan
from nightshift.steps.collect import collect
from nightshift.steps.submit import open_where, submit
from nightshift.steps.wait import pauses
from nightshift.stores.ledger import Attach, next_move
from nightshift_airflow.chains import chain_of, shards_of
from nightshift_airflow.site import doorbell, owner_of, run_at

log = structlog.get_logger(__name__)

STORE_PAUSE_SECONDS = 30.0
# A task that is resumed within seconds of deferring can be failed by the scheduler's stale success event (apache/airflow
# issue 72716), so a wait that ends in a worker lasts at least this long.
RESUME_AFTER_SECONDS = 20.0
LINGER_SECONDS = 600.0  # that a shard which is over waits for the others of its chain: every round takes a process
CLEARED_OR_STOPPED_SECONDS = 3.0  # until the state of a task that a person acted on can be told
_last_words: set[asyncio.Task[None]] = set()  # the event loop keeps no strong reference to its tasks
STOPPED_STATES = ["failed", "skipped", "removed", "upstream_failed"]


class ChainTrigger(BaseTrigger):
    """Looks at the batches of a chain until there is nothing more to wait for, or not for all. Survives every error of a look.

    `ends_task` ends the task in the triggerer, with no worker at all; otherwise a worker is resumed.
    """

    def __init__(self, run_uri: str, chain: str, ends_task: bool = True) -> None:
        super().__init__()
        self.run_uri, self.chain, self.ends_task = run_uri, chain, ends_task
        self._place: tuple[Site, Run] | None = None
        self._batches: dict[str, str] = {}  # by shard, what is waited for, once it is known
        self._bell: Doorbell | None = None  # that may end a pause early

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """See BaseTrigger."""
        kwargs = {"run_uri": self.run_uri, "chain": self.chain, "ends_task": self.ends_task}
        return f"{type(self).__module__}.{type(self).__qualname__}", kwargs

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """All shards are waited for at the same time; the first that is over waits a while for the others."""
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(self._wait(shard)) for shard in shards_of(self.chain)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(waits, timeout=LINGER_SECONDS)
            for wait in waits:
                wait.cancel()
        if self.ends_task:
            yield TaskSuccessEvent()
        else:
            await asyncio.sleep(max(0.0, RESUME_AFTER_SECONDS - (time.monotonic() - started)))
            yield TriggerEvent({"chain": self.chain})

    async def _wait(self, shard: str) -> None:
        """Every look runs in a thread: provider clients block, and the triggerer has one event loop for everybody."""
        looks: Iterator[float] | None = None
        while True:
            try:
                looks = looks or await asyncio.to_thread(self._looks, shard)
                pause = await asyncio.to_thread(next, looks, None)
            except Permanent:
                return  # collect meets the same on a worker, where it can be reported and mended
            except NightshiftError as error:  # of the store; the provider's are handled by the wait itself
                log.warning("A look failed; looking again", shard=shard[:12], error=str(error))
                looks, self._place, pause = None, None, STORE_PAUSE_SECONDS
            if pause is None:
                return
            await self._pause(shard, pause)

    async def _pause(self, shard: str, seconds: float) -> None:
        """Sleep, or less where an event tells that the batch has come further."""
        if self._bell is None or shard not in self._batches:
            await asyncio.sleep(seconds)
        else:
            await self._bell.sleep(self._batches[shard], seconds)

    async def on_kill(self) -> None:
        """Cancel the batches when a person stopped the task, but not when it was cleared: its next try attaches to them.

        Shielded, because the triggerer cancels what is slow to end once more with every round of its loop.
        """
        last_words = asyncio.create_task(self._after_kill())
        _last_words.add(last_words)
        last_words.add_done_callback(_last_words.discard)
        await asyncio.shield(last_words)

    async def _after_kill(self) -> None:
        await asyncio.sleep(CLEARED_OR_STOPPED_SECONDS)
        await asyncio.to_thread(self._cancel_if_stopped)

    def _looks(self, shard: str) -> Iterator[float]:
        site, run = self._place = self._place or run_at(self.run_uri, "triggerer")
        move = next_move(site.ledger.attempts(shard), now=site.now())
        self._bell = doorbell()
        if isinstance(move, Attach):
            self._batches[shard] = move.receipt.batch_id
        return pauses(site, run, shard, seen=News(shard))

    def _cancel_if_stopped(self) -> None:
        if not self._is_stopped():
            log.info("The task goes on, so its batches do too", run=self.run_uri)
            return
        if "{{" in self.chain:  # killed while its templates were still being rendered
            self.render_template_fields(cast("Any", self.task_instance).get_template_context())
        site, run = run_at(self.run_uri, "triggerer")
        adopted = approved_plan(run).adopted_shards  # other runs wait for these, too
        for shard in shards_of(self.chain):
            if shard not in adopted:
                _cancel(site, run, shard)

    def _is_stopped(self) -> bool:
        ti: Any = self.task_instance
        stopped = RuntimeTaskInstance.get_ti_count(
            dag_id=ti.dag_id, task_ids=[ti.task_id], map_index=ti.map_index, run_ids=[ti.run_id], states=STOPPED_STATES
        )
        return stopped > 0


def _cancel(site: Site, run: Run, shard: str) -> None:
    """Cancel what a shard has at the provider. Where that fails the others of its chain are cancelled all the same."""
    try:
        move = next_move(site.ledger.attempts(shard), now=site.now())
        if isinstance(move, Attach):
            log.info("Cancelling a batch of a stopped task", shard=shard[:12], batch=move.receipt.batch_id)
            open_where(site, run, shard, move.attempt).cancel(move.receipt.batch_id)
    except NightshiftError as error:
        log.warning("A batch of a stopped task could not be cancelled, and runs to its end", shard=shard[:12], error=str(error))


class News:
    """Logs what is news of a batch: another status, another tenth done, a look that failed. A wait may look thousands of times."""

    def __init__(self, shard: str) -> None:
        self._shard = shard[:12]
        self._told: tuple[str, int] | None = None

    def __call__(self, look: Snapshot | NightshiftError) -> None:
        if isinstance(look, NightshiftError):
            log.warning("A look failed; looking again", shard=self._shard, error=str(look))
            return
        news = look.status, 10 * look.done // max(look.total, 1)
        if news != self._told:
            self._told = news
            log.info("Batch seen", shard=self._shard, status=look.status, done=look.done, total=look.total)


class WaitForShards(BaseOperator):
    """The task `wait`: starts and ends in the triggerer."""

    template_fields = ("run_uri", "chain")
    start_from_trigger = True
    # Class level, because mapped tasks ignore what __init__ sets; the kwargs are templates that the triggerer renders.
    # Without map_indexes xcom_pull asks for a list, which the triggerer (3.3.2) never answers.
    start_trigger_args = StartTriggerArgs(
        trigger_cls="nightshift_airflow.waits.ChainTrigger",
        trigger_kwargs={
            "run_uri": "{{ ti.xcom_pull(task_ids='discover', map_indexes=-1) }}",
            "chain": "{{ ti.xcom_pull(task_ids='shard.submit', map_indexes=ti.map_index) }}",
            "ends_task": True,
        },
        next_method="execute_complete",
    )

    def __init__(self, *, run_uri: str, chain: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run_uri, self.chain = run_uri, chain

    def execute(self, context: Any) -> None:
        """Where nothing starts from a trigger (`dag.test()`): defer in the ordinary way."""
        self.defer(trigger=ChainTrigger(self.run_uri, self.chain), method_name="execute_complete")

    def execute_complete(self, context: Any, event: Any = None) -> None:
        """Nothing to bring back: collect reads the ledger."""


class CollectShards(BaseOperator):
    """The task `collect`: harvest, and drive what failed again until the shards are settled, waiting in the triggerer."""

    template_fields = ("run_uri", "chain")

    def __init__(self, *, run_uri: str, chain: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run_uri, self.chain = run_uri, chain

    def execute(self, context: Any) -> str:
        """The chain once all of its shards are settled."""
        return self.go_on(context)

    def go_on(self, context: Any, event: Any = None) -> str:
        """One round. A shard that cannot be settled ends the task, but not before the others are: their answers are being paid for."""
        site, run = run_at(self.run_uri, owner_of(context))
        waiting, failed = list[str](), dict[str, NightshiftError]()
        for shard in shards_of(self.chain):
            try:
                if not self._settle(site, run, shard):
                    waiting.append(shard)
            except NightshiftError as error:
                self.log.warning("Shard %s: %s", shard[:12], error)
                failed[shard] = error
        if waiting:
            again = [shard for shard, error in failed.items() if isinstance(error, Transient)]
            self.defer(trigger=ChainTrigger(self.run_uri, chain_of([*waiting, *again]), ends_task=False), method_name="go_on")
        if failed:
            raise min(failed.values(), key=lambda error: isinstance(error, Permanent))  # what may pass is tried again first
        return self.chain

    def _settle(self, site: Site, run: Run, shard: str) -> bool:
        """Whether a shard is settled; if not it is with the provider, or it waits to be."""
        try:
            settled = collect(site, run, shard)
            if settled is None:
                submit(site, run, shard)
                return False
        except (BatchUnfinished, ShardHeld) as waits:
            self.log.info("%s", waits)
            return False
        paid = sum(each.batches for each in settled.paid)
        self.log.info("Shard %s is settled: %s requests in %s batches", shard[:12], settled.requests, paid)
        return True

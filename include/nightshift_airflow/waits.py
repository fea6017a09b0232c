"""Waiting for shards without a worker: a trigger that polls off the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import structlog
from airflow.triggers.base import BaseTrigger, TaskSuccessEvent, TriggerEvent

from nightshift.doorbell import Doorbell
from nightshift.errors import Transient
from nightshift.providers.protocol import Snapshot
from nightshift.runs import Run, Site
from nightshift.steps.wait import ERROR_PAUSE_MAX_SECONDS, pauses
from nightshift.stores.ledger import Attach, next_move
from nightshift_airflow.chains import chain_of, shards_of
from nightshift_airflow.site import doorbell, run_at
from nightshift_airflow.stops import CLEARED_OR_STOPPED_SECONDS, cancel_batches, is_stopped

log = structlog.get_logger(__name__)

STORE_PAUSE_SECONDS = 30.0
# A task that is resumed within seconds of deferring can be failed by the scheduler's stale success event (apache/airflow
# issue 72716), so a wait that ends in a worker lasts at least this long.
RESUME_AFTER_SECONDS = 20.0
LINGER_SHARE, LINGER_SECONDS = 0.1, (RESUME_AFTER_SECONDS, 600.0)  # of the wait before; the least and the most
_last_words: set[asyncio.Task[None]] = set()  # the event loop keeps no strong reference to its tasks


class ChainTrigger(BaseTrigger):
    """Looks at the batches of a chain until there is nothing more to wait for, or not for all. Survives every error of a look.

    `ends_task` ends the task in the triggerer, with no worker at all; otherwise a worker is resumed. `later`: those of the shards that
    something has failed for that may pass.
    """

    def __init__(self, run_uri: str, chain: str, ends_task: bool = True, later: str = "") -> None:
        super().__init__()
        self.run_uri, self.chain, self.ends_task, self.later = run_uri, chain, ends_task, later
        self._place: tuple[Site, Run] | None = None
        self._batches: dict[str, str] = {}  # by shard, what is waited for, once it is known
        self._bell: Doorbell | None = None  # that may end a pause early

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """See BaseTrigger."""
        kwargs = {"run_uri": self.run_uri, "chain": self.chain, "ends_task": self.ends_task, "later": self.later}
        return f"{type(self).__module__}.{type(self).__qualname__}", kwargs

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """All shards are waited for at the same time; the first that is over waits a while for the others: every round takes a process."""
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            waits = {shard: group.create_task(self._wait(shard)) for shard in shards_of(self.chain)}
            await asyncio.wait(waits.values(), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(waits.values(), timeout=linger_seconds(time.monotonic() - started))
            over = [shard for shard, wait in waits.items() if wait.done()]
            for wait in waits.values():
                wait.cancel()
        if self.ends_task:
            yield TaskSuccessEvent()
        else:
            await asyncio.sleep(max(0.0, RESUME_AFTER_SECONDS - (time.monotonic() - started)))
            yield TriggerEvent({"over": chain_of(over), "goes_on": chain_of([shard for shard in waits if shard not in over])})

    async def _wait(self, shard: str) -> None:
        """Every look runs in a thread: provider clients block, and the triggerer has one event loop for everybody."""
        looks: Iterator[float] | None = None
        if shard in shards_of(self.later):
            await asyncio.sleep(ERROR_PAUSE_MAX_SECONDS)
        while True:
            try:
                if looks is None:
                    news = News(shard)
                    looks = await asyncio.to_thread(self._looks, shard, news)
                pause = await asyncio.to_thread(next, looks, None)
            except Transient as error:  # of the store; the provider's are handled by the wait itself
                news(error)
                looks, self._place, pause = None, None, STORE_PAUSE_SECONDS
            except Exception as error:  # noqa: BLE001 — collect meets the same on a worker, where it is reported
                news(error)
                pause = None
            if pause is None:
                break
            await self._pause(shard, pause)
        if not self.ends_task and isinstance(news.last, Exception):
            await asyncio.sleep(ERROR_PAUSE_MAX_SECONDS)  # where only the triggerer meets it, each round would be a process for nothing

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

    def _looks(self, shard: str, news: News) -> Iterator[float]:
        site, run = self._place = self._place or run_at(self.run_uri, "triggerer")
        move = next_move(site.ledger.attempts(shard), now=site.now())
        self._bell = doorbell()
        if isinstance(move, Attach):
            self._batches[shard] = move.receipt.batch_id
        return pauses(site, run, shard, seen=news)

    def _cancel_if_stopped(self) -> None:
        ti = cast("Any", self.task_instance)
        if not is_stopped(ti):
            log.info("The task goes on, so its batches do too", run=self.run_uri)
            return
        if "{{" in self.chain:  # killed while its templates were still being rendered
            self.render_template_fields(ti.get_template_context())
        cancel_batches(*run_at(self.run_uri, "triggerer"), shards_of(self.chain))


def linger_seconds(waited: float) -> float:
    """How long the first shard that is over waits for the others of its chain."""
    least, most = LINGER_SECONDS
    return min(max(LINGER_SHARE * waited, least), most)


class News:
    """Logs what is news of a batch: another status, another tenth done, a look that failed. A wait may look thousands of times."""

    def __init__(self, shard: str) -> None:
        self._shard = shard[:12]
        self._told: tuple[str, int] | None = None
        self.last: Snapshot | Exception | None = None

    def __call__(self, look: Snapshot | Exception) -> None:
        self.last = look
        if isinstance(look, Exception):
            log.warning("A look failed", shard=self._shard, error=str(look), kind=type(look).__name__)
            return
        news = look.status, 10 * look.done // max(look.total, 1)
        if news != self._told:
            self._told = news
            log.info("Batch seen", shard=self._shard, status=look.status, done=look.done, total=look.total)

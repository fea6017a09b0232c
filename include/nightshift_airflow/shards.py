"""The tasks of a chain of shards: submit, wait, collect. What happens to one shard holds up none of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from threading import Event, Thread
from typing import Any

from airflow.sdk import BaseOperator
from airflow.triggers.base import StartTriggerArgs

from nightshift.errors import BatchUnfinished, NightshiftError, Permanent, QueueFull, ShardHeld, ShardsFailed
from nightshift.runs import Run, Site
from nightshift.steps.collect import collect
from nightshift.steps.submit import submit
from nightshift_airflow.chains import chain_of, shards_of
from nightshift_airflow.retries import RETRIES
from nightshift_airflow.site import owner_of, run_at
from nightshift_airflow.stops import cancel_batches, is_stopped
from nightshift_airflow.tasks import keep_problem
from nightshift_airflow.waits import ChainTrigger


class ChainTask(BaseOperator):
    """What the tasks of a chain have in common."""

    template_fields = ("run_uri", "chain")
    _ti: Any = None  # while it is on a worker
    _stopped: Event
    _killing: Thread | None = None

    def __init__(self, *, run_uri: str, chain: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run_uri, self.chain = run_uri, chain

    @contextmanager
    def at_work(self, context: Any) -> Iterator[tuple[Site, Run]]:
        """The site and the run, for work that a person may stop: its batches are cancelled then.

        Also what was just being created as the signal came, and what is done before Airflow sends one, with a heartbeat.
        """
        self._ti, self._stopped = context["ti"], Event()
        try:
            site, run = run_at(self.run_uri, owner_of(context))
            yield replace(site, stopped=self._stopped.is_set), run
        finally:
            if self._killing is not None:
                self._killing.join()
            self._end_if_stopped()

    def on_kill(self) -> None:
        """Cancel the batches when a person stopped the task, but not when its worker is to end.

        In a thread of its own: Airflow (3.3.2) calls this in the middle of whatever the task does, goes on with that, and kills it after
        five seconds.
        """
        if self._ti is not None:
            self._killing = Thread(target=self._end_if_stopped, daemon=True)
            self._killing.start()

    def _end_if_stopped(self) -> None:
        if is_stopped(self._ti):
            self._stopped.set()  # nothing more is sent
            cancel_batches(*run_at(self.run_uri, "a task that was stopped"), shards_of(self.chain))


class SubmitShards(ChainTask):
    """The task `submit`."""

    def execute(self, context: Any) -> str:
        """Bring the shards to the provider, each once; the chain. A shard that fails is collect's to report, unless all of them do."""
        with self.at_work(context) as (site, run):
            failed = [error for shard in shards_of(self.chain) if (error := self._submit(site, run, shard))]
        if len(failed) == len(shards_of(self.chain)):
            raise min(failed, key=lambda error: isinstance(error, Permanent))  # what may pass is tried again
        return self.chain

    def _submit(self, site: Site, run: Run, shard: str) -> Exception | None:
        """What a shard fails with."""
        try:
            receipt = submit(site, run, shard)
            self.log.info("Shard %s: %s", shard[:12], f"batch {receipt.batch_id}" if receipt else "settled earlier")
        except ShardHeld as held:
            self.log.info("%s The wait waits for that, too.", held)
        except Exception as error:  # noqa: BLE001 — whatever it is, the batches of the others are being paid for
            self.log.warning("Shard %s: %s", shard[:12], error)
            return error
        return None


class WaitForShards(ChainTask):
    """The task `wait`: starts and ends in the triggerer."""

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

    def execute(self, context: Any) -> None:
        """Where nothing starts from a trigger (`dag.test()`): defer in the ordinary way."""
        self.defer(trigger=ChainTrigger(self.run_uri, self.chain), method_name="execute_complete")

    def execute_complete(self, context: Any, event: Any = None) -> None:
        """Nothing to bring back: collect reads the ledger."""


@dataclass(frozen=True, slots=True)
class Round:
    """What became of shards that were taken up: nothing is said of those that are settled."""

    waiting: list[str] = field(default_factory=list)
    may_pass: dict[str, Exception] = field(default_factory=dict)  # to be tried again, later
    final: dict[str, Exception] = field(default_factory=dict)  # a person has to look


class CollectShards(ChainTask):
    """The task `collect`: harvest, and drive what failed again until the shards are settled, waiting in the triggerer."""

    def execute(self, context: Any) -> str:
        """The chain once all of its shards are settled. A retry takes up all of them, also those that had failed for good."""
        return self.go_on(context, {"over": self.chain, "goes_on": ""})

    def go_on(self, context: Any, event: Any, failed: Sequence[str] = (), tries: int = 0) -> str:
        """One round, over the shards that nothing is waited for any more. `failed`: what was said of those that are not to be settled;
        `tries`: how many rounds in a row have only tried again.

        Who failed ends the task, but not before all others are settled: their answers are being paid for.
        """
        with self.at_work(context) as (site, run):
            done = self._round(site, run, shards_of(event["over"]))
        waiting = [*shards_of(event["goes_on"]), *done.waiting]
        failed = [*failed, *_said(done.final)]
        tries = 0 if waiting else tries + 1
        if waiting or (failed and done.may_pass and tries <= RETRIES):
            later = list(done.may_pass)
            trigger = ChainTrigger(self.run_uri, chain_of([*waiting, *later]), ends_task=False, later=chain_of(later))
            self.defer(trigger=trigger, method_name="go_on", kwargs={"failed": failed, "tries": tries})
        if failed and len(shards_of(self.chain)) > 1:
            raise ShardsFailed([*failed, *_said(done.may_pass)])
        for error in (*done.final.values(), *done.may_pass.values()):
            raise error
        return self.chain

    def _round(self, site: Site, run: Run, shards: Sequence[str]) -> Round:
        """Take up shards, each for itself."""
        done = Round()
        for shard in shards:
            try:
                if not self._settled(site, run, shard):
                    done.waiting.append(shard)
            except (Permanent, QueueFull) as error:  # the queue was full for a day
                done.final[shard] = error
                with suppress(NightshiftError):
                    keep_problem(site.store, site.store.key_of(run.uri), self.task_id, error)
            except Exception as error:  # noqa: BLE001 — whatever it is, the batches of the others are being paid for
                done.may_pass[shard] = error
        for shard, error in {**done.final, **done.may_pass}.items():
            self.log.warning("Shard %s", shard[:12], exc_info=error)
        return done

    def _settled(self, site: Site, run: Run, shard: str) -> bool:
        """Settle a shard, if it can be now; one that cannot is with the provider, or waits to be."""
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


def _said(errors: Mapping[str, Exception]) -> list[str]:
    return [f"Shard {shard[:12]}: {error or type(error).__name__}" for shard, error in errors.items()]

"""Random lives over one store: workers that run beside each other effect by effect, die, sleep through their leases and come back.

A hypothesis state machine on the core. Every worker is a thread that stops before each of its effects until the machine lets
it go on, so that any interleaving can be drawn, and shrunk. The provider is in memory; its bill is the judge.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import orjson
import pyarrow.parquet as pq
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from obstore.store import MemoryStore

from nightshift.errors import BatchUnknown, SubmissionInDoubt, Transient
from nightshift.job import Job, JobFile
from nightshift.providers.protocol import Garbage, Limits, Order, Reply, Snapshot
from nightshift.runs import Run, Site
from nightshift.shapes import Receipt
from nightshift.steps.approve import approve
from nightshift.steps.assemble import assemble
from nightshift.steps.audit import audit
from nightshift.steps.collect import collect
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.publish import publish
from nightshift.steps.submit import submit
from nightshift.stores.ledger import LEASE
from nightshift.stores.objects import Done, Objects

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
ROWS = 14
WINDOWS = ((0, 8), (4, 12), (0, 14))  # the rows of each run: each overlaps the others
PATIENCE_SECONDS = 60.0
JOB = Job(
    spec=JobFile.model_validate(
        {
            "name": "reviews",
            "input": {"uri": "memory://input/*", "id": "id"},
            "request": {"provider": "openai", "model": "gpt-5.4-nano", "prompt": "-", "parameters": {"max_output_tokens": 10}},
            "policy": {"publish_at_least": 0, "max_requests_per_shard": 5, "retry": {"errored": 5}},
        }
    ),
    prompt_source="user:\n{{ text }}\n",
    answer_schema=None,
    expectations=(),
)


class Died(BaseException):
    """The process is gone: nothing that it would have done next happens."""


@dataclass
class Account:
    """The provider: what was created there, and what it bills."""

    batches: dict[str, tuple[str, list[str], datetime]] = field(default_factory=dict)  # id → token, custom ids, when
    bill: Counter[str] = field(default_factory=Counter)
    errored: set[str] = field(default_factory=set)
    answers_to_lose: int = 0

    def create(self, token: str, lines: list[str], now: datetime) -> Receipt:
        """Take a batch. Every third request meets one error, which is not billed."""
        batch_id = f"b{len(self.batches) + 1}"
        self.batches[batch_id] = (token, lines, now)
        for custom_id in lines:
            if self.fails(custom_id, batch_id):
                self.errored.add(f"{custom_id} {batch_id}")
            else:
                self.bill[custom_id] += 1
        return Receipt(batch_id=batch_id, token=token, created_at=now)

    def fails(self, custom_id: str, batch_id: str) -> bool:
        """Whether a request meets its one error in this batch."""
        met = [mark for mark in self.errored if mark.startswith(custom_id)]
        return f"{custom_id} {batch_id}" in met if met else int(custom_id[:2], 16) % 3 == 0


class Life(threading.Thread):
    """A worker process: it works on one run until it ends, dies, or meets something that it has to come back for."""

    def __init__(self, machine: Lives, number: int, run: int) -> None:
        super().__init__(daemon=True)
        self.number, self.wanted, self._machine = number, run, machine
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._dying = False
        self.error: BaseException | None = None
        self.published, self.ended = False, False
        self.sending = False  # it has asked whether its claim still holds, and has not sent yet

    def run(self) -> None:
        """The thread."""
        try:
            self.effect()
            self._machine.work(self)
            self.published = True
        except (Transient, Died) as error:
            self.error = error
        except BaseException as error:  # noqa: BLE001 — whatever it is, the machine's invariants show it
            self.error = error
            self._machine.failures.append(error)
        finally:
            self.ended = True
            self._stopped.release()

    def effect(self) -> None:
        """Stop before an effect until the machine says go; dead workers do not come back from it."""
        self._stopped.release()
        if not self._go.acquire(timeout=PATIENCE_SECONDS) or self._dying:
            raise Died

    def advance(self, effects: int) -> None:
        """Let it have some effects, and stop before the next one."""
        for _ in range(effects):
            if self.ended:
                return
            self._go.release()
            assert self._stopped.acquire(timeout=PATIENCE_SECONDS), "a worker hangs"

    def die(self) -> None:
        """Before its next effect."""
        self._dying = True
        if not self.ended:
            Lives.deaths += 1
            self._go.release()
        self.join(PATIENCE_SECONDS)


class Watched(Objects):
    """The store as one worker has it: each change waits for the machine."""

    def __init__(self, store: MemoryStore, life: Life) -> None:
        super().__init__("memory://", store)
        self._life = life

    def _change(self, verb: str, key: str, act: Callable[[], Done]) -> Done:
        self._life.effect()
        return super()._change(verb, key, act)


class InMemory:
    """The provider as one worker has it; see Provider."""

    where = "memory://provider"

    def __init__(self, account: Account, life: Life, now: Callable[[], datetime]) -> None:
        self._account, self._life, self._now = account, life, now
        self._uploads: dict[str, list[str]] = {}

    def check(self, model: str) -> None:
        return

    def limits(self, model: str) -> Limits:
        return Limits(requests=50, request_bytes=1_000_000)

    def upload(self, token: str, path: Path) -> str:
        self._uploads[token] = [orjson.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]
        return token

    def create(self, order: Order, may_send: Callable[[], bool]) -> Receipt:
        self._life.effect()
        if not may_send():
            raise Transient("lapsed")
        self._life.sending = True
        self._life.effect()
        self._life.sending = False
        receipt = self._account.create(order.token, self._uploads[order.uploaded], self._now())
        if self._account.answers_to_lose:
            self._account.answers_to_lose -= 1
            raise SubmissionInDoubt(order.token)
        self._life.effect()
        return receipt

    def find(self, tokens: Sequence[str], since: datetime) -> Receipt | None:
        self._life.effect()
        found = {token: (batch_id, at) for batch_id, (token, _, at) in reversed(self._account.batches.items()) if token in tokens}
        for token in tokens:
            if token in found:
                return Receipt(batch_id=found[token][0], token=token, created_at=found[token][1])
        return None

    def is_busy(self) -> bool:
        return False

    def poll(self, batch_id: str, *, waiting: bool = False) -> Snapshot:
        self._life.effect()
        if batch_id not in self._account.batches:
            raise BatchUnknown(self.where, batch_id)
        return Snapshot(state="ended", status="completed", done=0, total=0, result_files=(batch_id,), reasons=(), bad_lines={})

    def replies(self, snapshot: Snapshot, scratch: Path) -> Iterator[Reply | Garbage]:
        batch_id = snapshot.result_files[0]
        for custom_id in self._account.batches[batch_id][1]:
            if f"{custom_id} {batch_id}" in self._account.errored:
                yield Reply(custom_id=custom_id, outcome="errored", reason="a bad day", retryable=True)
            else:
                yield Reply(custom_id=custom_id, outcome="succeeded", text="yes", paid=True, input_tokens=1, output_tokens=1)

    def clean(self, token: str, batch_id: str | None) -> None:
        return

    def cancel(self, batch_id: str) -> None:
        return


class Lives(RuleBasedStateMachine):
    """Three overlapping runs on one store, any number of workers on each."""

    deaths = 0  # over all examples of this process

    @initialize()
    def begin(self) -> None:
        """An input per run, an account, and a clock that only the machine moves."""
        self.store, self.input, self.account = MemoryStore(), MemoryStore(), Account()
        self.clock, self.lives, self.failures = NOON, list[Life](), list[BaseException]()
        self.scratch = TemporaryDirectory(prefix="nightshift-chaos-")
        rows = [orjson.dumps({"id": f"r{i}", "text": f"row {i}"}) + b"\n" for i in range(ROWS)]
        for number, (start, end) in enumerate(WINDOWS):
            Objects("memory://input", self.input).put(f"run-{number}.jsonl", b"".join(rows[start:end]))

    @rule(runs=st.lists(st.integers(0, len(WINDOWS) - 1), min_size=1, max_size=3))
    def workers_start(self, runs: list[int]) -> None:
        """Workers begin on runs, or begin again: a retry, a cleared task, another Airflow."""
        for run in runs[: 4 - len(self._alive())]:
            life = Life(self, len(self.lives), run)
            self.lives.append(life)
            life.start()
            assert life._stopped.acquire(timeout=PATIENCE_SECONDS)

    @rule(pick=st.integers(0, 3), effects=st.sampled_from([1, 2, 3, 5, 8, 13, 21, 34]))
    def worker_goes_on(self, pick: int, effects: int) -> None:
        """One of the workers has some effects."""
        if alive := self._alive():
            alive[pick % len(alive)].advance(effects)

    @rule(effects=st.sampled_from([3, 8, 21, 34]))
    def workers_go_in_step(self, effects: int) -> None:
        """Every worker has an effect, then every worker the next: they meet at the same objects."""
        for _ in range(effects):
            for life in self._alive():
                life.advance(1)

    @rule(pick=st.integers(0, 3))
    def worker_dies(self, pick: int) -> None:
        """SIGKILL, before its next effect."""
        if alive := self._alive():
            alive[pick % len(alive)].die()

    @rule(seconds=st.sampled_from([1, 20, 45, 100, 1000]))
    def time_passes(self, seconds: int) -> None:
        """Workers sleep meanwhile, wherever they are.

        Except where one has asked whether its claim holds and has not sent yet: no ledger can close that moment, only bound it.
        """
        if not any(life.sending for life in self._alive()):
            self.clock += timedelta(seconds=seconds)

    @precondition(lambda self: self.account.answers_to_lose < 2)
    @rule()
    def answer_is_lost(self) -> None:
        """The next create call is accepted, and its answer never comes."""
        self.account.answers_to_lose += 1

    @invariant()
    def nothing_is_paid_twice(self) -> None:
        """At no moment has any request been billed twice."""
        if hasattr(self, "account"):
            twice = [key[:12] for key, times in self.account.bill.items() if times > 1]
            assert not twice, f"paid twice: {twice}"
            assert not self.failures, f"a worker failed: {self.failures[0]!r}"

    def teardown(self) -> None:
        """Everybody dies; then each run is brought to its end, and the books are compared."""
        if not hasattr(self, "account"):
            return
        for life in self.lives:
            life.die()
        self.account.answers_to_lose = 0
        for number in range(len(WINDOWS)):
            self._finish(number)
        self.nothing_is_paid_twice()
        self._compare()
        self.scratch.cleanup()

    def work(self, life: Life) -> None:
        """What a worker does: every step, in order, from the beginning."""
        store, run = Watched(self.store, life), life.wanted
        provider = InMemory(self.account, life, lambda: self.clock)
        site = Site(
            store=store,
            open_input=lambda pattern: (Objects("memory://input", self.input), pattern.removeprefix("memory://input/")),
            open_provider=lambda request: provider,
            owner=f"worker {life.number}",
            poll_seconds=0,
            scratch_folder=Path(self.scratch.name),
            now=lambda: self.clock,
        )
        begun = discover(site, JOB, pattern=f"memory://input/run-{run}.jsonl", label=f"run {run}", run=f"run{run}", dates={})
        approved = approve(site, begun, plan(site, begun), ask=lambda: True)
        for shard in approved.shards:
            self._settle(site, begun, shard)
        assembled = assemble(site, begun, approved)
        publish(site, begun, assembled, audit(site, begun, approved, assembled))

    def _settle(self, site: Site, run: Run, shard: str) -> None:
        while True:
            submit(site, run, shard)
            if collect(site, run, shard) is not None:
                return

    def _alive(self) -> list[Life]:
        return [life for life in self.lives if not life.ended]

    def _finish(self, run: int) -> None:
        for _ in range(30):
            life = Life(self, len(self.lives), run)
            self.lives.append(life)
            life.start()
            assert life._stopped.acquire(timeout=PATIENCE_SECONDS)
            life.advance(10_000)
            if life.published:
                return
            self.clock += LEASE + timedelta(seconds=1)
        raise AssertionError(f"run {run} does not come to its end: {life.error!r}")

    def _compare(self) -> None:
        objects = Objects("memory://", self.store)
        receipts = {
            orjson.loads(objects.get(found.key) or b"{}")["batch_id"] for found in objects.scan("shards") if "/receipt-" in found.key
        }
        assert receipts == set(self.account.batches), "a batch that was billed is not in the ledger"
        assert len(self.account.bill) == ROWS, "not every request was paid for"
        for number, (start, end) in enumerate(WINDOWS):
            assert self._published(objects, number) == Counter(f"r{i}" for i in range(start, end)), f"run {number} lost or doubled a row"

    def _published(self, objects: Objects, number: int) -> Counter[str]:
        ids: Counter[str] = Counter()
        for kind in ("results", "quarantine"):
            for folder in objects.folders(f"{kind}/reviews"):
                if f"input=run-{number}-" in folder:
                    manifest = orjson.loads(objects.get(f"{folder}/_manifest.json") or b"{}")
                    for part in manifest["parts"]:
                        ids.update(pq.read_table(objects.open(f"{folder}/{part['name']}")).column("id").to_pylist())
        return ids

"""Every crash point of the way: a worker killed before and after each effect, its successor, and what the bill says then."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pyarrow.parquet as pq

from bench.chaos.worker import Order
from local.s3 import served_s3
from local.stack import AWS
from nightshift.providers.window import START
from nightshift.rehearsal.served import Served, serve
from nightshift.shapes import ProviderName

JOB: dict[str, Any] = {
    "name": "reviews",
    "input": {"uri": "file:///set/by/the/order", "id": "id", "require": {"text": {"min_length": 1}}},
    "request": {"provider": "openai", "model": "gpt-5.4-nano", "prompt": "prompt.md", "parameters": {"max_output_tokens": 60}},
    "output": {"schema": "schema.json"},
    "policy": {"publish_at_least": 0.5, "max_requests_per_shard": 9, "retry": {"errored": 3}, "monthly_budget_usd": 1},
}
CHANGES: dict[ProviderName, dict[str, dict[str, Any]]] = {
    "openai": {},
    "bedrock": {"request": {"provider": "bedrock", "model": "amazon.nova-lite-v1:0"}},
    "live": {"request": {"provider": "live"}, "policy": {"max_requests_per_shard": 100}},
}  # of the job, section by section
ROWS: dict[ProviderName, int] = {"openai": 24, "bedrock": 24, "live": 80}  # on demand more than are in flight at a time
IN_FLIGHT = 2 * int(START)  # on demand at a time: the window begins with START and has not doubled by the end of so few
CREATE_CALLS: dict[ProviderName, str] = {"openai": "POST /v1/batches #", "bedrock": "POST /model-invocation-job #", "live": "put live/"}
PROMPT = "system:\nJudge the review.\n\nuser:\n{{ text }}\n"
SCHEMA = {
    "type": "object",
    "properties": {"sentiment": {"type": "string", "enum": ["positive", "neutral", "negative"]}},
    "required": ["sentiment"],
    "additionalProperties": False,
}
AHEAD_SECONDS = 200.0  # by which a successor's clock is ahead of the dead one's: every lease has lapsed
ROUNDING = 1e-6  # dollars that sums of floats may differ by
LIVES = 8  # that a run gets before it counts as stuck


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to die."""

    scenario: str
    die_at: str | None = None  # the point at which the first life ends
    then_at: str | None = None  # and that at which its successor does
    kill_after: float | None = None  # or the seconds after which it is killed
    rivals: int = 1  # workers that begin at one moment
    faults: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the provider's bill and the published files say of one case."""

    scenario: str
    died: bool
    duplicate_batches: int = 0  # billed, and either unknown to the ledger or asking what was paid already
    lost_rows: int = 0
    double_outcomes: int = 0
    torn: bool = False  # a reader in between saw neither the old partition nor the new one
    misbooked: bool = False  # the account of the month does not say what the bill says, or holds room for what is over
    stuck: str | None = None
    usd: float = 0.0
    repeated: int = 0  # requests on demand that were in flight when somebody died, and were asked again


class Worker:
    """A worker process that is ready for orders."""

    def __init__(self, log: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.chaos.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("ab"), text=True
        )

    def live(self, order: Order, kill_after: float | None = None) -> int:
        """Carry out an order; its exit status, negative for a signal."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(asdict(order)), file=self._process.stdin, flush=True)
        child = int(self._process.stdout.readline())
        if kill_after is not None:
            threading.Timer(kill_after, _kill, [child]).start()
        return int(self._process.stdout.readline())

    def stop(self) -> None:
        """No more orders."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)


class Matrix:
    """A job, an input that replaces an older one, and the state in which every case begins."""

    def __init__(self, folder: Path, workers: int, provider: ProviderName = "openai") -> None:
        self._folder, self.provider = folder, provider
        self._job, self._input, self._ids = (
            folder / "jobs" / "reviews.yaml",
            folder / "input" / "reviews.jsonl",
            _ids(_rows(ROWS[provider])),
        )
        self._workers: SimpleQueue[Worker] = SimpleQueue()
        self._all = [Worker(folder / "workers.log") for _ in range(workers)]
        for worker in self._all:
            self._workers.put(worker)
        self._write_job()
        self._begin = folder / "begin"
        self._begin_with(_old_rows(ROWS[provider]))
        self._input.write_bytes(_lines(_rows(ROWS[provider])))

    def stop(self) -> None:
        """Let the workers go."""
        for worker in self._all:
            worker.stop()

    def points(self) -> tuple[list[str], float]:
        """Every crash point of a life without a death, in order, and what it costs."""
        with self._place("clean") as place:
            status = self._live(place, "clean")
            assert status == 0, f"the run without a death ended with {status}: see workers.log in {self._folder}"
            points = _points(place.folder / "clean.log")
            return points, self._judge(place, Case(scenario="clean"), died=False, torn=False, stuck=None).usd

    def successors_points(self, die_at: str) -> list[str]:
        """Every crash point of the life that comes after a death."""
        with self._place("successor") as place:
            self._live(place, "first", Case(scenario="first", die_at=die_at))
            self._live(place, "second", ahead=AHEAD_SECONDS)
            return _points(place.folder / "second.log")

    def run(self, cases: Iterable[Case], at_once: int, seen: Callable[[Verdict], None]) -> list[Verdict]:
        """Every case, several at once; `seen` is told of each."""

        def one(numbered: tuple[int, Case]) -> Verdict:
            verdict = self._case(*numbered)
            seen(verdict)
            return verdict

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, enumerate(cases)))

    def _case(self, number: int, case: Case) -> Verdict:
        with self._place(f"case-{number}") as place:
            before = _seen_ids(place.store)
            place.server.faults(**{**FAULTS, **case.faults})
            with ThreadPoolExecutor(case.rivals) as pool:
                lives = [
                    pool.submit(self._live, place, f"life-{i}", case if i == 0 else Case(scenario="rival")) for i in range(case.rivals)
                ]
                statuses = [life.result() for life in lives]
            between = _seen_ids(place.store)
            torn = between not in (before, self._ids["succeeded"])
            died = statuses[0] == -signal.SIGKILL
            time.sleep(
                case.faults.get("list_lag_seconds", 0.0)
            )  # a lease is longer than a list lags; here only clocks are ahead, time is not
            if case.then_at and died:
                statuses = [self._live(place, "successor", replace(case, die_at=case.then_at), ahead=AHEAD_SECONDS)]
                died = statuses[0] == -signal.SIGKILL
            stuck = None if 0 in statuses else self._finish(place)
            return self._judge(place, case, died=died, torn=torn, stuck=stuck)

    def _finish(self, place: Place) -> str | None:
        """Successors, until one of them brings the run to its end; why none did."""
        for life in range(1, LIVES):
            if self._live(place, f"after-{life}", ahead=AHEAD_SECONDS * (life + 1)) == 0:
                return None
        return f"{LIVES - 1} successors did not bring it to its end"

    def _live(self, place: Place, name: str, case: Case | None = None, ahead: float = 0.0) -> int:
        order = Order(
            store=f"file://{place.store}", provider=place.server.url, key=place.server.key, job=str(self._job),
            input=f"file://{self._input}", owner=name, log=str(place.folder / f"{name}.log"),
            die_at=case.die_at if case else None, ahead_seconds=ahead, files=f"s3://{BUCKET}/{place.folder.name}",
        )  # fmt: skip
        worker = self._workers.get()
        try:
            return worker.live(order, case.kill_after if case else None)
        finally:
            self._workers.put(worker)

    def _judge(self, place: Place, case: Case, *, died: bool, torn: bool, stuck: str | None) -> Verdict:
        bill = place.server.bill()
        receipts = [json.loads(path.read_bytes())["batch_id"] for path in (place.store / "shards").glob("*/receipt-*.json")]
        known = {name.rpartition("/")[2] for name in receipts}  # of Bedrock's ARN the id
        paid_again = sum(times - 1 for times in bill["by_request"].values())
        orphans = sum(1 for line in bill["by_batch"] if line["tier"] == "batch" and line["batch_id"] not in known)
        allowed = IN_FLIGHT * (2 if case.then_at else 1) if self.provider == "live" else 0
        outcomes = Counter(_outcome_ids(place.store))
        wanted = self._ids["succeeded"] | self._ids["rejected"]
        return Verdict(
            scenario=case.scenario,
            died=died,
            duplicate_batches=orphans + (paid_again > allowed),
            repeated=paid_again if self.provider == "live" else 0,
            lost_rows=len(wanted - set(outcomes)),
            double_outcomes=sum(1 for times in outcomes.values() if times > 1),
            torn=torn,
            misbooked=stuck is None and self._is_misbooked(place, _usd(bill)),
            stuck=stuck,
            usd=_usd(bill) - self._usd_before,
        )

    def _is_misbooked(self, place: Place, billed: float) -> bool:
        """Whether the month's account differs from the bill. On demand, what was in flight at a death is billed and never seen."""
        entries = [json.loads(path.read_bytes()) for path in sorted((place.store / "spending").glob(f"*/job-{JOB['name']}/*.json"))]
        booked, is_open = (float(entries[-1]["total"]), entries[-1]["open"] > 0) if entries else (0.0, False)
        is_other = booked > billed + ROUNDING if self.provider == "live" else abs(booked - billed) > ROUNDING
        return is_open or is_other

    @contextmanager
    def _place(self, name: str) -> Iterator[Place]:
        """A copy of the beginning, with a server of its own; gone afterwards."""
        folder = self._folder / name
        shutil.copytree(self._begin, folder)
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            server = serve(folder / "provider")
            stack.callback(server.stop)
            server.faults(**FAULTS)
            yield Place(folder=folder, store=folder / "store", server=server)

    def _write_job(self) -> None:
        self._job.parent.mkdir()
        self._job.write_text(json.dumps({**JOB, **{name: {**JOB[name], **changed} for name, changed in CHANGES[self.provider].items()}}))
        (self._job.parent / "prompt.md").write_text(PROMPT)
        (self._job.parent / "schema.json").write_text(json.dumps(SCHEMA))

    def _begin_with(self, rows: list[dict[str, Any]]) -> None:
        """Publish an older input, so that there is a partition to replace and answers to reuse."""
        self._input.parent.mkdir()
        self._input.write_bytes(_lines(rows))
        (self._begin / "store").mkdir(parents=True)
        server = serve(self._begin / "provider")
        server.faults(minimum_records=FAULTS["minimum_records"])
        try:
            place = Place(folder=self._begin, store=self._begin / "store", server=server)
            status = self._live(place, "old")
            assert status == 0, f"the older run ended with {status}: see workers.log in {self._folder}"
            self._usd_before = _usd(server.bill())
        finally:
            server.stop()


@contextmanager
def served_aws(state: Path) -> Iterator[None]:
    """An S3 with a bucket, found in the environment by this process and all its workers."""
    import boto3

    with served_s3(state) as url:
        os.environ.update({**AWS, "AWS_ENDPOINT_URL": url})
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one case happens."""

    folder: Path
    store: Path
    server: Served


FAULTS: dict[str, Any] = {"errored_once": 0.3, "minimum_records": 1}  # so that some shards are driven twice, all of them in batches
BUCKET = "chaos"


def _points(log: Path) -> list[str]:
    """The effects of a life, in order; of the many looks at a batch, which are not so many each time, only the first."""
    lines = dict.fromkeys(log.read_text().splitlines())
    return [line for line in lines if " GET " not in line or line.endswith(("#1", "#2"))]


def create_points(points: list[str], provider: ProviderName = "openai") -> list[str]:
    """The points around the calls that cost."""
    return [point for point in points if CREATE_CALLS[provider] in point]


def cases_of(
    points: list[str], successors: dict[str, list[str]], *, seed: int, rivals: int, timed: int, provider: ProviderName = "openai"
) -> list[Case]:
    """The matrix: every point; every point of the life after a death; lost answers, each with and without a death;

    deaths at any moment; rivals at one shard. `successors`: points of the second life, by the point at which the first ended.
    """
    draw = random.Random(seed)
    create = create_points(points, provider)
    lost: list[dict[str, Any]] = [
        {"create_500_after_accept": 1},
        {"create_cut_after_accept": 1},
        {"create_500_after_accept": 1, "list_lag_seconds": 3.0},
    ]
    if provider == "live":
        lost = [{"live_cut": 2}]
    return [
        *(Case(scenario="killed at an effect", die_at=point) for point in points),
        *(Case(scenario="killed twice", die_at=first, then_at=second) for first, seconds in successors.items() for second in seconds),
        *(Case(scenario="answer lost", faults=faults) for faults in [*lost, {"create_500": 1}]),
        *(Case(scenario="answer lost, then killed", faults=faults, die_at=point) for faults in lost for point in create[:4]),
        *(Case(scenario="killed at any moment", kill_after=draw.uniform(0.05, 2.5)) for _ in range(timed)),
        *(Case(scenario="rivals, one killed", rivals=2, kill_after=draw.uniform(0.3, 2.5)) for _ in range(rivals)),
    ]


def _rows(count: int) -> list[dict[str, Any]]:
    """Rows to be asked, 8 of them answered before, one asked twice, two rejected."""
    rows: list[dict[str, Any]] = [{"id": f"r{i}", "text": f"Room {i} was {'lovely' if i % 2 else 'awful'}."} for i in range(count)]
    return [*rows, {"id": "twice", "text": rows[20]["text"]}, {"id": "empty", "text": ""}, {"id": "none", "text": None}]


def _old_rows(count: int) -> list[dict[str, Any]]:
    return [*_rows(count)[:8], {"id": "gone", "text": "A row that the new file does not have."}]


def _ids(rows: list[dict[str, Any]]) -> dict[str, frozenset[str]]:
    return {
        "succeeded": frozenset(row["id"] for row in rows if row["text"]),
        "rejected": frozenset(row["id"] for row in rows if not row["text"]),
    }


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _seen_ids(store: Path) -> frozenset[str] | None:
    """The rows that a reader sees through the manifest; None where a part that it names is not there."""
    try:
        return frozenset(_partition_ids(store / "results"))
    except FileNotFoundError:
        return None


def _outcome_ids(store: Path) -> list[str]:
    """The row of every outcome that is published, in results and in quarantine."""
    return [*_partition_ids(store / "results"), *_partition_ids(store / "quarantine")]


def _partition_ids(root: Path) -> list[str]:
    ids: list[str] = []
    for manifest in root.glob("*/*/_manifest.json"):
        for part in json.loads(manifest.read_bytes())["parts"]:
            ids += pq.read_table(manifest.parent / part["name"], columns=["id"]).column("id").to_pylist()
    return ids


def _usd(bill: dict[str, Any]) -> float:
    return sum(line["usd"] for line in bill["by_batch"])


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def summarise(verdicts: list[Verdict], ideal_usd: float) -> dict[str, Any]:
    """The numbers of some verdicts. A case whose point was not reached (polls are not the same each time) is no crash point."""
    died = [verdict for verdict in verdicts if verdict.died or verdict.scenario == "answer lost"]
    return {
        "crash_points": len(died),
        "not_reached": len(verdicts) - len(died),
        "duplicate_batches": sum(verdict.duplicate_batches for verdict in verdicts),
        "lost_rows": sum(verdict.lost_rows for verdict in verdicts),
        "double_outcomes": sum(verdict.double_outcomes for verdict in verdicts),
        "torn_partitions": sum(verdict.torn for verdict in verdicts),
        "misbooked": sum(verdict.misbooked for verdict in verdicts),
        "stuck": sum(verdict.stuck is not None for verdict in verdicts),
        "repeated_requests": sum(verdict.repeated for verdict in verdicts),
        "bill_ratio": round(sum(verdict.usd for verdict in verdicts) / (ideal_usd * len(verdicts)), 4) if verdicts and ideal_usd else None,
    }

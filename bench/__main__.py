"""`make bench`: what the steps cost, against the limits of the machine and against the usual ways, in one sitting.

Commands take turns (A B C, A B C, …), each a process of its own; medians of CPU seconds (user and system) and the largest resident
set. Seconds of two sittings say little on a shared machine; ratios of one sitting do, so bars are ratios.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench import PEAK
from bench.peers import peers
from bench.steps import forget

FOLDER = Path(".nightshift/bench")
MANY = 500_000  # rows: a gigabyte of requests and more
RUN = ("plan", "collect", "assemble", "audit")  # the steps that are ours from rows to what is published


def touch_memory() -> None:
    """Write to half of the free memory once.

    A virtual machine is given its memory by its host as it is first written, and some hosts take it back seconds after it was freed.
    Whoever writes first would pay for that: the same plan took three times as long in the kernel.
    """
    with mmap.mmap(-1, psutil.virtual_memory().available // 2) as memory:
        for place in range(0, len(memory), mmap.PAGESIZE):
            memory[place] = 1


@dataclass(frozen=True, slots=True)
class Cost:
    """What one process took."""

    user: float  # seconds
    system: float  # seconds in the kernel, which moves bytes: where a host gives a virtual machine its memory late, it waits there
    wall: float
    rss: float  # MB, at most

    @property
    def cpu(self) -> float:
        """Seconds of both kinds."""
        return self.user + self.system


@dataclass(slots=True)
class Contender:
    """A command that takes its turn, or some that take it side by side, and what has to be gone before it."""

    name: str
    commands: Sequence[Sequence[str]]
    before: Callable[[], None] = lambda: None
    moves_much: bool = False  # so many bytes that it matters who has written to the memory before
    lines: str = ""  # the files of those that it makes or reads: its MB/s are theirs
    costs: list[Cost] = field(default_factory=list)

    def run(self) -> None:
        """Take a turn."""
        self.before()
        os.sync()  # what others have left to be written is written before, and not beside
        if self.moves_much:
            touch_memory()
        start = time.perf_counter()
        with ThreadPoolExecutor(len(self.commands)) as pool:
            each = list(pool.map(measured, self.commands))
        took, rss = time.perf_counter() - start, max(cost.rss for cost in each)
        self.costs.append(Cost(sum(cost.user for cost in each), sum(cost.system for cost in each), took, rss))

    @property
    def cpu(self) -> float:
        """CPU seconds, the median."""
        return statistics.median(cost.cpu for cost in self.costs)

    @property
    def user(self) -> float:
        """User seconds, the median."""
        return statistics.median(cost.user for cost in self.costs)

    @property
    def least(self) -> float:
        """CPU seconds of the best turn: what runs beside it only adds."""
        return min(cost.cpu for cost in self.costs)

    @property
    def wall(self) -> float:
        """Wall seconds, the median."""
        return statistics.median(cost.wall for cost in self.costs)

    @property
    def rss(self) -> float:
        """MB, the median of the peaks."""
        return statistics.median(cost.rss for cost in self.costs)


def measured(command: Sequence[str]) -> Cost:
    """Run a command of the benchmark to its end. Raises CalledProcessError where it fails, after what it has said of that."""
    with tempfile.NamedTemporaryFile() as told, tempfile.TemporaryFile() as said:  # some peers say a page for each row that they give up
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env={**os.environ, PEAK: told.name})
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.stderr.write(said.read().decode(errors="replace"))
            raise subprocess.CalledProcessError(process.returncode, command)
        rss = float(Path(told.name).read_text())
    return Cost(used.ru_utime, used.ru_stime, time.perf_counter() - start, rss)


def take_turns(contenders: Sequence[Contender], rounds: int) -> None:
    """Let each run once a round."""
    for _ in range(rounds):
        for each in contenders:
            each.run()
            print(f"  {each.name}: {each.costs[-1].cpu:.2f} CPU-s, {each.costs[-1].rss:.0f} MB", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Sitting:
    """All contenders over one number of rows."""

    rows: int
    by_name: dict[str, Contender]
    sizes: dict[str, int]  # bytes of the files that contenders make or read

    def per_cpu(self, name: str) -> float:
        """Rows per CPU second, start-up included."""
        return self.rows / self.by_name[name].cpu

    def mb_per_cpu(self, name: str) -> float | None:
        """MB per CPU second of the lines that are made or read; None where it is neither."""
        each = self.by_name[name]
        return self.sizes[each.lines] / 1e6 / each.cpu if each.lines else None


def sit(rows: int, rounds: int, *, where: Path = FOLDER, core: bool = False, slow: bool = False) -> Sitting:
    """Measure the steps over so many rows; `core`: no more than what CI tells regressions by; `slow`: others' ways, too."""
    folder, out = (where / f"{rows}").resolve(), (where / "out").resolve()
    if not (folder / "reviews.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        measured([sys.executable, "-m", "bench.reviews", str(folder / "reviews.parquet"), str(rows)])

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)

    def yardstick(name: str, lines: str = "") -> Contender:
        return Contender(name, [[sys.executable, "-m", "bench.yardsticks", name, str(folder), str(out)]], clear, rows >= MANY, lines)

    def step(name: str, *rest: Sequence[str], label: str | None = None, lines: str = "") -> Contender:
        command = [sys.executable, "-m", "bench.steps", name, str(folder)]
        return Contender(label or name, [[*command, *each] for each in rest or ((),)], lambda: forget(folder, name), rows >= MANY, lines)

    asked, told = "store/shards/*/requests.jsonl", "results/*"
    encoding = [yardstick("preescaped", asked), step("plan", lines=asked)]
    collecting = [yardstick("outer_typed", told), step("collect", lines=told)]
    after, beside = list[Contender](), list[Contender]()
    if not core:
        logic = step("plan", ["reviews-logic"], label="plan (logic)", lines=asked)
        encoding = [yardstick("read"), yardstick("jinja_orjson", asked), logic, step("encode", lines=asked), *encoding]
        halves = step("collect", ["0", "2"], ["1", "2"], label="collect, two processes", lines=told)
        collecting = [yardstick("copy", asked), halves, *collecting]
        after = [step("known"), step("assemble"), step("audit")]
    if slow:
        collecting = [yardstick("json_jsonschema", told), *collecting]
    take_turns(encoding, rounds)
    measured([sys.executable, "-m", "bench.steps", "submit", str(folder)])
    take_turns(collecting, rounds)
    take_turns(after, rounds)
    for peer in peers() if slow else ():
        if peer.is_there:
            peer.prepare(folder, out)
            beside += [Contender(name, [peer.command(name, folder, out)], clear) for name in peer.names]
    take_turns(beside, rounds)
    sizes = {files: sum(path.stat().st_size for path in folder.glob(files)) for files in (asked, told)}
    return Sitting(rows, {each.name: each for each in (*encoding, *collecting, *after, *beside)}, sizes)


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio of one sitting, and what it has to be."""

    what: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it is reached."""
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)


def bars(sitting: Sitting, middle: Sitting, small: Sitting) -> list[Bar]:
    """The bars that a sitting is held against; `middle`: over as many rows as the slow ones take; `small`: far fewer, for what grows."""
    of, found = sitting.by_name, list[Bar]()
    found.append(
        Bar("plan, rows per CPU second, against the pre-escaped ceiling", sitting.per_cpu("plan") / sitting.per_cpu("preescaped"), 0.60)
    )
    found.append(Bar("plan against render and orjson.dumps", sitting.per_cpu("plan") / sitting.per_cpu("jinja_orjson"), 2.0))
    found.append(
        Bar(
            "plan of a template with logic against render and orjson.dumps",
            sitting.per_cpu("plan (logic)") / sitting.per_cpu("jinja_orjson"),
            1.7,
        )
    )
    floor = of["read"].cpu + of["copy"].cpu
    found.append(Bar("plan against reading the columns and copying the requests", floor / of["plan"].cpu, 0.20))
    found.append(Bar("plan of known rows against plan of new ones", of["plan"].cpu / of["known"].cpu, 1.0))
    found.append(Bar("collect against typed outer lines", of["outer_typed"].cpu / of["collect"].cpu, 0.20))
    found.append(Bar("collect in two processes, wall time", of["collect"].wall / of["collect, two processes"].wall, 1.8))
    for step, slow, least in (
        ("collect", "json_jsonschema", 8.0),
        ("plan", "classifier-encode", 5.0),
        ("plan", "curator-encode", 60.0),
        ("collect", "classifier-collect", 4.0),
        ("collect", "curator-collect", 40.0),
    ):
        if slow in middle.by_name:
            ratio = middle.by_name[slow].cpu / middle.by_name[step].cpu
            found.append(Bar(f"{step} of {middle.rows:,} rows against {slow}", ratio, least))
    found.append(Bar("audit with 8 expectations, CPU against collect", of["audit"].cpu / of["collect"].cpu, most=1.0))
    found.append(Bar("audit, MB", of["audit"].rss, most=1000))
    for name in ("plan", "collect"):
        found.append(Bar(f"{name}, MB", of[name].rss, most=300))
        found.append(Bar(f"{name}, MB against {small.rows:,} rows", of[name].rss / small.by_name[name].rss, most=1.10))
    return found


def marginal(large: Sitting, small: Sitting, name: str) -> float:
    """CPU microseconds of one more row: what start-up costs is left out."""
    return (large.by_name[name].least - small.by_name[name].least) / (large.rows - small.rows) * 1e6


def table(sitting: Sitting) -> str:
    """A sitting as Markdown."""
    lines = [f"| {sitting.rows:,} rows | CPU-s | of them user | rows/CPU-s | MB/CPU-s | wall s | MB at most |", "|---|" + "---:|" * 6]
    for name, each in sitting.by_name.items():
        rates = f"{sitting.per_cpu(name):,.0f} | {_rounded(sitting.mb_per_cpu(name))}"
        lines.append(f"| {name} | {each.cpu:.2f} | {each.user:.2f} | {rates} | {each.wall:.2f} | {each.rss:.0f} |")
    run = [sitting.by_name[name] for name in RUN]
    whole = Cost(
        sum(each.user for each in run),
        sum(each.cpu - each.user for each in run),
        sum(each.wall for each in run),
        max(each.rss for each in run),
    )
    cells = f"{whole.cpu:.2f} | {whole.user:.2f} | {sitting.rows / whole.cpu:,.0f} | | {whole.wall:.2f} | {whole.rss:.0f}"
    lines.append(f"| whole run: {', '.join(RUN)} | {cells} |")
    return "\n".join(lines)


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def growth(sittings: Sequence[Sitting]) -> str:
    """What the steps take as the rows grow, as Markdown."""
    heads = " | ".join(f"{sitting.rows:,} rows" for sitting in sittings)
    lines = [f"| rows/CPU-s, MB | {heads} |", "|---|" + "---:|" * len(sittings)]
    for name in ("plan", "known", "collect", "assemble", "audit"):
        cells = " | ".join(f"{sitting.per_cpu(name):,.0f}, {sitting.by_name[name].rss:.0f}" for sitting in sittings)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and say by the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--small", type=int, default=10_000, help="rows of the sitting that growth is measured from")
    parser.add_argument("--middle", type=int, default=100_000, help="rows of the sitting that the slow ones take part in")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the medians there, too")
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    for peer in peers():
        if not peer.is_there:
            print(f"  {peer.module} is not here, so nothing is measured against it: {peer.how}", file=sys.stderr)
    wanted = sorted({given.small, given.middle, given.rows})
    by_rows = {rows: sit(rows, given.rounds, slow=rows == given.middle) for rows in wanted}
    sittings, held = list(by_rows.values()), bars(by_rows[given.rows], by_rows[given.middle], by_rows[given.small])
    for sitting in sittings:
        print(table(sitting), "\n")
    print(growth(sittings), "\n\n| bar | is | has to be |\n|---|---:|---:|", sep="")
    for bar in held:
        limit = f"≥ {bar.least:g}" if bar.least is not None else f"≤ {bar.most:g}"
        print(f"| {bar.what} | {bar.value:.2f}{'' if bar.holds else ' (missed)'} | {limit} |")
    if given.json:
        medians = {sitting.rows: {name: (each.cpu, each.wall, each.rss) for name, each in sitting.by_name.items()} for sitting in sittings}
        given.json.write_text(json.dumps(medians, indent=1))
    return 0 if all(bar.holds for bar in held) else 1


if __name__ == "__main__":
    sys.exit(main())

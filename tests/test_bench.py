"""What CI keeps of `make bench`: ratios of one sitting that a regression would move far beyond their noise."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bench.__main__ import Sitting, marginal, measured, sit

SMALL, LARGE = 4_000, 30_000
MOST_MB = 300
TRIES = 4


@dataclass
class Bench:
    """Two sittings, so that what start-up costs cancels out. They are sat again where other tests beside them may be to blame."""

    where: Path
    sittings: list[Sitting] = field(default_factory=list)
    tries: int = 0

    def sit(self) -> None:
        self.tries += 1
        again = [sit(rows, 1, where=self.where, core=True) for rows in (SMALL, LARGE)]
        for before, now in zip(self.sittings, again, strict=False):
            for name, contender in now.by_name.items():
                contender.costs += before.by_name[name].costs
        self.sittings = again

    def ratio(self, step: str, yardstick: str) -> float:
        small, large = self.sittings
        return marginal(large, small, step) / marginal(large, small, yardstick)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("bench"))
    made.sit()
    return made


@pytest.mark.parametrize(
    ("step", "yardstick", "most"),
    [
        pytest.param("plan", "preescaped", 4.0, id="plan against the pre-escaped ceiling: 1.6 when this was written"),
        pytest.param("collect", "outer_typed", 12.0, id="collect against typed outer lines: 5 when this was written"),
    ],
)
def test_one_more_row_costs_no_more_than_so_many_times_the_least(bench, step, yardstick, most):
    while bench.ratio(step, yardstick) > most and bench.tries < TRIES:
        bench.sit()
    assert bench.ratio(step, yardstick) <= most


def test_a_command_that_fails_is_told_in_its_own_words(capfd):
    with pytest.raises(subprocess.CalledProcessError):
        measured([sys.executable, "-c", "import sys; sys.exit('no rows')"])
    assert capfd.readouterr().err == "no rows\n"


@pytest.mark.parametrize("step", ["plan", "collect"])
def test_a_step_stays_within_its_memory(bench, step):
    assert all(sitting.by_name[step].rss <= MOST_MB for sitting in bench.sittings)

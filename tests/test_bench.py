"""What CI keeps of `make bench`: ratios of one sitting that a regression would move far beyond their noise."""

from __future__ import annotations

import pytest

from bench.__main__ import Sitting, marginal, sit

SMALL, LARGE = 4_000, 30_000
MOST_MB = 300


@pytest.fixture(scope="module")
def sittings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sitting, Sitting]:
    """Two sittings, so that what start-up costs cancels out."""
    where = tmp_path_factory.mktemp("bench")
    return sit(SMALL, 1, where=where, core=True), sit(LARGE, 1, where=where, core=True)


@pytest.mark.parametrize(
    ("step", "yardstick", "most"),
    [
        pytest.param("plan", "preescaped", 4.0, id="plan against the pre-escaped ceiling: 1.6 when this was written"),
        pytest.param("collect", "outer_typed", 18.0, id="collect against typed outer lines: 8 when this was written"),
    ],
)
def test_one_more_row_costs_no_more_than_so_many_times_the_least(sittings, step, yardstick, most):
    small, large = sittings
    ratio = marginal(large, small, step) / marginal(large, small, yardstick)
    assert ratio <= most, f"{step} takes {ratio:.1f} times as long as {yardstick}"


@pytest.mark.parametrize("step", ["plan", "collect"])
def test_a_step_stays_within_its_memory(sittings, step):
    assert all(sitting.by_name[step].rss <= MOST_MB for sitting in sittings)

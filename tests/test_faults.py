"""Four rows of the fault table, two of them slow; tests/bench_faults.py runs all of them.

pytest tests/test_faults.py
"""

from __future__ import annotations

import pytest
from bench_faults import Bench
from hub import Hub


@pytest.fixture(scope="module")
def bench(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), hub)


@pytest.mark.parametrize(
    "name",
    [
        *("kill_before_commit", "commit_lost"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sigterm", "bit_flipped")),
    ],
)
def test_a_fault_costs_no_more_than_the_steps_since_the_last_push(bench: Bench, name: str) -> None:
    """The row itself compares weights and curve with the uninterrupted run's."""
    outcome = bench.run(name)
    if name in ("sigterm", "commit_lost"):
        assert outcome.lost == 0

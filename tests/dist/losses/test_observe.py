"""What is observed on shards of a vocabulary is what is observed on all of it."""

from __future__ import annotations

import pytest

from mopd.losses.observe import Carry
from tests.helpers.dist import run_ranks
from tests.helpers.observed import case_of, expected, shard_observed

CASES = [("own", False), ("own", True), ("common", False), ("columns", False)]


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("carry", "whole"), CASES)
def test_shards_see_what_one_process_sees(carry: Carry, whole: bool, size: int) -> None:
    wanted = expected(case_of(carry, whole=whole), carry)
    for found in run_ranks(shard_observed, size, carry, whole, size):
        assert found == pytest.approx(wanted, abs=1e-6)

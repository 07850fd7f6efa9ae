"""A refactor keeps these numbers; a change of them says why in the same commit."""

import json

import pytest

from tests.helpers.golden import CASES, PATH, numbers


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    golden = json.loads(PATH.read_text())
    assert numbers(case) == pytest.approx(golden[case], rel=1e-12, abs=1e-12)

"""GOLD on a vocabulary cut over ranks: value and gradient of one process, ties included."""

from __future__ import annotations

import itertools

import pytest
import torch

from mopd.losses.divergence import Divergence
from tests.helpers.dist import run_ranks
from tests.helpers.gold_reference import run_gold
from tests.helpers.tp_gold import gold_shard_results, payload, tied_problem

JSD = Divergence(kind="jsd")
KINDS = [
    JSD,
    Divergence(kind="forward_kl"),
    Divergence(kind="reverse_kl"),
    Divergence(kind="mixed"),
    Divergence(kind="akl"),
    Divergence(kind="jsd", top_k_mode="renorm"),
]
OPTIONS = [
    *(
        {"divergence": JSD, "form": form, "top_u": top_u, "rest_bin": rest_bin, "ties": ties}
        for form, top_u, rest_bin, ties in itertools.product(
            ("dense", "listed"), (None, 2, 100), (True, False), (True, False)
        )
    ),
    *(
        {"divergence": kind, "form": "dense", "top_u": 3, "rest_bin": rest_bin, "ties": False}
        for kind, rest_bin in itertools.product(KINDS[1:], (True, False))
    ),
    {"divergence": JSD, "form": "dense", "ties": False, "temperature": 2.0, "lambda_chunk": 0.3},
    {"divergence": JSD, "form": "dense", "ties": True, "dtype": torch.float32},
    {"divergence": JSD, "form": "dense", "ties": True, "dtype": torch.float32, "top_u": 4},
]
SHAPES = [((23, 17), 9), ((23, 17), 0), ((17, 23), 17), ((9, 7), 4)]


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("sizes", "common"), SHAPES)
def test_loss_and_gradient_equal_one_process(sizes, common, size):
    """With 9 tokens on 4 ranks the last one has padding only, which lists do not offer."""
    empty = -(-sizes[0] // size) * (size - 1) >= sizes[0]
    options = [option for option in OPTIONS if not empty or option["form"] == "dense"]
    results = run_ranks(gold_shard_results, size, size, sizes, common, options)
    for number, option in enumerate(options):
        case = tied_problem(sizes, common, ties=option["ties"])
        rows = payload(case, option["form"])
        dtype = option.get("dtype", torch.float64)
        value, grad = run_gold(case.logits.to(dtype), rows, case.projection, option)
        close = 1e-9 if dtype == torch.float64 else 1e-5
        for rank in results:
            torch.testing.assert_close(rank[number][0], value, rtol=close, atol=close)
        joined = torch.cat([rank[number][1] for rank in results], dim=1)
        assert not joined[:, sizes[0] :].any(), option
        torch.testing.assert_close(joined[:, : sizes[0]], grad, rtol=close, atol=close)

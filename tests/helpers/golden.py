"""Golden numbers of the losses; ``python -m tests.helpers.golden`` rewrites them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from tests.helpers.losses import build_loss, run_head
from tests.helpers.random_losses import V_S, problem

PATH = Path(__file__).resolve().parents[1] / "golden" / "losses.json"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ctkd": ("ctkd", {}),
    "ctkd-jsd-tau2": ("ctkd", {"beta": 0.3, "temperature": 2.0}),
    "ctkd-chunk": ("ctkd", {"lambda_chunk": 1.0}),
    "gold": ("gold", {}),
    "gold-forward": ("gold", {"beta": 0.0, "weights": (0.2, 0.8)}),
    "kl-reverse": ("kl", {"beta": 1.0}),
    "kl-forward": ("kl", {"beta": 0.0}),
}


def numbers(case: str) -> dict[str, float]:
    """fp64: the value, the gradient's norm, and one entry of it."""
    name, options = CASES[case]
    fixed = problem(21, same_vocabulary=name == "kl")
    shard = ProjectionShard(fixed.projection, start=0, end=V_S, device=torch.device("cpu"))
    value, grad = run_head(
        build_loss(name, shard, **options),
        fixed.logits,
        fixed.rows,
        shard=VocabShard(start=0, size=V_S, vocab_size=V_S),
        projection=shard,
    )
    return {"value": float(value), "norm": float(grad.norm()), "entry": float(grad[3, 12])}


if __name__ == "__main__":
    PATH.write_text(json.dumps({case: numbers(case) for case in CASES}, indent=2) + "\n")

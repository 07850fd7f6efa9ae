"""Value and gradient of every loss on a vocabulary cut over ranks equal those of one process."""

import pytest
import torch

from mopd.losses.divergence import Divergence
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionShard
from tests.helpers.dist import run_ranks
from tests.helpers.losses import build_loss, run_head
from tests.helpers.random_losses import V_S, problem, whole_rows
from tests.helpers.tp_losses import shard_result

CASES = [
    ("ctkd", {"lambda_chunk": 0.7}),
    ("ctkd", {"beta": 0.4, "temperature": 2.0}),
    ("gold", {"lambda_chunk": 0.3}),
    ("gold", {"beta": 0.0, "top_u": 4, "weights": (0.2, 0.8)}),
    ("ctkd", {"divergence": Divergence(kind="akl")}),
    ("ctkd", {"divergence": Divergence(kind="skew_kl", top_k_mode="renorm")}),
    ("kl", {"divergence": Divergence(kind="reverse_kl", top_k_mode="genkl")}),
    ("kl", {"beta": 1.0}),
    ("kl", {"beta": 0.0, "temperature": 1.5}),
    ("kl", {"beta": 1.0, "divergence": Divergence(kind="forward_kl", top_k_mode="renorm")}),
    ("kl", {"whole_rows": True, "beta": 0.0, "temperature": 1.5}),
    ("kl", {"whole_rows": True, "beta": 0.4}),
    ("kl", {"whole_rows": True, "beta": 1.0}),
    ("kl", {"whole_rows": True, "divergence": Divergence(kind="skew_reverse_kl")}),
    ("kl", {"whole_rows": True, "beta": 1.0, "support": "student"}),
    ("kl", {"whole_rows": True, "beta": 0.5, "support": "union", "temperature": 2.0}),
]


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_loss_and_gradient_equal_one_process(name, options, size):
    whole = options.get("whole_rows", False)
    case = whole_rows(11) if whole else problem(11, same_vocabulary=name == "kl")
    projection = ProjectionShard(case.projection, start=0, end=V_S, device=torch.device("cpu"))
    value, grad = run_head(
        build_loss(name, projection, **options),
        case.logits,
        case.rows,
        shard=VocabShard(start=0, size=V_S, vocab_size=V_S),
        projection=projection,
    )
    results = run_ranks(shard_result, size, name, size, options)
    for other, _ in results:
        torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-9)
    joined = torch.cat([part for _, part in results], dim=1)
    assert not joined[:, V_S:].any()
    torch.testing.assert_close(joined[:, :V_S], grad, rtol=1e-8, atol=1e-9)

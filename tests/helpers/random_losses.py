"""One random but fixed loss problem, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mopd.types import Projection, TeacherRows
from tests.helpers.losses import make_projection, make_rows

V_S, V_T, N, K = 23, 17, 9, 5


@dataclass(frozen=True)
class Problem:
    """``logits`` [N, V_S] fp64."""

    logits: Tensor
    rows: TeacherRows
    projection: Projection


def problem(seed: int = 0, *, same_vocabulary: bool = False) -> Problem:
    """Boundaries on most rows, two-level fibres, chunks of one to three student tokens."""
    generator = np.random.default_rng(seed)
    weights = np.zeros((V_S, V_T + 1))
    for s in range(V_S):
        columns = generator.choice(V_T + 1, size=generator.integers(1, 4), replace=False)
        weights[s, columns] = generator.dirichlet(np.ones(len(columns)))
    common = np.full(V_T, -1)
    common[:9] = generator.permutation(V_S)[:9]
    # node 0 = (1,), node 1 = (1, 4), node 2 = (2,): members spread over the whole vocabulary
    nodes = {
        (1,): ({4: [3, 19, 12], 5: [7], 6: [22, 0]}, 1),
        (1, 4): ({2: [12], 9: [19]}, 3),
        (2,): ({3: [5, 21], 8: [14]}, -1),
    }
    position = [0, 1, 3, 4, 6, 8]
    ids = np.stack([generator.choice(V_T, size=K, replace=False) for _ in position])
    if same_vocabulary:
        ids = np.stack([generator.choice(V_S, size=K, replace=False) for _ in position])
    probs = np.stack([generator.dirichlet(np.ones(K + 1))[:K] for _ in position])
    ids[2, -1], probs[2, -1] = -1, 0.0
    # groups in the order of sorted paths: (1,): 4, 5, 6; (1, 4): 2, 9; (2,): 3, 8
    paths = [
        (0, [0, 1, 2, -2], generator.dirichlet(np.ones(4)).tolist(), 1.0),
        (3, [3, 4, -4], generator.dirichlet(np.ones(3)).tolist(), 1.0),
        (3, [[0, 6], [2, -2]], [0.2, 0.8], 1.0),
        (6, [5, 6], [0.3, 0.7], 0.6),
    ]
    tokens = [(0, 4, 0), (1, 5, 1), (2, 6, 1), (3, 22, 2), (4, 0, 3), (5, 9, 3), (6, 20, 4)]
    tokens += [(7, 2, 4), (8, 3, 5)]
    rows = make_rows(
        position,
        ids,
        probs,
        paths=paths,
        tokens=tokens,
        chunk_logprob=[-0.5, -1.5, -0.1, -2.0, -0.7, -3.0],
        chunk_size=[(1, 1), (2, 1), (1, 2), (2, 2), (2, 1), (1, 1)],
    )
    logits = torch.as_tensor(generator.normal(size=(N, V_S)) * 2.0)
    return Problem(
        logits=logits, rows=rows, projection=make_projection(weights, nodes=nodes, common=common)
    )


def whole_rows(seed: int = 0) -> Problem:
    """The same logits, judged by a teacher's logits over the student's vocabulary."""
    case = problem(seed, same_vocabulary=True)
    generator = np.random.default_rng(seed + 1000)
    count = len(case.rows.position)
    logits = generator.normal(size=(count, V_S)) * 2.0
    logits[0, 3] = -np.inf  # a token that the teacher never writes
    rows = replace(
        case.rows,
        row_weight=generator.uniform(0.5, 2.0, size=count),
        topk_ids=None,
        topk_logprobs=logits,
        log_tail=np.full(count, -np.inf),
    )
    return replace(case, rows=rows)

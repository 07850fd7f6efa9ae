"""Cross-entropy on the tokens that follow, alone and beside a teacher's loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from mopd.losses.cross_entropy import cross_entropy, targets
from mopd.losses.head import DistillationHead, TeacherTerm
from mopd.losses.source import LogitsSource
from mopd.losses.vocab import VocabShard
from tests.helpers.losses import step_of
from tests.helpers.random_losses import V_S
from tests.helpers.token_losses import build_opd, sampled, sft_micro

WHOLE = VocabShard(start=0, size=V_S, vocab_size=V_S)


def run(logits, micro, *, shard=WHOLE, scale=1.0, block_rows=2):
    """(value, gradient shaped like the logits)."""
    source = LogitsSource(logits.reshape(-1, logits.shape[-1]), shard)
    value = cross_entropy(source, micro, shard, scale=scale, block_rows=block_rows)
    return value, source.finish().view_as(logits)


def reference(logits, micro, *, scale=1.0):
    """torch's own, with labels shifted by hand."""
    leaf = logits.clone().requires_grad_()
    labels = torch.full(micro.tokens.shape, -100)
    labels[:, :-1] = torch.as_tensor(micro.tokens[:, 1:])
    labels[torch.as_tensor(~micro.response_mask)] = -100
    value = functional.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="sum")
    (value * scale).backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("block_rows", [1, 7, 100])
@pytest.mark.parametrize("seed", range(4))
def test_equals_torch(seed, block_rows):
    logits, micro = sft_micro(seed)
    value, gradient = run(logits, micro, scale=1.7, block_rows=block_rows)
    expected, slope = reference(logits, micro, scale=1.7)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-12)


def test_targets_are_the_tokens_that_follow():
    _, micro = sft_micro(0)
    positions, ids = targets(micro)
    assert positions.tolist() == [1, 2, 3, 12, 13]
    assert ids.tolist() == [*micro.tokens[0, 2:5], *micro.tokens[2, 3:5]]


def test_a_last_row_predicts_nothing():
    _, micro = sft_micro(0)
    mask = micro.response_mask.copy()
    mask[1, -1] = True
    with pytest.raises(ValueError, match="last row"):
        targets(replace(micro, response_mask=mask))


def test_finite_differences():
    logits, micro = sft_micro(2)
    _, gradient = run(logits, micro)
    token = int(micro.tokens[0, 2])
    for at in [(0, 1, token), (0, 1, 0), (2, 3, 5), (0, 0, 3), (1, 2, 1)]:
        bump = torch.zeros_like(logits)
        bump[at] = 1e-5
        slope = (run(logits + bump, micro)[0] - run(logits - bump, micro)[0]) / 2e-5
        assert float(gradient[at]) == pytest.approx(float(slope), abs=1e-8)


def test_nothing_to_train():
    logits, micro = sft_micro(0)
    micro = replace(micro, response_mask=np.zeros_like(micro.response_mask))
    value, gradient = run(torch.full_like(logits, torch.nan), micro)
    assert float(value) == 0.0
    assert not gradient.any()


def test_masked_rows_do_not_count_and_a_nan_in_a_trained_row_surfaces():
    logits, micro = sft_micro(0)
    clean, _ = run(logits, micro)
    dirty = logits.clone()
    dirty[1], dirty[0, 0], dirty[0, 4] = torch.nan, torch.inf, 1e4
    value, gradient = run(dirty, micro)
    assert float(value) == float(clean)
    assert torch.isfinite(gradient).all()
    assert not gradient[1].any()
    dirty[0, 2, 3] = torch.nan
    value, gradient = run(dirty, micro)
    assert torch.isnan(value)
    assert torch.isnan(gradient[0, 2]).all()


def test_an_unlikely_token_keeps_its_value():
    logits, micro = sft_micro(0)
    logits = logits.float()
    logits[0, 1, int(micro.tokens[0, 2])] = -300.0  # its probability is 0 in float32
    value, _ = run(logits, micro)
    expected, _ = reference(logits.double(), micro)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)


def test_padded_columns_do_not_count():
    logits, micro = sft_micro(1)
    padded = torch.cat([logits, torch.full((3, 5, 2), 50.0)], dim=-1)
    wide = VocabShard(start=0, size=V_S + 2, vocab_size=V_S)
    value, gradient = run(padded, micro, shard=wide)
    expected, slope = run(logits, micro)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[..., :V_S], slope)
    assert not gradient[..., V_S:].any()


def test_adds_to_what_other_terms_wrote():
    """In one source the gradients of several terms add up, also where blocks overlap in part."""
    logits, micro = sft_micro(0)
    mask = np.zeros_like(micro.response_mask)
    mask[0, 2], mask[1, 1], mask[2, 3] = True, True, True
    other = replace(micro, response_mask=mask)
    source = LogitsSource(logits.flatten(0, 1), WHOLE)
    cross_entropy(source, other, WHOLE, scale=2.0, block_rows=2)
    cross_entropy(source, micro, WHOLE, scale=0.5, block_rows=3)
    expected = run(logits, other, scale=2.0)[1] + run(logits, micro, scale=0.5)[1]
    torch.testing.assert_close(source.finish().view_as(logits), expected)


def test_the_head_adds_it_to_a_teachers_loss():
    case = sampled(0)
    micro, batch = step_of(case.rows, len(case.logits))
    mask = np.zeros((1, len(case.logits)), dtype=bool)
    mask[0, 2:6] = True
    micro = replace(micro, tokens=np.arange(len(case.logits))[None], response_mask=mask)
    loss = build_opd(importance="tis")
    head = DistillationHead(
        terms={"t": TeacherTerm(loss=loss, weight=1.0, projection=None)}, shard=WHOLE
    )

    def through(kd, ce):
        leaf = case.logits.clone().requires_grad_()
        scaled = replace(
            batch,
            denominators={"t": 6.0},
            num_response_tokens=8,
            distillation_weight=kd,
            crossentropy_weight=ce,
            num_tokens=3,
        )
        output = head(leaf[None], micro, scaled)
        output.total.backward()
        return output, leaf.grad

    value, gradient = run(case.logits[None], micro)
    only_teacher, slope = through(1.0, 0.0)
    both, found = through(0.5, 2.0)
    torch.testing.assert_close(both.total, 0.5 * only_teacher.total + 2.0 * 3 / 8 * value)
    torch.testing.assert_close(found, 0.5 * slope + 2.0 * 3 / 8 * gradient[0])
    assert float(both.metrics["loss/cross_entropy"]) == float(value)
    assert "loss/cross_entropy" not in only_teacher.metrics

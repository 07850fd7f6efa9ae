"""Our Adam is torch's AdamW with the step in the group."""

from __future__ import annotations

import pytest
import torch

from mopd.student.adam import Adam

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((7, 5), (11,), (3, 2, 4))
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def groups(members: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"params": members[:1], "weight_decay": 0.1},
        {"params": members[1:], "weight_decay": 0.0, "lr": 3e-3},
    ]


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_equals_adamw_step_by_step(beta1: float) -> None:
    ours, theirs = parameters(), parameters()
    options = OPTIONS | {"betas": (beta1, 0.98)}
    mine = Adam(groups(ours), **options, weight_decay=0.0, adam_w_mode=True)
    reference = torch.optim.AdamW(groups(theirs), **options, foreach=False)
    generator = torch.Generator().manual_seed(4)
    for step in range(1, 21):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator) * 10.0 ** (step % 5 - 3)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
            for name in ("exp_avg", "exp_avg_sq"):
                wanted = reference.state[b][name]
                torch.testing.assert_close(mine.state[a][name], wanted, rtol=1e-7, atol=0)
        assert [group["step"] for group in mine.param_groups] == [step, step]
        assert set(mine.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def test_without_a_gradient_nothing_changes_but_the_count() -> None:
    members = parameters()
    optimizer = Adam(groups(members), **OPTIONS, weight_decay=0.1, adam_w_mode=True)
    before = [member.detach().clone() for member in members]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(members, before, strict=True))
    assert optimizer.param_groups[0]["step"] == 1


def test_the_step_goes_through_the_state_dict() -> None:
    optimizer = Adam(groups(parameters()), **OPTIONS, weight_decay=0.1, adam_w_mode=True)
    optimizer.step()
    other = Adam(groups(parameters()), **OPTIONS, weight_decay=0.1, adam_w_mode=True)
    other.load_state_dict(optimizer.state_dict())
    assert [group["step"] for group in other.param_groups] == [1, 1]

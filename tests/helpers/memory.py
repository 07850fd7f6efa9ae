"""Rank functions that count the bytes a real student holds."""

from __future__ import annotations

import torch

from mopd.config.schema import OptimizerSection
from mopd.student.optim import inner_optimizers
from mopd.student.output import hidden_output
from tests.dist.student.worlds import Run, build, step_batch


def bytes_after_a_step(run: Run, distributed: bool = False) -> dict[str, int]:
    """Weights, gradient buffers and the optimizer's own tensors of this rank."""
    section = OptimizerSection(lr=1e-2, use_distributed_optimizer=distributed)
    student = build(run, section=section)
    model = student.model
    student.train_step(step_batch(0, run=run, dp_rank=model.topology.dp_rank))
    weights = {storage(p).data_ptr(): p for _, p in model.named_parameters()}
    buffers = [b for ddp in model.ddp for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    held: dict[int, int] = {}
    for inner in inner_optimizers(student.optimizer):
        moments = [t for state in inner.optimizer.state.values() for t in state.values()]
        mains = [p for group in inner.optimizer.param_groups for p in group["params"]]
        for tensor in (*moments, *mains):
            if isinstance(tensor, torch.Tensor) and storage(tensor).data_ptr() not in weights:
                held[storage(tensor).data_ptr()] = storage(tensor).nbytes()
    return {
        "weights": sum(p.numel() * p.element_size() for _, p in model.named_parameters()),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer": sum(held.values()),
    }


def bytes_of_forward(run: Run, rows: int, length: int) -> int:
    """What autograd keeps of one forward pass up to the output layer, weights left out."""
    student = build(run)
    head = student.model.head
    weights = {storage(p).data_ptr() for _, p in student.model.named_parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if storage(tensor).data_ptr() not in weights:
            kept[storage(tensor).data_ptr()] = storage(tensor)
        return tensor

    tokens = torch.arange(rows * length).view(rows, length) % student.model.vocab_size
    positions = torch.arange(length).expand(rows, length)
    with hidden_output(head), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = head(tokens, positions, None)
    assert hidden.requires_grad
    return sum(each.nbytes() for each in kept.values())


def storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Where its elements are; slices share it."""
    return tensor.untyped_storage()

"""Mixture of experts: Megatron's MoELayer with our router, its load balancing and its padding.

E experts, K of them per token. Each expert is a feed-forward network of its own; a token's result
is the sum of its K experts' results, weighed by the router.

Load balancing (Switch Transformer 2101.03961, eq. 4, as Megatron defines it for K > 1): of the T_j
real tokens of micro-batch j, f_e = (tokens routed to expert e) / (K * T_j) and P_e = (mean
probability of expert e); a layer's loss is L_j = E * sum_e f_e * P_e, which is 1 for an even load
whatever K is. A step adds, for every layer with experts,

    coefficient * sum_j T_j * L_j / sum_j T_j

over the micro-batches of all replicas: prompt and response tokens count alike, padding does not.
L_j is not linear, so how a step is cut into micro-batches matters; tensor, sequence, context,
pipeline and expert parallelism do not change it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model

from mopd.config.model_shape import ModelShape
from mopd.device import get_device
from mopd.student.layout import Layout

if TYPE_CHECKING:
    from mopd.student.model import StudentModel

BALANCING, MAX_LOAD = "moe/load_balancing", "moe/max_load"


class Router(TopKRouter):
    """Megatron's router with the arithmetic of transformers' Qwen3-MoE, so that student and
    sampler choose the same experts.

    The product with the weight is in the model's type, everything behind it in float32.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        # Megatron leaves it on the host until the first forward
        self.weight.data = self.weight.data.to(get_device("auto").current_device())
        self.normalized = not config.moe_router_pre_softmax
        assert isinstance(config.moe_aux_loss_coeff, float)
        self.coefficient = config.moe_aux_loss_coeff
        self.balance: torch.Tensor | None = None  # [] this rank's part of sum_j T_j * L_j
        self.load: torch.Tensor | None = None  # [E] tokens of this rank that each expert got

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Router logits [S, B, E] in float32 of hidden states [S, B, H]."""
        return F.linear(input, self.weight).float()

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choice [S * B, E] of the experts; zero and False where one is not chosen.

        Args:
            padding_mask: [S, B], True where a position is padding. Padding is routed, like any
                token, to nobody's harm, and does not count in the load.
        """
        scores = torch.softmax(logits.flatten(0, 1), dim=-1)
        weights, chosen = scores.topk(self.topk, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        probs = torch.zeros_like(scores).scatter(1, chosen, weights)
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
        if self.training and torch.is_grad_enabled():  # once, with recomputation too
            is_real = torch.ones_like(scores[:, :1], dtype=torch.bool)
            if padding_mask is not None:
                is_real = ~padding_mask.reshape(-1, 1)
            probs = self._balanced(probs, scores * is_real, routing_map & is_real)
        return probs, routing_map

    def _balanced(
        self, probs: torch.Tensor, scores: torch.Tensor, routing_map: torch.Tensor
    ) -> torch.Tensor:
        """``probs``, with the load-balancing loss hanging on its backward pass.

        A micro-batch lies on the tensor- and context-parallel ranks; each adds its own tokens'
        part of P_e, and T_j is the whole micro-batch's: Megatron's router takes the rank's own
        share of T_j, which makes the loss smaller by the number of those ranks.
        """
        load = routing_map.sum(0)
        count = load.clone()
        dist.all_reduce(count, group=self.tp_cp_group)
        num_tokens = count.sum() / self.topk
        some = num_tokens.clamp(min=1.0)  # a micro-batch of padding alone
        loss = len(count) * (count / (self.topk * some) * (scores.sum(0) / some)).sum()
        weighed = loss * num_tokens
        self.balance = _added(self.balance, weighed.detach())
        self.load = _added(self.load, load.float())
        if self.coefficient == 0.0:
            return probs
        return MoEAuxLossAutoScaler.apply(probs, self.coefficient * weighed)  # type: ignore[no-any-return]


def _added(total: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    return value if total is None else total + value


def moe_spec() -> ModuleSpec:
    """The feed-forward part of a layer with experts. Its norm is the layer's own, since a router
    and all experts read its result."""
    experts = ModuleSpec(
        module=SequentialMLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(experts=experts, router=Router),  # pyright: ignore[reportArgumentType]
    )


def moe_options(shape: ModelShape, coefficient: float | None) -> dict[str, Any]:
    """Keywords of TransformerConfig; none for a dense model. Experts are split over tensor-parallel
    ranks like every other layer.

    Args:
        coefficient: of the load-balancing loss; None takes the model's own.
    """
    moe = shape.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_layer_freq": [int(layer in moe.layers) for layer in range(shape.num_layers)],
        "moe_router_topk": moe.num_experts_per_tok,
        "moe_router_pre_softmax": not moe.norm_topk_prob,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": moe.router_aux_loss_coef if coefficient is None else coefficient,
    }


def set_dispatcher(config: TransformerConfig, device: torch.device) -> None:
    """Choose how tokens travel to their experts: `alltoall`, but `allgather` on the host.

    Megatron's all-to-all needs CUDA streams. It forbids all-gather where shapes vary, because all
    ranks of an expert group must then agree on a micro-batch's shape; ours do, so the choice is
    made behind its check.
    """
    if config.num_moe_experts is not None and device.type == "cpu":
        config.moe_token_dispatcher_type = "allgather"


def padding_mask(
    model: StudentModel, module: torch.nn.Module, layout: Layout
) -> torch.Tensor | None:
    """[B', L'] bool, True where a position is padding; None for a dense model.

    ``module`` is the stage that will get it: the first takes the whole row and splits it over
    the tensor-parallel ranks with its embeddings, the others take this rank's part.
    """
    if model.shape.moe is None:
        return None
    device, topology = model.topology.device, model.topology
    mask = ~torch.as_tensor(layout.real, device=device)
    if model.config.sequence_parallel and not get_attr_wrapped_model(module, "pre_process"):
        mask = mask.chunk(topology.tp_size, dim=1)[topology.tp_rank]
    return mask


def pop_load(model: StudentModel, num_tokens: float) -> dict[str, float]:
    """The step's expert load, the same on every rank; empty for a dense model. Collective over
    all ranks of the job, and the next step starts from zero.

    `moe/load_balancing` is L of the module's docstring, without the coefficient, and
    `moe/max_load` the busiest expert's tokens over an even share: both 1 where the load is even,
    and means over the layers with experts.
    """
    moe = model.shape.moe
    if moe is None:
        return {}
    table = torch.zeros(
        (model.shape.num_layers, 1 + moe.num_experts),
        dtype=torch.float32,
        device=model.topology.device,
    )
    for router in _routers(model):
        if router.balance is not None and router.load is not None:
            row = table[router.layer_number - 1]  # type: ignore[operator]
            row[0], row[1:] = router.balance, router.load
        router.balance = router.load = None
    dist.all_reduce(table)
    rows = table[list(moe.layers)].double()
    even = rows[:, 1:].sum(1) / moe.num_experts
    return {
        BALANCING: float(rows[:, 0].mean()) / max(num_tokens, 1.0),
        MAX_LOAD: float((rows[:, 1:].amax(1) / even.clamp(min=1.0)).mean()),
    }


def _routers(model: StudentModel) -> Iterator[Router]:
    for chunk in model.chunks:
        for module in chunk.modules():
            if isinstance(module, Router):
                yield module

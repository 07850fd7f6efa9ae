"""What of the student learns: all of it, all but `student.freeze`, or adapters alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import nn

from mopd.config.model_shape import ModelShape
from mopd.config.schema import StudentSection
from mopd.errors import ConfigError
from mopd.student import adapter_io, lora
from mopd.student.hf_io import Slot, is_here, parameter_name
from mopd.student.parallel import Topology


def frozen_parameters(patterns: Sequence[str], slots: Sequence[Slot]) -> frozenset[Slot]:
    """The slots whose Hugging Face tensors all match a pattern.

    A pattern matches a whole name (`re.fullmatch`). The copies of a tied embedding have one name,
    so they are frozen as one.

    Raises:
        ConfigError: a pattern matches nothing, or a part of what Megatron keeps as one parameter
            and the other patterns do not match the rest; or nothing is left to learn.
    """
    compiled = [re.compile(pattern) for pattern in patterns]
    frozen = set()
    for slot in slots:
        matched = {name for name in slot.tensors if any(p.fullmatch(name) for p in compiled)}
        if len(matched) == len(slot.tensors):
            frozen.add(slot)
        elif matched:
            _refuse_part(compiled, matched, slot)
    names = {name for slot in slots for name in slot.tensors}
    for pattern in compiled:
        if not any(pattern.fullmatch(name) for name in names):
            raise ConfigError(
                f"student.freeze: `{pattern.pattern}` matches no weight of student.model; patterns "
                "match whole Hugging Face names, as in `model\\.layers\\.0\\..*`"
            )
    if len(frozen) == len(slots):
        raise ConfigError("student.freeze: matches every weight, so nothing learns; leave one out")
    return frozenset(frozen)


def _refuse_part(compiled: Iterable[re.Pattern[str]], matched: set[str], slot: Slot) -> None:
    pattern = next(p.pattern for p in compiled if any(p.fullmatch(name) for name in matched))
    rest = sorted(set(slot.tensors) - matched)
    raise ConfigError(
        f"student.freeze: `{pattern}` matches {', '.join(sorted(matched))}, which Megatron keeps "
        f"in one parameter with {', '.join(rest)}; match all of them, or none"
    )


def choose_trainable(
    chunks: Sequence[GPTModel],
    section: StudentSection,
    *,
    shape: ModelShape,
    slots: Sequence[Slot],
    topology: Topology,
    seed: int,
) -> lora.Adapters | None:
    """Freeze what does not learn, before gradient buffers exist; the adapters where there are any.

    Raises ConfigError or ArtifactError for patterns and adapters that do not fit the model.
    """
    adapters = None
    if section.lora.rank is not None:
        adapters = lora.Adapters(
            section=section.lora, targets=lora.find_targets(section.lora, slots)
        )
        lora.install(chunks, adapters, num_query_groups=shape.num_query_groups, topology=topology)
        adapter_io.fill(adapters, seed=seed, topology=topology)
    elif section.freeze:
        frozen = {
            slot.parameter
            for slot in frozen_parameters(section.freeze, slots)
            if is_here(slot, topology)
        }
        for index, chunk in enumerate(chunks):
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(parameter_name(index, name) not in frozen)
    if section.recompute.granularity == "full":
        for chunk in chunks:
            _keep_graph(chunk)
    return adapters


def _keep_graph(chunk: GPTModel) -> None:
    """Give the first layer an input that needs a gradient, also behind a frozen embedding.

    Megatron records a recomputed block by its input: behind one without a gradient no parameter
    of the block would get any.
    """
    if not chunk.pre_process or chunk.embedding.word_embeddings.weight.requires_grad:
        return

    def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        del module, inputs
        if torch.is_grad_enabled():
            output.requires_grad_()

    chunk.embedding.register_forward_hook(hook)

"""Models that only score: in the student's layout, without gradients, buffers or an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mopd.config.model_shape import read_model_config
from mopd.config.schema import StudentSection
from mopd.student.hf_io import load_hf
from mopd.student.model import StudentModel, build_chunk, padded_size, transformer_config
from mopd.student.parallel import Topology


def build_frozen(
    model_dir: Path,
    *,
    section: StudentSection,
    dtype: Literal["float32", "bfloat16"],
    topology: Topology,
) -> StudentModel:
    """This rank's stages of another model, spread over the ranks as the student is.

    Args:
        section: the student's, for its layout.
    Raises:
        ConfigError: a model that is not supported.
        ArtifactError: its files do not hold what its config.json says.
    """
    shape = read_model_config(model_dir)
    if shape.moe is None:  # no experts to spread over replicas
        topology = replace(topology, ep_rank=0, ep_size=1, ep_group=None)
    own = StudentSection(model=str(model_dir), dtype=dtype, parallel=section.parallel)
    config = transformer_config(shape, own, topology)
    size = padded_size(shape, topology)
    chunks = tuple(
        build_chunk(config, shape, topology, index=index, padded_vocab_size=size)
        for index in range(topology.vp_size)
    )
    load_hf(chunks, model_dir, shape=shape, topology=topology)
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
    return StudentModel(
        shape=shape,
        topology=topology,
        config=config,
        chunks=chunks,
        ddp=(),
        vocab_size=shape.vocab_size,
        padded_vocab_size=size,
        dtype=config.params_dtype,
        source_dir=model_dir,
        adapters=None,
    )


class Offloaded:
    """Weights that are in host memory, and on their device within `loaded` only.

    The modules' parameters are empty in between, also where the device is the host itself. The
    host's copy never changes: nothing is copied back. For an accelerator it is pinned, which makes
    the way to the device asynchronous.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._host: dict[nn.Parameter, Tensor] = {}
        for parameter in (p for module in modules for p in module.parameters()):
            self._host[parameter] = _to_host(parameter.data)
            parameter.data = _nothing(parameter)

    @property
    def num_bytes(self) -> int:
        """Of this rank's weights on the device, now."""
        return sum(p.numel() * p.element_size() for p in self._host)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        try:
            for parameter, host in self._host.items():
                parameter.data = host.to(parameter.device, non_blocking=True)
            yield
        finally:
            for parameter in self._host:
                parameter.data = _nothing(parameter)


def _to_host(tensor: Tensor) -> Tensor:
    host = tensor.cpu()
    return host if tensor.device.type == "cpu" else host.pin_memory()


def _nothing(parameter: nn.Parameter) -> Tensor:
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device)

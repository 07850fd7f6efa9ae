"""Models that only score: in the student's layout, without gradients, buffers or an optimizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

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

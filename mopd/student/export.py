"""The model of a checkpoint in one process, without buffers for gradients and without an optimizer.

Any layout may have written the checkpoint. What is exported from it at the last step is what the
run itself exports, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mopd.config.model_shape import read_model_config
from mopd.config.schema import ParallelSection, RecomputeSection, StudentSection
from mopd.config.slots import build_slots
from mopd.device import get_device
from mopd.errors import ArtifactError
from mopd.storage.manifest import INDEX
from mopd.student.model import (
    DTYPES,
    StudentModel,
    build_chunk,
    padded_size,
    transformer_config,
)
from mopd.student.parallel import Topology, initialize, shutdown
from mopd.student.shard_files import PieceReader
from mopd.student.sharded import MAIN_WEIGHTS, MODEL, describe_model
from mopd.student.trainable import choose_trainable


@contextmanager
def model_of(path: Path, section: StudentSection, *, dtype: torch.dtype) -> Iterator[StudentModel]:
    """The student of the recipe ``section``, with the weights of the checkpoint ``path``.

    ``dtype`` is what will be written. Where that is float32 and the run computes in bfloat16, the
    optimizer's main weights are taken, which have not been rounded (of frozen ones there are none).
    A float32 model stays one: it is rounded when it is written, after adapters were added.

    Raises:
        ConfigError: a model that is not supported.
        ArtifactError: the checkpoint holds another model.
    """
    precise = torch.float32 in (dtype, DTYPES[section.dtype])
    lora = section.lora.model_copy(update={"path": None})  # the checkpoint has their values
    alone = section.model_copy(
        update={
            "dtype": "float32" if precise else section.dtype,
            "parallel": ParallelSection(),
            "recompute": RecomputeSection(),
            "freeze": (),
            "lora": lora,
        }
    )
    topology = initialize(alone.parallel, backend=get_device("cpu"), seed=0)
    try:
        model = _build(alone, topology)
        _fill(model, path, main_weights=dtype != DTYPES[section.dtype])
        yield model
    finally:
        shutdown()


def _build(section: StudentSection, topology: Topology) -> StudentModel:
    """With whatever weights its memory holds."""
    source = Path(str(section.model))
    shape = read_model_config(source)
    config = transformer_config(shape, section, topology)
    size = padded_size(shape, topology)
    chunk = build_chunk(config, shape, topology, index=0, padded_vocab_size=size)
    adapters = choose_trainable(
        (chunk,),
        section,
        shape=shape,
        slots=build_slots(shape, pp_size=1, vp_size=1, ep_size=1),
        topology=topology,
        seed=0,
    )
    chunk.requires_grad_(False).eval()
    return StudentModel(
        shape=shape,
        topology=topology,
        config=config,
        chunks=(chunk,),
        ddp=(),
        vocab_size=shape.vocab_size,
        padded_vocab_size=size,
        dtype=config.params_dtype,
        source_dir=source,
        adapters=adapters,
    )


def _fill(model: StudentModel, path: Path, *, main_weights: bool) -> None:
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    with PieceReader(path, index) as reader:
        for shard in describe_model(model):
            key = shard.key
            main = MAIN_WEIGHTS + key.removeprefix(MODEL)
            if main_weights and reader.dtype(main) == torch.float32 == shard.data.dtype:
                key = main
            found = reader.dtype(key) or shard.data.dtype
            trouble = reader.missing(key, whole=shard.whole, dtype=found)
            if trouble is not None:
                raise ArtifactError(
                    f"{path} {trouble}: it is not of this run's recipe; restore the run's own "
                    "config.yaml and student.model"
                )
            reader.fill(shard.data, key=key, offset=shard.offset)

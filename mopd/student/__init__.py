"""The model that learns: megatron-core behind mopd's own layers, weights, step and checkpoints."""

from mopd.device.base import import_quietly
from mopd.device.npu import adapt_imports

adapt_imports()
# Once here, so that no other file of the package repeats megatron's import-time notices.
import_quietly(
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
)

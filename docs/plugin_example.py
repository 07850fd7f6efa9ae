"""One's own GPTModel learns from two teachers: torchrun docs/plugin_example.py WORLD [STEPS]."""

import json
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from mopd.device import get_device
from mopd.runtime.plugin import Distillation

world, steps, names = sys.argv[1], int((sys.argv[2:] or [20])[0]), ("sort", "upper")
get_device("cpu").prepare_megatron()  # for megatron-core without a GPU
dist.init_process_group("gloo")
size = dist.get_world_size()
parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
tensor_parallel.model_parallel_cuda_manual_seed(1)
shape = dict(num_layers=2, hidden_size=64, num_attention_heads=4, tensor_model_parallel_size=size)
model = GPTModel(TransformerConfig(**shape), get_gpt_layer_local_spec(), 1024, 256)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

recipe = [f"student.tokenizer={world}/student"]
recipe += [f"teachers.{name}.model={world}/teachers/{name}" for name in names]
recipe += [f"teachers.{name}.domains=[{name}]" for name in names]
mopd = Distillation.from_recipe(
    "mopd_ctkd", recipe, padded_vocab_size=1024, device="cpu", domains=names
)
data = [json.loads(line) for line in open(f"{world}/data/train.jsonl")]
answers = []  # of your sampler; here the data's
for row in data[:8] + data[-8:]:
    ids = [*mopd.tokenizer.vocabulary.encode(row["answer"].encode()), mopd.tokenizer.eos_id]
    answers.append(mopd.rollout(row["messages"], ids, domain=row["domain"]))
for step in range(steps):
    batch = mopd.batch(answers)
    first = batch.micro_batches[0].tokens
    found = get_forward_backward_func()(
        forward_step_func=mopd.forward_step(batch), data_iterator=iter(batch.micro_batches),
        model=model, num_microbatches=len(batch.micro_batches), seq_length=first.shape[1],
        micro_batch_size=len(first), forward_only=False,
    )  # fmt: skip
    optimizer.step()
    optimizer.zero_grad()
    kl = {n: sum(float(m[f"kl/{n}"]) for m in found) / batch.denominators[n] for n in names}
    if dist.get_rank() == 0:
        print(json.dumps({"step": step, "kl": kl}), flush=True)

"""Run by `tests/vllm/test_colocate.py` with the interpreter that has vLLM: prints JSON at the end.

`python -m tests.helpers.colocate_script MODEL_DIR`. A process group of one rank exists before, as
in a trainer, and must still work afterwards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from mopd.errors import SamplerError
from mopd.rollout.colocate import ColocateSampler
from mopd.rollout.tasks import Jobs, SamplingOptions
from mopd.serving.vllm_engine import LocalEngine
from tests.helpers.plain_model import PlainModel, prompts_of

TEMPERATURE = 0.7
TEXT = np.arange(5, 40)


def main(model_dir: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = PlainModel(model_dir)
    options = SamplingOptions(seed=1, temperature=TEMPERATURE, max_new_tokens=12, num_generations=2)
    engine = LocalEngine(model_dir, dtype="float32", memory_fraction=0.3, seed=1, eager=True)
    sampler = ColocateSampler(engine, jobs=Jobs(model.tokenizer, options))
    prompts = prompts_of("bo ka vi " * 60, "sort bo")
    found = []
    for version in range(3):
        weights = model.weights(version)
        sampler.load_weights(weights.items(), version=version)
        rollouts = sampler.generate(prompts, step=version, version=version)
        again = sampler.generate(prompts, step=version, version=version)
        wanted = [
            model.scores(
                weights,
                [*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()],
                temperature=TEMPERATURE,
            )[-len(rollout.token_ids) :]
            for rollout in rollouts
        ]
        own, old = (model.scores(model.weights(n), TEXT.tolist()) for n in (version, version + 7))
        probe = sampler.probe(TEXT)[0]
        found.append(
            {
                "probe": float(np.abs(probe - own).max()),
                "others": float(np.abs(probe - old).max()),
                "samples": max(
                    float(np.abs(r.logprobs - w).max())
                    for r, w in zip(rollouts, wanted, strict=True)
                ),
                "ids": [r.token_ids.tolist() for r in rollouts],
                "again": [r.token_ids.tolist() for r in again],
                "greedy": [r.finish_reason for r in sampler.answer(prompts)],
            }
        )
    refused = ""
    try:
        sampler.load_weights([("model.norm.weight", torch.zeros(3))], version=9)
    except SamplerError as error:
        refused = str(error)
    dist.all_reduce(torch.ones(1))
    sampler.close()
    print(json.dumps({"found": found, "refused": refused, "version": sampler.version}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

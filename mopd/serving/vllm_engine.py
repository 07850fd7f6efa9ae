"""Requests to vLLM and its answers, for the engine of a server and for one in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mopd.errors import ConfigError, SamplerError
from mopd.serving.sampling import PROCESSED, Sampled, SampleOptions, SampleTask, end_of
from mopd.serving.vllm_command import OFFLINE

EXTENSION = "mopd.serving.vllm_weights.WeightsExtension"


def sampling_params(task: SampleTask, options: SampleOptions) -> Any:
    """One answer. The model's own end tokens and defaults do not count: the request says it all."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]: not in every venv
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

    return SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=task.seed if options.temperature else None,
        stop_token_ids=[options.eos_id, *options.stop_ids],
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scoring_params() -> Any:
    """The log-probabilities of a prompt's own tokens."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]: not in every venv
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sampled_of(output: Any, options: SampleOptions) -> Sampled:
    """The one answer of a finished request."""
    (answer,) = output.outputs
    ids = list(answer.token_ids)
    return Sampled(
        ids=np.asarray(ids, dtype=np.int32),
        logprobs=np.asarray(
            [entry[token].logprob for token, entry in zip(ids, answer.logprobs, strict=True)],
            dtype=np.float32,
        ),
        end=end_of(ids[-1] if ids else None, options),
    )


def logprobs_of(output: Any, ids: Sequence[int]) -> np.ndarray:
    """[L - 1] float32: of each token of the prompt ``ids`` [L] but the first."""
    rows = output.prompt_logprobs
    if rows is None or len(rows) != len(ids):
        raise SamplerError("rollout.backend: the engine gave no log-probabilities of a prompt")
    return np.asarray(
        [row[token].logprob for token, row in zip(ids[1:], rows[1:], strict=True)],
        dtype=np.float32,
    )


class LocalEngine:
    """vLLM in this process, with the workers beside it where it needs several."""

    def __init__(
        self, model_dir: Path, *, dtype: str, memory_fraction: float, seed: int, eager: bool
    ) -> None:
        os.environ.update(OFFLINE)
        # the engine's loop in this thread: weights are handed over by reference
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM  # pyright: ignore[reportMissingImports]: not in every venv
        except ImportError as error:
            raise ConfigError(
                "rollout.backend.mode=colocate: vllm is not installed here; pip install "
                "'mopd[vllm]', or use mode=server"
            ) from error
        try:
            self._llm: Any = LLM(
                model=str(model_dir),
                dtype=dtype,
                seed=seed,
                enforce_eager=eager,
                gpu_memory_utilization=memory_fraction,
                logprobs_mode=PROCESSED,
                worker_extension_cls=EXTENSION,
                trust_remote_code=False,
            )
        except Exception as error:  # of any kind: vLLM has no type of its own
            said = " ".join(str(error).split())[:300]
            raise SamplerError(
                f"rollout.backend.mode=colocate: vLLM did not start on {model_dir} "
                f"({type(error).__name__}: {said}); if it wants memory, change "
                "rollout.backend.memory_fraction, or use mode=server"
            ) from error

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self._llm.llm_engine.model_config.max_model_len

    def load(self, tensors: Mapping[str, Tensor], *, vocab_size: int) -> None:
        """Takes all weights under their Hugging Face names.

        Raises:
            SamplerError: they did not fit, and the engine is of no use any more.
        """
        answers = self._llm.collective_rpc("mopd_load_tensors", args=(dict(tensors),))
        if trouble := next((answer for answer in answers if answer is not None), None):
            raise SamplerError(f"rollout.backend: {trouble}")
        self._llm.collective_rpc("mopd_limit_vocab", args=(vocab_size,))
        if not self._llm.reset_prefix_cache():
            raise SamplerError("rollout.backend: vLLM kept its prefix cache over an update")

    def sample(self, tasks: Sequence[SampleTask], options: SampleOptions) -> list[Sampled]:
        """One answer a task, in order."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(task.ids)} for task in tasks],
            [sampling_params(task, options) for task in tasks],
            use_tqdm=False,
        )
        return [sampled_of(output, options) for output in outputs]

    def logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """[L - 1] float32, as `logprobs_of`."""
        (output,) = self._llm.generate(
            [{"prompt_token_ids": list(ids)}], scoring_params(), use_tqdm=False
        )
        return logprobs_of(output, ids)

    def close(self) -> None:
        """Ends the engine and what it started."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

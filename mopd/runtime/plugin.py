"""mopd's teachers, alignment and losses in somebody else's Megatron training script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mopd.config import load_config
from mopd.config.check import check_objective
from mopd.device import get_device
from mopd.errors import ConfigError
from mopd.losses.head import DistillationHead
from mopd.rollout.base import make_rollout
from mopd.runtime.build_feed import build_eval_feed
from mopd.runtime.data import Router
from mopd.runtime.eval_feed import EvalFeed
from mopd.runtime.parts import build_head, load_pairs, load_tokenizers
from mopd.runtime.replica import from_lead
from mopd.runtime.teachers import build_pool
from mopd.serving.generation import Generated
from mopd.student.layout import lay_out
from mopd.student.parallel import Topology, adopt
from mopd.student.schedule import calculates_per_token_loss, packed_texts
from mopd.teachers.pool import TeacherPool
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Message, MicroBatch, Prompt, Rollout, StepBatch

LossAndTokens = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


class Distillation:
    """A recipe's teachers and losses for a GPTModel, a schedule and an optimizer of one's own.

    Everything else of the recipe (the student's parallel sizes, its optimizer, the loop) is not
    read. The model must give vocabulary-parallel logits [B, L, V / tp] (``labels=None``,
    ``parallel_output=True``).
    """

    def __init__(
        self,
        *,
        topology: Topology,
        head: DistillationHead,
        tokenizer: ChatTokenizer,
        router: Router,
        domains: Sequence[str],
        feed: tuple[TeacherPool, EvalFeed] | None,
    ) -> None:
        self.tokenizer = tokenizer
        self._topology = topology
        self._head = head
        self._router = router
        self._domains = frozenset(domains)
        self._feed = feed

    @classmethod
    def from_recipe(
        cls,
        recipe: str,
        overrides: Sequence[str] = (),
        *,
        padded_vocab_size: int,
        device: str,
        domains: Sequence[str] = ("",),
    ) -> Distillation:
        """Behind `parallel_state.initialize_model_parallel`; collective over all ranks.

        Args:
            recipe: a name or a file; ``student.tokenizer`` is the student's tokenizer.
            padded_vocab_size: rows of the model's output weight, over all tensor-parallel ranks.
            device: as ``run.device``: cpu, cuda or npu.
            domains: all that `rollout` is called with.
        Raises:
            ConfigError: the recipe, a tokenizer or a teacher does not fit.
        """
        config = load_config(recipe, list(overrides))
        check_objective(config)
        _refuse(config.ctkd.learned.enabled, "ctkd.learned.enabled")
        inside = {teacher.backend.type for teacher in config.teachers.values()}
        _refuse(bool(inside & {"megatron", "self"}), "teachers.<name>.backend.type megatron, self")
        topology = adopt(get_device(device))
        _refuse(topology.cp_size > 1, "context parallelism")
        tokenizers = load_tokenizers(config)
        found = load_pairs(config, tokenizers, topology)
        head = build_head(
            config, tokenizers, found, topology=topology, padded_vocab_size=padded_vocab_size
        )
        feed = None
        if topology.is_lead:
            pool = build_pool(
                config, tokenizers.teachers, student=tokenizers.student, device=topology.device
            )
            feed = (
                pool,
                build_eval_feed(
                    config,
                    found,
                    domains=domains,
                    sampler=None,
                    pool=pool,
                    tokenizers=(tokenizers.student, tokenizers.teachers),
                    topology=topology,
                ),
            )
        return cls(
            topology=topology,
            domains=domains,
            head=head,
            tokenizer=tokenizers.student,
            router=Router(config.teachers, config.distillation),
            feed=feed,
        )

    @property
    def is_lead(self) -> bool:
        """Whether this rank brings its replica's answers to `batch`."""
        return self._topology.is_lead

    def rollout(
        self,
        messages: Sequence[Message],
        token_ids: Sequence[int],
        *,
        domain: str = "",
        stopped: bool = True,
    ) -> Rollout:
        """An answer of the student, as its sampler wrote it.

        Args:
            messages: the chat before the answer.
            token_ids: [S] in the student's tokens, with the end of the turn where ``stopped``.
            domain: routes the answer to the teachers that list it.
        Raises:
            ConfigError: nobody judges this domain.
        """
        if domain not in self._domains:
            raise ConfigError(f"domain {domain!r} is not among those that from_recipe was told")
        prompt = Prompt(
            id="",
            messages=tuple(messages),
            domain=domain,
            teachers=self._router.route(domain, "rollout"),
        )
        ids = np.asarray(token_ids, dtype=np.int32)
        unknown = np.full(len(ids), np.nan, dtype=np.float32)  # its log-probabilities
        return make_rollout(
            prompt,
            Generated(token_ids=ids, logprobs=unknown, stopped=stopped),
            tokenizer=self.tokenizer,
            prompt_ids=self.tokenizer.prompt_ids(prompt.messages),
            sample_index=0,
            version=0,
        )

    def batch(self, rollouts: Sequence[Rollout]) -> StepBatch:
        """This replica's share of a step, scored and aligned; what the lead brings counts.

        Collective over all ranks, once a step: replicas agree on the step's denominators. Its
        ``micro_batches`` are what a data iterator yields; replicas may have different numbers.
        """
        batch = None
        if self._feed is not None:
            feed = self._feed[1]
            batch = feed.collate(feed.scored(rollouts))
        return from_lead(self._topology, batch)

    def forward_step(
        self, batch: StepBatch
    ) -> Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]]:
        """Megatron's ``forward_step_func`` over micro-batches of ``batch``."""

        def step(
            data_iterator: Iterator[MicroBatch], model: torch.nn.Module
        ) -> tuple[torch.Tensor, Callable[..., Any]]:
            micro = next(data_iterator)
            tokens = torch.tensor(micro.tokens, dtype=torch.int64, device=self._topology.device)
            position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            logits = model(
                input_ids=tokens,
                position_ids=position,
                attention_mask=None,
                packed_seq_params=packed_texts(lay_out(micro), tokens.device),
            )
            return logits, self.loss_function(micro, batch, model)

        return step

    def loss_function(
        self, micro: MicroBatch, batch: StepBatch, model: torch.nn.Module
    ) -> Callable[[torch.Tensor], LossAndTokens]:
        """Megatron's loss function of one micro-batch: (loss, tokens, metrics) of its logits.

        With ``calculate_per_token_loss`` in the model's config Megatron divides the gradient by the
        step's tokens; without it, by micro-batches and replicas. The gradient is the same.
        """
        per_token = calculates_per_token_loss(model)
        count = int(micro.lengths.sum())

        def compute(logits: torch.Tensor) -> LossAndTokens:
            output = self._head(logits, micro, batch)
            metrics = {name: value.detach() for name, value in output.metrics.items()}
            total, tokens = output.total, count
            if not per_token:
                parts = len(batch.micro_batches) * self._topology.dp_size
                total, tokens = total * (parts / max(batch.num_tokens, 1)), 1
            return total, torch.tensor(tokens, dtype=torch.int, device=logits.device), metrics

        return compute

    def close(self) -> None:
        """Lets go of the teachers."""
        if self._feed is not None:
            self._feed[0].close()


def _refuse(found: bool, what: str) -> None:
    if found:
        raise ConfigError(
            f"the plugin does not support {what}; train with launch/train.py, or do without it"
        )

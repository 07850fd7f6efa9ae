"""Supervised training: the teachers until they are right, the student until it is promising."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mopd.demo.decode import Example, Score, encode_tasks, evaluate
from mopd.demo.noise import PrefixNoise, Row, make_row
from mopd.demo.robust import fitting_mass
from mopd.demo.spec import DOMAINS, PEER, Report, WorldSpec
from mopd.demo.tasks import make_splits
from mopd.demo.tokenizers import KINDS, make_tokenizer, token_bytes


def _seed_index(name: str) -> int:
    """A number of its own for every model, so that no two share their random draws."""
    return [*sorted(KINDS), PEER].index(name)


def make_model(
    spec: WorldSpec, *, name: str, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    """A freshly initialised model; the seed is the spec's and the name's."""
    torch.manual_seed(spec.seed * 1000 + _seed_index(name))
    kwargs = {
        "vocab_size": len(tokenizer),
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    if name == "sort":
        return LlamaForCausalLM(LlamaConfig(**kwargs))
    return Qwen3ForCausalLM(Qwen3Config(**kwargs))


class Trainer:
    """AdamW over answer tokens, at the learning rate that ``step`` is told."""

    def __init__(self, model: PreTrainedModel, *, learning_rate: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )

    def step(self, rows: list[Row], *, learning_rate: float) -> float:
        """One update; the loss per answer token."""
        length = max(len(inputs) for inputs, _ in rows)
        inputs = torch.zeros((len(rows), length), dtype=torch.long)
        targets = torch.full((len(rows), length), -100)
        for index, (row, target) in enumerate(rows):
            inputs[index, : len(row)] = torch.tensor(row)
            targets[index, : len(row)] = torch.tensor(target)
        self.model.train()
        # Padding (any id) stands right of everything, so causal attention needs no mask.
        hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
        answer = targets != -100
        loss = functional.cross_entropy(self.model.lm_head(hidden[answer]), targets[answer])
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return float(loss.detach())


def _save(model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


class TeacherTraining:
    """One teacher's supervised training on its domains, with noise on the prefixes."""

    def __init__(self, spec: WorldSpec, *, name: str, domains: tuple[str, ...], kind: str) -> None:
        self.spec = spec
        self.domains = domains
        self.tokenizer = make_tokenizer(spec, name=kind)
        self.model = make_model(spec, name=name, tokenizer=self.tokenizer)
        self.splits = {
            split: encode_tasks(self.tokenizer, tasks=[t for t in tasks if t.domain in domains])
            for split, tasks in make_splits(spec).items()
        }
        self.table = token_bytes(self.tokenizer, metaspace=KINDS[kind].metaspace)
        # One noise per domain: digits are no plausible slip inside a word.
        self.noises = {
            domain: PrefixNoise(
                spec,
                tokenizer=self.tokenizer,
                examples=[e for e in self.splits["train"] if e.task.domain == domain],
                table=self.table,
            )
            for domain in domains
        }
        self.rng = np.random.default_rng([spec.seed, _seed_index(name)])

    def run(self, *, report: Report) -> None:
        """All steps, down to the lowest learning rate: rare prefixes are what is learnt last."""
        spec, train = self.spec, self.splits["train"]
        trainer = Trainer(self.model, learning_rate=spec.learning_rate)
        accuracy = 0.0
        for step in range(1, spec.teacher_steps + 1):
            chosen = self.rng.integers(len(train), size=spec.batch_size)
            rows = [self._row(train[int(index)]) for index in chosen]
            done = max(0, step - spec.warmup_steps) / max(1, spec.teacher_steps - spec.warmup_steps)
            cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * done))
            scale = min(1.0, step / spec.warmup_steps) * cosine
            loss = trainer.step(rows, learning_rate=spec.learning_rate * scale)
            if step % spec.teacher_eval_every == 0:
                accuracy = min(score.accuracy for score in self.scores("selection").values())
            if step % 10 == 0 or step == spec.teacher_steps:
                report(step, spec.teacher_steps, f"loss {loss:.3f}, right {accuracy:.0%}")

    def scores(self, split: str) -> dict[str, Score]:
        """Greedy decoding, by domain."""
        return evaluate(self.model, self.tokenizer, examples=self.splits[split])

    def save(self, directory: Path) -> None:
        _save(self.model, tokenizer=self.tokenizer, directory=directory)

    def _row(self, example: Example) -> Row:
        return self.noises[example.task.domain].row(example, rng=self.rng)


def train_teacher(spec: WorldSpec, *, name: str, directory: Path, report: Report) -> dict[str, Any]:
    """Train teacher ``name`` on its domain, save it, return its accuracies."""
    training = TeacherTraining(spec, name=name, domains=(name,), kind=name)
    training.run(report=report)
    training.save(directory)
    heldout = training.scores("heldout")[name]
    return {
        "steps": spec.teacher_steps,
        "selection": training.scores("selection")[name].accuracy,
        "heldout": heldout.accuracy,
        "canonical": heldout.canonical,
    }


def train_peer(spec: WorldSpec, *, directory: Path, report: Report) -> dict[str, Any]:
    """Train a teacher of all domains in the student's tokenizer, save it, return its accuracies."""
    spec = dataclasses.replace(spec, resplit_share=spec.peer_resplit_share)
    training = TeacherTraining(spec, name=PEER, domains=DOMAINS, kind="student")
    training.run(report=report)
    training.save(directory)
    selection, heldout = training.scores("selection"), training.scores("heldout")
    return {
        "steps": spec.teacher_steps,
        "selection": {domain: selection[domain].accuracy for domain in DOMAINS},
        "heldout": {domain: heldout[domain].accuracy for domain in DOMAINS},
        "canonical": {domain: heldout[domain].canonical for domain in DOMAINS},
        "robust": {
            domain: fitting_mass(
                training.model,
                training.tokenizer,
                examples=[e for e in training.splits["heldout"] if e.task.domain == domain],
                table=training.table,
                seed=spec.seed,
            )
            for domain in DOMAINS
        },
    }


class ColdStart:
    """Trains the student on both domains until it is promising on each, and no further.

    First the format: answers of OTHER prompts, so that samples look like answers before any is
    right. Then the tasks: a domain that lags gets a larger share of the batch, one above the band
    gets none.
    """

    def __init__(self, spec: WorldSpec, *, model: PreTrainedModel, train: list[Example]) -> None:
        self.spec = spec
        self.trainer = Trainer(model, learning_rate=spec.learning_rate)
        self.train = {d: [e for e in train if e.task.domain == d] for d in DOMAINS}
        self.rng = np.random.default_rng([spec.seed, _seed_index("student")])
        self.shares = dict.fromkeys(DOMAINS, 1.0 / len(DOMAINS))
        self.step_count = 0

    def step(self, *, format_only: bool, scale: float) -> float:
        """One update at ``scale`` times the learning rate; the loss per answer token."""
        spec, rows = self.spec, []
        self.step_count += 1
        weights = [self.shares[domain] for domain in DOMAINS]
        for domain in self.rng.choice(DOMAINS, size=spec.batch_size, p=weights):
            pool = self.train[str(domain)]
            prompt, other = (pool[int(index)] for index in self.rng.integers(len(pool), size=2))
            answer = (other if format_only else prompt).answer_ids
            rows.append(make_row(prompt.prompt_ids, inputs=answer, targets=answer))
        scale *= min(1.0, self.step_count / spec.warmup_steps)
        return self.trainer.step(rows, learning_rate=spec.learning_rate * scale)

    def aim(self, right: dict[str, float]) -> None:
        """Share the next batches by what each domain lacks to the top of the band."""
        lacks = {d: max(self.spec.cold_start_high - right[d], 0.0) for d in DOMAINS}
        total = sum(lacks.values())
        if total > 0.0:
            self.shares = {domain: lack / total for domain, lack in lacks.items()}

    def distance(self, right: dict[str, float]) -> float:
        """0 when every domain is inside the band, else the worst miss."""
        low, high = self.spec.cold_start_low, self.spec.cold_start_high
        return max(max(low - value, value - high, 0.0) for value in right.values())


def train_student(spec: WorldSpec, *, directory: Path, report: Report) -> dict[str, Any]:
    """Save the first checkpoint with every domain inside the band, else the one nearest to it."""
    tokenizer = make_tokenizer(spec, name="student")
    model = make_model(spec, name="student", tokenizer=tokenizer)
    examples = {
        split: encode_tasks(tokenizer, tasks=tasks) for split, tasks in make_splits(spec).items()
    }
    cold_start = ColdStart(spec, model=model, train=examples["train"])
    for step in range(1, spec.format_steps + 1):
        loss = cold_start.step(format_only=True, scale=1.0)
        report(step, spec.format_steps + spec.cold_start_steps, f"loss {loss:.3f}, format")
    best, best_distance, history = model.state_dict(), math.inf, []
    scale = 1.0
    for step in range(1, spec.cold_start_steps + 1):
        loss = cold_start.step(format_only=False, scale=scale)
        if step % spec.cold_start_eval_every:
            continue
        scores = evaluate(model, tokenizer, examples=examples["selection"])
        right = {domain: scores[domain].accuracy for domain in DOMAINS}
        history.append({"step": step, **right})
        note = ", ".join(f"{domain} right {value:.0%}" for domain, value in right.items())
        total = spec.format_steps + spec.cold_start_steps
        report(spec.format_steps + step, total, f"loss {loss:.3f}, {note}")
        distance = cold_start.distance(right)
        if distance < best_distance:
            best, best_distance = copy.deepcopy(model.state_dict()), distance
        if distance == 0.0:
            break
        cold_start.aim(right)
        # The transition is steep; smaller steps once it has begun let the band be hit.
        scale = 1.0 if max(right.values()) < 0.05 else 1 / 3
    model.load_state_dict(best)
    _save(model, tokenizer=tokenizer, directory=directory)
    selection = evaluate(model, tokenizer, examples=examples["selection"])
    heldout = evaluate(model, tokenizer, examples=examples["heldout"])
    return {
        "in_band": best_distance == 0.0,
        "selection": {domain: selection[domain].accuracy for domain in DOMAINS},
        "heldout": {domain: heldout[domain].accuracy for domain in DOMAINS},
        "canonical": {domain: heldout[domain].canonical for domain in DOMAINS},
        "history": history,
    }

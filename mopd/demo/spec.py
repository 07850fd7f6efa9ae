"""The recipe of the embedded world and the handle on a built one. No heavy imports."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Part of every digest: raise it whenever the same spec would give other files.
BUILDER_VERSION = 4

TEACHERS = ("sort", "upper")
PEER = "peer"  # the optional teacher of both domains with the student's own tokenizer
DOMAINS = ("sort", "upper")
Report = Callable[[int, int, str], None]  # how a job tells its step, its steps and a note

SPLITS = ("train", "selection", "heldout")


@dataclass(frozen=True, kw_only=True)
class WorldSpec:
    """Everything that decides the bytes of a world. Two equal specs give equal files."""

    seed: int = 0

    num_syllables: int = 24
    num_words: int = 60
    min_digits: int = 4
    max_digits: int = 5
    train_per_domain: int = 4000  # an upper bound: `upper` has num_words * (num_words - 1) prompts
    selection_per_domain: int = 256
    heldout_per_domain: int = 512

    student_vocab: int = 552
    sort_vocab: int = 560
    upper_vocab: int = 496

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    ffn_size: int = 384

    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    teacher_steps: int = 700  # of the peer as well
    teacher_eval_every: int = 50
    replace_rate: float = 0.15  # answer inputs replaced by another answer token
    resplit_share: float = 0.5  # training samples whose answer is cut into random pieces
    peer_resplit_share: float = 0.2  # the student writes the peer's own pieces, mostly canonically

    format_steps: int = 60  # of the cold start, on answers of OTHER prompts
    cold_start_steps: int = 240
    cold_start_eval_every: int = 5
    cold_start_low: float = 0.18
    cold_start_high: float = 0.33

    @classmethod
    def tiny(cls, *, seed: int = 0) -> WorldSpec:
        """The same files in seconds, for tests of plumbing: the models know nothing."""
        return cls(
            seed=seed,
            train_per_domain=256,
            selection_per_domain=32,
            heldout_per_domain=32,
            hidden_size=64,
            num_heads=2,
            num_kv_heads=2,
            ffn_size=96,
            batch_size=16,
            warmup_steps=2,
            teacher_steps=4,
            teacher_eval_every=4,
            format_steps=2,
            cold_start_steps=4,
            cold_start_eval_every=2,
        )

    def digest(self) -> str:
        """Name of the world's directory: 12 hex digits over the recipe and the builder."""
        recipe = {"builder": BUILDER_VERSION, "spec": asdict(self)}
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class World:
    """Paths of a complete world. ``report`` is world.json plus ``seconds`` (timing.json)."""

    path: Path
    report: dict[str, Any] = field(repr=False)

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def teachers(self) -> dict[str, Path]:
        return {name: self.path / "teachers" / name for name in TEACHERS}

    @property
    def peer(self) -> Path:
        """The teacher with the student's tokenizer; there once `ensure_peer` has built it."""
        return self.path / "teachers" / PEER

    @property
    def data(self) -> Path:
        """Training prompts; the one file a run may learn from."""
        return self.path / "data" / "train.jsonl"

    @property
    def selection(self) -> Path:
        """Prompts for choices made while building or tuning."""
        return self.path / "data" / "selection.jsonl"

    @property
    def heldout(self) -> Path:
        """Prompts for the numbers that are reported."""
        return self.path / "data" / "heldout.jsonl"

"""The two domains: what a prompt looks like, what the right answer is, and the three splits."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from mopd.demo.spec import DOMAINS, SPLITS, WorldSpec

CONSONANTS = "bcdfghjklmnprstvz"
VOWELS = "aeiou"
SHAPES = ("CV", "CV", "CVC")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One line of a split. ``answer`` is the only text that counts as right."""

    id: str
    domain: str
    prompt: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]

    def to_json(self) -> str:
        row = {
            "id": self.id,
            "domain": self.domain,
            "messages": self.messages,
            "answer": self.answer,
        }
        return json.dumps(row)


def make_words(spec: WorldSpec) -> list[str]:
    """``num_words`` distinct lower-case pseudo words, in alphabetical order.

    They share a small pool of syllables, so that tokenizers have merges worth disagreeing about.
    """
    rng = random.Random(f"words-{spec.seed}")
    syllables: set[str] = set()
    while len(syllables) < spec.num_syllables:
        shape = rng.choice(SHAPES)
        syllables.add("".join(rng.choice(CONSONANTS if c == "C" else VOWELS) for c in shape))
    pool = sorted(syllables)
    words: set[str] = set()
    while len(words) < spec.num_words:
        words.add("".join(rng.choice(pool) for _ in range(rng.choice((2, 2, 3)))))
    return sorted(words)


def solve(prompt: str) -> str:
    """The right answer: ``sort 7 3 9 1`` gives ``1379``, ``up gapi demon`` gives ``GAPI DEMON``."""
    verb, *arguments = prompt.split(" ")
    if verb == "sort":
        return "".join(sorted(arguments))
    assert verb == "up", prompt
    return " ".join(arguments).upper()


def _sort_prompts(spec: WorldSpec, *, count: int) -> list[str]:
    rng = random.Random(f"sort-{spec.seed}")
    prompts: dict[str, None] = {}  # a dict keeps the order of drawing, a set would not
    while len(prompts) < count:
        length = rng.randint(spec.min_digits, spec.max_digits)
        prompts["sort " + " ".join(rng.choice("0123456789") for _ in range(length))] = None
    return list(prompts)


def _upper_prompts(spec: WorldSpec, *, count: int) -> list[str]:
    words = make_words(spec)
    prompts = [f"up {first} {second}" for first in words for second in words if first != second]
    random.Random(f"upper-{spec.seed}").shuffle(prompts)
    return prompts[:count]


def make_splits(spec: WorldSpec) -> dict[str, list[Task]]:
    """Disjoint prompts per split; within a split, all of ``sort`` and then all of ``upper``."""
    sizes = {"heldout": spec.heldout_per_domain, "selection": spec.selection_per_domain}
    splits: dict[str, list[Task]] = {split: [] for split in SPLITS}
    makers = {"sort": _sort_prompts, "upper": _upper_prompts}
    for domain in DOMAINS:
        prompts = makers[domain](spec, count=sum(sizes.values()) + spec.train_per_domain)
        for index, prompt in enumerate(prompts):
            split = "train"
            if index < sizes["heldout"]:
                split = "heldout"
            elif index < sizes["heldout"] + sizes["selection"]:
                split = "selection"
            name = f"{domain}-{index:06d}"
            splits[split].append(Task(id=name, domain=domain, prompt=prompt, answer=solve(prompt)))
    return splits


def write_splits(directory: Path, *, splits: dict[str, list[Task]]) -> None:
    """One JSON line per task in ``directory/<split>.jsonl``."""
    directory.mkdir(parents=True)
    for split, tasks in splits.items():
        lines = "".join(task.to_json() + "\n" for task in tasks)
        (directory / f"{split}.jsonl").write_text(lines, encoding="ascii")

"""How far two tokenizations of one answer disagree: chunk shares and unreachable pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mopd.demo.decode import Example, encode_tasks, generate
from mopd.demo.robust import fitting_mass
from mopd.demo.spec import TEACHERS, WorldSpec
from mopd.demo.tasks import Task, make_splits
from mopd.demo.tokenizers import KINDS, token_bytes

Chunk = tuple[int, int]  # student tokens, teacher tokens


def byte_ends(token_ids: Sequence[int], *, table: Sequence[bytes]) -> np.ndarray:
    """[N] int64: number of bytes after every token."""
    return np.cumsum([len(table[token]) for token in token_ids], dtype=np.int64)


def chunk_sizes(student_ends: np.ndarray, teacher_ends: np.ndarray) -> list[Chunk]:
    """(student tokens, teacher tokens) between consecutive common byte boundaries.

    Ends are those of the text only; the pair of end-of-turn tokens is the caller's 1-1 chunk.
    Tokens of "13|9" and "1|3|9" have ends [2, 3] and [1, 2, 3]: chunks (1, 2) and (1, 1).
    """
    common = np.intersect1d(student_ends, teacher_ends)
    student_counts = np.diff(np.searchsorted(student_ends, common, side="right"), prepend=0)
    teacher_counts = np.diff(np.searchsorted(teacher_ends, common, side="right"), prepend=0)
    return list(zip(student_counts.tolist(), teacher_counts.tolist(), strict=True))


def chunk_shares(chunks: Iterable[Chunk]) -> dict[str, float]:
    """Shares of all chunks by size, plus the share of student tokens outside 1-1 chunks."""
    sizes = np.array(list(chunks), dtype=np.int64).reshape(-1, 2)
    if len(sizes) == 0:
        return {}
    student, teacher = sizes[:, 0], sizes[:, 1]
    plain = (student == 1) & (teacher == 1)
    shares = {
        "tokens_outside_1_1": student[~plain].sum() / student.sum(),
        "chunks_1_1": plain.mean(),
        "chunks_1_n": ((student == 1) & (teacher > 1)).mean(),
        "chunks_m_1": ((student > 1) & (teacher == 1)).mean(),
        "chunks_m_n": ((student > 1) & (teacher > 1)).mean(),
    }
    return {name: round(float(share), 4) for name, share in shares.items()}


def reachable_ids(
    student_table: Sequence[bytes], *, teacher: PreTrainedTokenizerFast
) -> np.ndarray:
    """[W] bool: teacher ids that the teacher's encoding of some student token starts with.

    The end of the turn is reachable; student tokens that are not valid UTF-8 reach nothing.
    """
    reachable = np.zeros(len(teacher), dtype=bool)
    reachable[teacher.eos_token_id] = True
    for spelled in student_table:
        text = spelled.decode("utf-8", errors="ignore")
        if text and text.encode() == spelled:
            reachable[teacher.encode(text, add_special_tokens=False)[0]] = True
    return reachable


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The student and one teacher, with what every measurement needs of both."""

    student: PreTrainedTokenizerFast
    student_table: list[bytes]
    teacher: PreTrainedTokenizerFast
    teacher_table: list[bytes]
    reachable: np.ndarray  # [W] bool

    def chunks(self, student_ids: list[int]) -> list[Chunk]:
        """Chunks of one response that ended its turn; [] when it is no valid UTF-8."""
        spelled = b"".join(self.student_table[token] for token in student_ids)
        text = spelled.decode("utf-8", errors="ignore")
        if text.encode() != spelled:
            return []
        teacher_ids = self.teacher.encode(text, add_special_tokens=False)
        text_ids = student_ids[:-1]
        return [
            *chunk_sizes(
                byte_ends(text_ids, table=self.student_table),
                byte_ends(teacher_ids, table=self.teacher_table),
            ),
            (1, 1),
        ]


@torch.inference_mode()
def unreachable_mass(
    model: PreTrainedModel, *, examples: list[Example], reachable: np.ndarray
) -> dict[str, float]:
    """What a student cannot follow of this teacher's answers.

    ``tokens``: share of the canonical answers' tokens; ``mass``: mean probability that the teacher
    gives to unreachable tokens where it predicts those.
    """
    model.eval()
    outside = torch.from_numpy(~reachable)
    tokens, masses = [], []
    for example in examples:
        ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        rows = logits[len(example.prompt_ids) - 1 : -1].softmax(-1)
        masses.append(rows[:, outside].sum(-1))
        tokens.append(outside[torch.tensor(example.answer_ids)])
    return {
        "tokens": round(float(torch.cat(tokens).float().mean()), 4),
        "mass": round(float(torch.cat(masses).mean()), 4),
    }


def _sample(
    model: PreTrainedModel, examples: list[Example], *, eos_id: int, seed: int
) -> list[list[int]]:
    """The student's own answers at T = 1, in the order of ``examples``."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    prompts = [example.prompt_ids for example in examples]
    return generate(model, prompts=prompts, eos_id=eos_id, generator=generator)


def measure(spec: WorldSpec, *, directory: Path) -> dict[str, Any]:
    """Chunk shares (canonical held-out answers; cold-start samples), and what teachers can do."""
    student = AutoTokenizer.from_pretrained(directory / "student")
    model = AutoModelForCausalLM.from_pretrained(directory / "student")
    student_table = token_bytes(student, metaspace=KINDS["student"].metaspace)
    heldout = make_splits(spec)["heldout"]
    report: dict[str, Any] = {"chunks": {}, "unreachable": {}, "robust": {}, "samples": {}}
    chunks: dict[str, list[Chunk]] = {"canonical": [], "samples": []}
    for name in TEACHERS:
        tasks: list[Task] = [task for task in heldout if task.domain == name]
        examples = encode_tasks(student, tasks=tasks)
        pair = _pair(student, table=student_table, directory=directory / "teachers" / name)
        samples = _sample(model, examples, eos_id=student.eos_token_id, seed=spec.seed)
        ended = [ids for ids in samples if ids[-1] == student.eos_token_id]
        found = {
            "canonical": [c for e in examples for c in pair.chunks(e.answer_ids)],
            "samples": [c for ids in ended for c in pair.chunks(ids)],
        }
        report["chunks"][name] = {key: chunk_shares(value) for key, value in found.items()}
        for key, value in found.items():
            chunks[key] += value
        report["samples"][name] = _quality(pair, tasks=tasks, samples=samples)
        teacher = AutoModelForCausalLM.from_pretrained(directory / "teachers" / name)
        answers = encode_tasks(pair.teacher, tasks=tasks)
        report["unreachable"][name] = unreachable_mass(
            teacher, examples=answers, reachable=pair.reachable
        )
        report["robust"][name] = fitting_mass(
            teacher, pair.teacher, examples=answers, table=pair.teacher_table, seed=spec.seed
        )
    report["chunks"]["both"] = {key: chunk_shares(value) for key, value in chunks.items()}
    return report


def _pair(student: PreTrainedTokenizerFast, *, table: list[bytes], directory: Path) -> Pair:
    teacher = AutoTokenizer.from_pretrained(directory)
    return Pair(
        student=student,
        student_table=table,
        teacher=teacher,
        teacher_table=token_bytes(teacher, metaspace=KINDS[directory.name].metaspace),
        reachable=reachable_ids(table, teacher=teacher),
    )


def _quality(pair: Pair, *, tasks: list[Task], samples: list[list[int]]) -> dict[str, float]:
    """How the cold start samples: right, ended, canonical and valid UTF-8 answers, as shares."""
    right = ended = canonical = valid = 0
    for task, ids in zip(tasks, samples, strict=True):
        has_end = ids[-1] == pair.student.eos_token_id
        text_ids = ids[:-1] if has_end else ids
        spelled = b"".join(pair.student_table[token] for token in text_ids)
        text = spelled.decode("utf-8", errors="ignore")
        ended += has_end
        right += has_end and text == task.answer
        valid += text.encode() == spelled
        canonical += pair.student.encode(text, add_special_tokens=False) == text_ids
    counts = {"accuracy": right, "ended": ended, "canonical": canonical, "valid_utf8": valid}
    return {name: round(count / len(tasks), 4) for name, count in counts.items()}

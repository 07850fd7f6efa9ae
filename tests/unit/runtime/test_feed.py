"""What the feed counts of its alignments."""

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mopd.align.batch import Batching
from mopd.align.payload import PayloadOptions
from mopd.metrics.span import Spans
from mopd.runtime.ahead import Ahead
from mopd.runtime.aligner import Aligner, AlignOptions
from mopd.runtime.collate import Objective
from mopd.runtime.feed import Books, Feed, FeedOptions
from mopd.runtime.gather import Gatherer, GatherOptions
from mopd.runtime.ledger import Ledger
from mopd.runtime.weights import Normalizer
from mopd.serving.journal import Journal
from mopd.serving.replies import ReplyJournal
from mopd.teachers.uniform import UniformTeacher
from mopd.types import Prompt, Rollout, StepBatch
from tests.unit.tokens.trained import vocabulary

TEXTS = ("the fox", "\u4f60\u597d", "\ufb01ne")
TEACHERS = ("sentencepiece", "unigram", "wordpiece")


def tokenizer(kind: str) -> SimpleNamespace:
    found = vocabulary(kind)
    return SimpleNamespace(
        vocabulary=found,
        eos_id=found.eos_id,
        pad_id=found.roles["pad"],
        prompt_ids=lambda messages: np.array([1], dtype=np.int32),
    )


STUDENT = tokenizer("byte_level")


class Sampler:
    def generate(self, prompts: list[Prompt], *, step: int, version: int) -> list[Rollout]:
        return [self._rollout(prompt, version) for prompt in prompts]

    def _rollout(self, prompt: Prompt, version: int) -> Rollout:
        data = prompt.id.encode()
        ids = np.asarray([*STUDENT.vocabulary.encode(data), STUDENT.eos_id], dtype=np.int32)
        return Rollout(
            prompt=prompt,
            sample_index=0,
            prompt_ids=np.array([1], dtype=np.int32),
            token_ids=ids,
            loss_mask=np.ones(len(ids), dtype=bool),
            logprobs=np.zeros(len(ids), dtype=np.float32),
            byte_ends=STUDENT.vocabulary.byte_ends(ids),
            response=data,
            policy_version=version,
            finish_reason="stop",
        )


class Pool:
    def latencies(self) -> dict[str, list[float]]:
        found, self.took = self.took, []
        return {"wordpiece": found}

    def troubles(self) -> dict[str, int]:
        return {"missing/wordpiece/mass": 2}

    def __init__(self, change) -> None:
        self.teachers = {
            kind: UniformTeacher(kind, tokenizer=tokenizer(kind), student=STUDENT, top_k=4)
            for kind in TEACHERS
        }
        self._change = change
        self.took = [9.0]  # of an evaluation before the step

    def score(self, rollouts: list[Rollout]) -> list[dict]:
        self.took.append(0.5)
        scores = {name: teacher.score(rollouts) for name, teacher in self.teachers.items()}
        for name in scores:
            for found in scores[name]:
                self._change(found)
        return [{name: scores[name][n] for name in scores} for n in range(len(rollouts))]


OBJECTIVE = Objective(
    weights=dict.fromkeys(TEACHERS, 1.0 / len(TEACHERS)),
    normalizer=Normalizer(teachers=TEACHERS, domains=("d",), normalization="chunk", by_domain=True),
)


PLAIN = AlignOptions()


def run(
    *texts: str,
    change=lambda scores: None,
    objective: Objective = OBJECTIVE,
    options: AlignOptions = PLAIN,
) -> tuple[StepBatch, dict]:
    prompts = [Prompt(id=text, messages=(), domain="d") for text in texts]
    pool = Pool(change)
    folder = Path(tempfile.mkdtemp())
    ledger = Ledger()
    books = Books(
        journal=Journal(folder / "rollouts-0.jsonl"),
        replies=ReplyJournal(folder, 0, level="full", max_bytes=1e9),
        ledger=ledger,
    )
    gatherer = Gatherer(
        source=SimpleNamespace(take=lambda step: prompts),
        sampler=Sampler(),
        pool=pool,
        student=STUDENT,
        journal=books.journal,
        replies=books.replies,
        ledger=ledger,
        options=GatherOptions(dp_rank=0, dp_size=1, num_generations=1, max_new_tokens=99, seed=0),
    )
    feed = Feed(
        ahead=Ahead(gatherer, lag=0, num_steps=1),
        student=STUDENT,
        aligner=Aligner(
            student=STUDENT,
            teachers={kind: teacher.tokenizer for kind, teacher in pool.teachers.items()},
            payload={kind: PayloadOptions(temperature=1.0) for kind in TEACHERS},
            objective=objective,
            options=options,
        ),
        books=books,
        options=FeedOptions(
            objective=objective,
            batching=Batching(size=3),
            max_failed_share=1.0,
            sum_over_replicas=lambda counts: counts,
        ),
        spans=Spans(),
    )
    batch = feed.collate(feed.gather(0))
    assert feed.samples["latency_p50/wordpiece"] == [0.5]
    feed.settle(0, skipped=False)
    feed.close()
    shutil.rmtree(folder)
    return batch, ledger.state()


def take(*texts: str, **settings) -> StepBatch:
    return run(*texts, **settings)[0]


def test_fallbacks_are_counted_by_sample():
    found = take(*TEXTS).metrics
    for kind, offsets in (("sentencepiece", 0), ("unigram", 1), ("wordpiece", 1)):
        # the ligature for one, the space for the other
        assert found[f"alignment_offsets/{kind}"] == (offsets, 3)
        assert found[f"alignment_strings/{kind}"] == (0, 3)
        assert found[f"alignment_mismatch/{kind}"] == (0, 3)
        covered, tokens = found[f"alignment/{kind}"]
        assert covered == tokens


def test_what_went_wrong_at_a_teacher_is_a_metric():
    assert take(*TEXTS).metrics["missing/wordpiece/mass"] == (2.0, 1.0)


def test_another_text_is_counted():
    def other(scores) -> None:
        scores.token_ids[: len(scores.token_ids) - 1] = scores.token_ids[0]

    found = take(*TEXTS, change=other).metrics
    count, samples = found["alignment_mismatch/sentencepiece"]
    assert samples == 3 and count > 0
    covered, tokens = found["alignment/sentencepiece"]
    assert covered < tokens
    strings, _ = found["alignment_strings/wordpiece"]
    assert strings > 0 and found["alignment_mismatch/wordpiece"] == (0, 3)


@pytest.mark.parametrize("kind", TEACHERS)
def test_every_sample_has_a_way(kind):
    found = take(*TEXTS).metrics
    shares = [found[f"alignment_{way}/{kind}"] for way in ("offsets", "strings", "mismatch")]
    assert all(0 <= value <= count == len(TEXTS) for value, count in shares)


def test_what_is_not_kept_is_not_trained():
    batch = take("The \u0416 fox")
    covered, tokens = batch.metrics["alignment/wordpiece"]
    assert 0 < covered < tokens
    rows = batch.micro_batches[0].rows["wordpiece"]
    assert len(rows.token_position) == covered
    whole = batch.micro_batches[0].rows["sentencepiece"]
    assert len(whole.token_position) == tokens


def test_an_answer_that_no_teacher_scored_is_dropped_and_counted():
    def nothing(scores) -> None:
        if scores.byte_ends[-1] < 7:
            scores.valid[:] = False

    batch, books = run(*TEXTS, change=nothing)
    unscored = books["dropped"]["unscored"]
    assert 0 < unscored < 3
    assert books["trained"] == 3 - unscored and books["in_flight"] == 0
    assert batch.metrics["dropped/unscored"] == (unscored, 3)
    share = batch.metrics["scored/wordpiece"]
    assert share[0] < share[1]


class Nobody(Pool):
    """All of its teachers are asked elsewhere."""

    def score(self, rollouts: list[Rollout]) -> list[dict]:
        return [{} for _ in rollouts]


@pytest.mark.parametrize("pool", [Pool, Nobody])
def test_what_the_pool_says_again_is_compared_where_it_says_anything(pool, tmp_path: Path):
    prompts = [Prompt(id=text, messages=(), domain="d") for text in TEXTS]
    journal, rescored = Journal(tmp_path / "rollouts-0.jsonl"), []
    for _ in range(2):
        gatherer = Gatherer(
            source=SimpleNamespace(take=lambda step: prompts),
            sampler=Sampler(),
            pool=pool(lambda scores: None),
            student=STUDENT,
            journal=journal,
            replies=ReplyJournal(tmp_path, 0, level="digest", max_bytes=0),
            ledger=Ledger(),
            options=GatherOptions(
                dp_rank=0, dp_size=1, num_generations=1, max_new_tokens=99, seed=0
            ),
        )
        rescored.append(gatherer.score(0, gatherer.sample(0, version=0)).rescored)
    journal.close()
    assert rescored[0] is None
    assert (rescored[1] is None) == (pool is Nobody)

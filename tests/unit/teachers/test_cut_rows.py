"""Per-sample top-k: what is cut joins the tail, whoever computed the row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mopd.align.batch import Batching
from mopd.align.payload import PayloadOptions
from mopd.demo import World
from mopd.runtime.aligner import Aligner, AlignOptions, Tally
from mopd.runtime.collate import Objective, collate
from mopd.runtime.weights import Normalizer
from mopd.teachers.base import cut_rows
from mopd.teachers.hf import HfOptions, HfTeacher
from mopd.teachers.pool import TeacherPool
from mopd.teachers.uniform import UniformTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Rollout, TeacherScores
from tests.helpers.stub_scorers import ModelScorer
from tests.helpers.stub_server import StubServer
from tests.helpers.teachers import make_rollout_of, remote_teacher

TOP_K = 16
WIDTHS = (None, 4, TOP_K, 1)
ANSWERS = (b"bo 12", b"1 2 3 4 5", b"zyx bo ka", b"ka")


@pytest.fixture(scope="module")
def student(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def tokenizer(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.teachers["sort"])


@pytest.fixture(scope="module")
def near(tiny_world: World, student: ChatTokenizer, tokenizer: ChatTokenizer) -> HfTeacher:
    return HfTeacher(
        "sort",
        tiny_world.teachers["sort"],
        tokenizer=tokenizer,
        student=student,
        device=torch.device("cpu"),
        options=HfOptions(top_k=TOP_K, temperature=1.0, batch_size=4),
    )


@pytest.fixture(scope="module")
def rollouts(student: ChatTokenizer) -> list[Rollout]:
    found = [make_rollout_of(student, answer) for answer in ANSWERS]
    return [
        replace(rollout, prompt=replace(rollout.prompt, top_k=k))
        for rollout, k in zip(found, WIDTHS, strict=True)
    ]


def test_what_is_cut_joins_the_tail(near: HfTeacher, rollouts: list[Rollout]) -> None:
    (whole,) = near.score(rollouts[:1])
    cut = cut_rows(whole, 5)
    assert whole.topk_ids is not None and cut.topk_ids is not None
    assert cut.topk_ids.tolist() == whole.topk_ids[:, :5].tolist()
    assert cut.topk_logprobs.tobytes() == np.ascontiguousarray(whole.topk_logprobs[:, :5]).tobytes()
    rest = np.exp(whole.topk_logprobs[:, 5:].astype(np.float64)).sum(1)
    assert np.exp(cut.log_tail.astype(np.float64)) == pytest.approx(
        rest + np.exp(whole.log_tail.astype(np.float64)), rel=1e-6
    )
    for same in (cut_rows(whole, None), cut_rows(whole, TOP_K), cut_rows(whole, 10**6)):
        assert same is whole


def test_the_likeliest_are_kept_whatever_their_order(
    near: HfTeacher, rollouts: list[Rollout]
) -> None:
    (whole,) = near.score(rollouts[:1])
    assert whole.topk_ids is not None
    turned = replace(
        whole, topk_ids=whole.topk_ids[:, ::-1], topk_logprobs=whole.topk_logprobs[:, ::-1]
    )
    cut = cut_rows(turned, 3)
    assert cut.topk_ids is not None
    assert cut.topk_ids.tolist() == whole.topk_ids[:, :3].tolist()


def test_rows_that_are_missing_stay_missing(near: HfTeacher, rollouts: list[Rollout]) -> None:
    (whole,) = near.score(rollouts[:1])
    gone = replace(whole, valid=np.zeros_like(whole.valid))
    gone = replace(gone, topk_logprobs=np.full_like(whole.topk_logprobs, np.nan))
    cut = cut_rows(gone, 2)
    assert np.isnan(cut.topk_logprobs).all() and not cut.valid.any()


class Whole:
    """A teacher that sends whole rows, whatever it was asked for."""

    def __init__(self, near: HfTeacher, whole: HfTeacher) -> None:
        self.name, self.tokenizer = near.name, near.tokenizer
        self.score, self.accuracy, self.close = whole.score, whole.accuracy, whole.close


@pytest.fixture(scope="module")
def whole(tiny_world: World, near: HfTeacher, student: ChatTokenizer) -> HfTeacher:
    return HfTeacher(
        "sort",
        tiny_world.teachers["sort"],
        tokenizer=near.tokenizer,
        student=student,
        device=torch.device("cpu"),
        options=HfOptions(top_k=None, temperature=1.0, batch_size=4),
    )


def test_whole_rows_become_lists(
    near: HfTeacher, whole: HfTeacher, rollouts: list[Rollout]
) -> None:
    """All rows of a teacher, so that one batch holds them together."""
    pool = TeacherPool({"sort": Whole(near, whole)}, top_k=TOP_K)
    check_widths([each["sort"] for each in pool.score(rollouts)], near.score(rollouts))
    (scores,) = whole.score(rollouts[:1])
    size = near.tokenizer.vocabulary.size
    everything = cut_rows(scores, size + 5)
    assert everything.topk_ids is not None and np.isneginf(everything.log_tail).all()
    assert np.sort(everything.topk_ids, axis=1).tolist() == [[*range(size)]] * len(scores.valid)
    gone = replace(scores, valid=np.zeros_like(scores.valid))
    cut = cut_rows(replace(gone, topk_logprobs=np.full_like(scores.topk_logprobs, np.nan)), 2)
    assert cut.topk_ids is not None and (cut.topk_ids == -1).all()


def test_without_a_number_whole_rows_stay_whole(
    near: HfTeacher, whole: HfTeacher, rollouts: list[Rollout]
) -> None:
    rollouts = [replace(r, prompt=replace(r.prompt, top_k=None)) for r in rollouts]
    found = TeacherPool({"sort": Whole(near, whole)}).score(rollouts)
    assert all(each["sort"].topk_ids is None for each in found)


def check_widths(found: list[TeacherScores], full: list[TeacherScores]) -> None:
    for scores, one, k in zip(found, full, WIDTHS, strict=True):
        width = k or TOP_K
        assert scores.topk_ids is not None and one.topk_ids is not None
        assert scores.topk_ids.shape == scores.topk_logprobs.shape == (len(scores.valid), width)
        assert scores.topk_logprobs == pytest.approx(one.topk_logprobs[:, :width], abs=1e-4)
        mass = np.exp(scores.topk_logprobs.astype(np.float64)).sum(1) + np.exp(scores.log_tail)
        assert mass == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["hf", "uniform"])
def test_teachers_in_process(
    kind: str, near: HfTeacher, student: ChatTokenizer, rollouts: list[Rollout]
) -> None:
    teacher = near
    if kind == "uniform":
        tokenizer = near.tokenizer
        teacher = UniformTeacher("sort", tokenizer=tokenizer, student=student, top_k=TOP_K)
    found = TeacherPool({"sort": teacher}).score(rollouts)
    check_widths([each["sort"] for each in found], teacher.score(rollouts))


@pytest.mark.parametrize("shape", ["vllm", "mopd", "trl"])
def test_servers_are_asked_for_no_more(
    shape: str,
    tiny_world: World,
    near: HfTeacher,
    student: ChatTokenizer,
    tokenizer: ChatTokenizer,
    rollouts: list[Rollout],
) -> None:
    scorer = ModelScorer(tiny_world.teachers["sort"], vocab_size=tokenizer.vocabulary.size)
    with StubServer(scorer) as stub:
        teacher = remote_teacher(
            [stub.url], tokenizer=tokenizer, student=student, top_k=TOP_K, shape=shape
        )
        began = len(stub.requests)
        found = teacher.score(rollouts)
        check_widths(found, near.score(rollouts))
        key = {"vllm": "prompt_logprobs", "mopd": "top_k", "trl": "top_logprobs"}[shape]
        asked = [request[key] for request in stub.requests[began:]]
        # two samples share a request; another is the check of the first connection
        assert sorted(asked) == [1, 4, 16, 16]
        pooled = TeacherPool({"sort": teacher}).score(rollouts)
        for one, two in zip(pooled, found, strict=True):
            assert one["sort"].log_tail.tobytes() == two.log_tail.tobytes()
        teacher.close()


def test_samples_of_several_widths_make_one_batch(
    near: HfTeacher, student: ChatTokenizer, rollouts: list[Rollout]
) -> None:
    scores = TeacherPool({"sort": near}).score(rollouts)
    objective = Objective(
        weights={"sort": 1.0},
        normalizer=Normalizer(
            teachers=("sort",), domains=("sort",), normalization="chunk", by_domain=True
        ),
    )
    aligner = Aligner(
        student=student,
        teachers={"sort": near.tokenizer},
        payload={"sort": PayloadOptions(temperature=1.0)},
        objective=objective,
        options=AlignOptions(),
    )
    tally = Tally()
    samples = aligner.samples(rollouts, scores, tally)
    batch, _ = collate(
        0,
        samples,
        scores=scores,
        masked=tally.metrics()["masked"],
        objective=objective,
        batching=Batching(size=4),
        pad_id=student.pad_id,
        sum_over_replicas=lambda array: array,
    )
    (micro,) = batch.micro_batches
    rows = micro.rows["sort"]
    assert rows.topk_ids is not None and rows.topk_ids.shape[1] == TOP_K
    per_sample = [sample.rows["sort"] for sample in samples]
    widths = np.concatenate(
        [
            np.full(len(each.position), k or TOP_K)
            for each, k in zip(per_sample, WIDTHS, strict=True)
        ]
    )
    assert ((rows.topk_ids >= 0).sum(axis=1) == widths).all()
    assert (np.isfinite(rows.topk_logprobs).sum(axis=1) == widths).all()
    mass = np.exp(rows.topk_logprobs.astype(np.float64)).sum(1) + np.exp(rows.log_tail)
    assert mass == pytest.approx(1.0, abs=1e-5)

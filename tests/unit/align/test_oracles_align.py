"""Rows of W, tempered payloads and the smallest answers (docs/losses.md, oracles)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mopd.align.batch import Batching, Sample, make_micro_batches
from mopd.align.boundaries import align_bytes
from mopd.align.paths import PathOptions
from mopd.align.payload import PayloadOptions, teacher_rows
from mopd.align.temper import temper
from mopd.losses.divergence import Divergence
from mopd.losses.vocab import VocabShard
from mopd.projection import ProjectionOptions, ProjectionShard, build_projection
from mopd.types import MicroBatch, Prompt, Rollout, TeacherScores
from tests.helpers.gold_reference import gold_loss
from tests.helpers.losses import build_loss, make_projection, make_trie, run_head
from tests.helpers.vocabularies import byte_level, ids_of

SMEARED = ProjectionOptions(max_length=4, gamma=0.1)
CPU = torch.device("cpu")


def scores_of(ids: list[int], ends: list[int], probs: np.ndarray) -> TeacherScores:
    """Rows [T, V_T] of a teacher that lists everything."""
    with np.errstate(divide="ignore"):
        logs = np.log(probs).astype(np.float32)
    return TeacherScores(
        teacher="t",
        model_fingerprint="f",
        token_ids=np.array(ids, dtype=np.int32),
        byte_ends=np.array(ends, dtype=np.int64),
        logprobs=logs[np.arange(len(ids)), ids],
        topk_ids=np.tile(np.arange(probs.shape[1], dtype=np.int32), (len(ids), 1)),
        topk_logprobs=logs,
        log_tail=np.full(len(ids), -np.inf, dtype=np.float32),
        lse=None,
        valid=np.ones(len(ids), dtype=bool),
    )


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("13", (0.9090909, 0.0909091)),
        ("201", (0.9009009, 0.0900901, 0.0090090)),
        ("2013", (0.9000900, 0.0900090, 0.0090009, 0.0009001)),
    ],
)
def test_rows_of_w_33(token: str, expected: tuple[float, ...]) -> None:
    student, teacher = byte_level([token]), byte_level([])
    built = build_projection(student, teacher, SMEARED)
    (at,) = ids_of(student, token)
    cut = slice(built.crow[at], built.crow[at + 1])
    found = dict(zip(built.col[cut].tolist(), built.val[cut].tolist(), strict=True))
    wanted = dict(zip(ids_of(teacher, *token), expected, strict=True))
    assert found == pytest.approx(wanted, abs=1e-7)
    # rounding each of up to four float32 weights costs at most 3e-8
    sums = np.add.reduceat(built.val.astype(np.float64), built.crow[:-1])
    assert np.abs(sums - 1.0).max() <= 1e-7


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("height", [0.0, 40.0])
def test_two_log_sum_exps_temper_as_the_logits_do_15(temperature: float, height: float) -> None:
    """Listed rows against whole ones, also where logits are large: lse is a float32."""
    logits = np.random.default_rng(0).normal(size=(8, 50)) * 4.0 + height
    lse = np.stack([np.logaddexp.reduce(logits / t, axis=1) for t in (1.0, temperature)], axis=1)
    logs = logits - lse[:, :1]
    ids = np.argsort(-logs, axis=1)[:, :9].astype(np.int32)
    actual = np.random.default_rng(1).integers(0, 50, size=8).tolist()
    whole = scores_of(actual, list(range(1, 9)), np.exp(logs))
    listed = np.take_along_axis(logs, ids.astype(np.int64), axis=1)
    outside = np.log(1.0 - np.exp(listed).sum(axis=1))
    scores = replace(
        whole,
        topk_ids=ids,
        topk_logprobs=listed.astype(np.float32),
        log_tail=outside.astype(np.float32),
        lse=lse.astype(np.float32),
    )
    tempered, direct = temper(scores, temperature), np.exp(logits / temperature - lse[:, 1:])
    tolerance = 1e-6 if height == 0.0 else 1e-5  # the spacing of float32 at 40 is 4e-6
    wanted = np.take_along_axis(direct, ids.astype(np.int64), axis=1)
    assert np.exp(tempered.topk) == pytest.approx(wanted, abs=tolerance)
    assert np.exp(tempered.log_tail) == pytest.approx(1.0 - wanted.sum(axis=1), abs=4 * tolerance)
    assert np.exp(tempered.actual) == pytest.approx(direct[np.arange(8), actual], abs=tolerance)
    rows = temper(replace(whole, topk_ids=None, topk_logprobs=logits), temperature)
    assert np.exp(rows.rows(np.arange(8))) == pytest.approx(direct, abs=1e-6)


def test_a_list_that_adds_up_to_more_than_1_has_the_smallest_tail_19() -> None:
    probs = np.random.default_rng(2).dirichlet(np.ones(5), size=3)
    for temperature in (1.0, 2.0):
        lse = np.log((probs ** (1 / temperature)).sum(axis=1))
        scores = scores_of([0, 1, 2], [1, 2, 3], 1.0005 * probs)
        scores = replace(
            scores,
            lse=np.stack([np.zeros(3), lse], axis=1).astype(np.float32),
            log_tail=np.full(3, -20.0, dtype=np.float32),
        )
        tail = temper(scores, temperature).log_tail
        assert np.isfinite(tail).all() and (tail < np.log(2e-7)).all()


def one_token(prompt: int, probs: np.ndarray, *, before: int = 0) -> MicroBatch:
    """An answer of one byte behind a prompt of ``prompt`` tokens, ``before`` longer answers."""
    rollout = Rollout(
        prompt=Prompt(id="p", messages=(), domain="d"),
        sample_index=0,
        prompt_ids=np.zeros(prompt, dtype=np.int32),
        token_ids=np.array([2], dtype=np.int32),
        loss_mask=np.ones(1, dtype=bool),
        logprobs=np.zeros(1, dtype=np.float32),
        byte_ends=np.array([1]),
        response=b"c",
        policy_version=0,
        finish_reason="length",
    )
    rows = teacher_rows(
        scores_of([1], [1], probs[None]),
        align_bytes(np.array([1]), np.array([1]), both_end_turn=False),
        student_ids=rollout.token_ids,
        trainable=rollout.loss_mask,
        options=PayloadOptions(temperature=1.0),
    )
    longer = replace(rollout, prompt_ids=np.zeros(4, dtype=np.int32))
    samples = [Sample(rollout=longer, rows={})] * before
    samples.append(Sample(rollout=rollout, rows={"t": rows}))
    (micro,) = make_micro_batches(samples, batching=Batching(size=8), pad_id=0)
    return micro


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("prompt", [1, 3])
@pytest.mark.parametrize("name", ["gold", "uld", "kl"])
def test_an_answer_of_one_token_at_the_first_row_32_48(name: str, prompt: int, before: int) -> None:
    """A prompt of one token: row 0 predicts the answer, and it is trained."""
    probs = np.array([0.5, 0.3, 0.2])
    micro = one_token(prompt, probs, before=before)
    length = micro.tokens.shape[1]
    row = before * length + prompt - 1
    assert np.flatnonzero(micro.response_mask[before]).tolist() == [prompt - 1]
    assert micro.rows["t"].position.tolist() == micro.rows["t"].token_position.tolist() == [row]
    common = np.full(3, -1) if name == "uld" else np.arange(3)
    projection = ProjectionShard(
        make_projection(np.eye(3, 4), common=common), start=0, end=3, device=CPU
    )
    loss = (
        build_loss("kl", projection, divergence=Divergence(kind="jsd"))
        if name == "kl"
        else gold_loss(projection, {"divergence": Divergence(kind="jsd"), "weights": (1.0, 1.0)})
    )
    q = np.array([0.4, 0.4, 0.2])
    logits = torch.full((micro.tokens.size, 3), torch.nan, dtype=torch.float64)
    logits[row] = torch.as_tensor(q).log()
    shard = VocabShard(start=0, size=3, vocab_size=3)
    value, grad = run_head(loss, logits, micro.rows["t"], shard=shard, projection=projection)
    expected = 0.2 if name == "uld" else 0.00636717
    assert float(value) == pytest.approx(expected, abs=5e-8)
    grad[row] = 0.0
    assert not grad.any()


def test_mass_that_folds_to_null_keeps_the_loss_finite_38() -> None:
    """Nothing a student token reaches: the tails meet, and no logarithm of a small number."""
    student = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    projection = make_projection(np.eye(5)[[0, 1, 4]])  # the last student token goes to null
    fold = np.array([0, 1, 4, 4])  # and so do two of the teacher's
    shard = ProjectionShard(projection, start=0, end=3, device=CPU)
    values = []
    for lost in (0.1, 0.5, 0.999):
        probs = np.array([0.7 * (1 - lost), 0.3 * (1 - lost), 0.4 * lost, 0.6 * lost])
        rows = teacher_rows(
            scores_of([2], [1], probs[None]),
            align_bytes(np.array([1]), np.array([1]), both_end_turn=False),
            student_ids=np.array([2]),
            trainable=np.ones(1, dtype=bool),
            options=PayloadOptions(temperature=1.0, fold=fold),
        )
        assert np.exp(rows.log_tail[0]) == pytest.approx(lost, abs=1e-6)
        value, _ = run_head(
            build_loss("ctkd", shard),
            student,
            rows,
            shard=VocabShard(start=0, size=3, vocab_size=3),
            projection=shard,
        )
        bins, q = np.array([*probs[:2], lost]), np.array([0.6, 0.3, 0.1])
        values.append(float(value))
        assert values[-1] == pytest.approx(float((bins * np.log(bins / q)).sum()), abs=1e-5)
    assert max(values) < -np.log(0.1)


@pytest.mark.parametrize("failed", [False, True])
def test_a_level_without_any_stop_is_renormalised_and_weighs_its_mass_53(failed: bool) -> None:
    # students 3, 13, 12, x; teachers 1, 3, 2, x: no student token begins and ends with the 1
    trie = make_trie({(0,): ({1: [1], 2: [2]}, -1)})
    fold = np.arange(4)
    scores = scores_of([0, 1], [1, 2], np.array([[0.8, 0.1, 0.05, 0.05], [0.02, 0.9, 0.08, 0.0]]))
    if failed:
        scores = replace(scores, valid=np.array([True, False]))
    rows = teacher_rows(
        scores,
        align_bytes(np.array([2]), np.array([1, 2]), both_end_turn=False),
        student_ids=np.array([1]),
        trainable=np.ones(1, dtype=bool),
        options=PayloadOptions(
            temperature=1.0, path=PathOptions(trie=trie, fold=fold, max_length=4)
        ),
    )
    if failed:  # the chunk needs both rows
        assert len(rows.position) == len(rows.path_position) == 0
        return
    assert rows.path_position.tolist() == [0]
    assert rows.path_weight.tolist() == pytest.approx([0.98], abs=1e-6)
    target = dict(zip(rows.path_entry.tolist(), rows.path_target.tolist(), strict=True))
    groups = {int(trie.group_piece[g]): p for g, p in target.items()}
    assert groups == pytest.approx({1: 0.9 / 0.98, 2: 0.08 / 0.98}, abs=1e-6)

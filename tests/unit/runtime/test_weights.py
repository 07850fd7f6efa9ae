"""Means over chunks, tokens and sequences, domain by domain, and teachers that fail or are sure."""

from dataclasses import replace

import numpy as np
import pytest

from mopd.align.batch import Batching, Sample
from mopd.runtime.collate import Objective, collate
from mopd.runtime.weights import (
    Normalizer,
    dynamic_weights,
    scaled,
    score_sums,
    stand_ins,
)
from mopd.types import Prompt, Rollout, TeacherRows, TeacherScores
from tests.helpers.losses import make_rows


def sample(domain: str, tokens: int, teachers: dict[str, int], student_tokens: int = 1) -> Sample:
    """An answer of ``tokens`` tokens; ``teachers``: name -> chunks of ``student_tokens`` each."""
    rollout = Rollout(
        prompt=Prompt(id="p", messages=(), domain=domain),
        sample_index=0,
        prompt_ids=np.array([1, 2], dtype=np.int32),
        token_ids=np.arange(tokens, dtype=np.int32),
        loss_mask=np.ones(tokens, dtype=bool),
        logprobs=np.zeros(tokens, dtype=np.float32),
        byte_ends=np.arange(1, tokens + 1),
        response=b"x" * tokens,
        policy_version=0,
        finish_reason="stop",
    )
    rows = {name: some_rows(name, count, student_tokens) for name, count in teachers.items()}
    return Sample(rollout=rollout, rows=rows)


def some_rows(name: str, count: int, student_tokens: int) -> TeacherRows:
    positions = [student_tokens * i for i in range(count)]
    rows = make_rows(
        positions,
        np.zeros((count, 1), dtype=np.int32),
        np.full((count, 1), 0.5),
        chunk_size=[(student_tokens, 1)] * count,
    )
    return replace(rows, teacher=name)


def normalizer(normalization: str, *, by_domain: bool = True, domains=("a", "b")) -> Normalizer:
    return Normalizer(
        teachers=("t",), domains=domains, normalization=normalization, by_domain=by_domain
    )


def weights_after(samples: list[Sample], of: Normalizer) -> tuple[list[float], float]:
    """The weight of each answer's rows together, divided by the denominator, and that."""
    weighed = of.sequence_weights(samples)
    shares = of.shares(weighed)
    weighed = of.domain_weights(weighed, shares)
    (denominator,) = of.denominators(shares).values()
    return [float(s.rows["t"].row_weight.sum()) / denominator for s in weighed], denominator


SAMPLES = [sample("a", 8, {"t": 8}), sample("a", 4, {"t": 4}), sample("b", 2, {"t": 2})]


def test_a_mean_over_chunks_without_domains():
    shares, denominator = weights_after(SAMPLES, normalizer("chunk", by_domain=False))
    assert denominator == 14
    assert shares == pytest.approx([8 / 14, 4 / 14, 2 / 14])


def test_a_domain_of_short_answers_counts_by_its_answers():
    shares, _ = weights_after(SAMPLES, normalizer("chunk"))
    assert shares == pytest.approx([2 / 3 * 8 / 12, 2 / 3 * 4 / 12, 1 / 3])


def test_one_domain_changes_nothing():
    alone = [sample("a", 8, {"t": 8}), sample("a", 4, {"t": 4})]
    of = normalizer("chunk", domains=("a",))
    assert of.domain_weights(alone, of.shares(alone))[0].rows["t"] is alone[0].rows["t"]


def test_a_mean_over_tokens_divides_by_student_tokens():
    samples = [sample("a", 8, {"t": 4}, student_tokens=2), sample("a", 4, {"t": 4})]
    _, denominator = weights_after(samples, normalizer("token", domains=("a",)))
    assert denominator == 12


def test_a_mean_over_sequences_counts_every_answer_alike():
    shares, denominator = weights_after(SAMPLES, normalizer("sequence"))
    assert denominator == 3
    assert shares == pytest.approx([1 / 3] * 3)


def test_chunk_path_and_row_weights_go_together():
    (found,) = normalizer("sequence").sequence_weights([SAMPLES[1]])
    rows = found.rows["t"]
    assert rows.row_weight.tolist() == rows.chunk_weight.tolist() == [0.25] * 4


def of_teachers(samples: list[Sample], weights: dict[str, float], *, selected: bool = False):
    """What each teacher counts in all, with its own mean and its weight."""
    of = Normalizer(teachers=tuple(weights), domains=("a",), normalization="chunk", by_domain=True)
    shares = of.shares(samples)
    weighed = of.domain_weights(samples, shares)
    weighed = [stand_ins(sample, weights, selected=selected) for sample in weighed]
    denominators = of.denominators(shares)
    return {
        name: weights[name]
        * sum(float(s.rows[name].row_weight.sum()) for s in weighed if name in s.rows)
        / denominators[name]
        for name in weights
        if denominators[name]
    }


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_what_is_left_of_a_failed_reply_adds_up_to_1(failures: int) -> None:
    weights = {"t": 0.1, "u": 0.9}
    samples = [sample("a", 3, {"t": 3, "u": 0 if n < failures else 3}) for n in range(4)]
    found = of_teachers(samples, weights)
    assert found["u"] == pytest.approx(0.9 * (4 - failures) / 4)
    assert sum(found.values()) == pytest.approx(1.0)


def test_an_answer_that_nobody_judged_counts_nowhere() -> None:
    samples = [sample("a", 3, {"t": 0, "u": 0}), sample("a", 3, {"t": 3, "u": 3})]
    assert of_teachers(samples, {"t": 0.5, "u": 0.5}) == pytest.approx({"t": 0.5, "u": 0.5})
    assert stand_ins(samples[0], {"t": 0.5, "u": 0.5}, selected=False) is samples[0]


@pytest.mark.parametrize("chosen", [0, 1, 10])
def test_selected_rows_count_by_token_however_seldom_a_teacher_is_chosen(chosen: int) -> None:
    both = sample("a", 10, {"t": 10, "u": 10})
    take = (np.arange(10) < chosen).astype(np.float32)
    rows = {
        "t": replace(both.rows["t"], row_weight=take),
        "u": replace(both.rows["u"], row_weight=1.0 - take),
    }
    found = of_teachers([replace(both, rows=rows)], {"t": 0.3, "u": 0.7}, selected=True)
    assert found == pytest.approx({"t": chosen / 10, "u": 1.0 - chosen / 10})


def test_a_domain_where_a_teacher_is_never_chosen_loses_nothing() -> None:
    of = Normalizer(teachers=("t", "u"), domains=("a", "b"), normalization="chunk", by_domain=True)
    samples = [sample("a", 4, {"t": 4, "u": 4}), sample("b", 4, {"t": 4, "u": 4})]
    none = np.zeros(4, dtype=np.float32)
    rows = [
        {"t": samples[0].rows["t"], "u": replace(samples[0].rows["u"], row_weight=none)},
        {"t": replace(samples[1].rows["t"], row_weight=none), "u": samples[1].rows["u"]},
    ]
    samples = [replace(s, rows=r) for s, r in zip(samples, rows, strict=True)]
    shares = of.shares(samples)
    weights = {"t": 0.5, "u": 0.5}
    weighed = [stand_ins(s, weights, selected=True) for s in of.domain_weights(samples, shares)]
    total = sum(
        weights[name] * float(s.rows[name].row_weight.sum()) / of.denominators(shares)[name]
        for s in weighed
        for name in weights
    )
    assert total == pytest.approx(1.0)


def scores(logprobs: list[float], top: list[list[float]]) -> TeacherScores:
    size = len(logprobs)
    logs = np.log(np.array(top, dtype=np.float32))
    rest = np.log(np.maximum(1.0 - np.array(top).sum(1), 1e-12)).astype(np.float32)
    return TeacherScores(
        teacher="t",
        model_fingerprint="f",
        token_ids=np.zeros(size, dtype=np.int32),
        byte_ends=np.arange(1, size + 1) * (6 // size),
        logprobs=np.array(logprobs, dtype=np.float32),
        topk_ids=np.zeros((size, len(top[0])), dtype=np.int32),
        topk_logprobs=logs,
        log_tail=rest,
        lse=None,
        valid=np.ones(size, dtype=bool),
    )


def test_nll_counts_bytes_so_that_pieces_do_not_matter():
    whole, split = scores([-1.5], [[0.5]]), scores([-1.0, -0.5], [[0.5], [0.5]])
    assert score_sums(whole, "nll") == pytest.approx((-1.5, 6.0))
    assert score_sums(split, "nll") == pytest.approx((-1.5, 6.0))


def test_a_failed_reply_says_nothing_of_its_teacher() -> None:
    found = scores([-1.0, -0.5], [[0.5], [0.5]])
    failed = replace(found, valid=np.zeros(2, dtype=bool))
    half = replace(found, valid=np.array([True, False]))
    for kind in ("nll", "entropy", "confidence"):
        assert score_sums(failed, kind) == (0.0, 0.0)
    assert score_sums(half, "nll") == pytest.approx((-1.0, 3.0))


def test_entropy_and_confidence():
    found = scores([-1.0, -1.0], [[0.5, 0.25], [0.9, 0.1]])
    assert score_sums(found, "confidence") == pytest.approx((1.4, 2.0))
    negative = sum(p * np.log(p) for p in (0.5, 0.25, 0.25, 0.9, 0.1))
    assert score_sums(found, "entropy") == pytest.approx((negative, 2.0), abs=1e-5)


def test_surer_teachers_weigh_more_and_silent_ones_nothing():
    static = {"t": 0.5, "u": 0.25, "v": 0.25}
    sums = {"t": (-2.0, 2.0), "u": (-4.0, 2.0), "v": (0.0, 0.0)}
    found = dynamic_weights(static, sums, 1.0)
    assert found["v"] == 0.0
    assert found["t"] / found["u"] == pytest.approx(2.0 * np.e)
    assert sum(found.values()) == pytest.approx(1.0)
    assert dynamic_weights(static, sums, 0.0) == pytest.approx({"t": 2 / 3, "u": 1 / 3, "v": 0.0})
    assert dynamic_weights(static, {}, 1.0) == static


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
@pytest.mark.parametrize("normalization", ["chunk", "token", "sequence"])
def test_two_replicas_weigh_as_one(normalization, cut):
    objective = Objective(weights={"t": 1.0}, normalizer=normalizer(normalization))
    whole, together = run(SAMPLES, objective, None), []
    parts = [part for part in (SAMPLES[:cut], SAMPLES[cut:]) if part]
    sums: list[np.ndarray] = []
    for part in parts:
        run(part, objective, sums)
    for part in parts:
        together += run(part, objective, [sum(sums)], read=True)
    assert together == pytest.approx(whole)


def run(samples, objective, sums, *, read=False) -> list[float]:
    """What each row counts in the end; ``sums`` collects this replica's sums, or holds all."""

    def add(values: np.ndarray) -> np.ndarray:
        if read:
            return sums[0]
        if sums is not None:
            sums.append(values)
        return values

    batch, _ = collate(
        0,
        samples,
        scores=[{} for _ in samples],
        masked=(0.0, 1.0),
        objective=objective,
        batching=Batching(size=8),
        pad_id=0,
        sum_over_replicas=add,
    )
    weights = np.concatenate([m.rows["t"].row_weight for m in batch.micro_batches])
    return (weights / batch.denominators["t"]).tolist()


def test_scaling_by_one_keeps_the_rows():
    assert scaled(SAMPLES[0], {"t": 1.0}).rows["t"] is SAMPLES[0].rows["t"]

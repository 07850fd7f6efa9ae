"""The loss rows by name, and their shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from tests.bench import cases, fused_cases
from tests.bench.cases import Shape

BUILDERS: Mapping[str, Callable[[Shape, Path], cases.Case]] = {
    "forward_kl_full": cases.forward_kl_full,
    "jsd_full": cases.jsd_full,
    "topk_tail": cases.topk_tail,
    "topk_renorm": cases.topk_renorm,
    "ctkd_boundary": cases.ctkd_boundary,
    "ctkd_pkl_8192": cases.ctkd_pkl,
    "ctkd_pkl_full": cases.ctkd_pkl_full,
    "gold_512": cases.gold_sorted,
    "gold_8192": cases.gold_sorted,
    "uld_512": cases.uld_sorted,
    "uld_exact": cases.uld_exact,
    "fused_jsd": fused_cases.fused_jsd,
}

_CROSS = Shape(rows=256, vocab=128256, teacher_vocab=151936, top=512)
FULL: Mapping[str, Shape] = {
    "forward_kl_full": Shape(rows=2048, vocab=32000),
    "jsd_full": Shape(rows=2048, vocab=32000),
    "topk_tail": Shape(rows=512, vocab=151936),
    "topk_renorm": Shape(rows=512, vocab=151936),
    "ctkd_boundary": _CROSS,
    "ctkd_pkl_8192": replace(_CROSS, top=8192),
    "ctkd_pkl_full": _CROSS,
    "gold_512": _CROSS,
    "gold_8192": replace(_CROSS, top=8192),
    "uld_512": _CROSS,
    "uld_exact": _CROSS,
    "fused_jsd": Shape(rows=2048, vocab=32000),
}
_SMALL_CROSS = Shape(rows=48, vocab=1200, teacher_vocab=1500, top=32)
QUICK: Mapping[str, Shape] = {
    "forward_kl_full": Shape(rows=64, vocab=512),
    "jsd_full": Shape(rows=64, vocab=512),
    "topk_tail": Shape(rows=32, vocab=1024, top=16),
    "topk_renorm": Shape(rows=32, vocab=1024, top=16),
    "ctkd_boundary": _SMALL_CROSS,
    "ctkd_pkl_8192": replace(_SMALL_CROSS, top=256),
    "ctkd_pkl_full": _SMALL_CROSS,
    "gold_512": _SMALL_CROSS,
    "gold_8192": replace(_SMALL_CROSS, top=256),
    "uld_512": _SMALL_CROSS,
    "uld_exact": _SMALL_CROSS,
    "fused_jsd": Shape(rows=64, vocab=512),
}
# where the scaling row starts from; it doubles the rows and the vocabularies
_HALF_CROSS = Shape(rows=128, vocab=64128, teacher_vocab=75968, top=512)
SCALING_BASE: Mapping[str, Shape] = {
    "forward_kl_full": Shape(rows=512, vocab=16000),
    "jsd_full": Shape(rows=512, vocab=16000),
    "topk_tail": Shape(rows=128, vocab=75968),
    "topk_renorm": Shape(rows=128, vocab=75968),
    "ctkd_boundary": _HALF_CROSS,
    "ctkd_pkl_8192": replace(_HALF_CROSS, top=8192),
    "ctkd_pkl_full": _HALF_CROSS,
    "gold_512": _HALF_CROSS,
    "gold_8192": replace(_HALF_CROSS, top=8192),
    "uld_512": _HALF_CROSS,
    "uld_exact": _HALF_CROSS,
    "fused_jsd": Shape(rows=512, vocab=16000),
}

"""What each row should reach, and the best figures reported for others on the same work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """CPU-time ratio to the row's baseline, peak extra memory in logits tensors."""

    ratio: float
    peak: float
    peer: str | None = None
    peer_ratio: float | None = None
    peer_peak: float | None = None


TARGETS: Mapping[str, Target] = {
    "forward_kl_full": Target(ratio=0.60, peak=1.1, peer="NeMo-RL", peer_ratio=1.12, peer_peak=5.0),
    "jsd_full": Target(ratio=0.80, peak=1.2, peer="Liger", peer_ratio=4.57, peer_peak=13.0),
    "topk_tail": Target(ratio=0.60, peak=1.05, peer="TRL", peer_ratio=1.16, peer_peak=3.0),
    "topk_renorm": Target(ratio=0.13, peak=1.01, peer="NeMo-RL", peer_ratio=0.116, peer_peak=1.01),
    "ctkd_pkl_8192": Target(ratio=0.85, peak=1.6, peer="NeMo-RL", peer_ratio=3.03, peer_peak=4.7),
    "ctkd_boundary": Target(ratio=0.80, peak=1.6),
    "gold_8192": Target(ratio=2.0, peak=2.5, peer="NeMo-RL", peer_ratio=9.2, peer_peak=9.5),
    "gold_512": Target(ratio=1.2, peak=2.0),
    "uld_exact": Target(ratio=6.5, peak=3.0, peer="TRL", peer_ratio=200.0),
    "uld_512": Target(ratio=0.9, peak=2.0),
    "fused_jsd": Target(ratio=0.60, peak=0.3, peer="Liger", peer_ratio=0.95, peer_peak=3.6),
}

"""How much distillation and cross-entropy count: fixed, or brought to one size step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

MIN_SCALE, MAX_SCALE = 0.01, 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Weights of the two terms: total = kd * L_KD + ce * L_CE.

    ``fixed`` returns the lambdas. ``dynamic`` multiplies ``lambda_kd`` by EMA(CE) / EMA(KD) within
    [MIN_SCALE, MAX_SCALE] (X-Token, 2605.21699, takes the ratio of the current values): a constant
    of the step, from earlier steps only. Feed `update` with GLOBAL means of a whole step: a ratio
    of local micro-batches would differ between ranks. It is made for divergences, which are never
    negative; the value of a policy gradient has no size to balance.
    """

    mode: Literal["fixed", "dynamic"]
    lambda_kd: float
    lambda_ce: float
    decay: float  # of the averages over steps
    mean_kd: float | None = None
    mean_ce: float | None = None

    def scales(self) -> tuple[float, float]:
        """(kd, ce) of the next step; the ratio is 1 until there are averages."""
        if self.mode == "fixed" or self.mean_kd is None or self.mean_ce is None:
            return self.lambda_kd, self.lambda_ce
        return self.lambda_kd * _ratio(self.mean_ce, self.mean_kd), self.lambda_ce

    def update(self, kd_mean: float, ce_mean: float) -> Balance:
        """After a step; means that are not finite, or a KD mean of 0 (nothing judged), change
        nothing.

        Averages begin at their first value, which needs no correction for a start at 0.
        """
        if not (math.isfinite(kd_mean) and math.isfinite(ce_mean)) or kd_mean <= 0.0:
            return self
        return replace(
            self,
            mean_kd=self._average(self.mean_kd, kd_mean),
            mean_ce=self._average(self.mean_ce, ce_mean),
        )

    def state(self) -> dict[str, float | None]:
        """What a checkpoint keeps."""
        return {"mean_kd": self.mean_kd, "mean_ce": self.mean_ce}

    def from_state(self, state: dict[str, float | None]) -> Balance:
        """The same options with the averages of a checkpoint."""
        return replace(self, mean_kd=state["mean_kd"], mean_ce=state["mean_ce"])

    def _average(self, before: float | None, value: float) -> float:
        if before is None:
            return value
        return self.decay * before + (1.0 - self.decay) * value


def _ratio(above: float, below: float) -> float:
    """Within the limits. Nothing above and below is balanced; below 0 there is only rounding."""
    above, below = max(above, 0.0), max(below, 0.0)
    if below * MAX_SCALE <= above:
        return MAX_SCALE if above > 0.0 else 1.0
    return max(above / below, MIN_SCALE)

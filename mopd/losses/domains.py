"""The divergence of each domain, beside that of each teacher: sums without a gradient."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mopd.losses.base import Coupled, LossSums
from mopd.losses.observe import COUNT, SUM, text_of
from mopd.losses.rows import Block
from mopd.types import MicroBatch, TeacherRows

KL_DOMAIN = "kl_domain"


class DomainKl:
    """Weighted divergences of a micro-batch, and their weights, by the domain of their text.

    All teachers that judge a domain count together. Without ``MicroBatch.domains`` nothing is kept.
    """

    def __init__(self, micro: MicroBatch, like: Tensor) -> None:
        self._micro = micro
        self._names = sorted(set(micro.domains))
        self._of_text = np.array([self._names.index(name) for name in micro.domains], dtype=int)
        self._sums = torch.zeros(2, len(self._names), dtype=like.dtype, device=like.device)

    def add_rows(self, block: Block, sums: LossSums) -> None:
        """Of a loss that has a divergence at each row."""
        if not self._names or sums.rows is None:
            return
        domain = self._domain(block.positions)[sums.rows.row]
        self._sums.index_add_(1, domain, torch.stack([sums.rows.total, sums.rows.weight]))

    def add_chunks(self, payload: TeacherRows, joined: Coupled) -> None:
        """Of a loss that has one for each chunk; a chunk lies where its boundary row does."""
        if not self._names or joined.chunk_kl is None:
            return
        owned = np.flatnonzero(payload.chunk_owned)
        weight = torch.as_tensor(payload.chunk_weight[owned], device=self._sums.device)
        total = joined.chunk_kl[torch.as_tensor(owned, device=self._sums.device)]
        values = torch.stack([total, weight.to(self._sums.dtype)])
        self._sums.index_add_(1, self._domain(payload.position), values)

    def sums(self) -> dict[str, Tensor]:
        """``SUM + kl_domain/<domain>`` and ``COUNT + kl_domain/<domain>``."""
        return {
            f"{prefix}{KL_DOMAIN}/{name}": values[i]
            for prefix, values in zip((SUM, COUNT), self._sums, strict=True)
            for i, name in enumerate(self._names)
        }

    def _domain(self, positions: np.ndarray) -> Tensor:
        text, _ = text_of(self._micro, positions)
        return torch.as_tensor(self._of_text[text], device=self._sums.device)

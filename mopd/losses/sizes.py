"""How many rows of logits a block takes. No torch: `mopd plan` reads it, too."""

from __future__ import annotations

# On a CPU a block and its few temporaries should stay in cache; a GPU wants large blocks.
BLOCK_ELEMENTS = {"cpu": 1_000_000}
BLOCK_ELEMENTS_DEVICE = 64_000_000
MIN_ROWS, MAX_ROWS = 16, 4096
PANEL_ROWS = 256  # rows that one matrix product takes at once, unless a block has more


def block_rows(device_type: str, columns: int) -> int:
    """Rows of one block of logits with ``columns`` of this rank on a `torch.device`'s type."""
    elements = BLOCK_ELEMENTS.get(device_type, BLOCK_ELEMENTS_DEVICE)
    return max(MIN_ROWS, min(MAX_ROWS, elements // max(columns, 1)))

"""Path terms as entries, tokens with a slot and a probability, and the payload made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NO_STOP = np.iinfo(np.int64).min


@dataclass(slots=True)
class Entries:
    """Tokens and their slots. Entries of one (boundary, slot) add up to one probability."""

    boundary: np.ndarray  # [M]
    slot: np.ndarray  # [M] the key of the slot's first member
    key: np.ndarray  # [M] a trie group, or -1 - student token
    prob: np.ndarray  # [M]


def slots_of(entries: Entries, position: np.ndarray) -> dict[str, np.ndarray]:
    """Entries sorted by boundary, slot and key, without repetitions; mass summed per slot."""
    told = entries.slot != NO_STOP
    boundary, slot, key = entries.boundary[told], entries.slot[told], entries.key[told]
    # one integer per entry: sorting those is far faster than sorting rows of three
    low = int(min(slot.min(initial=0), key.min(initial=0)))
    bits = (int(max(slot.max(initial=0), key.max(initial=0))) - low).bit_length()
    assert len(position).bit_length() + 2 * bits < 63
    head = (boundary << bits) | (slot - low)
    packed = np.sort((head << bits) | (key - low))
    packed = packed[np.diff(packed, prepend=-1) != 0]
    entry_head = packed >> bits
    first = np.diff(entry_head, prepend=-1) != 0
    heads = entry_head[first]
    prob = entries.prob[told]
    some = np.flatnonzero(prob)
    mass = np.bincount(np.searchsorted(heads, head[some]), weights=prob[some], minlength=len(heads))
    mass = np.maximum(mass, 0.0)  # what was moved away leaves a rounding error
    owner = heads >> bits
    begins = np.flatnonzero(np.diff(owner, prepend=-1))
    counts = np.diff(begins, append=len(owner))
    index = np.repeat(np.arange(len(begins)), counts)
    total = np.bincount(index, weights=mass, minlength=len(begins))
    return {
        "path_position": position[owner[begins]],
        "path_weight": np.minimum(total, 1.0).astype(np.float32),
        "path_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "path_target": (mass / np.maximum(total, 1e-30)[index]).astype(np.float32),
        "path_entry_slot": np.cumsum(first) - 1,
        "path_entry": (packed & ((1 << bits) - 1)) + low,
    }


def concatenate(parts: list[Entries]) -> Entries:
    none = np.zeros(0, dtype=np.int64)
    parts = [Entries(boundary=none, slot=none, key=none, prob=np.zeros(0)), *parts]
    names = ("boundary", "slot", "key", "prob")
    return Entries(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})

"""First fit: groups of devices that stay on one node each. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
DeviceT = TypeVar("DeviceT")


def first_fit(
    sizes: Sequence[tuple[KeyT, int]], rooms: Sequence[Sequence[DeviceT]]
) -> dict[KeyT, tuple[DeviceT, ...]] | None:
    """Give every key so many devices of one room; None where that does not work out.

    Larger groups choose first, equal ones in their order, each in the first room that has enough
    left (first-fit decreasing). Where each size divides the next larger one and the rooms' sizes,
    as powers of two do on nodes of eight, this finds a place whenever there is one; for other sizes
    it may miss one.
    """
    taken = [0] * len(rooms)
    found: dict[KeyT, tuple[DeviceT, ...]] = {}
    for key, size in sorted(sizes, key=lambda one: -one[1]):
        room = next((r for r, of in enumerate(rooms) if len(of) - taken[r] >= size), None)
        if room is None:
            return None
        found[key] = tuple(rooms[room][taken[room] : taken[room] + size])
        taken[room] += size
    return found


def cuts(total: int, widths: Sequence[int]) -> list[list[int]]:
    """Ways to cut a pool of ``total`` devices: whole, or into pieces of one of the ``widths``."""
    found = [[total]]
    for width in sorted(set(widths), reverse=True):
        whole, rest = divmod(total, width)
        cut = [width] * whole + [1] * rest
        if cut not in found:
            found.append(cut)
    return found

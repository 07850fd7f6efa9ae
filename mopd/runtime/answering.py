"""How far an evaluation is: its prompts are asked in parts, and each part is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mopd.rollout.base import Sampler
from mopd.types import Prompt, Rollout

Activity = Callable[[str, int, int, str], None]  # what, done, of how many, of what


class InParts:
    """A sampler that is asked ``part_size`` prompts at a time, and tells how many it has.

    Args:
        total: prompts of the whole evaluation on this replica.
        finished: called after every part.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        part_size: int,
        total: int,
        activity: Activity,
        finished: Callable[[], None],
    ) -> None:
        self._sampler = sampler
        self._part_size = part_size
        self._total = total
        self._activity = activity
        self._finished = finished
        self._done = 0

    def answer(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Greedy answers, one a prompt."""
        rollouts: list[Rollout] = []
        for begin in range(0, len(prompts), self._part_size):
            self._tell()
            rollouts += self._sampler.answer(prompts[begin : begin + self._part_size])
            self._done += len(prompts[begin : begin + self._part_size])
            self._finished()
        self._tell()
        return rollouts

    def _tell(self) -> None:
        self._activity("answering held-out prompts", self._done, self._total, "prompts")


def telling_domains(
    what: str,
    domains: Mapping[str, Sequence[Prompt]],
    *,
    activity: Activity,
    finished: Callable[[], None],
) -> Callable[[], None]:
    """To be called after every domain, in their order; tells ``what`` now, and then each time."""
    sizes = [len(prompts) for prompts in domains.values()]
    total, done = sum(sizes), 0
    activity(what, done, total, "prompts")

    def told() -> None:
        nonlocal done
        done += sizes.pop(0)
        activity(what, done, total, "prompts")
        finished()

    return told

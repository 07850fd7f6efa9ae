"""A step's wall time as a partition: every second of the loop is in one phase, and in no other."""

from __future__ import annotations

from collections.abc import Mapping

PREFIX = "phase/"
PHASES = ("rollout", "teachers", "align", "train", "sync", "wait", "other")


def phases(line: Mapping[str, float], *, ahead: bool) -> dict[str, float]:
    """Seconds of the rank that logs, ``phase/<name>``; they add up to ``time/step``.

    ========  ===================================================================================
    rollout   sampling the answers, and writing off-policy ones
    teachers  scoring them, by teachers elsewhere and on the student's own ranks
    align     aligning and packing, and handing the batch to the other ranks of the replica
    train     forward, backward, optimizer
    sync      the new weights to the sampler, and the probe of them
    wait      for other replicas, for a turn on shared devices, and with ``ahead`` for the thread
              that samples and scores ahead
    other     the journals, and what is left
    ========  ===================================================================================

    Args:
        line: a step's times, as `mopd.runtime.report` has them.
        ahead: whether rollouts and teachers run beside the loop (``rollout.max_staleness`` > 0).
            Then their own times overlap the other phases and only what the loop waited counts.
    """

    def seconds(key: str) -> float:
        return line.get(f"time/{key}", 0.0)

    found = {
        "rollout": 0.0 if ahead else seconds("rollout"),
        "teachers": seconds("inside") + (0.0 if ahead else seconds("teachers")),
        "align": seconds("align") - seconds("align/wait") + seconds("broadcast"),
        "train": seconds("train"),
        "sync": seconds("sync") - seconds("sync/wait"),
        "wait": seconds("align/wait") + seconds("sync/wait") + seconds("turn"),
    }
    if ahead:
        found["wait"] += seconds("gather")
    found["other"] = max(0.0, seconds("step") - sum(found.values()))
    return {f"{PREFIX}{name}": found[name] for name in PHASES}

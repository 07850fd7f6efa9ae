"""Where a metric deserves a warning: of a run while it goes, and of its page afterwards."""

from __future__ import annotations

MASKED = 0.05  # response tokens without a teacher's judgement
SCORED = 0.9  # usable rows of those that a teacher was asked for
TRUNCATED = 0.1  # answers cut at rollout.max_new_tokens
DROPPED = 0.5  # answers that are not trained on, all reasons together
SKIPPED = 0.02  # steps without an update
RESCORED = 0.1  # nats an answer, from before a restart
FAR_TEACHER = 0.15  # nats of reverse KL at the start (MOPD: 0.04 trained well, 0.19 badly)
WORSE = 0.02  # accuracy below an earlier evaluation's
CANONICAL_LOSS = 0.15  # a fall of the canonical share

"""When a request to servers is given up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryOptions:
    """As in the recipe.

    Args:
        max_retries: further tries of one request.
        restart_budget_s: how long all replicas may be away, however many tries that takes.
        entries_per_request: tokens times k of one request, so that a reply stays small.
        pause_s: before the first retry; it doubles, with a jitter, up to a limit.
    """

    max_outstanding: int
    max_retries: int
    restart_budget_s: float
    entries_per_request: int = 1 << 17
    prompts_per_request: int = 32
    pause_s: float = 0.1

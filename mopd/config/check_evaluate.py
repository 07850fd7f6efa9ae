"""Mistakes in what is evaluated, and in what goes by it."""

from __future__ import annotations

from collections.abc import Iterator

from mopd.config.schema import RunConfig


def check_evaluate(config: RunConfig) -> Iterator[str]:
    """Problems of `evaluate`, and of `checkpoint.keep_best`, one line each."""
    section, data = config.evaluate, config.data
    users = {
        f"evaluate.patience={section.patience}": section.patience is not None,
        f"checkpoint.keep_best={config.checkpoint.keep_best}": config.checkpoint.keep_best > 0,
    }
    used = [name for name, is_set in users.items() if is_set]
    if section.interval is None:
        for name in used:
            yield f"{name}: goes by evaluations on the way; set evaluate.interval, or drop it"
        return
    if data.heldout_path is None and data.validation_path is None:
        yield (
            f"evaluate.interval={section.interval}: there is nothing to evaluate on; set "
            "data.heldout_path or data.validation_path, or drop it"
        )
        return
    if used:
        yield from _metric(config, used[0])


def _metric(config: RunConfig, user: str) -> Iterator[str]:
    section, data = config.evaluate, config.data
    if section.metric == "loss":
        if data.validation_path is None:
            yield f"evaluate.metric=loss: {user} goes by it; set data.validation_path"
        return
    if data.heldout_path is None:
        yield (
            f"evaluate.metric={section.metric}: {user} goes by it; set data.heldout_path, or "
            "metric=loss"
        )
    if section.metric == "kl" and section.kl_prompts_per_domain == 0:
        yield (
            "evaluate.kl_prompts_per_domain=0: leaves evaluate.metric=kl without a number; raise "
            "it, or set metric=accuracy"
        )

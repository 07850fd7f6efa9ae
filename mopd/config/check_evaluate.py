"""Mistakes in what is evaluated, and in what goes by it."""

from __future__ import annotations

from collections.abc import Iterator

from mopd.config.schema import RunConfig


def check_evaluate(config: RunConfig) -> Iterator[str]:
    """Problems of `evaluate`, and of `checkpoint.keep_best`, one line each."""
    section, data = config.evaluate, config.data
    used = _users(config)
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


def metric_user(config: RunConfig) -> str | None:
    """The key, with its value, that goes by `evaluate.metric`; None where none does."""
    return next(iter(_users(config)), None)


def _users(config: RunConfig) -> list[str]:
    patience, keep_best = config.evaluate.patience, config.checkpoint.keep_best
    users = {
        f"evaluate.patience={patience}": patience is not None,
        f"checkpoint.keep_best={keep_best}": keep_best > 0,
    }
    return [name for name, is_set in users.items() if is_set]


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
    teachers = [teacher for teacher in config.teachers.values() if teacher.weight > 0]
    losses = {teacher.loss or config.distillation.loss for teacher in teachers}
    if section.metric == "kl" and losses == {"uld"}:
        yield (
            f"evaluate.metric=kl: {user} goes by it, and uld has no divergence; set "
            "metric=accuracy or loss"
        )

"""Teachers on the student's own ranks, `megatron` and `self`: their keys and their layout."""

from __future__ import annotations

from collections.abc import Iterator

from mopd.config.check_layout import check_layout
from mopd.config.check_servers import unread
from mopd.config.model_shape import find_model_config, read_model_config
from mopd.config.schema import RunConfig, TeacherSection
from mopd.errors import ConfigError

INSIDE_TYPES = ("megatron", "self")


def check_inside(config: RunConfig) -> Iterator[str]:
    """One line per mistake: the key, what is wrong, the remedy."""
    for name, teacher in config.teachers.items():
        prefix, kind = f"teachers.{name}.backend", teacher.backend.type
        if kind not in INSIDE_TYPES:
            keys, readers = ("max_tokens_per_micro_batch",), " or ".join(INSIDE_TYPES)
            yield from unread(prefix, teacher.backend, keys, f"type={readers}")
        if kind != "megatron":
            yield from unread(prefix, teacher.backend, ("offload", "dtype"), "type=megatron")
        if kind == "self":
            yield from _self(config, name, teacher)


def _self(config: RunConfig, name: str, teacher: TeacherSection) -> Iterator[str]:
    student = config.student
    if student.lora.rank is None:
        yield (
            f"teachers.{name}.backend.type=self: is the student without its adapter, and it trains "
            "none; set student.lora.rank, or type=megatron with the student's model"
        )
    for key in ("model", "tokenizer", "eos_token"):
        own = getattr(teacher, key)
        if own is not None and own != getattr(student, key):
            yield (
                f"teachers.{name}.{key}: type=self takes the student's, and this is another one; "
                "leave it out, or set backend.type=megatron"
            )


def check_inside_layout(config: RunConfig, *, world_size: int) -> Iterator[str]:
    """Models that cannot be spread as the student is. Reads their config.json."""
    for name, teacher in config.teachers.items():
        if teacher.backend.type != "megatron" or teacher.model is None:  # `check._paths`
            continue
        key, parallel = f"teachers.{name}.model", config.student.parallel
        try:
            shape = read_model_config(find_model_config(teacher.model).parent)
        except ConfigError as error:
            said = str(error).replace("student.model", key)
            yield f"{said}; or set teachers.{name}.backend.type=hf"
            return
        if shape.moe is None:  # no experts to spread
            parallel = parallel.model_copy(update={"expert_model_parallel_size": 1})
        for problem in check_layout(shape, parallel, world_size):
            said = problem.replace("student.parallel: ", "student.parallel.")
            yield (
                f"{key}: is spread over the student's ranks, and {said}; change that, or set "
                f"teachers.{name}.backend.type=hf"
            )

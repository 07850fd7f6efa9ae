"""Values of other trainers' files as a recipe takes them. All raise ValueError with the reason."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from mopd.config.peers.rows import Convert, Source

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONSTANT = ("constant", "constant_with_warmup")


def number(value: Any, source: Source | None = None) -> float:
    """A finite number, also as text: YAML 1.1 reads 1e-5 as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number is expected")
    try:
        result = float(value)
    except (ValueError, OverflowError):
        raise ValueError("a number is expected") from None
    if not math.isfinite(result):
        raise ValueError("a finite number is expected")
    return result


def integer(value: Any, source: Source | None = None) -> int:
    result = number(value)
    if result != int(result):
        raise ValueError("a whole number is expected")
    return int(result)


def positive(value: Any, source: Source | None = None) -> int:
    if (result := integer(value)) < 1:
        raise ValueError("a whole number of at least 1 is expected")
    return result


def share(value: Any, source: Source | None = None) -> float:
    if not 0.0 <= (result := number(value)) <= 1.0:
        raise ValueError("a number from 0 to 1 is expected")
    return result


def boolean(value: Any, source: Source | None = None) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in known:
        raise ValueError("true or false is expected")
    return known[str(value).lower()]


def text(value: Any, source: Source | None = None) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value):
        raise ValueError("a text is expected")
    return str(value)


def items(value: Any, source: Source | None = None) -> list[str]:
    """A list, or a text of names with commas or blanks between them."""
    if isinstance(value, str):
        value = re.split(r"[,\s]+", value.strip().strip("[]"))
    if not isinstance(value, list) or not value:
        raise ValueError("a list is expected")
    return [text(item).strip("'\"") for item in value]


def one_path(value: Any, source: Source | None = None) -> str:
    """The only entry: a recipe has one pattern of files."""
    paths = items(value) if isinstance(value, list) else [text(value)]
    if len(paths) > 1:
        raise ValueError("one path or pattern is expected; put the rows into one directory")
    return paths[0]


def fixed(value: Any) -> Convert:
    """The same whatever theirs is."""
    return lambda given, source: value


def truth(key: str) -> Callable[[Source], bool]:
    """Whether their ``key`` is on; a value that is no truth counts as off."""

    def holds(source: Source) -> bool:
        try:
            return boolean(source.get(key))
        except ValueError:
            return False

    return holds


def differs(neutral: float) -> Callable[[Any], bool]:
    """Whether a value is another number than the one that switches its key off."""

    def holds(value: Any) -> bool:
        try:
            return number(value) != neutral
        except ValueError:
            return True

    return holds


def is_on(value: Any) -> bool:
    try:
        return boolean(value)
    except ValueError:
        return True


def some(value: Any) -> bool:
    return True


def dtype(value: Any, source: Source | None = None) -> str:
    """bfloat16 or float32; mopd trains in no other."""
    names = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}
    name = str(value).lower().removeprefix("torch.")
    if name not in names:
        raise ValueError("mopd trains in bfloat16 or float32")
    return names[name]


def mixed(value: Any, source: Source | None = None) -> str:
    return "bfloat16" if boolean(value) else "float32"


def recompute(value: Any, source: Source | None = None) -> str | None:
    return "full" if boolean(value) else None


def modules(value: Any, source: Source | None = None) -> list[str]:
    """Linear layers of an adapter; `all-linear` names all seven."""
    names = items(value)
    if names in (["all-linear"], ["all_linear"]):
        return ALL_LINEAR
    unknown = [name for name in names if name not in ALL_LINEAR]
    if unknown:
        raise ValueError(f"{unknown[0]} is no linear layer of a student")
    return names


def run_name(value: Any, source: Source | None = None) -> str:
    """The last part of a path as the name of a run."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text(value).rstrip("/").rpartition("/")[2])
    if not (name := name.lstrip("._-")):
        raise ValueError("its last part is no name of a run")
    return name


def run_dir(value: Any, source: Source | None = None) -> str:
    return text(value).rstrip("/").rpartition("/")[0] or "."


def teacher_names(models: list[Any]) -> list[str]:
    """A name for each teacher, by its model where that has one; all different."""
    names: list[str] = []
    for number_, model in enumerate(models, start=1):
        last = str(model or "").rstrip("/").rpartition("/")[2]
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", last).strip("_-")
        name = name or ("teacher" if len(models) == 1 else f"teacher_{number_}")
        names.append(f"{name}_{number_}" if name in names else name)
    return names


def warmup(source: Source, *, ratio: str, steps: str, total: str) -> float:
    """The share of the run in which the learning rate rises."""
    if source.has(steps) and (count := number(source.get(steps))) > 0:
        if count < 1:
            return round(count, 6)
        if not source.has(total):
            raise ValueError(f"a share of the run is wanted: set {total}")
        return round(min(1.0, count / positive(source.get(total))), 6)
    return share(source.get(ratio) or 0)


def decay(kind: Any, rising: float) -> float:
    """The share of the run in which it falls: all that is left, or nothing."""
    if text(kind) in CONSTANT:
        return 0.0
    return math.floor((1.0 - rising) * 1e6) / 1e6


def batch(source: Source, *, sequences: int, generations: int) -> int:
    """Prompts of a step from the answers of one process."""
    total = sequences * source.processes
    if total % generations:
        raise ValueError(f"{total} answers a step are no multiple of {generations} a prompt")
    return total // generations

"""What notebooks rely on: names, parameters, defaults, and what an import costs."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from pydantic import BaseModel

import mopd
import mopd.api
from mopd.api import options
from mopd.config import schema
from tests.helpers.api import PATH, signatures
from tests.helpers.source import ROOT


def test_signatures_are_those_promised() -> None:
    """Changed on purpose? ``python -m tests.helpers.api``, and a line in docs/changelog.md."""
    assert signatures() == json.loads(PATH.read_text(encoding="utf-8"))


def test_the_root_hands_on_every_name() -> None:
    assert set(mopd._NAMES) == set(mopd.api.__all__) <= set(dir(mopd))
    assert all(getattr(mopd, name) is getattr(mopd.api, name) for name in mopd._NAMES)
    with pytest.raises(AttributeError, match="no attribute 'algin_text'"):
        mopd.algin_text  # pyright: ignore  # noqa: B018


SECTIONS: list[tuple[tuple[type, ...], type[BaseModel], set[str]]] = [
    ((options.ProjectionKeywords, options.CtkdOptions), schema.CtkdSection, {"learned"}),
    ((options.GoldOptions,), schema.GoldSection, set()),
    ((options.UldOptions,), schema.UldSection, set()),
    ((options.KlOptions,), schema.KlSection, set()),
    ((options.OpdOptions,), schema.OpdSection, set()),
    ((options.HybridOptions,), schema.HybridSection, set()),
    ((options.DivergenceOptions,), schema.DivergenceSection, set()),
]


@pytest.mark.parametrize(("given", "section", "left_out"), SECTIONS)
def test_keywords_are_the_recipes_keys(
    given: tuple[type, ...], section: type[BaseModel], left_out: set[str]
) -> None:
    hints: dict[str, Any] = {}
    for one in given:
        hints |= get_type_hints(one)
    shared = set(options.SharedOptions.__annotations__)
    assert set(hints) - shared == set(section.model_fields) - left_out
    for name in set(hints) - shared:
        assert plain(hints[name]) == plain(section.model_fields[name].annotation), name


def test_shared_keywords_are_keys_of_the_recipe() -> None:
    for name, hint in get_type_hints(options.SharedOptions).items():
        field = schema.DistillationSection.model_fields[name]
        assert plain(hint) == plain(field.annotation), name


def plain(annotation: Any) -> Any:
    """Types as their names: what pydantic adds to a number is left out, sections are mappings."""
    if is_typeddict(annotation) or (
        isinstance(annotation, type) and issubclass(annotation, BaseModel)
    ):
        return "mapping"
    origin = get_origin(annotation)
    if origin is Literal:
        return frozenset(flat(annotation))
    if origin in (Union, types.UnionType):
        return frozenset(plain(one) for one in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        return plain(annotation.__origin__)
    if origin is not None and issubclass(origin, dict | types.MappingProxyType):
        return "mapping"
    return "mapping" if origin is not None else annotation


def flat(annotation: Any) -> list[Any]:
    found = []
    for one in get_args(annotation):
        found += flat(one) if get_origin(one) is Literal else [one]
    return found


def loaded_after(program: str) -> set[str]:
    """Modules of a fresh interpreter behind ``program``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print('|'.join(sys.modules))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(done.stdout.strip().splitlines()[-1].split("|"))


def test_the_import_alone_costs_nothing() -> None:
    found = loaded_after("import mopd; mopd.__version__; dir(mopd)")
    assert not found & {"torch", "numpy", "pydantic", "transformers", "mopd.api"}


def test_use_needs_no_megatron_and_no_process_group() -> None:
    program = """
import torch, mopd
from tests.helpers.fast_tokenizers import tokenizer
student, teacher = tokenizer(["ab"]), tokenizer(["bc"])
aligned = mopd.align_text("abc", student, teacher)
projection = mopd.build_projection(student, teacher)
shapes = [(len(aligned.student_ids), student.size), (len(aligned.teacher_ids), teacher.size)]
logits, said = (torch.randn(shape) for shape in shapes)
mopd.ctkd_loss(logits.requires_grad_(), said, aligned, projection).loss.backward()
assert logits.grad.any() and not torch.distributed.is_initialized()
"""
    found = loaded_after(program)
    assert "torch" in found
    heavy = ("megatron", "ray", "vllm", "mopd.student", "mopd.demo", "mopd.cli", "tensorboard")
    assert not [name for name in found if name.startswith(heavy)]

"""A PEFT adapter's `adapter_config.json` against `student.lora`. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mopd.config.schema import LoraSection

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What changes the sum W + alpha / rank * B A; any value but these does.
_PLAIN = (None, False, "none", [], {})
_VARIANTS = (
    *("use_rslora", "use_dora", "use_qalora", "lora_bias", "bias", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "layers_to_transform"),
    *("layer_replication", "exclude_modules", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config"),
)


def check_adapter(section: LoraSection) -> Iterator[str]:
    """What keeps `student.lora.path` from being the adapter that ``section`` describes."""
    assert section.path is not None
    key, path = "student.lora.path", Path(section.path) / ADAPTER_CONFIG
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (Path(section.path) / name).is_file():
            yield f"{key}: {section.path} has no {name}; give a directory that PEFT saved"
            return
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        yield f"{key}: {path} is not valid JSON ({error}); save the adapter again"
        return
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        yield f"{key}: {path} is not a LoRA adapter (peft_type LORA); give one that is"
        return
    for name in _VARIANTS:
        value = raw.get(name)
        if value not in _PLAIN:
            yield (
                f"{key}: {path} sets {name}={value!r}, which is not supported; merge that adapter "
                "into student.model with PEFT, or give one without it"
            )
    yield from _agreement(section, raw, path)


def _agreement(section: LoraSection, raw: dict[str, Any], path: Path) -> Iterator[str]:
    for key, name, own in (("rank", "r", section.rank), ("alpha", "lora_alpha", section.alpha)):
        if raw.get(name) != own:
            yield (
                f"student.lora.{key}={own:g}: {path} has {name}={raw.get(name)!r}; set "
                f"student.lora.{key} to that"
            )
    theirs = raw.get("target_modules")
    if not isinstance(theirs, list) or {*theirs} != {*section.target_modules}:
        shown = f"[{', '.join(map(str, sorted(theirs)))}]" if isinstance(theirs, list) else theirs
        yield (
            f"student.lora.target_modules=[{', '.join(sorted(section.target_modules))}]: {path} "
            f"has {shown}; both must be the same list"
        )

"""Variables of the environment: switches, and which accelerators a process sees."""

from __future__ import annotations

from collections.abc import Mapping

from mopd.errors import ConfigError

# Which accelerators a process sees, by the names of `run.device`.
VISIBLE_DEVICES = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}

TRUE = ("1", "true", "yes", "on")
FALSE = ("", "0", "false", "no", "off")


def visible_devices(device: str) -> str:
    """The variable for ``device``, a value of `run.device`; CUDA's where it has none of its own."""
    return VISIBLE_DEVICES.get(device, VISIBLE_DEVICES["cuda"])


def flag(name: str, environment: Mapping[str, str], *, default: bool = False) -> bool:
    """Whether the variable ``name`` is on, in any case of letters; ``default`` where it is not set.

    A variable that is set to nothing is off.

    Raises:
        ConfigError: it is set to something that is neither yes nor no.
    """
    value = environment.get(name)
    if value is None:
        return default
    word = value.strip().lower()
    if word in TRUE:
        return True
    if word in FALSE:
        return False
    raise ConfigError(
        f"{name}: the environment has {value!r}, which is neither yes nor no; set it to 1 or 0, "
        "or unset it"
    )

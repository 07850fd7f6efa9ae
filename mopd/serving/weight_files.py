"""Weights of one version as a directory that trainer and servers see, checked before it is used.

`<root>/<session>/<step>/` holds `model.safetensors` under the Hugging Face names and `mopd.json`:
the version, and size and SHA-256 of the file. It appears whole, by one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mopd.serving.channel import Spec

WEIGHTS_FILE, MANIFEST_FILE = "model.safetensors", "mopd.json"
KEPT = 2  # a server may still read the version before

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

Shapes = Mapping[str, tuple[int, ...]]


class WeightsFileError(ValueError):
    """A directory of weights that must not reach an engine."""


def write_weights(root: Path, version: str, tensors: Mapping[str, Tensor]) -> Path:
    """Writes ``<root>/<version>`` and drops what is older than the last `KEPT` of the session."""
    target = root / version
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    file = part / WEIGHTS_FILE
    save_file(dict(tensors), file, metadata={"format": "pt"})
    manifest = {"version": version, "bytes": file.stat().st_size, "sha256": _sha256(file)}
    (part / MANIFEST_FILE).write_text(json.dumps(manifest) + "\n", encoding="ascii")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)
    steps = sorted((p for p in target.parent.iterdir() if p.name.isdigit()), key=_step)
    for old in steps[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _step(path: Path) -> int:
    return int(path.name)


def verify_weights(path: Path, version: str, known: Shapes) -> list[Spec]:
    """What the directory holds; reads everything and changes nothing.

    Raises:
        WeightsFileError: the directory is not all of ``version`` with the tensors ``known``.
    """
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise WeightsFileError(
            "trainer and server must both see rollout.backend.sync_dir, or set weight_sync="
            f"broadcast; no whole directory at {path} ({type(error).__name__})"
        ) from error
    file = path / WEIGHTS_FILE
    if not isinstance(manifest, dict) or manifest.get("version") != version:
        raise WeightsFileError(f"{path}: holds another version than {version}")
    try:
        size, digest = file.stat().st_size, _sha256(file)
    except OSError as error:
        raise WeightsFileError(f"{file}: cannot be read ({type(error).__name__})") from error
    if (size, digest) != (manifest.get("bytes"), manifest.get("sha256")):
        raise WeightsFileError(f"{file}: {size} bytes that are not those of its manifest")
    specs = specs_of([file])
    check_shapes(shapes_of(specs), known)
    return specs


def check_shapes(given: Shapes, known: Shapes) -> None:
    """Whether ``given`` are the tensors of a model whose files hold ``known``.

    A tied output layer may be in one and not in the other.

    Raises:
        WeightsFileError: a name or shape is wrong.
    """
    optional = {"lm_head.weight"}
    if missing := sorted(known.keys() - given.keys() - optional):
        raise WeightsFileError(f"{len(missing)} tensors are missing, as {missing[0]}")
    if unknown := sorted(given.keys() - known.keys() - optional):
        raise WeightsFileError(
            f"{len(unknown)} tensors are none of the engine's model, as {unknown[0][:80]}"
        )
    for name, shape in given.items():
        if name in known and shape != known[name]:
            raise WeightsFileError(
                f"{name}: shape {list(shape)} where the engine's model has {list(known[name])}"
            )


def model_specs(model_dir: Path) -> list[Spec]:
    """Every tensor of a Hugging Face directory.

    Raises:
        WeightsFileError: there are no safetensors.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise WeightsFileError(
            f"{model_dir}: no *.safetensors, so nothing says which weights would fit; start the "
            "server on a directory that has them"
        )
    return specs_of(files)


def specs_of(files: list[Path]) -> list[Spec]:
    """From the headers alone, which are checked against the files' sizes."""
    found: list[Spec] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                for name in names:
                    part = opened.get_slice(name)
                    dtype = str(part.get_dtype())
                    found.append((name, DTYPES.get(dtype, dtype), tuple(part.get_shape())))
        except (OSError, SafetensorError) as error:
            raise WeightsFileError(f"{file}: no safetensors ({error})") from error
    return found


def shapes_of(specs: Sequence[Spec]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: shape for name, _, shape in specs}


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a verified directory, on the CPU, one at a time."""
    with safe_open(path / WEIGHTS_FILE, framework="pt") as opened:
        names = list(opened.keys())
        for name in names:
            yield name, opened.get_tensor(name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

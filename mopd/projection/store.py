"""Projections on disk and in host memory: built once, keyed by both fingerprints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mopd.errors import ArtifactError
from mopd.projection.build import build_projection
from mopd.projection.options import ProjectionOptions
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import FibreTrie, Projection

FORMAT = "mopd-projection-6"
_MATRIX = ("crow", "col", "val", "kind", "fold", "common")
_TRIE = tuple(f.name for f in dataclasses.fields(FibreTrie))
_DTYPES = {"I64": np.int64, "I32": np.int32, "F32": np.float32, "U8": np.uint8, "BOOL": np.bool_}


def save_projection(path: Path, projection: Projection, *, options: ProjectionOptions) -> None:
    """Writes one safetensors file with its own digest; readers see the old file or the new one."""
    arrays = projection_arrays(projection)
    metadata = {
        "format": FORMAT,
        "student": projection.student_fingerprint,
        "teacher": projection.teacher_fingerprint,
        "options": options.text(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, temporary, metadata)
    metadata["sha256"] = _digest(*_parts(Path(temporary)))
    save_file(arrays, temporary, metadata)  # the digest makes the header longer, and nothing else
    os.replace(temporary, path)


def load_projection(
    path: Path,
    *,
    student: Vocabulary,
    teacher: Vocabulary,
    options: ProjectionOptions | None,
) -> Projection:
    """Maps a file and refuses it when it belongs to other tokenizers or other options.

    The arrays are read-only views on the file: processes of one host share its pages. Nothing may
    write into the file afterwards; `save_projection` replaces it and leaves mapped ones alone.
    With ``options`` None a file is taken whatever it was built with.

    Raises:
        ArtifactError: no projection file, another format, damage in any byte, a fingerprint or an
            option that differs.
    """
    metadata, arrays = _mapped(path)
    for side, vocabulary in (("student", student), ("teacher", teacher)):
        if metadata[side] != vocabulary.fingerprint:
            raise ArtifactError(
                f"{path}: built for another {side} tokenizer; delete it or name the right one"
            )
    if options is not None and metadata["options"] != options.text():
        raise ArtifactError(
            f"{path}: built with {metadata['options']}, the recipe says {options.text()}; "
            f"delete it or change {_differing(metadata['options'], options)}"
        )
    return projection_of(
        arrays,
        student_fingerprint=student.fingerprint,
        teacher_fingerprint=teacher.fingerprint,
    )


def projection_arrays(projection: Projection) -> dict[str, np.ndarray]:
    """Every array of a projection, by the name that files give it."""
    arrays = {name: getattr(projection, name) for name in _MATRIX}
    return arrays | {f"trie.{name}": getattr(projection.trie, name) for name in _TRIE}


def projection_of(
    arrays: Mapping[str, np.ndarray], *, student_fingerprint: str, teacher_fingerprint: str
) -> Projection:
    """The projection whose `projection_arrays` they are."""
    return Projection(
        **{name: arrays[name] for name in _MATRIX},
        trie=FibreTrie(**{name: arrays[f"trie.{name}"] for name in _TRIE}),
        student_fingerprint=student_fingerprint,
        teacher_fingerprint=teacher_fingerprint,
    )


def _mapped(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata, and arrays that are views on one read-only mapping of the whole file."""
    try:
        with safe_open(str(path), framework="np"):  # checks the header, offsets and length
            pass
        header, data = _parts(path)
        metadata: dict[str, str] = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ArtifactError(f"{path}: format {metadata['format']}, wanted {FORMAT}; delete it")
        if metadata["sha256"] != _digest(header, data):
            raise ArtifactError(f"{path}: does not match its own SHA-256: damaged; delete it")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a readable projection ({error}); delete it") from error
    arrays = {
        name: np.ndarray(
            entry["shape"],
            dtype=_DTYPES[entry["dtype"]],
            buffer=data,
            offset=entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return metadata, arrays


def _parts(path: Path) -> tuple[dict[str, Any], memoryview]:
    """The header, and a read-only mapping of the bytes behind it."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 8 + int.from_bytes(mapping[:8], "little")  # a length, so many bytes of JSON, the arrays
    return json.loads(mapping[8:begin]), memoryview(mapping)[begin:]


def _digest(header: dict[str, Any], data: memoryview) -> str:
    """Hex SHA-256 of everything but itself."""
    rest = {name: entry for name, entry in header.items() if name != "__metadata__"}
    metadata = {name: v for name, v in header["__metadata__"].items() if name != "sha256"}
    found = hashlib.sha256(json.dumps([metadata, rest], sort_keys=True).encode())
    found.update(data)
    return found.hexdigest()


def _differing(stored: str, options: ProjectionOptions) -> str:
    """The keys of the recipe to change: a file has other values there."""
    theirs, ours = json.loads(stored), json.loads(options.text())
    return ", ".join(f"ctkd.{name}" for name in ours if theirs.get(name) != ours[name])


class ProjectionStore:
    """Cache over a directory: one read-only entry per pair and options, shared by all losses.

    Entries are mapped from their files, so ranks of one host hold them once; a rank's device
    gets a copy of its own rows only (`ProjectionShard`).
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._entries: dict[str, Projection] = {}

    def get(
        self,
        student: Vocabulary,
        teacher: Vocabulary,
        options: ProjectionOptions,
        *,
        path: str | None = None,
    ) -> Projection:
        """The projection of this pair: the file at ``path``, or the cache's, built if missing."""
        if path is not None:
            if path not in self._entries:
                self._entries[path] = load_projection(
                    Path(path), student=student, teacher=teacher, options=options
                )
            return self._entries[path]
        text = json.dumps([FORMAT, student.fingerprint, teacher.fingerprint, options.text()])
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        if key not in self._entries:
            self._entries[key] = self._load_or_build(key, student, teacher, options)
        return self._entries[key]

    def _load_or_build(
        self, key: str, student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions
    ) -> Projection:
        path = self._root / f"{key}.safetensors"
        if not path.exists():
            save_projection(path, build_projection(student, teacher, options), options=options)
        return load_projection(path, student=student, teacher=teacher, options=options)

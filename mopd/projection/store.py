"""Projections on disk and in host memory: built once, keyed by both fingerprints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mopd.errors import ArtifactError
from mopd.projection.build import ProjectionOptions, build_projection
from mopd.tokens.vocabulary import Vocabulary
from mopd.types import FibreTrie, Projection

FORMAT = "mopd-projection-4"
_MATRIX = ("crow", "col", "val", "kind", "fold", "common")
_TRIE = tuple(f.name for f in dataclasses.fields(FibreTrie))


def save_projection(path: Path, projection: Projection, *, options: ProjectionOptions) -> None:
    """Writes one safetensors file; readers see the old file or the whole new one."""
    arrays = {name: getattr(projection, name) for name in _MATRIX}
    arrays |= {f"trie.{name}": getattr(projection.trie, name) for name in _TRIE}
    metadata = {
        "format": FORMAT,
        "student": projection.student_fingerprint,
        "teacher": projection.teacher_fingerprint,
        "options": _options_text(options),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, metadata)
    os.replace(temporary, path)


def load_projection(
    path: Path, *, student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions
) -> Projection:
    """Reads a file and refuses it when it belongs to other tokenizers or other options.

    Raises:
        ArtifactError: no projection file, another format, a fingerprint or an option that differs.
    """
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: not a readable projection ({error}); delete it") from error
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path}: format {metadata.get('format')}, wanted {FORMAT}; delete it")
    for side, vocabulary in (("student", student), ("teacher", teacher)):
        if metadata[side] != vocabulary.fingerprint:
            raise ArtifactError(
                f"{path}: built for another {side} tokenizer; delete it or name the right one"
            )
    if metadata["options"] != _options_text(options):
        raise ArtifactError(
            f"{path}: built with {metadata['options']}, the recipe says {_options_text(options)}; "
            "delete it or change ctkd.max_length, ctkd.gamma"
        )
    return Projection(
        **{name: arrays[name] for name in _MATRIX},
        trie=FibreTrie(**{name: arrays[f"trie.{name}"] for name in _TRIE}),
        student_fingerprint=student.fingerprint,
        teacher_fingerprint=teacher.fingerprint,
    )


class ProjectionStore:
    """Host-memory cache over a directory; entries are read-only and shared by all losses."""

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
                loaded = load_projection(
                    Path(path), student=student, teacher=teacher, options=options
                )
                self._entries[path] = _frozen(loaded)
            return self._entries[path]
        text = json.dumps(
            [FORMAT, student.fingerprint, teacher.fingerprint, dataclasses.asdict(options)],
            sort_keys=True,
        )
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        if key not in self._entries:
            self._entries[key] = self._load_or_build(key, student, teacher, options)
        return self._entries[key]

    def _load_or_build(
        self, key: str, student: Vocabulary, teacher: Vocabulary, options: ProjectionOptions
    ) -> Projection:
        path = self._root / f"{key}.safetensors"
        if path.exists():
            return _frozen(load_projection(path, student=student, teacher=teacher, options=options))
        projection = build_projection(student, teacher, options)
        save_projection(path, projection, options=options)
        return _frozen(projection)


def _options_text(options: ProjectionOptions) -> str:
    return json.dumps(dataclasses.asdict(options), sort_keys=True)


def _frozen(projection: Projection) -> Projection:
    for owner, names in ((projection, _MATRIX), (projection.trie, _TRIE)):
        for name in names:
            getattr(owner, name).flags.writeable = False
    return projection

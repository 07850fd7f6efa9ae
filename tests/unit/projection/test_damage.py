"""Damage of a stored projection: whatever byte it is in, it is found before a number is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopd.errors import ArtifactError
from mopd.projection import ProjectionOptions, ProjectionStore
from mopd.projection.store import load_projection
from mopd.tokens.vocabulary import Vocabulary
from tests.helpers.vocabularies import byte_level

OPTIONS = ProjectionOptions(max_length=4, gamma=0.1)
SIZE = 64 * 1024


@pytest.fixture(scope="module")
def pair() -> tuple[Vocabulary, Vocabulary]:
    """So many tokens that the file has 64 KiB."""
    numbers = [
        *(f"{n:02d}" for n in range(100)),
        *(f"{n}:" for n in range(100, 250)),
        *(f"{n:03d}" for n in range(1000)),
    ]
    return byte_level([*numbers, "the"]), byte_level(["the", "they", "201", "20"])


@pytest.fixture(scope="module")
def stored(pair: tuple[Vocabulary, Vocabulary], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    ProjectionStore(folder).get(*pair, OPTIONS)
    (path,) = folder.glob("*.safetensors")
    return path


def is_refused(path: Path, pair: tuple[Vocabulary, Vocabulary]) -> bool:
    try:
        load_projection(path, student=pair[0], teacher=pair[1], options=OPTIONS)
    except ArtifactError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    return False


@pytest.mark.slow
def test_every_byte_counts(
    pair: tuple[Vocabulary, Vocabulary], stored: Path, tmp_path: Path
) -> None:
    content = bytearray(stored.read_bytes())
    assert SIZE < len(content) < 2 * SIZE
    path = tmp_path / "flipped.safetensors"
    passed = []
    path.write_bytes(content)
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(content[:SIZE]):
            file.seek(place)
            file.write(bytes([byte ^ (1 << place % 8)]))
            if not is_refused(path, pair):
                passed.append(place)
            file.seek(place)
            file.write(bytes([byte]))
    assert passed == []
    assert not is_refused(path, pair)  # it is the undamaged one again


@pytest.mark.parametrize("kind", ["cut", "appended", "swapped", "empty"])
def test_other_damage(
    pair: tuple[Vocabulary, Vocabulary], stored: Path, tmp_path: Path, kind: str
) -> None:
    content = stored.read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:-1],
        "appended": content + b"\0",
        "swapped": content[:middle] + content[middle + 8 :] + content[middle : middle + 8],
        "empty": b"",
    }
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged[kind])
    assert is_refused(path, pair)

"""One read-only copy on the host for all losses and ranks; a device gets its own rows only."""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from mopd.losses.vocab import VocabShard
from mopd.projection import (
    Projection,
    ProjectionOptions,
    ProjectionShard,
    ProjectionStore,
    build_projection,
    relaxed_common,
)
from mopd.tokens.vocabulary import Vocabulary
from tests.helpers.losses import build_loss, make_rows, run_head
from tests.helpers.vocabularies import byte_level, ids_of

SMEARED = ProjectionOptions(max_length=4, gamma=0.1)
CPU, META = torch.device("cpu"), torch.device("meta")
SMAPS = Path("/proc/self/smaps")


@pytest.fixture(scope="module")
def pair() -> tuple[Vocabulary, Vocabulary]:
    numbers = [f"{n:02d}" for n in range(100)] + [f"{n:03d}" for n in range(100, 400)]
    return byte_level([*numbers, "the"]), byte_level(["the", "they", "201"])


@pytest.fixture(scope="module")
def root(pair: tuple[Vocabulary, Vocabulary], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    ProjectionStore(folder).get(*pair, SMEARED)
    return folder


@pytest.fixture
def stored(pair: tuple[Vocabulary, Vocabulary], root: Path) -> Projection:
    return ProjectionStore(root).get(*pair, SMEARED)


def arrays(projection: Projection) -> Iterator[tuple[str, np.ndarray]]:
    for owner in (projection, projection.trie):
        for field in dataclasses.fields(owner):
            if isinstance(value := getattr(owner, field.name), np.ndarray):
                yield field.name, value


def digest(projection: Projection) -> str:
    parts = (hashlib.sha256(array.tobytes()).hexdigest() for _, array in arrays(projection))
    return " ".join(parts)


def shard_of(projection: Projection, *, start: int, end: int, on: torch.device = CPU):
    return ProjectionShard(projection, start=start, end=end, device=on)


def test_every_array_is_a_view_on_one_map_of_the_file(stored: Projection) -> None:
    names = [name for name, _ in arrays(stored)]
    assert len(names) == 17
    assert len({id(array.base) for _, array in arrays(stored)}) == 1
    assert isinstance(stored.val.base, mmap.mmap)
    assert all(array.flags.aligned for _, array in arrays(stored))


def test_a_freshly_built_entry_is_mapped_too(
    pair: tuple[Vocabulary, Vocabulary], tmp_path: Path
) -> None:
    fresh = ProjectionStore(tmp_path).get(*pair, SMEARED)
    assert isinstance(fresh.val.base, mmap.mmap)
    built = build_projection(*pair, SMEARED)
    for (name, mine), (_, theirs) in zip(arrays(fresh), arrays(built), strict=True):
        assert mine.dtype == theirs.dtype, name
        assert np.array_equal(mine, theirs), name


def test_nothing_writes_into_it(stored: Projection) -> None:
    for name, array in arrays(stored):
        assert not array.flags.writeable, name
        if len(array):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


def pages(path: Path) -> list[dict[str, int]]:
    """Per mapping of the file in this process: kB by the names of /proc/self/smaps."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text(), flags=re.MULTILINE)
    found = [block for block in blocks if block.split("\n")[0].endswith(str(path))]
    return [
        {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB", block, re.MULTILINE)}
        for block in found
    ]


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's account of mapped pages")
def test_ranks_of_a_host_share_the_pages(pair: tuple[Vocabulary, Vocabulary], root: Path) -> None:
    (path,) = root.iterdir()
    ranks = [ProjectionStore(root).get(*pair, SMEARED) for _ in range(4)]
    assert len({digest(rank) for rank in ranks}) == 1  # touches every page
    found = pages(path.resolve())
    assert len(found) == 4
    size = path.stat().st_size // 1024
    for mapping in found:
        assert mapping["Rss"] >= size
        assert mapping["Private_Clean"] + mapping["Private_Dirty"] == 0
    assert sum(mapping["Pss"] for mapping in found) <= found[0]["Rss"]


def test_shards_on_two_devices_share_one_entry(
    pair: tuple[Vocabulary, Vocabulary], root: Path
) -> None:
    store = ProjectionStore(root)
    entry = store.get(*pair, SMEARED)
    assert store.get(*pair, SMEARED) is entry
    shards = [
        shard_of(store.get(*pair, SMEARED), start=0, end=300, on=device) for device in (CPU, META)
    ]
    assert [shard.val.device for shard in shards] == [CPU, META]
    for shard in shards:
        kept = [value for value in vars(shard).values() if not isinstance(value, torch.Tensor)]
        assert entry.trie in kept
        assert not any(isinstance(value, np.ndarray) for value in kept)
    assert all(isinstance(array, np.ndarray) for _, array in arrays(entry))


@pytest.mark.parametrize("cuts", [(0, 700), (0, 13, 500, 700), (0, 350, 700, 900)])
def test_a_device_copy_is_exactly_its_rows(cuts: tuple[int, ...], stored: Projection) -> None:
    shards = [shard_of(stored, start=a, end=b) for a, b in pairwise(cuts)]
    size = stored.student_size
    assert 500 < size < 700
    for shard, start, end in zip(shards, cuts[:-1], cuts[1:], strict=True):
        entries = int(stored.crow[min(end, size)] - stored.crow[min(start, size)])
        assert len(shard.row) == len(shard.val) == shard.num_entries == entries
        tensors = [value for value in vars(shard).values() if isinstance(value, torch.Tensor)]
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        per_column = 8 * (2 * stored.teacher_size + 2)
        assert shard.device_bytes == held == 12 * entries + per_column
    assert sum(shard.num_entries for shard in shards) == len(stored.col)


@pytest.mark.parametrize("cuts", [(0, 1, 350, 700), (0, 699, 700)])
def test_uneven_shards_hold_the_whole_44(cuts: tuple[int, ...], stored: Projection) -> None:
    ids = torch.tensor([*range(0, stored.teacher_size, 3), stored.teacher_size])
    whole = torch.zeros(700, len(ids))
    row, index, value = shard_of(stored, start=0, end=700).columns(ids)
    whole[row, index] = value
    pieces = torch.zeros_like(whole)
    for start, end in pairwise(cuts):
        row, index, value = shard_of(stored, start=start, end=end).columns(ids)
        pieces[row + start, index] = value
    assert torch.equal(whole, pieces)
    assert whole.sum() > 0


def test_another_common_map(stored: Projection) -> None:
    shard = shard_of(stored, start=0, end=700)
    relaxed = relaxed_common(stored)
    relaxed[0] = -1
    assert stored.common[0] >= 0
    given = shard.with_common(relaxed)
    assert (given.common.numpy() == relaxed).all()
    assert given.common.dtype == torch.int64
    assert given.row is shard.row
    assert given.val is shard.val
    assert (shard.common.numpy() == stored.common).all()  # the one it comes from keeps its own
    assert (shard.without_common().common == -1).all()
    with pytest.raises(AssertionError):
        shard.with_common(relaxed[:-1])


def test_training_leaves_it_as_it_was(
    pair: tuple[Vocabulary, Vocabulary], stored: Projection
) -> None:
    student, teacher = pair
    before = digest(stored)
    shard = shard_of(stored, start=0, end=student.size)
    vocab = VocabShard(start=0, size=student.size, vocab_size=student.size, group=None)
    draw = np.random.default_rng(0)
    node = stored.trie.paths()[tuple(ids_of(teacher, "1"))]
    group = int(stored.trie.group_ptr[node])
    stop = -1 - int(stored.trie.stop_token[node])
    for name in ("ctkd", "gold"):
        loss = build_loss(name, shard)
        for _ in range(50):
            probs = draw.dirichlet(np.ones(9), size=3)[:, :8]
            rows = make_rows(
                [0, 2, 3],
                draw.choice(teacher.size, size=(3, 8), replace=False),
                probs,
                paths=[(2, [group, stop], [0.7, 0.3], 1.0)],
            )
            logits = torch.from_numpy(draw.normal(size=(4, student.size)))
            value, gradient = run_head(loss, logits, rows, shard=vocab, projection=shard)
            assert value > 0
            assert gradient.abs().sum() > 0
    assert digest(stored) == before

"""The lead's half of a teacher on the student's ranks."""

from __future__ import annotations

import pytest
import torch

from mopd.demo import World
from mopd.errors import ConfigError
from mopd.serving.rows import rows_of_logits
from mopd.serving.scoring import ScoredSequence
from mopd.serving.wire import RawRows
from mopd.teachers.base import Collective, Counting, Known, Writer
from mopd.teachers.inside import InsideOptions, InsideTeacher
from mopd.tokens.chat import ChatTokenizer
from tests.helpers.teachers import make_rollout_of


@pytest.fixture(scope="module")
def teacher(tiny_world: World) -> InsideTeacher:
    path = tiny_world.teachers["sort"]
    return InsideTeacher(
        "sort",
        path,
        tokenizer=ChatTokenizer.load(path),
        student=ChatTokenizer.load(tiny_world.student),
        options=InsideOptions(top_k=8, temperature=2.0),
    )


def rows_of(teacher: InsideTeacher, text: ScoredSequence, *, seed: int = 0) -> RawRows:
    generator = torch.Generator().manual_seed(seed)
    size = (len(text.ids) - text.start, teacher.tokenizer.vocabulary.size)
    actual = torch.as_tensor(text.ids[text.start :].astype("int64"))
    return rows_of_logits(torch.randn(size, generator=generator), actual, top_k=8, temperature=2.0)


def test_scores_that_depend_on_the_batch_are_refused(teacher: InsideTeacher) -> None:
    texts = teacher.canary()
    together = [rows_of(teacher, text) for text in texts]
    teacher.check(together, rows_of(teacher, texts[0]))
    with pytest.raises(ConfigError, match=r"teachers\.sort: scores the same text .* apart beside"):
        teacher.check(together, rows_of(teacher, texts[0], seed=1))


def test_it_is_asked_by_all_ranks_and_does_not_write(
    teacher: InsideTeacher, tiny_world: World
) -> None:
    assert isinstance(teacher, Collective) and isinstance(teacher, Known)
    assert not isinstance(teacher, Writer) and not isinstance(teacher, Counting)
    rollout = make_rollout_of(ChatTokenizer.load(tiny_world.student), b"bo")
    with pytest.raises(TypeError, match=r"teachers\.sort: its scores need all ranks"):
        teacher.score([rollout])
    assert teacher.accuracy([rollout.prompt], max_new_tokens=4) is None
    assert teacher.differs(teacher.identity()) is None
    assert teacher.differs({"model": "another"}) == "has other files"

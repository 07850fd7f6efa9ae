"""A teacher behind servers that also write: for off-policy answers and its own accuracy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from mopd.errors import TeacherError
from mopd.serving.drafts import Draft
from mopd.serving.http import ServerError
from mopd.teachers.base import share_right, teacher_messages
from mopd.teachers.context import room
from mopd.teachers.remote import RemoteTeacher
from mopd.types import Prompt

NO_SUCH_PATH = 404
GREEDY_BATCH = 32  # prompts of a request whose answers are not drawn


class WritingTeacher(RemoteTeacher):
    """A key seeds the draw of its answer; servers keep to it as far as their engine does."""

    def write(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
    ) -> list[tuple[bytes, bool]]:
        """Sampled answers for off-policy training; empty where a prompt fills the context.

        Raises:
            TeacherError: as `score`, and where a server refuses to write.
        """
        read = [self.tokenizer.prompt_ids(teacher_messages(p, self._privileged)) for p in prompts]
        rooms = [room(ids, max_new_tokens, self.max_length) for ids in read]
        texts = [(b"", False)] * len(prompts)
        groups = list(_groups(rooms, size=GREEDY_BATCH if temperature == 0.0 else 1))
        drafts = [
            Draft(
                prompts=tuple(read[i] for i in group),
                seed=int.from_bytes(hashlib.sha256(keys[group[0]].encode()).digest()[:7], "little"),
                max_new_tokens=rooms[group[0]],
                temperature=temperature,
                eos_id=self.tokenizer.eos_id,
            )
            for group in groups
        ]
        decode = self.tokenizer.vocabulary.decode
        for group, answers in zip(groups, self._replicas.write(drafts), strict=True):
            for i, (ids, stopped) in zip(group, answers, strict=True):
                texts[i] = (decode(ids), stopped)
        return texts

    def accuracy(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> float | None:
        """Greedy exact match on prompts with a checkable answer; None where there are none, or the
        server scores only."""
        checkable = [prompt for prompt in prompts if prompt.answer is not None]
        keys = [prompt.id for prompt in checkable]
        try:
            texts = self.write(checkable, keys, max_new_tokens=max_new_tokens, temperature=0.0)
        except TeacherError as error:
            if isinstance(error.__cause__, ServerError) and error.__cause__.status == NO_SUCH_PATH:
                return None
            raise
        return share_right(checkable, texts)


def _groups(rooms: Sequence[int], *, size: int) -> Iterator[list[int]]:
    """Numbers of prompts with one room, at most ``size`` of them together; none without room."""
    for room_ in sorted(set(rooms) - {0}):
        alike = [i for i, own in enumerate(rooms) if own == room_]
        yield from (alike[begin : begin + size] for begin in range(0, len(alike), size))

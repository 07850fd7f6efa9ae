"""A teacher behind vLLM servers that also writes: for off-policy answers and its own accuracy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mopd.serving.drafts import Draft
from mopd.teachers.base import share_right, teacher_messages
from mopd.teachers.remote import RemoteTeacher
from mopd.types import Prompt


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
        drafts: dict[int, Draft] = {}
        for i, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
            ids = self.tokenizer.prompt_ids(teacher_messages(prompt, self._privileged))
            room = max_new_tokens
            if self.max_length is not None:
                room = min(room, self.max_length - len(ids))
            if room > 0:
                drafts[i] = Draft(
                    prompt_ids=ids,
                    seed=int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little"),
                    max_new_tokens=room,
                    temperature=temperature,
                    eos_id=self.tokenizer.eos_id,
                )
        decode = self.tokenizer.vocabulary.decode
        texts = [(b"", False)] * len(prompts)
        for i, (ids, stopped) in zip(
            drafts, self._replicas.write(list(drafts.values())), strict=True
        ):
            texts[i] = (decode(ids), stopped)
        return texts

    def accuracy(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> float | None:
        """Greedy exact match on prompts with a checkable answer; None where there are none."""
        checkable = [prompt for prompt in prompts if prompt.answer is not None]
        keys = [prompt.id for prompt in checkable]
        texts = self.write(checkable, keys, max_new_tokens=max_new_tokens, temperature=0.0)
        return share_right(checkable, texts)

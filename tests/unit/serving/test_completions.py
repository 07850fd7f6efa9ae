"""What a server around transformers writes for whoever asks as vLLM is asked."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mopd.serving.completions import encode_completion, read_completion
from mopd.serving.drafts import Draft
from mopd.serving.scoring import RequestError, ScoreLimits

LIMITS = ScoreLimits(vocab_size=50, max_length=20, max_sequences=3)


def draft(*prompts: list[int]) -> Draft:
    return Draft(
        prompts=tuple(np.array(ids) for ids in prompts),
        seed=7,
        max_new_tokens=5,
        temperature=0.5,
        eos_id=2,
    )


@pytest.mark.parametrize("prompts", [[[3, 4]], [[3, 4], [5], [6, 7, 8]]])
def test_server_and_client_understand_each_other(prompts: list[list[int]]) -> None:
    asked = draft(*prompts)
    found = read_completion(asked.body(None), limits=LIMITS)
    assert [ids.tolist() for ids in found.prompts] == prompts
    assert (found.max_tokens, found.temperature, found.seed, found.stop_ids) == (5, 0.5, 7, (2,))
    answers = [np.array([9, n, 2]) for n in range(3, 3 + len(prompts))]
    read = asked.read(encode_completion("m", answers))
    assert [(ids.tolist(), ended) for ids, ended in read] == [
        ([9, n], True) for n in range(3, 3 + len(prompts))
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "there is room for 1 to 15"),
        ({"prompt": list(range(16))}, "there is room for 1 to 15"),
        ({"prompt": [[1], []]}, "there is room for 1 to 15"),
        ({"prompt": [[1]] * 4}, "up to 3 of them"),
        ({"prompt": "text"}, "a list of integers"),
        ({"prompt": [[1], 2]}, "a list of integers"),
        ({"prompt": [50]}, "ids are 0 to 49"),
        ({"max_tokens": 0}, "max_tokens: an integer from 1 to 20"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"stop_token_ids": []}, "stop_token_ids"),
        ({"stop_token_ids": [99]}, "stop_token_ids"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"return_token_ids": False}, "return_token_ids"),
        ({"logprobs": 1}, "the fields are"),
    ],
)
def test_what_cannot_be_written_is_refused(change: dict[str, Any], message: str) -> None:
    body = json.loads(draft([3]).body(None)) | change
    with pytest.raises(RequestError, match=message):
        read_completion(json.dumps(body).encode(), limits=LIMITS)

"""Chats in tokens, and which token ends a turn."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mopd.demo.spec import WorldSpec
from mopd.demo.tokenizers import CHATML, make_tokenizer
from mopd.errors import ConfigError
from mopd.serving.reply import AMBIGUOUS
from mopd.teachers.base import teacher_input
from mopd.teachers.remote import names_of
from mopd.tokens.chat import ANSWER, ChatTokenizer
from tests.helpers.teachers import make_rollout_of

USER = {"role": "user", "content": "bo 12 ka"}
END = "<|im_end|>"
HEAD = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"


def raw(template: str = CHATML, **tokens: Any) -> PreTrainedTokenizerFast:
    """The student's, with another template or other named tokens."""
    tokenizer = make_tokenizer(WorldSpec.tiny(), name="student")
    tokenizer.chat_template = template
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


def test_the_end_of_turn_can_be_named() -> None:
    own, other = ChatTokenizer(raw()), ChatTokenizer(raw(), eos_token="<|endoftext|>")
    assert (own.eos_text, other.eos_text) == (END, "<|endoftext|>")
    assert other.eos_id == other.vocabulary.eos_id != own.eos_id
    assert other.vocabulary.token_bytes[other.eos_id] == b""
    assert other.vocabulary.token_bytes[own.eos_id] == END.encode()
    assert names_of(other)["<|endoftext|>"] == other.eos_id
    # the template writes what the model was trained on
    messages = (USER, {"role": "assistant", "content": "x"})
    for chat in (own, other):
        assert own.chat_ids(messages, add_generation_prompt=False) == chat.chat_ids(
            messages, add_generation_prompt=False
        )
    assert ChatTokenizer(raw(eos_token=None), eos_token=END).eos_id == own.eos_id
    assert ChatTokenizer(raw(pad_token=None), eos_token="<|endoftext|>").pad_id == other.eos_id


def test_nothing_is_the_end_of_the_turn_only_where_no_other_token_may_be_left_out() -> None:
    chat = ChatTokenizer(raw())
    names = names_of(chat)
    assert names[""] == AMBIGUOUS and names[END] == chat.eos_id
    lonely = copy.copy(chat)
    lonely.vocabulary = copy.copy(chat.vocabulary)
    lonely.vocabulary.control = np.arange(chat.vocabulary.size) == chat.eos_id
    assert names_of(lonely)[""] == chat.eos_id


def test_a_template_that_refuses_the_messages_is_a_mistake_with_its_reason() -> None:
    chat = ChatTokenizer(raw("{{ raise_exception('only users here') }}"))
    wanted = r"the chat template refuses messages of user, tool \(only users here\); change"
    with pytest.raises(ConfigError, match=wanted):
        chat.prompt_ids((USER, {"role": "tool", "content": "x"}))


def test_a_teacher_with_another_end_of_turn_is_another_vocabulary() -> None:
    """It judges the student's end of turn by its own."""
    student, teacher = ChatTokenizer(raw()), ChatTokenizer(raw(), eos_token="<|endoftext|>")
    assert student.vocabulary.fingerprint != teacher.vocabulary.fingerprint
    rollout = make_rollout_of(student, b"1 2")
    assert rollout.token_ids[-1] == student.eos_id
    assert teacher_input(rollout, teacher, student=student).token_ids[-1] == teacher.eos_id
    same = ChatTokenizer(raw(), eos_token=END)
    assert same.vocabulary.fingerprint == student.vocabulary.fingerprint


def test_an_end_that_is_not_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"eos_token=<\|im_ned\|>: is not one token of"):
        ChatTokenizer(raw(), eos_token="<|im_ned|>")
    with pytest.raises(ConfigError, match="names no eos_token"):
        ChatTokenizer(raw(eos_token=None))


@pytest.mark.parametrize(
    ("body", "end"),
    [
        ("{{ m['content'] }}<|im_end|>\n", END),
        ("{{ m['content'] }} <|im_end|>\n", END),
        ("{{ m['content'] | trim }}\n<|im_end|>", END),
        ("<|im_start|>think\n\n{{ m['content'] }}<|im_end|>\n", END),
        ("{{ m['content'] }}{{ eos_token }}", END),
        ("{{ m['content'] }}<|endoftext|>", "<|endoftext|>"),
        # what cannot be told is not judged
        ("{{ m['content'] }}", None),
        ("{{ m['content'] }}\n\n", None),
        ("{{ m['content'] }} Over.<|endoftext|>", None),
        ("{{ m['content'] | upper }}<|endoftext|>", None),
        ("{{ m['content'] }}{{ m['content'] }}<|endoftext|>", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_what_ends_a_turn_in_the_template(body: str, end: str | None) -> None:
    chat = ChatTokenizer(raw(HEAD + body + "{% endfor %}"))
    found = chat.turn_end()
    assert (None if found is None else chat.token(found)) == end
    if end == "<|endoftext|>":
        with pytest.raises(ConfigError, match=r"^x: .*ends a turn with <\|endoftext\|>, and its"):
            chat.check_end("x")
    else:
        chat.check_end("x")
    ChatTokenizer(raw(HEAD + body + "{% endfor %}"), eos_token=end).check_end("x")


def test_a_chat_that_the_template_refuses_has_no_tokens() -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    chat = ChatTokenizer(raw(template + CHATML))
    system = {"role": "system", "content": "x"}
    assert chat.chat_ids((system, USER), add_generation_prompt=True) is None
    assert chat.chat_ids((USER,), add_generation_prompt=True) == chat.prompt_ids((USER,)).tolist()
    open_turn = chat.chat_ids((USER,), add_generation_prompt=False)
    assert open_turn is not None and len(open_turn) < len(chat.prompt_ids((USER,)))


def test_control_tokens_count_as_such_in_a_text() -> None:
    chat = ChatTokenizer(raw())
    ids = chat.text_ids(ANSWER + END)
    assert ids[-1] == chat.eos_id and chat.is_added(ids[-1]) and not chat.is_added(ids[0])
    assert chat.text_ids(ANSWER * 400) and np.all(np.array(ids) >= 0)


def test_the_probe_holds_every_added_token() -> None:
    chat = ChatTokenizer(raw())
    (text,) = chat.probe_texts()
    assert {chat.token(i) for i in chat.text_ids(text) if chat.is_added(i)} == {
        "<|endoftext|>",
        "<|im_start|>",
        END,
    }

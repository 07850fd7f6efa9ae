"""Three tokenizers that disagree: vocabularies, digit grouping, byte conventions, templates."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mopd.demo.spec import WorldSpec
from mopd.demo.tasks import make_words

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "<|begin_of_text|>{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INSTRUCT = (
    "<s>{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] }}</s>{% else %}[INST]{{ message['content'] }}[/INST]{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class TokenizerKind:
    """How one of the three tokenizers is made."""

    template: str
    specials: tuple[str, ...]
    end_of_turn: str
    padding: str
    digits: str  # the regular expression of one digit group
    metaspace: bool
    two_digit_weight: int


KINDS = {
    "student": TokenizerKind(
        template=CHATML,
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        end_of_turn="<|im_end|>",
        padding="<|endoftext|>",
        digits=r"\p{N}{1,2}",
        metaspace=False,
        two_digit_weight=400,
    ),
    "sort": TokenizerKind(
        template=HEADERS,
        specials=(
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|pad|>",
        ),
        end_of_turn="<|eot_id|>",
        padding="<|pad|>",
        digits=r"\p{N}",
        metaspace=False,
        two_digit_weight=1,
    ),
    "upper": TokenizerKind(
        template=INSTRUCT,
        specials=("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"),
        end_of_turn="</s>",
        padding="<pad>",
        digits=r"\p{N}",
        metaspace=True,
        two_digit_weight=1,
    ),
}


def vocabulary_size(spec: WorldSpec, *, name: str) -> int:
    """The spec's size for ``student``, ``sort`` or ``upper``."""
    return {
        "student": spec.student_vocab,
        "sort": spec.sort_vocab,
        "upper": spec.upper_vocab,
    }[name]


def _corpus(spec: WorldSpec, *, name: str) -> list[str]:
    """Sorted lines. Word counts differ per tokenizer, so that each learns other merges."""
    rng = random.Random(f"corpus-{name}-{spec.seed}")
    lines = ["user\n", "assistant\n"] * 500
    lines += ["sort 1 2 3", "up"] * 200
    lines += [f"{number:02d}" for number in range(100)] * KINDS[name].two_digit_weight
    for word in make_words(spec):
        # A heavy tail of counts: the frequent words become long pieces, the rare ones stay short,
        # and which words are frequent is this tokenizer's own draw.
        count = 2 + int(60 * rng.random() ** 2)
        lines += [f" {word}", f"{word.upper()} {word.upper()}"] * count
    return sorted(lines)


def _splitter(kind: TokenizerKind) -> pre_tokenizers.PreTokenizer:
    if kind.metaspace:
        # "never": no dummy prefix, so a segment that starts without a space stays without one.
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="never", split=True),
                pre_tokenizers.Split(Regex(kind.digits), behavior="isolated"),
            ]
        )
    pattern = kind.digits + r"| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _train(spec: WorldSpec, *, name: str, num_reserved: int) -> tuple[list[str], list[list[str]]]:
    """Pieces in order of their ids and merges, for a vocabulary less the reserved entries."""
    kind = KINDS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _splitter(kind)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size(spec, name=name) - num_reserved,
        show_progress=False,
        initial_alphabet=[] if kind.metaspace else sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_corpus(spec, name=name), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), model["merges"]


def make_tokenizer(spec: WorldSpec, *, name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of ``student``, ``sort`` or ``upper``: same spec, same tokenizer.json."""
    kind = KINDS[name]
    reserved = list(kind.specials)
    if kind.metaspace:
        reserved += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces, merges = _train(spec, name=name, num_reserved=len(reserved))
    vocabulary = {piece: index for index, piece in enumerate([*reserved, *pieces])}
    assert len(vocabulary) <= vocabulary_size(spec, name=name)

    model = models.BPE(
        vocab=vocabulary,
        merges=[(left, right) for left, right in merges],
        byte_fallback=kind.metaspace,
        unk_token="<unk>" if kind.metaspace else None,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _splitter(kind)
    tokenizer.decoder = _decoder(kind)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in kind.specials]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=kind.end_of_turn,
        pad_token=kind.padding,
        unk_token="<unk>" if kind.metaspace else None,
        chat_template=kind.template,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def _decoder(kind: TokenizerKind) -> decoders.Decoder:
    if not kind.metaspace:
        return decoders.ByteLevel()
    return decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character to byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + offset): byte for offset, byte in enumerate(others)})
    return table


def token_bytes(tokenizer: PreTrainedTokenizerFast, *, metaspace: bool) -> list[bytes]:
    """The bytes every id stands for; control tokens stand for none."""
    alphabet = _byte_alphabet()
    controls = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    table = []
    for index, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if index in controls:
            table.append(b"")
        elif not metaspace:
            table.append(bytes(alphabet[character] for character in piece))
        elif len(piece) == 6 and piece.startswith("<0x"):
            table.append(bytes([int(piece[3:5], 16)]))
        else:
            table.append(piece.replace("\u2581", " ").encode())
    return table

"""Teachers that write: in process, behind a stub server and behind a real one, by one contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from mopd.demo import World
from mopd.errors import TeacherError
from mopd.serving.drafts import Draft
from mopd.serving.hf_server import open_server
from mopd.teachers.base import Teacher, Writer
from mopd.teachers.hf import HfOptions, HfTeacher
from mopd.tokens.chat import ChatTokenizer
from mopd.types import Prompt
from tests.helpers.stub_scorers import ModelScorer
from tests.helpers.stub_server import StubOptions, StubServer
from tests.helpers.teachers import remote_teacher

LIMIT = 12
KEYS = [f"key {n}" for n in range(6)]


def prompts(answers: list[str | None]) -> list[Prompt]:
    return [
        Prompt(
            id=str(n),
            messages=({"role": "user", "content": f"bo {n} ka"},),
            domain="sort",
            answer=answer,
        )
        for n, answer in enumerate(answers)
    ]


ASKED = prompts([None] * len(KEYS))


@pytest.fixture(scope="module")
def student(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.student)


@pytest.fixture(scope="module")
def tokenizer(tiny_world: World) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_world.teachers["sort"])


@pytest.fixture(scope="module")
def near(tiny_world: World, student: ChatTokenizer, tokenizer: ChatTokenizer) -> HfTeacher:
    return HfTeacher(
        "sort",
        tiny_world.teachers["sort"],
        tokenizer=tokenizer,
        student=student,
        device=torch.device("cpu"),
        options=HfOptions(top_k=8, temperature=1.0, batch_size=4),
    )


def write(
    teacher: Writer, keys: list[str], *, temperature: float = 1.0
) -> list[tuple[bytes, bool]]:
    return teacher.write(ASKED, keys, max_new_tokens=LIMIT, temperature=temperature)


def check_writer(teacher: Teacher, near: HfTeacher) -> None:
    """Draws depend on the key alone, answers are no longer than allowed, greedy ones are those of
    the same model in process."""
    assert isinstance(teacher, Writer)
    first = write(teacher, KEYS)
    assert write(teacher, KEYS) == first
    assert write(teacher, [key + "x" for key in KEYS]) != first
    assert len(set(first)) > 1
    read = teacher.tokenizer.vocabulary.read
    assert all(len(read(text).ids) <= LIMIT * 4 for text, _ in first)
    greedy = near._texts(near._answer(ASKED, max_new_tokens=LIMIT, temperature=1.0))
    assert write(teacher, KEYS, temperature=1e-4) == greedy
    answers: list[str | None] = [text.decode(errors="replace") for text, _ in greedy]
    checkable = prompts([answers[0], "no answer", *answers[2:4], None])
    found = teacher.accuracy(checkable, max_new_tokens=LIMIT)
    assert found == near.accuracy(checkable, max_new_tokens=LIMIT)
    assert teacher.accuracy(prompts([None]), max_new_tokens=LIMIT) is None


def test_in_process(near: HfTeacher) -> None:
    check_writer(near, near)


@pytest.fixture
def serve(tiny_world: World, tokenizer: ChatTokenizer) -> Iterator[Callable[..., StubServer]]:
    opened: list[StubServer] = []

    def start(**options: object) -> StubServer:
        size = tokenizer.vocabulary.size
        scorer = ModelScorer(tiny_world.teachers["sort"], vocab_size=size)
        server = StubServer(scorer, StubOptions(**options)).__enter__()
        opened.append(server)
        return server

    yield start
    for server in opened:
        server.stop()


def test_behind_a_stub_server(
    near: HfTeacher,
    student: ChatTokenizer,
    tokenizer: ChatTokenizer,
    serve: Callable[..., StubServer],
) -> None:
    urls = [serve().url, serve().url]
    teacher = remote_teacher(urls, tokenizer=tokenizer, student=student)
    try:
        check_writer(teacher, near)
    finally:
        teacher.close()


def test_behind_a_server_around_transformers(
    tiny_world: World, near: HfTeacher, student: ChatTokenizer, tokenizer: ChatTokenizer
) -> None:
    server = open_server(
        tiny_world.teachers["sort"],
        host="127.0.0.1",
        port=0,
        token=None,
        device=torch.device("cpu"),
        samples=False,
        scores=True,
    )
    server.start()
    teacher = remote_teacher([server.url], tokenizer=tokenizer, student=student, shape="mopd")
    try:
        check_writer(teacher, near)
    finally:
        teacher.close()
        server.close()


def test_a_server_that_only_scores_has_no_accuracy(
    student: ChatTokenizer, tokenizer: ChatTokenizer, serve: Callable[..., StubServer]
) -> None:
    """Other failures of writing are told."""
    teacher = remote_teacher([serve().url], tokenizer=tokenizer, student=student, shape="mopd")
    asked = prompts(["1"])
    try:
        assert teacher.accuracy(asked, max_new_tokens=LIMIT) is not None
        for status, wanted in ((404, None), (400, TeacherError)):
            server = serve(written_status=status)
            other = remote_teacher([server.url], tokenizer=tokenizer, student=student, shape="mopd")
            try:
                if wanted is None:
                    assert other.accuracy(asked, max_new_tokens=LIMIT) is None
                else:
                    with pytest.raises(wanted):
                        other.accuracy(asked, max_new_tokens=LIMIT)
            finally:
                other.close()
    finally:
        teacher.close()


@pytest.mark.vllm
@pytest.mark.slow
def test_behind_a_real_server(
    request: pytest.FixtureRequest,
    near: HfTeacher,
    student: ChatTokenizer,
    tokenizer: ChatTokenizer,
) -> None:
    url = request.getfixturevalue("vllm_server").url
    endpoint = {"start_s": 60.0, "deadline_s": 60.0}
    teacher = remote_teacher([url], tokenizer=tokenizer, student=student, endpoint=endpoint)
    try:
        check_writer(teacher, near)
    finally:
        teacher.close()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b'{"choices": [{"token_ids": [1, 2, 3, 4]}]}', "more tokens"),
        (b'{"choices": [{"token_ids": [1, -2]}]}', "below 0"),
        (b'{"choices": [{}]}', "no token ids"),
        (b'{"choices": []}', "1 answers were asked for"),
        (b'{"choices": [{"index": 1, "token_ids": [1]}]}', "1 answers were asked for"),
        (b"[" * 10000, "."),
    ],
)
def test_replies_of_another_shape(tokenizer: ChatTokenizer, reply: bytes, message: str) -> None:
    draft = Draft(
        prompts=(tokenizer.prompt_ids(ASKED[0].messages),),
        seed=1,
        max_new_tokens=3,
        temperature=1.0,
        eos_id=tokenizer.eos_id,
    )
    with pytest.raises(ValueError, match=message):
        draft.read(reply)


def test_a_text_ends_before_the_end_of_the_turn(tokenizer: ChatTokenizer) -> None:
    draft = Draft(
        prompts=(tokenizer.prompt_ids(ASKED[0].messages),),
        seed=1,
        max_new_tokens=3,
        temperature=1.0,
        eos_id=9,
    )
    ((ids, stopped),) = draft.read(b'{"choices": [{"token_ids": [1, 9, 4]}]}')
    assert ids.tolist() == [1] and stopped
    ((ids, stopped),) = draft.read(b'{"choices": [{"token_ids": [1, 8, 4]}]}')
    assert ids.tolist() == [1, 8, 4] and not stopped

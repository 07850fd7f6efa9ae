"""What one stage hands to the next: frozen, keyword-only, a shape on every array.

Shape legend: P prompt tokens, S student response tokens, T teacher response tokens, K top-k,
C spans (chunks), R boundary rows, N student tokens in chunks, Q path rows, O native rows,
B batch, L padded length, V_S and V_T vocabulary sizes, G trie groups, M group members,
E path slots, F their entries.
All arrays are numpy until a batch goes to a rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Message = Mapping[str, str]
Source = Literal["student", "dataset", "teacher"]  # who wrote an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task. ``answer`` is the checkable answer, or None when the task has none."""

    id: str
    messages: tuple[Message, ...]
    domain: str
    answer: str | None = None
    teachers: tuple[str, ...] = ()  # names of the teachers that judge it
    top_k: int | None = None  # of its teachers' rows; None: as the recipe says
    response: str | None = None  # an answer that comes with the data, for off-policy training
    private: Mapping[str, str] = field(default_factory=dict)  # data fields for teachers alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled answer. ``token_ids`` are the truth; the text is derived from them.

    ``byte_ends[s]`` is the number of response bytes after token s; control tokens (the end of the
    turn) have length 0. ``response`` holds ``byte_ends[-1]`` bytes, not necessarily valid UTF-8.
    """

    prompt: Prompt
    sample_index: int
    prompt_ids: np.ndarray  # [P] int32
    token_ids: np.ndarray  # [S] int32
    loss_mask: np.ndarray  # [S] bool
    logprobs: np.ndarray  # [S] float32, at the sampling temperature; NaN: not the student's
    byte_ends: np.ndarray  # [S] int64
    response: bytes
    policy_version: int
    finish_reason: Literal["stop", "length", "cut"]  # end of turn, limit, another stop token
    reward: float | None = None
    source: Source = "student"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """One teacher's judgement of one rollout, in the teacher's own tokens.

    Row t is the distribution that PREDICTS ``token_ids[t]``; arrays cover the response only (row 0
    is predicted from the last prompt token). Missing is a mask, never a value.
    """

    teacher: str
    model_fingerprint: str
    token_ids: np.ndarray  # [T] int32
    byte_ends: np.ndarray  # [T] int64
    logprobs: np.ndarray  # [T] float32, of the actual token
    topk_ids: np.ndarray | None  # [T, K] int32; None: the whole vocabulary, K = V_T
    topk_logprobs: np.ndarray  # [T, K] float32, -inf where padded
    log_tail: np.ndarray  # [T] float32, log of the mass outside the top-k
    lse: np.ndarray | None  # [T, 2] float32: log-sum-exp of the logits at 1 and at the temperature
    valid: np.ndarray  # [T] bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """Common byte boundaries of two tokenizations of one response.

    Chunk c covers student tokens ``student_starts[c]:student_starts[c + 1]`` and teacher tokens
    ``teacher_starts[c]:teacher_starts[c + 1]``. Tokens behind the last start belong to no chunk.
    """

    student_starts: np.ndarray  # [C + 1] int64
    teacher_starts: np.ndarray  # [C + 1] int64
    ends_turn: bool  # the last chunk pairs the two end-of-turn tokens

    @property
    def num_chunks(self) -> int:
        return len(self.student_starts) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRows:
    """One teacher's payload on the STUDENT prediction axis of one micro-batch.

    ``position`` indexes the flattened [B * L] prediction axis (row i predicts token i + 1) and
    ascends. Boundary rows list teacher tokens, native rows list the student's own; path rows belong
    to a boundary position, their slots are ragged, ``path_offsets`` cuts them. Chunks are those of
    the whole micro-batch, also where a context-parallel rank holds only some of their rows.
    """

    teacher: str
    position: np.ndarray  # [R] int64
    row_weight: np.ndarray  # [R] float32: what the row counts in the loss
    topk_ids: np.ndarray | None  # [R, K] int32 teacher tokens, -1 where padded; [K]: the same for
    # all rows; None: the whole vocabulary, and ``topk_logprobs`` may miss a constant per row
    topk_logprobs: np.ndarray  # [R, K] float32
    log_tail: np.ndarray  # [R] float32
    chunk_logprob: np.ndarray  # [C] float32: teacher's log-probability of the whole chunk
    chunk_size: np.ndarray  # [C, 2] int32: student and teacher tokens of the chunk
    chunk_weight: np.ndarray  # [C] float32
    chunk_owned: np.ndarray  # [C] bool: this rank reports its value (its boundary row is here)
    chunk_sequence: np.ndarray  # [C] int64, ascending: chunks of one rollout share a number
    token_position: np.ndarray  # [N] int64: every trained student token of the chunks
    token_id: np.ndarray  # [N] int64
    token_chunk: np.ndarray  # [N] int64: index of its chunk
    token_sampling_logprob: np.ndarray  # [N] float32: the sampler's, at its own temperature
    path_position: np.ndarray  # [Q] int64
    path_weight: np.ndarray  # [Q] float32
    path_offsets: np.ndarray  # [Q + 1] int64: slots of each path row
    path_target: np.ndarray  # [E] float32: R over the slots
    path_entry_slot: np.ndarray  # [F] int64, ascending: the slot of each entry
    path_entry: np.ndarray  # [F] int64: a group of the trie, or -1 - (one student token)
    native_position: np.ndarray  # [O] int64, ascending
    native_weight: np.ndarray  # [O] float32
    native_ids: np.ndarray  # [O, K'] int32 student tokens, -1 where padded
    native_logprobs: np.ndarray  # [O, K'] float32
    native_log_tail: np.ndarray  # [O] float32


def no_native_rows() -> dict[str, np.ndarray]:
    """The native fields of `TeacherRows` without a row."""
    return {
        "native_position": np.zeros(0, dtype=np.int64),
        "native_weight": np.zeros(0, dtype=np.float32),
        "native_ids": np.zeros((0, 0), dtype=np.int32),
        "native_logprobs": np.zeros((0, 0), dtype=np.float32),
        "native_log_tail": np.zeros(0, dtype=np.float32),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Student tensors plus every teacher's rows, padded or packed.

    Padded: a row for each text, ``tokens[b, : lengths[b]]`` is real. Packed: B = 1, the texts lie
    behind each other and ``tokens[0, offsets[i] : offsets[i] + lengths[i]]`` is the i-th.
    """

    tokens: np.ndarray  # [B, L] int64
    lengths: np.ndarray  # [texts] int64
    response_mask: np.ndarray  # [B, L] bool: row i predicts a trainable response token
    rows: Mapping[str, TeacherRows] = field(default_factory=dict)
    offsets: np.ndarray | None = None  # [texts + 1] int64, ends with L; None where padded
    domains: tuple[str, ...] = ()  # of each text; empty where nobody asks


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One replica's share of an optimizer step, and the GLOBAL counts that losses divide by."""

    step: int
    micro_batches: tuple[MicroBatch, ...]
    denominators: Mapping[str, float]  # per teacher: global weight of its rows
    num_tokens: int  # global number of real tokens, prompts included
    metrics: Mapping[str, tuple[float, float]]  # name -> (sum, count) of this replica
    weights: Mapping[str, float] = field(default_factory=dict)  # per teacher, over the recipe's
    num_response_tokens: int = 0  # global number of trainable response tokens
    distillation_weight: float = 1.0  # of the teachers' losses together
    crossentropy_weight: float = 0.0  # of the cross entropy of the response tokens


NULL, EXACT, MULTI, SPECIAL, SIMILAR = 0, 1, 2, 3, 4  # kinds of a row


@dataclass(frozen=True, slots=True, kw_only=True)
class FibreTrie:
    """Student tokens by the teacher pieces they begin with (docs/losses.md, path terms).

    Node n stands for a path of teacher pieces. Its groups are the distinct next pieces of the
    student tokens that go on after that path. Its stop token is what the student writes when the
    text does not go on like that: the token that spells exactly the path, else, for a path of one
    piece, the first token of the student's own spelling of it. Where there is none (-1), a shorter
    path's stop token stands in.
    """

    node_ptr: np.ndarray  # [N + 1] int64 into node_piece: the path of each node
    node_piece: np.ndarray  # int32 teacher ids
    group_ptr: np.ndarray  # [N + 1] int64: groups of each node
    group_piece: np.ndarray  # [G] int32: the next teacher piece
    member_ptr: np.ndarray  # [G + 1] int64: student tokens of each group
    member_token: np.ndarray  # [M] int32 student ids
    stop_token: np.ndarray  # [N] int32 student id, -1 where there is none
    group_open: np.ndarray  # [G] bool: tokens go on behind the group, and none ends with it
    node_column: np.ndarray  # [N] int32: number of the column of a one-piece path, else -1
    column_ptr: np.ndarray  # [columns + 1] int64: one-piece nodes of each column
    column_node: np.ndarray  # int32

    @property
    def num_nodes(self) -> int:
        return len(self.stop_token)

    def paths(self) -> dict[tuple[int, ...], int]:
        """Path of teacher pieces -> node."""
        return {
            tuple(self.node_piece[self.node_ptr[n] : self.node_ptr[n + 1]].tolist()): n
            for n in range(self.num_nodes)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """W in CSR: rows are student tokens, columns teacher tokens plus a null column ``V_T``.

    Every row sums to 1. ``fold[t]`` is the column that stands for teacher token t: itself where a
    student token has the same bytes, else the column of the first student token of its bytes, or
    null. W maps onto these columns only, so both sides are one coarsening of the same events.
    """

    crow: np.ndarray  # [V_S + 1] int32
    col: np.ndarray  # [nnz] int32
    val: np.ndarray  # [nnz] float32
    kind: np.ndarray  # [V_S] uint8
    fold: np.ndarray  # [V_T] int32
    common: np.ndarray  # [V_T] int32: the student token with the same bytes, or -1
    trie: FibreTrie
    student_fingerprint: str
    teacher_fingerprint: str

    @property
    def student_size(self) -> int:
        return len(self.kind)

    @property
    def teacher_size(self) -> int:
        return len(self.fold)

    @property
    def folded(self) -> np.ndarray:
        """[V_T] bool: teacher tokens that another column stands for."""
        return self.fold != np.arange(self.teacher_size)


def ragged_arange(begin: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Concatenation of ``begin[i] : begin[i] + count[i]``: the rows of a CSR array."""
    before = np.cumsum(count) - count
    return np.repeat(begin - before, count) + np.arange(int(count.sum()))

"""The engine of the sampling paths without vLLM: a transformers model in this process.

One request works at a time, in the order of arrival, and an update takes its place in the same
line: so what came before it ends with the old weights, and what came after sees the new ones.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from mopd.serving.channel import ChannelError, Spec, receive
from mopd.serving.first_come import FirstCome, NoTurnError
from mopd.serving.generation import AbandonedError, decode, sampling_stream
from mopd.serving.hf_experts import one_by_one
from mopd.serving.hf_turns import TurnTakingModel
from mopd.serving.lease import DeviceLease, LeaseTimeout
from mopd.serving.rows import BLOCK_ELEMENTS
from mopd.serving.sampling import (
    LOGPROBS_PATH,
    PROCESSED,
    SAMPLE_PATH,
    Broadcast,
    EngineFacts,
    Sampled,
    SampleOptions,
    SampleTask,
    Update,
    encode_answer,
    end_of,
    read_ids,
    read_object,
    read_sample_request,
    read_update,
)
from mopd.serving.scoring import RequestError
from mopd.serving.versions import ServedVersion
from mopd.serving.weight_files import (
    WeightsFileError,
    check_shapes,
    read_weights,
    shapes_of,
    verify_weights,
)

CACHE_BYTES = 4 << 30  # keys and values of what is decoded together
HEAD = "lm_head.weight"

Gone = Callable[[], bool]


class TransformersSampler:
    """A transformers model with versioned weights.

    Until the first update it has the weights of ``model_dir`` and no version. An answer is keyed by
    its seed: the batch it is decoded in changes it by rounding alone.
    """

    def __init__(
        self, model_dir: Path, *, device: torch.device, lease: DeviceLease | None = None
    ) -> None:
        self._shared = TurnTakingModel(model_dir, device=device, lease=lease)
        self._model = self._shared.model
        self._device = device
        try:
            with self._first_turn():
                self._shapes = {name: tuple(t.shape) for name, t in _named(self._model).items()}
                self._bytes_per_token = _bytes_per_token(self._model, device)
        except BaseException:
            self._shared.close()
            raise
        config = self._model.config
        self._facts = EngineFacts(
            version=None,
            served_model=model_dir.resolve().name,
            vocab_size=config.vocab_size,
            max_length=config.max_position_embeddings,
            logprobs_mode=PROCESSED,
            workers=1,
            device=device.type,
        )
        self._columns = config.vocab_size  # those behind are never sampled
        self._served = ServedVersion()
        self._turns = FirstCome()
        self._updating = threading.Lock()

    @contextmanager
    def _first_turn(self) -> Iterator[None]:
        """Whoever started this process watches the time."""
        with ExitStack() as opened:
            while True:
                try:
                    opened.enter_context(self._shared.turn())
                    break
                except LeaseTimeout:
                    continue
            yield

    def close(self) -> None:
        """Lets go of a shared device."""
        self._shared.close()

    def facts(self) -> EngineFacts:
        """What the engine is, and the version it holds now."""
        return replace(self._facts, version=self._served.current)

    def answer(self, path: str, method: str, body: bytes, *, gone: Gone, closing: Gone) -> bytes:
        """The body of a 200 answer to one of `sampling.METHODS`.

        Args:
            gone: whether the client has left: what it asked for is dropped then. An update that was
                begun is ended all the same.
            closing: whether the server ends: an update that waits is given up then.

        Raises:
            RequestError: with HTTP's status.
            AbandonedError: the client has left.
        """
        if path == SAMPLE_PATH:
            return self._sample(body, gone)
        if path == LOGPROBS_PATH:
            return self._logprobs(body, gone)
        if method == "POST":
            self._update(read_update(body, columns=self._facts.vocab_size), closing)
        return json.dumps(asdict(self.facts())).encode()

    def _sample(self, body: bytes, gone: Gone) -> bytes:
        request = read_sample_request(
            body, columns=self._facts.vocab_size, max_length=self._facts.max_length
        )
        if (held := self._served.current) != request.version:
            return encode_answer(held, [])
        try:
            with self._turns.turn(gives_up=gone), self._shared.turn():
                ticket = self._served.ticket()
                if ticket.version != request.version:  # an update was in front
                    return encode_answer(ticket.version, [])
                answers = self._answers(request.tasks, request.options, gone)
                return encode_answer(self._served.stamp(ticket), answers)
        except NoTurnError as error:
            raise AbandonedError from error

    def _answers(
        self, tasks: Sequence[SampleTask], options: SampleOptions, gone: Gone
    ) -> list[Sampled]:
        found: dict[int, Sampled] = {}
        # neighbours of like length, for prompts are padded to the longest of their batch
        order = sorted(range(len(tasks)), key=lambda number: len(tasks[number].ids))
        longest = len(tasks[order[-1]].ids) + options.max_tokens
        fit = CACHE_BYTES // (longest * self._bytes_per_token)
        size = max(1, min(BLOCK_ELEMENTS // self._facts.vocab_size, fit))
        for begin in range(0, len(order), size):
            part = order[begin : begin + size]
            answers = self._batch([tasks[number] for number in part], options, gone)
            found |= zip(part, answers, strict=True)
        return [found[number] for number in range(len(tasks))]

    def _batch(
        self, tasks: Sequence[SampleTask], options: SampleOptions, gone: Gone
    ) -> Iterator[Sampled]:
        streams = [sampling_stream(str(task.seed), options.max_tokens) for task in tasks]
        ends = (options.eos_id, *options.stop_ids)
        tokens, logprobs = decode(
            self._model,
            [np.asarray(task.ids) for task in tasks],
            ends=ends,
            vocab_size=min(options.vocab_size, self._columns),
            max_new_tokens=options.max_tokens,
            temperature=options.temperature or 1.0,
            streams=streams if options.temperature else None,
            is_abandoned=gone,
        )
        for ids, scores in zip(tokens, logprobs, strict=True):
            found = np.flatnonzero(np.isin(ids, ends))
            size = int(found[0]) + 1 if len(found) else len(ids)
            yield Sampled(
                ids=ids[:size].astype(np.int32),
                logprobs=_finite(scores[:size]),
                end=end_of(int(ids[size - 1]), options),
            )

    def _logprobs(self, body: bytes, gone: Gone) -> bytes:
        fields = read_object(body, {"ids"})
        longest = self._facts.max_length
        try:
            with self._turns.turn(gives_up=gone), self._shared.turn():
                ticket = self._served.ticket()
                ids = read_ids(fields["ids"], "ids", longest=longest, vocab_size=self._columns)
                found = _finite(self._scores(ids))
                version = self._served.stamp(ticket)
        except NoTurnError as error:
            raise AbandonedError from error
        return json.dumps({"version": version, "logprobs": found.tolist()}).encode()

    @torch.no_grad()
    def _scores(self, ids: Sequence[int]) -> np.ndarray:
        """[L - 1] at temperature 1: of the tokens of ``ids`` [L] but the first."""
        tokens = torch.tensor(ids, device=self._device)
        logits = self._model(input_ids=tokens[None]).logits[0, :-1, : self._columns]
        scores = torch.log_softmax(logits.float(), dim=-1)
        return scores.gather(1, tokens[1:, None])[:, 0].cpu().numpy()

    def _update(self, update: Update, closing: Gone) -> None:
        if not self._updating.acquire(blocking=False):
            raise RequestError("another update is under way; send it again", status=503)
        try:
            specs = self._verified(update)
            deadline = time.monotonic() + update.deadline_s

            def gives_up() -> bool:
                return closing() or time.monotonic() > deadline

            try:
                with self._turns.turn(gives_up=gives_up), self._shared.turn():
                    self._load(update, self._source(update, specs, deadline, closing), specs)
            except NoTurnError as error:
                raise RequestError("the update took too long", status=503) from error
        finally:
            self._updating.release()

    def _verified(self, update: Update) -> list[Spec]:
        """The tensors that ``update`` brings: those of this model, and all of them."""
        known = self._shapes
        try:
            if update.path is not None:
                specs = verify_weights(Path(update.path), update.version, known)
            else:
                assert update.broadcast is not None
                specs = list(update.broadcast.tensors)
                check_shapes(shapes_of(specs), known)
            if HEAD in known and HEAD not in shapes_of(specs):
                raise WeightsFileError(f"1 tensors are missing, as {HEAD}; this model ties nothing")
            return specs
        except WeightsFileError as error:
            raise RequestError(str(error), status=422) from error

    def _source(
        self, update: Update, specs: Sequence[Spec], deadline: float, closing: Gone
    ) -> Iterator[tuple[str, Tensor]]:
        if update.path is not None:
            return read_weights(Path(update.path))
        assert update.broadcast is not None
        return _received(update.broadcast, specs, self._device, deadline, closing)

    @torch.no_grad()
    def _load(
        self, update: Update, source: Iterator[tuple[str, Tensor]], specs: Sequence[Spec]
    ) -> None:
        """Until the first tensor has come the old weights are whole, and served."""
        missing = {name for name, _, _ in specs}
        parameters = _named(self._model)  # where they are in this turn
        begun = False
        try:
            for name, tensor in source:
                if not begun:
                    self._served.begin()
                begun = True
                missing.remove(name)
                if name in parameters:  # else it is tied to one that is
                    parameters[name].copy_(tensor)
            if missing:
                raise ChannelError("the source ended")
        except (ChannelError, OSError, SafetensorError, KeyError, RuntimeError) as error:
            said = f"{len(missing)} of {len(specs)} tensors did not come: {error}"
            raise RequestError(f"no weights: {said}", status=503) from error
        self._shared.keep()
        self._columns = update.vocab_size
        self._served.finish(update.version)


def _named(model: torch.nn.Module) -> Mapping[str, Tensor]:
    """Every parameter under its Hugging Face name, experts one by one; of tied ones the first."""
    parameters = ((name, tensor.detach()) for name, tensor in model.named_parameters())
    return dict(one_by_one(parameters))


@torch.no_grad()
def _bytes_per_token(model: Any, device: torch.device) -> int:
    """Of the keys and values of all layers, by a look at those of one token."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _received(
    meeting: Broadcast, specs: Sequence[Spec], device: torch.device, deadline: float, closing: Gone
) -> Iterator[tuple[str, Tensor]]:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # this thread has none yet
    return receive(
        specs,
        meeting=(meeting.host, meeting.port),
        rank=meeting.first_rank,
        world_size=meeting.world_size,
        backend=meeting.backend,
        deadline_s=max(deadline - time.monotonic(), 0.001),
        give_up=closing,
    )


def _finite(logprobs: np.ndarray) -> np.ndarray:
    if not np.isfinite(logprobs).all():
        raise RequestError("a log-probability is not finite", status=500)
    return logprobs

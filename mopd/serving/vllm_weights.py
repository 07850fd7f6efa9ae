"""New weights inside a vLLM worker: a worker extension.

`--worker-extension-cls mopd.serving.vllm_weights.WeightsExtension`. vLLM's own `reload_weights`
takes the tensors, since it alone knows how a device packs them. Once begun it must see every
tensor: what is left half-way would spoil the update after it. So when a source fails, the rest is
made up of zeros, the worker says so, and the server has no version until a whole update lands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopd.serving.channel import ChannelError, Spec, dtype_name, receive
from mopd.serving.vllm_worker import RowsExtension
from mopd.serving.weight_files import read_weights

Stream = Iterator[tuple[str, Tensor]]


class WeightsExtension(RowsExtension):
    """Each method answers None, or in one line what went wrong."""

    def mopd_device(self) -> str:
        """Type of the worker's device."""
        return torch.device(self.device).type  # type: ignore[attr-defined]

    def mopd_limit_vocab(self, size: int) -> None:
        """From now on columns from ``size`` have no probability, in samples and in scores."""
        model: Any = self.model_runner.get_model()  # type: ignore[attr-defined]
        limit = getattr(self, "_mopd_limit", None)
        if limit is None:
            self._mopd_limit = limit = [size]
            model.compute_logits = limited(model.compute_logits, limit)
        limit[0] = size

    def mopd_load_files(self, path: str, specs: Sequence[Spec]) -> str | None:
        """A directory that `verify_weights` passed; ``specs`` name all its tensors."""
        return self._mopd_load(read_weights(Path(path)), specs)

    def mopd_load_broadcast(
        self, specs: Sequence[Spec], meeting: tuple[str, int], options: Mapping[str, Any]
    ) -> str | None:
        """``options``: first_rank, world_size, backend and deadline_s of `receive`."""
        source = receive(
            specs,
            meeting=(meeting[0], meeting[1]),
            rank=options["first_rank"] + self.rank,  # type: ignore[attr-defined]
            world_size=options["world_size"],
            backend=options["backend"],
            deadline_s=options["deadline_s"],
        )
        return self._mopd_load(source, specs)

    def mopd_load_tensors(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Tensors of this process, for an engine that lives in it."""
        specs = [(name, dtype_name(t), tuple(t.shape)) for name, t in tensors.items()]
        return self._mopd_load(iter(tensors.items()), specs)

    def _mopd_load(self, source: Stream, specs: Sequence[Spec]) -> str | None:
        if getattr(self, "_mopd_spoiled", False):
            return "an earlier update failed inside vLLM; restart the server"
        troubles: list[str] = []
        try:
            first = next(source)
        except (ChannelError, OSError, RuntimeError, StopIteration) as error:
            return f"nothing came: {error}"  # the old weights are still whole
        stream = whole(first, source, specs, troubles.append)
        if self.mopd_device() == "cpu":
            forget_packed_experts(self.model_runner.get_model())  # type: ignore[attr-defined]
        try:
            self.reload_weights(weights_iterator=stream)  # type: ignore[attr-defined]
        except Exception as error:  # of any kind: one that leaves here ends the whole engine
            self._mopd_spoiled = True
            return f"vLLM cannot load the weights: {type(error).__name__}: {str(error)[:200]}"
        for _ in stream:  # reloading may stop early: the sender waits for every reader
            pass
        if self.mopd_device() == "cpu":
            pack_tied(self.model_runner.get_model())  # type: ignore[attr-defined]
        return troubles[0] if troubles else None


def whole(
    first: tuple[str, Tensor],
    source: Stream,
    specs: Sequence[Spec],
    report: Callable[[str], None],
) -> Stream:
    """``first`` and ``source`` in the order of ``specs``, with zeros from where they fail."""
    missing = {name: (dtype, tuple(shape)) for name, dtype, shape in specs}
    try:
        for name, tensor in _chain(first, source):
            if missing.get(name) != (dtype_name(tensor), tuple(tensor.shape)):
                report(f"{name}: not the tensor that was announced")
                break
            del missing[name]
            yield name, tensor
    except (ChannelError, OSError, RuntimeError) as error:
        report(f"{len(missing)} of {len(specs)} tensors did not come: {error}")
    else:
        if missing:
            report(f"{len(missing)} of {len(specs)} tensors did not come")
    for name, (dtype, shape) in missing.items():
        yield name, torch.zeros(shape, dtype=getattr(torch, dtype))


def forget_packed_experts(model: Any) -> None:
    """Makes the next reload pack the experts' weights again.

    On a CPU a mixture of experts multiplies with packed weights. vLLM packs them when it builds a
    layer's kernel; a reload keeps the kernel, and would leave plain weights where it reads packed.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # pyright: ignore[reportOptionalMemberAccess]


def pack_tied(model: Any) -> None:
    """Packs weights again that two layers share.

    On a CPU a layer multiplies with a packed copy of its weight. A reload packs the layer that a
    tensor was read into, and leaves the old copy in the one that shares it (a tied output layer).
    """
    owners: dict[int, Any] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or not weight.numel():  # none, or only a packed copy
            continue
        if owners.setdefault(weight.data_ptr(), module) is not module:
            module.quant_method.process_weights_after_loading(module)


def _chain(first: tuple[str, Tensor], rest: Stream) -> Stream:
    yield first
    yield from rest


def limited(compute: Callable[..., Tensor | None], limit: Sequence[int]) -> Callable[..., Any]:
    """``compute`` with -inf in the columns from ``limit[0]``; ranks without logits stay so."""

    def compute_logits(*args: Any, **kwargs: Any) -> Tensor | None:
        logits = compute(*args, **kwargs)
        if logits is not None and logits.shape[-1] > limit[0]:
            logits[..., limit[0] :] = float("-inf")
        return logits

    return compute_logits

"""A server around transformers models, for `mopd serve` and for actors."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from mopd.errors import ConfigError
from mopd.serving.hf_sampler import TransformersSampler
from mopd.serving.hf_scorer import TransformersScorer
from mopd.serving.lease import DeviceLease
from mopd.serving.score_server import ScoreServer
from mopd.serving.scoring import check_exposure


def open_server(
    model_dir: Path,
    *,
    host: str,
    port: int,
    token: str | None,
    device: torch.device,
    samples: bool,
    scores: bool,
    lease: DeviceLease | None = None,
) -> ScoreServer:
    """A server that listens and does not serve yet: call its `start`, or `serve_forever`.

    With both ``samples`` and ``scores`` the model is there twice: updates reach the one that is
    sampled from, and scores go on being those of the files, as their fingerprint says.

    Args:
        port: 0 takes a free one.
        lease: of a device that others use as well; models are there while they are asked.

    Raises:
        ConfigError: an open door, an address that is taken, or no model.
    """
    check_exposure(host, token=token)  # before a model is loaded for nothing
    with ExitStack() as opened:  # what a start that fails leaves behind
        scorer = sampler = None
        if scores:
            scorer = TransformersScorer(model_dir, device=device, lease=lease)
            opened.callback(scorer.close)
        if samples:
            own = None if lease is None else DeviceLease(lease.path, owner=lease.owner)
            sampler = TransformersSampler(model_dir, device=device, lease=own)
            opened.callback(sampler.close)
        try:
            server = ScoreServer(host, port, scorer=scorer, sampler=sampler, token=token)
        except OSError as error:
            raise ConfigError(
                f"{host} port {port}: cannot be listened on ({error.strerror or error}); choose "
                "another --host or --port"
            ) from error
        server.on_close = opened.pop_all().close
    return server

"""Samplers on servers, as the tests of all engines make them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from mopd.rollout.fleet import FleetOptions
from mopd.rollout.tasks import Jobs, SamplingOptions
from mopd.rollout.vllm import SyncOptions, VllmSampler
from mopd.serving.sample_server import SampleServer, SampleServerOptions
from tests.helpers.plain_model import PlainModel, prompts_of

T = TypeVar("T")
Mode = Literal["files", "broadcast"]
MAX_NEW_TOKENS = 12
HOST = torch.device("cpu")


PROMPTS = prompts_of("sort bo ka", "upper vi 12", "bo")


@dataclass(frozen=True, kw_only=True)
class Site:
    """Servers to try a sampler on; all have the files of ``model``."""

    urls: tuple[str, ...]
    model: PlainModel
    root: Path

    @contextmanager
    def sampler(self, mode: Mode = "files", **changes: Any) -> Iterator[VllmSampler]:
        """A sampler of a trainer that has just started."""
        sampler = make_sampler(self, mode, **changes)
        try:
            yield sampler
        finally:
            sampler.close()

    def ask(self, work: Callable[[SampleServer], Coroutine[Any, Any, T]]) -> T:
        """One conversation with the first server."""

        async def converse() -> T:
            server = SampleServer(self.urls[0], server_options())
            try:
                return await work(server)
            finally:
                await server.close()

        return asyncio.run(converse())


def server_options(**changes: Any) -> SampleServerOptions:
    known: dict[str, Any] = {"deadline_s": 60.0, "update_s": 60.0, "start_s": 30.0}
    return SampleServerOptions(**{**known, "max_outstanding": 4, **changes})


def make_sampler(
    site: Site,
    mode: Mode = "files",
    *,
    server: dict[str, Any] | None = None,
    fleet: dict[str, Any] | None = None,
    sync: dict[str, Any] | None = None,
    batch_size: int = 64,
    **options: Any,
) -> VllmSampler:
    """``options`` change the sampling, the dictionaries what they are called after."""
    known = {"seed": 1, "temperature": 1.0, "num_generations": 2}
    sampling = SamplingOptions(**{**known, "max_new_tokens": MAX_NEW_TOKENS, **options})
    patience = {"max_outstanding": 4, "max_retries": 3, "restart_budget_s": 20.0}
    patience |= {"patience_s": 1.0, "pause_s": 0.01, "tolerance": 0.01}
    travel = {"session": secrets.token_hex(8), "pushes": True, "directory": site.root}
    return VllmSampler(
        site.urls,
        jobs=Jobs(site.model.tokenizer, sampling),
        server=server_options(**(server or {})),
        fleet=FleetOptions(**{**patience, **(fleet or {})}),
        sync=SyncOptions(**{"mode": mode, "device": HOST, **travel, **(sync or {})}),
        batch_size=batch_size,
    )

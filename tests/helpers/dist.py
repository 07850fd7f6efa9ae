"""Functions on several gloo ranks: one pool of spawned workers for the whole pytest session.

Starting a process and importing torch and megatron takes seconds, so workers stay alive between
calls; each call gets its own rendezvous and ends with Megatron's groups destroyed.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

# What megatron-core 0.16 itself warns about while training; everything else is an error.
IGNORED_WARNINGS = (
    # RowParallelLinear.forward passes tp_group=None to megatron's own linear function.
    ("Warning: tp_group is None", DeprecationWarning),
    # torch 2.13 renamed the collectives that megatron's sequence parallelism calls.
    ("`torch.distributed.(reduce_scatter|all_gather_into)_tensor`", FutureWarning),
)
_START_SECONDS = 240.0  # for new workers to import what every function needs
_GRACE_SECONDS = 3.0  # for the other ranks to report, once one has failed


class RankError(AssertionError):
    """A rank raised; the message carries every failed rank's traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """`function(*args)` on every rank of a gloo world; the results in rank order.

    `function` is a top-level function of an importable module that calls
    `mopd.student.parallel.initialize`. Arguments and results are pickled. Raises RankError when a
    rank fails and TimeoutError when the deadline passes; then the workers are replaced. What new
    workers take to start does not count.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    return _POOL.run(name, world_size, args, timeout)


class _Pool:
    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._store: Any = None

    def run(self, name: str, world_size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
        try:
            self._start(world_size)
            for rank, (_, pipe) in enumerate(self._workers[:world_size]):
                request = (name, args, self._environment(rank, world_size), timeout)
                pipe.send_bytes(pickle.dumps(request))
            replies = self._collect(world_size, time.monotonic() + timeout)
            failed = {rank: text for rank, (ok, text) in replies.items() if not ok}
            if failed:
                told = (f"rank {rank}:\n{text}" for rank, text in failed.items())
                raise RankError("\n".join(told))
            if len(replies) < world_size:
                missing = sorted(set(range(world_size)) - set(replies))
                raise TimeoutError(f"{name}: ranks {missing} did not finish in {timeout} s")
        except BaseException:  # also a test's own timeout: the next call would read these replies
            self.close()
            raise
        return [replies[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()

    def _start(self, count: int) -> None:
        from torch.distributed import TCPStore

        # A store per call: ranks would read the addresses that an earlier call left behind.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        before = len(self._workers)
        while len(self._workers) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # so that a dead worker reads as the end of the pipe
            self._workers.append((process, ours))
        deadline = time.monotonic() + _START_SECONDS
        for _, pipe in self._workers[before:]:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"a worker did not start in {_START_SECONDS} s")
            pipe.recv_bytes()

    def _environment(self, rank: int, world_size: int) -> dict[str, str]:
        """What torchrun would set; the pool plays the agent, whose store outlives the workers."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }

    def _collect(self, world_size: int, deadline: float) -> dict[int, tuple[bool, Any]]:
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world_size])}
        replies: dict[int, tuple[bool, Any]] = {}
        while pipes and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(pipes), timeout=left):
                assert isinstance(pipe, Connection)
                rank = pipes.pop(pipe)
                try:
                    replies[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    replies[rank] = (False, "the worker process died")
                if not replies[rank][0]:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return replies


def _serve(pipe: Connection) -> None:
    """A worker: `ready` out, then requests in, `(ok, result or traceback)` out, until the pipe
    closes."""
    # Before torch looks: the ranks talk gloo, also on machines with GPUs.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for message, category in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    import mopd.student.parallel  # noqa: F401  # it brings megatron in

    pipe.send_bytes(b"ready")
    while True:
        try:
            name, args, environment, timeout = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        # Shows on stderr where a rank hangs, before the pool kills it.
        faulthandler.dump_traceback_later(max(timeout - 1.0, 0.5))
        pipe.send_bytes(pickle.dumps(_call(name, args, environment)))
        faulthandler.cancel_dump_traceback_later()


def _call(name: str, args: tuple[Any, ...], environment: dict[str, str]) -> tuple[bool, Any]:
    from mopd.student.parallel import shutdown

    os.environ.update(environment)
    try:
        module, function = name.split(":")
        result = getattr(importlib.import_module(module), function)(*args)
        shutdown()
        return True, result
    except BaseException:
        return False, traceback.format_exc()


_POOL = _Pool()
atexit.register(_POOL.close)

"""vLLM's server on devices that it shares: started when it is its turn.

`python -m mopd.serving.vllm_leased WORDS` is `python -m` of vLLM's own module, once the lease that
`MOPD_LEASE` names is held. Start-up takes the devices' memory, so nobody else may have them then.
The middleware (`serving.vllm_turns`) finds the lease here, and lets it go when others wait.
"""

from __future__ import annotations

import runpy

from mopd.serving.lease import LEASE_VARIABLE, DeviceLease, lease_of
from mopd.serving.vllm_command import MODULE

_held: list[DeviceLease] = []


def take_held() -> DeviceLease | None:
    """The lease under which this process has loaded its engine; the caller has it from now on."""
    return _held.pop() if _held else None


def start() -> None:
    """Waits for the devices and becomes vLLM's server; whoever started it watches the time."""
    lease = lease_of()
    if lease is None:
        raise SystemExit(f"{LEASE_VARIABLE} is not set: start {MODULE} itself")
    if not lease.acquire(wait_s=None):
        raise AssertionError("nobody gives this up")
    _held.append(lease)
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # the middleware imports this module by its name, and is to find the lease there
    from mopd.serving.vllm_leased import start as start_under_its_name

    start_under_its_name()

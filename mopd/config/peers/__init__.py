"""Other trainers' configurations as recipes: tables of their keys, and what reads them.

`PEERS` has one table per trainer. A table says what each of their keys becomes here, and with which
default where their file does not set it.
"""

from mopd.config.peers.ms_swift import MS_SWIFT
from mopd.config.peers.nemo_rl import NEMO_RL
from mopd.config.peers.rows import Peer
from mopd.config.peers.trl import TRL
from mopd.config.peers.twinkle import TWINKLE

PEERS: dict[str, Peer] = {peer.name: peer for peer in (TRL, NEMO_RL, MS_SWIFT, TWINKLE)}

__all__ = ["PEERS", "Peer"]

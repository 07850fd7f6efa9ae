"""Stands in for MindSpeed's adaptor: what it imports, and that it reads the command line."""

import sys

from torch_npu.contrib import transfer_to_npu

READ = tuple(sys.argv[1:])
BEFORE_MEGATRON = "megatron.core" not in sys.modules
__all__ = ["BEFORE_MEGATRON", "READ", "transfer_to_npu"]

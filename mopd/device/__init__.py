"""Accelerators: what mopd needs of a device, and the Megatron shim for machines without one."""

from mopd.device.base import DeviceBackend, check_dtype, get_device

__all__ = ["DeviceBackend", "check_dtype", "get_device"]

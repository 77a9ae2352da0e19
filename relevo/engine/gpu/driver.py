"""What only the driver says of a GPU: its name for ever, and how much of it is free before we have anything on it.

torch can't: asking CUDA for free memory makes this process's context, which takes some of it. Where a library is not
there, or says no, the answer is None.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DEVICE.html
https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
"""

from __future__ import annotations

import ctypes
from uuid import UUID

_SUCCESS = 0


class _Memory(ctypes.Structure):
    """nvmlMemory_t; bytes"""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def device_uuid(index: int) -> UUID | None:
    """Of the device that CUDA counts as this one in this process. Makes no context."""
    device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        if (
            cuda.cuInit(0) == _SUCCESS
            and cuda.cuDeviceGet(ctypes.byref(device), index) == _SUCCESS
            and cuda.cuDeviceGetUuid_v2(ctypes.byref(raw), device) == _SUCCESS
        ):
            return UUID(bytes=bytes(raw))
    except (OSError, AttributeError):
        pass
    return None


def free_bytes(uuid: UUID) -> int | None:
    """Of the whole GPU, or of the part of one (MIG) that has this name."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != _SUCCESS:
            return None
        try:
            return _free_bytes(nvml, uuid)
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return None


def _free_bytes(nvml: ctypes.CDLL, uuid: UUID) -> int | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    for kind in ("GPU", "MIG"):
        if (
            nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}".encode(), ctypes.byref(handle)) == _SUCCESS
            and nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == _SUCCESS
        ):
            return int(memory.free)
    return None

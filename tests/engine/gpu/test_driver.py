"""What is asked of the driver's libraries, with stand-ins for them."""

from __future__ import annotations

import ctypes
from typing import Any
from uuid import UUID

import pytest

from relevo.engine.gpu.driver import device_uuid, free_bytes

NAME = UUID("12345678-9abc-def0-1234-56789abcdef0")


class Cuda:
    """libcuda.so.1, with two devices."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        if ordinal > 1:
            return 101  # CUDA_ERROR_INVALID_DEVICE
        device._obj.value = 40 + ordinal
        return 0

    def cuDeviceGetUuid_v2(self, raw: Any, device: ctypes.c_int) -> int:
        assert device.value == 41
        raw._obj[:] = NAME.bytes
        return 0


class Nvml:
    """libnvidia-ml.so.1, with one device."""

    def __init__(self, name: str, *, has_rights: bool = True) -> None:
        self.name = name.encode()
        self.has_rights = has_rights
        self.num_open = 0

    def nvmlInit_v2(self) -> int:
        self.num_open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.num_open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        if name != self.name:
            return 6  # NVML_ERROR_NOT_FOUND
        handle._obj.value = 0xABC
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        assert handle.value == 0xABC
        if not self.has_rights:
            return 4  # NVML_ERROR_NO_PERMISSION
        memory._obj.total, memory._obj.free, memory._obj.used = 80 << 30, 70 << 30, 10 << 30
        return 0


def give(monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    def load(name: str) -> object:
        assert name == ("libcuda.so.1" if isinstance(library, Cuda) else "libnvidia-ml.so.1")
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_name_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Cuda())
    assert device_uuid(1) == NAME
    assert device_uuid(2) is None


@pytest.mark.parametrize("kind", ["GPU", "MIG"])
def test_free_memory_of_a_gpu_or_of_a_part_of_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml(f"{kind}-{NAME}")
    give(monkeypatch, nvml)
    assert free_bytes(NAME) == 70 << 30
    assert nvml.num_open == 0


@pytest.mark.parametrize("nvml", [Nvml("GPU-of-others"), Nvml(f"GPU-{NAME}", has_rights=False), object()])
def test_what_the_library_does_not_tell_is_none(nvml: object, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, nvml)
    assert free_bytes(NAME) is None


def test_without_libraries_there_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert device_uuid(0) is None
    assert free_bytes(NAME) is None

"""Kernels as tests without a GPU need them: Triton's in its interpreter, and `reference` as a graph needs it."""

from __future__ import annotations

import pytest
from torch import Tensor

from relevo.kernels import reference
from tests.support import triton_interpreter


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter() -> None:
    triton_interpreter.mend()


@pytest.fixture
def skips_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of -1 are none: graphs' padding goes there."""
    store_kv = reference.store_kv

    def skipping(key: Tensor, value: Tensor, k: Tensor, v: Tensor, slots: Tensor, *scales: Tensor | None) -> None:
        real = slots >= 0
        store_kv(key[real], value[real], k, v, slots[real], *scales)

    monkeypatch.setattr(reference, "store_kv", skipping)

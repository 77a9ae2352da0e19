"""Kernels in Triton's interpreter, for tests that have it as a backend."""

from __future__ import annotations

import pytest

from tests.support import triton_interpreter


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter() -> None:
    triton_interpreter.mend()

"""One thread unless a test asks for more: with tensors this small, threads only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support import triton_interpreter


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter() -> None:
    triton_interpreter.mend()

"""What `python -m bench.gpu` holds the device's checksums against."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from bench.gpu.check_checksums import xxh3


@pytest.mark.parametrize("num_bytes", [1024, 1032, 2040, 2048, 5 * 1024 + 72, 1 << 21, (1 << 21) + 8])
def test_reference_is_xxh3(num_bytes: int) -> None:
    data = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, np.uint8)
    assert xxh3(data) == xxhash.xxh3_64_intdigest(data.data)

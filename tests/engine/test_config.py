from __future__ import annotations

from typing import Any

import pytest

from relevo.core.errors import StartupError
from relevo.engine.config import EngineConfig


@pytest.mark.parametrize(
    ("given", "on_cpu", "on_gpu"),
    [
        ({}, (64, 512), (256, 4096)),
        ({"max_num_seqs": 8}, (8, 512), (8, 4096)),
        ({"max_num_seqs": 5000}, (5000, 5000), (5000, 5000)),
        ({"max_num_batched_tokens": 32}, (32, 32), (32, 32)),
        ({"max_num_batched_tokens": 8192}, (64, 8192), (256, 8192)),
        ({"max_num_seqs": 3, "max_num_batched_tokens": 4}, (3, 4), (3, 4)),
    ],
)
def test_a_steps_size_is_the_devices_where_it_is_not_given(
    given: dict[str, Any], on_cpu: tuple[int, int], on_gpu: tuple[int, int]
) -> None:
    for device, expected in (("cpu", on_cpu), ("cuda", on_gpu)):
        config = EngineConfig(**given).on(device)
        assert (config.max_num_seqs, config.max_num_batched_tokens) == expected
        assert config.on(device) == config


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(StartupError, match=r"max_num_batched_tokens .3. must be at least max_num_seqs .4."):
        EngineConfig(max_num_seqs=4, max_num_batched_tokens=3)
    with pytest.raises(StartupError, match="at least 1, or 0"):
        EngineConfig(max_num_seqs=-1)

"""xxh3-64 of blocks on the device, bit for bit against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.gpu.checks import CheckFunction
from relevo.kernels import Kernels
from relevo.kernels.xxh3 import (
    LAST_SECRET,
    P32_1,
    PIECE_BYTES,
    SCRAMBLING_SECRET,
    SECRET,
    START,
    STRIPE_BYTES,
    finish,
)


def checksum_checks(backend: str, device: torch.device) -> dict[str, CheckFunction]:
    """Triton's, whatever the backend; on a CPU where that is Triton."""
    return {"checksums of blocks": _checksums} if device.type != "cpu" or backend.startswith("triton") else {}


def _checksums(_kernels: Kernels, device: torch.device, tiny: bool) -> None:
    from relevo.kernels.triton import checksum

    assert checksum.check(device), "what is known"
    for num_bytes in (1024, 5 * 1024 + 72) if tiny else (1024, 5 * 1024 + 72, 1 << 21, (1 << 21) + 8):
        storage = torch.randint(0, 256, (6, num_bytes), dtype=torch.uint8, device=device)
        lanes = checksum.hash_lanes(storage, torch.tensor([5, 0, 3], device=device)).tolist()
        found = [finish(each, num_bytes) for each in lanes]
        expected = [xxh3(storage[block_id].cpu().numpy()) for block_id in (5, 0, 3)]
        assert found == expected, f"{sum(map(int.__ne__, found, expected))} of 3 are wrong, of {num_bytes} bytes"


def xxh3(data: NDArray[np.uint8]) -> int:
    """Of at least 1024 bytes."""
    stripes = data[: (len(data) - 1) // STRIPE_BYTES * STRIPE_BYTES].view(np.uint64).reshape(-1, 8)
    secret = SECRET.view(np.uint64)
    table = np.stack([secret[stripe : stripe + 8] for stripe in range(PIECE_BYTES // STRIPE_BYTES)])
    added = _added(stripes, np.resize(table, stripes.shape))
    num_pieces = (len(data) - 1) // PIECE_BYTES
    acc: Any = START.copy()
    for piece in added[: num_pieces * len(table)].reshape(num_pieces, len(table), 8).sum(axis=1):
        acc = acc + piece
        acc = (acc ^ (acc >> np.uint64(47)) ^ secret[SCRAMBLING_SECRET // 8 :]) * np.uint64(P32_1)
    acc = acc + added[num_pieces * len(table) :].sum(axis=0)
    last_secret = SECRET[LAST_SECRET : LAST_SECRET + STRIPE_BYTES].copy().view(np.uint64)
    acc = acc + _added(data[-STRIPE_BYTES:].copy().view(np.uint64), last_secret)
    return finish([int(lane) for lane in acc], len(data))


def _added(words: NDArray[np.uint64], secret: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[…, 8] uint64: what stripes add to the lanes."""
    key = words ^ secret
    neighbours = words.reshape(*words.shape[:-1], 4, 2)[..., ::-1].reshape(words.shape)
    added: NDArray[np.uint64] = neighbours + (key & np.uint64(0xFFFFFFFF)) * (key >> np.uint64(32))
    return added

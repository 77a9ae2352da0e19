"""The compiled nucleus against a full sort of the same probabilities, bit by bit, at the size of a real vocabulary."""

from __future__ import annotations

import math
import time

import numpy as np
import numpy.typing as npt
import pytest
import torch

from relevo.kernels import load_backend
from relevo.kernels.cpu.keys import BLOCK
from relevo.kernels.cpu.nucleus import HISTOGRAM_BYTES, keep_nucleus
from relevo.kernels.cpu.weights import weight_of
from relevo.kernels.sampling import PROBABILITY_UNITS

VOCAB = 151_936


Row = npt.NDArray[np.float32]


def probabilities(shape: str) -> Row:
    generator = np.random.default_rng(7)
    ids = np.arange(VOCAB)
    if shape == "flat":
        logits = generator.normal(0.0, 1.2, VOCAB)
    elif shape == "peaked":
        logits = generator.normal(0.0, 2.0, VOCAB) + 14.0 * (ids % 997 == 0)
    elif shape == "tied":
        logits = np.round(generator.normal(0.0, 1.0, VOCAB), 1)
    else:  # most weigh some thousand units of 2**-50, so that different probabilities weigh the same
        logits = np.where(ids == 5, 0.0, generator.normal(-26.0, 0.5, VOCAB))
    exponentials = np.exp(logits - logits.max()).astype(np.float32)
    row: Row = exponentials / exponentials.sum(dtype=np.float64).astype(np.float32)
    return row


def nucleus_by_sorting(row: Row, wanted: float) -> npt.NDArray[np.int64]:
    weights = np.floor(row.astype(np.float64) * PROBABILITY_UNITS)
    order = np.lexsort((np.arange(len(row)), -weights))
    before = np.concatenate(([0.0], np.cumsum(weights[order])[:-1]))
    return np.sort(order[before < wanted])


def nucleus_by_kernel(row: Row, wanted: float) -> npt.NDArray[np.int64]:
    blocks = -(-len(row) // BLOCK)
    padded = np.zeros(blocks * BLOCK, dtype=np.float32)
    padded[: len(row)] = row
    histogram, heap = np.zeros(HISTOGRAM_BYTES, dtype=np.uint8), np.zeros(blocks * BLOCK + blocks, dtype=np.int64)
    bottom: float = keep_nucleus(padded.ctypes.data, blocks, 0.0, wanted, histogram.ctypes.data, heap.ctypes.data)
    return np.flatnonzero((padded >= bottom) & (padded > 0.0))


@pytest.mark.parametrize("shape", ["flat", "peaked", "tied", "tiny"])
def test_the_nucleus_is_that_of_a_full_sort(shape: str) -> None:
    row = probabilities(shape)
    total = float(np.floor(row.astype(np.float64) * PROBABILITY_UNITS).sum())
    assert weight_of(float(row[0])) == math.floor(float(row[0]) * PROBABILITY_UNITS)
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0 - 1e-9, 1.0 - 1e-12):
        wanted = float(math.ceil(top_p * total))
        assert np.array_equal(nucleus_by_kernel(row, wanted), nucleus_by_sorting(row, wanted)), top_p


def test_a_flat_distribution_costs_no_sort() -> None:
    """Half the vocabulary in the nucleus; a sort, in the same process and thread, takes several times as long."""
    torch.set_num_threads(1)
    kernels = load_backend("cpu", "cpu")
    logits = torch.from_numpy(np.log(probabilities("flat")))[None].repeat(4, 1)
    settings = ([1.0] * 4, [0.0] * 4, [0] * 4, [0.9] * 4, [0.1, 0.4, 0.6, 0.9])
    ours, sorting = [], []
    for _ in range(5):
        started = time.thread_time()
        kernels.sample(logits, *settings)
        ours.append(time.thread_time() - started)
        started = time.thread_time()
        logits.sort(dim=-1, descending=True)
        sorting.append(time.thread_time() - started)
    assert min(ours) < 0.5 * min(sorting), (ours, sorting)

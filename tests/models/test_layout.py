from __future__ import annotations

import pytest
import torch

from relevo.core.block_hash import LayerShape
from relevo.models.layout import KVLayout

LAYERS = (LayerShape(2, 16, 16), LayerShape(1, 24, 8), LayerShape(3, 8, 40))
BLOCK_SIZE = 4
NUM_BLOCKS = 5


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def layout(request: pytest.FixtureRequest) -> KVLayout:
    return KVLayout(LAYERS, request.param, BLOCK_SIZE)


def test_a_block_holds_every_layers_keys_and_values_and_nothing_else(layout: KVLayout) -> None:
    elements = BLOCK_SIZE * (2 * (16 + 16) + 1 * (24 + 8) + 3 * (8 + 40))
    assert layout.block_bytes == elements * layout.dtype.itemsize


def test_views_have_the_kernels_shapes(layout: KVLayout) -> None:
    views = layout.views(torch.zeros(NUM_BLOCKS, layout.block_bytes, dtype=torch.uint8))
    assert [tuple(k.shape) for k, _ in views] == [(5, 4, 2, 16), (5, 4, 1, 24), (5, 4, 3, 8)]
    assert [tuple(v.shape) for _, v in views] == [(5, 4, 2, 16), (5, 4, 1, 8), (5, 4, 3, 40)]
    assert all(view.dtype == layout.dtype for pair in views for view in pair)


def test_writing_through_the_views_touches_all_of_that_block_and_no_other(layout: KVLayout) -> None:
    storage = torch.full((NUM_BLOCKS, layout.block_bytes), 0xEE, dtype=torch.uint8)
    untouched = storage.clone()
    for pair in layout.views(storage):
        for view in pair:
            view[3] = torch.arange(view[3].numel(), dtype=layout.dtype).view_as(view[3])
    assert torch.equal(storage[[0, 1, 2, 4]], untouched[[0, 1, 2, 4]])
    # dense: what was written is the block, end to end
    written = torch.cat([view[3].reshape(-1) for pair in layout.views(storage) for view in pair])
    assert torch.equal(written.view(torch.uint8), storage[3])


def test_offsets_say_where_views_begin(layout: KVLayout) -> None:
    storage = torch.zeros(NUM_BLOCKS, layout.block_bytes, dtype=torch.uint8)
    for (k, v), (k_begin, v_begin) in zip(layout.views(storage), layout.layer_offsets, strict=True):
        assert k.data_ptr() - storage.data_ptr() == k_begin
        assert v.data_ptr() - storage.data_ptr() == v_begin


def test_a_moved_block_reads_the_same(layout: KVLayout) -> None:
    storage = torch.zeros(NUM_BLOCKS, layout.block_bytes, dtype=torch.uint8)
    views = layout.views(storage)
    for pair in views:
        for view in pair:
            view[1].normal_()
    storage[4].copy_(storage[1])
    assert all(torch.equal(view[4], view[1]) for pair in views for view in pair)


def test_fingerprint_depends_on_all_that_a_blocks_bytes_depend_on(layout: KVLayout) -> None:
    own = layout.fingerprint("m", "r", "")
    assert own == KVLayout(LAYERS, layout.dtype, BLOCK_SIZE).fingerprint("m", "r", "")
    others = {
        KVLayout(LAYERS[:2], layout.dtype, BLOCK_SIZE).fingerprint("m", "r", ""),
        KVLayout(LAYERS, torch.float16, BLOCK_SIZE).fingerprint("m", "r", ""),
        KVLayout(LAYERS, layout.dtype, BLOCK_SIZE * 2).fingerprint("m", "r", ""),
        layout.fingerprint("n", "r", ""),
        layout.fingerprint("m", "s", ""),
        layout.fingerprint("m", "r", "gptq"),
    }
    assert len(others) == 6
    assert own not in others


def test_storage_of_another_shape_is_refused(layout: KVLayout) -> None:
    with pytest.raises(ValueError, match=f"num_blocks, {layout.block_bytes}"):
        layout.views(torch.zeros(NUM_BLOCKS, layout.block_bytes - 4, dtype=torch.uint8))

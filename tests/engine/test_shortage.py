"""Out of memory is told in one line, wherever it happens."""

from __future__ import annotations

import asyncio

import pytest
import torch

from relevo.core.block_hash import LayerShape
from relevo.core.errors import StartupError
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine
from relevo.engine.engine_thread import EngineThread
from relevo.engine.kv_cache import KVCache
from relevo.engine.shortage import OutOfMemory, explain_shortage
from relevo.models import loader
from relevo.models.layout import KVLayout
from tests.support.fake_gpu import GIB, FakeGpu
from tests.support.tiny_models import TinyModels

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# As torch says it.
TORCHS = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.03 GiB is "
    "free. Process 7 has 78.08 GiB memory in use. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


def raised(error: Exception, device: torch.device = CPU) -> str:
    with pytest.raises(OutOfMemory) as caught, explain_shortage(device, "a test", "ask for less"):
        raise error
    return caught.value.message


def test_message_says_what_for_how_much_what_is_there_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(others=4 * GIB)
    gpu.install(monkeypatch)
    gpu.allocate(70 * GIB)
    assert raised(torch.OutOfMemoryError(TORCHS), CUDA) == (
        "out of memory for a test (Tried to allocate 2.50 GiB; of 80.00 GiB on cuda:0, 5.50 GiB are free and torch "
        "holds 70.00 GiB for this process): ask for less"
    )


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_what_torchs_allocator_knows_nothing_of_counts(message: str) -> None:
    assert raised(RuntimeError(f"{message}\nand more")) == f"out of memory for a test ({message}): ask for less"


def test_error_that_was_made_of_it_counts() -> None:
    error = StartupError("its weights cannot be loaded")
    error.__cause__ = torch.OutOfMemoryError(TORCHS)
    assert "Tried to allocate 2.50 GiB" in raised(error)


def test_the_inner_explanation_stands() -> None:
    with (
        pytest.raises(OutOfMemory, match=r"for the inner .*: ask for less"),
        explain_shortage(CPU, "the outer", "ask for more"),
        explain_shortage(CPU, "the inner", "ask for less"),
    ):
        raise torch.OutOfMemoryError(TORCHS)


@pytest.mark.parametrize(
    "error", [ValueError("out of memory"), RuntimeError("shapes differ"), StartupError("no model")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explain_shortage(CPU, "a test", "ask for less"):
        raise error
    assert caught.value is error


def test_kv_cache_that_does_not_fit_a_cpu() -> None:
    layout = KVLayout((LayerShape(8, 128, 128),), torch.float32, 16)
    num_blocks = (1 << 55) // layout.block_bytes
    with pytest.raises(OutOfMemory) as caught:
        KVCache(layout, num_blocks, CPU)
    assert caught.value.message.startswith("out of memory for a KV cache of 33554432.00 GiB (can't allocate memory: ")
    assert caught.value.message.endswith("lower kv_cache_memory or gpu_memory_utilization")


def test_weights_that_do_not_fit(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError(TORCHS)

    monkeypatch.setattr(loader, "stored_weights", fail)
    path = tiny_models.path("llama")
    with pytest.raises(OutOfMemory, match=rf"for the model '{path}' \(Tried to allocate 2.50 GiB\): take a smaller"):
        Engine(EngineConfig(model=str(path), kv_cache_memory=1 << 20))


async def test_step_that_runs_out_of_memory_ends_the_engine_with_an_explanation(tiny_models: TinyModels) -> None:
    engine = Engine(EngineConfig(model=str(tiny_models.path("llama")), kv_cache_memory=1 << 20))

    def fail() -> None:
        raise torch.OutOfMemoryError(TORCHS)

    engine.step = fail  # type: ignore[method-assign, assignment]
    thread = EngineThread(engine, lambda _: None)
    thread.start()
    async with asyncio.timeout(30):
        with pytest.raises(OutOfMemory, match=r"out of memory for a step .*lower max_num_batched_tokens"):
            await thread.wait()

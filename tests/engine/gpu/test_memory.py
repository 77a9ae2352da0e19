"""What is left of a GPU for the KV cache, with a stand-in for the GPU: nothing here has seen a real one."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from relevo.core.errors import StartupError
from relevo.engine.config import EngineConfig
from relevo.engine.gpu import start as gpu_start
from relevo.engine.gpu.memory import (
    CONTEXT_BYTES,
    GpuMemory,
    MemoryProfile,
    first_touch,
    keep_for_steps,
    profile_memory,
)
from relevo.engine.gpu.start import start_on
from relevo.engine.shortage import OutOfMemory
from relevo.engine.sizing import count_blocks
from tests.support.fake_gpu import GIB, NAME, FakeGpu

CUDA = torch.device("cuda", 0)
BLOCK_BYTES = 2 << 20
PROFILE = MemoryProfile(total=80 * GIB, free=63 * GIB, weights=16 * GIB, step=2 * GIB, outside=GIB, graphs=0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    gpu.install(monkeypatch)
    return gpu


def load(gpu: FakeGpu) -> GpuMemory:
    """16 GiB of weights, loading which takes 3 more for a while."""
    memory = first_touch(CUDA, NAME)
    gpu.allocate(16 * GIB)
    with gpu.allocated(3 * GIB):
        pass
    return memory


def profile_of(gpu: FakeGpu, memory: GpuMemory, *, graph_bytes: int = 0) -> MemoryProfile:
    """A step of 2 GiB, with ½ GiB of code; graphs' buffers of ¼ and memory for the largest of ½ GiB."""

    def largest_step() -> None:
        gpu.running.context += GIB // 2
        with gpu.allocated(2 * GIB):
            pass

    def rehearse() -> int:
        with gpu.allocated(GIB // 4), gpu.allocated(GIB // 2):
            pass
        return graph_bytes

    return profile_memory(memory, largest_step, rehearse if graph_bytes else None)


def load_and_profile(gpu: FakeGpu, *, graph_bytes: int = 0) -> MemoryProfile:
    return profile_of(gpu, load(gpu), graph_bytes=graph_bytes)


def start(gpu: FakeGpu, utilization: float, *, graph_bytes: int = 0) -> int:
    """An engine in a process of its own, which takes its KV cache: how large that is."""
    gpu.new_process()
    memory = load(gpu)
    profile = profile_of(gpu, memory, graph_bytes=graph_bytes)
    kv_bytes = profile.kv_bytes(utilization)
    gpu.allocate(kv_bytes)
    gpu.allocate(profile.graphs)
    keep_for_steps(memory, profile)
    return kv_bytes


def test_everything_but_kv_is_measured(gpu: FakeGpu) -> None:
    gpu.others = 5 * GIB
    profile = load_and_profile(gpu)
    assert profile == replace(PROFILE, free=(80 - 5 - 16 - 1) * GIB)
    assert profile.kv_bytes(0.9) == (72 - 19) * GIB


def test_whole_engine_stays_within_its_share(gpu: FakeGpu) -> None:
    start(gpu, 0.9)
    assert gpu.running.taken == 72 * GIB
    with gpu.allocated(2 * GIB):  # a step: its memory is kept
        assert gpu.running.taken == 72 * GIB


def test_engines_on_one_gpu_have_shares_of_the_total_whichever_comes_first(gpu: FakeGpu) -> None:
    assert start(gpu, 0.3) == start(gpu, 0.3) == start(gpu, 0.3) == 24 * GIB - 19 * GIB
    assert gpu.free == 8 * GIB


def test_second_engine_of_a_process_counts_its_own_memory_only(gpu: FakeGpu) -> None:
    first = load_and_profile(gpu)
    gpu.allocate(10 * GIB)
    second = load_and_profile(gpu)
    # The context is there already; kernels' code is loaded again in this stand-in.
    assert second == replace(first, outside=GIB // 2, free=first.free - (10 + 16) * GIB - GIB // 2)


def test_what_an_earlier_engine_left_in_torchs_cache_is_free(gpu: FakeGpu) -> None:
    first = load_and_profile(gpu)
    gpu.release(16 * GIB)
    assert load_and_profile(gpu) == replace(first, outside=GIB // 2, free=first.free - GIB // 2)


def test_without_the_drivers_library_the_context_is_an_allowance(gpu: FakeGpu) -> None:
    gpu.has_nvml = False
    gpu.context_bytes = 3 * GIB // 10
    assert load_and_profile(gpu).outside == CONTEXT_BYTES + GIB // 2
    assert load_and_profile(gpu).outside == GIB // 2, "it is there already"


def test_memory_that_others_free_meanwhile_does_not_become_ours(gpu: FakeGpu) -> None:
    gpu.others = 50 * GIB
    memory = first_touch(CUDA, NAME)
    gpu.allocate(16 * GIB)
    gpu.others = 0
    assert memory.taken() == 16 * GIB


def test_workspaces_that_the_first_step_sets_up_count_once(gpu: FakeGpu) -> None:
    memory = load(gpu)

    def largest_step() -> None:
        if gpu.running.allocated == 16 * GIB:
            gpu.allocate(GIB // 4)
        with gpu.allocated(2 * GIB):
            pass

    profile = profile_memory(memory, largest_step)
    assert (profile.weights, profile.step) == (16 * GIB + GIB // 4, 2 * GIB)
    gpu.allocate(profile.kv_bytes(0.9))
    keep_for_steps(memory, profile)
    largest_step()
    assert gpu.running.taken == 72 * GIB


def test_graphs_have_room_beside_the_kv_cache(gpu: FakeGpu) -> None:
    graphs = GIB + 3 * GIB // 4
    assert load_and_profile(gpu, graph_bytes=GIB) == replace(PROFILE, graphs=graphs)
    gpu.processes.clear()
    assert start(gpu, 0.9, graph_bytes=GIB) == 53 * GIB - graphs
    assert gpu.running.taken == 72 * GIB


def test_engine_takes_less_where_others_hold_its_share(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.others = 20 * GIB
    profile = load_and_profile(gpu)
    with caplog.at_level(logging.WARNING):
        num_blocks = count_blocks(EngineConfig(), BLOCK_BYTES, profile)
    assert num_blocks == profile.kv_bytes(0.9) // BLOCK_BYTES
    gpu.allocate(num_blocks * BLOCK_BYTES)
    gpu.allocate(profile.step)
    assert int(0.02 * 80 * GIB) <= gpu.free < int(0.02 * 80 * GIB) + BLOCK_BYTES
    # 41 GiB are free, 1.6 of them stay so; the share would have left 53
    assert "gets 13.60 GiB less than gpu_memory_utilization 0.9 allows" in caplog.text


def test_no_warning_where_the_share_is_there(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert count_blocks(EngineConfig(), BLOCK_BYTES, load_and_profile(gpu)) == 53 * GIB // BLOCK_BYTES
    assert not caplog.records


def test_kv_memory_that_was_given_is_taken_as_it_is(gpu: FakeGpu) -> None:
    config = EngineConfig(kv_cache_memory=60 * GIB, gpu_memory_utilization=0.1)
    assert count_blocks(config, BLOCK_BYTES, PROFILE) == 60 * GIB // BLOCK_BYTES
    with pytest.raises(StartupError, match=r"60.00 GiB does not fit: 59.00 GiB are free .*weights 16.00 GiB"):
        count_blocks(config, BLOCK_BYTES, replace(PROFILE, graphs=2 * GIB))


def test_no_room_says_what_takes_it_and_what_to_do() -> None:
    with pytest.raises(OutOfMemory) as caught:
        count_blocks(EngineConfig(gpu_memory_utilization=0.2), BLOCK_BYTES, PROFILE)
    for words in ("allows 16.00 GiB", "63.00 GiB are free", "weights 16.00 GiB", "largest step 2.00 GiB", "Raise gpu_"):
        assert words in caught.value.message


@pytest.mark.parametrize("utilization", [0.0, -0.5, 1.01])
def test_share_out_of_range_is_refused(utilization: float) -> None:
    with pytest.raises(StartupError, match="gpu_memory_utilization must be above 0 and at most 1"):
        EngineConfig(gpu_memory_utilization=utilization)


def test_default_on_a_cpu_is_a_gibibyte() -> None:
    assert count_blocks(EngineConfig(), BLOCK_BYTES, None) == GIB // BLOCK_BYTES


def test_engines_that_start_at_the_same_time_get_the_same(gpu: FakeGpu, tmp_path: Path) -> None:
    """Without the lock the second one's weights would be missing in the first one's KV cache."""
    kv_bytes: list[int] = []
    inside = threading.Lock()

    def run() -> None:
        with start_on(CUDA, str(tmp_path)) as memory:
            assert memory is not None
            assert inside.acquire(blocking=False), "another one is starting"
            gpu.allocate(16 * GIB)
            profile = profile_memory(memory, lambda: None)
            kv_bytes.append(profile.kv_bytes(0.45))
            gpu.allocate(kv_bytes[-1])
            # The next thread stands for another process.
            gpu.new_process()
            inside.release()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert kv_bytes == [(36 - 16) * GIB - GIB // 2] * 2
    assert [path.name for path in tmp_path.iterdir()] == [f"relevo-gpu-{NAME}.lock"]


def test_lock_of_an_engine_that_is_killed_is_free(
    gpu: FakeGpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / f"relevo-gpu-{NAME}.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        timer = threading.Timer(0.3, holder.kill)
        timer.start()
        with caplog.at_level(logging.INFO), start_on(CUDA, str(tmp_path)):
            assert holder.wait(timeout=30) == -signal.SIGKILL
    assert "waiting for another engine to have started on this GPU" in caplog.text


def test_lock_that_nobody_gives_back_does_not_stop_others(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_start, "MAX_WAIT_SECONDS", 0.2)
    with start_on(CUDA, str(tmp_path)), caplog.at_level(logging.WARNING), start_on(CUDA, str(tmp_path)) as memory:
        assert memory is not None
    assert "still locked after 0.2 s" in caplog.text


def test_lock_that_cannot_be_had_is_a_warning(gpu: FakeGpu, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = tmp_path / "missing"
    with caplog.at_level(logging.WARNING), start_on(CUDA, str(missing)) as memory:
        assert memory is not None
    assert f"{missing}/relevo-gpu-{NAME}.lock: No such file or directory" in caplog.text


def test_cpu_needs_no_lock(tmp_path: Path) -> None:
    with start_on(torch.device("cpu"), str(tmp_path)) as memory:
        assert memory is None
    assert not list(tmp_path.iterdir())


def test_no_room_for_a_context_is_told(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    with pytest.raises(OutOfMemory) as caught, start_on(CUDA, str(tmp_path)):
        pass
    assert caught.value.message == (
        "out of memory for a CUDA context (CUDA error: out of memory): end what else uses this GPU"
    )

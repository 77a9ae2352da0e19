"""Page faults, counted in processes of their own: what one engine sets holds for its whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

BLOCKS = """
import ctypes, json, resource, sys, threading
from relevo.allocator import keep_freed_memory, use_one_heap
if sys.argv[1] == "kept":
    assert use_one_heap()
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
libc.free.argtypes = (ctypes.c_void_p,)

def work(counts):
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for size in (100 << 20, 40 << 20, 80 << 20):
            address = libc.malloc(size)
            ctypes.memset(address, 1, size)
            libc.free(address)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

counts = []
thread = threading.Thread(target=work, args=(counts,))
thread.start()
thread.join()
print(json.dumps(counts))
"""

STEPS = """
import json, resource, sys, threading
from relevo.allocator import use_one_heap
if sys.argv[2] == "worker":
    use_one_heap()
from relevo.core.sampling_params import SamplingParams
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def load(found):
    options = dict(dtype="float32", load_format="dummy", kv_cache_memory=32 << 20, passes=sys.argv[3] == "passes")
    found.append(Engine(EngineConfig(model=sys.argv[1], **options)))

def work(engine, counts):
    for index in range(8):
        prompt = [(index * 97 + i * 31) % 4000 for i in range(512)]
        sampling = SamplingParams(max_tokens=4, temperature=0.0, seed=0, ignore_eos=True)
        engine.submit(engine.make_request(str(index), prompt, sampling))
        of_prompt = []
        while engine.has_unfinished_requests:
            before = faults()
            engine.step()
            of_prompt.append(faults() - before)
        counts.append(of_prompt)

def run(function, *arguments):
    if sys.argv[2] == "worker":
        thread = threading.Thread(target=function, args=arguments)
        thread.start()
        thread.join()
    else:
        function(*arguments)

engines, counts = [], []
run(load, engines)
run(work, engines[0], counts)
block_bytes = engines[0].info.block_bytes
print(json.dumps([counts, block_bytes]))
"""


def run(script: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=220, check=True)
    return json.loads(result.stdout)


def test_freed_blocks_of_any_size_are_there_for_the_next_step() -> None:
    """Also in a thread. Left alone, glibc maps anew what is larger than 32 MiB, and 220 MiB are 56,320 pages."""
    kept, plain = run(BLOCKS, "kept"), run(BLOCKS, "plain")
    assert max(kept[1:]) < 300, kept
    assert min(plain[1:]) > 50_000, plain


@pytest.mark.timeout(240)  # the first to compute compiles the kernels
@pytest.mark.parametrize("passes", ["passes", "none"])
@pytest.mark.parametrize("place", ["worker", "llm"])
def test_steps_fault_no_pages_in_but_those_of_new_kv_blocks(tmp_path: Path, place: str, passes: str) -> None:
    """A step of 512 tokens has temporaries of up to 16 MiB. LLM computes in the main thread, a worker in another."""
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(tmp_path)
    counts, block_bytes = run(STEPS, str(tmp_path), place, passes)
    pages_of_kv = 512 // 16 * block_bytes // 4096
    settled = sorted(counts[2:])[:2]  # of six prompts: now and then the heap still grows a little
    for prefill, *decode in settled:
        assert prefill < pages_of_kv + 100, counts
        assert max(decode) < 50, counts

"""An engine with the weights of no model, in a model's shape: decode, prefill, many requests, hand-over."""

from __future__ import annotations

from statistics import median

from bench.gpu.engines import make_engine, make_prompts, run
from bench.gpu.figures import BATCHES, LLAMA, PREFILLS
from bench.gpu.handover import hand_over
from bench.gpu.parts import Bench
from bench.gpu.shapes import Shape, load_shape
from relevo.engine.engine import Engine

CONTEXT, DECODE_STEPS = 1024, 32
TINY_CONTEXT, TINY_DECODE_STEPS = 24, 6
REQUESTS, INPUT, OUTPUT = 256, 512, 256
TINY_REQUESTS, TINY_INPUT, TINY_OUTPUT = 16, 24, 8
PREFILL_RUNS = 3


def workload(bench: Bench) -> tuple[int, int, int]:
    """Requests, and each one's tokens in and out."""
    return (TINY_REQUESTS, TINY_INPUT, TINY_OUTPUT) if bench.tiny else (REQUESTS, INPUT, OUTPUT)


def _engine(bench: Bench, shape_name: str) -> tuple[Engine, Shape]:
    """The one that the last part left, if it is of this shape."""
    shape = load_shape(shape_name, tiny=bench.tiny)
    if shape_name not in bench.kept:
        bench.drop()
        context = TINY_CONTEXT if bench.tiny else CONTEXT
        bench.kept[shape_name] = make_engine(bench, shape, max(BATCHES) * (context + 64))
    return bench.kept[shape_name], shape


def measure_decode(shape_name: str, bench: Bench) -> None:
    """Median seconds of steps in which each request gets one token, against bytes ÷ copy bandwidth.

    The largest batch goes first: its prompts are then cached for the smaller ones.
    """
    engine, shape = _engine(bench, shape_name)
    context, num_steps = (TINY_CONTEXT, TINY_DECODE_STEPS) if bench.tiny else (CONTEXT, DECODE_STEPS)
    length = context - num_steps // 2
    prompts = make_prompts(max(BATCHES), length, shape.vocab, seed=1)
    for batch in reversed(BATCHES):
        steps = run(engine, prompts[:batch], num_steps + 2, bench.deadline).steps
        plain = [step.seconds for step in steps if step.num_tokens == step.num_sampled == batch][1:]
        if not plain:
            raise RuntimeError(f"the KV cache does not hold {batch} requests at the same time")
        seconds = median(plain)
        least = shape.decode_bytes(batch, context)
        ratio = seconds * bench.copy_bandwidth / least if bench.copy_bandwidth else None
        bench.add(f"{shape_name}/tpot_{batch}", 1e3 * seconds, ratio)


def measure_prefill(shape_name: str, bench: Bench) -> None:
    """Tokens of one prompt a second, from the request to its first token; medians."""
    engine, shape = _engine(bench, shape_name)
    for thousands in PREFILLS:
        tokens = thousands * (16 if bench.tiny else 1024)
        prompts = make_prompts(PREFILL_RUNS + 1, tokens, shape.vocab, seed=100 + thousands)
        seconds = median([run(engine, [prompt], 1, bench.deadline).seconds for prompt in prompts][1:])
        rate = shape.prefill_operations(tokens) / seconds
        ratio = rate / bench.matrix_rate if bench.matrix_rate else None
        bench.add(f"{shape_name}/prefill_{thousands}k", tokens / seconds, ratio)


def measure_throughput(bench: Bench) -> None:
    """Output tokens a second of requests that are all there from the start."""
    engine, shape = _engine(bench, LLAMA)
    count, num_input, num_output = workload(bench)
    run(engine, make_prompts(8, num_input, shape.vocab, seed=2), 4, bench.deadline)
    result = run(engine, make_prompts(count, num_input, shape.vocab, seed=3), num_output, bench.deadline)
    bench.add("throughput", count * num_output / result.seconds)


def measure_handover(bench: Bench) -> None:
    """Of one prompt, into a second engine on the same device; medians."""
    source, shape = _engine(bench, LLAMA)
    tokens = 16 * (16 if bench.tiny else 1024)
    target = make_engine(bench, shape, 2 * tokens)
    prompts = make_prompts(PREFILL_RUNS + 1, tokens, shape.vocab, seed=4)
    results = [hand_over(source, target, prompt, 4, bench.deadline) for prompt in prompts][1:]
    tail = median(result.tail_seconds for result in results)
    ttft = median(result.ttft_seconds for result in results)
    second = median(result.second_token_seconds for result in results)
    num_bytes = results[0].num_bytes
    out = num_bytes / median(result.out_seconds for result in results)
    into = num_bytes / median(result.in_seconds for result in results)
    remark = (
        f"TTFT {1e3 * ttft:.0f} ms, second token {1e3 * second:.0f} ms later;"
        f" {num_bytes / 1e6:.0f} MB, out {out / 1e9:.1f} GB/s, in {into / 1e9:.1f} GB/s"
    )
    bench.add("handover_tail", 1e3 * tail, tail / ttft, remark)

"""The options of commands that start engines: one list for all of them. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, Literal

import typer

from relevo.core.errors import StartupError
from relevo.core.sizes import parse_size
from relevo.engine.config import DEFAULT_GPU_MEMORY_UTILIZATION, check_speculative

EngineOptions = dict[str, Any]  # keywords of EngineConfig

DECODE_OPTIONS = ("speculative", "num_speculative_tokens", "adaptive_speculation")


def parse_size_option(option: str, value: str | int) -> int:
    """Bytes. Raises typer.BadParameter, naming the option."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def engine_options(
    *,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="of weights, activations and KV")
    ] = "auto",
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8_e4m3"], typer.Option(help="of KV; auto: that of activations, fp8_e4m3: 8 bits")
    ] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="tokens of prompt and output together. Default: the model's")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="tokens in a KV block")] = 16,
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="KV cache of each worker. Default: 1GiB; on a GPU what --gpu-memory-utilization leaves"
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="share of a GPU's memory to take; several workers of `serve` divide it equally")
    ] = DEFAULT_GPU_MEMORY_UTILIZATION,
    max_num_seqs: Annotated[
        int, typer.Option(min=0, help="requests computed at the same time, per worker. 0: 64, on a GPU 256")
    ] = 0,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=0, help="tokens computed in one step. 0: 512, on a GPU 4096")
    ] = 0,
    step_stretch: Annotated[
        float,
        typer.Option(help="a step with prompts may take so many times a plain one, while others decode; inf: no limit"),
    ] = 2.0,
    load_format: Annotated[
        Literal["auto", "dummy"], typer.Option(help="dummy: random weights from config.json alone")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="of dummy weights")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where workers compute")] = "auto",
    attention_backend: Annotated[
        Literal["auto", "reference", "cpu", "triton", "flash-attn", "flashinfer"],
        typer.Option(help="kernels: plain torch, numba (CPU), Triton (GPU), or that with FlashAttention or FlashInfer"),
    ] = "auto",
    passes: Annotated[bool, typer.Option(help="replace the model's modules by faster ones that are equal")] = True,
    quantization: Annotated[
        Literal["none", "int8"], typer.Option(help="of the weights; int8 reads half the bytes for each token")
    ] = "none",
    speculative: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="who drafts tokens ahead: draft:PATH, draft:demo, ngram or suffix. Default: nobody"
        ),
    ] = None,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(min=1, max=32, help="drafts a step, at most. Default: 5; of ngram and suffix 10")
    ] = None,
    adaptive_speculation: Annotated[bool, typer.Option(help="draft only where it is measured to pay")] = True,
    enforce_eager: Annotated[bool, typer.Option(help="on a GPU: no CUDA graphs for decode steps")] = False,
    async_scheduling: Annotated[
        bool | None, typer.Option(help="launch a step before the last one's tokens are read. Default: on a GPU")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="that compute, in each worker. Default: one a core that there is for us")
    ] = None,
) -> EngineOptions:
    """What `takes_engine_options` adds to a command, as EngineConfig's keywords."""
    given = dict(locals())
    if speculative is not None:
        try:
            check_speculative(speculative)
        except StartupError as error:
            raise typer.BadParameter(error.message, param_hint="--speculative") from error
    if not 0.0 < gpu_memory_utilization <= 1.0:
        raise typer.BadParameter(
            f"must be above 0 and at most 1, not {gpu_memory_utilization}", param_hint="--gpu-memory-utilization"
        )
    if kv_cache_memory is not None:
        given["kv_cache_memory"] = parse_size_option("--kv-cache-memory", kv_cache_memory)
    return given


def takes_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the engine's options to a Typer command. It receives them in its parameter `engine`, an EngineOptions.

    An option that the command has itself is not added: `engine` then lacks it.
    """
    own = inspect.signature(command, eval_str=True)
    assert "engine" in own.parameters, "the command has no parameter for them"
    shared = inspect.signature(engine_options, eval_str=True).parameters
    added = {name: parameter for name, parameter in shared.items() if name not in own.parameters}
    kept = [parameter for name, parameter in own.parameters.items() if name != "engine"]
    signature = own.replace(parameters=[*kept, *added.values()])

    @wraps(command)
    def with_engine_options(**values: Any) -> None:
        given = {name: values.pop(name) for name in added}
        options = engine_options(**given)
        command(**values, engine={name: options[name] for name in added})

    with_engine_options.__signature__ = signature  # type: ignore[attr-defined]
    with_engine_options.__annotations__ = {
        parameter.name: parameter.annotation for parameter in [*kept, *added.values()]
    }
    return with_engine_options


def worker_flags(engine: Mapping[str, Any]) -> dict[str, str | bool]:
    """The same options as StackConfig.worker_options wants them; "" stands for None, which workers have by default."""
    return {name.replace("_", "-"): _flag(value) for name, value in engine.items() if name not in DECODE_OPTIONS}


def decode_flags(engine: Mapping[str, Any]) -> dict[str, str | bool]:
    """Those that decode workers have and prefill workers have not."""
    return {name.replace("_", "-"): _flag(value) for name, value in engine.items() if name in DECODE_OPTIONS}


def _flag(value: Any) -> str | bool:
    return value if isinstance(value, bool) else "" if value is None else str(value)

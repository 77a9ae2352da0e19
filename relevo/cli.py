"""The command line: relevo serve, relevo bench."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer
import yaml

from relevo import __version__
from relevo.bench.cli import app as bench_app
from relevo.core.errors import RelevoError, StartupError
from relevo.core.sizes import parse_size
from relevo.model_files import resolve_model
from relevo.stack import Stack, StackConfig

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line; a RelevoError is one line on stderr and exit code 1."""
    try:
        app()
    except RelevoError as error:
        print(f"relevo: error: {' '.join(error.message.split())}", file=sys.stderr)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"relevo {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Serve large language models; prefill and decode apart, KV blocks handed over."""


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Values of a YAML file become the options' defaults: what stands on the command line wins."""
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise StartupError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise StartupError(f"--config {path}: must hold options and their values, e.g. 'port: 8001'")
    known = {parameter.name for parameter in context.command.params} - {"config"}
    defaults = {str(name).replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(defaults.keys() - known):
        raise StartupError(
            f"--config {path}: unknown option {unknown[0]!r}; there are {', '.join(sorted(filter(None, known)))}"
        )
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _size(value: str | int) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face id or local folder; nothing: the bundled demo model")
    ] = None,
    *,
    config: Annotated[
        Path | None,
        typer.Option(callback=_read_config, is_eager=True, help="YAML file with these options; the command line wins"),
    ] = None,
    host: Annotated[str, typer.Option(help="address of the HTTP endpoint")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port of the HTTP endpoint")] = 8000,
    prefill: Annotated[int, typer.Option(min=1, help="number of prefill workers")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="number of decode workers")] = 1,
    topology: Annotated[
        Literal["disaggregated", "aggregated"],
        typer.Option(help="aggregated: no prefill workers, decode workers compute prompts themselves"),
    ] = "disaggregated",
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="name that clients use; may be repeated. Default: MODEL")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="of weights, activations and KV")
    ] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="tokens of prompt and output together. Default: the model's")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="tokens in a KV block")] = 16,
    kv_cache_memory: Annotated[str, typer.Option(metavar="SIZE", help="KV cache of each worker")] = "1GiB",
    kv_arena: Annotated[str, typer.Option(metavar="SIZE", help="shared memory for blocks on their way")] = "256MiB",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="requests computed at the same time, per worker")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="tokens computed in one step")] = 512,
    load_format: Annotated[
        Literal["auto", "dummy"], typer.Option(help="dummy: random weights from config.json alone")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="of dummy weights")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where workers compute")] = "auto",
    attention_backend: Annotated[
        Literal["auto", "reference", "cpu"], typer.Option(help="kernels: plain torch, or numba for the CPU")
    ] = "auto",
    api_key: Annotated[
        str | None, typer.Option(envvar="RELEVO_API_KEY", help="clients must send it as a bearer token")
    ] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="how long running requests may go on at shutdown")] = 10.0,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="of all processes")
    ] = "warning",
) -> None:
    """Serve MODEL on an OpenAI-compatible endpoint; starts all processes on this machine, Ctrl-C stops them."""
    started = time.monotonic()
    # Downloaded here, once, and not by each process; an unknown model ends it now.
    files = resolve_model(model, weights=load_format != "dummy")
    stack_config = StackConfig(
        model=model,
        host=host,
        port=port,
        num_prefill=prefill,
        num_decode=decode,
        topology=topology,
        kv_arena=str(_size(kv_arena)),
        api_key=api_key,
        log_level=log_level,
        drain_seconds=drain_seconds,
        worker_options={
            "dtype": dtype,
            "max-model-len": "" if max_model_len is None else str(max_model_len),
            "block-size": str(block_size),
            "kv-cache-memory": str(_size(kv_cache_memory)),
            "max-num-seqs": str(max_num_seqs),
            "max-num-batched-tokens": str(max_num_batched_tokens),
            "load-format": load_format,
            "seed": str(seed),
            "device": device,
            "attention-backend": attention_backend,
        },
        router_options={"served-model-name": ",".join(served_model_name or [])},
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started this in the background, ignoring SIGINT
        signal.signal(number, _interrupt)
    with Stack(stack_config) as stack:
        try:
            print(f"Starting {files.name} …", flush=True)
            stack.start()
            _print_started(stack, (served_model_name or [files.name])[0], time.monotonic() - started)
            child = stack.wait()
        except KeyboardInterrupt:
            print("\nStopping: running requests may finish …", flush=True)
            return
    raise StartupError(
        f"{child.name} (pid {child.pid}) ended with exit code {child.process.returncode}; stopped the rest"
    )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _print_started(stack: Stack, model: str, seconds: float) -> None:
    print(f"\nRelevo serves {model} at {stack.endpoint}/v1 (ready in {seconds:.1f} s)\n")
    for child in stack.children:
        address = f"{stack.endpoint}, gRPC {child.address}" if child.role == "router" else f"gRPC {child.address}"
        print(f"  {child.name:<12} {address:<50} pid {child.pid}")
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "What does os.path.join do?"}]}
    key = " -H 'Authorization: Bearer '\"$RELEVO_API_KEY\"" if stack.config.api_key else ""
    print(f"\nTry it:\n\n  curl {stack.endpoint}/v1/chat/completions{key} -H 'Content-Type: application/json' \\")
    print(f"    -d '{json.dumps(body)}'\n\nCtrl-C stops it.", flush=True)


if __name__ == "__main__":
    main()

"""The command line: relevo serve, relevo inspect; relevo chat, top, bench, kv and chaos have files of their own."""

from __future__ import annotations

import json
import logging
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
from relevo.chaos import app as chaos_app
from relevo.core.errors import RelevoError, StartupError
from relevo.engine_options import EngineOptions, decode_flags, parse_size_option, takes_engine_options, worker_flags
from relevo.kv import app as kv_app
from relevo.model_files import resolve_model
from relevo.stack import Stack, StackConfig
from relevo.terminal.commands import chat, top
from relevo.trace import trace

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(trace)
app.add_typer(bench_app, name="bench")
app.add_typer(kv_app, name="kv")
app.add_typer(chaos_app, name="chaos")
app.command()(chat)
app.command()(top)


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


@app.command()
@takes_engine_options
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face id or local folder; nothing: the bundled demo model")
    ] = None,
    *,
    context: typer.Context,
    engine: EngineOptions,
    config: Annotated[
        Path | None,
        typer.Option(callback=_read_config, is_eager=True, help="YAML file with these options; the command line wins"),
    ] = None,
    host: Annotated[str, typer.Option(help="address of the HTTP endpoint")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port of the HTTP endpoint")] = 8000,
    prefill: Annotated[int, typer.Option(min=1, help="number of prefill workers")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="number of decode workers")] = 1,
    router_workers: Annotated[int, typer.Option(min=1, help="router processes, all on the same port")] = 1,
    topology: Annotated[
        Literal["disaggregated", "aggregated"],
        typer.Option(help="aggregated: no prefill workers, decode workers compute prompts themselves"),
    ] = "disaggregated",
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="name that clients use; may be repeated. Default: MODEL")
    ] = None,
    kv_arena: Annotated[str, typer.Option(metavar="SIZE", help="shared memory for blocks on their way")] = "256MiB",
    kv_disk: Annotated[
        Path | None, typer.Option(metavar="DIR", help="directory that keeps blocks beyond that, and over restarts")
    ] = None,
    kv_disk_bytes: Annotated[str, typer.Option(metavar="SIZE", help="bound on what is kept there")] = "10GiB",
    kv_redis: Annotated[
        str | None, typer.Option(metavar="URL", help="Redis that keeps blocks; with a password: in RELEVO_KV_REDIS")
    ] = None,
    offer_share: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="of decode's time, for keeping its blocks where all workers find them; 0: none"
        ),
    ] = 0.05,
    direct_kv: Annotated[
        bool, typer.Option(help="blocks go from worker to worker, from GPU to GPU, by NIXL where that works")
    ] = False,
    take_turns: Annotated[
        bool, typer.Option(help="several workers on the CPU compute one at a time, each with all threads")
    ] = True,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="RELEVO_API_KEY", help="clients must send it as a bearer token; several: k1,k2"),
    ] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="keys' names, hashes and limits, one a line: docs/http.md")
    ] = None,
    salt_by_api_key: Annotated[
        bool, typer.Option(help="cached blocks are shared only by requests with the same API key")
    ] = False,
    http_tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM certificate: the endpoint is HTTPS then")
    ] = None,
    http_tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM file: its key")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="origin whose pages may use the API from a browser; may be repeated")
    ] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="how long running requests may go on at shutdown")] = 10.0,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="of all processes")
    ] = "warning",
    restart: Annotated[
        bool, typer.Option(help="start a process that dies again; else it takes the others along")
    ] = True,
    chaos: Annotated[
        bool,
        typer.Option("--chaos", help="for tests: lets `relevo chaos` delay, drop and damage KV blocks"),
    ] = False,
) -> None:
    """Serve MODEL on an OpenAI-compatible endpoint; starts all processes on this machine, Ctrl-C stops them."""
    started = time.monotonic()
    if topology == "aggregated":
        _refuse_options_of_the_split(context)
    # Downloaded here, once, and not by each process; an unknown model ends it now.
    files = resolve_model(model, weights=engine["load_format"] != "dummy")
    stack_config = StackConfig(
        model=model,
        host=host,
        port=port,
        num_prefill=prefill,
        num_decode=decode,
        num_routers=router_workers,
        topology=topology,
        kv_arena=str(parse_size_option("--kv-arena", kv_arena)),
        agent_options={
            "kv-disk": "" if kv_disk is None else str(kv_disk.absolute()),
            "kv-disk-bytes": str(parse_size_option("--kv-disk-bytes", kv_disk_bytes)),
            "kv-redis": kv_redis or "",
        },
        api_key=api_key,
        log_level=log_level,
        drain_seconds=drain_seconds,
        take_turns=take_turns,
        restart=restart,
        chaos=chaos,
        worker_options=worker_flags(engine) | {"offer-share": str(offer_share), "direct-kv": direct_kv},
        decode_options=decode_flags(engine),
        router_options={
            "served-model-name": ",".join(served_model_name or []),
            "salt-by-api-key": salt_by_api_key,
            "cors-origin": ",".join(cors_origin or []),
            **_path_flags(api_keys_file=api_keys_file, http_tls_cert=http_tls_cert, http_tls_key=http_tls_key),
        },
    )
    _log_to_stderr(log_level)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started this in the background, ignoring SIGINT
        signal.signal(number, _interrupt)
    with Stack(stack_config) as stack:
        try:
            print(f"Starting {files.name} …", flush=True)
            stack.start()
            _print_started(stack, (served_model_name or [files.name])[0], time.monotonic() - started)
            reason = stack.supervise()
        except KeyboardInterrupt:
            print("\nStopping: running requests may finish …", flush=True)
            return
    raise StartupError(f"{reason}; stopped the rest")


@app.command()
@takes_engine_options
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face id or local folder; nothing: the bundled demo model")
    ] = None,
    *,
    engine: EngineOptions,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Load MODEL and print its parameters, its KV cache, and which passes apply to which of its modules."""
    try:
        from rich.console import Console

        from relevo.engine.config import EngineConfig
        from relevo.inspection import inspect_model, print_inspection
    except ModuleNotFoundError as error:
        raise StartupError(f"relevo inspect needs {error.name}: pip install 'relevo[engine]'") from error

    found = inspect_model(EngineConfig(model=model, **engine))
    if as_json:
        print(found.as_json())
    else:
        print_inspection(found, Console())


def _path_flags(**paths: Path | None) -> dict[str, str | bool]:
    """Of those that are given."""
    return {name.replace("_", "-"): str(path.absolute()) for name, path in paths.items() if path is not None}


def _log_to_stderr(level: str) -> None:
    """What the launcher says, in the children's format; other libraries' loggers stay as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)-7s relevo-serve: %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    logger = logging.getLogger("relevo.stack")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())


def _refuse_options_of_the_split(context: typer.Context) -> None:
    """Raises StartupError for what was given, on the command line or by --config, and would do nothing."""
    for name in ("prefill", "kv_arena", "kv_disk", "kv_disk_bytes", "kv_redis", "offer_share", "direct_kv"):
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise StartupError(
                f"--{name.replace('_', '-')} has no effect with --topology aggregated, which has no prefill workers and"
                " no KV transfer agent: leave one of the two out"
            )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _print_started(stack: Stack, model: str, seconds: float) -> None:
    print(f"\nRelevo serves {model} at {stack.endpoint}/v1 (ready in {seconds:.1f} s)\n")
    for child in stack.children:
        address = f"{stack.endpoint}, gRPC {child.address}" if child.role == "router" else f"gRPC {child.address}"
        print(f"  {child.name:<12} {address:<50} pid {child.pid}")
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "What does os.path.join do?"}]}
    has_keys = stack.config.api_key or "api-keys-file" in stack.config.router_options
    key = " -H 'Authorization: Bearer '\"$RELEVO_API_KEY\"" if has_keys else ""
    print(f"\nSee it: {stack.endpoint}/ui")
    print(f"\nTry it:\n\n  curl {stack.endpoint}/v1/chat/completions{key} -H 'Content-Type: application/json' \\")
    print(f"    -d '{json.dumps(body)}'\n\nCtrl-C stops it.", flush=True)


if __name__ == "__main__":
    main()

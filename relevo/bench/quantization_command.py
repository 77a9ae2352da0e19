"""relevo bench quantization: what smaller weights cost in accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from relevo.bench.commands import needs_engine, spinner, write_json
from relevo.bench.engine_commands import Json, Model
from relevo.core.errors import InvalidRequest


def add_quantization_command(app: typer.Typer) -> None:
    app.command()(quantization)


def quantization(
    model: Model = None,
    *,
    method: Annotated[Literal["int8"], typer.Option(help="what is compared with the weights as they are")] = "int8",
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="of the rest")] = "auto",
    text: Annotated[
        Path | None,
        typer.Option(help="a text file. Default: reference pages of Python that the demo did not learn from"),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="tokens in a window of the text")] = 256,
    count: Annotated[int, typer.Option(min=1, help="windows, spread evenly over it")] = 16,
    load_format: Annotated[
        Literal["auto", "dummy"], typer.Option(help="dummy: random weights, and random tokens for a text")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="of dummy weights and random tokens")] = 0,
    json: Json = None,
) -> None:
    """How far the next-token distributions of a quantized model are from the plain one's (KL divergence)."""
    with needs_engine():
        from relevo.bench.quantization import measure_loss, text_windows
        from relevo.kernels import load_backend
        from relevo.models.loader import load_model
    from relevo.bench.workload import random_prompts
    from relevo.model_files import resolve_model

    files = resolve_model(model, weights=load_format != "dummy")
    kernels = load_backend("cpu", "cpu")
    with spinner("two models") as update:
        plain, quantized = (
            load_model(files, dtype=dtype, load_format=load_format, seed=seed, kernels=kernels, quantization=each)
            for each in ("none", method)
        )
        if load_format == "dummy":
            windows = random_prompts(count, input_len=length, vocab_size=plain.vocab_size, seed=seed)
        else:
            windows = list(text_windows(_token_ids(model, text), length=length, count=count))
        if not windows:
            raise InvalidRequest(f"the text has fewer than {length} tokens", "--text")
        update("comparing")
        loss = measure_loss(plain, quantized, kernels, windows)
    table = Table(
        title=f"{files.name}, {method} against {str(plain.dtype).removeprefix('torch.')}", title_justify="left"
    )
    table.add_column("")
    table.add_column(f"{loss.num_positions} positions", justify="right")
    table.add_row("KL divergence, mean", f"{loss.kl_mean:.5f} nats")
    table.add_row("p99", f"{loss.kl_p99:.5f}")
    table.add_row("largest", f"{loss.kl_max:.5f}")
    table.add_row("same most likely token", f"{loss.agreement:.2%}")
    table.add_row("loss of the text, plain", f"{loss.plain_loss:.4f} nats a token")
    table.add_row("quantized", f"{loss.quantized_loss:.4f}")
    Console().print(table)
    write_json(json, loss.as_dict())


def _token_ids(model: str | None, text: Path | None) -> list[int]:
    from relevo.model_files import resolve_model
    from relevo.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_files(resolve_model(model))
    if tokenizer is None:
        raise InvalidRequest("this model has no tokenizer: use --load-format dummy for random tokens", "model")
    if text is not None:
        try:
            return tokenizer.encode(text.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{text} cannot be read: {error}", "--text") from error
    from relevo.demo.corpus import build_corpus

    return tokenizer.encode("\n\n".join(build_corpus(held_out=True, seed=0).pages))

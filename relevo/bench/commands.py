"""What the commands have in common: lists of numbers, progress, files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from relevo.core.errors import StartupError


def integers(option: str, text: str) -> list[int]:
    """Of "1,8,32". Raises typer.BadParameter for what are no whole numbers from 1 on."""
    values = numbers(option, text)
    if any(value != int(value) for value in values):
        raise typer.BadParameter(f"{option} {text!r}: give whole numbers, e.g. 1,8,32")
    return [int(value) for value in values]


def numbers(option: str, text: str) -> list[float]:
    """Of "0.5,1,2". Raises typer.BadParameter for what are no numbers above 0."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        raise typer.BadParameter(f"{option} {text!r}: give numbers above 0, e.g. 1,8,32")
    return values


def write_json(path: Path | None, value: object) -> None:
    """Nothing without a path. Raises StartupError if it can't be written."""
    if path is None:
        return
    try:
        path.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")
    except OSError as error:
        raise StartupError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def needs_engine() -> Iterator[None]:
    """Around imports of what comes with the extra `engine`. Raises StartupError that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise StartupError(f"this needs {error.name}: pip install 'relevo[engine]'") from error


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr; what it yields moves it on by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def spinner(what: str) -> Iterator[Callable[[str], None]]:
    """On stderr; what it yields says what is being done now."""
    with Console(stderr=True).status(what) as status:
        yield lambda now: status.update(f"{what}: {now}")

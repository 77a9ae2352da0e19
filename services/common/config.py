"""Settings of a process: read once in `main`, frozen, from flags and RELEVO_* variables (flags win)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, NoDecode, SettingsConfigDict, SettingsError

from relevo.core.errors import StartupError
from relevo.core.sizes import parse_size

ENV_PREFIX = "RELEVO_"


def _split_list(value: Any) -> Any:
    """ "a,b" and ["a,b", "c"] → ["a", "b", "c"]."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        return value
    return [item.strip() for part in parts for item in part.split(",") if item.strip()]


def _size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str | int) else value


ByteSize = Annotated[int, BeforeValidator(_size, json_schema_input_type=str | int)]
"""A field in bytes that is given as "1GiB", "512MiB" or a plain number."""

StringList = Annotated[list[str], NoDecode, BeforeValidator(_split_list)]
"""A field that is given as a flag that may be repeated, as a comma list, or both."""


class ServiceSettings(BaseSettings):
    """What every process of Relevo takes. A subclass names its program: `class S(ServiceSettings, cli_prog_name="…")`.

    Each field is a flag (drain_seconds: --drain-seconds) and a variable (RELEVO_DRAIN_SECONDS).
    """

    model_config = SettingsConfigDict(
        frozen=True,
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_show_env_vars=True,
        cli_exit_on_error=False,
        validate_default=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """--help shows the docstring: without its indentation."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.__doc__ = inspect.cleandoc(cls.__doc__ or "")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(0, ge=0, le=65535, description="gRPC port; 0: any that is free")
    ready_fd: int | None = Field(
        None, ge=0, description="file descriptor that gets one line of JSON when the process is ready"
    )
    lifeline_fd: int | None = Field(
        None, ge=0, description="file descriptor whose end of file means: the launcher is gone, shut down"
    )
    drain_seconds: float = Field(10.0, ge=0, le=3600, description="how long a shutdown waits for work in progress")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level logged")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port for Prometheus metrics over HTTP; off unless given"
    )


S = TypeVar("S", bound=ServiceSettings)


def parse_settings(settings_class: type[S], argv: Sequence[str] | None = None) -> S:
    """Settings from argv (without the program's name; None: sys.argv) and the environment.

    --help prints and raises SystemExit(0). A bad value raises StartupError with one line that names the flag, the
    value and what would be right.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return CliApp.run(settings_class, cli_args=arguments)
    except ValidationError as error:
        raise StartupError("; ".join(_explain(settings_class, details) for details in error.errors())) from None
    except SettingsError as error:
        raise StartupError(f"{_one_line(str(error).removeprefix('error parsing CLI: '))} (see --help)") from None


def _explain(settings_class: type[ServiceSettings], details: Any) -> str:
    name = str(details["loc"][0]) if details["loc"] else ""
    reason = _one_line(details["msg"]).removeprefix("Value error, ").replace("Input should be", "should be")
    if name not in settings_class.model_fields:
        return reason
    flag = f"--{name.replace('_', '-')} (or {ENV_PREFIX}{name.upper()})"
    if details["type"] == "missing":
        return f"{flag} is missing: {settings_class.model_fields[name].description or 'a value is needed'}"
    value = repr(details["input"])
    return f"{flag}: {reason}" if value in reason else f"{flag}: {value} is not valid: {reason}"


def _one_line(text: str) -> str:
    return " ".join(text.split())

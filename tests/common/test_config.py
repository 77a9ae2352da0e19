"""Settings and sizes: what people write, and what they are told when it is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from relevo.core.errors import StartupError
from relevo.core.sizes import format_size, parse_size
from services.common.config import ByteSize, ServiceSettings, StringList, parse_settings


class ExampleSettings(ServiceSettings, cli_prog_name="relevo-example"):
    """An example.

    With a second paragraph.
    """

    arena: ByteSize = Field(1 << 20, description="memory")
    prefill: StringList = Field([], description="addresses")
    quick: bool = Field(False, description="hurry")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1GiB", 1073741824),
        ("512MiB", 536870912),
        ("64k", 65536),
        ("1.5KiB", 1536),
        ("2GB", 2000000000),
        ("0", 0),
        (7, 7),
    ],
)
def test_size_is_parsed(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1QiB", "-1", -1, "1.5", "1 2", "1iB", True])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="is no"):
        parse_size(text)


@given(st.integers(0, 2**50))
def test_formatted_size_is_the_same_size(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == num_bytes


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELEVO_ARENA", "2MiB")
    monkeypatch.setenv("RELEVO_PREFILL", "a:1,b:2")
    monkeypatch.setenv("RELEVO_LOG_LEVEL", "")
    settings = parse_settings(ExampleSettings, ["--arena", "1KiB", "--quick", "--drain-seconds=3"])
    assert (settings.arena, settings.prefill, settings.quick, settings.drain_seconds) == (1024, ["a:1", "b:2"], True, 3)
    assert settings.log_level == "info"


def test_list_flag_may_be_repeated_and_hold_commas() -> None:
    assert parse_settings(ExampleSettings, ["--prefill", "a, b", "--prefill", "c"]).prefill == ["a", "b", "c"]


def test_settings_are_frozen() -> None:
    settings = parse_settings(ExampleSettings, [])
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]  # that is what is tested


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arena", "12QiB"], "--arena (or RELEVO_ARENA): '12QiB' is no size: write for example 1GiB, 512MiB or 4096"),
        (["--port", "x"], "--port (or RELEVO_PORT): 'x' is not valid: should be a valid integer"),
        (["--port", "70000"], "--port (or RELEVO_PORT): '70000' is not valid: should be less than or equal to 65535"),
        (["--log-level", "loud"], "--log-level (or RELEVO_LOG_LEVEL): 'loud' is not valid: should be 'debug', 'info'"),
        (["--nope"], "unrecognized arguments: --nope (see --help)"),
        (["--port"], "argument --port: expected one argument (see --help)"),
    ],
)
def test_bad_value_is_one_line_that_names_it(argv: list[str], message: str) -> None:
    with pytest.raises(StartupError) as caught:
        parse_settings(ExampleSettings, argv)
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message


def test_help_shows_flags_defaults_and_variables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(ExampleSettings, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: relevo-example")
    assert "\nWith a second paragraph." in text
    assert "--drain-seconds" in text
    assert "RELEVO_DRAIN_SECONDS" in text

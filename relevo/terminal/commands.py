"""The commands relevo chat and relevo top."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

Url = Annotated[str, typer.Option(envvar="RELEVO_URL", help="the endpoint, with or without /v1")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar=["RELEVO_API_KEY", "OPENAI_API_KEY"], help="better as a variable: options show in `ps`"),
]

DEFAULT_URL = "http://127.0.0.1:8000"


def chat(
    message: Annotated[
        str | None, typer.Argument(help="answer this alone, and end; what is piped in goes behind it")
    ] = None,
    *,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    model: Annotated[str | None, typer.Option(help="by default the endpoint's first")] = None,
    system: Annotated[str, typer.Option(help="what the model is told first")] = "",
    param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="sampling parameter; may be repeated")
    ] = None,
) -> None:
    """Talk to an endpoint: at a terminal a conversation, in a pipe one answer."""
    from relevo.terminal.chat import Chat, answer_once
    from relevo.terminal.conversation import Conversation
    from relevo.terminal.endpoint import Endpoint

    with Endpoint(url, api_key) as endpoint:
        conversation = Conversation(model or endpoint.models()[0], system)
        conversation.set_params(param or [])
        if message is None and sys.stdin.isatty():
            Chat(endpoint, conversation).run()
            return
        parts = [message or "", "" if sys.stdin.isatty() else sys.stdin.read()]
        question = "\n\n".join(part.strip() for part in parts if part.strip())
        if not question:
            raise typer.BadParameter("there is nothing to answer: give a MESSAGE, or pipe one in")
        try:
            answer_once(endpoint, conversation, question, sys.stdout)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `| head` has seen enough; nothing is left to flush at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None


def top(
    *,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    once: Annotated[bool, typer.Option("--once", help="print the tables once, and end")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print what they are made of once, as JSON")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, metavar="SECONDS", help="between two looks")] = 1.0,
    requests: Annotated[
        int | None, typer.Option(min=0, help="how many of the last are listed; by default as many as fit, once: 10")
    ] = None,
) -> None:
    """Watch an endpoint's workers, KV agents and requests. Ctrl-C ends."""
    from rich.console import Console

    from relevo.terminal.endpoint import Endpoint
    from relevo.terminal.top import show_once, watch

    console = Console(width=None if sys.stdout.isatty() else 160)
    with Endpoint(url, api_key) as endpoint:
        if once or as_json or not sys.stdout.isatty():
            show_once(endpoint, console, 10 if requests is None else requests, as_json=as_json)
            return
        with suppress(KeyboardInterrupt):
            watch(endpoint, console, interval, requests)

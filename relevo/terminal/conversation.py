"""What has been said, under which system prompt, with which parameters; and what a line of the user's means."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relevo.core.errors import InvalidRequest

HELP = """\
/system TEXT       what the model is told first; /system alone shows it, /system - drops it
/params NAME=VALUE sampling parameters, several at once; NAME= drops one; alone: shows them
                   e.g. /params temperature=0.7 max_tokens=200 stop=["\\n\\n"]
/clear             forget the conversation; system prompt and parameters stay
/help              this
/quit              end; so does Ctrl-D

A message that begins with /: put a space before it. Several lines: end each but
the last with \\, or put them between two lines of \"\"\".
Ctrl-C stops the answer that is being written; at the prompt, twice, it ends."""

_OURS = ("messages", "model", "stream", "stream_options", "n")


@dataclass
class Conversation:
    """messages: user and assistant, in turn, without the system prompt"""

    model: str
    system: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self, question: str) -> dict[str, Any]:
        """Of a request for the answer to one more question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.messages, {"role": "user", "content": question}]
        return {"model": self.model, "messages": messages, **self.params}

    def add(self, question: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def set_params(self, settings: Sequence[str]) -> None:
        """Of NAME=VALUE; all or none. Raises InvalidRequest for what is no such thing."""
        changed = self.params | parse_params(settings)
        self.params = {name: value for name, value in changed.items() if value is not None}


def parse_params(settings: Sequence[str]) -> dict[str, Any]:
    """VALUE is JSON, or else text; None: NAME= . Which names there are is the endpoint's to know."""
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidRequest(f"{setting!r} is no parameter: NAME=VALUE is, such as temperature=0.7")
        if name in _OURS:
            raise InvalidRequest(f"{name} is not to be set here")
        try:
            found[name] = json.loads(value) if value else None
        except ValueError:
            found[name] = value
    return found


def show_params(params: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in params.items())


def split_settings(text: str) -> list[str]:
    """At spaces; a value may have some within quotes, brackets or braces: stop=["a b", "c"] x=1 → two."""
    parts: list[str] = []
    depth, quoted, escaped, fresh = 0, False, False, True
    for char in text:
        if char.isspace() and not quoted and depth == 0:
            fresh = True
            continue
        if fresh:
            parts.append("")
            fresh = False
        parts[-1] += char
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        else:
            depth += (char in "[{") - (char in "]}")
    return parts

"""The table of request fields in docs/api-fields.md, made of the models and of what they refuse.

python -m services.router.http.fields > docs/api-fields.md
"""

from __future__ import annotations

import orjson

from services.router.http.protocol import ChatRequest, CompletionRequest, RequestBody
from services.router.http.unsupported import ANY

_HEAD = """# Request fields

What `/v1/completions` and `/v1/chat/completions` do with every field of OpenAI's and vLLM's APIs. Made by
`python -m services.router.http.fields`, out of the code; a test holds the two together.

- **taken**: it does what the column says.
- **refused**: a 400 with `code: unsupported_parameter` that names the field, unless its value asks for nothing: `null`,
  or one of those listed.
- **passed over**: it never changes an answer, so every value is taken.
- **unknown**: neither API has it at this endpoint; a 400 with `code: unknown_parameter`.

| field | `/v1/completions` | `/v1/chat/completions` | |
| --- | --- | --- | --- |"""


def treatment(model: type[RequestBody], name: str) -> str:
    """What an endpoint does with a field, as the table says it."""
    if name in model.model_fields:
        return "taken"
    if name not in model.unsupported:
        return "unknown"
    harmless = model.unsupported[name]
    if harmless is ANY:
        return "passed over"
    values = " or ".join(f"`{_json(value)}`" for value in harmless)
    return f"refused, except {values}" if values else "refused"


def field_names() -> list[str]:
    """Of both endpoints."""
    models = (CompletionRequest, ChatRequest)
    return sorted({name for model in models for name in (*model.model_fields, *model.unsupported)})


def table() -> str:
    """The whole page."""
    rows = [
        f"| `{name}` | {treatment(CompletionRequest, name)} | {treatment(ChatRequest, name)} | {_description(name)} |"
        for name in field_names()
    ]
    return "\n".join([_HEAD, *rows]) + "\n"


def _description(name: str) -> str:
    found = ChatRequest.model_fields.get(name) or CompletionRequest.model_fields.get(name)
    return "" if found is None else (found.description or "").replace("|", "\\|")


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


if __name__ == "__main__":
    print(table(), end="")

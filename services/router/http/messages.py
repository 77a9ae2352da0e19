"""A chat's messages, as the chat template gets them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator

from relevo.core.errors import InvalidRequest
from services.router.http.errors import UnsupportedParameter

MAX_NAME_CHARS = 64

_REFUSED_ROLES = ("tool", "function")


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """Parts of content are joined by newlines. Which roles there are is up to the model's chat template."""

    role: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    content: str | list[TextPart]
    name: str | None = Field(None, min_length=1, max_length=MAX_NAME_CHARS)


def parse_messages(value: object) -> list[dict[str, Any]]:
    """Messages with role, content (one string) and maybe name. By hand, so that errors say where and what."""
    if not isinstance(value, list) or not value:
        raise InvalidRequest("messages must be a list of at least one message", "messages")
    return [_parse_message(message, f"messages[{index}]") for index, message in enumerate(value)]


Messages = Annotated[list[dict[str, Any]], PlainValidator(parse_messages, json_schema_input_type=list[ChatMessage])]


def _parse_message(message: object, path: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{path} must be an object with role and content", "messages")
    known = {name: value for name, value in message.items() if value is not None}
    for name in known:
        if name not in ChatMessage.model_fields:
            raise UnsupportedParameter(f"{path}.{name[:MAX_NAME_CHARS]} is not supported yet", "messages")
    for name in ("role", "name"):
        if name in known and (not isinstance(known[name], str) or not 0 < len(known[name]) <= MAX_NAME_CHARS):
            raise InvalidRequest(f"{path}.{name} must be a string of 1 to {MAX_NAME_CHARS} characters", "messages")
    if "role" not in known:
        raise InvalidRequest(f"{path}.role is required", "messages")
    if known["role"] in _REFUSED_ROLES:
        raise UnsupportedParameter(f"{path}.role {known['role']!r} is not supported yet", "messages")
    return known | {"content": _parse_content(known.get("content"), f"{path}.content")}


def _parse_content(content: object, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{path} must be a string or a list of text parts", "messages")
    return "\n".join(_parse_part(part, f"{path}[{index}]") for index, part in enumerate(content))


def _parse_part(part: object, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise UnsupportedParameter(f"{path}: parts of type {kind[:MAX_NAME_CHARS]!r} are not supported yet", "messages")
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind != "text" or not isinstance(text, str) or len(part) > 2:
        raise InvalidRequest(f'{path} must be {{"type": "text", "text": string}}', "messages")
    return text

"""What an answer's text must look like: one of four kinds of description, with vLLM's names."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from relevo.core.errors import InvalidRequest

MAX_SOURCE_BYTES = 128 << 10  # some 3,000 properties of a schema; and gRPC messages stay under 1 MiB
COMPILE_SECONDS = 1.8  # of CPU time that one may take to compile; whoever asked has an answer within 2
ANY_OBJECT = '{"type":"object"}'

Source = tuple[str, str | tuple[str, ...], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """Exactly one of the first five.

    json: a JSON schema, as an object or as its text, in which it is kept
    json_object: any JSON object; kept as a schema
    regex: matches the whole text
    choice: the text is one of these
    grammar: Lark's or GBNF's notation
    disable_any_whitespace: JSON without spaces and newlines between its parts

    Raises InvalidRequest. Whether it can be compiled, and has any text that fits, is `relevo.grammar`'s to say.
    """

    json: str | bool | Mapping[str, object] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            raise _invalid(
                f"give exactly one of json, json_object, regex, choice and grammar, not {' and '.join(given) or 'none'}"
            )
        if self.json_object:
            object.__setattr__(self, "json_object", False)
            object.__setattr__(self, "json", ANY_OBJECT)
        elif self.json is not None and not isinstance(self.json, str):
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            if isinstance(self.choice, str) or not self.choice or not all(isinstance(c, str) for c in self.choice):
                raise _invalid("choice must be a list of strings, at least one")
            object.__setattr__(self, "choice", tuple(self.choice))
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise _invalid(f"{name} must be a string")
        kind, source, _ = self.source
        size = sum(len(part.encode(errors="replace")) for part in ((source,) if isinstance(source, str) else source))
        if size > MAX_SOURCE_BYTES:
            raise _invalid(f"{kind} has {size} bytes; at most {MAX_SOURCE_BYTES} are allowed")

    @property
    def source(self) -> Source:
        """Kind, text or texts, and whether JSON is compact: all that there is to it, and hashable."""
        for kind in ("json", "regex", "choice", "grammar"):
            value = getattr(self, kind)
            if value is not None:
                return kind, value, self.disable_any_whitespace
        raise AssertionError("one of them is given")


def _schema_text(schema: object) -> str:
    if not isinstance(schema, bool | Mapping):
        raise _invalid(f"json must be a JSON schema: an object or a boolean, not {type(schema).__name__}")
    try:
        return json_module.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (RecursionError, TypeError, ValueError) as error:
        raise _invalid(f"json is no JSON schema: {error}") from error


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(f"structured_outputs: {message}", "structured_outputs")

"""`response_format` and `structured_outputs`: what an answer's text must fit, and whether anything can."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import orjson
from pydantic import BaseModel, ConfigDict, Field

from relevo.core.errors import Exhausted, InvalidRequest
from relevo.core.structured_outputs import COMPILE_SECONDS, StructuredOutputs
from relevo.tokenizer import Tokenizer

if TYPE_CHECKING:
    from relevo.grammar.compiler import GrammarCompiler

MAX_PENDING_GRAMMARS = 64  # that wait to be compiled; beyond it a request is refused with 429
# Reading a vocabulary holds the interpreter for some 1 µs a token: of a larger one at the start, where nobody notices.
MAX_TOKENS_READ_LATER = 16_384

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class JsonSchemaFormat(BaseModel):
    model_config = _STRICT

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema", description="What the answer validates against.")
    strict: bool | None = Field(None, description="It always is.")


class ResponseFormat(BaseModel):
    model_config = _STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputsBody(BaseModel):
    """vLLM's. Exactly one of the first five."""

    model_config = _STRICT

    json_: dict[str, Any] | bool | str | None = Field(None, alias="json", description="A JSON schema.")
    json_object: bool | None = Field(None, description="Any JSON object.")
    regex: str | None = Field(None, description="It matches the whole text.")
    choice: list[str] | None = Field(None, description="The text is one of these.")
    grammar: str | None = Field(None, description="In Lark's or GBNF's notation.")
    disable_any_whitespace: bool | None = Field(None, description="JSON without spaces and newlines.")
    disable_fallback: bool | None = Field(None, description="There is one backend.")


class StructuredBody(Protocol):
    """The part of a request's body that this is about."""

    @property
    def response_format(self) -> ResponseFormat | None: ...

    @property
    def structured_outputs(self) -> StructuredOutputsBody | None: ...


def wanted_structure(body: StructuredBody) -> StructuredOutputs | None:
    """Raises InvalidRequest naming the one of the two parameters that is wrong."""
    form, given = body.response_format, body.structured_outputs
    if form is None or form.type == "text":
        return None if given is None else _from_structured_outputs(given)
    if given is not None:
        raise InvalidRequest(
            "response_format and structured_outputs contradict each other: give one", "response_format"
        )
    if form.type == "json_object":
        return StructuredOutputs(json_object=True)
    if form.json_schema is None:
        raise InvalidRequest("response_format.json_schema is required with type json_schema", "response_format")
    return _named("response_format", json=_schema_text(form.json_schema.schema_, "response_format"))


class StructureChecker:
    """Compiles before a request goes anywhere, so that what nothing fits is refused at the door.

    The compiler and its form of the vocabulary are loaded for the first that needs them: 6 MB and more.
    """

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._loading = threading.Lock()
        self._compiler: GrammarCompiler | None = None
        if tokenizer is not None and tokenizer.vocab_size > MAX_TOKENS_READ_LATER:
            self._load()

    async def check(self, outputs: StructuredOutputs | None, body: StructuredBody) -> None:
        """Raises InvalidRequest with the reason, or Exhausted, within COMPILE_SECONDS."""
        if outputs is None:
            return
        param = "structured_outputs" if body.structured_outputs is not None else "response_format"
        compiler = self._compiler
        if compiler is None:
            compiler = await asyncio.to_thread(self._load)
        compiling = compiler.compile(outputs)
        if not compiling.done():
            done = asyncio.wrap_future(compiling)
            await asyncio.wait([done], timeout=COMPILE_SECONDS)
            done.add_done_callback(lambda future: future.cancelled() or future.exception())  # retrieved, if late
        if compiling.done():
            error = compiling.exception()
            if isinstance(error, InvalidRequest):
                raise InvalidRequest(error.message, param)
            if error is not None:
                raise error
        elif compiling.running():
            raise InvalidRequest(f"{param} is too large: it takes over {COMPILE_SECONDS:g} s to compile", param)
        else:
            raise Exhausted("too many grammars are waiting to be compiled", COMPILE_SECONDS)

    def _load(self) -> GrammarCompiler:
        with self._loading:
            if self._compiler is not None:
                return self._compiler
            from relevo.grammar.compiler import GrammarCompiler

            compiler = GrammarCompiler(
                lambda: self._tokenizer,
                self._eos_token_ids,
                max_pending=MAX_PENDING_GRAMMARS,
                checks_only=True,
            )
            if self._tokenizer is not None:
                compiler.prepare()
            self._compiler = compiler
            return compiler


def _from_structured_outputs(given: StructuredOutputsBody) -> StructuredOutputs:
    schema = given.json_
    return _named(
        "structured_outputs",
        json=schema if schema is None or isinstance(schema, str) else _schema_text(schema, "structured_outputs"),
        json_object=bool(given.json_object),
        regex=given.regex,
        choice=given.choice,
        grammar=given.grammar,
        disable_any_whitespace=bool(given.disable_any_whitespace),
    )


def _named(param: str, **values: Any) -> StructuredOutputs:
    try:
        return StructuredOutputs(**values)
    except InvalidRequest as error:
        raise InvalidRequest(error.message.replace("structured_outputs", param, 1), param) from error


def _schema_text(schema: object, param: str) -> str:
    """By orjson: a schema of megabytes, which is refused then, takes no time worth mentioning."""
    try:
        return orjson.dumps(schema).decode()
    except orjson.JSONEncodeError as error:
        raise InvalidRequest(f"{param}: the schema is nested too deeply: {error}", param) from error

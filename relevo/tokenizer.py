"""Text to token ids and back, and chats to text, as transformers' AutoTokenizer does it, but without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relevo.core.errors import InvalidRequest
from relevo.fast_encoding import Encode
from relevo.model_files import ModelFiles
from relevo.token_bytes import TokenTable, bytes_function, decodes_bytes_apart, from_byte_level

if TYPE_CHECKING:
    import tokenizers

MAX_BYTES_KEPT = 16_384  # tokens whose bytes are at hand at once: the first that are met, some 2 MB of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What is known of the tokens.

    size: how many there are, added ones included; a model may have more embeddings than that
    eos_token_ids: of the tokenizer alone; generation_config.json may name others
    around: the special tokens before and after every text; None if they are not the same for all texts
    decoder: as in tokenizer.json
    table: for a decoder that puts tokens' bytes together and does nothing else; None for any other
    """

    size: int
    special_ids: frozenset[int]
    eos_token_ids: tuple[int, ...]
    around: tuple[list[int], list[int]] | None
    decoder: dict[str, Any]
    table: TokenTable | None


class Tokenizer:
    """A model's tokenizer and chat template. Safe to use from several threads.

    vocab_size: number of tokens, added ones included; a model may have more embeddings than that
    eos_token_ids: of the tokenizer alone; generation_config.json may name others
    replaces_each_byte: decode() makes a U+FFFD of every byte of an incomplete character, not one of them all
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encode: Encode | None,
        backend: tokenizers.Tokenizer | None,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """encode: without special tokens around the text. backend: does what encode and the vocabulary's table can't;
        None: they can do all."""
        self.vocabulary = vocabulary
        self._encode = encode
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._chat_templates = dict(chat_templates or {})
        self._to_bytes = bytes_function(vocabulary.decoder)
        self._bytes: dict[int, bytes] = {}
        self._special_ids = vocabulary.special_ids
        self.replaces_each_byte: bool = decodes_bytes_apart(vocabulary.decoder)
        self.vocab_size = vocabulary.size
        self.eos_token_ids = vocabulary.eos_token_ids

    @classmethod
    def from_files(cls, files: ModelFiles, *, apart: bool = False) -> Tokenizer | None:
        """The tokenizer in a model's folder, None if there is none.

        apart: read it in a process of its own if what is left of it can do without the library `tokenizers`: 0.1 to
        0.6 s more, and up to 100 MB less. Raises StartupError if what is there cannot be read.
        """
        if apart:
            from relevo.tokenizer_apart import read_apart

            return read_apart(files)
        from relevo.tokenizer_files import read_tokenizer

        return read_tokenizer(files)

    @property
    def needs_library(self) -> bool:
        """`tokenizers` is at work here."""
        return self._backend is not None

    @property
    def chat_template(self) -> str | None:
        """The template for chats without tools; None if the model has none."""
        return self._chat_templates.get("default")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens spelled out in the text become those tokens.

        add_special_tokens: BOS and the like, as the model wants them around a text; not for a rendered chat, whose
        template has put them there. Raises InvalidRequest for lone surrogates.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"text is not valid Unicode: {error.reason} at character {error.start}") from error
        around = self.vocabulary.around
        if self._encode is not None and (around is not None or not add_special_tokens):
            ids = self._encode(text)
            return [*around[0], *ids, *around[1]] if add_special_tokens and around else ids
        assert self._backend is not None
        # fast: without offsets into the text, which nobody asks for; they cost a quarter of the time.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text; incomplete or invalid UTF-8 becomes U+FFFD, ids that are no token become nothing."""
        table = self.vocabulary.table
        if table is not None:
            skipped = self._special_ids if skip_special_tokens else frozenset()
            return b"".join(table[i] for i in token_ids if i not in skipped).decode(errors="replace")
        assert self._backend is not None
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that has begun: perhaps part of a character. b"" for an id that is no token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._find_bytes(token_id)
            if len(self._bytes) < MAX_BYTES_KEPT:
                self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """As token_bytes; parts of characters become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def first_token_bytes(self, token_id: int) -> bytes:
        """What a token adds where no text is before it: a sentencepiece tokenizer drops a leading space there."""
        piece = self.token_bytes(token_id)
        if piece[:1] != b" " or self._to_bytes is from_byte_level:
            return piece
        return self.decode([token_id], skip_special_tokens=False).encode()

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> str:
        """A chat as the text that the model was trained on.

        template_kwargs: `tools` and `documents` (lists of dicts), and any variable of the template. Raises
        InvalidRequest if there is no template, or it refuses the messages.
        """
        import jinja2  # not before the first chat: some processes never see one

        from relevo import chat_template

        template = self._template_for(template_kwargs.get("tools"))
        if not messages:
            raise InvalidRequest("messages must not be empty", "messages")
        variables = {"tools": None, "documents": None, **self._special_tokens, **template_kwargs}
        try:
            return chat_template.render(template, messages, add_generation_prompt=add_generation_prompt, **variables)
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error

    def _template_for(self, tools: object) -> str:
        if tools is not None and "tool_use" in self._chat_templates:
            return self._chat_templates["tool_use"]
        if "default" not in self._chat_templates:
            raise InvalidRequest("this model has no chat template: use /v1/completions", "messages")
        return self._chat_templates["default"]

    def _find_bytes(self, token_id: int) -> bytes:
        if self.vocabulary.table is not None:
            return self.vocabulary.table[token_id]
        assert self._backend is not None
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._to_bytes is not None:
            return self._to_bytes(token)
        # A decoder of another kind: see what the token adds to another one. Between words that may be a space.
        anchor = self.decode([token_id], skip_special_tokens=False)
        both = self.decode([token_id, token_id], skip_special_tokens=False)
        return both[len(anchor) :].encode()

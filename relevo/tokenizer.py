"""Text to token ids and back, and chats to text, as transformers' AutoTokenizer does it, but without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from relevo.core.errors import InvalidRequest, StartupError
from relevo.fast_encoding import fast_encode
from relevo.model_files import ModelFiles
from relevo.token_bytes import TokenTable, bytes_function, decodes_bytes_apart, from_byte_level

TOKENIZER_FILE = "tokenizer.json"
# Other forms of a tokenizer, which transformers can convert. config.json alone (dummy shapes) has none.
OTHER_FORMS = (
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
)
CONVERSION_SECONDS = 120

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A model's tokenizer and chat template. Safe to use from several threads.

    vocab_size: number of tokens, added ones included; a model may have more embeddings than that
    eos_token_ids: of the tokenizer alone; generation_config.json may name others
    replaces_each_byte: decode() makes a U+FFFD of every byte of an incomplete character, not one of them all
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._fast_encode = fast_encode(backend)
        # What the model wants around a text: BOS before it, mostly.
        self._around = _around(backend)
        self._special_tokens = dict(special_tokens or {})
        self._chat_templates = dict(chat_templates or {})
        self._special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
        self._to_bytes = bytes_function(decoder)
        self.replaces_each_byte: bool = decodes_bytes_apart(decoder)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        eos = self._special_tokens.get("eos_token")
        eos_id = None if eos is None else backend.token_to_id(eos)
        self.eos_token_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)
        self._bytes: dict[int, bytes] = {}
        self._table = self._make_table(backend)
        # Up to 100 MB, and of no more use where others encode and decode.
        is_replaced = self._table is not None and self._fast_encode is not None and self._around is not None
        self._backend = None if is_replaced else backend

    @classmethod
    def from_files(cls, files: ModelFiles) -> Tokenizer | None:
        """The tokenizer in a model's folder, None if there is none.

        Raises StartupError if what is there cannot be read.
        """
        if (files.path / TOKENIZER_FILE).is_file():
            return _load(files.path)
        if not any(next(files.path.glob(pattern), None) for pattern in OTHER_FORMS):
            return None
        with tempfile.TemporaryDirectory(prefix="relevo-tokenizer-") as folder:
            _convert(files, Path(folder))
            return _load(Path(folder))

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
        if self._fast_encode is not None and (self._around is not None or not add_special_tokens):
            ids = self._fast_encode(text)
            return [*self._around[0], *ids, *self._around[1]] if add_special_tokens and self._around else ids
        assert self._backend is not None
        # fast: without offsets into the text, which nobody asks for; they cost a quarter of the time.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text; incomplete or invalid UTF-8 becomes U+FFFD, ids that are no token become nothing."""
        if self._table is not None:
            skipped = self._special_ids if skip_special_tokens else frozenset()
            return b"".join(self._table[i] for i in token_ids if i not in skipped).decode(errors="replace")
        assert self._backend is not None
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that has begun: perhaps part of a character. b"" for an id that is no token."""
        if self._table is not None:
            return self._table[token_id]
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
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

    def _make_table(self, backend: tokenizers.Tokenizer) -> TokenTable | None:
        """Where a text is its tokens' bytes, one after the other; None: decoding is more than that."""
        if self._to_bytes is not from_byte_level:
            return None
        tokens = [backend.id_to_token(token_id) for token_id in range(self.vocab_size)]
        if None in tokens:  # ids with gaps: some are beyond
            return None
        return TokenTable(map(from_byte_level, tokens))

    def _find_bytes(self, token_id: int) -> bytes:
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


def _around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]] | None:
    """The special tokens before and after every text; None if they are not the same for two texts."""
    found = set()
    for text in ("a", "b c"):
        bare = backend.encode(text, add_special_tokens=False).ids
        whole = backend.encode(text, add_special_tokens=True).ids
        starts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
        if not bare or len(starts) != 1:
            return None
        found.add((tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(bare) :])))
    if len(found) != 1:
        return None
    [(before, after)] = found
    return list(before), list(after)


def _load(folder: Path) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # the library raises nothing narrower
        raise StartupError(f"{folder / TOKENIZER_FILE} cannot be read: {error}") from error
    config = _read_json(folder / "tokenizer_config.json")
    # add_bos_token and add_eos_token in the config do not count: transformers, too, follows tokenizer.json there.
    if "added_tokens_decoder" not in config:
        config |= _read_json(folder / "special_tokens_map.json")
    special_tokens = {
        key: _content(value)
        for key, value in config.items()
        if (key in NAMED_SPECIAL_TOKENS or key.endswith("_token")) and isinstance(value, str | dict) and value
    }
    _add_missing_tokens(backend, config, special_tokens.values())
    return Tokenizer(backend, special_tokens=special_tokens, chat_templates=_chat_templates(folder, config))


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], named: Iterable[str]) -> None:
    """Tokens of tokenizer_config.json that tokenizer.json lacks or describes otherwise, in transformers' order."""
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    described = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    changed = [token for _, fields in described if repr(token := AddedToken(**fields)) not in known]
    backend.add_tokens(changed)

    added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra_contents = [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    # A token that is there already becomes special if it has a name (EOS, …), but not for being called extra.
    missing = [content for content in named if not added.get(content)]
    missing += [content for content in extra_contents if content not in added]
    backend.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in missing])


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name. Files of their own go before tokenizer_config.json, as in transformers."""
    templates = {
        path.stem: path.read_text(encoding="utf-8") for path in folder.glob("additional_chat_templates/*.jinja")
    }
    single = folder / "chat_template.jinja"
    if single.is_file():
        templates["default"] = single.read_text(encoding="utf-8")
    if templates:
        return templates
    given = config.get("chat_template")
    if isinstance(given, list):
        return {template["name"]: template["template"] for template in given}
    if isinstance(given, dict):
        return dict(given)
    return {} if given is None else {"default": given}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _convert(files: ModelFiles, folder: Path) -> None:
    """Write what transformers makes of the files to `folder`; in a process of its own, for it may import torch."""
    script = "import sys, transformers as t; t.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    command = [sys.executable, "-c", script, str(files.path), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERSION_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise StartupError(
            f"model {files.name!r}: converting its tokenizer took over {CONVERSION_SECONDS} s"
        ) from error
    if done.returncode or not (folder / TOKENIZER_FILE).is_file():
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        raise StartupError(f"model {files.name!r}: its tokenizer cannot be converted to {TOKENIZER_FILE}: {reason}")

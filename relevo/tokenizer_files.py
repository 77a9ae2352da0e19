"""A tokenizer from the files in a model's folder, by the library `tokenizers`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from relevo.core.errors import StartupError
from relevo.fast_encoding import fast_encode
from relevo.model_files import TOKENIZER_FILE, ModelFiles
from relevo.token_bytes import TokenTable, bytes_function, from_byte_level
from relevo.tokenizer import Tokenizer, Vocabulary

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


def read_tokenizer(files: ModelFiles) -> Tokenizer | None:
    """None if there is none in the folder. Raises StartupError if what is there cannot be read."""
    with tokenizer_folder(files) as folder:
        return None if folder is None else make_tokenizer(*read_backend(folder))


@contextmanager
def tokenizer_folder(files: ModelFiles) -> Iterator[Path | None]:
    """Where tokenizer.json is: the model's, or that of a converted tokenizer for the time being; None: nowhere."""
    if (files.path / TOKENIZER_FILE).is_file():
        yield files.path
    elif any(next(files.path.glob(pattern), None) for pattern in OTHER_FORMS):
        with tempfile.TemporaryDirectory(prefix="relevo-tokenizer-") as folder:
            _convert(files, Path(folder))
            yield Path(folder)
    else:
        yield None


def make_tokenizer(
    backend: tokenizers.Tokenizer,
    special_tokens: Mapping[str, str] | None = None,
    chat_templates: Mapping[str, str] | None = None,
) -> Tokenizer:
    """backend is kept only if it is of any more use: it takes up to 100 MB."""
    encode = fast_encode(backend)
    vocabulary = _vocabulary(backend, special_tokens or {})
    is_needed = encode is None or vocabulary.table is None or vocabulary.around is None
    return Tokenizer(
        vocabulary,
        encode,
        backend if is_needed else None,
        special_tokens=special_tokens,
        chat_templates=chat_templates,
    )


def _vocabulary(backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> Vocabulary:
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    eos = special_tokens.get("eos_token")
    eos_id = None if eos is None else backend.token_to_id(eos)
    return Vocabulary(
        size=backend.get_vocab_size(with_added_tokens=True),
        special_ids=frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special),
        eos_token_ids=() if eos_id is None else (eos_id,),
        around=_around(backend),
        decoder=decoder,
        table=_table(backend) if bytes_function(decoder) is from_byte_level else None,
    )


def _table(backend: tokenizers.Tokenizer) -> TokenTable | None:
    size = backend.get_vocab_size(with_added_tokens=True)
    tokens = [token for token_id in range(size) if (token := backend.id_to_token(token_id)) is not None]
    if len(tokens) < size:  # ids with gaps: some are beyond
        return None
    return TokenTable.of(map(from_byte_level, tokens))


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


def read_backend(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str]]:
    """The library's tokenizer; special tokens and chat templates, by name. Raises StartupError."""
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
    backend.no_truncation()
    backend.no_padding()
    return backend, special_tokens, _chat_templates(folder, config)


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

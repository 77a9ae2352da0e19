"""Reads a tokenizer in a process of its own, so that `tokenizers` and its tables don't come into this one.

The child proves that gigatoken gives the same ids, and leaves what it takes to go on without the library:
tokenizer.json as it is after the model's configuration was heeded, the table of tokens' bytes, and the facts.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path

from relevo.fast_encoding import gigatoken_encode
from relevo.model_files import TOKENIZER_FILE, ModelFiles
from relevo.token_bytes import TokenTable
from relevo.tokenizer import Tokenizer, Vocabulary

logger = logging.getLogger(__name__)

CHILD_SECONDS = 120
_FACTS, _JOINED, _ENDS = "facts.json", "table.bytes", "table.ends"  # beside TOKENIZER_FILE


def read_apart(files: ModelFiles) -> Tokenizer | None:
    """As read_tokenizer(), which it calls if the tokenizer can't do without the library. Raises StartupError."""
    tokenizer = None
    try:
        with tempfile.TemporaryDirectory(prefix="relevo-tokenizer-") as folder:
            command = [sys.executable, "-m", "relevo.tokenizer_apart", str(files.path), folder]
            subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=True)
            tokenizer = _read(Path(folder))
    except (OSError, subprocess.SubprocessError) as error:  # what is wrong with the files is said below
        said = error.stderr.strip().rpartition("\n")[2] if isinstance(error, subprocess.CalledProcessError) else ""
        logger.debug("the tokenizer cannot be read apart: %s %s", error, said)
    if tokenizer is not None:
        return tokenizer
    from relevo.tokenizer_files import read_tokenizer

    return read_tokenizer(files)


def _read(folder: Path) -> Tokenizer | None:
    if not (folder / _FACTS).is_file():  # the last that is written
        return None
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    special_tokens, chat_templates = facts.pop("special_tokens"), facts.pop("chat_templates")
    encode = gigatoken_encode((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    if encode is None:
        return None
    ends = array("I")
    ends.frombytes((folder / _ENDS).read_bytes())
    vocabulary = Vocabulary(
        table=TokenTable((folder / _JOINED).read_bytes(), ends),
        special_ids=frozenset(facts.pop("special_ids")),
        eos_token_ids=tuple(facts.pop("eos_token_ids")),
        **facts,
    )
    return Tokenizer(vocabulary, encode, None, special_tokens=special_tokens, chat_templates=chat_templates)


def _write(files: ModelFiles, folder: Path) -> None:
    """Nothing, if the tokenizer needs the library."""
    from relevo.tokenizer_files import make_tokenizer, read_backend, tokenizer_folder

    with tokenizer_folder(files) as found:
        if found is None:
            return
        backend, special_tokens, chat_templates = read_backend(found)
    tokenizer = make_tokenizer(backend, special_tokens, chat_templates)
    table = tokenizer.vocabulary.table
    if tokenizer.needs_library or table is None:
        return
    (folder / TOKENIZER_FILE).write_text(backend.to_str(), encoding="utf-8")
    (folder / _JOINED).write_bytes(table.joined)
    (folder / _ENDS).write_bytes(table.ends.tobytes())
    facts = {
        "size": tokenizer.vocab_size,
        "special_ids": sorted(tokenizer.vocabulary.special_ids),
        "eos_token_ids": tokenizer.eos_token_ids,
        "around": tokenizer.vocabulary.around,
        "decoder": tokenizer.vocabulary.decoder,
        "special_tokens": special_tokens,
        "chat_templates": chat_templates,
    }
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    _write(ModelFiles(Path(sys.argv[1]), sys.argv[1]), Path(sys.argv[2]))

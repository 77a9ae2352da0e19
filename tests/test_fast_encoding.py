"""The fast way to token ids is taken where it is the same way, and nowhere else."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gigatoken
import pytest
import tokenizers

from relevo import demo
from relevo.fast_encoding import Encode, fast_encode
from relevo.model_files import TOKENIZER_FILE, ModelFiles
from relevo.tokenizer import Tokenizer
from relevo.tokenizer_files import make_tokenizer
from tests.support.tiny_tokenizers import TEXTS, write_byte_level, write_llama, write_metaspace

WRITERS: dict[str, Callable[[Path], Path]] = {
    "byte_level": write_byte_level,
    "llama": write_llama,
    "metaspace": write_metaspace,
}


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(demo.target_path() / TOKENIZER_FILE))


def plain(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def random_texts(count: int) -> list[str]:
    numbers = random.Random(7)
    pool = [*"".join(TEXTS), *(chr(numbers.randrange(1, 0xD800)) for _ in range(200)), "<|end_of_text|>", "  ", "'s"]
    return ["".join(numbers.choices(pool, k=numbers.randrange(60))) for _ in range(count)]


def needed(encode: Encode | None) -> Encode:
    assert encode is not None
    return encode


def test_the_demos_tokenizer_takes_the_fast_way(backend: tokenizers.Tokenizer) -> None:
    """And a text that the proof has not seen comes out the same."""
    encode = needed(fast_encode(backend))
    for text in random_texts(2000):
        assert encode(text) == plain(backend, text)


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_whatever_way_is_taken_the_ids_are_the_same(tmp_path: Path, kind: str) -> None:
    folder = WRITERS[kind](tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    tokenizer = Tokenizer.from_files(ModelFiles(folder, "test", ""))
    assert tokenizer is not None
    for text in random_texts(500):
        for special in (True, False):
            assert (
                tokenizer.encode(text, add_special_tokens=special)
                == backend.encode(text, add_special_tokens=special).ids
            )


def test_threads_may_share_it(backend: tokenizers.Tokenizer) -> None:
    encode = needed(fast_encode(backend))
    texts = random_texts(200)
    expected = [plain(backend, text) for text in texts]
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda _: [encode(text) for text in texts], range(8)):
            assert found == expected


def test_one_different_id_in_one_text_is_enough_to_refuse_it(
    backend: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = "two\n\nlines\r\nthree\n \n"
    inner = gigatoken.Tokenizer.from_json(backend.to_str()).backend

    class Differs:
        def encode_batch_list(self, texts: gigatoken.BytesSource, *, parallel: bool) -> list[list[int]]:
            ids = inner.encode_batch_list(texts, parallel=parallel)[0]
            return [ids[:-1] if ids == plain(backend, odd) else ids]

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda _: SimpleNamespace(backend=Differs()))
    assert fast_encode(backend) is None


@pytest.mark.parametrize("reason", ["not installed", "not supported"])
def test_without_it_everything_goes_the_plain_way(
    backend: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def refuse(_: str) -> None:
        raise ValueError("this kind of model")

    if reason == "not installed":
        monkeypatch.setitem(sys.modules, "gigatoken", None)
    else:
        monkeypatch.setattr(gigatoken.Tokenizer, "from_json", refuse)
    assert fast_encode(backend) is None
    tokenizer = make_tokenizer(backend)
    assert tokenizer.encode(TEXTS[0], add_special_tokens=False) == plain(backend, TEXTS[0])


def test_neither_numpy_nor_awkward_is_imported() -> None:
    script = (
        "import sys; from relevo.tokenizer import Tokenizer; from relevo.model_files import resolve_model\n"
        "t = Tokenizer.from_files(resolve_model(None)); assert not t.needs_library; t.encode('some text')\n"
        "sys.exit(' '.join({'numpy', 'awkward'} & sys.modules.keys()) or None)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

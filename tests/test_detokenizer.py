"""Text as it streams: whole characters, the same as decoding at once, and nothing of a stop string."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relevo import demo
from relevo.detokenizer import Detokenizer
from relevo.model_files import ModelFiles
from relevo.tokenizer import Tokenizer
from relevo.tokenizer_files import make_tokenizer
from tests.support.tiny_tokenizers import write_byte_level, write_llama, write_metaspace

KINDS = ("demo", "byte_level", "llama", "metaspace")
TOKENIZERS: dict[str, Tokenizer] = {}

VALID_TEXT = st.text(
    st.sampled_from("ab \n.é́ñ日本語👩‍🚀🎉कि") | st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"),
    max_size=30,
)
FEW_LETTERS = st.text(st.sampled_from("ab日🎉"), max_size=25)
STOPS = st.lists(st.text(st.sampled_from("ab日🎉"), min_size=1, max_size=5), max_size=4)


@pytest.fixture(scope="module", autouse=True)
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.mktemp("tokenizers")
    folders = {
        "demo": demo.target_path(),
        "byte_level": write_byte_level(base / "byte_level"),
        "llama": write_llama(base / "llama"),
        "metaspace": write_metaspace(base / "metaspace"),
    }
    for kind, folder in folders.items():
        tokenizer = Tokenizer.from_files(ModelFiles(folder, kind, ""))
        assert tokenizer is not None
        TOKENIZERS[kind] = tokenizer


def pieces(tokenizer: Tokenizer, text: str, random: object) -> list[int]:
    """Token ids of the text, cut at random places and so tokenized in ways that training never saw."""
    cuts = sorted(random.sample(range(len(text) + 1), min(len(text), random.randint(0, 4))))  # type: ignore[attr-defined]
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]


def stream(detokenizer: Detokenizer, token_ids: list[int]) -> str:
    """One token at a time; what comes out is whole characters from first to last."""
    shown = []
    for token_id in token_ids:
        new = detokenizer.push([token_id])
        new.encode()
        shown.append(new)
    return "".join([*shown, detokenizer.finish()])


def first_complete(texts: list[str], stops: list[str], min_tokens: int) -> tuple[str, str | None, int]:
    """What to show, the stop string and its last token, found by looking at every beginning of the full text."""
    text = ""
    for number, new in enumerate(texts, start=1):
        for character in new:
            text += character
            ending = [stop for stop in stops if text.endswith(stop)]
            if ending and number > min_tokens:
                longest = max(ending, key=len)
                return text[: len(text) - len(longest)], longest, number
    return text, None, len(texts)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), VALID_TEXT, VALID_TEXT, st.randoms())
def test_stream_continues_the_prompt_as_decoding_at_once_does(
    kind: str, prompt: str, text: str, random: object
) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt_ids, token_ids = tokenizer.encode(prompt), pieces(tokenizer, text, random)
    if kind == "metaspace" and 0 in token_ids:
        return  # <unk> is special: decode() leaves it out, with it what the text was
    whole, before = tokenizer.decode(prompt_ids + token_ids), tokenizer.decode(prompt_ids)
    assert stream(Detokenizer(tokenizer, prompt_ids), token_ids) == whole[len(before) :]
    assert stream(Detokenizer(tokenizer, []), token_ids) == tokenizer.decode(token_ids)
    at_once = Detokenizer(tokenizer, prompt_ids)
    assert at_once.push(token_ids) + at_once.finish() == whole[len(before) :]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["demo", "byte_level"]), st.lists(st.integers(0, 420), max_size=15), st.booleans())
def test_invalid_utf8_is_replaced_as_decoding_at_once_does(kind: str, token_ids: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    shown = stream(Detokenizer(tokenizer, [], skip_special_tokens=skip), token_ids)
    assert shown == tokenizer.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_character_appears_with_its_last_byte(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    token_ids = tokenizer.encode("a🎈", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x"))
    shown = [detokenizer.push([token_id]) for token_id in token_ids]
    assert shown[-1] == "🎈" and "".join(shown[:-1]).strip() == "a"
    cut = Detokenizer(tokenizer, tokenizer.encode("x"))
    assert cut.push(token_ids[:-1]).strip() == "a"
    assert cut.finish() == tokenizer.decode(token_ids[:-1]).strip()[1:] != ""
    assert cut.finish() == ""


def test_character_that_the_prompt_began_is_completed() -> None:
    tokenizer = TOKENIZERS["llama"]
    token_ids = tokenizer.encode("世", add_special_tokens=False)
    assert stream(Detokenizer(tokenizer, token_ids[:3]), token_ids[3:]) == "世"


def test_leading_space_depends_on_the_prompt() -> None:
    """After a text "▁hello" is " hello"; at the beginning, also after a BOS that is not shown, "hello"."""
    tokenizer = TOKENIZERS["llama"]
    token_ids = tokenizer.encode("hello", add_special_tokens=False)
    assert stream(Detokenizer(tokenizer, tokenizer.encode("hello")), token_ids) == " hello"
    assert stream(Detokenizer(tokenizer, [1]), token_ids) == "hello"
    assert stream(Detokenizer(tokenizer, []), token_ids * 2) == "hello hello"
    assert stream(Detokenizer(tokenizer, [1], skip_special_tokens=False), token_ids) == " hello"


def test_special_tokens_show_on_request() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = tokenizer.encode("a<|im_end|>b<think>")
    assert stream(Detokenizer(tokenizer, []), token_ids) == "ab<think>"
    assert stream(Detokenizer(tokenizer, [], skip_special_tokens=False), token_ids) == "a<|im_end|>b<think>"


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KINDS[:3]), FEW_LETTERS, STOPS, st.integers(0, 6), st.randoms())
def test_stop_strings_as_in_the_whole_text(
    kind: str, text: str, stops: list[str], min_tokens: int, random: object
) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt_ids, token_ids = tokenizer.encode("x"), pieces(tokenizer, text, random)
    plain = Detokenizer(tokenizer, prompt_ids)
    texts = [plain.push([token_id]) for token_id in token_ids]
    expected, stop, number = first_complete(texts, stops, min_tokens)

    detokenizer = Detokenizer(tokenizer, prompt_ids, stop=stops, min_tokens=min_tokens)
    shown = ""
    for count, token_id in enumerate(token_ids, start=1):
        shown += detokenizer.push([token_id])
        if not detokenizer.stopped:
            # Held back is exactly the longest end of the text that a stop string begins with.
            known = "".join(texts[:count])
            ends = [known[i:] for i in range(len(known) + 1)]
            held = next(end for end in ends if not end or any(s.startswith(end) and s != end for s in stops))
            assert shown == known[: len(known) - len(held)]
    assert shown + detokenizer.finish() == expected
    assert (detokenizer.stop_string, detokenizer.num_tokens_used) == (stop, number)
    assert detokenizer.stopped == (stop is not None)

    at_once = Detokenizer(tokenizer, prompt_ids, stop=stops, min_tokens=min_tokens)
    assert at_once.push(token_ids) + at_once.finish() == expected
    assert at_once.num_tokens_used == number


def test_stop_string_across_tokens() -> None:
    detokenizer = Detokenizer(None, [], stop=("2 3", "9"))
    assert [detokenizer.push([i]) for i in (1, 2)] == ["1", " "]
    assert detokenizer.push([31, 5]) == ""
    assert (detokenizer.stopped, detokenizer.stop_string, detokenizer.num_tokens_used) == (True, "2 3", 3)
    assert detokenizer.push([7]) == detokenizer.finish() == ""
    assert detokenizer.num_tokens_used == 3


def test_stop_string_that_begins_within_min_tokens_counts() -> None:
    assert stream(Detokenizer(None, [], stop=("1 2",), min_tokens=2), [1, 2, 3]) == "1 2 3"
    assert stream(Detokenizer(None, [], stop=("2 3",), min_tokens=2), [1, 2, 3]) == "1 "


def test_text_held_back_comes_at_the_end() -> None:
    detokenizer = Detokenizer(None, [], stop=("1 2 3 4",))
    assert [detokenizer.push([i]) for i in (1, 2, 3)] == ["", "", ""]
    assert detokenizer.finish() == "1 2 3"
    assert not detokenizer.stopped


def test_without_a_tokenizer_ids_are_the_text() -> None:
    detokenizer = Detokenizer(None, [5, 6])
    assert detokenizer.push([1, 22]) + detokenizer.push([333]) + detokenizer.finish() == "1 22 333"


def test_endless_invalid_bytes_stay_cheap() -> None:
    """Each is shown when the next comes; 20 000 take 20 ms, where decoding them all anew each time takes minutes."""
    tokenizer = TOKENIZERS["byte_level"]
    (half,) = (i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xe4")
    detokenizer = Detokenizer(tokenizer, [], stop=("ab" * 50,))
    started = time.perf_counter()
    assert [detokenizer.push([half]) for _ in range(20_000)] == ["", *["\ufffd"] * 19_999]
    assert time.perf_counter() - started < 5.0


def test_unrecognised_decoder_still_gives_text(tmp_path: Path) -> None:
    """WordPiece, which no decoder-only model has."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.WordPiece({"[UNK]": 0, "hello": 1, "##s": 2, "world": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tokenizer = make_tokenizer(backend)
    token_ids = tokenizer.encode("hellos worlds hello")
    assert stream(Detokenizer(tokenizer, []), token_ids) == tokenizer.decode(token_ids) == "hellos worlds hello"

"""The tokenizer equals transformers' AutoTokenizer, and needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from relevo import demo
from relevo.core.errors import InvalidRequest, StartupError
from relevo.model_files import ModelFiles
from relevo.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import TEXTS, write_byte_level, write_llama, write_metaspace

KINDS = ("demo", "byte_level", "llama", "metaspace")
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Grüße, 世界 👩‍🚀!\n"},
    {"role": "assistant", "content": "hello <|im_end|> world"},
    {"role": "user", "content": "again"},
]


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_files(ModelFiles(folder, "test", ""))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    return {
        "demo": demo.target_path(),
        "byte_level": write_byte_level(base / "byte_level"),
        "llama": write_llama(base / "llama"),
        "metaspace": write_metaspace(base / "metaspace"),
    }


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> dict[str, tuple[Tokenizer, Any]]:
    return {
        kind: (load(folder), transformers.AutoTokenizer.from_pretrained(folder)) for kind, folder in folders.items()
    }


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
    | st.lists(st.sampled_from([*TEXTS, "<s>", "</s>", "two words", "<think>", "<|im_end|>", " "])).map("".join),
    st.booleans(),
)
def test_encode_and_decode_equal_transformers(
    pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str, flag: bool
) -> None:
    ours, theirs = pairs[kind]
    token_ids = ours.encode(text, add_special_tokens=flag)
    assert token_ids == theirs(text, add_special_tokens=flag)["input_ids"]
    assert ours.decode(token_ids, skip_special_tokens=flag) == theirs.decode(token_ids, skip_special_tokens=flag)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(0, 700), max_size=12), st.booleans())
def test_decode_of_any_ids_equals_transformers(
    pairs: dict[str, tuple[Tokenizer, Any]], kind: str, token_ids: list[int], flag: bool
) -> None:
    ours, theirs = pairs[kind]
    assert ours.decode(token_ids, skip_special_tokens=flag) == theirs.decode(token_ids, skip_special_tokens=flag)


@pytest.mark.parametrize("kind", KINDS)
def test_size_and_special_tokens_equal_transformers(pairs: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    ours, theirs = pairs[kind]
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    special = {i for i in range(ours.vocab_size) if ours.is_special(i)}
    assert special == {i for i, token in theirs.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_equal_transformers(
    pairs: dict[str, tuple[Tokenizer, Any]], kind: str, add_generation_prompt: bool
) -> None:
    ours, theirs = pairs[kind]
    text = ours.render_chat(MESSAGES, add_generation_prompt=add_generation_prompt)
    assert text == theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    token_ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=add_generation_prompt, return_dict=False)
    assert ours.encode(text, add_special_tokens=False) == token_ids


def test_template_variables_and_tools_reach_the_template(tmp_path: Path) -> None:
    template = "{{ bos_token }}|{{ image_token }}|{{ colour }}|{{ tools | tojson }}|{{ pad_token is defined }}"
    config = {
        "chat_template": template,
        "image_token": "<img>",
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
    }
    folder = write_byte_level(tmp_path, **config)
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    text = load(folder).render_chat(MESSAGES, tools=tools, colour="red")
    assert text == f"<s>|<img>|red|{json.dumps(tools)}|False"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert text == theirs.apply_chat_template(MESSAGES, tokenize=False, tools=tools, colour="red")


def test_where_chat_templates_live(tmp_path: Path) -> None:
    """In the configuration as text or by name; files of their own come first."""
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    folder = write_byte_level(tmp_path, chat_template=named)
    assert load(folder).render_chat(MESSAGES) == "plain"
    assert load(folder).render_chat(MESSAGES, tools=[]) == "with tools"
    (folder / "chat_template.jinja").write_text("from its file")
    assert load(folder).render_chat(MESSAGES, tools=[]) == "from its file"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools from a file")
    assert load(folder).render_chat(MESSAGES, tools=[]) == "tools from a file"
    assert load(folder).chat_template == "from its file"


def test_refused_chats_name_the_parameter(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="roles must alternate") as error:
        load(write_byte_level(tmp_path, chat_template=template)).render_chat(MESSAGES)
    assert error.value.param == "messages"
    broken = load(write_byte_level(tmp_path, chat_template="{{ messages[0]['content'] + 1 }}"))
    with pytest.raises(InvalidRequest, match="refuses"):
        broken.render_chat(MESSAGES)
    without = load(write_byte_level(tmp_path, chat_template=None))
    assert without.chat_template is None
    with pytest.raises(InvalidRequest, match="no chat template"):
        without.render_chat(MESSAGES)
    with pytest.raises(InvalidRequest, match="must not be empty"):
        load(demo.target_path()).render_chat([])


def test_keys_without_a_value_are_as_if_not_there() -> None:
    tokenizer = load(demo.target_path())
    with_none = [{**message, "tool_calls": None} for message in MESSAGES]
    assert tokenizer.render_chat(with_none) == tokenizer.render_chat(MESSAGES)


@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_bos_follows_tokenizer_json_as_in_transformers(tmp_path: Path, flags: dict[str, bool]) -> None:
    folder = write_llama(tmp_path, **flags)
    token_ids = load(folder).encode("hello")
    assert token_ids == transformers.AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]
    assert token_ids[0] == 1


def test_special_tokens_that_only_the_configuration_names(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, eos_token="<|end|>", extra_special_tokens=["<think>", "<|new|>"])
    ours, theirs = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("a<|end|>b", "<think>x<|new|>", "a<s>"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    assert ours.eos_token_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_join_to_the_text(pairs: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    tokenizer, _ = pairs[kind]
    for text in [TEXTS[0], TEXTS[2]] if kind == "metaspace" else TEXTS:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, token_ids)).decode().lstrip() == tokenizer.decode(token_ids).lstrip()
    assert tokenizer.token_bytes(100_000) == b""


def test_bytes_and_text_of_part_of_a_character(folders: dict[str, Path]) -> None:
    tokenizer = load(folders["llama"])
    token_ids = tokenizer.encode("世", add_special_tokens=False)
    assert [tokenizer.token_bytes(i) for i in token_ids] == [b" ", b"\xe4", b"\xb8", b"\x96"]
    assert tokenizer.token_text(token_ids[1]) == "\ufffd"


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        load(demo.target_path()).encode("a\ud800")


def test_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert Tokenizer.from_files(ModelFiles(tmp_path, "dummy", "")) is None


def test_unreadable_tokenizer_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartupError, match=r"tokenizer\.json"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(StartupError, match="cannot be converted"):
        load(tmp_path)


def test_older_files_are_converted(tmp_path: Path, folders: dict[str, Path]) -> None:
    """A GPT-2 with vocab.json and merges.txt only."""
    model = json.loads((folders["byte_level"] / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = TEXTS[1]
    assert load(tmp_path).encode(text) == load(folders["byte_level"]).encode(text)


def test_torch_is_not_imported() -> None:
    script = (
        "import sys; from relevo.model_files import resolve_model; from relevo.tokenizer import Tokenizer\n"
        "from relevo.detokenizer import Detokenizer\n"
        "t = Tokenizer.from_files(resolve_model(None)); d = Detokenizer(t, [0])\n"
        "text = t.render_chat([{'role': 'user', 'content': 'hi'}]); d.push(t.encode(text)); d.finish()\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_apart_is_the_same(folders: dict[str, Path], kind: str) -> None:
    """Also one that can't do without the library, which is read here then."""
    whole, apart = load(folders[kind]), Tokenizer.from_files(ModelFiles(folders[kind], kind), apart=True)
    assert apart is not None
    assert apart.needs_library == whole.needs_library == (kind in ("llama", "metaspace"))
    assert (apart.vocab_size, apart.eos_token_ids) == (whole.vocab_size, whole.eos_token_ids)
    for token_id in range(whole.vocab_size + 2):
        assert apart.token_bytes(token_id) == whole.token_bytes(token_id)
        assert apart.is_special(token_id) == whole.is_special(token_id)
    for text in [*TEXTS, "two words <|im_end|></s>", ""]:
        assert apart.encode(text) == whole.encode(text)
        assert apart.decode(whole.encode(text)) == whole.decode(whole.encode(text))
    assert apart.render_chat(MESSAGES) == whole.render_chat(MESSAGES)


def test_the_library_stays_out_where_it_is_read_apart() -> None:
    script = (
        "import sys; from relevo.model_files import resolve_model; from relevo.tokenizer import Tokenizer\n"
        "t = Tokenizer.from_files(resolve_model(None), apart=True); t.decode(t.encode('hi'))\n"
        "sys.exit('tokenizers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

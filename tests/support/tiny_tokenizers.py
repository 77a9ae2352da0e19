"""Small tokenizers of the kinds that language models have, as the files that a model's folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It isn't far, is it?\n\n    def f(x):\n        return x + 1\n",
    "Grüße aus München, déjà vu, naïve café; 你好，世界。 こんにちは 안녕하세요 👩‍🚀🎉 e\u0301 नमस्ते",
    "hello hello world world the the of of and and to to in in 12345 67890 !?.,;:",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_byte_level(folder: Path, **config: Any) -> Path:
    """As GPT-2, Llama 3 or Qwen: bytes as characters, and added tokens of every sort."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("two words"), AddedToken("mañana 日")])
    tokenizer.add_special_tokens(["<|im_end|>"])
    return _write(folder, tokenizer, **config)


def write_llama(folder: Path, **config: Any) -> Path:
    """As Llama 2 or Mistral: sentencepiece with byte tokens; a space is put before a text, and dropped by decoding."""
    alphabet = sorted({character for text in TEXTS[::2] for character in text if character not in " \n"})
    words = ["▁", "▁the", "▁hello", "he", "llo", "▁wor", "ld", "▁▁", "▁▁▁▁", "你", "▁caf", *alphabet]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    vocab += [(word, -float(10 - len(word))) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return _write(folder, tokenizer, **config)


def write_metaspace(folder: Path, **config: Any) -> Path:
    """Sentencepiece without byte tokens, its spaces left to tokenizers' Metaspace."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS * 3,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return _write(folder, tokenizer, **config)


def _write(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    given = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder

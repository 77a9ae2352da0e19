"""Token streams and the windows cut from them."""

import random
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from relevo.demo.corpus import Corpus

# Share of the windows taken from each kind of text.
MIX = {"chats": 0.5, "pages": 0.3, "sources": 0.2}


class Stream:
    """Documents of one kind, laid end to end: `<bos> document <eos> <bos> document <eos> ...`."""

    def __init__(self, documents: Iterable[list[int]]) -> None:
        self.starts: list[int] = []
        tokens: list[int] = []
        for document in documents:
            self.starts.append(len(tokens))
            tokens += document
        self.tokens = torch.tensor(tokens)

    def window(self, offset: int, length: int) -> Tensor:
        """`length` tokens from `offset` on, as far round as the end allows. int64 [length]"""
        offset = min(offset, len(self.tokens) - length)
        return self.tokens[offset : offset + length]


def make_streams(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> dict[str, Stream]:
    """Tokenize each kind of text, by the names in MIX."""
    chats: list[str] = tokenizer.apply_chat_template(corpus.chats, tokenize=False)  # type: ignore[assignment]
    texts = {"chats": chats, "pages": corpus.pages, "sources": corpus.sources}
    streams = {}
    for kind, documents in texts.items():
        encodings = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=kind != "chats")
        streams[kind] = Stream([*encoding.ids, tokenizer.eos_token_id] for encoding in encodings)
    return streams


def sample_batch(streams: dict[str, Stream], rng: random.Random, *, batch_size: int, context: int) -> Tensor:
    """Windows by MIX; chats from the first token of one on, the rest from anywhere. int64 [batch_size, context + 1]"""
    rows = []
    for kind in rng.choices(list(MIX), list(MIX.values()), k=batch_size):
        stream = streams[kind]
        offset = rng.choice(stream.starts) if kind == "chats" else rng.randrange(len(stream.tokens))
        rows.append(stream.window(offset, context + 1))
    return torch.stack(rows)


def held_out_windows(streams: dict[str, Stream], *, context: int, limit: int) -> dict[str, Tensor]:
    """Disjoint windows, at most `limit` a kind, spread evenly over each stream. int64 [<= limit, context + 1]"""
    windows = {}
    for kind, stream in streams.items():
        count = min(limit, len(stream.tokens) // (context + 1))
        stride = len(stream.tokens) // count
        windows[kind] = torch.stack([stream.window(n * stride, context + 1) for n in range(count)])
    return windows

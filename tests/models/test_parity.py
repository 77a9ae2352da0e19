"""Logits over a paged cache equal those of transformers' own forward, for every architecture that we claim."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from relevo.kernels import load_backend
from relevo.model_files import resolve_model
from relevo.models.causal_lm import CausalLM
from relevo.models.loader import load_model
from tests.models.paged import PagedModel
from tests.support.tiny_models import ARCHITECTURES, TinyModels

# Longer than twice the longest window (24).
LENGTH = 61
# Of logits whose standard deviation is 0.8 to 2. Both sides compute in float32, in another order.
TOLERANCE = 1e-4


@dataclass
class Case:
    """backend: the kernels to run with, where a test is not about several"""

    model: CausalLM
    oracle: Any
    backend: str

    def paged(self) -> PagedModel:
        return PagedModel(self.model, backend=self.backend)

    def expected(self, tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.oracle(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return logits


# "plain": no passes; the others: with passes, on these kernels.
@pytest.fixture(
    scope="module",
    params=[(name, passes) for name in ARCHITECTURES for passes in ("plain", "reference", "cpu")],
    ids="-".join,
)
def case(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Iterator[Case]:
    architecture, passes = request.param
    path = tiny_models.path(architecture)
    auto_model: Any = AutoModelForCausalLM
    oracle = auto_model.from_pretrained(path, attn_implementation="eager", experts_implementation="eager")
    backend = "reference" if passes == "plain" else passes
    model = load_model(
        resolve_model(str(path)), dtype="float32", kernels=load_backend(backend, "cpu"), passes=passes != "plain"
    )
    yield Case(model, oracle.eval(), backend)


def test_prompt_in_one_go(case: Case) -> None:
    tokens = _tokens(1, LENGTH)
    assert_same(case.paged().step({"a": tokens})["a"], case.expected(tokens))


def test_prompt_in_chunks(case: Case) -> None:
    tokens = _tokens(2, LENGTH)
    paged = case.paged()
    chunks = [paged.step({"a": tokens[begin:end]})["a"] for begin, end in ((0, 17), (17, 18), (18, 48), (48, LENGTH))]
    assert_same(torch.cat(chunks), case.expected(tokens))


def test_decode_token_by_token(case: Case) -> None:
    tokens = _tokens(3, LENGTH)
    paged = case.paged()
    logits = [paged.step({"a": tokens[:29]})["a"], *(paged.step({"a": [token]})["a"] for token in tokens[29:])]
    assert_same(torch.cat(logits), case.expected(tokens))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_mixed_batch_of_decodes_chunks_and_prompts(case: Case, backend: str) -> None:
    decoding, chunked, whole, short = (_tokens(seed, n) for seed, n in ((4, 50), (5, LENGTH), (6, 40), (7, 1)))
    paged = PagedModel(case.model, backend=backend)
    first = paged.step({"decoding": decoding[:49], "chunked": chunked[:20]})
    second = paged.step({"chunked": chunked[20:53], "short": short, "decoding": decoding[49:], "whole": whole})
    third = paged.step({"chunked": chunked[53:]})
    assert_same(torch.cat([first["decoding"], second["decoding"]]), case.expected(decoding))
    assert_same(torch.cat([first["chunked"], second["chunked"], third["chunked"]]), case.expected(chunked))
    assert_same(second["whole"], case.expected(whole))
    assert_same(second["short"], case.expected(short))


def test_only_chosen_rows_get_logits(case: Case) -> None:
    tokens = _tokens(8, 20)
    expected = case.expected(tokens)
    chosen = torch.tensor([19, 0, 7])
    logits = case.paged().forward({"a": tokens}, chosen)
    assert logits.dtype == torch.float32
    assert logits.shape == (3, case.model.vocab_size)
    assert_same(logits, expected[chosen])
    assert case.paged().forward({"a": tokens}, chosen[:0]).shape == (0, case.model.vocab_size)


def test_windows_are_found_and_do_matter(case: Case) -> None:
    """Guards the tests above: a window that nothing exceeds would prove nothing."""
    windows = [layer.sliding_window for layer in case.model.layers if layer.sliding_window is not None]
    if case.oracle.config.model_type in ("mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt_neo"):
        assert windows
        assert max(windows) * 2 < LENGTH
    else:
        assert not windows


def assert_same(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def _tokens(seed: int, length: int) -> list[int]:
    tokens: list[int] = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens
